"""Versions on a real S3-speaking server: whole or not there, sent once, fetched and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from corpus.places import Place
from corpus.remote import (
    cache_folder,
    fetch_version,
    local_version,
    remote_versions,
    remove_remote,
    restore_latest,
    send_version,
)
from corpus.versions import find_base, latest_version, verify_version
from schemas.errors import ConfigError, CorpusError, StorageError

pytest_plugins = ("tests.s3_server",)


@pytest.fixture
def version(build_version: Any, world: Any) -> Path:
    folder: Path = build_version(world.rows(think=4, direct=2), is_whole=True).commit(lineage="x").folder
    return folder


def objects(address: str) -> set[str]:
    filesystem, root = fsspec.core.url_to_fs(address)
    filesystem.invalidate_cache()
    return {path.removeprefix(f"{root}/") for path in filesystem.find(root)}


def test_a_version_that_was_sent_is_fetched_whole(bucket: str, version: Path, tmp_path: Path) -> None:
    address = f"{bucket}/corpus"
    assert send_version(version, address) > 0
    assert remote_versions(address) == ["v0001"]
    copy = fetch_version(address, tmp_path / "copy")
    assert verify_version(copy) == verify_version(version)


def test_a_version_is_sent_once_and_fetched_once(bucket: str, version: Path, tmp_path: Path) -> None:
    send_version(version, bucket)
    assert send_version(version, bucket) == 0
    copy = fetch_version(bucket, tmp_path / "copy")
    shard = copy / "data/think/00000.parquet"
    before = shard.stat().st_mtime_ns
    assert fetch_version(f"{bucket}/v0001", tmp_path / "copy") == copy
    assert shard.stat().st_mtime_ns == before
    shard.chmod(0o644)
    shard.write_bytes(b"damaged")
    verify_version(fetch_version(bucket, tmp_path / "copy"))


def test_what_an_interrupted_sending_left_is_no_version(bucket: str, version: Path, tmp_path: Path) -> None:
    send_version(version, bucket)
    Place(bucket).remove("v0001/manifest.json")
    assert remote_versions(bucket) == []
    with pytest.raises(ConfigError, match="no finished corpus version"):
        fetch_version(bucket, tmp_path / "copy")
    send_version(version, bucket)
    assert remote_versions(bucket) == ["v0001"]


def test_a_damaged_file_there_is_named_and_no_copy_is_left(bucket: str, version: Path, tmp_path: Path) -> None:
    send_version(version, bucket)
    Place(bucket).write("v0001/data/think/00000.parquet", b"PAR1 not any more")
    with pytest.raises(CorpusError, match=r"data/think/00000\.parquet: altered"):
        fetch_version(bucket, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").glob("[!.]*")] == []


def test_a_version_of_the_same_name_is_not_overwritten(
    bucket: str, version: Path, build_version: Any, world: Any, tmp_path: Path
) -> None:
    send_version(version, bucket)
    Place(bucket).write("v0001/manifest.json", b"{}")
    with pytest.raises(CorpusError, match="another version of that name"):
        send_version(version, bucket)


def test_an_empty_folder_continues_the_newest_version_there(bucket: str, version: Path, tmp_path: Path) -> None:
    send_version(version, bucket)
    folder = tmp_path / "another" / "corpus"
    restore_latest(bucket, folder)
    assert latest_version(folder) == folder / "v0001"
    assert find_base(folder, name="tests", lineage="x") is not None
    restore_latest(f"{bucket}/nothing", tmp_path / "empty")
    assert latest_version(tmp_path / "empty") is None


def test_a_removed_version_leaves_nothing(bucket: str, version: Path) -> None:
    send_version(version, f"{bucket}/corpus")
    remove_remote(f"{bucket}/corpus", ["v0001"])
    assert objects(f"{bucket}/corpus") == set()


def test_a_person_may_name_an_address_wherever_a_version_is_read(
    bucket: str, version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMODE_CACHE", str(tmp_path / "cache"))
    send_version(version, f"{bucket}/corpus")
    copy = local_version(f"{bucket}/corpus")
    assert copy == local_version(f"{bucket}/corpus/v0001")
    assert copy.parent == cache_folder(f"{bucket}/corpus") and copy.is_relative_to(tmp_path / "cache")
    assert local_version(version) == version


def test_a_store_that_cannot_be_reached_is_an_error_that_names_the_address(
    bucket: str, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-anywhere/corpus"):
        send_version(version, "s3://no-such-bucket-anywhere/corpus")
