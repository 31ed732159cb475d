"""Partitions: nothing is lost, and what concerns one id lies together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import partitions
from corpus.partitions import Partitions

EMPTY = pl.DataFrame(schema={"id": pl.String, "number": pl.Int64})


@given(frames=st.lists(st.lists(st.text("abc", max_size=3), max_size=20), max_size=4))
def test_every_row_is_in_the_one_partition_of_its_id_in_the_order_in_which_it_came(frames: list[list[str]]) -> None:
    ids = [id_ for frame in frames for id_ in frame]
    with Partitions(7 * partitions.PARTITION_ROWS) as spread:
        start = 0
        for frame in frames:
            spread.add("rows", pl.DataFrame({"id": frame, "number": range(start, start + len(frame))}, EMPTY.schema))
            start += len(frame)
        parts = list(spread.read("rows", EMPTY))
    assert len(parts) == 7
    seen = [set(part["id"]) for part in parts]
    assert sum(map(len, seen)) == len(set(ids))
    rows = sorted((number, id_) for part in parts for id_, number in part.iter_rows())
    assert rows == list(enumerate(ids))
    for part in parts:
        assert part["number"].is_sorted()


def test_kinds_share_their_partitions_and_a_kind_without_rows_is_empty() -> None:
    ids = pl.DataFrame({"id": [f"{n}" for n in range(50)], "number": range(50)})
    with Partitions(3 * partitions.PARTITION_ROWS) as spread:
        spread.add("old", ids)
        spread.add("new", ids)
        pairs = zip(spread.read("old", EMPTY), spread.read("new", EMPTY), spread.read("none", EMPTY), strict=True)
        for old, new, none in pairs:
            assert old.equals(new) and none.is_empty()


def test_there_are_no_more_files_than_may_be_open_and_none_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Partitions(10**12) as spread:
        assert spread.num_partitions == partitions.MAX_PARTITIONS
        spread.add("rows", pl.DataFrame({"id": ["a", "b"], "number": [1, 2]}))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
