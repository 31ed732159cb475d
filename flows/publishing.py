"""The last stage: labelled shards become a version of the corpus, with its card, report and every row's fate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpus.card import CardInputs, build_card, mode_sizes
from corpus.excerpts import pick_fates, pick_rows
from corpus.report import BenchmarkLeaks, ReportInputs, build_report, summary_table
from corpus.storage import write_bytes, write_text
from corpus.tally import tally_corpus
from corpus.versions import Committed, begin_version, commit_version, next_version_name
from corpus.writer import STAGE, ShardInfo, write_fates, write_shards
from flows.accounting import paid_line
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.runtime import Runtime
from flows.stages import STAGES, recipe_digest
from flows.work_rows import work_rows
from flows.workspace import Marker, digest_of
from schemas.config import PricesConfig, RunConfig
from schemas.fates import Exit, Fate, StageCount, count_stage
from schemas.rows import LabelledSample
from schemas.samples import Kind
from schemas.usage import Ledger, Usage, cost_of, merged_ledgers, total_usage
from schemas.verdicts import Mode

LAST_STAGE = STAGES[-1]
FATES_FILE = "fates.parquet"
REPORT_PAGE = "report.html"
REPORT_FIGURES = "report.json"
RUN_FILE = "last_run.json"
"""In the work folder: what the last finished run made, for the command line."""


@dataclass(frozen=True, slots=True)
class Ledgers:
    """costs: of all stored replies that the rows asked for, whoever paid. paid: by this run."""

    costs: Ledger
    paid: Ledger


@dataclass(frozen=True, slots=True)
class Published:
    """A finished curation. paid: by this run. paid_line: the same in words, with its cost."""

    folder: Path
    version: str
    num_rows: int
    num_think: int
    is_new: bool
    paid: Usage
    paid_line: str
    summary: str

    @property
    def report(self) -> Path:
        return self.folder / REPORT_PAGE

    def to_record(self) -> dict[str, Any]:
        return {
            "corpus": str(self.folder),
            "report": str(self.report),
            "version": self.version,
            "rows": self.num_rows,
            "think": self.num_think,
            "is_new": self.is_new,
            "new_teacher_calls": self.paid.num_calls,
            "paid": {**self.paid.to_record(), "text": self.paid_line},
        }


def corpus_folder(config: RunConfig) -> Path:
    """Returns the folder that holds the versions."""
    return Path(config.corpus.folder) if config.corpus.folder else Path(config.workdir) / "corpus"


def publish(
    runtime: Runtime, markers: Mapping[str, Sequence[Marker]], benchmarks: Benchmarks | None = None
) -> Published:
    """Writes the corpus of the finished stages and publishes it, unless the latest version is the same corpus.

    markers: of every stage, in order. benchmarks: those that its rows were compared with.

    Raises StorageError, CorpusError: nothing is published then.
    """
    config = runtime.config
    recipe = recipe_digest(config)
    shards_in = [marker.shard for marker in markers[LAST_STAGE]]
    inputs = digest_of([marker.output for marker in markers[STAGES[0]]])
    building = begin_version(corpus_folder(config))
    shards = write_shards(
        _labelled(runtime, shards_in),
        building,
        shard_rows=config.corpus.shard_rows,
        read_image=runtime.images.read,
        recipe=recipe,
    )
    unwritable = [fate for shard in shards for fate in shard.fates]
    write_fates(_all_fates(runtime, markers, unwritable), building / FATES_FILE)
    counts = stage_counts(markers)
    num_kept = sum(shard.num_rows for shard in shards)
    counts[STAGE] = count_stage(num_kept + len(unwritable), num_kept, unwritable)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    ledgers = Ledgers(
        costs=merged_ledgers(marker.usage for done in markers.values() for marker in done),
        paid=runtime.accounts.paid(),
    )
    leaks = benchmarks.leaks(markers[DECONTAMINATION]) if benchmarks else []
    digests = {"recipe": recipe, "inputs": inputs}
    figures = _write_pages(runtime, building, shards, counts, ledgers, leaks, created=created, **digests)
    committed = commit_version(
        building, name=config.name, created=created, recipe=recipe, inputs=inputs, shards=shards, counts=counts
    )
    published = _published(committed, figures, ledgers.paid, config.prices)
    write_text(runtime.workspace.root / RUN_FILE, json.dumps(published.to_record(), indent=2))
    return published


def _published(committed: Committed, figures: Mapping[str, Any], paid: Ledger, prices: PricesConfig) -> Published:
    if not committed.is_new:
        figures = json.loads((committed.folder / REPORT_FIGURES).read_text(encoding="utf-8"))
    manifest = committed.manifest
    usage = total_usage(paid.values())
    return Published(
        committed.folder,
        manifest.version,
        manifest.num_rows,
        manifest.num_think,
        committed.is_new,
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


def _labelled(runtime: Runtime, shards: Sequence[str]) -> Iterator[LabelledSample]:
    config = runtime.config
    for shard in shards:
        for row in work_rows(runtime.workspace.read_rows(LAST_STAGE, shard)):
            assert row.decision is not None, f"{row.sample.origin} has no decision"
            assert row.answer is not None, f"{row.sample.origin} has no answer"
            wrote_answer = row.sample.kind is Kind.SUBJECTIVE and row.sample.answer is None
            has_trace = row.decision.mode is Mode.THINK
            reasoner = config.reasoner_endpoint.model if has_trace else config.teacher.model if wrote_answer else ""
            yield LabelledSample(
                row.sample, row.decision, row.reasoning or "", row.answer, config.teacher.model, reasoner
            )


def _all_fates(runtime: Runtime, markers: Mapping[str, Sequence[Marker]], unwritable: Sequence[Fate]) -> Iterator[Fate]:
    for stage, done in markers.items():
        for marker in done:
            for record in runtime.workspace.read_fates(stage, marker.shard).to_pylist():
                yield Fate(**{**record, "exit": Exit(record["exit"]), "images": tuple(record["images"])})
    yield from unwritable


def _write_pages(
    runtime: Runtime,
    building: Path,
    shards: Sequence[ShardInfo],
    counts: Mapping[str, StageCount],
    ledgers: Ledgers,
    leaks: Sequence[BenchmarkLeaks],
    *,
    created: str,
    recipe: str,
    inputs: str,
) -> dict[str, Any]:
    """Writes card, report and figures into the version under construction and returns the figures."""
    config = runtime.config
    tally = tally_corpus(building)
    version = next_version_name(building.parent)
    teacher, reasoner = config.teacher.model, config.reasoner_endpoint.model
    page, figures = build_report(
        ReportInputs(
            name=config.name,
            version=version,
            created=created,
            recipe=recipe,
            inputs=inputs,
            teacher=teacher,
            reasoner=reasoner,
            stages=counts,
            tally=tally,
            costs=ledgers.costs,
            paid=ledgers.paid,
            prices=config.prices,
            benchmarks=leaks,
            rows=pick_rows(building),
            fates=pick_fates(building / FATES_FILE, read_image=runtime.images.read),
        )
    )
    card = build_card(
        CardInputs(
            config.name,
            version,
            created,
            config.corpus.licence,
            recipe,
            teacher,
            reasoner,
            counts,
            tally,
            mode_sizes(shards),
        )
    )
    write_bytes(building / REPORT_PAGE, page.encode("utf-8", "replace"))
    write_bytes(building / REPORT_FIGURES, json.dumps(figures, indent=2, ensure_ascii=False).encode("utf-8", "replace"))
    write_bytes(building / "README.md", card.encode("utf-8", "replace"))
    return figures
