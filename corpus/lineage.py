"""What a run adds to the version before it: which of its rows are new, and which published rows it no longer has.

A version continues the one before as long as both were made by the same rules (their `lineage` is equal): it takes over
every shard as it is, and rows that are not published yet come in shards of their own. A row is known by its id, which
is made of its content: an edited question is a new row, and the old one vanishes.

A published row that the run no longer has stays where it is and gets a mark: `vanished` if no source has it any more,
`withdrawn` if a source has it and the run let it go this time (`fates.parquet` says why). A mark goes when the row
comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from corpus.storage import replacing, storage_errors
from schemas.errors import CorpusError

VANISHED, WITHDRAWN = "vanished", "withdrawn"

MARK_SCHEMA = pa.schema([("id", pa.string()), ("mark", pa.string()), ("since", pa.string())])
"""Columns of `marks.parquet`. since: name of the first version that says so of the row."""

_ID_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class News:
    """How the rows of a run differ from published ones.

    is_new: bool [rows of the run, in order]. absent: bool [published rows, in order], those the run does not have.
    """

    is_new: NDArray[np.bool_]
    absent: NDArray[np.bool_]


def find_news(published: Iterable[pa.ChunkedArray], run: Iterable[pa.ChunkedArray]) -> News:
    """Returns how the ids of a run differ from published ids.

    Two rows of one id (a run that keeps duplicates may have them) are the first and the second of that id, so that a
    third is news. Memory grows by about 60 bytes a row: ids are compared as numbers.

    Raises CorpusError: an id is not 32 hexadecimal digits.
    """
    old, new = _keys(published), _keys(run)
    on = ["high", "low", "occurrence"]
    is_new = np.zeros(new.height, np.bool_)
    is_new[new.join(old, on=on, how="anti")["row"].to_numpy()] = True
    absent = np.zeros(old.height, np.bool_)
    absent[old.join(new, on=on, how="anti")["row"].to_numpy()] = True
    return News(is_new, absent)


def _keys(columns: Iterable[pa.ChunkedArray]) -> pl.DataFrame:
    """Returns the ids as two numbers, with the number of the row and how often the id came before."""
    parts = [_halves(chunk) for column in columns for chunk in column.chunks]
    halves = np.concatenate([np.zeros((0, 2), ">u8"), *parts]).astype(np.uint64)
    frame = pl.DataFrame({"high": halves[:, 0], "low": halves[:, 1]}).with_row_index("row")
    repeated = frame.filter(pl.struct("high", "low").is_duplicated())
    counted = repeated.select("row", occurrence=pl.int_range(pl.len(), dtype=pl.UInt32).over("high", "low"))
    occurrence = np.zeros(frame.height, np.uint32)
    occurrence[counted["row"].to_numpy()] = counted["occurrence"].to_numpy()
    return frame.with_columns(occurrence=pl.Series(occurrence))


def _halves(ids: pa.StringArray) -> NDArray[np.uint64]:
    """Returns ids as uint64 [rows, 2], most significant half first. Raises CorpusError."""
    try:
        content = bytes.fromhex("".join(ids.to_pylist()))
    except (TypeError, ValueError) as error:
        raise CorpusError(f"a row id is not {_ID_CHARACTERS} hexadecimal digits: {error}") from error
    if len(content) != len(ids) * _ID_CHARACTERS // 2:
        raise CorpusError(f"a row id is not {_ID_CHARACTERS} hexadecimal digits")
    return np.frombuffer(content, ">u8").reshape(-1, 2)


def read_marks(path: Path) -> pa.Table:
    """Returns the marks of a version; none if it has no such file. Raises StorageError, CorpusError."""
    if not path.exists():
        return MARK_SCHEMA.empty_table()
    try:
        with storage_errors(path, "read"):
            return pq.read_table(path, partitioning=None).cast(MARK_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise CorpusError(f"{path} is not a list of marks: {error}") from error


def new_marks(absent: pa.Array, *, before: pa.Table, fates: Path, version: str) -> pa.Table:
    """Returns the marks of a version, one for each absent row, in order of id.

    absent: ids of published rows that the run does not have. before: the marks of the version that it continues. fates:
    the rows that left in this run; those among the absent ones were withdrawn. version: name of the version being made.
    """
    gone = pl.DataFrame({"id": pl.Series(absent.to_pylist(), dtype=pl.String)})
    left = pl.scan_parquet(fates).select("id").join(gone.lazy(), on="id", how="semi").unique().collect()
    earlier = pl.DataFrame(pl.from_arrow(before)).rename({"since": "earlier"}).unique(["id", "mark"])
    marks = (
        gone.join(left.with_columns(mark=pl.lit(WITHDRAWN)), on="id", how="left")
        .with_columns(pl.col("mark").fill_null(VANISHED))
        .join(earlier, on=["id", "mark"], how="left")
        .select("id", "mark", since=pl.col("earlier").fill_null(version))
        .sort("id")
    )
    return marks.to_arrow().cast(MARK_SCHEMA)


def num_marks_changed(before: pa.Table, after: pa.Table) -> tuple[int, int]:
    """Returns how many rows were marked and how many lost their mark between two versions."""
    old, new = pl.DataFrame(pl.from_arrow(before)), pl.DataFrame(pl.from_arrow(after))
    marked = new.join(old, on=["id", "mark"], how="anti").height
    return marked, old.join(new, on="id", how="anti").height


def write_marks(marks: pa.Table, path: Path) -> None:
    """Writes the marks of a version. Raises StorageError."""
    with replacing(path) as temporary:
        pq.write_table(marks, temporary, compression="zstd")
