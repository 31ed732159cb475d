"""The stage that removes rows which leak an evaluation benchmark. Without Prefect.

Benchmarks are read like sources, images too, and compared with one shard of rows after the other: a row's fate depends
on the row and the benchmarks alone. What a shard leaks is kept beside it (`{shard}.leaks.json`) for the report, which
names for each benchmark the rows and questions found.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from corpus.report import BenchmarkLeaks, LeakedPair
from corpus.storage import write_text
from filters.decontamination import (
    Benchmark,
    BenchmarkIndex,
    BenchmarkQuestion,
    Contamination,
    ShardContamination,
    image_keys,
)
from filters.features import image_names, list_offsets
from filters.flat_texts import FlatTexts
from filters.text_columns import read_tokens
from flows.removals import removal_table, split_rows
from flows.runtime import Runtime
from flows.workspace import Marker, digest_of
from schemas.config import SourceConfig
from schemas.errors import SourceError, StorageError
from schemas.fates import Exit
from schemas.samples import Sample
from sources import Unit, plan_units, read_unit

DECONTAMINATION = "decontamination"

_log = logging.getLogger(__name__)


SHOWN_CHARACTERS = 500
"""Of a leaked benchmark question, for the report."""


class Benchmarks:
    """The configured benchmarks of a run. Their rows are read when the first shard has to be compared.

    digest: of all that shapes a row's fate beside the row. Threads may share it.
    """

    def __init__(self, runtime: Runtime) -> None:
        settings = runtime.config.decontamination
        self._runtime = runtime
        self._config = runtime.config.model_copy(update={"sources": settings.benchmarks})
        self._units = plan_units(self._config)
        self._texts: dict[str, dict[str, str]] = {}
        self.digest = digest_of(
            settings.model_dump(exclude={"max_pairs"}), [(unit.source, unit.digest) for unit in self._units]
        )

    @cached_property
    def index(self) -> BenchmarkIndex:
        """The benchmarks, ready to be compared. Raises SourceError: no row of one can be read."""
        settings = self._runtime.config.decontamination
        return BenchmarkIndex.build(
            [self._benchmark(source) for source in settings.benchmarks],
            max_ngram=settings.max_ngram,
            min_ngram=settings.min_ngram,
            max_benchmark_questions=settings.max_benchmark_questions,
            images=settings.images,
        )

    def _benchmark(self, source: SourceConfig) -> Benchmark:
        samples, unreadable = self._samples([unit for unit in self._units if unit.source == source.name])
        if unreadable:
            listed = ", ".join(f"{number} {reason}" for reason, number in sorted(unreadable.items()))
            _log.warning("benchmark %s: rows that cannot be read are not compared: %s", source.name, listed)
        if not samples:
            raise SourceError(f"benchmark {source.name}: no row of {source.path} can be read; correct its settings")
        named = Counter(sample.source_id for sample in samples)
        questions = [
            BenchmarkQuestion(
                sample.source_id if sample.source_id and named[sample.source_id] == 1 else sample.origin,
                sample.question,
                sample.choices,
                tuple(image.sha256 for image in sample.images),
            )
            for sample in samples
        ]
        self._texts[source.name] = {question.id: question.question[:SHOWN_CHARACTERS] for question in questions}
        return Benchmark(source.name, questions)

    def _samples(self, units: Sequence[Unit]) -> tuple[list[Sample], Counter[str]]:
        samples: list[Sample] = []
        unreadable: Counter[str] = Counter()
        for unit in units:
            read, fates = read_unit(unit, self._config, self._runtime.images)
            samples += read
            unreadable.update(fate.reason for fate in fates)
        return samples, unreadable

    def leaks(self, markers: Sequence[Marker]) -> list[BenchmarkLeaks]:
        """Returns how far each benchmark leaks into the rows of this stage's shards."""
        root, index, texts = self._runtime.workspace.root, self.index, self._texts
        shards = (_read_leaks(_leaks_path(root, marker.shard), sum(index.num_questions)) for marker in markers)
        return [
            BenchmarkLeaks(
                found.name,
                found.num_questions,
                found.num_matched_questions,
                found.num_rows,
                [
                    LeakedPair(
                        pair.origin, pair.question, pair.how, pair.share, pair.excerpt, texts[found.name][pair.question]
                    )
                    for pair in found.pairs
                ],
            )
            for found in index.overlaps(shards, max_pairs=self._runtime.config.decontamination.max_pairs)
        ]


def decontaminate(runtime: Runtime, benchmarks: Benchmarks, before: Marker, digest: str) -> Marker:
    """Removes the rows of one shard that leak a benchmark, unless that is done already under this digest."""
    workspace, shard = runtime.workspace, before.shard
    path = _leaks_path(workspace.root, shard)
    done = workspace.find_marker(DECONTAMINATION, shard, digest)
    if done is not None and path.exists():
        return done
    rows = workspace.read_rows(before.stage, shard)
    found = find_leaks(benchmarks.index, rows)
    write_text(path, json.dumps(_leaks_record(found)))
    kept, fates = split_rows(rows, _removals(found), DECONTAMINATION)
    return workspace.finish_shard(DECONTAMINATION, shard, digest=digest, num_in=rows.num_rows, rows=kept, fates=fates)


def find_leaks(index: BenchmarkIndex, rows: pa.Table) -> ShardContamination:
    """Returns what a table of samples leaks."""
    return index.find(
        read_tokens(FlatTexts.of(rows["question"])),
        image_keys(image_names(rows["images"]).to_pylist()),
        list_offsets(rows["images"]),
        origins=rows["origin"].to_pylist(),
    )


def _removals(found: ShardContamination) -> pa.Table:
    worst = sorted(found.rows, key=lambda match: match.row)
    return removal_table(
        np.array([match.row for match in worst], np.int64),
        Exit.DROPPED,
        pa.array([match.reason for match in worst], pa.string()),
        pa.array([match.detail for match in worst], pa.string()),
        pa.array([f"{match.benchmark}:{match.question}" for match in worst], pa.string()),
        pa.array([match.share for match in worst], pa.float64()),
    )


def _leaks_path(root: Path, shard: str) -> Path:
    return root / "stages" / DECONTAMINATION / f"{shard}.leaks.json"


def _leaks_record(found: ShardContamination) -> dict[str, Any]:
    matches = [
        [match.row, match.origin, match.benchmark, match.question, match.how, match.share, match.excerpt]
        for match in found.matches
    ]
    return {"matches": matches, "hit_questions": np.flatnonzero(found.hit_questions).tolist()}


def _read_leaks(path: Path, num_questions: int) -> ShardContamination:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error
    hits = np.zeros(num_questions, np.bool_)
    hits[record["hit_questions"]] = True
    return ShardContamination(tuple(Contamination(*match) for match in record["matches"]), hits)
