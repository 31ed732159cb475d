"""What the teacher said about the rows that a report shows, and what today's judges make of it.

Replies are looked up by the ids of those few rows in all journals at once, and the judge that asked for one reads it
anew. Which of them the labels of now rest on is found by labelling the rows once more from the stored replies alone,
by the same functions as in a curation, in front of a desk where nobody is asked anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from corpus.excerpts import ShownReply
from filters.traces import trace_problem
from flows.labelling import Desk
from flows.runtime import Runtime
from flows.stages import DUPLICATES, LABELLING, SOURCES
from flows.work_rows import WORK_SCHEMA, WorkRow, work_rows
from flows.workspace import Workspace
from judges import performance, reasoning
from judges.sampling_plan import SamplingPlans
from judges.verdict_words import read_word, word_probability
from schemas.config import EndpointConfig
from schemas.errors import StorageError
from schemas.question import render_question
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import SAMPLE_SCHEMA, Kind, Sample, table_to_samples
from schemas.verdicts import Verdict
from teacher.client import ReplyKeys
from teacher.compacted import stored_reply
from teacher.replies import scan_replies

_ROUTED = "routing"
_SHARDS_AT_ONCE = 64
_PURPOSES = ("routing", "topic", "difficulty", "performance", "reasoning", "consistency", "direct")
"""The judges in the order in which a row meets them."""


@dataclass(frozen=True, slots=True)
class RunRows:
    """Rows as the work folder has them, by id. before: before labelling. known: with what routing found, if it did."""

    before: Mapping[str, WorkRow]
    known: Mapping[str, Sample]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored reply: its key, its request as far as a judge needs it, and the reply."""

    key: str
    purpose: str
    index: int
    choices: tuple[str, ...]
    reply: Reply


def find_rows(workspace: Workspace, ids: Collection[str]) -> RunRows:
    """Returns the rows of some ids that the stages of a work folder hold. Raises StorageError: a file is damaged."""
    before = _stage_rows(workspace, DUPLICATES, WORK_SCHEMA.names, ids)
    known = {
        sample.id: sample
        for stage in (SOURCES, _ROUTED)
        for sample in table_to_samples(_stage_rows(workspace, stage, SAMPLE_SCHEMA.names, ids).to_arrow())
    }
    return RunRows({row.sample.id: row for row in work_rows(before.to_arrow())}, known)


def count_audit(workspace: Workspace, shards: Sequence[str]) -> dict[tuple[int, int], int]:
    """Returns the audit slice of a run by (num_right, num_scored): all that were labelled, whatever became of them.

    shards: those of the run. Raises StorageError: a file is damaged.
    """
    columns = ["heuristic", "is_audit", "num_right", "num_scored"]
    paths = [workspace.rows_path(performance.PURPOSE, shard) for shard in shards]
    there = [path for path in paths if path.exists()]
    audit: Counter[tuple[int, int]] = Counter()
    for start in range(0, len(there), _SHARDS_AT_ONCE):
        rows = _scan(there[start : start + _SHARDS_AT_ONCE], columns)
        audited = rows.filter(pl.col("is_audit") & (pl.col("heuristic") == performance.PURPOSE))
        counted = _collected(audited.group_by("num_right", "num_scored").len(), workspace.root)
        audit.update({(right, scored): number for right, scored, number in counted.iter_rows()})
    return dict(sorted(audit.items()))


def read_replies(
    runtime: Runtime, samples: Mapping[str, Sample], before: Mapping[str, WorkRow]
) -> dict[str, tuple[ShownReply, ...]]:
    """Returns the stored replies about rows, by their ids: first those that count, in the order in which judges asked.

    samples: what is known of each row. before: those rows that can be labelled once more.

    Raises StorageError: the journals cannot be read, or one is damaged.
    """
    stored = _stored_replies(runtime.workspace.root / "journals", samples)
    return runtime.run(_read_all(runtime, samples, before, stored))


async def _read_all(
    runtime: Runtime,
    samples: Mapping[str, Sample],
    before: Mapping[str, WorkRow],
    stored: Mapping[str, Sequence[_Stored]],
) -> dict[str, tuple[ShownReply, ...]]:
    shown = {}
    for sample_id, replies in stored.items():
        sample = samples[sample_id]
        used = await _used_keys(runtime, before[sample_id], replies) if sample_id in before else None
        read = [await _read(runtime, sample, one) for one in replies]
        counted = [
            replace(reply, is_counted=used is None or one.key in used) for one, reply in zip(replies, read, strict=True)
        ]
        shown[sample_id] = tuple(sorted(counted, key=lambda reply: not reply.is_counted))
    return shown


def _joined(*sentences: str) -> str:
    return "; ".join(filter(None, sentences))


class _DeskOfReplies:
    """Answers requests from a row's stored replies, and notes which were found."""

    def __init__(self, replies: Iterable[_Stored], used: set[str], endpoint: EndpointConfig) -> None:
        self._replies = {one.key: one.reply for one in replies}
        self._used = used
        self._keys = ReplyKeys(endpoint)

    async def ask(self, request: TeacherRequest) -> Reply | CallFailure:
        key = self._keys.key(request)
        if key not in self._replies:
            return CallFailure("reply_not_stored", f"no reply to {request.purpose} {request.index} is stored")
        self._used.add(key)
        return self._replies[key]

    async def ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Reply | CallFailure]:
        return [await self.ask(request) for request in requests]

    def is_stored(self, request: TeacherRequest) -> bool:
        return self._keys.key(request) in self._replies


async def _used_keys(runtime: Runtime, row: WorkRow, replies: Sequence[_Stored]) -> set[str]:
    """Returns the keys of the replies that the row's label of now rests on."""
    config, used = runtime.config, set[str]()
    teacher = _DeskOfReplies(replies, used, config.teacher)
    desk = Desk(
        config=config,
        ask_teacher=teacher.ask,
        ask_samples=teacher.ask_samples,
        is_stored=teacher.is_stored,
        ask_reasoner=_DeskOfReplies(replies, used, config.reasoner_endpoint).ask,
        verifiers=runtime.verifiers,
        plans=SamplingPlans(config.performance),
        ask_panel=[_DeskOfReplies(replies, used, endpoint).ask for endpoint in config.difficulty.panel],
    )
    result: object = row
    for label in LABELLING.values():
        if not isinstance(result, WorkRow):
            break
        result = await label(result, desk)
    return used


async def _read(runtime: Runtime, sample: Sample, stored: _Stored) -> ShownReply:
    """Returns a reply with what the judge that asked for it reads in it."""
    reply = stored.reply
    shown = ShownReply(
        stored.purpose,
        stored.index,
        reply.text,
        reply.reasoning or "",
        reply.model,
        reply.finish_reason,
        reply.completion_tokens,
    )
    if stored.purpose == performance.PURPOSE:
        verdict = await runtime.verifiers.verify_async(reply.text, sample, is_truncated=reply.is_truncated)
        return replace(shown, outcome=str(verdict.outcome), extracted=verdict.extracted, why=_why(verdict, sample))
    if stored.purpose == reasoning.PURPOSE:
        return await _read_trace(runtime, sample, reply, shown)
    if stored.choices:
        word = read_word(reply, stored.choices)
        chances = [(other, word_probability(reply, other, stored.choices)) for other in stored.choices]
        given = ", ".join(f"{other} {chance:.2f}" for other, chance in chances if chance)
        return replace(shown, outcome=word or "unreadable", why=f"probabilities: {given}" if given else "")
    return shown


async def _read_trace(runtime: Runtime, sample: Sample, reply: Reply, shown: ShownReply) -> ShownReply:
    """Returns a chain of thought with what the checks make of it; the judge of its consistency replied by itself."""
    trace = reasoning.read_trace(reply)
    shown = replace(shown, text=trace.answer, reasoning=trace.reasoning)
    problem = trace_problem(
        trace.reasoning,
        trace.answer,
        is_truncated=reply.is_truncated,
        config=runtime.config.reasoning,
        question=render_question(sample),
    )
    if problem is not None:
        return replace(shown, outcome="rejected", why=f"{problem.reason}: {problem.detail}")
    if sample.kind is not Kind.OBJECTIVE:
        return replace(shown, outcome="passes", why="passes the checks that need no judge")
    verdict = await runtime.verifiers.verify_async(trace.answer, sample, is_truncated=reply.is_truncated)
    outcome = "passes" if verdict.is_correct else "rejected"
    return replace(shown, outcome=outcome, extracted=verdict.extracted, why=_why(verdict, sample))


def _why(verdict: Verdict, sample: Sample) -> str:
    """Returns why an answer was scored as it was."""
    if verdict.failure is not None:
        return _joined(f"not scored: {verdict.failure}", verdict.detail)
    found = "agrees with" if verdict.is_correct else "differs from"
    return _joined(
        f"{found} the reference {(sample.answer or '')[:80]!r}, compared as {sample.answer_type}", verdict.detail
    )


def _stored_replies(journals: Path, ids: Collection[str]) -> dict[str, list[_Stored]]:
    """Returns the stored replies by sample id, in order of judge, index and time."""
    if not journals.is_dir() or not ids:
        return {}
    wanted = pl.col("sample_id").is_in(pl.Series(sorted(ids), dtype=pl.String).implode())
    found = _collected(scan_replies(journals).filter(wanted).sort("purpose", "index", "stored_at"), journals)
    replies: dict[str, list[_Stored]] = defaultdict(list)
    # A row that came to lie in another shard took copies of its replies along.
    for record in found.unique("key", keep="first", maintain_order=True).iter_rows(named=True):
        choices = tuple(record["choices"] or ())
        stored = _Stored(record["key"], record["purpose"], record["index"], choices, stored_reply(record))
        replies[record["sample_id"]].append(stored)
    for about_one in replies.values():
        about_one.sort(key=lambda stored: (*_PURPOSES, stored.purpose).index(stored.purpose))
    return replies


def _stage_rows(workspace: Workspace, stage: str, columns: Sequence[str], ids: Collection[str]) -> pl.DataFrame:
    """Returns the rows of a stage that have one of the ids, whichever shard they are in; a few shards at a time."""
    folder = workspace.rows_path(stage, "any").parent
    fates = workspace.fates_path(stage, "any").name.removeprefix("any")
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.endswith(fates))
    wanted = pl.col("id").is_in(pl.Series(sorted(ids), dtype=pl.String).implode())
    found = [pl.DataFrame(WORK_SCHEMA.empty_table()).select(columns)]
    for start in range(0, len(paths), _SHARDS_AT_ONCE):
        found.append(_collected(_scan(paths[start : start + _SHARDS_AT_ONCE], columns).filter(wanted), folder))
    return pl.concat(found)


def _scan(paths: Sequence[Path], columns: Sequence[str]) -> pl.LazyFrame:
    return pl.scan_parquet(list(paths), glob=False, hive_partitioning=False).select(columns)


def _collected(rows: pl.LazyFrame, place: Path) -> pl.DataFrame:
    try:
        return rows.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise StorageError(f"cannot look rows up in {place}: {error}") from error
