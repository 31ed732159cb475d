"""What the labelling stages do with one row, asked through a scripted desk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from flows.labelling import Desk, label_answer, label_difficulty, label_performance, label_reasoning, label_route
from flows.work_rows import WorkRow
from judges.answers import VerifierPool
from judges.prompts import prompt
from judges.sampling_plan import SamplingPlans
from schemas.config import RunConfig, parse_config
from schemas.fates import Exit, Fate
from schemas.requests import CallFailure, Reply, TeacherRequest, derived_seed
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.verdicts import Decision, Heuristic, Mode

SUM = Sample("5" * 32, "sums", "sums:f#0", "4 + 3?", answer="7", kind=Kind.OBJECTIVE, answer_type=AnswerType.NUMBER)
OPEN = Sample("6" * 32, "talks", "talks:f#0", "Why do leaves fall?", kind=Kind.SUBJECTIVE)
BUS = (ImageRef("ab" * 32, 10, 10),)
UNROUTED = Sample(
    "7" * 32, "b", "b:f#0", "Which bus is this?", BUS, answer="the red double-decker bus on the left side"
)
RIGHT, WRONG = "Answer: 7", "Answer: 8"
CUT = Reply("4 + 3 is", "length", "m", prompt_tokens=9, completion_tokens=3)
TIMED_OUT = CallFailure("teacher_timeout", "no whole answer within 600 s")
REJECTED = CallFailure("teacher_rejected", "the image is too large")

Answer = str | Reply | CallFailure
Script = Callable[[TeacherRequest], Answer]


@pytest.fixture(scope="module")
def verifiers() -> Iterator[VerifierPool]:
    config = parse_config({"sources": [{"name": "sums", "format": "jsonl", "path": "sums.jsonl"}]})
    with VerifierPool(config.verification) as pool:
        yield pool


class ScriptedDesk:
    """A desk that answers by a function of the request and keeps the calls, each a list of requests."""

    def __init__(self, script: Script, verifiers: VerifierPool, **performance: object) -> None:
        source = {"name": "sums", "format": "jsonl", "path": "sums.jsonl"}
        config = parse_config({"sources": [source], "performance": {"audit_share": 0.0, **performance}})
        self._script = script
        self.calls: list[list[TeacherRequest]] = []
        self.num_stored = 0
        self.desk = Desk(
            config=config,
            ask_teacher=self._ask,
            ask_samples=self._ask_samples,
            is_stored=lambda request: request.index < self.num_stored,
            ask_reasoner=self._ask,
            verifiers=verifiers,
            plans=SamplingPlans(config.performance),
        )

    @property
    def config(self) -> RunConfig:
        return self.desk.config

    @property
    def sizes(self) -> list[int]:
        return [len(call) for call in self.calls]

    async def _ask(self, request: TeacherRequest) -> Reply | CallFailure:
        return (await self._ask_samples([request]))[0]

    async def _ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Reply | CallFailure]:
        self.calls.append(list(requests))
        answers = []
        for choice, request in enumerate(requests):
            answer = self._script(request)
            if isinstance(answer, str):
                answer = Reply(answer, "stop", "m", prompt_tokens=9, completion_tokens=3, choice=choice)
            answers.append(answer)
        return answers


def in_turn(*answers: Answer) -> Script:
    """Answers sample number i of a question with the i-th of these."""
    return lambda request: answers[request.index]


def labelled(sample: Sample, scripted: ScriptedDesk) -> WorkRow | Fate:
    return asyncio.run(label_performance(WorkRow(sample), scripted.desk))


def test_a_row_is_labelled_by_its_first_right_answer(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(WRONG, RIGHT), verifiers, waves=[1, 1, 2, 4])
    row = labelled(SUM, scripted)
    assert isinstance(row, WorkRow)
    assert row.decision == Decision(Mode.DIRECT, Heuristic.PERFORMANCE, num_right=1, num_scored=2, num_sampled=2)
    assert scripted.sizes == [1, 1]


def test_a_wave_is_one_call_for_consecutive_samples_of_one_question(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(*[WRONG] * 8), verifiers, waves=[1, 1, 2, 4])
    labelled(SUM, scripted)
    assert scripted.sizes == [1, 1, 2, 4]
    requests = [request for call in scripted.calls for request in call]
    base = derived_seed(scripted.config.seed, SUM.id, "performance")
    assert [request.index for request in requests] == list(range(8))
    assert [request.seed for request in requests] == [(base + index) % 2**31 for index in range(8)]


def test_stored_replies_are_read_one_by_one_before_any_is_asked_for(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(WRONG, WRONG, RIGHT, *[WRONG] * 5), verifiers, waves=[8])
    scripted.num_stored = 3
    row = labelled(SUM, scripted)
    assert isinstance(row, WorkRow) and row.decision is not None and row.decision.num_sampled == 3
    assert scripted.sizes == [1, 1, 1]


def test_unscored_replies_are_replaced(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(CUT, TIMED_OUT, *[WRONG] * 8), verifiers, waves=[8])
    row = labelled(SUM, scripted)
    assert isinstance(row, WorkRow) and row.decision is not None
    assert (row.decision.mode, row.decision.num_scored, row.decision.num_sampled) == (Mode.THINK, 8, 10)
    assert scripted.sizes == [8, 2]


def test_a_row_whose_replies_cannot_be_scored_is_quarantined_with_the_count(verifiers: VerifierPool) -> None:
    fate = labelled(SUM, ScriptedDesk(in_turn(WRONG, *[CUT] * 15), verifiers))
    assert isinstance(fate, Fate)
    assert (fate.exit, fate.reason) == (Exit.QUARANTINED, "performance_unscored")
    assert fate.detail == "1 of 16 answers could be scored, 8 are needed (truncated)"


def test_a_row_that_gets_no_reply_is_quarantined_with_the_failure_of_its_calls(verifiers: VerifierPool) -> None:
    fate = labelled(SUM, ScriptedDesk(in_turn(*[TIMED_OUT] * 16), verifiers))
    assert isinstance(fate, Fate)
    assert (fate.exit, fate.reason) == (Exit.QUARANTINED, "teacher_timeout")


def test_a_rejected_request_is_not_made_again(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(REJECTED), verifiers, waves=[1, 7])
    fate = labelled(SUM, scripted)
    assert isinstance(fate, Fate) and fate.reason == "teacher_rejected"
    assert scripted.sizes == [1]


def outcome_of(answers: Sequence[Answer], verifiers: VerifierPool, **performance: object) -> object:
    result = labelled(SUM, ScriptedDesk(in_turn(*answers), verifiers, **performance))
    return result if isinstance(result, Fate) else result.decision


@pytest.mark.parametrize("audit_share", [0.0, 1.0])
def test_label_evidence_and_fate_do_not_depend_on_the_plan(audit_share: float, verifiers: VerifierPool) -> None:
    rng = random.Random(5)
    kinds: list[Answer] = [RIGHT, CUT, TIMED_OUT, REJECTED]
    plans: list[object] = ["auto", [8], [1] * 8, [1, 1, 2, 4], [3, 5]]
    outcomes = set()
    for _ in range(60):
        weights = [rng.random() ** 2 * 0.3 for _ in kinds]
        answers = rng.choices([WRONG, *kinds], [1.0, *weights], k=16)
        results = [outcome_of(answers, verifiers, waves=waves, audit_share=audit_share) for waves in plans]
        assert all(result == results[0] for result in results), answers
        outcomes.add(results[0].reason if isinstance(results[0], Fate) else results[0].mode)  # type: ignore[attr-defined]
    assert outcomes >= {Mode.THINK, Mode.DIRECT, "teacher_rejected"}


def test_rows_in_work_at_once_learn_from_each_other(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(*[WRONG] * 8), verifiers)
    rows = [replace(SUM, id=f"{number:032x}") for number in range(500)]

    async def label_all() -> None:
        await asyncio.gather(*(label_performance(WorkRow(row), scripted.desk) for row in rows))

    asyncio.run(label_all())
    calls = {row.id: [len(call) for call in scripted.calls if call[0].sample_id == row.id] for row in rows}
    assert len(calls[rows[0].id]) > 1
    assert calls[rows[-1].id] == [8]


def test_subjective_rows_pass_the_performance_stage(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(), verifiers)
    assert labelled(OPEN, scripted) == WorkRow(OPEN)
    assert scripted.calls == []


def test_an_unreadable_difficulty_verdict_is_asked_for_once_more(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn("perhaps", "yes"), verifiers)
    row = asyncio.run(label_difficulty(WorkRow(OPEN), scripted.desk))
    assert isinstance(row, WorkRow) and row.decision is not None
    assert row.decision.mode is Mode.THINK
    (first,), (second,) = scripted.calls
    assert (first.sampling.temperature, second.sampling.temperature) == (0.0, 0.7)
    assert (first.sampling.max_tokens, second.sampling.max_tokens) == (8, 8)


@pytest.mark.parametrize("bad", ["perhaps", "", "yes or no", Reply("<think>no", "length", "m")])
def test_a_difficulty_verdict_that_is_unreadable_twice_is_quarantined(bad: Answer, verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(bad, "both", "yes"), verifiers)
    fate = asyncio.run(label_difficulty(WorkRow(OPEN), scripted.desk))
    assert isinstance(fate, Fate)
    assert (fate.exit, fate.reason) == (Exit.QUARANTINED, "difficulty_unreadable")
    assert "'both'" in fate.detail
    assert len(scripted.calls) == 2


def test_a_cut_verdict_may_be_twice_as_long_the_next_time(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(Reply("<think>It says yes", "length", "m"), "no"), verifiers)
    row = asyncio.run(label_difficulty(WorkRow(OPEN), scripted.desk))
    assert isinstance(row, WorkRow) and row.decision is not None
    assert row.decision.mode is Mode.DIRECT
    assert scripted.calls[1][0].sampling.max_tokens == 16


def test_a_failed_call_is_not_retried_as_an_unreadable_reply(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(TIMED_OUT), verifiers)
    fate = asyncio.run(label_difficulty(WorkRow(OPEN), scripted.desk))
    assert isinstance(fate, Fate) and fate.reason == "teacher_timeout"
    assert len(scripted.calls) == 1


def test_a_retry_that_fails_leaves_the_failure(verifiers: VerifierPool) -> None:
    fate = asyncio.run(label_difficulty(WorkRow(OPEN), ScriptedDesk(in_turn("hm", TIMED_OUT), verifiers).desk))
    assert isinstance(fate, Fate) and fate.reason == "teacher_timeout"


def test_each_question_of_the_routing_has_a_retry_of_its_own(verifiers: VerifierPool) -> None:
    answers = {"routing": ["hm", "objective"], "topic": ["hm", "ocr"]}
    scripted = ScriptedDesk(lambda request: answers[request.purpose][request.index], verifiers)
    row = asyncio.run(label_route(WorkRow(UNROUTED), scripted.desk))
    assert isinstance(row, WorkRow)
    assert (row.sample.kind, row.sample.topic) == (Kind.OBJECTIVE, Topic.OCR)
    assert [call[0].purpose for call in scripted.calls] == ["routing", "routing", "topic", "topic"]


@pytest.mark.parametrize("purpose", ["routing", "topic"])
def test_routing_that_is_unreadable_twice_names_its_question(purpose: str, verifiers: VerifierPool) -> None:
    good = {"routing": "subjective", "topic": "ocr"}
    scripted = ScriptedDesk(lambda request: "hm" if request.purpose == purpose else good[request.purpose], verifiers)
    fate = asyncio.run(label_route(WorkRow(UNROUTED), scripted.desk))
    assert isinstance(fate, Fate)
    assert (fate.exit, fate.reason) == (Exit.QUARANTINED, f"{purpose}_unreadable")


def consistency_script(*verdicts: str) -> Script:
    """Thinks well, and judges consistency with these words in turn."""

    def answer(request: TeacherRequest) -> str:
        if request.messages[0].text == prompt("consistency"):
            return verdicts[request.index]
        return "<think>The stem forms a layer of cork in autumn, so the leaf loses its hold.</think>Because of cork."

    return answer


def test_an_unreadable_consistency_verdict_is_asked_for_once_more(verifiers: VerifierPool) -> None:
    thinking = WorkRow(OPEN, Decision(Mode.THINK, Heuristic.DIFFICULTY, probability=0.9))
    row = asyncio.run(label_reasoning(thinking, ScriptedDesk(consistency_script("?", "consistent"), verifiers).desk))
    assert isinstance(row, WorkRow)
    assert row.answer == "Because of cork."


def test_consistency_that_is_unreadable_twice_fails_the_trace(verifiers: VerifierPool) -> None:
    thinking = WorkRow(OPEN, Decision(Mode.THINK, Heuristic.DIFFICULTY, probability=0.9))
    fate = asyncio.run(label_reasoning(thinking, ScriptedDesk(consistency_script("?", "!"), verifiers).desk))
    assert isinstance(fate, Fate)
    assert (fate.exit, fate.reason) == (Exit.DROPPED, "consistency_unreadable")


DIRECT = WorkRow(OPEN, Decision(Mode.DIRECT, Heuristic.DIFFICULTY, probability=0.1))


def test_a_direct_answer_that_is_cut_is_asked_for_once_more_with_more_room(verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(in_turn(CUT, "The tree takes back their sugar."), verifiers)
    row = asyncio.run(label_answer(DIRECT, scripted.desk))
    assert isinstance(row, WorkRow) and row.answer == "The tree takes back their sugar."
    [[first], [second]] = scripted.calls
    assert second.sampling.max_tokens == 2 * first.sampling.max_tokens


def test_a_direct_answer_that_is_cut_twice_drops_the_row(verifiers: VerifierPool) -> None:
    fate = asyncio.run(label_answer(DIRECT, ScriptedDesk(in_turn(CUT, CUT), verifiers).desk))
    assert isinstance(fate, Fate) and (fate.exit, fate.reason) == (Exit.DROPPED, "answer_truncated")


@pytest.mark.parametrize("reason", ["teacher_rejected", "teacher_crashed"])
def test_a_question_that_every_sample_would_fail_is_given_up_at_the_first(reason: str, verifiers: VerifierPool) -> None:
    scripted = ScriptedDesk(lambda request: CallFailure(reason, "again"), verifiers, waves=[1, 1, 2, 4])
    fate = labelled(SUM, scripted)
    assert isinstance(fate, Fate) and (fate.exit, fate.reason) == (Exit.QUARANTINED, reason)
    assert scripted.sizes == [1]


def test_a_row_some_of_whose_tries_got_no_reply_is_quarantined_and_not_dropped(verifiers: VerifierPool) -> None:
    thinking = WorkRow(SUM, Decision(Mode.THINK, Heuristic.PERFORMANCE, 0, 8, 8))
    fate = asyncio.run(label_reasoning(thinking, ScriptedDesk(in_turn("hm", TIMED_OUT, "hm", "hm"), verifiers).desk))
    assert isinstance(fate, Fate) and (fate.exit, fate.reason) == (Exit.QUARANTINED, "teacher_timeout")
    dropped = asyncio.run(label_reasoning(thinking, ScriptedDesk(in_turn("hm", "hm", "hm", "hm"), verifiers).desk))
    assert isinstance(dropped, Fate) and dropped.exit is Exit.DROPPED
