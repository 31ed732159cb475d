"""One shard, relabelled from stored replies, and the processes that do so.

See `flows.relabelling` for the whole, `flows.replaying` for one stage.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from flows.garbage import collect_rarely
from flows.replaying import Replayed, count_missing, quarantined, replay_stage
from flows.settled import Earlier
from flows.stages import LABELLING, recipe_digest, stage_digest
from flows.staging import StagedWorkspace
from flows.workspace import Marker, Workspace, digest_of
from judges.answers import VerifierPool
from judges.answers.verification import types_judged_alike
from schemas.config import RunConfig
from schemas.samples import AnswerType

OnMissing = Literal["stop", "quarantine"]
FIRST_STAGES = tuple(stage for stage in LABELLING if stage != "answers")
"""Those before the comparison of traces, which looks across shards."""
LEFT, MISSING, UNLABELLED = "left", "missing", "unlabelled"
"""What a row may be instead of thinking or direct: dropped or quarantined; without a reply that its label needs; never
labelled by the last run."""


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """Where rows went. topic: "" where it is unknown. old, new: a mode, or one of the words above."""

    source: str
    topic: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker process is made from. before: the settings as the file has them. is_dry: nothing is written."""

    before: RunConfig
    config: RunConfig
    on_missing: OnMissing
    is_dry: bool
    num_processes: int

    @property
    def workspace(self) -> StagedWorkspace:
        return StagedWorkspace(self.config.workdir, recipe_digest(self.config)[:16])


@dataclass(frozen=True, slots=True)
class ShardResult:
    """One shard, relabelled. markers: of the stages that are done. missing: rows by (stage, purpose, model)."""

    num_rows: int = 0
    markers: tuple[Marker, ...] = ()
    missing: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    changes: Counter[Change] = field(default_factory=Counter)


class ShardRelabeller:
    """Labels one shard after the other from stored replies, in one process and thread."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._config = plan, plan.config
        self._workspace = plan.workspace
        verification = self._config.verification
        num_workers = max(1, verification.num_workers // plan.num_processes)
        self._verifier = VerifierPool(verification.model_copy(update={"num_workers": num_workers}))
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.close()
        self._verifier.close()

    def label(self, before: Marker) -> ShardResult:
        """Runs the stages up to the chains of thought over one shard. before: of the stage `duplicates`.

        Once a row lacks a reply, nothing more is written (unless it is quarantined), but the others are looked at
        through all stages, so that everything that is missing is known. Raises StorageError.
        """
        state = _ShardState(before, self._workspace)
        rows = None
        for stage in FIRST_STAGES:
            self._advance(state, stage)
            rows = state.table if rows is None else rows
        assert rows is not None, "there is a first stage"
        markers = tuple(state.markers)
        if self._plan.is_dry or self._plan.on_missing == "stop":
            self._look_ahead(state)
        changes = self._changes(before.shard, rows, state)
        return ShardResult(before.count.num_kept, markers, state.missing, changes)

    def answer(self, before: Marker) -> ShardResult:
        """Completes the answers of one shard. before: of the comparison of traces. Raises StorageError."""
        state = _ShardState(before, self._workspace)
        self._advance(state, "answers")
        return ShardResult(before.count.num_kept, tuple(state.markers), state.missing)

    def _advance(self, state: _ShardState, stage: str) -> None:
        """Takes the result of a stage if it is done under the same digest, else makes it."""
        before = state.marker
        digest = "" if before is None else stage_digest(stage, self._config, before.output)
        done = None if before is None else self._workspace.find_marker(stage, before.shard, digest)
        if done is not None:
            state.go_on(done)
            return
        replayed = self._replay(stage, state)
        state.missing.update({(stage, *key): number for key, number in count_missing(replayed.missing).items()})
        state.origins_missing += [one.row.sample.origin for one in replayed.missing]
        if replayed.missing and self._plan.on_missing == "quarantine":
            # Not done for a curation, which would ask; and not for relabelling, as there may be replies by then.
            digest = digest_of(digest, [one.detail for one in replayed.missing])
        if before is None or self._plan.is_dry or (replayed.missing and self._plan.on_missing == "stop"):
            state.look_on(replayed.rows)
            return
        replayed = quarantined(replayed, stage)
        marker = self._workspace.finish_shard(
            stage,
            before.shard,
            digest=digest,
            num_in=state.table.num_rows,
            rows=replayed.rows,
            fates=replayed.fates,
            usage=replayed.usage,
        )
        state.go_on(marker, replayed.rows)

    def _replay(self, stage: str, state: _ShardState) -> Replayed:
        return replay_stage(
            stage,
            self._config,
            state.table,
            self._workspace.journal_path(stage, state.shard),
            verifier=self._verifier,
            runner=self._runner,
            earlier=self._earlier(stage, state),
        )

    def _earlier(self, stage: str, state: _ShardState) -> Earlier | None:
        """Returns what the last run made of this stage, if its settings are known and say something about today."""
        if stage not in ("difficulty", "performance", "reasoning"):
            return None
        last_run, before_stage = self._workspace.last_run, FIRST_STAGES[FIRST_STAGES.index(stage) - 1]
        before, after = (last_run.read_marker(name, state.shard) for name in (before_stage, stage))
        if before is None or after is None:
            return None
        config, file = self._config, self._plan.before
        if stage == "difficulty":
            # Its probability is kept with the row, whatever the threshold.
            threshold = {"threshold": file.difficulty.threshold}
            config = config.model_copy(update={"difficulty": config.difficulty.model_copy(update=threshold)})
        is_same = after.digest == stage_digest(stage, config, before.output)
        same_verdicts = frozenset(AnswerType)
        if not is_same and stage != "difficulty":
            # Some types of answers are read as before by a changed verifier.
            config = config.model_copy(update={"verification": file.verification})
            is_same = after.digest == stage_digest(stage, config, before.output)
            same_verdicts = types_judged_alike(file.verification, self._config.verification)
        was_file = after.digest == stage_digest(stage, file, before.output)
        are_same_checks = is_same or (was_file and file.reasoning == config.reasoning)
        if not are_same_checks:
            return None
        read = partial(last_run.read_rows, shard=state.shard)
        return Earlier(read(before_stage), read(stage), after.usage, is_same, are_same_checks, same_verdicts)

    def _look_ahead(self, state: _ShardState) -> None:
        """Looks which rows would lack their direct answer; the others need no reply in the last stage."""
        needs_answer = pc.and_(pc.is_null(state.table["final_answer"]), pc.is_null(state.table["answer"]))
        open_rows = _ShardState(None, self._workspace, state.table.filter(needs_answer).combine_chunks(), state.shard)
        if open_rows.table.num_rows:
            self._advance(open_rows, "answers")
            state.missing += open_rows.missing
            state.origins_missing += open_rows.origins_missing

    def _changes(self, shard: str, routed: pa.Table, state: _ShardState) -> Counter[Change]:
        """Returns where the rows of a shard went. routed: they, with their topics."""
        origins = routed["origin"].combine_chunks()
        last_run = self._workspace.last_run
        old = pa.repeat(UNLABELLED, len(origins))
        if last_run.read_marker(FIRST_STAGES[-1], shard) is not None:
            old = _modes(origins, last_run.read_columns(FIRST_STAGES[-1], shard, ["origin", "mode"]))
        new = _modes(origins, state.table)
        is_missing = pc.is_in(origins, pa.array(state.origins_missing, pa.string()))
        columns = {
            "source": routed["source"],
            "topic": pc.fill_null(routed["topic"], ""),
            "old": old,
            "new": pc.if_else(is_missing, MISSING, new),
        }
        groups = pa.table(columns).group_by(list(columns)).aggregate([([], "count_all")]).to_pylist()
        return Counter({Change(**{name: group[name] for name in columns}): group["count_all"] for group in groups})


def _modes(origins: pa.Array, labelled: pa.Table) -> pa.Array:
    """Returns the mode of each row, `LEFT` for those that are not labelled."""
    places = pc.index_in(origins, labelled["origin"].combine_chunks())
    return pc.fill_null(labelled["mode"].combine_chunks().take(places), LEFT)


class _ShardState:
    """How far a shard has come. marker: of the stage before; None once something was left out, so not written."""

    def __init__(
        self, marker: Marker | None, workspace: Workspace, table: pa.Table | None = None, shard: str = ""
    ) -> None:
        self.marker = marker
        self.shard = shard or (marker.shard if marker else "")
        self.markers: list[Marker] = []
        self.missing: Counter[tuple[str, str, str]] = Counter()
        self.origins_missing: list[str] = []
        self._workspace, self._table = workspace, table

    @property
    def table(self) -> pa.Table:
        """The rows as the stage before left them."""
        if self._table is None:
            assert self.marker is not None, "rows that were not written are held"
            self._table = self._workspace.read_rows(self.marker.stage, self.marker.shard)
        return self._table

    def go_on(self, marker: Marker, table: pa.Table | None = None) -> None:
        self.marker, self._table = marker, table
        self.markers.append(marker)

    def look_on(self, table: pa.Table) -> None:
        self.marker, self._table = None, table


_relabeller: list[ShardRelabeller] = []
"""Of a worker process: made once, used for one shard after the other."""


@contextmanager
def shard_processes(plan: Plan) -> Iterator[Executor]:
    """Yields what runs the work on shards: worker processes, or a thread of this process where one is enough.

    The processes are started anew and not forked, as this one has threads.
    """
    executor: Executor
    if plan.num_processes == 1:
        executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(plan,))
    else:
        executor = ProcessPoolExecutor(
            plan.num_processes, get_context("spawn"), initializer=_begin_process, initargs=(plan,)
        )
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        while _relabeller:
            _relabeller.pop().close()


def _begin_process(plan: Plan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    pa.set_cpu_count(1)
    _begin(plan)
    collect_rarely()


def _end_with_parent() -> None:
    """Ends this process when its parent has gone, however that ended: nobody would take its results."""
    parent = parent_process()
    assert parent is not None, "only a worker process waits for its parent"
    connection.wait([parent.sentinel])
    os._exit(1)


def _begin(plan: Plan) -> None:
    _relabeller.append(ShardRelabeller(plan))


def label_stored_shard(before: Marker) -> ShardResult:
    return _relabeller[0].label(before)


def answer_stored_shard(before: Marker) -> ShardResult:
    return _relabeller[0].answer(before)
