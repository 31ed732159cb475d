from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.answers import VerifierPool
from schemas.config import VerificationConfig
from schemas.requests import CallFailure
from schemas.samples import AnswerType, Sample
from schemas.verdicts import Failure, Outcome
from training.benchmark_questions import Question
from training.measures import Answer, Rate, Scored, judge_answers, measure, measure_by, score

SAMPLE = Sample("id", "bench", "bench:rows#0", "How many are there?", answer="7")
CHOICE = replace(SAMPLE, question="Which?", choices=("red", "blue", "green"), answer="B")
OPEN = replace(SAMPLE, question="Describe it.", answer=None)


@pytest.fixture(scope="module")
def verifiers() -> Iterator[VerifierPool]:
    with VerifierPool(VerificationConfig(num_workers=1)) as pool:
        yield pool


def outcomes(verifiers: VerifierPool, question: Question, *completions: str) -> list[Outcome]:
    answers = [Answer(completion, 3) for completion in completions]
    return [scored.outcome for scored, _ in judge_answers([question] * len(answers), answers, verifiers)]


def test_right_wrong_unscored_and_unasked_are_counted_apart(verifiers: VerifierPool) -> None:
    answers = [
        Answer("<think>\nThree and four.\n</think>7", 9),
        Answer("<think>\n\n</think>8", 3),
        Answer("<think>\nThree and", 4, is_truncated=True),
        Answer("<think>\nThree and four is 7.", 8),
        Answer(failure=CallFailure("prompt_too_long", "the prompt has 9,000 tokens")),
    ]
    measures = score([Question(SAMPLE)] * 5, answers, verifiers)
    assert (measures.num_questions, measures.num_without_reference) == (5, 0)
    assert measures.accuracy == Rate(1, 5)  # what cannot be scored is not right
    assert measures.num_unscored == {"empty": 1, "no_reply": 1, "truncated": 1}
    assert measures.unscored == Rate(3, 5)
    assert measures.thinking_rate == Rate(3, 4)
    assert measures.truncated == Rate(1, 4)
    assert measures.mean_output_tokens == (9 + 3 + 4 + 8) / 4


def test_a_choice_is_right_by_its_letter_or_its_text(verifiers: VerifierPool) -> None:
    question = Question(CHOICE)
    assert outcomes(verifiers, question, "<think>\n\n</think>B", "<think>\n\n</think>blue", "<think>\n\n</think>C") == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.WRONG,
    ]


def test_any_of_several_references_is_right_and_only_all_of_them_wrong_is_wrong(verifiers: VerifierPool) -> None:
    question = Question(replace(SAMPLE, question="Which brand?", answer="nokia"), other_answers=("samsung",))
    assert outcomes(verifiers, question, "nokia", "Samsung", "apple") == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.WRONG,
    ]


def test_a_reference_that_cannot_be_compared_does_not_spoil_its_alternatives(verifiers: VerifierPool) -> None:
    essay = "because " * 30
    question = Question(replace(SAMPLE, question="Which brand?", answer=essay), other_answers=("nokia",))
    assert outcomes(verifiers, question, "nokia") == [Outcome.CORRECT]


def test_a_question_without_a_reference_counts_for_thinking_and_tokens_but_not_for_accuracy(
    verifiers: VerifierPool,
) -> None:
    questions = [Question(SAMPLE), Question(OPEN), Question(replace(OPEN, answer_type=AnswerType.OPEN, answer="A red"))]
    answers = [Answer("<think>\n\n</think>7", 3), *[Answer("<think>\nHm.\n</think>A red square.", 12)] * 2]
    measures = score(questions, answers, verifiers)
    assert measures.accuracy == Rate(1, 1)
    assert measures.num_without_reference == 2
    assert measures.num_unscored == {}
    assert measures.thinking_rate == Rate(2, 3)
    assert measures.mean_output_tokens == 9


@pytest.mark.parametrize(
    ("completion", "thinks"),
    [
        ("<think>\n\n</think>7", False),
        ("<think>\n \n</think>7", False),
        ("<think>\nIt is 7.\n</think>7", True),
        ("<think>\nIt is", True),
        ("<think>", False),
        ("7", False),
        ("It is 7.\n</think>7", True),
    ],
)
def test_a_reply_thinks_when_its_think_block_holds_text(completion: str, thinks: bool) -> None:
    assert Answer(completion).has_thought is thinks


@pytest.mark.parametrize(
    ("num", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_intervals_are_wilsons(num: int, total: int, low: float, high: float) -> None:
    assert Rate(num, total).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_an_interval_holds_its_share_and_stays_between_0_and_1(counts: tuple[int, int]) -> None:
    rate = Rate(*counts)
    low, high = rate.interval
    assert rate.share is not None
    assert 0 <= low <= rate.share + 1e-12
    assert rate.share - 1e-12 <= high <= 1


def test_nothing_measured_has_no_share_and_an_interval_that_says_nothing() -> None:
    measures = measure([])
    assert (measures.accuracy.share, measures.accuracy.interval) == (None, (0.0, 1.0))
    assert measures.mean_output_tokens is None


SCORED = st.builds(
    Scored,
    outcome=st.just(Outcome.WRONG),
    failure=st.none() | st.sampled_from(Failure),
    has_reference=st.booleans(),
    has_reply=st.booleans(),
    has_thought=st.booleans(),
    is_truncated=st.booleans(),
    num_tokens=st.integers(0, 9),
)


@given(st.lists(st.tuples(st.sampled_from("abc"), SCORED)))
def test_groups_add_up_to_the_whole(pairs: list[tuple[str, Scored]]) -> None:
    whole, groups = measure(scored for _, scored in pairs), measure_by(pairs)
    for count in (
        lambda m: m.num_questions,
        lambda m: m.accuracy.total,
        lambda m: m.unscored.num,
        lambda m: m.thinking_rate.num,
        lambda m: m.truncated.num,
        lambda m: m.num_output_tokens,
        lambda m: m.num_without_reference,
    ):
        assert count(whole) == sum(count(group) for group in groups.values())
