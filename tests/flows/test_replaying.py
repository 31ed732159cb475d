"""Labels from stored replies: what is known from an earlier run changes no result, and nothing is guessed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flows.labelling import check_trace
from flows.replaying import KnownTraces, Missing, Replayed, quarantined, replay_stage
from flows.settled import Earlier
from flows.work_rows import WorkRow, labelled_table, unlabelled_table, work_rows
from judges import performance, reasoning
from judges.answers import VerifierPool
from schemas.config import RunConfig, parse_config
from schemas.requests import Reply
from schemas.samples import AnswerType, Kind, Sample, samples_to_table
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


def work_table(rows: Sequence[WorkRow]) -> pa.Table:
    unlabelled = unlabelled_table(samples_to_table([row.sample for row in rows]))
    return labelled_table(unlabelled, np.arange(len(rows)), rows).combine_chunks()


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


PICK = Sample(
    "7" * 32,
    "sums",
    "sums:f#2",
    "Which is even?",
    choices=("3", "4"),
    answer="B",
    kind=Kind.OBJECTIVE,
    answer_type=AnswerType.CHOICE,
)
PICKED = WorkRow(PICK, Decision(Mode.THINK, Heuristic.PERFORMANCE, 0, 8, 8))
"""As no verifier would decide it on the replies that are stored below, so that it is seen who did."""
ALIKE = frozenset({AnswerType.CHOICE})


def earlier_of_two(picked: WorkRow) -> Earlier:
    before, after = work_table([WorkRow(SUM), WorkRow(PICK)]), work_table([SETTLED, picked])
    return Earlier(before, after, {}, is_same_recipe=True, are_same_checks=True, same_verdicts=ALIKE)


def store_picks(folder: Path, config: RunConfig, *indices: int) -> None:
    request = performance.performance_request(PICK, 0, config.performance, seed=config.seed)
    with Journal(folder) as journal:
        for index in indices:
            sample = request.sample(index)
            journal.append(reply_key(sample, config.teacher), sample, reply("Answer: B"))
        journal.compact()


def test_under_another_verifier_only_answers_that_it_judges_otherwise_are_verified_again(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    store_samples(tmp_path, config, "Answer: 8", "Answer: 7")
    store_picks(tmp_path, config, 0, 1, 2)
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), WorkRow(PICK), earlier=earlier_of_two(PICKED))
    assert work_rows(found.rows) == [WorkRow(SUM, Decision(Mode.DIRECT, Heuristic.PERFORMANCE, 1, 2, 2)), PICKED]
    usage = found.usage[UsageKey("performance", "performance", "sums", "m")]
    assert (usage.num_replies, usage.prompt_tokens) == (5, 45)


@pytest.mark.parametrize(
    ("indices", "picked"),
    [
        ((0, 2), PICKED),
        ((1,), PICKED),
        ((0,), WorkRow(PICK, Decision(Mode.THINK, Heuristic.PERFORMANCE, 0, 8, 9))),
    ],
    ids=["a gap among its samples", "no first sample", "an unscored sample"],
)
def test_under_another_verifier_a_row_is_verified_again_unless_its_samples_are_certain(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool, indices: tuple[int, ...], picked: WorkRow
) -> None:
    store_samples(tmp_path, config, "Answer: 7")
    store_picks(tmp_path, config, *indices)
    found = replay(tmp_path, config, verifiers, WorkRow(SUM), WorkRow(PICK), earlier=earlier_of_two(picked))
    assert PICKED not in work_rows(found.rows) and picked not in work_rows(found.rows)
    assert [one.row.sample for one in found.missing] == ([] if 0 in indices else [PICK])


def test_under_another_verifier_traces_stay_whose_answers_it_judges_as_before(
    tmp_path: Path, config: RunConfig, verifiers: VerifierPool
) -> None:
    """The one reply of each row is stored; that of the choice now says something else, which nobody reads."""
    rows = [WorkRow(sample, THINKS) for sample in (SUM, PICK)]
    accepted = [WorkRow(SUM, THINKS, THOUGHT, "7"), WorkRow(PICK, THINKS, THOUGHT, "B")]
    with Journal(tmp_path) as journal:
        for row in rows:
            request = reasoning.reasoning_request(row.sample, 0, config.reasoning, seed=config.seed)
            text = f"<think>{THOUGHT}</think>Answer: 9"
            journal.append(reply_key(request, config.teacher), request, reply(text))
        journal.compact()
    with asyncio.Runner() as runner:
        table = work_table(rows)
        earlier = Earlier(table, work_table(accepted), {}, True, True, ALIKE)
        found = replay_stage("reasoning", config, table, tmp_path, verifier=verifiers, runner=runner, earlier=earlier)
    assert work_rows(found.rows) == [accepted[1]]
    assert [one.row.sample for one in found.missing] == [SUM], "its only trace is wrong now, and there is no other"
    assert found.usage[UsageKey("reasoning", "reasoning", "sums", "m")].num_replies == 2


class CountingVerifier:
    """Finds everything wrong, and counts."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        self.num_asked += 1
        return wrong(reply_text)


def known_traces(row: WorkRow, *, num_tries: int = 1) -> KnownTraces:
    return KnownTraces(
        work_table([row]),
        num_tries=lambda sample: num_tries,
        verifier=CountingVerifier(),
        same_verdicts=frozenset(AnswerType),
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


@pytest.mark.parametrize(("same_verdicts", "num_asked"), [({AnswerType.NUMBER}, 0), ({AnswerType.CHOICE}, 1)])
def test_the_answer_behind_an_accepted_trace_is_right_where_the_verifier_says_what_it_said(
    config: RunConfig, same_verdicts: set[AnswerType], num_asked: int
) -> None:
    row, trace = WorkRow(SUM, THINKS, THOUGHT, "7"), Completion(THOUGHT, "Answer: 7")
    verifier = CountingVerifier()
    known = KnownTraces(work_table([row]), num_tries=lambda sample: 1, verifier=verifier, same_verdicts=same_verdicts)
    known.check_trace(row, trace, reply(""), config.reasoning)
    verdict = asyncio.run(known.verify_async("Answer: 7", SUM))
    assert (verdict.is_correct, verifier.num_asked) == (num_asked == 0, num_asked)
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
