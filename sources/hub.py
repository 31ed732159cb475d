"""Rows of a data set of Hugging Face `datasets`: a folder written by `save_to_disk`, or whatever `load_dataset` takes.

Rows are read in Arrow form, so that an image stays the encoded bytes it is: nothing is decoded before the store has
checked its limits. `datasets` is imported on use: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from schemas.config import SourceConfig
from schemas.errors import RowError, SourceError
from sources.parquet import plain_row
from sources.units import RowRange, Unit, range_digest, row_ranges

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_ROWS = 32


def plan_ranges(source: SourceConfig, *, shard_rows: int, max_rows: int | None) -> list[RowRange]:
    """Returns the ranges of a split's shards, up to `max_rows`. Raises SourceError: if it cannot be loaded."""
    _load_cached.cache_clear()  # a long-lived worker must see tonight's data
    data = _load(source)
    num_rows = min(len(data), max_rows if max_rows is not None else len(data))
    return row_ranges(num_rows, shard_rows=shard_rows, identity=data._fingerprint)


def read_schema(source: SourceConfig) -> pa.Schema:
    """Returns the columns of a split as Arrow stores them. Raises SourceError: if it cannot be loaded."""
    return _load(source).features.arrow_schema


def read_rows(unit: Unit, source: SourceConfig, *, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
    """Yields the rows of a unit as plain objects with those of the columns that the split has.

    Raises SourceError: if it cannot be loaded, or is no longer the one that was planned.
    """
    data = _load(source)
    if range_digest(data._fingerprint, unit.start, unit.stop) != unit.digest:
        # Loaded before the change: look again, once.
        _load_cached.cache_clear()
        data = _load(source)
    if range_digest(data._fingerprint, unit.start, unit.stop) != unit.digest:
        raise SourceError(f"source {source.name}: {source.path} changed after the run was planned; start the run again")
    data = data.select_columns([name for name in columns if name in data.column_names]).with_format("arrow")
    for first in range(unit.start, unit.stop, _BATCH_ROWS):
        table = data[first : min(first + _BATCH_ROWS, unit.stop)]
        for index in range(table.num_rows):
            yield plain_row(table, index)


def image_folders(source: SourceConfig) -> list[Path]:
    """Returns the folders that image files of the data set may lie in: its own, or the caches of `datasets`."""
    if Path(source.path).is_dir():
        return [Path(source.path)]
    from datasets import config  # noqa: PLC0415 - see the module's description

    return [Path(config.HF_DATASETS_CACHE), Path(config.HF_CACHE_HOME) / "hub"]


def _load(source: SourceConfig) -> Dataset:
    try:
        data = _load_cached(source.path, source.subset, source.split)
    except SourceError as error:
        raise SourceError(f"source {source.name}: {error}") from error.__cause__
    except Exception as error:  # the library and its HTTP clients raise many types, none of ours
        first_line = next(iter(str(error).splitlines()), "")
        detail = f"{type(error).__name__}: {first_line[:300]}"
        where = "is a folder but cannot be loaded" if Path(source.path).is_dir() else "cannot be loaded from the hub"
        hint = "check `path`, `subset`, `split`, the network and HF_TOKEN, or use a folder saved by `save_to_disk`"
        raise SourceError(f"source {source.name}: {source.path} {where} ({detail}); {hint}") from error
    return data


@lru_cache(maxsize=4)
def _load_cached(path: str, subset: str | None, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk  # noqa: PLC0415 - see above

    folder = Path(path)
    if folder.is_dir() and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        data = load_from_disk(path)
    elif folder.exists() or not path.startswith(("/", ".", "~")):
        data = load_dataset(path, name=subset, split=split)
    else:
        raise SourceError(f"{path} does not exist; correct its `path`")
    if isinstance(data, DatasetDict):
        if split not in data:
            raise SourceError(f"{path} has no split {split!r}, only {', '.join(map(repr, data))}; correct its `split`")
        data = data[split]
    assert isinstance(data, Dataset)
    return data
