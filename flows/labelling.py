"""What each labelling stage does with one row: the judges' requests, asked through a teacher, and the row that results.

Every function takes a row and returns it, completed, or its fate. Rows that a stage does not concern pass unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from filters.traces import TraceProblem, trace_problem
from flows.work_rows import WorkRow
from judges import difficulty, panel, performance, reasoning, routing
from judges.retry import changed_retry, is_cut_short
from judges.sampling_plan import SamplingPlans
from schemas.config import ReasoningConfig, RunConfig
from schemas.errors import RowError
from schemas.fates import Fate
from schemas.question import render_question
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import Kind, Sample
from schemas.template import Completion, render_completion
from schemas.verdicts import Failure, Mode, Verdict, unscored

Ask = Callable[[TeacherRequest], Awaitable[Reply | CallFailure]]
AskSamples = Callable[[Sequence[TeacherRequest]], Awaitable[list[Reply | CallFailure]]]
_Reading = TypeVar("_Reading")
HOPELESS = frozenset({"teacher_rejected", "teacher_crashed"})
"""Failures that no further sample heals: the endpoint refuses this very request (too long, an image it cannot take), or
its engine dies of it, and would die again."""


def check_trace(row: WorkRow, trace: Completion, reply: Reply, settings: ReasoningConfig) -> TraceProblem | None:
    """Returns the first problem of a row's trace, read from a reply, or None; its answer is not compared here."""
    return trace_problem(
        trace.reasoning,
        trace.answer,
        is_truncated=reply.is_truncated,
        config=settings,
        question=render_question(row.sample),
    )


class Verifier(Protocol):
    """Compares replies with references: a `VerifierPool`, or who knows some of its verdicts."""

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict: ...


CheckTrace = Callable[[WorkRow, Completion, Reply, ReasoningConfig], TraceProblem | None]


@dataclass(frozen=True, slots=True)
class Desk:
    """What a labelling function works with: the settings, the two endpoints, the verifiers and the sampling plans.

    ask_samples: asks the teacher for several samples of one question, in one call where that is possible. is_stored:
    whether the teacher's reply is in the journal.
    plans: shared by all shards of a process. ask_panel: the further teachers that vote on difficulty. check_trace: says
    what is wrong with a trace; a desk that knows the result already need not look again.
    """

    config: RunConfig
    ask_teacher: Ask
    ask_samples: AskSamples
    is_stored: Callable[[TeacherRequest], bool]
    ask_reasoner: Ask
    verifiers: Verifier
    plans: SamplingPlans
    ask_panel: Sequence[Ask] = ()
    check_trace: CheckTrace = check_trace


Label = Callable[[WorkRow, Desk], Awaitable[WorkRow | Fate]]


async def label_route(row: WorkRow, desk: Desk) -> WorkRow | Fate:
    """Routing: kind, answer type and topic, by rule where possible, else by the teacher."""
    route = routing.route_by_rules(row.sample)
    sample = route.sample
    if not desk.config.routing.ask_teacher:
        return replace(row, sample=routing.with_fallbacks(sample))
    questions = []
    if route.needs_kind:
        questions.append((routing.kind_request(sample), routing.with_kind))
    if route.needs_topic:
        questions.append((routing.topic_request(sample), routing.with_topic))
    for request, complete in questions:
        completed = await _ask_readably(desk.ask_teacher, request, partial(complete, sample))
        if isinstance(completed, CallFailure):
            return row.quarantined("routing", completed.reason, completed.detail)
        sample = completed
    return replace(row, sample=sample)


async def _ask_readably(
    ask: Ask, request: TeacherRequest, read: Callable[[Reply], _Reading | None]
) -> _Reading | CallFailure:
    """Returns what a judge reads in the reply to its question; an unreadable reply gets one changed retry.

    read: returns None for a reply that it cannot read. Two such replies are the failure "{purpose}_unreadable".
    """
    texts = []
    for _ in range(2):
        reply = await ask(request)
        if isinstance(reply, CallFailure):
            return reply
        reading = None if is_cut_short(request, reply) else read(reply)
        if reading is not None:
            return reading
        texts.append(f"{reply.text[:80]!r} ({reply.finish_reason})")
        request = changed_retry(request, reply)
    return CallFailure(f"{request.purpose}_unreadable", f"the teacher replied {texts[0]}, asked again {texts[1]}")


async def label_difficulty(row: WorkRow, desk: Desk) -> WorkRow | Fate:
    """The difficulty heuristic, for subjective rows."""
    if row.sample.kind is not Kind.SUBJECTIVE:
        return row
    verdicts = await difficulty_verdicts(row.sample, [desk.ask_teacher, *desk.ask_panel])
    given = [None if isinstance(verdict, CallFailure) else verdict for verdict in verdicts]
    decision = panel.panel_decision(given, desk.config.difficulty)
    if decision is None:
        missing = panel.missing_quorum(verdicts, desk.config)
        return row.quarantined("difficulty", missing.reason, missing.detail)
    return replace(row, decision=decision)


async def difficulty_verdicts(sample: Sample, asks: Sequence[Ask]) -> list[float | CallFailure]:
    """Returns, of each teacher that is asked, how probably the question needs reasoning, or why that is not known."""
    request = difficulty.difficulty_request(sample)
    readings = [_ask_readably(ask, request, difficulty.reasoning_probability) for ask in asks]
    # Most runs have one teacher; a task of its own would only take time.
    return [await readings[0]] if len(readings) == 1 else list(await asyncio.gather(*readings))


async def label_performance(row: WorkRow, desk: Desk) -> WorkRow | Fate:
    """The performance heuristic, for objective rows: sample, verify, stop when the label is settled.

    Label, evidence and fate depend on the replies in order of their index, never on how the plan grouped them.
    """
    if row.sample.kind is not Kind.OBJECTIVE:
        return row
    settings, source = desk.config.performance, row.sample.source
    is_audit = performance.is_audited(row.sample, settings, seed=desk.config.seed)
    request = performance.performance_request(row.sample, 0, settings, seed=desk.config.seed)
    replies: list[Reply | CallFailure] = []
    verdicts: list[Verdict] = []

    async def take(indices: range) -> None:
        wave = await desk.ask_samples([request.sample(index) for index in indices])
        replies.extend(wave)
        # A stored sample comes alone, and most verdicts are given at once: a task would take longer than that.
        one = await _verify(wave[0], row, desk) if len(wave) == 1 else None
        verdicts.extend([one] if one else await asyncio.gather(*(_verify(reply, row, desk) for reply in wave)))
        desk.plans.observe(source, verdicts, wave)

    while performance.num_needed(verdicts, settings, is_audit=is_audit):
        if desk.is_stored(request.sample(len(verdicts))):
            # Paid for already, and maybe enough: a changed verifier relabels without a call.
            await take(range(len(verdicts), len(verdicts) + 1))
        else:
            async with desk.plans.of(source).turn(is_first=not verdicts):
                await take(desk.plans.next_indices(source, verdicts, is_audit=is_audit))
        num_counted = len(performance.evidence(verdicts, settings, is_audit=is_audit))
        for reply in replies[:num_counted]:
            if isinstance(reply, CallFailure) and reply.reason in HOPELESS:
                return row.quarantined("performance", reply.reason, reply.detail)
    decision = performance.performance_decision(verdicts, settings, is_audit=is_audit)
    if decision is None:
        failures = [reply for reply in replies if isinstance(reply, CallFailure)]
        return _unlabelled(row, verdicts, failures[-1] if failures else None, num_needed=settings.num_samples)
    return replace(row, decision=decision)


async def _verify(reply: Reply | CallFailure, row: WorkRow, desk: Desk) -> Verdict:
    if isinstance(reply, CallFailure):
        return unscored(Failure.NO_REPLY, f"{reply.reason}: {reply.detail}")
    return await desk.verifiers.verify_async(reply.text, row.sample, is_truncated=reply.is_truncated)


def _unlabelled(row: WorkRow, verdicts: list[Verdict], failure: CallFailure | None, *, num_needed: int) -> Fate:
    failures = sorted({str(verdict.failure) for verdict in verdicts if verdict.failure})
    num_scored = sum(verdict.is_scored for verdict in verdicts)
    if failure is not None and failures == [Failure.NO_REPLY]:
        return row.quarantined("performance", failure.reason, failure.detail)
    detail = f"{num_scored} of {len(verdicts)} answers could be scored, {num_needed} are needed ({', '.join(failures)})"
    return row.quarantined("performance", "performance_unscored", detail)


async def label_reasoning(row: WorkRow, desk: Desk) -> WorkRow | Fate:
    """Chains of thought for thinking rows: several tries, each checked; a row whose every try fails is dropped.

    If a call failed, it is quarantined instead: with that reply there might be a trace, so nothing is decided.
    """
    if row.decision is None or row.decision.mode is not Mode.THINK:
        return row
    settings = desk.config.reasoning
    problems: list[TraceProblem | CallFailure] = []
    for index in range(settings.num_tries):
        reply = await desk.ask_reasoner(reasoning.reasoning_request(row.sample, index, settings, seed=desk.config.seed))
        if isinstance(reply, CallFailure):
            problems.append(reply)
            if reply.reason in HOPELESS:
                break
            continue
        trace = reasoning.read_trace(reply)
        problem: TraceProblem | CallFailure | None = desk.check_trace(row, trace, reply, settings)
        problem = problem or await _inconsistency(trace, reply, row, desk)
        if problem is None:
            is_checkable = row.sample.kind is Kind.OBJECTIVE
            return replace(row, reasoning=trace.reasoning, answer=row.sample.answer if is_checkable else trace.answer)
        problems.append(problem)
    detail = f"{len(problems)} tries failed: " + "; ".join(f"{p.reason}: {p.detail}" for p in problems)
    failures = [problem for problem in problems if isinstance(problem, CallFailure)]
    if failures:
        return row.quarantined("reasoning", failures[-1].reason, detail)
    return row.dropped("reasoning", problems[-1].reason, detail)


async def _inconsistency(
    trace: Completion, reply: Reply, row: WorkRow, desk: Desk
) -> TraceProblem | CallFailure | None:
    """Returns why a trace does not agree with its answer, or None if it does; the failure if that cannot be asked."""
    if row.sample.kind is Kind.OBJECTIVE:
        verdict = await desk.verifiers.verify_async(trace.answer, row.sample, is_truncated=reply.is_truncated)
        if verdict.is_correct:
            return None
        if not verdict.is_scored:
            return TraceProblem("trace_answer_unscored", f"{verdict.failure}: {trace.answer[:80]!r}")
        said = verdict.extracted if verdict.extracted is not None else trace.answer
        return TraceProblem(
            "trace_answer_wrong", f"it ends in {said[:80]!r}, the reference is {row.sample.answer!r:.80}"
        )
    if not desk.config.reasoning.judge_consistency:
        return None
    request = reasoning.consistency_request(row.sample, trace)
    agrees = await _ask_readably(desk.ask_teacher, request, reasoning.is_consistent)
    if isinstance(agrees, CallFailure):
        is_unreadable = agrees.reason == f"{request.purpose}_unreadable"
        return TraceProblem(agrees.reason, agrees.detail) if is_unreadable else agrees
    return None if agrees else TraceProblem("trace_inconsistent", f"judged against the answer {trace.answer[:80]!r}")


async def label_answer(row: WorkRow, desk: Desk) -> WorkRow | Fate:
    """The final answer of every row: the reference where there is one, else a direct answer from the teacher.

    Last of the stages, it also makes sure that the row can be written in the bi-mode template.
    """
    assert row.decision is not None, f"row {row.sample.origin} reached the last stage without a decision"
    answer = row.answer if row.answer is not None else row.sample.answer
    if answer is None:
        request = reasoning.direct_request(row.sample, desk.config.direct, seed=desk.config.seed)
        reply = await desk.ask_teacher(request)
        if isinstance(reply, Reply) and reply.is_truncated:
            reply = await desk.ask_teacher(changed_retry(request, reply))
        if isinstance(reply, CallFailure):
            return row.quarantined("answers", reply.reason, reply.detail)
        if reply.is_truncated:
            detail = f"the direct answer was cut after {reply.completion_tokens} tokens"
            return row.dropped("answers", "answer_truncated", detail)
        answer = reasoning.read_trace(reply).answer
        if not answer:
            return row.dropped("answers", "answer_missing", f"the teacher replied {reply.text[:80]!r}")
    try:
        render_completion(answer, row.reasoning or "")
    except RowError as error:
        return row.quarantined("answers", error.reason, error.detail)
    return replace(row, answer=answer, reasoning=row.reasoning or "")
