"""What a run adds to published rows and what it no longer has, held to counting by hand."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.lineage import MARK_SCHEMA, find_news, new_marks, num_marks_changed, read_marks, write_marks
from corpus.writer import write_fates
from schemas.errors import CorpusError


def identity(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def columns(numbers: list[list[int]]) -> list[pa.ChunkedArray]:
    return [pa.chunked_array([[identity(number) for number in part]], pa.string()) for part in numbers]


@given(
    published=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=4),
    run=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=4),
)
def test_rows_are_matched_one_to_one_by_id(published: list[list[int]], run: list[list[int]]) -> None:
    news = find_news(columns(published), columns(run))
    old, new = [n for part in published for n in part], [n for part in run for n in part]
    added = Counter(number for number, is_new in zip(new, news.is_new, strict=True) if is_new)
    absent = Counter(number for number, is_absent in zip(old, news.absent, strict=True) if is_absent)
    assert added == Counter(new) - Counter(old)
    assert absent == Counter(old) - Counter(new)


def test_of_two_rows_of_one_id_the_later_is_the_new_one() -> None:
    news = find_news(columns([[1]]), columns([[1, 2], [1]]))
    assert news.is_new.tolist() == [False, True, True]


@pytest.mark.parametrize("bad", ["", "ab", "g" * 32, "0" * 31 + "é", None])
def test_an_id_that_is_none_is_refused(bad: str | None) -> None:
    with pytest.raises(CorpusError, match="32 hexadecimal digits"):
        find_news([], [pa.chunked_array([[identity(1), bad]], pa.string())])


def marks_of(entries: list[tuple[int, str, str]]) -> pa.Table:
    records = [{"id": identity(n), "mark": mark, "since": since} for n, mark, since in entries]
    return pa.Table.from_pylist(records, schema=MARK_SCHEMA).sort_by("id")


def test_a_mark_says_why_and_since_when(tmp_path: Path, dropped_fate: Any) -> None:
    write_fates([dropped_fate(0)], tmp_path / "fates.parquet")
    left = f"{0:032x}"
    before = marks_of([(1, "vanished", "v0001"), (2, "withdrawn", "v0001"), (3, "vanished", "v0001")])
    absent = pa.array([identity(1), identity(2), identity(4), left])
    marks = new_marks(absent, before=before, fates=tmp_path / "fates.parquet", version="v0002")
    expected = {
        identity(1): ("vanished", "v0001"),
        identity(2): ("vanished", "v0002"),
        identity(4): ("vanished", "v0002"),
        left: ("withdrawn", "v0002"),
    }
    assert {row["id"]: (row["mark"], row["since"]) for row in marks.to_pylist()} == expected
    assert num_marks_changed(before, marks) == (3, 1)


def test_two_rows_of_one_id_that_vanish_are_two_marks(tmp_path: Path) -> None:
    write_fates([], tmp_path / "fates.parquet")
    absent = pa.array([identity(1), identity(1)])
    before = marks_of([(1, "vanished", "v0001")])
    marks = new_marks(absent, before=before, fates=tmp_path / "fates.parquet", version="v0002")
    assert marks["since"].to_pylist() == ["v0001", "v0001"]


def test_marks_are_read_as_they_were_written_and_absent_ones_are_none(tmp_path: Path) -> None:
    marks = marks_of([(1, "vanished", "v0001")])
    write_marks(marks, tmp_path / "marks.parquet")
    assert read_marks(tmp_path / "marks.parquet").equals(marks)
    assert read_marks(tmp_path / "none.parquet").num_rows == 0
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorpusError, match="not a list of marks"):
        read_marks(tmp_path / "bad.parquet")


def test_nothing_published_makes_every_row_news() -> None:
    news = find_news([], columns([[1, 2], []]))
    assert news.is_new.tolist() == [True, True]
    assert news.absent.dtype == np.bool_ and not len(news.absent)
