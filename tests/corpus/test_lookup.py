"""Rows found by name among many files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.lookup import MAX_FOUND, FoundRow, find_ids, find_rows, read_record, resolve_version
from schemas.errors import ConfigError, CorpusError
from tests.corpus.small_versions import some_rows, write_version

IDS = ["deadbeef" + f"{n:024x}" for n in range(3)] + ["dead0000" + f"{n:024x}" for n in range(3)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of three rows; their folder's name means something to a glob."""
    paths = [tmp_path / "[a]*=1" / f"{n}.parquet" for n in range(2)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        rows = range(3 * number, 3 * number + 3)
        table = {
            "id": [IDS[n] for n in rows],
            "origin": [f"exams:a.jsonl#{n}" for n in rows],
            "question": [f"Question {n}?" * 100 for n in rows],
            "source_id": [f"q{n % 2}" for n in rows],
        }
        pq.write_table(pa.table(table), path, row_group_size=2)
    return paths


def test_a_whole_id_a_beginning_an_origin_or_an_own_id_names_a_row(files: list[Path]) -> None:
    assert [row.row for row in find_rows(files, IDS[2])] == [2]
    assert [row.id for row in find_rows(files, "dead")] == IDS
    assert [row.id for row in find_rows(files, "deadbeef")] == IDS[:3]
    assert [row.id for row in find_rows(files, "exams:a.jsonl#4")] == [IDS[4]]
    assert [row.id for row in find_rows(files, "q1")] == [IDS[1], IDS[3], IDS[5]]


@pytest.mark.parametrize("name", ["dea", "DEAD", "", "exams:a.jsonl#", "f" * 32, "' or 1=1", "\x1b[2J", "é" * 32])
def test_a_name_that_is_none_finds_nothing(files: list[Path], name: str) -> None:
    assert find_rows(files, name) == []
    assert find_rows([], name) == []


def test_a_place_is_that_of_the_row_in_its_own_file(files: list[Path]) -> None:
    (found,) = find_rows(files, IDS[5])
    assert found == FoundRow(files[1], 2, IDS[5], "exams:a.jsonl#5", ("Question 5?" * 100)[:200])
    assert read_record(found.path, found.row)["source_id"] == "q1"
    assert read_record(found.path, found.row, ["origin"]) == {"origin": "exams:a.jsonl#5"}


def test_several_ids_are_found_at_once(files: list[Path]) -> None:
    assert [row.id for row in find_ids(files, {IDS[4], IDS[1], "0" * 32})] == [IDS[1], IDS[4]]
    assert find_ids(files, []) == []


def test_a_search_that_fits_everything_ends(tmp_path: Path) -> None:
    number = 2 * MAX_FOUND
    table = {"id": [f"{n:032x}" for n in range(number)], "origin": ["o"] * number, "question": ["?"] * number}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    assert len(find_rows([tmp_path / "rows.parquet"], "0000")) == MAX_FOUND


def test_a_damaged_file_is_an_error_that_names_the_folder(files: list[Path]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-20])
    with pytest.raises(CorpusError, match="cannot be searched"):
        find_rows(files, IDS[0])
    with pytest.raises(CorpusError, match=r"1\.parquet is damaged"):
        read_record(files[1], 0)


def test_a_row_that_is_not_there_any_more_is_an_error(files: list[Path]) -> None:
    with pytest.raises(CorpusError, match="has changed while it was read"):
        read_record(files[0], 99)


def test_a_version_is_named_by_its_folder_by_that_of_the_corpus_or_by_its_name_in_it(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    first = write_version(corpus, some_rows(think=1, direct=1))
    second = write_version(corpus, some_rows(think=1, direct=2))
    assert resolve_version(str(first)) == first.resolve()
    assert resolve_version("v0001", corpus) == first.resolve()
    assert resolve_version("latest", corpus) == second.resolve()
    assert resolve_version(str(corpus)) == second.resolve()
    assert resolve_version(str(first), corpus) == first.resolve()


def test_a_version_that_does_not_exist_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        resolve_version(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there is no version 'v0009'"):
        resolve_version("v0009", tmp_path)
    with pytest.raises(ConfigError, match="no finished corpus version"):
        resolve_version(str(tmp_path))
