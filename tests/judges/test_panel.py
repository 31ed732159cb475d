"""A panel's votes: what each way of voting means, and that a missing verdict is never a vote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.difficulty import decision_at
from judges.panel import NO_QUORUM, missing_quorum, num_verdicts_needed, panel_decision, teacher_names
from schemas.config import DifficultyConfig, EndpointConfig, RunConfig, parse_config
from schemas.errors import ConfigError
from schemas.requests import CallFailure
from schemas.verdicts import Heuristic, Mode

SOURCE = {"name": "talks", "format": "jsonl", "path": "talks.jsonl"}
TIMED_OUT = CallFailure("teacher_timeout", "no whole answer within 600 s")


def settings(num_others: int, **values: object) -> DifficultyConfig:
    panel = [{"model": f"other-{number}"} for number in range(num_others)]
    return DifficultyConfig.model_validate({"panel": panel, **values})


def run_config(**difficulty: object) -> RunConfig:
    return parse_config({"sources": [SOURCE], "teacher": {"model": "main"}, "difficulty": difficulty})


def mode_of(verdicts: list[float | None], config: DifficultyConfig) -> Mode | None:
    decision = panel_decision(verdicts, config)
    return None if decision is None else decision.mode


PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(PROBABILITIES, st.floats(0, 1))
def test_the_majority_of_votes_decides_and_a_tie_goes_by_the_two_in_the_middle(
    verdicts: list[float], threshold: float
) -> None:
    num_yes = sum(verdict >= threshold for verdict in verdicts)
    mode = mode_of([*verdicts], settings(len(verdicts) - 1, threshold=threshold))
    if 2 * num_yes != len(verdicts):
        assert mode is (Mode.THINK if 2 * num_yes > len(verdicts) else Mode.DIRECT)
        return
    ordered = sorted(verdicts)
    middle = (ordered[num_yes - 1] + ordered[num_yes]) / 2
    assert mode is (Mode.THINK if middle >= threshold else Mode.DIRECT)


@given(PROBABILITIES, st.floats(0, 1))
def test_unanimous_needs_every_vote_and_any_needs_one(verdicts: list[float], threshold: float) -> None:
    votes = [verdict >= threshold for verdict in verdicts]
    for vote, is_think in (("unanimous", all(votes)), ("any", any(votes))):
        config = settings(len(verdicts) - 1, threshold=threshold, vote=vote)
        assert mode_of([*verdicts], config) is (Mode.THINK if is_think else Mode.DIRECT)


@given(
    PROBABILITIES,
    st.floats(0, 1),
    st.sampled_from(["majority", "unanimous", "any", "mean"]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_teachers_and_missing_verdicts_change_nothing(
    verdicts: list[float], threshold: float, vote: str, random: object
) -> None:
    config = settings(len(verdicts) - 1, threshold=threshold, vote=vote)
    with_missing: list[float | None] = [*verdicts, None, None]
    random.shuffle(with_missing)  # type: ignore[attr-defined]
    decision = panel_decision(with_missing, config)
    assert decision == panel_decision([*verdicts], config)
    assert decision is not None and decision.probability is not None
    # The invariant of one teacher holds for a panel: a row thinks exactly if its probability reaches the threshold.
    assert decision == decision_at(decision.probability, config)
    assert decision.heuristic is Heuristic.DIFFICULTY
    assert min(verdicts) <= decision.probability <= max(verdicts) or vote == "mean"


def test_a_split_panel_is_decided_as_each_vote_says() -> None:
    verdicts: list[float | None] = [0.95, 0.45, 0.4]
    outcomes = {vote: mode_of(verdicts, settings(2, vote=vote)) for vote in ("majority", "unanimous", "any", "mean")}
    assert outcomes == {
        "majority": Mode.DIRECT,
        "unanimous": Mode.DIRECT,
        "any": Mode.THINK,
        "mean": Mode.THINK,
    }
    decision = panel_decision(verdicts, settings(2))
    assert decision is not None and decision.probability == 0.45


def test_without_a_quorum_there_is_no_decision() -> None:
    assert [num_verdicts_needed(settings(n)) for n in range(5)] == [1, 2, 2, 3, 3]
    assert panel_decision([0.9, None, None], settings(2)) is None
    assert mode_of([0.9, None, None], settings(2, quorum=1)) is Mode.THINK
    assert mode_of([0.9, None, 0.8], settings(2)) is Mode.THINK
    assert panel_decision([0.9, None, 0.8], settings(2, quorum=3)) is None


def test_what_is_missing_names_every_teacher_that_failed_and_why() -> None:
    config = run_config(panel=[{"model": "b"}, {"model": "c"}])
    failure = missing_quorum([0.9, TIMED_OUT, CallFailure("difficulty_unreadable", "it said 'hm'")], config)
    assert failure.reason == NO_QUORUM
    assert "1 of 3 teachers gave a verdict, 2 are needed" in failure.detail
    assert "b: teacher_timeout: no whole answer" in failure.detail and "c: difficulty_unreadable" in failure.detail
    assert missing_quorum([TIMED_OUT], run_config()) is TIMED_OUT, "one teacher's failure is the row's"


def test_two_teachers_that_would_share_their_replies_are_refused() -> None:
    with pytest.raises(ConfigError, match="'main' twice"):
        run_config(panel=[{"model": "main", "url": "http://elsewhere:8000/v1"}])
    with pytest.raises(ConfigError, match="'b' twice"):
        run_config(panel=[{"model": "b"}, {"model": "b", "url": "http://elsewhere:8000/v1"}])
    run_config(panel=[{"model": "main", "revision": "2"}, {"model": "main", "extra_body": {"seed": 1}}])


def test_a_quorum_that_nobody_can_meet_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 2 teacher"):
        run_config(panel=[{"model": "b"}], quorum=3)


def test_teachers_get_names_that_tell_them_apart() -> None:
    endpoints = [
        EndpointConfig(model="a"),
        EndpointConfig(model="a", revision="x"),
        EndpointConfig(model="a", extra_body={"k": 1}),
        EndpointConfig(model="b"),
    ]
    assert teacher_names(endpoints) == ["a", "a@x", "a #2", "b"]
