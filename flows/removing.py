"""The stages that look across shards: duplicate rows, and duplicate chains of thought. Without Prefect.

What a shard's rows are compared by is made once and lies beside the stage's shards (`{shard}.features`). The comparison
names rows by shard and number; columns, never rows, become Python objects.

A refresh costs what is new. When a corpus is published, its shards are *settled*: their result stands for good, and
what their kept rows are compared by stays (`{shard}.published`, listed in `published.json`). The next run compares
only the rows of other shards, with each other and with all those. Where a source has grown, its last shard is read
anew; rows of it that are published already come before every other row, so they stay too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpus.storage import replacing, write_text
from filters.buckets import Rows, has_key, rows_with_keys
from filters.duplicates import (
    EXACT,
    NEAR,
    SAME_SOURCE_ID,
    Clashes,
    Removals,
    clashing_ids,
    features_of,
    find_duplicates,
)
from filters.feature_files import FeatureTable, stored_digest, write_features
from filters.features import PictureNames, image_names, list_offsets
from filters.traces import DUPLICATE as TRACE_DUPLICATE
from filters.traces import trace_features, trace_settings
from flows.pictures import Pictures
from flows.runtime import Runtime
from flows.work_rows import FATE_QUESTION_CHARACTERS
from flows.workspace import Marker, Workspace, digest_of
from schemas.config import DuplicatesConfig
from schemas.fates import FATE_SCHEMA, Exit

DUPLICATES = "duplicates"
LEDGER = "published.json"

FEATURES_VERSION = 4
"""Raised when features are made in another way, so that stored ones are made again."""

REMOVAL_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("exit", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("resembles", pa.string()),
        ("similarity", pa.float32()),
    ]
)
"""Rows of a shard that go, `row` being their number in the shard; resembles and similarity are null for id clashes."""

RemovalPlan = Mapping[str, pa.Table]
"""The removals by shard; a shard of which no row goes may be absent."""


def plan_duplicates(runtime: Runtime, markers: Sequence[Marker], settled: Sequence[Marker] = ()) -> RemovalPlan:
    """Returns the rows to remove: rows that claim another row's id, exact and near duplicates.

    markers: of the stage before. settled: of this stage, see `settled_shards`. Memory grows by about 60 bytes a row;
    texts stay on the disk.
    """
    config, num_threads = runtime.config.duplicates, runtime.config.parallel_shards
    names = _pictures(runtime, markers).names
    with ThreadPoolExecutor(num_threads + 1) as pool:  # one more, as one or other waits for the disk
        paths = list(pool.map(lambda marker: _feature_file(runtime, marker, names), markers))
    published = FeatureTable.open([_published_path(runtime.workspace, marker.shard) for marker in settled])
    shards = [*markers, *settled]
    rows = _ShardRows(runtime.workspace, shards, FeatureTable.open(paths), published, num_threads=num_threads)
    clashes = clashing_ids(rows.features, origins=rows.origins, published=published)
    found = find_duplicates(
        rows.features,
        config,
        origins=rows.origins,
        published=published,
        left_out=clashes.rows,
        num_threads=num_threads,
    )
    return rows.by_shard(rows.clashes(clashes), rows.duplicates(found))


def _features_recipe(config: DuplicatesConfig) -> str:
    settings = config.model_dump(include={"threshold", "num_permutations", "shingle_words", "seed", "images"})
    return digest_of(FEATURES_VERSION, settings)


def _published_path(workspace: Workspace, shard: str) -> Path:
    return workspace.root / "stages" / DUPLICATES / f"{shard}.published"


def _pictures(runtime: Runtime, markers: Sequence[Marker]) -> Pictures:
    """Returns the images of some shards, clustered; none if files are all that is compared."""
    is_near = runtime.config.duplicates.images == "near"
    return Pictures(runtime, runtime.workspace.root / "stages" / DUPLICATES, markers if is_near else [])


def _feature_file(runtime: Runtime, marker: Marker, pictures: PictureNames) -> Path:
    """Returns the file of a shard's features, written first if it is not there under this digest."""
    config, workspace = runtime.config.duplicates, runtime.workspace
    rows = workspace.read_rows(marker.stage, marker.shard)
    path = workspace.root / "stages" / DUPLICATES / f"{marker.shard}.features"
    earlier = _published_path(workspace, marker.shard)
    digest = digest_of(
        _features_recipe(config), marker.output, stored_digest(earlier), pictures.digest(image_names(rows["images"]))
    )
    if stored_digest(path) != digest:
        features = features_of(rows, config, pictures)
        if earlier.exists():
            published = FeatureTable.open([earlier]).column("id_high")
            features = features.published(rows_with_keys(published, features.id_high))
        with replacing(path) as temporary:
            write_features(temporary, features, digest)
    return path


def settled_shards(runtime: Runtime, markers: Sequence[Marker]) -> dict[str, Marker]:
    """Returns the markers of this stage for the shards whose published result stands, by shard.

    markers: of the stage before. A shard that was read anew, or compared under another recipe, is not settled.
    """
    workspace, config = runtime.workspace, runtime.config.duplicates
    recipe, ledger = _features_recipe(config), _read_ledger(workspace)
    if ledger.get("recipe") != digest_of(recipe, config.model_dump()):
        return {}
    settled = {}
    for marker in markers:
        source, digest = ledger["shards"].get(marker.shard, ("", ""))
        found = workspace.find_marker(DUPLICATES, marker.shard, digest) if source == marker.output else None
        if found and stored_digest(_published_path(workspace, marker.shard)) == digest_of(recipe, found.output):
            settled[marker.shard] = found
    return settled


def settle(runtime: Runtime, before: Sequence[Marker], markers: Sequence[Marker]) -> None:
    """Records that the result of this stage is published. before: markers of the stage before, of the same shards."""
    workspace, config = runtime.workspace, runtime.config.duplicates
    recipe = _features_recipe(config)
    settled = settled_shards(runtime, before)
    pictures = _pictures(runtime, [marker for marker in before if marker.shard not in settled])
    for marker in markers:
        path, digest = _published_path(workspace, marker.shard), digest_of(recipe, marker.output)
        if stored_digest(path) != digest:
            features = features_of(workspace.read_rows(DUPLICATES, marker.shard), config, pictures.names)
            with replacing(path) as temporary:
                write_features(temporary, features.published(np.arange(len(features))), digest)
        for suffix in (".features", ".pictures"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    pictures.settle()
    shards = {new.shard: [old.output, new.digest] for old, new in zip(before, markers, strict=True)}
    ledger = {"recipe": digest_of(recipe, config.model_dump()), "shards": shards}
    write_text(workspace.root / "stages" / DUPLICATES / LEDGER, json.dumps(ledger, sort_keys=True))


def _read_ledger(workspace: Workspace) -> dict[str, Any]:
    path = workspace.root / "stages" / DUPLICATES / LEDGER
    try:
        ledger: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return ledger


class _ShardRows:
    """Rows of several shards, numbered through, published ones last: what the comparison found, put into words."""

    def __init__(
        self,
        workspace: Workspace,
        markers: Sequence[Marker],
        features: FeatureTable,
        published: FeatureTable | None = None,
        *,
        num_threads: int,
    ) -> None:
        self._workspace, self._markers, self._num_threads = workspace, markers, num_threads
        self.features, self._published = features, published or FeatureTable([])
        counts = [marker.count.num_kept for marker in markers]
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        num_rows = len(features) + len(self._published)
        assert self._offsets[-1] == num_rows, "a shard's features are not those of its rows"

    def origins(self, rows: Rows) -> Sequence[str]:
        return list(self.texts(rows, "origin")["origin"].to_pylist())

    def texts(self, rows: Rows, *columns: str) -> pa.Table:
        """Returns string columns of some rows, in their order; reads each shard once."""
        different, places = np.unique(rows, return_inverse=True)

        def read(part: tuple[int, Rows]) -> pa.Table:
            marker = self._markers[part[0]]
            return self._workspace.read_columns(marker.stage, marker.shard, columns).take(pa.array(part[1]))

        with ThreadPoolExecutor(self._num_threads) as pool:
            nothing = pa.schema([(name, pa.string()) for name in columns]).empty_table()
            held = pa.concat_tables([nothing, *pool.map(read, self._by_shard(different))]).combine_chunks()
        return held.take(pa.array(places))

    def _by_shard(self, rows: Rows) -> list[tuple[int, Rows]]:
        """Returns ascending rows by the number of their shard, as numbers within it."""
        bounds = np.searchsorted(rows, self._offsets)
        return [
            (number, rows[bounds[number] : bounds[number + 1]] - self._offsets[number])
            for number in range(len(self._markers))
            if bounds[number] < bounds[number + 1]
        ]

    def by_shard(self, *removals: pa.Table) -> RemovalPlan:
        """Returns removals, ascending and numbered through all shards, by shard and numbered within it."""
        held = [table for table in removals if table.num_rows] or [REMOVAL_SCHEMA.empty_table()]
        removed = held[0] if len(held) == 1 else pa.concat_tables(held).sort_by("row")
        rows = removed["row"].to_numpy()
        plan = {}
        for number, local in self._by_shard(rows):
            start = int(np.searchsorted(rows, self._offsets[number]))
            part = removed.slice(start, len(local)).set_column(0, "row", pa.array(local))
            plan[self._markers[number].shard] = part.cast(REMOVAL_SCHEMA)
        return plan

    def clashes(self, clashes: Clashes) -> pa.Table:
        rows = clashes.rows
        gone, first = self.texts(rows, "origin", "source_id"), self.texts(clashes.first, "origin")
        names = pc.utf8_slice_codeunits(gone["source_id"], 0, 80)
        detail = _joined(gone["origin"], " has the id '", names, "' of ", first["origin"], ", but other content")
        nothing = pa.nulls(len(rows))
        return removal_table(rows, Exit.QUARANTINED, _repeated(SAME_SOURCE_ID, len(rows)), detail, nothing, nothing)

    def duplicates(self, found: Removals) -> pa.Table:
        near = pa.array(found.is_near)
        likeness = pc.round(pa.array(found.similarity), 3).cast(pa.string())
        how = pc.if_else(near, _joined(" resembles (Jaccard ", likeness, ") "), " equals ")
        gone, kept = self._gone_and_kept(found)
        detail = _joined("images, question and options: ", gone["origin"], how, kept["origin"],
                         self._answer_note(found))  # fmt: skip
        reasons = pc.if_else(near, NEAR, EXACT)
        return removal_table(found.rows, Exit.DROPPED, reasons, detail, kept["id"], pa.array(found.similarity))

    def traces(self, found: Removals) -> pa.Table:
        likeness = pc.round(pa.array(found.similarity), 2).cast(pa.string())
        _, kept = self._gone_and_kept(found)
        detail = _joined("its trace is that of ", kept["origin"], " (", likeness, " alike)")
        reasons = _repeated(TRACE_DUPLICATE, len(found))
        return removal_table(found.rows, Exit.DROPPED, reasons, detail, kept["id"], pa.array(found.similarity))

    def _gone_and_kept(self, found: Removals) -> tuple[pa.Table, pa.Table]:
        """Returns origins and ids of the rows that go, and of those that stay instead, by one reading of the shards."""
        both = self.texts(np.concatenate([found.rows, found.resembles]), "origin", "id")
        return both.slice(0, len(found)), both.slice(len(found))

    def _answer_note(self, found: Removals) -> pa.Array:
        """Returns a clause for the rows whose reference answer is not that of the row that stays."""
        keys = np.concatenate([self.features.column("answer"), self._published.column("answer")])
        own, other = keys[found.rows], keys[found.resembles]
        differ = np.flatnonzero((own != other) & (own != 0) & (other != 0))
        notes = np.full(len(found), "", object)
        for place, gone, kept in zip(
            differ,
            self.texts(found.rows[differ], "answer")["answer"].to_pylist(),
            self.texts(found.resembles[differ], "answer")["answer"].to_pylist(),
            strict=True,
        ):
            notes[place] = f"; the answers differ: {gone!r:.80} was dropped, {kept!r:.80} kept"
        return pa.array(notes, pa.string())


def plan_traces(runtime: Runtime, markers: Sequence[Marker]) -> RemovalPlan:
    """Returns the thinking rows whose chain of thought is another row's; of two, the published one stays."""
    workspace = runtime.workspace
    earlier = [path for marker in markers if (path := _published_path(workspace, marker.shard)).exists()]
    published = FeatureTable.open(earlier).column("id_high")
    threshold, num_threads = runtime.config.reasoning.duplicate_threshold, runtime.config.parallel_shards
    features = []
    for marker in markers:
        traces = runtime.workspace.read_columns(marker.stage, marker.shard, ["id", "question", "reasoning"])
        features.append(trace_features(traces, threshold))
    # Looked up at once: the table of the published ids is large, and made anew by each look.
    stays = has_key(published, np.concatenate([np.zeros(0, np.uint64), *(shard.id_high for shard in features)]))
    starts = np.cumsum([0, *map(len, features)])
    tables = [
        shard.published(np.flatnonzero(stays[start : start + len(shard)])).to_table()
        for shard, start in zip(features, starts, strict=False)
    ]
    rows = _ShardRows(workspace, markers, FeatureTable(tables), num_threads=num_threads)
    settings = trace_settings(threshold)
    found = find_duplicates(rows.features, settings, origins=rows.origins, num_threads=num_threads)
    return rows.by_shard(rows.traces(found))


def removal_table(
    rows: Rows, exit_: Exit, reasons: pa.Array, detail: pa.Array, resembles: pa.Array, similarity: pa.Array
) -> pa.Table:
    """Returns a table with `REMOVAL_SCHEMA`; rows are ascending."""
    columns = [pa.array(rows), _repeated(str(exit_), len(rows)), reasons, detail, resembles, similarity]
    return pa.table(columns, names=REMOVAL_SCHEMA.names).cast(REMOVAL_SCHEMA)


def _repeated(text: str, number: int) -> pa.Array:
    return pa.repeat(pa.scalar(text), number)


def _joined(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def split_rows(table: pa.Table, removals: pa.Table | None, stage: str) -> tuple[pa.Table, pa.Table]:
    """Returns the rows that stay, and the fates of those that go. table: with the columns of a sample."""
    if removals is None:
        return table, FATE_SCHEMA.empty_table()
    stays = np.ones(table.num_rows, np.bool_)
    stays[removals["row"].to_numpy()] = False
    gone = table.take(removals["row"]).combine_chunks()
    offsets = pa.array(list_offsets(gone["images"]), pa.int32())
    names = image_names(gone["images"])
    fates = pa.table(
        {
            "origin": gone["origin"],
            "id": gone["id"],
            "source": gone["source"],
            "stage": _repeated(stage, gone.num_rows),
            **{name: removals[name] for name in ("exit", "reason", "detail", "resembles", "similarity")},
            "question": pc.utf8_slice_codeunits(gone["question"], 0, FATE_QUESTION_CHARACTERS),
            "images": pa.ListArray.from_arrays(offsets, names),
        }
    )
    return table.filter(pa.array(stays)), fates.cast(FATE_SCHEMA)
