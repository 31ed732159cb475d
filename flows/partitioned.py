"""The comparisons across shards, spread over the workers of a run. The result is that of `flows.removing`.

Features are made shard by shard and dealt out by their block (`filters.partitions`) through files of the work folder, a
shuffle: each worker then searches one part by itself. What stays with the process of the flow is small or cheap: which
images are near copies of each other (a fingerprint an image), which rows claim one id (a few numbers a row), and the
words for the rows that go.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from corpus.storage import empty_folder, replacing, storage_errors
from filters.duplicates import Removals, clashing_ids
from filters.feature_files import FeatureTable, read_arrow, write_arrow
from filters.features import PictureNames
from filters.partitions import PartSearch, joined_removals, write_pieces
from filters.traces import trace_features, trace_settings
from flows.pictures import shard_fingerprints
from flows.removals import RemovalPlan, ShardRows, ShardTable
from flows.removing import DUPLICATES, feature_file, feature_path, pictures_of, published_path, shard_rows
from flows.runtime import Runtime
from flows.shard_calls import Spread
from flows.stages import TRACES, Progress
from flows.workspace import Marker

ROWS_PER_FILE = 1 << 16
"""Rows whose features are dealt out at a time: some tens of megabytes of memory."""
ROWS_PER_PART = 1 << 17
MAX_PARTS = 64


def plan_duplicates(
    runtime: Runtime, markers: Sequence[Marker], settled: Sequence[Marker], spread: Spread
) -> RemovalPlan:
    """Returns the rows to remove, as `removing.plan_duplicates` does."""
    workspace = runtime.workspace
    with _pieces_folder(runtime, DUPLICATES) as folder:
        if runtime.config.duplicates.images == "near":
            spread("images", {marker.shard: _Fingerprints(marker) for marker in markers})
        names = folder / "names.arrow"
        with replacing(names) as temporary:
            write_arrow(temporary, pictures_of(runtime, markers).names.to_table())
        shuffle = _Shuffle(spread, folder, _num_parts([*markers, *settled]))
        new_files = shuffle.deal("features", markers, _RowFeatures(names))
        old_files = shuffle.deal("published", settled, _PublishedFeatures()) if settled else ()
        features = FeatureTable.open([feature_path(workspace, marker.shard) for marker in markers])
        published = FeatureTable.open([published_path(workspace, marker.shard) for marker in settled])
        rows = shard_rows(runtime, [*markers, *settled], [features, published])
        clashes = clashing_ids(features, origins=rows.origins, published=published)
        search = PartSearch(new_files, old_files, len(features), clashes.rows, runtime.config.duplicates)
        found = shuffle.search(search, [*markers, *settled])
        answers = np.concatenate([features.column("answer"), published.column("answer")])
        return rows.by_shard(rows.clashes(clashes), rows.duplicates(found, answers))


def plan_traces(runtime: Runtime, markers: Sequence[Marker], spread: Spread) -> RemovalPlan:
    """Returns the thinking rows whose chain of thought is another row's, as `removing.plan_traces` does."""
    workspace = runtime.workspace
    threshold = runtime.config.reasoning.duplicate_threshold
    with _pieces_folder(runtime, TRACES) as folder:
        earlier = [path for marker in markers if (path := published_path(workspace, marker.shard)).exists()]
        ids = folder / "published.npy"
        with storage_errors(ids, "write"):
            np.save(ids, np.unique(FeatureTable.open(earlier).column("id_high")))
        shuffle = _Shuffle(spread, folder, _num_parts(markers))
        files = shuffle.deal("features", markers, _TraceFeatures(ids, threshold))
        num_rows = sum(marker.count.num_kept for marker in markers)
        search = PartSearch(files, (), num_rows, np.empty(0, np.int64), trace_settings(threshold))
        rows = ShardRows(
            workspace, [ShardTable.of(marker) for marker in markers], num_threads=runtime.config.parallel_shards
        )
        return rows.by_shard(rows.traces(shuffle.search(search, markers)))


def _pieces_folder(runtime: Runtime, stage: str) -> AbstractContextManager[Path]:
    """An empty folder that all workers see, while it is held. Raises StorageError."""
    return empty_folder(runtime.workspace.root / "stages" / stage / "pieces")


def _num_parts(markers: Sequence[Marker]) -> int:
    num_rows = sum(marker.count.num_kept for marker in markers)
    return max(1, min(MAX_PARTS, -(-num_rows // ROWS_PER_PART)))


def _file_groups(markers: Sequence[Marker]) -> list[list[Marker]]:
    """Returns consecutive shards whose rows are dealt out into one file."""
    grouped: list[list[Marker]] = []
    num_rows = 0
    for marker in markers:
        if not grouped or num_rows + marker.count.num_kept > ROWS_PER_FILE:
            grouped.append([])
            num_rows = 0
        grouped[-1].append(marker)
        num_rows += marker.count.num_kept
    return grouped


@dataclass(frozen=True, slots=True)
class _Fingerprints:
    """Reads the images of one shard, for `flows.pictures` to find their fingerprints made."""

    marker: Marker

    def __call__(self, runtime: Runtime, progress: Progress) -> None:
        del progress
        shard_fingerprints(runtime, runtime.workspace.root / "stages" / DUPLICATES, self.marker)


class _Maker(Protocol):
    """Makes the features of a shard, as a table; can be pickled."""

    def __call__(self, runtime: Runtime, marker: Marker) -> pa.Table: ...


@dataclass(frozen=True, slots=True)
class _RowFeatures:
    """names: file of the names of images."""

    names: Path

    def __call__(self, runtime: Runtime, marker: Marker) -> pa.Table:
        names = PictureNames.from_table(read_arrow(self.names))
        return read_arrow(feature_file(runtime, marker, names))


@dataclass(frozen=True, slots=True)
class _PublishedFeatures:
    def __call__(self, runtime: Runtime, marker: Marker) -> pa.Table:
        return read_arrow(published_path(runtime.workspace, marker.shard))


@dataclass(frozen=True, slots=True)
class _TraceFeatures:
    """ids: file of the ids of published rows, by their first half, ascending. threshold: of traces."""

    ids: Path
    threshold: float

    def __call__(self, runtime: Runtime, marker: Marker) -> pa.Table:
        columns = ["id", "question", "reasoning"]
        features = trace_features(runtime.workspace.read_columns(marker.stage, marker.shard, columns), self.threshold)
        ids = np.load(self.ids, mmap_mode="r")
        places = np.searchsorted(ids, features.id_high)
        stays = ids[np.minimum(places, len(ids) - 1)] == features.id_high if len(ids) else np.zeros(len(features), bool)
        return features.published(np.flatnonzero(stays)).to_table()


@dataclass(frozen=True, slots=True)
class _Deal:
    """Makes the features of some shards and writes them in pieces. first_row: of the first shard, among all rows."""

    make: _Maker
    markers: tuple[Marker, ...]
    first_row: int
    path: Path
    num_parts: int

    def __call__(self, runtime: Runtime, progress: Progress) -> Path:
        del progress
        table = pa.concat_tables([self.make(runtime, marker) for marker in self.markers])
        rows = np.arange(self.first_row, self.first_row + table.num_rows)
        with replacing(self.path, is_flushed=False) as temporary:
            write_pieces(temporary, table, rows, self.num_parts)
        return self.path


@dataclass(frozen=True, slots=True)
class _SearchPart:
    search: PartSearch
    part: int
    tables: tuple[ShardTable, ...]

    def __call__(self, runtime: Runtime, progress: Progress) -> Removals:
        del progress
        num_threads = runtime.config.parallel_shards
        rows = ShardRows(runtime.workspace, self.tables, num_threads=num_threads)
        return self.search.run(self.part, rows.origins, num_threads=num_threads)


@dataclass(frozen=True, slots=True)
class _Shuffle:
    """One comparison: features go to files in pieces, each piece to the part that it belongs to."""

    spread: Spread
    folder: Path
    num_parts: int

    def deal(self, what: str, markers: Sequence[Marker], make: _Maker) -> tuple[Path, ...]:
        """Returns files of the features of all shards, in pieces."""
        calls: dict[str, _Deal] = {}
        first_row = 0
        for group in _file_groups(markers):
            name = group[0].shard
            path = self.folder / f"{what}-{name}.arrow"
            calls[name] = _Deal(make, tuple(group), first_row, path, self.num_parts)
            first_row += sum(marker.count.num_kept for marker in group)
        return tuple(self.spread(what, calls).values())

    def search(self, search: PartSearch, markers: Sequence[Marker]) -> Removals:
        """Returns the removals of all parts together. markers: of new, then of published shards."""
        tables = tuple(map(ShardTable.of, markers))
        calls = {f"part-{part:03}": _SearchPart(search, part, tables) for part in range(self.num_parts)}
        return joined_removals(list(self.spread("compare", calls).values()))
