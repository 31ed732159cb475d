"""Rows to be compared, dealt out by their block, so that each part is searched for duplicates by itself.

Rows of different blocks are never duplicates of each other: the keys of their bands differ, and equal pictures, options
and text make equal blocks. So a search over all rows is the sum of searches over parts that hold whole blocks, wherever
and in whatever order these run. Rows travel by files: many writers each make one file with a piece for every part, and
whoever searches a part reads that piece of each file, and nothing else.

The largest block bounds how far a search can be spread: all questions without an image, options, numbers or other
decisive words are one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from filters.buckets import Rows
from filters.duplicates import Origins, Removals, find_duplicates
from filters.feature_files import FeatureTable
from schemas.config import DuplicatesConfig
from schemas.errors import StorageError

_ROW = "row"
_DIGEST = b"digest"


def write_pieces(path: Path, table: pa.Table, rows: Rows, num_parts: int, digest: str = "") -> None:
    """Writes the features of some rows in pieces, one for each part. Raises OSError.

    table: of features, see `Features.to_table`. rows: int64 [num_rows], the numbers of its rows among all rows of the
    search. digest: of what shaped them, see `feature_files.stored_digest`.
    """
    parts = table["block"].to_numpy() % np.uint64(num_parts)
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(num_parts + 1, dtype=np.uint64))
    sorted_rows = table.take(pa.array(order)).append_column(_ROW, pa.array(rows[order])).combine_chunks()
    schema = sorted_rows.schema.with_metadata({_DIGEST: digest.encode()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start, stop in pairwise(bounds.tolist()):
            # An empty piece is written, too, so that the number of a piece is its place in the file.
            pieces = sorted_rows.slice(start, stop - start).to_batches() or [_empty(schema)]
            writer.write_batch(pieces[0].replace_schema_metadata(schema.metadata))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def read_part(paths: Sequence[Path], part: int) -> tuple[FeatureTable, Rows]:
    """Returns the features of one part, and the numbers of its rows. Raises StorageError: a file is damaged."""
    tables = []
    for path in paths:
        try:
            with pa.memory_map(str(path)) as source:
                tables.append(pa.Table.from_batches([pa.ipc.open_file(source).get_batch(part)]))
        except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
            raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error
    rows = [table[_ROW].to_numpy() for table in tables]
    return FeatureTable(tables), np.concatenate([np.empty(0, np.int64), *rows])


@dataclass(frozen=True, slots=True)
class PartSearch:
    """What the search for duplicates in one part needs. Rows have the numbers of the whole search, see `Removals`.

    new, published: files of `write_pieces`. num_new: new rows of all parts. left_out: rows that take no part.
    """

    new: tuple[Path, ...]
    published: tuple[Path, ...]
    num_new: int
    left_out: Rows
    config: DuplicatesConfig

    def run(self, part: int, origins: Origins, *, num_threads: int = 1) -> Removals:
        """Returns the new rows of a part that go. origins: of rows of the whole search. Raises StorageError."""
        new, rows = read_part(self.new, part)
        published, published_rows = read_part(self.published, part)
        numbers = np.concatenate([rows, published_rows + self.num_new])
        found = find_duplicates(
            new,
            self.config,
            origins=lambda local: origins(numbers[local]),
            published=published,
            left_out=np.flatnonzero(np.isin(rows, self.left_out)),
            num_threads=num_threads,
        )
        return Removals(rows[found.rows], found.is_near, numbers[found.resembles], found.similarity)


def joined_removals(parts: Sequence[Removals]) -> Removals:
    """Returns the removals of all parts as those of one search."""
    rows = np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])
    order = np.argsort(rows)
    near = np.concatenate([np.empty(0, np.bool_), *(part.is_near for part in parts)])
    resembles = np.concatenate([np.empty(0, np.int64), *(part.resembles for part in parts)])
    similarity = np.concatenate([np.empty(0, np.float64), *(part.similarity for part in parts)])
    return Removals(rows[order], near[order], resembles[order], similarity[order])
