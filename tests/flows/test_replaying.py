"""Labels from stored replies: what is known from an earlier run changes no result, and nothing is guessed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.labelling import check_trace
from flows.replaying import KnownTraces, Missing, Replayed, quarantined, replay_stage
from flows.settled import Earlier
from flows.work_rows import WorkRow, work_rows, work_table
from judges import performance, reasoning
from judges.answers import VerifierPool
from schemas.config import RunConfig, parse_config
from schemas.requests import Reply
from schemas.samples import AnswerType, Kind, Sample
from schemas.template import Completion
from schemas.usage import UsageKey
from schemas.verdicts import Decision, Heuristic, Mode, Verdict, wrong
from teacher.client import reply_key
from teacher.journal import Journal

SUM = Sample("5" * 32, "sums", "sums:f#0", "4 + 3?", answer="7", kind=Kind.OBJECTIVE, answer_type=AnswerType.NUMBER)
OPEN = Sample("6" * 32, "sums", "sums:f#1", "Why do leaves fall?", kind=Kind.SUBJECTIVE, answer_type=AnswerType.OPEN)
THOUGHT = "The two numbers are added one after the other, which gives seven."
SHORT = "Too short."
THINKS = Decision(Mode.THINK, Heuristic.PERFORMANCE, 0, 8, 8)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    source = {"name": "sums", "format": "jsonl", "path": "sums.jsonl"}
    return parse_config({"sources": [source], "performance": {"audit_share": 0.0}, "teacher": {"model": "m"}})


@pytest.fixture(scope="module")
def verifiers(config: RunConfig) -> Iterator[VerifierPool]:
    with VerifierPool(config.verification) as pool:
        yield pool


def reply(text: str) -> Reply:
    return Reply(text, "stop", "m", prompt_tokens=9, completion_tokens=3)


def store_samples(folder: Path, config: RunConfig, *texts: str | None) -> None:
    """Stores samples of the sum; None leaves one out."""
    request = performance.performance_request(SUM, 0, config.performance, seed=config.seed)
    with Journal(folder) as journal:
        for index, text in enumerate(texts):
            if text is not None:
                sample = request.sample(index)
                journal.append(reply_key(sample, config.teacher), sample, reply(text))
        journal.compact()


def replay(
    folder: Path, config: RunConfig, verifiers: VerifierPool, *rows: WorkRow, earlier: Earlier | None = None
) -> Replayed:
    with asyncio.Runner() as runner:
        table = work_table(rows)
        return replay_stage("performance", config, table, folder, verifier=verifiers, runner=runner, earlier=earlier)


def test_samples_are_taken_until_one_is_right_and_all_that_are_stored_are_counted(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    store_samples(tmp_path, config, "Answer: 8", "Answer: 7", "Answer: 9")
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), WorkRow(OPEN))
    labelled, passed = work_rows(found.rows)
    assert labelled.decision == Decision(Mode.DIRECT, Heuristic.PERFORMANCE, 1, 2, 2)
    assert passed == WorkRow(OPEN) and found.missing == () and found.fates.num_rows == 0
    usage = found.usage[UsageKey("performance", "performance", "sums", "m")]
    assert (usage.num_calls, usage.num_replies, usage.prompt_tokens, usage.completion_tokens) == (3, 3, 27, 9)


def test_a_row_that_lacks_a_sample_is_missing_and_neither_kept_nor_dropped(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    store_samples(tmp_path, config, "Answer: 8", None, "Answer: 7")
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), WorkRow(OPEN))
    assert work_rows(found.rows) == [WorkRow(OPEN)] and found.fates.num_rows == 0
    detail = "no reply of m to the question 'performance' (sample 1) is stored"
    assert found.missing == (Missing(WorkRow(SUM), "performance", "m", detail),)
    left = quarantined(found, "performance")
    assert left.missing == ()
    fates = left.fates.to_pylist()
    assert [(fate["exit"], fate["reason"], fate["detail"]) for fate in fates] == [
        ("quarantined", "reply_not_stored", detail)
    ]


def earlier_run(*after: WorkRow, is_same_recipe: bool = True) -> Earlier:
    return Earlier(work_table([WorkRow(SUM)]), work_table(after), {}, is_same_recipe, are_same_checks=True)


SETTLED = WorkRow(SUM, Decision(Mode.DIRECT, Heuristic.PERFORMANCE, 1, 8, 8))


def test_what_an_earlier_run_decided_under_the_same_settings_is_not_verified_again(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    """It cannot be: its replies are not there."""
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), earlier=earlier_run(SETTLED))
    assert work_rows(found.rows) == [SETTLED] and found.missing == ()


@pytest.mark.parametrize(
    "earlier",
    [
        earlier_run(SETTLED, is_same_recipe=False),
        # One sample was not scored: it may have been a call that failed.
        earlier_run(WorkRow(SUM, Decision(Mode.DIRECT, Heuristic.PERFORMANCE, 1, 7, 8))),
        # The row left.
        earlier_run(),
        # It was another row.
        Earlier(work_table([WorkRow(OPEN)]), work_table([SETTLED]), {}, True, True),
    ],
    ids=["other settings", "an unscored sample", "a row that left", "another row"],
)
def test_what_is_not_certain_is_labelled_again(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool, earlier: Earlier
) -> None:
    store_samples(tmp_path, config, "Answer: 7")
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), earlier=earlier)
    assert work_rows(found.rows) == [WorkRow(SUM, Decision(Mode.DIRECT, Heuristic.PERFORMANCE, 1, 1, 1))]


class CountingVerifier:
    """Finds everything wrong, and counts."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        self.num_asked += 1
        return wrong(reply_text)


def known_traces(row: WorkRow, *, num_tries: int = 1, are_answers_known: bool = True) -> KnownTraces:
    return KnownTraces(
        work_table([row]),
        num_tries=lambda sample: num_tries,
        verifier=CountingVerifier(),
        are_answers_known=are_answers_known,
    )


STRICT = {"min_words": 1000}
"""Under these settings a trace that is really checked is too short."""


@pytest.mark.parametrize(
    ("sample", "answer", "trace", "finish_reason", "num_tries", "is_known"),
    [
        (OPEN, "It is autumn.", Completion(THOUGHT, "It is autumn."), "stop", 2, True),
        (OPEN, "It is autumn.", Completion(THOUGHT, "It is spring."), "stop", 1, False),
        (OPEN, "It is autumn.", Completion(SHORT, "It is autumn."), "stop", 1, False),
        (SUM, "7", Completion(THOUGHT, "Answer: 7"), "stop", 1, True),
        (SUM, "7", Completion(THOUGHT, "Answer: 7"), "stop", 2, False),
        (SUM, "7", Completion(THOUGHT, "Answer: 7"), "length", 1, False),
    ],
    ids=["the same", "another answer", "another trace", "its only try", "one of two tries", "cut off"],
)
def test_a_trace_is_checked_again_unless_it_is_certainly_the_one_that_was_accepted(
    config: RunConfig,
    sample: Sample,
    answer: str,
    trace: Completion,
    finish_reason: str,
    num_tries: int,
    is_known: bool,
) -> None:
    known = known_traces(WorkRow(sample, THINKS, THOUGHT, answer), num_tries=num_tries)
    said = Reply("", finish_reason, "m")
    strict = config.reasoning.model_copy(update=STRICT)
    row = WorkRow(sample, THINKS)
    expected = None if is_known else check_trace(row, trace, said, strict)
    assert (expected is None) == is_known
    assert known.check_trace(row, trace, said, strict) == expected


@pytest.mark.parametrize(("are_answers_known", "num_asked"), [(True, 0), (False, 1)])
def test_the_answer_behind_an_accepted_trace_is_right_where_the_verifier_is_the_same(
    config: RunConfig, are_answers_known: bool, num_asked: int
) -> None:
    row, trace = WorkRow(SUM, THINKS, THOUGHT, "7"), Completion(THOUGHT, "Answer: 7")
    verifier = CountingVerifier()
    known = KnownTraces(
        work_table([row]), num_tries=lambda sample: 1, verifier=verifier, are_answers_known=are_answers_known
    )
    known.check_trace(row, trace, reply(""), config.reasoning)
    verdict = asyncio.run(known.verify_async("Answer: 7", SUM))
    assert (verdict.is_correct, verifier.num_asked) == (are_answers_known, num_asked)
    asyncio.run(known.verify_async("Answer: 8", SUM))
    assert verifier.num_asked == num_asked + 1, "another answer is compared"


def test_traces_are_counted_by_request_while_replies_are_not_compacted(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    """Two tries end alike, only the second was accepted: the first is not taken for it."""
    row = WorkRow(SUM, THINKS, THOUGHT, "7")
    with Journal(tmp_path) as journal:
        for index, text in enumerate((f"<think>{THOUGHT}</think>Answer: 8", f"<think>{THOUGHT}</think>Answer: 7")):
            request = reasoning.reasoning_request(SUM, index, config.reasoning, seed=config.seed)
            journal.append(reply_key(request, config.teacher), request, reply(text))
    with asyncio.Runner() as runner:
        table = work_table([WorkRow(SUM, THINKS)])
        earlier = Earlier(table, work_table([row]), {}, True, True)
        found = replay_stage("reasoning", config, table, tmp_path, verifier=verifiers, runner=runner, earlier=earlier)
    assert work_rows(found.rows) == [row]
    assert found.usage[UsageKey("reasoning", "reasoning", "sums", "m")].num_replies == 2
