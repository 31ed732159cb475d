"""Exports from and to a real S3-speaking server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from datasets import Image, List, load_dataset

from corpus.exports import FORMATS, CorpusVersion, export_corpus, open_version
from corpus.places import Place
from schemas.errors import ConfigError, CorpusError, StorageError
from tests.corpus.conftest import World, build

pytest_plugins = ("tests.s3_server",)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def version(tmp_path: Path, world: World) -> CorpusVersion:
    rows = [*world.rows(think=4, direct=8), world.row(77, colours=(), question="Two and five?")]
    return open_version(build(tmp_path / "corpus", world, rows).commit().folder)


def upload(folder: Path, address: str) -> str:
    filesystem, path = fsspec.core.url_to_fs(address)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            filesystem.put_file(str(file), f"{path}/{file.relative_to(folder).as_posix()}")
    return address


def objects(address: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.invalidate_cache()
    return {str(name).removeprefix(f"{path}/"): filesystem.cat_file(name) for name in filesystem.find(path)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_at_an_address_is_the_one_on_a_disk(
    version: CorpusVersion, bucket: str, tmp_path: Path, kind: str
) -> None:
    exported = export_corpus(version, FORMATS[kind], f"{bucket}/out/", shard_rows=5)
    export_corpus(version, FORMATS[kind], tmp_path / "out", shard_rows=5)
    assert objects(f"{bucket}/out") == files(tmp_path / "out")
    assert exported.folder == f"{bucket}/out" and exported.is_new
    assert not export_corpus(version, FORMATS[kind], f"{bucket}/out", shard_rows=5).is_new


def test_a_corpus_at_an_address_is_exported_by_its_newest_version_or_a_named_one(
    version: CorpusVersion, bucket: str, tmp_path: Path
) -> None:
    upload(tmp_path / "corpus" / "v0001", f"{bucket}/corpus/v0001")
    upload(tmp_path / "corpus" / "v0001", f"{bucket}/corpus/v0010")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/corpus/v0011/data/think/00000.parquet", b"no manifest yet")
    assert str(open_version(f"{bucket}/corpus").place) == f"{bucket}/corpus/v0010"
    found = open_version(f"{bucket}/corpus/v0001/")
    assert found.manifest == version.manifest
    export_corpus(found, FORMATS["llava"], tmp_path / "from_s3")
    export_corpus(version, FORMATS["llava"], tmp_path / "from_disk")
    assert files(tmp_path / "from_s3") == files(tmp_path / "from_disk")


def test_what_is_no_corpus_and_what_is_damaged_are_named(version: CorpusVersion, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no finished corpus version at {bucket}/none"):
        open_version(f"{bucket}/none")
    upload(tmp_path / "corpus" / "v0001", f"{bucket}/v0001")
    filesystem, path = fsspec.core.url_to_fs(f"{bucket}/v0001")
    shard = version.manifest.shards[0].path
    filesystem.pipe_file(f"{path}/{shard}", filesystem.cat_file(f"{path}/{shard}")[:-1] + b"?")
    with pytest.raises(CorpusError, match=f"{bucket}/v0001 is damaged: {shard} was altered"):
        export_corpus(open_version(f"{bucket}/v0001"), FORMATS["llava"], f"{bucket}/out")
    filesystem.rm_file(f"{path}/{shard}")
    with pytest.raises(CorpusError, match=f"{bucket}/v0001 is damaged: {shard} is missing"):
        export_corpus(open_version(f"{bucket}/v0001"), FORMATS["llava"], f"{bucket}/out")
    filesystem.pipe_file(f"{path}/manifest.json", b"{}")
    with pytest.raises(CorpusError, match=f"{bucket}/v0001"):
        open_version(f"{bucket}/v0001")


KILLED = """
import os, sys
from corpus.exports import FORMATS, export_corpus, open_version
progress = lambda num_done, num_rows: os._exit(9) if num_done == 6 else None
export_corpus(open_version(sys.argv[1]), FORMATS["ms-swift"], sys.argv[2], shard_rows=4, progress=progress)
"""


def test_an_export_killed_on_its_way_to_a_store_starts_again(
    version: CorpusVersion, bucket: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(version.place), f"{bucket}/out"]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ}, check=False).returncode == 9
    assert "export.unfinished.json" in objects(f"{bucket}/out") and "export.json" not in objects(f"{bucket}/out")
    export_corpus(version, FORMATS["ms-swift"], f"{bucket}/out", shard_rows=4)
    export_corpus(version, FORMATS["ms-swift"], tmp_path / "fresh", shard_rows=4)
    assert objects(f"{bucket}/out") == files(tmp_path / "fresh")


def test_foreign_objects_are_never_touched(version: CorpusVersion, bucket: str) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/out/thesis.tex", b"years of work")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex', which no export made"):
        export_corpus(version, FORMATS["llava"], f"{bucket}/out", overwrite=True)
    assert objects(f"{bucket}/out") == {"thesis.tex": b"years of work"}


def test_missing_credentials_and_a_missing_bucket_are_storage_errors(
    version: CorpusVersion, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="no-such-bucket-here"):
        export_corpus(version, FORMATS["llava"], "s3://no-such-bucket-here/out")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageError, match=r"(?i)credentials"):
        export_corpus(version, FORMATS["llava"], f"{bucket}/out")
    with pytest.raises(StorageError, match=r"(?i)credentials"):
        open_version(f"{bucket}/corpus")


def test_an_unknown_protocol_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot use gopher://somewhere"):
        Place("gopher://somewhere")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "num_rows"), [("*", 13), ("think", 4), ("direct", 9)])
def test_datasets_loads_a_version_from_its_address(
    version: CorpusVersion, bucket: str, tmp_path: Path, name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it means the bucket, too
    datasets.disable_progress_bars()
    upload(tmp_path / "corpus" / "v0001", f"{bucket}/corpus/v0001")
    files_of_mode = f"{bucket}/corpus/v0001/data/{name}/*.parquet"
    loaded: Any = load_dataset("parquet", data_files=files_of_mode, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == num_rows
    assert loaded.features["images"] == List(Image())


def test_the_record_of_an_export_tells_no_place_and_no_time(
    version: CorpusVersion, bucket: str, tmp_path: Path
) -> None:
    export_corpus(version, FORMATS["webdataset"], f"{bucket}/out")
    record = json.loads(objects(f"{bucket}/out")["export.json"])
    assert "folder" not in record and bucket not in json.dumps(record)
    assert record["digest"] == version.manifest.digest
