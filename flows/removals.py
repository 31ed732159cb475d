"""Rows that go from a shard: the table that names them, the words for why, and taking them out.

A comparison across shards numbers rows through all of them; here they become, shard by shard, rows with a reason that a
person understands: which row they resemble, how much, and whether the answers differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.buckets import Keys, Rows
from filters.duplicates import EXACT, NEAR, SAME_SOURCE_ID, Clashes, Removals
from filters.features import image_names, list_offsets
from filters.traces import DUPLICATE as TRACE_DUPLICATE
from flows.work_rows import FATE_QUESTION_CHARACTERS
from flows.workspace import Marker, Workspace
from schemas.fates import FATE_SCHEMA, Exit

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


class ShardTable(NamedTuple):
    """The rows of one shard after a stage."""

    stage: str
    shard: str
    num_rows: int

    @classmethod
    def of(cls, marker: Marker) -> ShardTable:
        return cls(marker.stage, marker.shard, marker.count.num_kept)


class ShardRows:
    """Rows of several shards, numbered through, published ones last: what a comparison found, put into words."""

    def __init__(self, workspace: Workspace, tables: Sequence[ShardTable], *, num_threads: int) -> None:
        self._workspace, self._tables, self._num_threads = workspace, tables, num_threads
        self._offsets = np.concatenate([[0], np.cumsum([table.num_rows for table in tables], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def origins(self, rows: Rows) -> Sequence[str]:
        return list(self.texts(rows, "origin")["origin"].to_pylist())

    def texts(self, rows: Rows, *columns: str) -> pa.Table:
        """Returns string columns of some rows, in their order; reads each shard once."""
        different, places = np.unique(rows, return_inverse=True)

        def read(part: tuple[int, Rows]) -> pa.Table:
            table = self._tables[part[0]]
            return self._workspace.read_columns(table.stage, table.shard, columns).take(pa.array(part[1]))

        with ThreadPoolExecutor(self._num_threads) as pool:
            nothing = pa.schema([(name, pa.string()) for name in columns]).empty_table()
            held = pa.concat_tables([nothing, *pool.map(read, self._by_shard(different))]).combine_chunks()
        return held.take(pa.array(places))

    def _by_shard(self, rows: Rows) -> list[tuple[int, Rows]]:
        """Returns ascending rows by the number of their shard, as numbers within it."""
        bounds = np.searchsorted(rows, self._offsets)
        return [
            (number, rows[bounds[number] : bounds[number + 1]] - self._offsets[number])
            for number in range(len(self._tables))
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
            plan[self._tables[number].shard] = part.cast(REMOVAL_SCHEMA)
        return plan

    def clashes(self, clashes: Clashes) -> pa.Table:
        rows = clashes.rows
        gone, first = self.texts(rows, "origin", "source_id"), self.texts(clashes.first, "origin")
        names = pc.utf8_slice_codeunits(gone["source_id"], 0, 80)
        detail = _joined(gone["origin"], " has the id '", names, "' of ", first["origin"], ", but other content")
        nothing = pa.nulls(len(rows))
        return removal_table(rows, Exit.QUARANTINED, _repeated(SAME_SOURCE_ID, len(rows)), detail, nothing, nothing)

    def duplicates(self, found: Removals, answers: Keys) -> pa.Table:
        """Returns the removals of duplicate rows. answers: `Features.answer` of all rows."""
        near = pa.array(found.is_near)
        likeness = pc.round(pa.array(found.similarity), 3).cast(pa.string())
        how = pc.if_else(near, _joined(" resembles (Jaccard ", likeness, ") "), " equals ")
        gone, kept = self._gone_and_kept(found)
        detail = _joined("images, question and options: ", gone["origin"], how, kept["origin"],
                         self._answer_note(found, answers))  # fmt: skip
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

    def _answer_note(self, found: Removals, answers: Keys) -> pa.Array:
        """Returns a clause for the rows whose reference answer is not that of the row that stays."""
        own, other = answers[found.rows], answers[found.resembles]
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
