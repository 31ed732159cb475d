"""What changed between two versions of a corpus, row by row.

A row is known by its id, which is made of its content; two rows of one id (a run that keeps duplicates has them) are
the first and the second of that id. Shards of equal checksums hold equal rows and are not read. Of the others only ids,
labels and texts are read, never images, and the texts are compared by 64-bit hashes: memory does not grow with the rows
(see `corpus.partitions`).

Not compared row by row: the names of teacher and recipe, which differ everywhere as soon as they differ at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.excerpts import evidence_sentence
from corpus.lineage import read_marks
from corpus.lookup import find_ids, read_record
from corpus.partitions import Partitions
from corpus.storage import replacing, storage_errors
from corpus.tally import NOT_GIVEN
from corpus.versions import MARKS, Manifest, load_manifest
from corpus.writer import ShardInfo
from schemas.errors import ConfigError, CorpusError
from schemas.verdicts import Mode

NUM_EXAMPLES = 3
"""Rows shown of each change, those of the smallest ids: the same two versions show the same rows."""


class Change(StrEnum):
    """What happened to a row. A row that is in both versions counts once, under the first change that it has.

    The last two are about marks: a row may have one of them and another change besides.
    """

    ADDED = "added"
    REMOVED = "removed"
    TO_DIRECT = "think_to_direct"
    TO_THINK = "direct_to_think"
    ANSWER = "answer"
    TRACE = "trace"
    ROUTING = "routing"
    PROVENANCE = "provenance"
    EVIDENCE = "evidence"
    MARKED = "marked"
    UNMARKED = "unmarked"


ASPECTS: Mapping[str, Sequence[str]] = {
    "mode": ["mode"],
    "answer": ["answer"],
    "trace": ["reasoning"],
    "routing": ["topic", "kind", "answer_type"],
    "provenance": ["origin", "source_id", "licence"],
    "evidence": ["heuristic", "num_right", "num_scored", "num_sampled", "probability", "is_audit"],
}
"""Columns compared, by the name of what they say of a row; in the order in which a change is named after them."""

_IDS_COLUMNS = ["id", "change", "aspects", "old_mode", "new_mode", "topic", "source"]
IDS_SCHEMA = pa.schema([(name, pa.string()) for name in _IDS_COLUMNS])
"""Columns of the list of differing rows. aspects: all that changed, joined by "+"; for a mark, its name."""

_SHOWN_COLUMNS = ["mode", "question", "choices", "answer", "reasoning", "reference", "topic", "source", "origin"]
_NOTHING = pl.lit(None, pl.String)

_WriteIds: TypeAlias = Callable[[pl.DataFrame], None]


@dataclass(frozen=True, slots=True)
class Example:
    """A row that differs. old, new: what each version that holds it says of it: some of its columns, and `evidence`, a
    sentence."""

    id: str
    change: Change
    old: Mapping[str, Any] | None
    new: Mapping[str, Any] | None


@dataclass(slots=True)
class Difference:
    """What two versions differ in.

    num_common: rows in both; num_unread: those of them in shards that are the same. counts: rows by (change, mode,
    topic, source), as the new version has them, or the old one where the row is gone; without marks. aspects: rows in
    both versions in which each of `ASPECTS` changed. num_marked, num_unmarked: rows whose mark is new, and rows that
    lost theirs and are there.
    """

    old_folder: Path
    new_folder: Path
    old: Manifest
    new: Manifest
    num_unread: int = 0
    num_common: int = 0
    counts: Counter[tuple[Change, str, str, str]] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    num_marked: int = 0
    num_unmarked: int = 0
    examples: Sequence[Example] = ()

    def num_rows(self, change: Change) -> int:
        """Returns the rows of one change."""
        if change is Change.MARKED:
            return self.num_marked
        if change is Change.UNMARKED:
            return self.num_unmarked
        return sum(number for key, number in self.counts.items() if key[0] is change)

    @property
    def num_changed(self) -> int:
        """Rows in both versions that differ."""
        return self.counts.total() - self.num_rows(Change.ADDED) - self.num_rows(Change.REMOVED)

    @property
    def is_equal(self) -> bool:
        """Whether both versions hold the same rows with the same marks, whatever the recipes are called."""
        return not (self.counts or self.num_marked or self.num_unmarked)

    def by(self, group: str) -> dict[str, dict[Change, int]]:
        """Returns the rows of each change by mode, topic or source, in order of its values."""
        place = ("change", "mode", "topic", "source").index(group)
        grouped: dict[str, dict[Change, int]] = {}
        for key, number in self.counts.items():
            row = grouped.setdefault(key[place], {})
            row[key[0]] = row.get(key[0], 0) + number
        return dict(sorted(grouped.items()))


def compare_versions(
    old_folder: Path, new_folder: Path, *, ids_path: Path | None = None, num_examples: int = NUM_EXAMPLES
) -> Difference:
    """Returns what changed from one version to another.

    ids_path: a file for the list of all differing rows, Parquet or CSV by its suffix. num_examples: of each change.

    Raises CorpusError: a manifest or shard is damaged. StorageError: a file cannot be read or written. ConfigError:
    ids_path ends in neither .parquet nor .csv.
    """
    old, new = load_manifest(old_folder), load_manifest(new_folder)
    found = Difference(old_folder, new_folder, old, new)
    only_old, only_new = _differing(old.shards, new.shards), _differing(new.shards, old.shards)
    found.num_unread = found.num_common = new.num_rows - sum(shard.num_rows for shard in only_new)
    old_marks, new_marks = (pl.DataFrame(read_marks(folder / MARKS)) for folder in (old_folder, new_folder))
    marked = new_marks.join(old_marks, on=["id", "mark"], how="anti")
    found.num_marked = marked.height
    smallest = _Smallest(num_examples)
    num_rows = max(old_marks.height, *(sum(s.num_rows for s in shards) for shards in (only_old, only_new)))
    with Partitions(num_rows) as partitions, _ids_writer(ids_path) as write_ids:
        for kind, folder, shards in (("old", old_folder, only_old), ("new", new_folder, only_new)):
            for shard in shards:
                partitions.add(kind, _compared_columns(folder / shard.path))
        # A mark that is gone: the row is back, unless it went altogether.
        partitions.add("unmarked", old_marks.join(new_marks, on="id", how="anti"))
        for listed in (*_differing_rows(partitions, old_marks.clear(), found), _listed_marks(marked, Change.MARKED)):
            smallest.add(listed)
            write_ids(listed)
    found.examples = _examples(smallest, found)
    return found


def _differing(shards: Sequence[ShardInfo], others: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Returns the shards of one version whose content is no shard of the other."""
    known = Counter(shard.sha256 for shard in others)
    differing = []
    for shard in shards:
        if known[shard.sha256]:
            known[shard.sha256] -= 1
        else:
            differing.append(shard)
    return differing


def _compared_columns(path: Path) -> pl.DataFrame:
    """Returns what the rows of a shard are compared by: ids, labels, and hashes of all else."""
    shard = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    hashes = [pl.struct(columns).hash().alias(_column(name)) for name, columns in ASPECTS.items() if name != "mode"]
    labels = [pl.col(name).fill_null(NOT_GIVEN) for name in ("id", "mode", "topic", "source")]
    try:
        with storage_errors(path, "read"):
            return shard.select(*labels, *hashes).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise CorpusError(f"the shard {path} cannot be compared: {error}; see `bimode validate`") from error


def _empty_columns() -> pl.DataFrame:
    """Returns what `_compared_columns` does, of no row."""
    hashes = {_column(aspect): pl.UInt64() for aspect in ASPECTS if aspect != "mode"}
    labels = {name: pl.String() for name in ("id", "mode", "topic", "source")}
    return pl.DataFrame(schema={**labels, **hashes})


def _column(aspect: str) -> str:
    """Returns the column by which an aspect is compared: itself, or its hash."""
    return aspect if aspect == "mode" else f"_{aspect}"


def _differing_rows(partitions: Partitions, no_marks: pl.DataFrame, found: Difference) -> Iterator[pl.DataFrame]:
    """Yields the differing rows with the columns of `IDS_SCHEMA`, by partition, and counts them in `found`."""
    empty = _empty_columns()
    parts = (partitions.read("old", empty), partitions.read("new", empty), partitions.read("unmarked", no_marks))
    for before, after, unmarked in zip(*parts, strict=True):
        differing = _compared_rows(before, after, found)
        shown_mode = pl.coalesce("new_mode", "old_mode").alias("mode")
        counted = differing.group_by("change", shown_mode, "topic", "source").len()
        for change, mode, topic, source, number in counted.iter_rows():
            found.counts[Change(change), mode, topic, source] += number
        back = unmarked.join(differing.filter(pl.col("change") == str(Change.REMOVED)), on="id", how="anti")
        found.num_unmarked += back.height
        yield differing
        yield _listed_marks(back, Change.UNMARKED)


def _compared_rows(before: pl.DataFrame, after: pl.DataFrame, found: Difference) -> pl.DataFrame:
    """Returns the differing rows of one partition, in order of id."""
    on = ["id", "occurrence"]
    before, after = (
        frame.with_columns(occurrence=pl.int_range(pl.len(), dtype=pl.UInt32).over("id")) for frame in (before, after)
    )
    both = before.join(after, on=on, how="inner", suffix="_new")
    found.num_common += both.height
    named = [
        pl.when(pl.col(_column(aspect)) != pl.col(f"{_column(aspect)}_new")).then(pl.lit(aspect)) for aspect in ASPECTS
    ]
    changed = both.select(
        "id",
        aspects=pl.concat_str(named, separator="+", ignore_nulls=True),
        old_mode="mode",
        new_mode="mode_new",
        topic="topic_new",
        source="source_new",
    ).filter(pl.col("aspects") != "")
    found.aspects.update(changed["aspects"].str.split("+").explode().drop_nulls().to_list())
    removed = before.join(after, on=on, how="anti").with_columns(
        change=pl.lit(str(Change.REMOVED)), aspects=_NOTHING, old_mode="mode", new_mode=_NOTHING
    )
    added = after.join(before, on=on, how="anti").with_columns(
        change=pl.lit(str(Change.ADDED)), aspects=_NOTHING, old_mode=_NOTHING, new_mode="mode"
    )
    changed = changed.with_columns(change=_first_change())
    return pl.concat([frame.select(_IDS_COLUMNS) for frame in (removed, added, changed)]).sort("id", "change")


def _first_change() -> pl.Expr:
    """Returns the change that a row in both versions counts under: that of the first of its aspects."""
    first = pl.col("aspects").str.split("+").list.first()
    is_direct = pl.col("new_mode") == str(Mode.DIRECT)
    turned = pl.when(is_direct).then(pl.lit(str(Change.TO_DIRECT))).otherwise(pl.lit(str(Change.TO_THINK)))
    return pl.when(first == "mode").then(turned).otherwise(first)


def _listed_marks(marks: pl.DataFrame, change: Change) -> pl.DataFrame:
    """Returns rows whose mark has changed with the columns of `IDS_SCHEMA`, in order of id."""
    unknown = dict.fromkeys(("old_mode", "new_mode", "topic", "source"), _NOTHING)
    listed = marks.with_columns(change=pl.lit(str(change)), aspects="mark", **unknown)
    return listed.select(_IDS_COLUMNS).sort("id")


class _Smallest:
    """The smallest ids of each change."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._ids: dict[Change, list[str]] = {}

    def add(self, differing: pl.DataFrame) -> None:
        for (change,), rows in differing.group_by("change"):
            held = self._ids.setdefault(Change(str(change)), [])
            smallest = rows["id"].unique().bottom_k(self._number).to_list()
            held[:] = sorted({*held, *smallest})[: self._number]

    def items(self) -> list[tuple[Change, list[str]]]:
        """Returns the ids of each change, in the order of `Change`."""
        return [(change, self._ids[change]) for change in Change if change in self._ids]


def _examples(smallest: _Smallest, found: Difference) -> list[Example]:
    ids = {id_ for _, held in smallest.items() for id_ in held}
    old = _records(found.old_folder, found.old.shards, ids)
    new = _records(found.new_folder, found.new.shards, ids)
    return [Example(id_, change, old.get(id_), new.get(id_)) for change, held in smallest.items() for id_ in held]


def _records(folder: Path, shards: Iterable[ShardInfo], ids: set[str]) -> dict[str, dict[str, Any]]:
    """Returns what is shown of some rows of a version, by id."""
    records: dict[str, dict[str, Any]] = {}
    for row in find_ids([folder / shard.path for shard in shards], ids):
        record = read_record(row.path, row.row, columns=[*_SHOWN_COLUMNS, *ASPECTS["evidence"]])
        shown = {name: record[name] for name in _SHOWN_COLUMNS}
        records.setdefault(str(row.id), {**shown, "evidence": evidence_sentence(record)})
    return records


@contextmanager
def _ids_writer(path: Path | None) -> Iterator[_WriteIds]:
    """Yields what takes frames of differing rows for the list at a path; nothing becomes of them without one."""
    if path is None:
        yield lambda rows: None
    elif path.suffix == ".parquet":
        with replacing(path) as temporary, pq.ParquetWriter(temporary, IDS_SCHEMA, compression="zstd") as parquet:
            yield lambda rows: parquet.write_table(rows.to_arrow().cast(IDS_SCHEMA))
    elif path.suffix == ".csv":
        with replacing(path) as temporary, temporary.open("wb") as text:
            pl.DataFrame(schema=dict.fromkeys(_IDS_COLUMNS, pl.String())).write_csv(text)
            yield lambda rows: rows.write_csv(text, include_header=False)
    else:
        raise ConfigError(f"the list of ids {path} must end in .parquet or .csv")
