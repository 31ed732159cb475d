"""Versions that are pinned or in use stay; of the others nothing is left; later versions are whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.keeping import Pin, collect_versions, list_pins, pin_version, unpin_version
from corpus.versions import begin_version, find_base, list_versions, verify_version
from schemas.errors import ConfigError, StorageError

PIN = Pin("v0001", "paper", "the corpus of the paper", "2026-01-01T00:00:00Z")


@pytest.fixture
def corpus(build_version: Any, world: Any) -> Path:
    """Four versions of other rows each."""
    for number in range(1, 5):
        folder: Path = build_version(world.rows(think=number, direct=1)).commit().folder
    return folder.parent


def names(folder: Path) -> list[str]:
    return [path.name for path in list_versions(folder)]


def test_the_newest_and_pinned_ones_stay(corpus: Path) -> None:
    pin_version(corpus, PIN)
    collected = collect_versions(corpus, keep=1)
    assert names(corpus) == ["v0001", "v0004"]
    assert collected.removed == ("v0002", "v0003")
    assert collected.kept == {"v0004": "one of the newest 1", "v0001": "pinned by paper: the corpus of the paper"}
    assert collected.num_bytes > 0
    for version in list_versions(corpus):
        verify_version(version)
    unpin_version(corpus, "v0001", "paper")
    assert collect_versions(corpus, keep=1).removed == ("v0001",)
    assert list_pins(corpus) == []


def test_a_rehearsal_removes_nothing(corpus: Path) -> None:
    assert collect_versions(corpus, keep=2, is_dry=True).removed == ("v0001", "v0002")
    assert len(names(corpus)) == 4


def test_a_version_in_use_stays_until_the_awaited_file_is_there(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    pin_version(corpus, replace(PIN, holder="train", until=str(run / "result.json")))
    assert "v0001" in collect_versions(corpus, keep=1).kept
    (run / "result.json").write_text("{}")
    assert collect_versions(corpus, keep=1).removed == ("v0001",)


def test_a_pin_of_a_run_whose_folder_is_gone_holds_nothing(corpus: Path, tmp_path: Path) -> None:
    pin_version(corpus, replace(PIN, until=str(tmp_path / "gone" / "run" / "result.json")))
    assert "v0001" in collect_versions(corpus, keep=1).removed


def test_a_version_lives_on_without_the_one_that_it_continues(build_version: Any, world: Any, tmp_path: Path) -> None:
    first = build_version(world.rows(think=3, direct=2)).commit(lineage="x")
    base = find_base(first.folder.parent, name="tests", lineage="x")
    assert base is not None
    building = begin_version(first.folder.parent, base)
    assert (building / "data/think/00000.parquet").stat().st_nlink == 2
    shared = (building / "data/think/00000.parquet").read_bytes()
    building.rename(first.folder.parent / "v0002")
    (first.folder / "manifest.json").rename(first.folder.parent / "v0002" / "manifest.json")
    (first.folder.parent / "v0001" / "manifest.json").write_text("{}")
    assert collect_versions(first.folder.parent, keep=1).removed == ("v0001",)
    assert (first.folder.parent / "v0002/data/think/00000.parquet").read_bytes() == shared


def test_what_an_interrupted_removal_left_is_removed(corpus: Path) -> None:
    (corpus / "v0001").rename(corpus / ".removing-v0001")
    collect_versions(corpus, keep=3)
    assert not list(corpus.glob(".removing*"))


@pytest.mark.parametrize(
    ("version", "holder"), [("v0009", "paper"), ("../v0001", "x"), ("v0001", "../x"), ("v0001", "")]
)
def test_a_pin_that_cannot_be_is_refused(corpus: Path, version: str, holder: str) -> None:
    with pytest.raises(ConfigError):
        pin_version(corpus, replace(PIN, version=version, holder=holder))


def test_a_pin_that_is_not_there_cannot_be_taken_away(corpus: Path) -> None:
    pin_version(corpus, PIN)
    with pytest.raises(ConfigError, match="nobody does not pin v0001; pinned by: paper"):
        unpin_version(corpus, "v0001", "nobody")


def test_a_damaged_pin_stops_the_removal(corpus: Path) -> None:
    pin_version(corpus, PIN)
    (corpus / ".pins/v0001/paper.json").write_text("{")
    with pytest.raises(StorageError, match="it is no pin"):
        collect_versions(corpus, keep=1)
    assert len(names(corpus)) == 4


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.integers(1, 6), pinned=st.sets(st.integers(1, 4)))
def test_kept_and_removed_are_all_versions(corpus: Path, keep: int, pinned: set[int]) -> None:
    for pin in list_pins(corpus):
        unpin_version(corpus, pin.version, pin.holder)
    for number in pinned:
        pin_version(corpus, replace(PIN, version=f"v{number:04d}"))
    collected = collect_versions(corpus, keep=keep, is_dry=True)
    assert sorted([*collected.removed, *collected.kept]) == names(corpus)
    assert {f"v{number:04d}" for number in pinned} <= set(collected.kept)
    assert set(names(corpus)[-keep:]) <= set(collected.kept)
