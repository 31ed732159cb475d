"""A search for duplicates in parts finds what one search over all rows finds, however the rows are dealt out."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.duplicates import Removals, clashing_ids, features_of, find_duplicates
from filters.feature_files import FeatureTable
from filters.partitions import PartSearch, joined_removals, read_part, write_pieces
from schemas.config import DuplicatesConfig
from schemas.errors import StorageError
from tests.filters.test_duplicates import LONG, Row, published_table, row, row_lists, samples_of

CONFIG = DuplicatesConfig()


def files_of(folder: Path, rows: list[Row], bounds: list[int], num_parts: int) -> tuple[Path, ...]:
    """Writes rows as shards, in pieces."""
    paths = []
    for start, stop in pairwise(bounds):
        table = features_of(samples_of(rows[start:stop]), CONFIG).to_table()
        paths.append(folder / f"{start}-{stop}-{len(paths)}.arrow")
        write_pieces(paths[-1], table, np.arange(start, stop), num_parts)
    return tuple(paths)


def as_tuples(found: Removals) -> list[tuple[int, bool, int, float]]:
    columns = (found.rows, found.is_near, found.resembles, found.similarity)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(row_lists(), st.integers(1, 7), st.data())
def test_parts_find_what_one_search_finds(rows: list[Row], num_parts: int, data: st.DataObject) -> None:
    num_old = data.draw(st.integers(0, len(rows)))
    first = find_duplicates(
        FeatureTable([features_of(samples_of(rows[:num_old]), CONFIG).to_table()]),
        CONFIG,
        origins=lambda places: [rows[i].origin for i in places],
    )
    old = [item for place, item in enumerate(rows[:num_old]) if place not in first.rows]
    new = rows[num_old:]
    everything = [*new, *old]
    table = FeatureTable([features_of(samples_of(new), CONFIG).to_table()])
    published = FeatureTable([published_table(old)])

    def origins(places: object) -> list[str]:
        return [everything[i].origin for i in places]  # type: ignore[attr-defined]

    left_out = clashing_ids(table, origins=origins, published=published).rows
    whole = find_duplicates(table, CONFIG, origins=origins, published=published, left_out=left_out)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(new)), max_size=3)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = files_of(folder, new, [0, *cuts, len(new)], num_parts)
        old_file = folder / "old.arrow"
        write_pieces(old_file, published_table(old), np.arange(len(old)), num_parts)
        search = PartSearch(files, (old_file,), len(new), left_out, CONFIG)
        parts = [search.run(part, origins) for part in range(num_parts)]
    assert as_tuples(joined_removals(parts)) == as_tuples(whole)


def test_every_row_is_in_one_part(tmp_path: Path) -> None:
    rows = [row(f"{LONG} with {number} glasses", str(number)) for number in range(40)]
    files = files_of(tmp_path, rows, [0, 13, 40], 5)
    parts = [read_part(files, part)[1].tolist() for part in range(5)]
    assert sorted(number for part in parts for number in part) == list(range(40))
    assert sum(bool(part) for part in parts) > 1, "rows of many blocks are spread"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (path,) = files_of(tmp_path, [row(LONG)], [0, 1], 2)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StorageError, match=path.name):
        read_part([path], 0)
