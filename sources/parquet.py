"""Rows of Parquet files. Planning reads footers only; reading streams a few rows at a time, needed columns only.

Memory is bounded whatever a file unpacks to: by the format, a page holds at most 2 GiB, and how many rows are decoded
at once follows from what the footer says of their row group. A row group whose mean row is beyond `MAX_ROW_BYTES` is
not decoded at all; a single row beyond it is decoded, then refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import RowError, SourceError
from sources.files import SourceFile, file_version, open_raw, reading
from sources.units import RowRange, Unit, range_digest, row_ranges

MAX_ROW_BYTES = 256 * 2**20
"""Largest row in bytes, as in JSON; of the columns that are needed."""

_BATCH_ROWS = 32
"""Most rows decoded at once: images make rows large."""

_BATCH_BYTES = 128 * 2**20
"""What a batch may unpack to. A dictionary stores a value once, however many rows repeat it, so that 200 kB can stand
for a million rows of 100 MB. But no row is larger than its row group unpacked: so many are decoded at once as fit if
each were as large. One row at a time takes 11 instead of 1 microsecond a row."""

_BUFFER_BYTES = 2**20
"""Column chunks are read in such steps, else a whole row group is in memory, images and all."""


def plan_ranges(file: SourceFile, *, source: str, shard_rows: int, max_rows: int | None) -> list[RowRange]:
    """Returns the ranges of a file's shards, up to `max_rows`. Raises SourceError: if it is no sound Parquet file."""
    with _opened(source, file.path) as parquet:
        num_rows = min(parquet.metadata.num_rows, max_rows if max_rows is not None else parquet.metadata.num_rows)
        return row_ranges(num_rows, shard_rows=shard_rows, identity=_identity(parquet, file.path))


def read_schema(file: SourceFile, *, source: str) -> pa.Schema:
    """Returns the columns of a file. Raises SourceError: if it is no readable Parquet file."""
    with _opened(source, file.path) as parquet:
        return parquet.schema_arrow


def read_rows(unit: Unit, *, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
    """Yields the rows of a unit as plain objects with those of the columns that the file has.

    Parquet has no way to the middle of a row group but to decode the rows before it. So the file of the thread's last
    unit stays open, and a unit that begins where that one ended goes on from there: row groups of a million rows are
    decoded once by each task, not once by each shard.

    Raises SourceError: if the file is damaged, or no longer the one that was planned.
    """
    reader = _left_open.take(unit, columns) or _Reader(unit, columns)
    try:
        yield from reader.read(unit)
    except BaseException:
        reader.close()
        raise
    _left_open.keep(reader)


class _Reader:
    """An open file, read row by row from where a unit begins. position: number of the next row."""

    def __init__(self, unit: Unit, columns: list[str]) -> None:
        self._source, self._path, self._columns = unit.source, unit.path, columns
        self._opened = contextlib.ExitStack()
        self.close = weakref.finalize(self, self._opened.close)
        try:
            self._version = file_version(unit.path)
            self._parquet = self._opened.enter_context(_opened(unit.source, unit.path))
            self._identity = _identity(self._parquet, unit.path)
        except BaseException:
            self.close()
            raise
        self.position = unit.start
        self._rows = _rows_from(self._parquet, unit.start, columns)

    def continues(self, unit: Unit, columns: list[str]) -> bool:
        """Whether the unit begins where the last one ended, in the same file, unchanged."""
        is_next = (unit.source, unit.path, columns) == (self._source, self._path, self._columns)
        return is_next and unit.start == self.position and file_version(unit.path) == self._version

    def read(self, unit: Unit) -> Iterator[dict[str, Any] | RowError]:
        if range_digest(self._identity, unit.start, unit.stop) != unit.digest:
            raise SourceError(
                f"source {unit.source}: {unit.path} changed after the run was planned; start the run again"
            )
        with _sound(self._source, self._path):
            for row in islice(self._rows, unit.stop - unit.start):
                yield row
                self.position += 1
        if self.position < unit.stop:
            raise SourceError(
                f"source {unit.source}: {unit.path} ends at row {self.position}, {unit.stop} were planned"
            )

    @property
    def has_ended(self) -> bool:
        return bool(self.position >= self._parquet.metadata.num_rows)


class _LeftOpen(threading.local):
    """The file of each thread's last unit, until the thread ends or opens another."""

    reader: _Reader | None = None

    def take(self, unit: Unit, columns: list[str]) -> _Reader | None:
        reader, self.reader = self.reader, None
        if reader is not None and not reader.continues(unit, columns):
            reader.close()
            return None
        return reader

    def keep(self, reader: _Reader) -> None:
        if reader.has_ended:
            reader.close()
            return
        if self.reader is not None:
            self.reader.close()
        self.reader = reader


_left_open = _LeftOpen()


def _rows_from(parquet: pq.ParquetFile, first: int, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
    """Yields the rows of a file from a number on. Raises ArrowInvalid: it is damaged."""
    present = [column for column in columns if column in parquet.schema_arrow.names]
    start = 0
    for group in range(parquet.metadata.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if stop > first:
            yield from _rows_of_group(parquet, group, range(max(start, first) - start, stop - start), present)
        start = stop


def plain_row(table: pa.RecordBatch | pa.Table, index: int) -> dict[str, Any] | RowError:
    """Returns one row as plain Python values, or why it has none (text that is not UTF-8, a date beyond Python's)."""
    try:
        columns = zip(table.schema.names, table.columns, strict=True)
        return {name: column[index].as_py() for name, column in columns}
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return RowError("row_unreadable", f"the row cannot be read from its Arrow columns: {error}"[:400])


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, wanted: range, columns: list[str]
) -> Iterator[dict[str, Any] | RowError]:
    """Yields some rows of a row group. Raises ArrowInvalid: it holds fewer than its footer promises."""
    num_bytes, num_rows = _unpacked_bytes(parquet, group, columns), parquet.metadata.row_group(group).num_rows
    if num_bytes > MAX_ROW_BYTES * num_rows:
        for _ in wanted:
            yield RowError("row_too_large", f"its row group unpacks to {num_bytes:,} bytes for {num_rows:,} rows")
        return
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, num_bytes)))
    first = 0
    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns, use_threads=False):
        for index in range(max(0, wanted.start - first), min(batch.num_rows, wanted.stop - first)):
            yield _bounded_row(batch, index)
        first += batch.num_rows
        if first >= wanted.stop:
            return
    raise pa.ArrowInvalid(f"row group {group} ends at row {first}, its footer promises {num_rows}")


def _bounded_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | RowError:
    if batch.nbytes > MAX_ROW_BYTES and (size := batch.slice(index, 1).nbytes) > MAX_ROW_BYTES:
        return RowError("row_too_large", f"the row has {size:,} bytes, more than {MAX_ROW_BYTES:,}")
    return plain_row(batch, index)


def _unpacked_bytes(parquet: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Returns what the columns of a row group unpack to, by its footer; no value in them is larger."""
    row_group = parquet.metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if _is_part(chunk.path_in_schema, columns))


def _is_part(path: str, columns: list[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _identity(parquet: pq.ParquetFile, path: str) -> str:
    """Returns size and time of the file and a digest of its footer: schema, row groups, their places and sizes."""
    metadata = parquet.metadata
    footer = hashlib.sha256(str(parquet.schema_arrow).encode())
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        footer.update(f"{row_group.num_rows}:{row_group.total_byte_size}".encode())
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            footer.update(f":{column.data_page_offset}:{column.total_compressed_size}".encode())
    return f"{file_version(path)}:{footer.hexdigest()}"


@contextlib.contextmanager
def _opened(source: str, path: str) -> Iterator[pq.ParquetFile]:
    """Opens a file; see `_sound`."""
    with _sound(source, path), open_raw(path, jumps=True) as stream:
        yield pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextlib.contextmanager
def _sound(source: str, path: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a SourceError that names source and file."""
    with reading(source, path):
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            detail = f"{str(error)[:300]}; write or fetch it again"
            raise SourceError(f"source {source}: {path} is no sound Parquet file: {detail}") from error
