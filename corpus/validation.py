"""Whether a version is complete and right: its files, every row of every shard, the fates, the card, the marks.

Checksums say that nothing was altered since the version was published. The rest says that what was published is right,
so that a version which someone made or changed with care, checksums and all, is found out too. Every problem names its
file, and the row and its id where there is one. Memory is that of a row group: ids are compared by `corpus.partitions`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets.data_files import resolve_pattern
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from corpus.card import DATA_FILES, ModeSize, mode_sizes
from corpus.lineage import MARK_SCHEMA, VANISHED, WITHDRAWN, read_marks
from corpus.partitions import Partitions
from corpus.row_checks import row_problems
from corpus.versions import (
    CARD,
    COMPANIONS,
    FATES,
    FIGURES,
    MANIFEST,
    MARKS,
    REPORT,
    FileInfo,
    Manifest,
    file_damage,
    load_manifest,
    unaccounted,
)
from corpus.writer import MAX_ROW_BYTES, ROW_GROUP_BYTES, ShardInfo
from schemas.errors import CorpusError, RowError, StorageError
from schemas.fates import FATE_SCHEMA, Exit, StageCount
from schemas.rows import CORPUS_SCHEMA
from schemas.verdicts import Heuristic, Mode

MAX_LISTED = 20
"""Problems of one kind that are listed; all are counted."""

MAX_GROUP_BYTES = ROW_GROUP_BYTES + 2 * MAX_ROW_BYTES
"""Largest row group that is read, in decoded bytes: what the writer closes at, and its largest row on top."""

FIRST_IMAGES, EVERY_IMAGE = 1000, 64
"""Decoded are the first images of a version, and of the others one in so many."""

_REASON = re.compile(r"[a-z][a-z0-9_]*")

CheckImage = Callable[[bytes], None]
"""Decodes an image; raises RowError with the reason why it is none of ours."""

Watch = Callable[[int, int], None]
"""Told the number of rows read so far, and of all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a version. code: stable snake_case name. file: relative to the version's folder. row: its
    number in the file, from 0. id: of the row. detail: a sentence with the value seen."""

    code: str
    file: str
    detail: str
    row: int | None = None
    id: str | None = None


@dataclass(slots=True)
class Validation:
    """What was looked at in a version, and what is wrong with it.

    problems: at most `MAX_LISTED` of each code. num_problems: all of them by code. notes: what a person may want to
    know although nothing is wrong.
    """

    folder: Path
    version: str = ""
    num_files: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    num_problems: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        return not self.num_problems

    def add(self, code: str, file: str, detail: str, *, row: int | None = None, id_: str | None = None) -> None:
        self.num_problems[code] += 1
        if self.num_problems[code] <= MAX_LISTED:
            self.problems.append(Problem(code, file, detail, row, id_))


def validate_version(
    folder: Path,
    *,
    check_image: CheckImage | None = None,
    checks_all_images: bool = False,
    may_repeat_ids: bool = False,
    watch: Watch = lambda num_done, num_rows: None,
) -> Validation:
    """Returns everything that is wrong with a version.

    check_image: decodes an image; None looks at checksums alone. checks_all_images: else a sample is decoded.
    may_repeat_ids: rows of equal content are in order, as the run kept duplicates.

    Raises StorageError: a file cannot be read at all.
    """
    found = Validation(folder)
    try:
        manifest = load_manifest(folder)
    except CorpusError as error:
        found.add("manifest_missing" if not (folder / MANIFEST).exists() else "manifest_damaged", MANIFEST, str(error))
        return found
    found.version = manifest.version
    _check_files(folder, manifest, found)
    _check_counts(manifest, found)
    _check_fates(folder, manifest, found)
    _check_card(folder, manifest, found)
    with Partitions(manifest.num_rows) as partitions:
        _ShardChecks(folder, manifest, found, check_image, checks_all_images, partitions, watch).run()
        _check_ids(folder, manifest, partitions, found, may_repeat=may_repeat_ids)
    return found


def _check_files(folder: Path, manifest: Manifest, found: Validation) -> None:
    """Finds files that are missing, altered, or foreign to the manifest."""
    listed: list[ShardInfo | FileInfo] = [*manifest.shards, *manifest.files]
    for file in listed:
        problem = file_damage(folder, file)
        if problem:
            found.add("file_missing" if problem.endswith(": missing") else "file_altered", file.path, problem)
    found.num_files = len(listed)
    # A version of the first format has no marks; what it lists of the companions is all there is.
    known = {MANIFEST, *COMPANIONS, *(file.path for file in listed)}
    for name in (REPORT, FIGURES):  # all others that the version has are in its manifest
        if not (folder / name).is_file():
            found.add("file_missing", name, f"{name}: missing")
    for name in _file_names(folder):
        if name not in known:
            loaded = ", and would be loaded with the corpus" if name.startswith("data/") else ""
            found.add("file_foreign", name, f"{name}: not in the manifest{loaded}")


def _file_names(folder: Path) -> Iterator[str]:
    """Yields the files below a folder but for hidden ones, which no loader takes for data."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _check_counts(manifest: Manifest, found: Validation) -> None:
    """Finds breaks of the conservation law within a stage and between stages."""
    for stage, count in manifest.counts.items():
        try:
            count.check(stage)
        except AssertionError as error:
            found.add("rows_unaccounted", MANIFEST, str(error))
    for (before, earlier), (stage, count) in pairwise(manifest.counts.items()):
        if earlier.num_kept != count.num_in:
            detail = f"stage {before} kept {earlier.num_kept:,} rows, stage {stage} got {count.num_in:,}"
            found.add("rows_unaccounted", MANIFEST, detail)
    try:
        for problem in unaccounted(found.folder, manifest):
            found.add("rows_unaccounted", MANIFEST, problem)
    except (CorpusError, StorageError, ValueError) as error:
        found.add("file_unreadable", FATES, str(error))


def _check_fates(folder: Path, manifest: Manifest, found: Validation) -> None:
    """Finds fates that are none of ours, or that the manifest counts otherwise."""
    path = folder / FATES
    if not path.is_file():
        return
    counted: Counter[tuple[str, str, str]] = Counter()
    row = 0
    for table in _row_groups(path, FATES, FATE_SCHEMA, found):
        for record in table.select(["origin", "id", "source", "stage", "exit", "reason"]).to_pylist():
            exit_, reason, stage = record["exit"], record["reason"], record["stage"]
            if stage not in manifest.counts or exit_ not in set(Exit) or not _REASON.fullmatch(reason or ""):
                detail = f"left stage {stage!r:.80} as {exit_!r:.80} for reason {reason!r:.80}"
                found.add("fate_unknown", FATES, detail, row=row, id_=record["id"])
            elif not record["origin"] or not record["source"]:
                found.add("value_missing", FATES, "origin and source must not be null", row=row, id_=record["id"])
            else:
                counted[stage, exit_, reason] += 1
            row += 1
    expected = Counter(dict(_fate_counts(manifest.counts)))
    for key in sorted((expected | counted).keys()):
        if expected[key] != counted[key]:
            detail = f"{counted[key]:,} rows, the manifest counts {expected[key]:,}: stage, exit, reason {key}"
            found.add("fates_differ", FATES, detail)


def _fate_counts(counts: Mapping[str, StageCount]) -> Iterator[tuple[tuple[str, str, str], int]]:
    for stage, count in counts.items():
        for exit_, reasons in ((Exit.DROPPED, count.dropped), (Exit.QUARANTINED, count.quarantined)):
            for reason, number in reasons.items():
                yield (stage, str(exit_), reason), number


def _check_card(folder: Path, manifest: Manifest, found: Validation) -> None:
    """Finds a card whose metadata do not load, or say otherwise than the shards; configurations that match no file."""
    path = folder / CARD
    if not path.is_file():
        return
    try:
        data = DatasetCard.load(path, repo_type="dataset", ignore_metadata_errors=False).data
        assert isinstance(data, DatasetCardData)
        configurations = {entry["config_name"]: entry for entry in data.get("configs", [])}
        infos = DatasetInfosDict.from_dataset_card_data(data)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        found.add("card_unreadable", CARD, f"its metadata do not load: {type(error).__name__}: {error}"[:500])
        return
    # Shards without rows, which stand for an empty mode, are added after the card is written.
    sizes = mode_sizes(shard for shard in manifest.shards if shard.num_rows)
    for name, pattern in DATA_FILES.items():
        files = configurations.get(name, {}).get("data_files")
        if files != [{"split": "train", "path": pattern}]:
            found.add("card_differs", CARD, f"configuration {name} has the files {files!r:.200} instead of {pattern}")
        size = sum((size for mode, size in sizes.items() if name in ("all", mode)), ModeSize(0, 0))
        splits = infos[name].splits if name in infos else None
        train = splits.get("train") if splits else None
        stated = ModeSize(train.num_examples, train.num_bytes) if train else ModeSize(0, 0)
        if stated.num_rows != size.num_rows or (size.num_rows and stated != size):
            found.add("card_differs", CARD, f"configuration {name} is said to be {stated}, the manifest says {size}")
        _check_pattern(folder, name, pattern, manifest, found)


def _check_pattern(folder: Path, name: str, pattern: str, manifest: Manifest, found: Validation) -> None:
    """Finds files that `datasets.load_dataset` would load otherwise than the manifest says."""
    try:
        resolved = {Path(path).relative_to(folder).as_posix() for path in resolve_pattern(pattern, str(folder))}
    except FileNotFoundError:
        resolved = set()
    expected = {s.path for s in manifest.shards if name == "all" or s.path.startswith(f"data/{name}/")}
    if resolved != expected:
        missed, foreign = sorted(expected - resolved)[:3], sorted(resolved - expected)[:3]
        detail = f"load_dataset({name!r}) would miss {missed} and take {foreign} besides"
        found.add("files_not_loaded", CARD, detail)


def _row_groups(path: Path, file: str, schema: pa.Schema, found: Validation) -> Iterator[pa.Table]:
    """Yields the row groups of a file as far as it is whole and of a schema."""
    try:
        with pq.ParquetFile(path) as parquet:
            if not parquet.schema_arrow.remove_metadata().equals(schema.remove_metadata()):
                found.add("schema_differs", file, _schema_difference(parquet.schema_arrow, schema))
                return
            for group in range(parquet.num_row_groups):
                num_bytes = parquet.metadata.row_group(group).total_byte_size
                if num_bytes > MAX_GROUP_BYTES:
                    detail = f"row group {group} has {num_bytes:,} bytes, at most {MAX_GROUP_BYTES:,} are read"
                    found.add("row_group_too_large", file, detail)
                    return
                table = parquet.read_row_group(group, use_threads=False)
                table.validate(full=True)  # Texts may be no Unicode, offsets may lead anywhere.
                yield table
    except (pa.ArrowException, OSError, ValueError) as error:  # A ValueError: the name of a column is no Unicode.
        found.add("file_unreadable", file, f"{error}"[:500])


def _schema_difference(schema: pa.Schema, expected: pa.Schema) -> str:
    """Returns how a schema differs from the one it should be."""
    names, wanted = set(schema.names), set(expected.names)
    parts = []
    if wanted - names:
        parts.append(f"columns are missing: {', '.join(sorted(wanted - names))}")
    if names - wanted:
        parts.append(f"columns are not ours: {', '.join(sorted(names - wanted))[:200]}")
    for name in expected.names:
        if name in names and schema.field(schema.names.index(name)).type != expected.field(name).type:
            seen = schema.field(schema.names.index(name)).type
            parts.append(f"{name} is {seen} instead of {expected.field(name).type}")
    return "; ".join(parts) or "the columns are in another order"


@dataclass(slots=True)
class _ShardChecks:
    """Reads every shard once, a row group at a time, and looks at each row."""

    folder: Path
    manifest: Manifest
    found: Validation
    check_image: CheckImage | None
    checks_all_images: bool
    partitions: Partitions
    watch: Watch
    _probabilities: dict[Mode, tuple[float, str, int, str]] = field(default_factory=dict)
    _unlicensed: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        for shard in self.manifest.shards:
            if (self.folder / shard.path).is_file():
                self._check_shard(shard)
        self._check_threshold()
        for source, number in sorted(self._unlicensed.items()):
            self.found.notes.append(f"{number:,} rows of source {source} state no licence")

    def _check_shard(self, shard: ShardInfo) -> None:
        row, path = 0, self.folder / shard.path
        for table in _row_groups(path, shard.path, CORPUS_SCHEMA, self.found):
            ids = pl.DataFrame({"id": pl.Series(table["id"].to_pylist(), dtype=pl.String)}).with_row_index("row", row)
            self.partitions.add("rows", ids.with_columns(file=pl.lit(shard.path)))
            for record in table.to_pylist():
                self._check_row(record, shard, row)
                row += 1
            self.found.num_rows += table.num_rows
            self.watch(self.found.num_rows, self.manifest.num_rows)
        if row != shard.num_rows:
            self.found.add("row_count_differs", shard.path, f"{row:,} rows, the manifest counts {shard.num_rows:,}")

    def _check_row(self, record: Mapping[str, Any], shard: ShardInfo, row: int) -> None:
        where = {"row": row, "id_": record["id"]}
        folder = Path(shard.path).parent.name
        if record["mode"] != folder:
            self.found.add("mode_differs", shard.path, f"a {record['mode']!r:.80} row in the folder {folder}", **where)
        for problem in row_problems(record, recipe=self.manifest.recipe):
            self.found.add(problem.code, shard.path, problem.detail, **where)
        if not record["licence"]:
            self._unlicensed[str(record["source"])] += 1
        self._note_probability(record, shard.path, row)
        for image in record["images"] or []:
            self.found.num_images += 1
            if image and image["bytes"] and self._is_looked_at():
                self._decode(image["bytes"], shard.path, where)

    def _is_looked_at(self) -> bool:
        number = self.found.num_images
        return self.check_image is not None and (
            self.checks_all_images or number <= FIRST_IMAGES or number % EVERY_IMAGE == 0
        )

    def _decode(self, content: bytes, file: str, where: Mapping[str, Any]) -> None:
        assert self.check_image is not None
        self.found.num_decoded += 1
        try:
            self.check_image(content)
        except RowError as error:
            self.found.add(error.reason, file, error.detail, **where)

    def _note_probability(self, record: Mapping[str, Any], file: str, row: int) -> None:
        """Keeps the direct row that most probably needs reasoning, and the thinking one that least probably does."""
        probability, mode = record["probability"], record["mode"]
        if record["heuristic"] != Heuristic.DIFFICULTY or probability is None or mode not in set(Mode):
            return
        known = self._probabilities.get(Mode(mode))
        if known is None or (probability > known[0]) is (mode == Mode.DIRECT):
            self._probabilities[Mode(mode)] = (probability, file, row, record["id"])

    def _check_threshold(self) -> None:
        """Finds modes that no threshold can have led to: all thinking rows are at least as probable as it, no other."""
        think, direct = self._probabilities.get(Mode.THINK), self._probabilities.get(Mode.DIRECT)
        if think and direct and direct[0] > think[0]:
            detail = f"direct at probability {direct[0]:.4f}, while {think[3]} thinks at {think[0]:.4f}"
            self.found.add("mode_differs", direct[1], detail, row=direct[2], id_=direct[3])


def _check_ids(
    folder: Path, manifest: Manifest, partitions: Partitions, found: Validation, *, may_repeat: bool
) -> None:
    """Finds ids that occur twice, and marks of rows that do not exist."""
    try:
        marks = pl.DataFrame(read_marks(folder / MARKS))
    except (CorpusError, StorageError) as error:
        found.add("file_unreadable", MARKS, str(error))
        marks = pl.DataFrame(MARK_SCHEMA.empty_table())
    if marks.height != manifest.num_marked:
        found.add("marks_differ", MARKS, f"{marks.height:,} marks, the manifest counts {manifest.num_marked:,}")
    for row, (id_, mark, _since) in enumerate(marks.iter_rows()):
        if mark not in (VANISHED, WITHDRAWN):
            found.add("mark_unknown", MARKS, f"the mark is {mark!r:.80}", row=row, id_=id_)
    partitions.add("marks", marks.with_row_index("mark_row"))
    no_rows = pl.DataFrame(schema={"row": pl.UInt32, "id": pl.String, "file": pl.String})
    no_marks = marks.clear().with_row_index("mark_row")
    num_repeated = 0
    for rows, marked in zip(partitions.read("rows", no_rows), partitions.read("marks", no_marks), strict=True):
        repeated = rows.filter(~pl.col("id").is_first_distinct())
        num_repeated += repeated.height
        for row, id_, file in [] if may_repeat else repeated.select("row", "id", "file").iter_rows():
            found.add("id_repeated", file, "another row before it has the same id", row=row, id_=id_)
        for row, id_ in marked.join(rows, on="id", how="anti").select("mark_row", "id").iter_rows():
            found.add("mark_without_row", MARKS, "no shard has a row of this id", row=row, id_=id_)
    if num_repeated and may_repeat:
        found.notes.append(f"{num_repeated:,} rows repeat the content of others, as the recipe lets duplicates stay")
