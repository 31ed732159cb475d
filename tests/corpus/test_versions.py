"""Versions are complete or not there; damage is found and named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from corpus import storage, versions
from corpus.versions import (
    begin_version,
    commit_version,
    corpus_digest,
    latest_version,
    list_versions,
    load_manifest,
    next_version_name,
    verify_version,
)
from schemas.errors import CorpusError, StorageError
from schemas.fates import StageCount


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


def test_a_committed_version_has_a_manifest_that_accounts_for_every_row(
    build_version: Any, world: Any, dropped_fate: Any
) -> None:
    built = build_version(world.rows(think=4, direct=2), [dropped_fate(1), dropped_fate(2)])
    committed = built.commit()
    manifest = verify_version(committed.folder)
    assert (committed.folder.name, committed.is_new) == ("v0001", True)
    assert manifest == committed.manifest
    assert (manifest.num_think, manifest.num_direct, manifest.num_rows) == (4, 2, 6)
    assert [shard.path for shard in manifest.shards] == [
        "data/direct/00000.parquet",
        "data/think/00000.parquet",
        "data/think/00001.parquet",
    ]
    assert [file.path for file in manifest.files] == ["README.md", "croissant.json", "fates.parquet", "marks.parquet"]
    assert list(manifest.counts) == ["duplicates", "corpus"]
    assert manifest.counts["duplicates"].dropped == {"near_duplicate": 2}


def test_the_digest_is_what_sha256sum_prints(build_version: Any, world: Any) -> None:
    committed = build_version(world.rows(think=4, direct=2)).commit()
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(committed.folder)}\n"
        for path in sorted(committed.folder.glob("data/*/*.parquet"))
    ]
    assert committed.manifest.digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_link_latest_points_to_the_newest_version(build_version: Any, world: Any) -> None:
    folder = build_version(world.rows(think=1, direct=1)).commit().folder.parent
    assert os.readlink(folder / "latest") == "v0001"
    build_version(world.rows(think=2, direct=1)).commit()
    assert os.readlink(folder / "latest") == "v0002"
    assert [path.name for path in list_versions(folder)] == ["v0001", "v0002"]
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["latest", "v0001", "v0002"]


def test_a_link_that_cannot_be_made_does_not_hinder_the_version(build_version: Any, world: Any) -> None:
    built = build_version(world.rows(think=1, direct=1))
    (built.building.parent / "latest").mkdir()
    assert latest_version(built.building.parent) is None
    assert latest_version(built.commit().folder.parent) == built.building.parent / "v0001"


def test_the_same_corpus_again_makes_no_new_version(build_version: Any, world: Any) -> None:
    first = build_version(world.rows(think=3, direct=2)).commit(created="2026-01-01T00:00:00Z")
    again = build_version(world.rows(think=3, direct=2)).commit(created="2026-02-02T00:00:00Z")
    assert (again.folder, again.is_new, again.manifest) == (first.folder, False, first.manifest)
    assert [path.name for path in list_versions(first.folder.parent)] == ["v0001"]
    assert not (first.folder.parent / ".building").exists()


def test_the_same_corpus_is_built_anew_when_the_latest_version_is_damaged(build_version: Any, world: Any) -> None:
    first = build_version(world.rows(think=3, direct=2)).commit()
    (first.folder / "data/think/00000.parquet").unlink()
    again = build_version(world.rows(think=3, direct=2)).commit()
    assert (again.folder.name, again.is_new) == ("v0002", True)


def test_an_older_corpus_that_returns_is_a_new_version(build_version: Any, world: Any) -> None:
    digests = [build_version(world.rows(think=n, direct=1)).commit().manifest.digest for n in (1, 2, 1)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("step", ["companions", "damage", "manifest", "rename", "after_rename"])
def test_a_kill_at_any_step_leaves_the_latest_version_whole(
    build_version: Any, world: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = build_version(world.rows(think=1, direct=1)).commit()
    second = build_version(world.rows(think=2, direct=2))

    def kill(*_: object, **__: object) -> None:
        raise Killed

    target: Any
    target, name = {
        "companions": (versions, "_companions"),
        "damage": (versions, "_damage"),
        "manifest": (versions, "write_text"),
        "rename": (Path, "rename"),
        "after_rename": (versions, "_point_latest_to"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            second.commit()
    expected = "v0002" if step == "after_rename" else "v0001"
    latest = latest_version(first.folder.parent)
    assert latest is not None and latest.name == expected
    assert verify_version(latest).version == expected
    repaired = build_version(world.rows(think=2, direct=2)).commit()
    assert repaired.folder.name == "v0002"
    assert os.readlink(first.folder.parent / "latest") == "v0002"


@pytest.mark.parametrize(
    "name", ["write_shards", "write_fates", "tally_corpus", "pick_rows", "build_report", "build_card"]
)
def test_a_kill_while_building_leaves_a_folder_that_no_reader_sees(
    build_version: Any, world: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_version(world.rows(think=1, direct=1)).commit()

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(build_version.__globals__["build"].__globals__, name, kill)
        with pytest.raises(Killed):
            build_version(world.rows(think=2, direct=2), is_whole=True)
    assert latest_version(first.folder.parent) == first.folder
    assert build_version(world.rows(think=2, direct=2)).commit().folder.name == "v0002"


def test_what_an_interrupted_build_left_is_removed(tmp_path: Path) -> None:
    left = begin_version(tmp_path) / "data" / "think" / "00000.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert list(begin_version(tmp_path).iterdir()) == []


def test_a_version_number_is_not_used_again_and_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    assert next_version_name(tmp_path / "absent") == "v0001"
    for name in ("v0002", "v9999", "v10000", "v01", "vacation", "v0003.bak"):
        (tmp_path / name).mkdir()
    assert next_version_name(tmp_path) == "v10001"
    assert latest_version(tmp_path) is None


def test_every_damaged_file_is_named(build_version: Any, world: Any) -> None:
    folder = build_version(world.rows(think=4, direct=2)).commit().folder
    shard = folder / "data/think/00000.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    (folder / "data/think/00001.parquet").unlink()
    (folder / "README.md").write_text("{}")
    (folder / "data/direct/extra.parquet").write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        verify_version(folder)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "data/think/00000.parquet",
        "data/think/00001.parquet",
        "README.md",
        "data/direct/extra.parquet",
    ]
    assert "its sha256 is not" in lines[0] and "missing" in lines[1] and "2 bytes instead of" in lines[2]


def test_what_a_run_paid_does_not_change_the_manifest(build_version: Any, world: Any, tmp_path: Path) -> None:
    manifests = []
    for paid in ("nothing", "a lot"):
        built = build_version(world.rows(think=1, direct=1))
        (built.building / "report.html").write_text(paid)
        (built.building / "report.json").write_text(paid)
        folder = built.commit().folder
        manifests.append((folder / "manifest.json").read_bytes())
        folder.rename(tmp_path / paid)
    assert manifests[0] == manifests[1]


def test_a_folder_without_a_manifest_is_not_a_version(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="not a finished corpus version"):
        load_manifest(tmp_path / "v0001")


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ('"num_think": 3', '"num_think": 4'),
        ('"created": "2026', '"created": "2027'),
        ('"path": "data/think/00000.parquet"', '"path": "../../etc/passwd"'),
        ('"format": 2', '"format": 99'),
        ('"num_added_think": 3', '"num_added_think": 2'),
        ('"shards": [', '"shards": [7, '),
        ("{", ""),
    ],
)
def test_an_altered_manifest_is_refused(build_version: Any, world: Any, find: str, put: str) -> None:
    folder = build_version(world.rows(think=3, direct=2)).commit().folder
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert find in text
    manifest.write_text(text.replace(find, put, 1))
    with pytest.raises(CorpusError, match=r"manifest\.json"):
        load_manifest(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"text"', "{}", '{"format": 1}', "\x00"])
def test_a_manifest_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match=r"manifest\.json"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "report.html", "report.json", "fates.parquet"])
def test_a_build_without_one_of_its_files_is_not_published(build_version: Any, world: Any, name: str) -> None:
    built = build_version(world.rows(think=1, direct=1))
    (built.building / name).unlink()
    with pytest.raises(CorpusError, match=name):
        built.commit()
    assert latest_version(built.building.parent) is None


def test_a_shard_altered_before_the_commit_is_not_published(build_version: Any, world: Any) -> None:
    built = build_version(world.rows(think=1, direct=1))
    with open(built.shards[0].path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CorpusError, match=r"data/direct/00000\.parquet: altered"):
        built.commit()


def test_a_build_that_lost_a_row_is_not_published(build_version: Any, world: Any, dropped_fate: Any) -> None:
    built = build_version(world.rows(think=1, direct=1), [dropped_fate(1)])
    built.counts["duplicates"].num_in += 1
    with pytest.raises(CorpusError, match="4 rows were read and 0 published ones were not, but 2 are in the corpus"):
        built.commit()
    counts = {"duplicates": StageCount(2, 2)}
    with pytest.raises(CorpusError, match="explains 1 rows, but 0 were dropped or quarantined"):
        commit_version(built.building, name="n", created="", recipe="", inputs="", shards=built.shards, counts=counts)


def test_a_shard_outside_the_build_is_refused(build_version: Any, world: Any, tmp_path: Path) -> None:
    built = build_version(world.rows(think=1, direct=1))
    moved = tmp_path / "elsewhere.parquet"
    Path(built.shards[0].path).rename(moved)
    shards = [versions.replace(built.shards[0], path=str(moved)), *built.shards[1:]]
    with pytest.raises(CorpusError, match="does not lie in"):
        commit_version(built.building, name="n", created="", recipe="", inputs="", shards=shards, counts=built.counts)


def test_a_shard_with_rows_of_the_other_mode_is_refused(build_version: Any, world: Any) -> None:
    built = build_version(world.rows(think=1, direct=1))
    think, direct = built.building / "data/think/00000.parquet", built.building / "data/direct/00000.parquet"
    other = think.with_name("swap")
    think.rename(other)
    direct.rename(think)
    other.rename(direct)
    swapped = [
        versions.replace(shard, path=str(path)) for shard, path in zip(built.shards, (think, direct), strict=True)
    ]
    with pytest.raises(CorpusError, match="holds 0 thinking and 1 direct rows"):
        commit_version(built.building, name="n", created="", recipe="", inputs="", shards=swapped, counts=built.counts)


def test_a_full_disk_while_committing_is_a_storage_error(
    build_version: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_version(world.rows(think=1, direct=1))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "sync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        built.commit()
    assert latest_version(built.building.parent) is None


def test_shards_are_found_by_relative_paths_too(
    build_version: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_version(world.rows(think=1, direct=1))
    monkeypatch.chdir(built.building.parent.parent)
    shards = [versions.replace(s, path=str(Path(s.path).relative_to(Path.cwd()))) for s in built.shards]
    committed = commit_version(
        Path("corpus/.building"), name="n", created="", recipe="", inputs="", shards=shards, counts=built.counts
    )
    assert committed.manifest.digest == corpus_digest(load_manifest("corpus/v0001").shards)


def test_the_manifest_is_readable_json_with_counts_in_order(build_version: Any, world: Any) -> None:
    folder = build_version(world.rows(think=2, direct=1)).commit().folder
    record = json.loads((folder / "manifest.json").read_text())
    assert record["num_rows"] == {"think": 2, "direct": 1}
    assert [count["stage"] for count in record["counts"]] == ["duplicates", "corpus"]
