from __future__ import annotations

from collections.abc import Iterator

import pytest

from schemas.config import VerificationConfig
from schemas.samples import AnswerType, Kind, Sample
from schemas.verdicts import Failure, correct, unscored, wrong
from training.rewards import RuleReward, accuracy_reward, combined_reward, is_well_formed, log_by_mode

pytestmark = pytest.mark.filterwarnings("default")

SAMPLE = Sample("0" * 32, "s", "s:f#0", "How many?", answer="7", kind=Kind.OBJECTIVE, answer_type=AnswerType.NUMBER)
DIRECT = "<think>\n\n</think>"


@pytest.fixture(scope="module")
def reward() -> Iterator[RuleReward]:
    with RuleReward(VerificationConfig()) as found:
        yield found


def rewards_of(reward: RuleReward, *texts: str, truncated: tuple[int, ...] = ()) -> list[float | None]:
    return reward(
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        sample=[SAMPLE] * len(texts),
        rollout_mode=["long"] * len(texts),
        is_truncated=[i in truncated for i in range(len(texts))],
        log_metric=lambda name, value: None,
        trainer_state=None,
    )


def test_a_right_answer_is_one_and_a_wrong_one_zero(reward: RuleReward) -> None:
    found = rewards_of(reward, f"{DIRECT}7", f"{DIRECT}8", "<think>\n3 + 4 = 7.\n</think>7", "<think>\n7\n</think>8")
    assert found == [1.0, 0.0, 1.0, 0.0]


def test_a_reply_that_was_cut_off_has_no_reward_even_where_it_looks_wrong(reward: RuleReward) -> None:
    assert rewards_of(reward, f"{DIRECT}8", "<think>\n3 + 4", truncated=(0, 1)) == [None, None]


def test_a_thought_that_never_ends_has_no_reward(reward: RuleReward) -> None:
    assert rewards_of(reward, "<think>\n7 it is 7") == [None]


def test_unscored_is_none_and_never_zero() -> None:
    assert accuracy_reward(unscored(Failure.TIMEOUT)) is None
    assert combined_reward(unscored(Failure.UNREADABLE), f"{DIRECT}7", 0.5) is None


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"{DIRECT}7", True),
        ("<think>\na\n</think>7", True),
        ("<think>\n\n</think>", False),
        ("<think>\n \n</think>7", False),
        ("<think>\na</think>7</think>7", False),
        ("<think>\n<think>a</think>7", False),
        ("<think>\na", False),
        ("7", False),
        ("a<think>\n\n</think>7", False),
    ],
)
def test_well_formed_is_one_block_and_an_answer(completion: str, expected: bool) -> None:
    assert is_well_formed(completion) is expected


def test_the_format_reward_is_added_only_where_it_is_switched_on() -> None:
    assert combined_reward(correct("7"), f"{DIRECT}7", 0.0) == 1.0
    assert combined_reward(correct("7"), f"{DIRECT}7", 0.5) == 1.5
    assert combined_reward(wrong("8"), f"{DIRECT}8", 0.5) == 0.5
    assert combined_reward(correct("7"), "<think>\n \n</think>7", 0.5) == 1.0


def test_accuracy_is_logged_by_mode_over_scored_replies_alone() -> None:
    logged: dict[str, float] = {}
    verdicts = [correct(), unscored(Failure.TRUNCATED), wrong(), correct(), wrong(), wrong()]
    log_by_mode(verdicts, ["long", "long", "long", "short", "short", "short"], logged.__setitem__)
    assert logged == {
        "bpo/unscored_long": pytest.approx(1 / 3),
        "bpo/unscored_short": 0.0,
        "bpo/accuracy_long": 0.5,
        "bpo/accuracy_short": pytest.approx(1 / 3),
        "bpo/delta": pytest.approx(1 / 6),
    }
