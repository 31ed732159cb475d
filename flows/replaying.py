"""One labelling stage over one shard, from stored replies alone: no reply is ever asked for.

The functions of `flows.labelling` are applied as a curation applies them, so there is one definition of a label. What
differs is who answers: a reply that is not stored ends the row's labelling, and the row is reported, never guessed.

What is certain to be as an earlier run left it is taken from there: whole rows (`flows.settled`), and for others the
checks of a trace that it accepted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from filters.traces import TraceProblem
from flows.labelling import CheckTrace, Desk, Verifier, check_trace
from flows.settled import Earlier, settled_rows
from flows.stages import LABELLING, concerned_places, kept_rows, source_of
from flows.work_rows import WorkRow, passed_on, work_rows
from judges import reasoning
from judges.sampling_plan import SamplingPlans
from schemas.config import EndpointConfig, ReasoningConfig, RunConfig
from schemas.fates import FATE_SCHEMA, Fate, fates_to_table
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import AnswerType, Kind, Sample
from schemas.template import Completion
from schemas.usage import Ledger, Usage, UsageKey, merged_ledgers
from schemas.verdicts import Verdict, correct
from teacher.client import ReplyKeys
from teacher.journal import Journal

NOT_STORED = "reply_not_stored"
"""Reason of a row that is quarantined because a reply that its label needs was never asked for."""


class ReplyNotStored(Exception):
    """A reply that a row's label needs is not stored."""

    def __init__(self, request: TeacherRequest, model: str) -> None:
        super().__init__(f"no reply of {model} to the question {request.purpose!r} (sample {request.index}) is stored")
        self.purpose, self.model = request.purpose, model


@dataclass(frozen=True, slots=True)
class Missing:
    """A row whose label needs a reply that is not stored. purpose, model: who would have to be asked what."""

    row: WorkRow
    purpose: str
    model: str
    detail: str

    def quarantined(self, stage: str) -> Fate:
        return self.row.quarantined(stage, NOT_STORED, self.detail)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A stage over a shard, from stored replies. rows: those that it keeps, in order. fates: of those that leave.

    missing: rows that are neither, in order.
    """

    rows: pa.Table
    fates: pa.Table
    missing: tuple[Missing, ...]
    usage: Ledger


class StoredReplies:
    """What one endpoint has replied in one shard, by request; counts each reply that is asked for once."""

    def __init__(self, journal: Journal, endpoint: EndpointConfig) -> None:
        self.endpoint = endpoint
        self._keys = ReplyKeys(endpoint)
        self._journal = journal
        self._asked: set[str] = set()
        self._num_asked: Counter[tuple[str, str]] = Counter()
        self._replies: dict[str, list[Reply]] = {}
        self._last: dict[tuple[object, ...], TeacherRequest] = {}

    async def ask(self, request: TeacherRequest) -> Reply:
        """Returns the stored reply. Raises ReplyNotStored."""
        key = self._keys.key(request)
        reply = self._journal.lookup(key)
        if reply is None:
            raise ReplyNotStored(request, self.endpoint.model)
        self._count(key, request, reply)
        # All samples of a question share this; the one with the highest index stays.
        last = self._last.get(request.question)
        if last is None or last.index < request.index:
            self._last[request.question] = request
        return reply

    async def ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Reply | CallFailure]:
        """Returns the stored replies to samples of one question. Raises ReplyNotStored."""
        return [await self.ask(request) for request in requests]

    def is_stored(self, request: TeacherRequest) -> bool:
        return self._keys.key(request) in self._journal

    def count_rest(self, stored: Mapping[tuple[str, str], int] | None) -> None:
        """Counts further samples of the questions asked: a wave may have brought more than settle the label.

        stored: by (sample_id, purpose). What a row has asked for need not be looked for beyond what is stored of it.
        """
        for request in list(self._last.values()):
            asker = (request.sample_id, request.purpose)
            if stored is not None and self._num_asked[asker] == stored.get(asker):
                continue
            further = request.sample(request.index + 1)
            while reply := self._journal.lookup(key := self._keys.key(further)):
                self._count(key, further, reply)
                further = further.sample(further.index + 1)

    def costs(self, stage: str, source: str) -> dict[UsageKey, Usage]:
        """Returns what the replies cost that were counted, whoever paid."""
        return {
            UsageKey(stage, purpose, source, self.endpoint.model): _cost(replies)
            for purpose, replies in self._replies.items()
        }

    def _count(self, key: str, request: TeacherRequest, reply: Reply) -> None:
        if key not in self._asked:
            self._asked.add(key)
            self._num_asked[request.sample_id, request.purpose] += 1
            self._replies.setdefault(request.purpose, []).append(reply)


def _cost(replies: Sequence[Reply]) -> Usage:
    """Returns the sum of `Usage.of_stored` over replies, at once."""
    firsts = [reply for reply in replies if reply.choice == 0]
    retries = sum(reply.num_attempts - 1 for reply in firsts)
    return Usage.of_replies(replies, num_calls=len(firsts), num_retries=retries)


class _NothingToPlan(SamplingPlans):
    """Plans for samples that are all stored: nothing is asked for, so nothing need be learned."""

    def observe(self, source: str, verdicts: Sequence[Verdict], replies: Sequence[Reply | CallFailure]) -> None:
        return


def _num_tries(
    config: RunConfig, reasoner: StoredReplies, stored: Mapping[tuple[str, str], int] | None, sample: Sample
) -> int:
    """Returns how many of a row's traces are stored; those drawn with other settings may count, too."""
    if stored is not None:
        return stored.get((sample.id, reasoning.PURPOSE), 0)
    settings = config.reasoning
    tries = (reasoning.reasoning_request(sample, i, settings, seed=config.seed) for i in range(settings.num_tries))
    return sum(map(reasoner.is_stored, tries))


class KnownTraces:
    """Traces that an earlier run of the reasoning stage accepted under the same checks.

    after: the rows that it kept. num_tries: of a row's traces, how many are stored. same_verdicts: answer types on
    which the verifier says what it said then. For an open row, trace and answer
    say which reply was accepted. For a checkable one the answer is the reference, so the reply is known only if no
    other try of the row is stored: then what follows its trace was found to agree with the reference, too.
    """

    def __init__(
        self,
        after: pa.Table,
        *,
        num_tries: Callable[[Sample], int],
        verifier: Verifier,
        same_verdicts: Set[AnswerType],
    ) -> None:
        columns = (after[name].to_pylist() for name in ("id", "kind", "reasoning", "final_answer"))
        rows = zip(*columns, strict=True)
        self._accepted = {id_: (Kind(kind), thought, answer) for id_, kind, thought, answer in rows if thought}
        self._num_tries, self._verifier = num_tries, verifier
        self._same_verdicts = same_verdicts
        self._right: dict[str, str] = {}

    def check_trace(
        self, row: WorkRow, trace: Completion, reply: Reply, settings: ReasoningConfig
    ) -> TraceProblem | None:
        """Does what `labelling.check_trace` does."""
        return None if self._is_accepted(row.sample, trace, reply) else check_trace(row, trace, reply, settings)

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        """Does what `VerifierPool.verify_async` does."""
        if self._right.get(sample.id) == reply_text and not is_truncated:
            return correct(reply_text)
        return await self._verifier.verify_async(reply_text, sample, is_truncated=is_truncated)

    def _is_accepted(self, sample: Sample, trace: Completion, reply: Reply) -> bool:
        kind, thought, answer = self._accepted.get(sample.id, (None, None, None))
        if reply.is_truncated or kind is not sample.kind or thought != trace.reasoning:
            return False
        if kind is Kind.SUBJECTIVE:
            return answer == trace.answer
        is_only_one = self._num_tries(sample) == 1
        if is_only_one and sample.answer_type in self._same_verdicts:
            self._right[sample.id] = trace.answer
        return is_only_one


def replay_stage(
    stage: str,
    config: RunConfig,
    table: pa.Table,
    journal_folder: Path,
    *,
    verifier: Verifier,
    runner: asyncio.Runner,
    earlier: Earlier | None = None,
) -> Replayed:
    """Labels the rows of one shard from its stored replies.

    table: what the stage reads. earlier: what an earlier run made of the same shard. Raises StorageError: the replies
    cannot be read.
    """
    concerned = concerned_places(stage, table)
    with ExitStack() as opened:
        open_journal = cache(lambda: opened.enter_context(Journal(journal_folder)))
        read_stored = cache(lambda: open_journal().stored())
        known = settled_rows(stage, config, table, earlier, read_stored)
        places = np.setdiff1d(concerned, known.places, assume_unique=True) if known else concerned
        usage = [known.usage] if known else []
        results: list[WorkRow | Fate | Missing] = []
        if len(places):
            rows = work_rows(table.take(pa.array(places)))
            stored = _counts(read_stored())
            desk, endpoints = _open_desk(stage, config, open_journal(), stored, verifier, earlier)
            results = runner.run(_label_all(stage, rows, desk))
            if known is None or not known.is_all:
                usage.append(_usage(endpoints, stored, stage, source_of(rows)))
    settled = [(known.places, known.rows)] if known else []
    return Replayed(
        passed_on(table, concerned, kept_rows(table, places, results), *settled),
        fates_to_table(result for result in results if isinstance(result, Fate)),
        tuple(result for result in results if isinstance(result, Missing)),
        merged_ledgers(usage),
    )


def _counts(stored: pa.Table | None) -> Counter[tuple[str, str]] | None:
    """Returns how many replies are stored by (sample_id, purpose). stored: `Journal.stored`."""
    if stored is None:
        return None
    return Counter(zip(stored["sample_id"].to_pylist(), stored["purpose"].to_pylist(), strict=True))


def _usage(
    endpoints: Sequence[StoredReplies],
    stored: Mapping[tuple[str, str], int] | None,
    stage: str,
    source: str,
) -> Ledger:
    """Returns what the replies cost that were asked for, whoever paid. stored: by (sample_id, purpose)."""
    for endpoint in endpoints:
        # Teachers of a panel ask the same questions under the same names: their counts say nothing of one of them.
        endpoint.count_rest(stored if len(endpoints) == 1 else None)
    return merged_ledgers(endpoint.costs(stage, source) for endpoint in endpoints)


def _open_desk(
    stage: str,
    config: RunConfig,
    journal: Journal,
    stored: Mapping[tuple[str, str], int] | None,
    verifier: Verifier,
    earlier: Earlier | None,
) -> tuple[Desk, list[StoredReplies]]:
    """Returns a desk that answers from a journal, and the endpoints whose replies it holds."""
    teacher = StoredReplies(journal, config.teacher)
    reasoner = teacher if config.reasoner is None else StoredReplies(journal, config.reasoner)
    panel = [StoredReplies(journal, endpoint) for endpoint in config.difficulty.panel]
    check: CheckTrace = check_trace
    if stage == "reasoning" and earlier is not None and earlier.are_same_checks:
        known = KnownTraces(
            earlier.after,
            num_tries=partial(_num_tries, config, reasoner, stored),
            verifier=verifier,
            same_verdicts=earlier.same_verdicts if earlier.is_same_recipe else frozenset(),
        )
        check, verifier = known.check_trace, known
    desk = Desk(
        config,
        teacher.ask,
        teacher.ask_samples,
        # Every sample is taken by itself; the first that is not stored ends the row's labelling.
        lambda request: True,
        reasoner.ask,
        verifier,
        _NothingToPlan(config.performance),
        [member.ask for member in panel],
        check,
    )
    return desk, [teacher, *([] if reasoner is teacher else [reasoner]), *panel]


async def _label_all(stage: str, rows: Sequence[WorkRow], desk: Desk) -> list[WorkRow | Fate | Missing]:
    """Returns the result of each row. Formulas, which wait for a process, are compared side by side."""
    label = LABELLING[stage]

    async def label_one(row: WorkRow) -> WorkRow | Fate | Missing:
        try:
            return await label(row, desk)
        except ReplyNotStored as error:
            return Missing(row, error.purpose, error.model, str(error))

    must_wait = [row.sample.answer_type is AnswerType.EXPRESSION for row in rows]
    waited = iter(await asyncio.gather(*(label_one(row) for row, waits in zip(rows, must_wait, strict=True) if waits)))
    return [next(waited) if waits else await label_one(row) for row, waits in zip(rows, must_wait, strict=True)]


def count_missing(missing: Iterable[Missing]) -> Counter[tuple[str, str]]:
    """Returns how many replies are missing by purpose and model: one for each row, the first that it needs."""
    return Counter((one.purpose, one.model) for one in missing)


def quarantined(replayed: Replayed, stage: str) -> Replayed:
    """Returns a stage in which the rows whose replies are missing leave as quarantined."""
    if not replayed.missing:
        return replayed
    fates = pa.concat_tables([replayed.fates, fates_to_table(one.quarantined(stage) for one in replayed.missing)])
    return replace(replayed, fates=fates.cast(FATE_SCHEMA).combine_chunks(), missing=())
