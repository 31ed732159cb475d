"""Rows of Parquet files. Planning reads footers only; reading streams a few rows at a time, needed columns only.

Memory is bounded whatever a file unpacks to: by the format, a page holds at most 2 GiB, and how many rows are decoded
at once follows from what the footer says of their row group. A row group whose mean row is beyond `MAX_ROW_BYTES` is
not decoded at all; a single row beyond it is decoded, then refused.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
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

    Rows of a row group before the unit are decoded and passed over: Parquet has no cheaper way to the middle of one.

    Raises SourceError: if the file is damaged, or no longer the one that was planned.
    """
    with _opened(unit.source, unit.path) as parquet:
        if range_digest(_identity(parquet, unit.path), unit.start, unit.stop) != unit.digest:
            raise SourceError(
                f"source {unit.source}: {unit.path} changed after the run was planned; start the run again"
            )
        start = 0
        present = [column for column in columns if column in parquet.schema_arrow.names]
        for group in range(parquet.metadata.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            if start < unit.stop and stop > unit.start:
                wanted = range(max(start, unit.start) - start, min(stop, unit.stop) - start)
                yield from _rows_of_group(parquet, group, wanted, present)
            start = stop
        if start >= unit.stop:
            return
    raise SourceError(f"source {unit.source}: {unit.path} ends at row {start}, {unit.stop} were planned")


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
    """Opens a file; turns what goes wrong while it is read into a SourceError that names source and file."""
    with reading(source, path), open_raw(path, jumps=True) as stream:
        try:
            yield pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            detail = f"{str(error)[:300]}; write or fetch it again"
            raise SourceError(f"source {source}: {path} is no sound Parquet file: {detail}") from error
