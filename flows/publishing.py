"""The last stage: labelled shards become a version of the corpus, with its card, report and every row's fate.

As long as rows are published by the same rules, a version continues the one before: what is published stays as it is,
and only rows that are new are written. Other rules (another recipe, other benchmarks) start anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from corpus.card import CardInputs, build_card, mode_sizes
from corpus.keeping import collect_versions
from corpus.lineage import MARK_SCHEMA, News, find_news, new_marks, write_marks
from corpus.remote import remove_remote, restore_latest, send_version
from corpus.report import summary_table
from corpus.report_inputs import BenchmarkLeaks
from corpus.storage import write_bytes, write_text
from corpus.tally import tally_corpus
from corpus.versions import (
    CARD,
    FATES,
    FIGURES,
    MARKS,
    REPORT,
    Base,
    Committed,
    VersionChange,
    begin_version,
    commit_version,
    discard_build,
    find_base,
    locked,
    next_version_name,
    version_change,
    version_history,
)
from corpus.writer import STAGE, ShardInfo, read_ids, write_fates, write_shards
from flows.accounting import paid_line
from flows.annotating import agreement_figures
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.reporting import ReportFacts, write_report
from flows.run_config import corpus_address, corpus_folder
from flows.runtime import Runtime
from flows.stages import STAGES, recipe_digest
from flows.workspace import Marker, digest_of
from schemas.config import PricesConfig
from schemas.fates import Exit, Fate, StageCount, count_stage
from schemas.samples import Kind
from schemas.usage import Ledger, Usage, cost_of, merged_ledgers, total_usage
from schemas.verdicts import Mode

_LOG = logging.getLogger(__name__)
LAST_STAGE, DIFFICULTY = STAGES[-1], "difficulty"
RUN_FILE = "last_run.json"
"""In the work folder: what the last finished run made, for the command line."""


@dataclass(frozen=True, slots=True)
class Ledgers:
    """costs: of all stored replies that the rows asked for, whoever paid. paid: by this run."""

    costs: Ledger
    paid: Ledger


@dataclass(frozen=True, slots=True)
class Published:
    """A finished curation. changes: what the version changed, whichever run made it. paid: by this run. paid_line: the
    same in words, with its cost. address: of the version on object storage, "" if it is on the disk alone.
    """

    folder: Path
    version: str
    num_rows: int
    num_think: int
    is_new: bool
    changes: VersionChange
    paid: Usage
    paid_line: str
    summary: str
    address: str = ""

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    def to_record(self) -> dict[str, Any]:
        return {
            "corpus": str(self.folder),
            "address": self.address or str(self.folder),
            "report": str(self.report),
            "version": self.version,
            "rows": self.num_rows,
            "think": self.num_think,
            "is_new": self.is_new,
            "added": self.changes.num_added if self.is_new else 0,
            "vanished": self.changes.num_vanished if self.is_new else 0,
            "continues": self.changes.base,
            "new_teacher_calls": self.paid.num_calls,
            "paid": {**self.paid.to_record(), "text": self.paid_line},
        }


def publish(
    runtime: Runtime, markers: Mapping[str, Sequence[Marker]], benchmarks: Benchmarks | None = None
) -> Published:
    """Writes the corpus of the finished stages and publishes it, unless the latest version is the same corpus.

    markers: of every stage, in order. benchmarks: those that its rows were compared with.

    Raises StorageError, CorpusError: nothing is published then.
    """
    config = runtime.config
    ledgers = Ledgers(
        costs=merged_ledgers(marker.usage for done in markers.values() for marker in done),
        paid=runtime.accounts.paid(),
    )
    address = corpus_address(config)
    if address is not None:
        restore_latest(address, corpus_folder(config))
    with locked(corpus_folder(config)):
        committed = _make_version(runtime, markers, benchmarks, ledgers)
    if address is not None:
        send_version(committed.folder, address)
    if committed.is_new and config.corpus.keep_versions is not None:
        removed = collect_versions(corpus_folder(config), keep=config.corpus.keep_versions).removed
        if address is not None:
            remove_remote(address, removed)
        _LOG.info("old versions removed: %s", ", ".join(removed) or "none")
    published = _published(committed, ledgers.paid, config.prices)
    if address is not None:
        published = replace(published, address=f"{address.rstrip('/')}/{published.version}")
    write_text(runtime.workspace.root / RUN_FILE, json.dumps(published.to_record(), indent=2))
    return published


@dataclass(frozen=True, slots=True)
class _Build:
    """A version under construction. shards: its own ones; the base's come on top."""

    folder: Path
    base: Base | None
    shards: Sequence[ShardInfo]
    counts: Mapping[str, StageCount]
    change: VersionChange
    recipe: str
    inputs: str

    @property
    def all_shards(self) -> list[ShardInfo]:
        return [*(self.base.shards if self.base else ()), *self.shards]


def _make_version(
    runtime: Runtime, markers: Mapping[str, Sequence[Marker]], benchmarks: Benchmarks | None, ledgers: Ledgers
) -> Committed:
    """Builds and commits a version, unless it would change nothing. The corpus folder is held."""
    config = runtime.config
    recipe = recipe_digest(config)
    lineage = digest_of(recipe, benchmarks.digest if benchmarks else "")
    base = find_base(corpus_folder(config), name=config.name, lineage=lineage)
    build = _write_rows(runtime, markers, base, recipe)
    if base and not build.change.is_news and not base.damage:
        discard_build(build.folder)
        return Committed(base.folder, base.manifest, is_new=False)
    leaks = benchmarks.leaks(markers[DECONTAMINATION]) if benchmarks else []
    _write_pages(runtime, build, markers, ledgers, leaks)
    return commit_version(
        build.folder,
        name=config.name,
        created=build.change.created,
        recipe=recipe,
        inputs=build.inputs,
        shards=build.shards,
        counts=build.counts,
        lineage=lineage,
        licence=config.corpus.licence,
        base=base,
    )


def _write_rows(runtime: Runtime, markers: Mapping[str, Sequence[Marker]], base: Base | None, recipe: str) -> _Build:
    """Writes the shards of the rows that are new, the fate of every row that left, and the marks."""
    config = runtime.config
    building = begin_version(corpus_folder(config), base)
    run_shards = [marker.shard for marker in markers[LAST_STAGE]]
    news = find_news(map(read_ids, base.shard_paths) if base else (), (_ids(runtime, shard) for shard in run_shards))
    shards = write_shards(
        _labelled(runtime, markers[LAST_STAGE], news.is_new),
        building,
        shard_rows=config.corpus.shard_rows,
        read_image=runtime.images.read,
        recipe=recipe,
        first=base.next_shard_number if base else lambda mode: 0,
    )
    unwritable = [fate for shard in shards for fate in shard.fates]
    write_fates(unwritable, runtime.workspace.fates_path(STAGE, "all"))
    write_fates(_all_fates(runtime, markers, unwritable), building / FATES)
    write_marks(_marks(base, news, building), building / MARKS)
    counts = stage_counts(markers)
    num_rows = counts[LAST_STAGE].num_kept
    counts[STAGE] = count_stage(num_rows, num_rows - len(unwritable), unwritable)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    change = version_change(building, shards, base, created=created)
    inputs = digest_of([marker.output for marker in markers[STAGES[0]]])
    return _Build(building, base, shards, counts, change, recipe, inputs)


def _ids(runtime: Runtime, shard: str) -> pa.ChunkedArray:
    return runtime.workspace.read_columns(LAST_STAGE, shard, ["id"])["id"]


def _marks(base: Base | None, news: News, building: Path) -> pa.Table:
    """Returns the marks of the version being built: one for each published row that the run does not have."""
    if base is None:
        return MARK_SCHEMA.empty_table()
    absent, start = [pa.array([], pa.string())], 0
    for shard, path in zip(base.shards, base.shard_paths, strict=True):
        part, start = news.absent[start : start + shard.num_rows], start + shard.num_rows
        if part.any():
            absent.append(read_ids(path).combine_chunks().filter(pa.array(part)))
    version = next_version_name(building.parent)
    return new_marks(pa.concat_arrays(absent), before=base.marks, fates=building / FATES, version=version)


def _published(committed: Committed, paid: Ledger, prices: PricesConfig) -> Published:
    figures = json.loads((committed.folder / FIGURES).read_text(encoding="utf-8"))
    manifest = committed.manifest
    usage = total_usage(paid.values())
    return Published(
        committed.folder,
        manifest.version,
        manifest.num_rows,
        manifest.num_think,
        committed.is_new,
        manifest.changes,
        usage,
        paid_line(usage, cost_of(paid, prices) if prices.has_any else None),
        summary_table(figures),
    )


def stage_counts(markers: Mapping[str, Sequence[Marker]]) -> dict[str, StageCount]:
    """Returns the conservation law of each stage, summed over its shards; asserts that no row is lost in between."""
    counts: dict[str, StageCount] = {}
    before: StageCount | None = None
    for stage, done in markers.items():
        count = sum((marker.count for marker in done), StageCount())
        count.check(stage)
        assert before is None or before.num_kept == count.num_in, f"rows were lost before stage {stage}"
        counts[stage] = before = count
    return counts


def _labelled(runtime: Runtime, markers: Sequence[Marker], is_new: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """Yields the rows of the last stage that are new, in order, with `LABELLED_SCHEMA`. is_new: bool [all its rows]."""
    config, start = runtime.config, 0
    for marker in markers:
        part, start = is_new[start : start + marker.count.num_kept], start + marker.count.num_kept
        if not part.any():
            continue
        rows = runtime.workspace.read_rows(LAST_STAGE, marker.shard).filter(pa.array(part))
        for column, stage in (("mode", "decision"), ("final_answer", "answer")):
            assert rows[column].null_count == 0, f"a row of {marker.shard} has no {stage}"
        has_trace = pc.equal(rows["mode"], str(Mode.THINK))
        is_open = pc.and_(pc.equal(rows["kind"], str(Kind.SUBJECTIVE)), pc.is_null(rows["answer"]))
        writer = pc.if_else(has_trace, config.reasoner_endpoint.model, pc.if_else(is_open, config.teacher.model, ""))
        teacher = pa.repeat(pa.scalar(config.teacher.model), rows.num_rows)
        yield rows.append_column("teacher", teacher).append_column("reasoner", writer)


def _all_fates(runtime: Runtime, markers: Mapping[str, Sequence[Marker]], unwritable: Sequence[Fate]) -> Iterator[Fate]:
    for stage, done in markers.items():
        for marker in done:
            for record in runtime.workspace.read_fates(stage, marker.shard).to_pylist():
                yield Fate(**{**record, "exit": Exit(record["exit"]), "images": tuple(record["images"])})
    yield from unwritable


def _write_pages(
    runtime: Runtime,
    build: _Build,
    markers: Mapping[str, Sequence[Marker]],
    ledgers: Ledgers,
    leaks: Sequence[BenchmarkLeaks],
) -> None:
    """Writes card, report and figures into the version under construction."""
    config, change = runtime.config, build.change
    tally = tally_corpus(build.folder)
    facts = ReportFacts(
        version=change.version,
        created=change.created,
        recipe=build.recipe,
        inputs=build.inputs,
        counts=build.counts,
        costs=ledgers.costs,
        paid=ledgers.paid,
        leaks=leaks,
        shards=[marker.shard for marker in markers[LAST_STAGE]],
        agreement=agreement_figures(runtime, build.folder, [marker.shard for marker in markers[DIFFICULTY]]),
    )
    write_report(runtime, build.folder, facts, tally=tally)
    card = build_card(
        CardInputs(
            config.name,
            change.version,
            change.created,
            config.corpus.licence,
            build.recipe,
            config.teacher.model,
            config.reasoner_endpoint.model,
            build.counts,
            tally,
            mode_sizes(build.all_shards),
            [*version_history(build.folder.parent), change],
        )
    )
    write_bytes(build.folder / CARD, card.encode("utf-8", "replace"))
