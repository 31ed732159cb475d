"""Finds single rows in many Parquet files: by id or its beginning, by origin, by their own id in the source.

Ids are digests, so that the statistics of a row group rule none out. What is read of every file is therefore the column
of names, and of the file that holds the row, its row group: nothing else, whatever the files weigh.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.places import is_address
from corpus.remote import local_version
from corpus.storage import storage_errors
from corpus.versions import LATEST, MANIFEST, find_version
from schemas.errors import ConfigError, CorpusError

ID_CHARACTERS = 32
MIN_PREFIX_CHARACTERS = 4
"""Shortest beginning of an id that is looked for: one of three would fit every 4,096th row."""

MAX_FOUND = 50
"""Rows returned of one search: more than a person can choose among."""

_ID_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX_CHARACTERS},{ID_CHARACTERS}}}")
_QUESTION_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class FoundRow:
    """Where a row lies. row: its number in the file. id: None for a row that never became a sample. question: its
    beginning."""

    path: Path
    row: int
    id: str | None
    origin: str
    question: str


def is_id(name: str) -> bool:
    """Returns whether a name can only be a whole id."""
    return len(name) == ID_CHARACTERS and _ID_PREFIX.fullmatch(name) is not None


def find_rows(paths: Sequence[Path], name: str) -> list[FoundRow]:
    """Returns the rows that a name can mean, at most `MAX_FOUND`, in order of file and row.

    name: an id, the first four or more of its digits, an origin, or, where the files have the column, an id in the
    source. paths: Parquet files of one schema with the columns id, origin and question.

    Raises CorpusError: a file is no such Parquet file. StorageError: it cannot be read.
    """
    if not paths:
        return []
    means = pl.col("id") == name
    if not is_id(name):
        means |= pl.col("origin") == name
        if "source_id" in _columns(paths[0]):
            means |= pl.col("source_id") == name
        if _ID_PREFIX.fullmatch(name):
            means |= pl.col("id").str.starts_with(name)
    return _search(paths, means, limit=MAX_FOUND)


def find_ids(paths: Sequence[Path], ids: Collection[str]) -> list[FoundRow]:
    """Returns all rows with one of some ids, in order of file and row. Raises as `find_rows` does."""
    return _search(paths, pl.col("id").is_in(sorted(ids)), limit=None) if paths and ids else []


def read_record(path: Path, row: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns one row of a Parquet file, reading its row group alone. Raises CorpusError, StorageError."""
    wanted = None if columns is None else list(columns)
    try:
        with storage_errors(path, "read"), pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row < num_rows:
                    table = file.read_row_group(group, wanted, use_threads=False)
                    return dict(table.slice(row, 1).to_pylist()[0])
                row -= num_rows
    except (pa.ArrowException, ValueError) as error:
        raise CorpusError(f"{path} is damaged: {error}") from error
    raise CorpusError(f"{path} has changed while it was read: it has no such row any more")


def resolve_version(name: str, corpus: str | Path | None = None) -> Path:
    """Returns the folder of a version that a person names.

    name: a version of the corpus folder `corpus` ("v0003", "latest"), where one is given; else the folder of a version,
    or of a corpus, which means its newest version. Either may be an address, whose version is fetched.

    Raises ConfigError: there is no such version. CorpusError, StorageError: it cannot be fetched.
    """
    if is_address(name):
        return local_version(name)
    if corpus is not None and is_address(corpus):
        return local_version(corpus if name == LATEST else f"{corpus}/{name}")
    places = [Path(corpus) / name] if corpus is not None else []
    places.append(Path(name))
    for place in places:
        if (place / MANIFEST).is_file():
            return place.resolve()
    if not places[-1].is_dir():
        looked = " nor ".join(str(place) for place in places)
        raise ConfigError(f"there is no version {name!r}: neither {looked} is one" if corpus else f"no folder {looked}")
    return find_version(places[-1])


def _search(paths: Sequence[Path], means: pl.Expr, *, limit: int | None) -> list[FoundRow]:
    by_name = {str(path): path for path in paths}
    found = []
    try:
        with storage_errors(paths[0].parent, "search the rows in"):
            scan = pl.scan_parquet(list(by_name), glob=False, hive_partitioning=False, include_file_paths="path")
            named = scan.filter(means).select("path", "id", "origin")
            # Row numbers are those of a file only where it is searched alone.
            holders = (named if limit is None else named.head(limit)).collect()["path"].unique().sort()
            for holder in holders.to_list():
                rows = pl.scan_parquet(holder, glob=False, hive_partitioning=False, row_index_name="row").filter(means)
                shown = rows.select("row", "id", "origin", pl.col("question").str.head(_QUESTION_CHARACTERS))
                found += [FoundRow(by_name[holder], *row) for row in shown.collect().iter_rows()]
    except pl.exceptions.PolarsError as error:
        raise CorpusError(f"the rows in {paths[0].parent} cannot be searched: {error}") from error
    return found if limit is None else found[:limit]


def _columns(path: Path) -> list[str]:
    try:
        with storage_errors(path, "read"):
            return list(pq.read_schema(path).names)
    except (pa.ArrowException, ValueError) as error:
        raise CorpusError(f"{path} is no Parquet file: {error}") from error
