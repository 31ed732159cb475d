"""Rows of Parquet files. Planning reads footers only; reading streams a few rows at a time, needed columns only."""

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

_BATCH_ROWS = 32
"""Rows decoded at once: images make rows large."""

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
        groups, first = _row_groups(parquet, unit)
        present = [column for column in columns if column in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=present, use_threads=False)
        for batch in batches:
            skip, keep = max(0, unit.start - first), min(batch.num_rows, unit.stop - first)
            for index in range(skip, keep):
                yield plain_row(batch, index)
            first += batch.num_rows
            if first >= unit.stop:
                return
    raise SourceError(f"source {unit.source}: {unit.path} ends at row {first}, its footer promises {unit.stop}")


def plain_row(table: pa.RecordBatch | pa.Table, index: int) -> dict[str, Any] | RowError:
    """Returns one row as plain Python values, or why it has none (text that is not UTF-8, a date beyond Python's)."""
    try:
        columns = zip(table.schema.names, table.columns, strict=True)
        return {name: column[index].as_py() for name, column in columns}
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return RowError("row_unreadable", f"the row cannot be read from its Arrow columns: {error}"[:400])


def _row_groups(parquet: pq.ParquetFile, unit: Unit) -> tuple[list[int], int]:
    """Returns the row groups that overlap a unit, and the row the first of them begins with."""
    groups: list[int] = []
    first, start = 0, 0
    for group in range(parquet.metadata.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if start < unit.stop and stop > unit.start:
            first = first if groups else start
            groups.append(group)
        start = stop
    return groups, first


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
