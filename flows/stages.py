"""The stages of curation, one function per stage and shard, without Prefect.

Each reads the shard of the stage before, writes its own by way of `Workspace.finish_shard`, and is skipped when it is
done already under the same digest. Two stages look across shards, `duplicates` and `traces`: their plans are made in
`flows.removing`. Benchmarks are compared in `flows.decontaminating`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flows.accounting import AskedUsage, merged_costs
from flows.decontaminating import DECONTAMINATION, Benchmarks, decontaminate
from flows.labelling import Desk, Label, label_answer, label_difficulty, label_performance, label_reasoning, label_route
from flows.removals import split_rows
from flows.runtime import Runtime, open_desk
from flows.work_rows import Placed, WorkRow, labelled_table, passed_on, unlabelled_table, work_rows
from flows.workspace import Marker, digest_of
from judges.panel import num_verdicts_needed
from schemas.config import EndpointConfig, RunConfig
from schemas.context import enter_row
from schemas.errors import QuarantineExceeded
from schemas.fates import Fate, fates_to_table
from schemas.samples import Kind, samples_to_table
from schemas.usage import Usage, UsageKey, merged_ledgers
from schemas.verdicts import Mode
from sources import Unit, read_unit
from teacher.journal import Journal

_Result = TypeVar("_Result")
_rows_log = logging.getLogger("bimode.rows")
"""Which row left, and why; only structured logs have it."""

RECIPE_VERSION = 3
"""Raised when the meaning of a stage's code changes, so that stored shards are made again (replies stay valid)."""

SOURCES, DUPLICATES, TRACES = "sources", "duplicates", "traces"
LABELLING: dict[str, Label] = {
    "routing": label_route,
    "difficulty": label_difficulty,
    "performance": label_performance,
    "reasoning": label_reasoning,
    "answers": label_answer,
}
STAGES = (SOURCES, DECONTAMINATION, DUPLICATES, *list(LABELLING)[:-1], TRACES, "answers")
"""In order. The corpus stage that follows is `flows.publishing`."""

_CONCERNED: dict[str, tuple[str, str]] = {
    "difficulty": ("kind", Kind.SUBJECTIVE),
    "performance": ("kind", Kind.OBJECTIVE),
    "reasoning": ("mode", Mode.THINK),
}
"""The column, and its value, of the rows that a stage looks at; all others pass it unchanged."""

STAGE_TITLES = {
    SOURCES: "read the sources",
    DECONTAMINATION: "remove rows that leak a benchmark",
    DUPLICATES: "remove duplicates",
    "routing": "route to objective or subjective",
    "difficulty": "difficulty heuristic",
    "performance": "performance heuristic",
    "reasoning": "write chains of thought",
    TRACES: "remove duplicate traces",
    "answers": "complete the answers",
}


def stages_of(config: RunConfig) -> list[str]:
    """Returns the stages of a run in order: without benchmarks there is nothing to be compared with."""
    return [stage for stage in STAGES if stage != DECONTAMINATION or config.decontamination.benchmarks]


class Progress:
    """Rows done of a stage, counted by all its tasks; num_total may be 0.

    num_skipped: of those done, the rows of shards that were found done; they say nothing about the pace.
    """

    def __init__(self, num_total: int) -> None:
        self.num_total = num_total
        self.num_done = 0
        self.num_skipped = 0
        self._lock = threading.Lock()

    def advance(self, num_rows: int = 1) -> None:
        with self._lock:
            self.num_done += num_rows

    def skip(self, num_rows: int) -> None:
        with self._lock:
            self.num_done += num_rows
            self.num_skipped += num_rows

    def show(self, *, num_done: int, num_skipped: int) -> None:
        """Takes over what workers elsewhere have counted."""
        with self._lock:
            self.num_done, self.num_skipped = num_done, num_skipped

    @property
    def percent(self) -> float:
        return 100.0 * min(1.0, self.num_done / self.num_total) if self.num_total else 100.0


def shard_name(unit: Unit) -> str:
    return f"{unit.source}-{unit.index:05d}"


def recipe_digest(config: RunConfig) -> str:
    """Returns the digest of everything in the configuration that shapes labels; speed and places do not."""
    return digest_of(RECIPE_VERSION, [_recipe_of(stage, config) for stage in STAGES])


def changed_stages(config: RunConfig, other: RunConfig) -> list[str]:
    """Returns the stages whose recipes differ between two configurations, in order."""
    return [stage for stage in STAGES if _recipe_of(stage, config) != _recipe_of(stage, other)]


def stage_digest(stage: str, config: RunConfig, inputs: object) -> str:
    """Returns the digest of a stage's output: its recipe and what it reads."""
    return digest_of(RECIPE_VERSION, stage, _recipe_of(stage, config), inputs)


def _recipe_of(stage: str, config: RunConfig) -> list[object]:
    teacher, reasoner = _identity(config.teacher), _identity(config.reasoner_endpoint)
    verification = config.verification.model_dump(exclude={"num_workers"})
    recipes: dict[str, list[object]] = {
        SOURCES: [config.images.model_dump()],
        DECONTAMINATION: [config.decontamination.model_dump(exclude={"max_pairs"})],
        DUPLICATES: [config.duplicates.model_dump()],
        "routing": [config.routing.model_dump(), teacher],
        "difficulty": [config.difficulty.model_dump(include={"threshold"}), teacher, *_panel_recipe(config)],
        # How samples are grouped into calls changes what they cost, never label or evidence.
        "performance": [
            config.performance.model_dump(exclude={"waves", "prompt_token_cost", "cached_token_cost"}),
            verification,
            teacher,
            config.seed,
        ],
        "reasoning": [
            config.reasoning.model_dump(exclude={"duplicate_threshold"}),
            verification,
            teacher,
            reasoner,
            config.seed,
        ],
        TRACES: [config.reasoning.duplicate_threshold],
        "answers": [config.direct.model_dump(), teacher, config.seed],
    }
    return recipes[stage]


def _panel_recipe(config: RunConfig) -> list[object]:
    """Returns what shapes a vote of several teachers; nothing where the teacher judges alone."""
    settings = config.difficulty
    return [settings.vote, num_verdicts_needed(settings), *map(_identity, settings.panel)] if settings.panel else []


def _identity(endpoint: EndpointConfig) -> list[object]:
    return [endpoint.model, endpoint.revision, endpoint.extra_body, endpoint.max_image_pixels]


def read_source_shard(runtime: Runtime, unit: Unit, progress: Progress) -> Marker:
    """Reads one unit of a source into samples. Raises SourceError: the whole source is unreadable."""
    config, shard = runtime.config, shard_name(unit)
    source = next(source for source in config.sources if source.name == unit.source)
    shaped_by = [unit.digest, unit.num_rows, source.model_dump(exclude={"max_rows"})]
    digest = stage_digest(SOURCES, config, shaped_by)
    marker = runtime.workspace.find_marker(SOURCES, shard, digest)
    if marker is not None:
        progress.skip(unit.num_rows)
        return marker
    samples, fates = read_unit(unit, config, runtime.images)
    marker = runtime.workspace.finish_shard(
        SOURCES,
        shard,
        digest=digest,
        num_in=unit.num_rows,
        rows=samples_to_table(samples),
        fates=fates_to_table(fates),
    )
    progress.advance(unit.num_rows)
    return marker


def remove_leaks(runtime: Runtime, benchmarks: Benchmarks, before: Marker, progress: Progress) -> Marker:
    """Removes the rows of one shard that leak a benchmark. Raises SourceError: a benchmark cannot be read."""
    digest = stage_digest(DECONTAMINATION, runtime.config, [before.output, benchmarks.digest])
    marker = decontaminate(runtime, benchmarks, before, digest)
    progress.advance(marker.count.num_in)
    return marker


def remove_planned(
    runtime: Runtime, stage: str, before: Marker, removals: pa.Table | None, digest: str, progress: Progress
) -> Marker:
    """Removes the rows of one shard that a comparison across shards found, see `flows.removals`.

    stage: DUPLICATES or TRACES. removals: of this shard, with `REMOVAL_SCHEMA`; None if no row goes.
    """
    rows = runtime.workspace.read_rows(before.stage, before.shard)
    if stage == DUPLICATES:
        rows = unlabelled_table(rows)
    kept, fates = split_rows(rows, removals, stage)
    marker = runtime.workspace.finish_shard(
        stage, before.shard, digest=digest, num_in=rows.num_rows, rows=kept, fates=fates
    )
    progress.advance(rows.num_rows)
    return marker


def label_shard(runtime: Runtime, stage: str, before: Marker, progress: Progress) -> Marker:
    """Runs one labelling stage over one shard; every reply is in the shard's journal before it is used.

    Raises TeacherError: the endpoint cannot be used. StorageError: the disk fails.
    """
    workspace = runtime.workspace
    digest = stage_digest(stage, runtime.config, before.output)
    marker = workspace.find_marker(stage, before.shard, digest)
    if marker is not None:
        progress.skip(marker.count.num_in)
        return marker
    table = workspace.read_rows(before.stage, before.shard)
    places = concerned_places(stage, table)
    rows = work_rows(table.take(pa.array(places)))
    progress.advance(table.num_rows - len(rows))
    # Opened and closed here, as both wait for the disk, which would hold up the loop.
    with Journal(workspace.journal_path(stage, before.shard)) as journal:
        results, asked = runtime.run(label_rows(runtime, stage, journal, rows, advance=progress.advance))
        # What was asked stands in one Parquet file from now on. A marker written first would hide a kill in between.
        journal.compact()
    return workspace.finish_shard(
        stage,
        before.shard,
        digest=digest,
        num_in=table.num_rows,
        rows=passed_on(table, places, kept_rows(table, places, results)),
        fates=fates_to_table(result for result in results if isinstance(result, Fate)),
        usage=merged_costs(asked, stage, source_of(rows)),
    )


def concerned_places(stage: str, table: pa.Table) -> NDArray[np.int64]:
    """Returns the places of the rows that a labelling stage looks at; all others pass it unchanged."""
    if stage not in _CONCERNED:
        return np.arange(table.num_rows)
    column, value = _CONCERNED[stage]
    is_concerned = pc.fill_null(pc.equal(table[column], pa.scalar(str(value))), False)
    return np.flatnonzero(is_concerned.to_numpy())


def kept_rows(table: pa.Table, places: NDArray[np.int64], results: Sequence[object]) -> Placed:
    """Returns the rows among the results of a stage. places: in the table, of the row that each result is of."""
    kept = [(place, result) for place, result in zip(places, results, strict=True) if isinstance(result, WorkRow)]
    of_kept = np.array([place for place, _ in kept], np.int64)
    return of_kept, labelled_table(table, of_kept, [row for _, row in kept])


async def label_rows(
    runtime: Runtime, stage: str, journal: Journal, rows: Sequence[WorkRow], *, advance: Callable[[int], None]
) -> tuple[list[WorkRow | Fate], list[AskedUsage]]:
    """Returns the result of each row in order, and what was asked; used in the runtime's event loop.

    rows: all or some of one shard. Raises as `label_shard` does.
    """
    label, source = LABELLING[stage], source_of(rows)

    async def label_one(row: WorkRow, desk: Desk) -> WorkRow | Fate:
        enter_row(row.sample.id)
        result = await label(row, desk)
        if isinstance(result, Fate):
            _rows_log.info("the row leaves", extra={"exit": str(result.exit), "reason": result.reason})
        advance(1)
        return result

    async with open_desk(runtime, journal) as (desk, askers):

        def paid() -> dict[UsageKey, Usage]:
            return merged_ledgers(asker.usage.paid_ledger(stage, source) for asker in askers)

        # Questions about one image go together: it is then still in the server's caches.
        order = sorted(range(len(rows)), key=lambda at: ([i.sha256 for i in rows[at].sample.images], at))
        with runtime.accounts.counted(paid):
            labelled = await all_or_none(asyncio.create_task(label_one(rows[at], desk)) for at in order)
            for asker in askers:
                asker.count_stored()
        results = [result for _, result in sorted(zip(order, labelled, strict=True), key=itemgetter(0))]
        return results, [asker.usage for asker in askers]


def check_quarantine(
    config: RunConfig, markers: Mapping[str, Sequence[Marker]], stage: str, *, num_rows: int, folder: Path
) -> None:
    """Raises QuarantineExceeded: more than the configured share of all rows is quarantined so far.

    markers: of the stages done, the given one being the last. num_rows: of all sources. folder: holds `stages`.
    """
    quarantined = sum((marker.count.quarantined for done in markers.values() for marker in done), Counter[str]())
    if quarantined.total() > config.max_quarantine_share * num_rows:
        listed = ", ".join(f"{number} {reason}" for reason, number in sorted(quarantined.items()))
        raise QuarantineExceeded(
            f"after stage {stage}, {quarantined.total()} of {num_rows} rows are quarantined ({listed}), more than "
            f"max_quarantine_share = {config.max_quarantine_share}. See {folder}/stages/{stage}/*.fates.parquet for "
            "each row's reason; fix the input or raise the share"
        )


async def all_or_none(work: Iterable[asyncio.Task[_Result]]) -> list[_Result]:
    """Returns the results of all tasks in order; after an error or a cancellation none of them runs on."""
    tasks = list(work)
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def source_of(rows: Sequence[WorkRow]) -> str:
    """Returns the source of a shard's rows; "" if it has none."""
    return rows[0].sample.source if rows else ""
