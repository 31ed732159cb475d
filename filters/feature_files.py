"""The features of many shards on disk, seen as one long table: columns and bands are read one at a time.

Row numbers run through all shards in the order in which they are given. Files are mapped, and large ones given back to
the system after each reading, so memory holds what is in use, not what was ever touched.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.features import Features, copy_rows, stored_words
from filters.row_order import RowOrder
from filters.word_table import WordTable
from schemas.errors import StorageError

_DIGEST = b"digest"

_HELD_BYTES = 1 << 27
"""Size of all files together up to which their pages are kept: those of more go back to the system after each use."""


def write_features(path: Path, features: Features, digest: str = "") -> None:
    """Writes a shard's features as an uncompressed Arrow file. digest: of what shaped them. Raises OSError."""
    write_arrow(path, features.to_table(), digest)


def write_arrow(path: Path, table: pa.Table, digest: str = "") -> None:
    """Writes an uncompressed Arrow file. digest: of what shaped it, see `stored_digest`. Raises OSError."""
    table = table.replace_schema_metadata({_DIGEST: digest.encode()}).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))


def stored_digest(path: Path) -> str | None:
    """Returns the digest that a file was written with; None if there is no such file, or a damaged one."""
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    found: bytes | None = metadata.get(_DIGEST)
    return None if found is None else found.decode()


def read_arrow(path: Path) -> pa.Table:
    """Maps a file that `write_arrow` wrote. Raises StorageError: it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
        raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error


class FeatureTable:
    """The features in several files, or in memory, as one table."""

    def __init__(self, tables: Sequence[pa.Table], maps: Sequence[mmap.mmap] = ()) -> None:
        self._tables = [table for table in tables if table.num_rows]
        self._maps = maps
        self.offsets = np.zeros(len(self._tables) + 1, np.int64)
        np.cumsum([table.num_rows for table in self._tables], out=self.offsets[1:])
        names = [name for name in ("words", "context") if self._tables and name in self._tables[0].column_names]
        self._words = {name: [stored_words(table, name) for table in self._tables] for name in names}

    @classmethod
    def open(cls, paths: Sequence[Path]) -> FeatureTable:
        """Maps files that `write_features` wrote. Raises StorageError: one is missing or damaged."""
        tables, maps = [], []
        for path in paths:
            try:
                with path.open("rb") as file:
                    maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                tables.append(pa.ipc.open_file(pa.BufferReader(pa.py_buffer(maps[-1]))).read_all())
            except (OSError, ValueError, pa.ArrowInvalid) as error:
                raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error
        return cls(tables, maps)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_bands(self) -> int:
        return sum(name.startswith("band_") for name in self._tables[0].column_names) if self._tables else 0

    def column(self, name: str) -> NDArray[np.uint64]:
        """Returns one column of all rows."""
        if not self._tables:
            return np.empty(0, np.uint64)
        parts = [chunk.to_numpy() for table in self._tables for chunk in table[name].chunks]
        column = np.concatenate(parts)
        self._release()
        return column

    def _release(self) -> None:
        """Lets the system take back the pages of large files; reading them again costs a fault, not a loss."""
        if sum(map(len, self._maps)) > _HELD_BYTES:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def order(self) -> RowOrder:
        return RowOrder(self.column("goodness"), self.column("id_high"), self.column("id_low"))

    def words(self, rows: NDArray[np.int64]) -> WordTable:
        """Returns the words of some rows, given in ascending order."""
        return self._gathered("words", rows)

    def context(self, rows: NDArray[np.int64]) -> WordTable | None:
        """Returns the words of the context of some rows, given in ascending order; None if rows have none."""
        return self._gathered("context", rows) if "context" in self._words else None

    def _gathered(self, name: str, rows: NDArray[np.int64]) -> WordTable:
        bounds = np.searchsorted(rows, self.offsets)
        held = [(number, int(bounds[number]), int(bounds[number + 1])) for number in range(len(self._tables))]
        held = [item for item in held if item[1] < item[2]]
        tables = self._words.get(name, [])
        starts = np.empty(len(rows), np.int64)
        offsets = np.zeros(len(rows) + 1, np.int64)
        for number, first, last in held:
            local = rows[first:last] - self.offsets[number]
            places = tables[number].offsets
            starts[first:last] = places[local]
            offsets[first + 1 : last + 1] = places[local + 1] - places[local]
        np.cumsum(offsets, out=offsets)
        hashes = np.empty(int(offsets[-1]), np.uint64)
        for number, first, last in held:
            copy_rows(tables[number].hashes, starts[first:last], offsets[first : last + 1], hashes)
        self._release()
        return WordTable(hashes, offsets)
