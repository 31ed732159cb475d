"""Planning a run's input as units, and reading one unit into samples and the fates of bad rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from schemas.config import RunConfig, SourceConfig
from schemas.errors import ConfigError, RowError, SourceError
from schemas.fates import Fate
from schemas.samples import Sample
from sources import hub, json_rows, parquet
from sources.columns import ColumnWatch, Row, mapped_columns, missing_column, top_level_columns
from sources.files import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    SourceFile,
    find_files,
    folder_address,
    is_address,
    is_folder,
    local_folder,
    reading,
)
from sources.image_values import ImageRoots
from sources.images import ImageStore
from sources.outcomes import row_outcome, storable
from sources.rows import build_sample
from sources.units import RowRange, Unit

STAGE = "sources"
"""The stage named in the fates of this package."""

_ESSENTIAL = frozenset({"question", "conversations"})
"""Settings whose column every file must have; other columns may be absent from some JSON files of a source."""


def plan_units(config: RunConfig) -> list[Unit]:
    """Returns the units of all sources: in the order of the configuration, then of file names, then of rows.

    It reads footers of Parquet files, JSON files once, and the tables of `datasets`; no image is touched. Memory grows
    with the number of shards, not of rows.

    Raises SourceError: if a source cannot be read, has no rows, or lacks a mapped column.
    Raises ConfigError: if an `answer_pattern` is no regular expression with a group.
    """
    units: list[Unit] = []
    for source in config.sources:
        _check_settings(source)
        planned = list(_plan_source(source, config.shard_rows))
        if not planned:
            raise SourceError(f"source {source.name}: {source.path} has no rows; correct its `path` or leave it out")
        units += planned
    return units


def read_unit(unit: Unit, config: RunConfig, store: ImageStore) -> tuple[list[Sample], list[Fate]]:
    """Returns the samples of a unit, and a quarantined fate for every row that is none: together as many as its rows.

    Raises SourceError: if the file cannot be read or changed since it was planned.
    Raises StorageError: if the image store cannot be written.
    """
    source = next((source for source in config.sources if source.name == unit.source), None)
    if source is None:
        raise ConfigError(f"the configuration has no source {unit.source!r}, but the plan has; plan the run again")
    roots = _image_roots(source, unit)
    samples: list[Sample] = []
    fates: list[Fate] = []
    for index, row in enumerate(_raw_rows(unit, source), start=unit.start):
        origin = storable(f"{unit.source}:{unit.file}#{index}")
        build = partial(build_sample, source=source, origin=origin, store=store, roots=roots)
        outcome = row_outcome(row, build, source=unit.source, origin=origin, stage=STAGE)
        if isinstance(outcome, Sample):
            samples.append(outcome)
        else:
            fates.append(outcome)
    num_out = len(samples) + len(fates)
    assert num_out == unit.num_rows, f"{unit} has {unit.num_rows} rows, but {num_out} came out"
    return samples, fates


def _check_settings(source: SourceConfig) -> None:
    if source.answer_pattern is not None:
        try:
            num_groups = re.compile(source.answer_pattern).groups
        except re.error as error:
            raise ConfigError(
                f"source {source.name}: answer_pattern {source.answer_pattern!r} is no regular expression: {error}"
            ) from error
        if num_groups == 0:
            raise ConfigError(
                f"source {source.name}: answer_pattern {source.answer_pattern!r} needs a group around the answer"
            )
    if source.image_root is not None:
        with reading(source.name, source.image_root):
            is_there = is_folder(source.image_root)
        if not is_there:
            raise SourceError(f"source {source.name}: image_root {source.image_root} is not a folder")


def _plan_source(source: SourceConfig, shard_rows: int) -> Iterator[Unit]:
    """Yields the units of a source. Mapped columns are checked on the way, or at the end where only rows can tell."""
    if source.format == "datasets":
        ranges = hub.plan_ranges(source, shard_rows=shard_rows, max_rows=source.max_rows)
        _check_schema(source, hub.read_schema(source), f"split {source.split} of {source.path}")
        yield from _units(source, SourceFile(source.path, source.split), ranges, first_index=0)
        return
    num_rows, num_units = 0, 0
    of_source = ColumnWatch(source.name, source.path, mapped_columns(source))
    for file in find_files(source, _suffixes(source)):
        rows_left = None if source.max_rows is None else source.max_rows - num_rows
        if rows_left == 0:
            break
        if _is_parquet(source, file.path):
            _check_schema(source, parquet.read_schema(file, source=source.name), file.path)
            ranges = parquet.plan_ranges(file, source=source.name, shard_rows=shard_rows, max_rows=rows_left)
        else:
            essential = [column for column in mapped_columns(source) if column[0] in _ESSENTIAL]
            of_file = ColumnWatch(source.name, file.path, essential)
            ranges = json_rows.plan_ranges(
                file,
                source=source.name,
                shard_rows=shard_rows,
                max_rows=rows_left,
                observers=(of_file.observe, of_source.observe),
            )
            of_file.check()
        yield from _units(source, file, ranges, first_index=num_units)
        num_units += len(ranges)
        num_rows += sum(found.stop - found.start for found in ranges)
    of_source.check()


def _units(source: SourceConfig, file: SourceFile, ranges: list[RowRange], *, first_index: int) -> Iterator[Unit]:
    for index, found in enumerate(ranges, start=first_index):
        yield Unit(
            source=source.name,
            index=index,
            path=file.path,
            file=file.name,
            start=found.start,
            stop=found.stop,
            offset=found.offset,
            digest=found.digest,
        )


def _suffixes(source: SourceConfig) -> tuple[str, ...]:
    if source.format == "parquet":
        return PARQUET_SUFFIXES
    return JSON_SUFFIXES if source.format == "jsonl" else JSON_SUFFIXES + PARQUET_SUFFIXES


def _is_parquet(source: SourceConfig, path: str) -> bool:
    return source.format == "parquet" or (source.format == "conversations" and path.lower().endswith(PARQUET_SUFFIXES))


def _check_schema(source: SourceConfig, schema: pa.Schema, where: str) -> None:
    """Raises SourceError: if the Arrow columns lack a mapped one."""
    for setting, alternatives in mapped_columns(source):
        if not any(_schema_has(schema, path) for path in alternatives):
            raise missing_column(source.name, where, setting, alternatives, schema.names)


def _schema_has(schema: pa.Schema, path: str) -> bool:
    """Whether a column path leads to a field. What lies inside a list or a map is known only row by row."""
    if path in schema.names:
        return True
    head, *names = path.split(".")
    if head not in schema.names:
        return False
    kind = schema.field(head).type
    for name in names:
        if not pa.types.is_struct(kind):
            return bool(pa.types.is_nested(kind))
        if kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


def _raw_rows(unit: Unit, source: SourceConfig) -> Iterator[Row | RowError]:
    if source.format == "datasets":
        yield from hub.read_rows(unit, source, columns=top_level_columns(source))
    elif _is_parquet(source, unit.path):
        yield from parquet.read_rows(unit, columns=top_level_columns(source))
    else:
        for row in json_rows.read_rows(unit):
            try:
                yield row.parse()
            except RowError as error:
                yield error


def _image_roots(source: SourceConfig, unit: Unit) -> ImageRoots:
    """Returns where image paths of a unit may lead: `image_root`, or else the folder of the unit's file.

    The files that `datasets` itself unpacked are allowed besides.
    """
    own = hub.image_folders(source) if source.format == "datasets" else []
    if source.image_root is not None and is_address(source.image_root):
        return ImageRoots.at_address(source.image_root)
    if source.image_root is not None:
        return ImageRoots.at(Path(source.image_root).expanduser(), *own)
    if own:
        return ImageRoots.at(*own)
    folder = local_folder(unit.path)
    return ImageRoots.at(folder) if folder is not None else ImageRoots.at_address(folder_address(unit.path))
