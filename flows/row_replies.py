"""Every stored reply about one row, what the judges read in each, and what they make of all together now.

The stage is done again for the row alone, from stored replies, by the very functions that label a corpus. So what is
shown is what the settings of today lead to; where that differs from what the stage wrote, settings have changed since.
Nothing is asked and nothing is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from flows.labelling import Desk, label_reasoning
from flows.replaying import ReplyNotStored, StoredReplies
from flows.stages import LABELLING
from flows.work_rows import WorkRow
from judges import performance, reasoning
from judges.answers import VerifierPool
from judges.sampling_plan import SamplingPlans
from judges.verdict_words import read_word, word_probability
from schemas.config import RunConfig
from schemas.errors import StorageError
from schemas.requests import Reply, TeacherRequest
from schemas.verdicts import Verdict
from teacher.compacted import stored_reply
from teacher.journal import Journal
from teacher.replies import scan_replies


@dataclass(frozen=True, slots=True)
class StoredReply:
    """One stored reply about a row.

    index: which sample, try or repetition of the question. stored_at: ISO 8601 time, "" where it is unknown. is_used:
    whether the settings of now lead to this question; else it was asked under others, or drawn beyond need. choices:
    the words to which the reply was constrained. verdict: of a sample of the performance heuristic. finding: what is
    read in any other, in words; "" for plain answers.
    """

    stage: str
    purpose: str
    index: int
    reply: Reply
    stored_at: str
    is_used: bool
    choices: tuple[str, ...] = ()
    verdict: Verdict | None = None
    finding: str = ""

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        verdict = None if self.verdict is None else asdict(self.verdict)
        named = {name: getattr(self, name) for name in ("stage", "purpose", "index", "stored_at", "is_used", "finding")}
        return {**named, "verdict": verdict, **asdict(self.reply)}


@dataclass(frozen=True, slots=True)
class StageReplies:
    """The stored replies of one stage about a row.

    result: the row as the stage makes it from them now; None if it leaves, or if a reply is missing. problem: why.
    """

    stage: str
    replies: tuple[StoredReply, ...]
    result: WorkRow | None
    problem: str = ""


class _WatchedJournal(Journal):
    """A journal that remembers what was looked up in it and found."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.found: set[str] = set()

    def lookup(self, key: str) -> Reply | None:
        reply = super().lookup(key)
        if reply is not None:
            self.found.add(key)
        return reply


def read_stage_replies(stage: str, config: RunConfig, journal_path: Path, row: WorkRow) -> StageReplies:
    """Returns what is stored about one row in the journal of its shard, which may still be growing.

    row: as the stage reads it. Raises StorageError: the journal is damaged.
    """
    one_worker = config.verification.model_copy(update={"num_workers": 1})
    journal = _WatchedJournal(journal_path)
    with journal, VerifierPool(one_worker) as verifiers, asyncio.Runner() as runner:
        desk = _desk(config, journal, verifiers)
        result, problem = runner.run(_labelled(stage, row, desk))
        # Those that count now come first, then what was asked under other settings.
        stored = sorted(
            _stored_replies(stage, journal_path, row.sample.id, journal.found),
            key=lambda one: (one.purpose, not one.is_used, one.index),
        )
        read = [runner.run(_with_reading(one, row, desk)) for one in stored]
    return StageReplies(stage, tuple(read), result, problem)


def _desk(config: RunConfig, journal: Journal, verifiers: VerifierPool) -> Desk:
    """Returns a desk that answers from a journal; what is not stored ends the labelling with `ReplyNotStored`."""
    teacher, reasoner = StoredReplies(journal, config.teacher), StoredReplies(journal, config.reasoner_endpoint)
    return Desk(
        config=config,
        ask_teacher=teacher.ask,
        ask_samples=teacher.ask_samples,
        # Every sample is then taken by itself, up to the first that is not stored.
        is_stored=lambda request: True,
        ask_reasoner=reasoner.ask,
        verifiers=verifiers,
        plans=SamplingPlans(config.performance),
        ask_panel=[StoredReplies(journal, endpoint).ask for endpoint in config.difficulty.panel],
    )


async def _labelled(stage: str, row: WorkRow, desk: Desk) -> tuple[WorkRow | None, str]:
    """Returns the row as a stage makes it, or why it does not."""
    try:
        result = await LABELLING[stage](row, desk)
    except ReplyNotStored as error:
        return None, str(error)
    return (result, "") if isinstance(result, WorkRow) else (None, f"{result.reason}: {result.detail}")


def _stored_replies(stage: str, folder: Path, sample_id: str, used: set[str]) -> Iterator[StoredReply]:
    """Yields the replies that bear the row's id, and those of others' that its own questions share."""
    if not folder.is_dir():
        return
    try:
        about = (pl.col("sample_id") == sample_id) | pl.col("key").is_in(sorted(used))
        frame = scan_replies(folder).filter(about).collect()
    except pl.exceptions.PolarsError as error:
        raise StorageError(f"the replies in {folder} cannot be searched: {error}") from error
    for record in frame.iter_rows(named=True):
        stored_at = record["stored_at"].isoformat(timespec="seconds") if record["stored_at"] else ""
        yield StoredReply(
            stage,
            record["purpose"],
            record["index"],
            stored_reply(record),
            stored_at,
            is_used=record["key"] in used,
            choices=tuple(record["choices"] or ()),
        )


async def _with_reading(stored: StoredReply, row: WorkRow, desk: Desk) -> StoredReply:
    """Returns a stored reply with what its judge reads in it."""
    reply = stored.reply
    if stored.purpose == performance.PURPOSE:
        verdict = await desk.verifiers.verify_async(reply.text, row.sample, is_truncated=reply.is_truncated)
        return replace(stored, verdict=verdict)
    if stored.purpose == reasoning.PURPOSE:
        return replace(stored, finding=await _trace_finding(reply, row, desk))
    if stored.choices:
        return replace(stored, finding=_word_finding(reply, stored.choices))
    return stored


async def _trace_finding(reply: Reply, row: WorkRow, desk: Desk) -> str:
    """Returns what the checks make of a chain of thought, as if it were the only try."""
    settings = desk.config.reasoning.model_copy(update={"num_tries": 1})

    async def the_reply(request: TeacherRequest) -> Reply:
        del request
        return reply

    one_try = replace(desk, config=desk.config.model_copy(update={"reasoning": settings}), ask_reasoner=the_reply)
    try:
        result = await label_reasoning(row, one_try)
    except ReplyNotStored as error:
        return f"passes the checks so far; {error}"
    if isinstance(result, WorkRow):
        trace = reasoning.read_trace(reply)
        return f"passes all checks: {len(trace.reasoning.split())} words, answer {trace.answer[:80]!r}"
    return result.detail.partition(": ")[2]  # Behind "1 tries failed: ".


def _word_finding(reply: Reply, words: tuple[str, ...]) -> str:
    word = read_word(reply, words)
    said = f"says {word}" if word is not None else f"says none of {', '.join(words)}"
    chances = {other: word_probability(reply, other, words) for other in words}
    given = [f"{other} {chance:.3f}" for other, chance in chances.items() if chance]
    return f"{said} ({', '.join(given)})" if given else said
