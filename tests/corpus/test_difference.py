"""What differs between two versions: the laws, every kind of change, marks, the list of ids."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import partitions
from corpus.difference import Change, Difference, compare_versions
from corpus.versions import load_manifest
from schemas.errors import ConfigError, CorpusError
from schemas.rows import LabelledSample
from schemas.samples import Kind, Topic
from schemas.verdicts import Mode
from tests.corpus.small_versions import a_row, some_rows, write_version


def turned(row: LabelledSample) -> LabelledSample:
    """Returns a row with the same content and the other mode."""
    return a_row(int(row.sample.origin.rpartition("#")[2]), thinks=row.decision.mode is Mode.DIRECT)


def compared(folder: Path, old: list[LabelledSample], new: list[LabelledSample], **recipe: str) -> Difference:
    """Writes two versions, each in a corpus folder of its own, and compares them."""
    first = write_version(folder / "old", old, has_card=False)
    return compare_versions(first, write_version(folder / "new", new, has_card=False, **recipe))


LABELS = st.dictionaries(st.integers(0, 12), st.booleans(), max_size=8)
"""Rows by number: whether they think."""


@settings(max_examples=15, deadline=None)
@given(old=LABELS, new=LABELS)
def test_rows_are_added_removed_or_in_both_and_the_way_back_is_the_reverse(
    old: dict[int, bool], new: dict[int, bool]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        versions = [
            write_version(Path(name, side), [a_row(n, thinks=thinks) for n, thinks in labels.items()], has_card=False)
            for side, labels in (("old", old), ("new", new))
        ]
        forth, back = compare_versions(*versions), compare_versions(*reversed(versions))
        same = compare_versions(versions[0], versions[0])
    assert same.is_equal and same.num_common == same.num_unread == len(old)
    added, removed = forth.num_rows(Change.ADDED), forth.num_rows(Change.REMOVED)
    assert (added, removed) == (len(new.keys() - old.keys()), len(old.keys() - new.keys()))
    assert len(new) == len(old) + added - removed == forth.num_common + added
    assert (back.num_rows(Change.ADDED), back.num_rows(Change.REMOVED)) == (removed, added)
    to_direct = sum(old[n] and not new[n] for n in old.keys() & new.keys())
    assert forth.num_rows(Change.TO_DIRECT) == back.num_rows(Change.TO_THINK) == to_direct
    assert forth.num_changed == back.num_changed == sum(old[n] is not new[n] for n in old.keys() & new.keys())
    assert forth.is_equal is (old == new)


@pytest.mark.parametrize("partition_rows", [1, 4, 1000])
def test_how_rows_are_partitioned_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_rows: int
) -> None:
    monkeypatch.setattr(partitions, "PARTITION_ROWS", partition_rows)
    rows = some_rows(think=6, direct=9)
    found = compared(tmp_path, rows, [turned(rows[0]), *rows[2:], a_row(999)])
    assert {change: found.num_rows(change) for change in Change if found.num_rows(change)} == {
        Change.ADDED: 1,
        Change.REMOVED: 1,
        Change.TO_DIRECT: 1,
    }


def test_each_change_is_told_apart_and_a_row_counts_once_under_the_first(tmp_path: Path) -> None:
    rows = some_rows(think=4, direct=5)
    more = replace(rows[5].decision, num_scored=2, num_sampled=3)
    new = [
        turned(rows[0]),
        replace(rows[1], reasoning="Another thought of six words here.", answer="8"),
        replace(rows[2], reasoning="Another thought of six words here."),
        replace(rows[3], sample=replace(rows[3].sample, topic=Topic.CHART)),
        replace(rows[4], sample=replace(rows[4].sample, licence="CC0-1.0")),
        replace(rows[5], decision=more),
        replace(rows[6], answer="8"),
        *rows[7:],
    ]
    found = compared(tmp_path, rows, new, recipe="cd" * 32)
    assert {change: found.num_rows(change) for change in Change if found.num_rows(change)} == {
        Change.TO_DIRECT: 1,
        Change.ANSWER: 2,
        Change.TRACE: 1,
        Change.ROUTING: 1,
        Change.PROVENANCE: 1,
        Change.EVIDENCE: 1,
    }
    assert found.aspects == Counter(mode=1, trace=3, evidence=2, answer=2, routing=1, provenance=1)
    assert found.num_changed == 7 and not found.is_equal and found.old.recipe != found.new.recipe


def test_rows_made_by_another_recipe_that_are_labelled_alike_do_not_differ(tmp_path: Path) -> None:
    rows = some_rows()
    found = compared(tmp_path, rows, rows, recipe="cd" * 32)
    assert found.is_equal and found.num_unread == 0 and found.num_common == len(rows)


def test_changes_are_counted_by_mode_topic_and_source(tmp_path: Path) -> None:
    rows = [a_row(n, source="ab"[n % 2], topic=[Topic.MATH, Topic.OCR][n // 2 % 2], thinks=n < 4) for n in range(8)]
    new = [a_row(n, source="ab"[n % 2], topic=[Topic.MATH, Topic.OCR][n // 2 % 2]) for n in range(7)]
    found = compared(tmp_path, rows, new)
    assert found.by("source") == {
        "a": {Change.TO_DIRECT: 2},
        "b": {Change.TO_DIRECT: 2, Change.REMOVED: 1},
    }
    assert found.by("topic") == {"math": {Change.TO_DIRECT: 2}, "ocr": {Change.TO_DIRECT: 2, Change.REMOVED: 1}}
    assert found.by("mode") == {"direct": {Change.TO_DIRECT: 4, Change.REMOVED: 1}}


def test_rows_of_one_id_are_the_first_and_the_second_of_it(tmp_path: Path) -> None:
    row = a_row(1)
    found = compared(tmp_path, [row, row], [row, row, row, replace(row, answer="8")])
    assert found.num_common == 2 and found.num_rows(Change.ADDED) == 2 and found.num_changed == 0


def test_shards_that_are_the_same_are_not_read(tmp_path: Path) -> None:
    rows = some_rows(think=3, direct=3)
    old, new = write_version(tmp_path / "a", rows), write_version(tmp_path / "b", [*rows, a_row(50, thinks=True)])
    for version in (old, new):
        shared = version / "data/think/00000.parquet"
        shared.chmod(0o644)
        shared.write_bytes(b"nobody looks here")
    found = compare_versions(old, new, num_examples=0)
    assert found.num_unread == 6 and found.num_rows(Change.ADDED) == 1 and found.num_common == 6


def test_marks_that_came_and_went_are_told_and_a_marked_row_that_is_gone_was_removed(tmp_path: Path) -> None:
    rows = some_rows(think=3, direct=3)
    ids = [row.sample.id for row in rows]
    before = [(ids[0], "vanished", "v0001"), (ids[1], "vanished", "v0001"), (ids[5], "withdrawn", "v0001")]
    after = [(ids[0], "vanished", "v0001"), (ids[2], "withdrawn", "v0002")]
    old = write_version(tmp_path / "a", rows, marks=before)
    new = write_version(tmp_path / "b", rows[:5], marks=after)
    found = compare_versions(old, new, ids_path=tmp_path / "ids.parquet")
    assert (found.num_marked, found.num_unmarked, found.num_rows(Change.REMOVED)) == (1, 1, 1)
    listed = pl.read_parquet(tmp_path / "ids.parquet").sort("id")
    marked = {id_: (change, mark) for id_, change, mark in listed.select("id", "change", "aspects").iter_rows()}
    assert marked == {ids[1]: ("unmarked", "vanished"), ids[2]: ("marked", "withdrawn"), ids[5]: ("removed", None)}
    assert not found.is_equal


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_list_names_every_differing_row_and_all_that_changed(tmp_path: Path, suffix: str) -> None:
    rows = some_rows(think=2, direct=3)
    versions = [
        write_version(tmp_path / side, held) for side, held in (("a", rows), ("b", [turned(rows[0]), *rows[1:4]]))
    ]
    path = tmp_path / f"ids.{suffix}"
    compare_versions(*versions, ids_path=path)
    listed = pl.read_csv(path) if suffix == "csv" else pl.read_parquet(path)
    assert sorted(listed.iter_rows()) == sorted(
        [
            (rows[0].sample.id, "think_to_direct", "mode+trace+evidence", "think", "direct", "math", "tests"),
            (rows[4].sample.id, "removed", None, "direct", None, "math", "tests"),
        ]
    )


def test_a_list_of_another_format_is_wrong_use_and_none_is_left_of_a_comparison_that_failed(tmp_path: Path) -> None:
    rows = some_rows()
    old, new = write_version(tmp_path / "a", rows), write_version(tmp_path / "b", rows[1:])
    with pytest.raises(ConfigError, match=r"must end in \.parquet or \.csv"):
        compare_versions(old, new, ids_path=tmp_path / "ids.txt")
    shard = new / "data/think/00000.parquet"
    shard.chmod(0o644)
    shard.write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="cannot be compared"):
        compare_versions(old, new, ids_path=tmp_path / "ids.csv")
    assert not list(tmp_path.glob("*ids.*"))


def test_examples_are_the_rows_of_the_smallest_ids_as_both_versions_have_them(tmp_path: Path) -> None:
    rows = some_rows(think=5, direct=0)
    found = compared(tmp_path, rows, [turned(row) for row in rows])
    assert [example.id for example in found.examples] == sorted(row.sample.id for row in rows)[:3]
    example = found.examples[0]
    assert example.old and example.new
    assert example.change is Change.TO_DIRECT
    assert (example.old["mode"], example.new["mode"]) == ("think", "direct")
    assert example.old["question"] == example.new["question"]
    assert "0 of 8 scored answers right" in example.old["evidence"]


def test_a_version_without_rows_is_compared_too(tmp_path: Path) -> None:
    found = compared(tmp_path, [], some_rows(think=1, direct=1))
    assert found.num_rows(Change.ADDED) == 2 and load_manifest(found.old_folder).num_rows == 0


def test_open_rows_are_compared_by_their_probability(tmp_path: Path) -> None:
    row = a_row(1, kind=Kind.SUBJECTIVE)
    other = replace(row, decision=replace(row.decision, probability=0.3))
    assert compared(tmp_path, [row], [other]).num_rows(Change.EVIDENCE) == 1
