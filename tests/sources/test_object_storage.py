"""Sources on a real S3-speaking server: every format, images by path, and what happens when the store fails."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs.core

from schemas.errors import RowError, SourceError
from sources import plan_units
from sources.files import folder_address, is_folder
from sources.image_values import ImageRoots, encoded_images
from tests.sources.conftest import Bench, png

pytest_plugins = ("tests.s3_server",)

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
ANSWER = {"answer": "answer"}


def put(address: str, content: bytes) -> str:
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.pipe_file(path, content)
    return address


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


def test_json_lines_are_read_plain_and_packed_as_from_a_disk(bench: Bench, bucket: str) -> None:
    local = bench.folder / "rows.jsonl"
    local.write_bytes(lines(ROWS))
    expected = bench.read(local, columns=ANSWER, shard_rows=4)
    for name, content in (("rows.jsonl", lines(ROWS)), ("rows.jsonl.gz", gzip.compress(lines(ROWS)))):
        found = bench.read(put(f"{bucket}/data/{name}", content), columns=ANSWER, shard_rows=4)
        assert [sample.question for sample in found.samples] == [f"q{i}" for i in range(10)]
        assert [unit.digest for unit in found.units] == [unit.digest for unit in expected.units]
        assert found.samples[9].origin == f"s:{name}#9"


def test_parquet_with_images_inside_is_read(bench: Bench, bucket: str) -> None:
    rows = [{**row, "image": {"bytes": png(), "path": None}} for row in ROWS]
    address = put(f"{bucket}/rows.parquet", parquet(rows, row_group_size=3))
    found = bench.read(address, stored_as="parquet", columns={**ANSWER, "images": "image"}, shard_rows=4)
    assert [len(sample.images) for sample in found.samples] == [1] * 10
    assert [(unit.start, unit.stop) for unit in found.units] == [(0, 4), (4, 8), (8, 10)]


def test_folders_and_patterns_name_their_files_in_order_and_leave_hidden_ones_out(bench: Bench, bucket: str) -> None:
    for number, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl", "_d.jsonl", ".e.jsonl", "f.txt")):
        put(f"{bucket}/data/{name}", lines([{"question": str(number)}]))
    expected = {
        "data": ["a.jsonl", "b.jsonl", "deep/c.jsonl"],
        "data/*.jsonl": ["_d.jsonl", "a.jsonl", "b.jsonl"],
        "data/**/c.jsonl": ["deep/c.jsonl"],
    }
    for path, names in expected.items():
        assert [unit.file for unit in plan_units(bench.config(f"{bucket}/{path}"))] == names


def test_a_parquet_file_is_fetched_once_and_not_once_for_each_column(
    bench: Bench, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [{"question": f"q{i}", "answer": "x" * 50, "image": i.to_bytes(4, "big") * 25_000} for i in range(120)]
    content = parquet([{**row, "spare": row["image"]} for row in noise], compression="none", use_dictionary=False)
    address = put(f"{bucket}/large.parquet", content)
    fetched: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        block: bytes = fetch(self, start, end)
        fetched.append(len(block))
        return block

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    found = bench.read(address, stored_as="parquet", columns=ANSWER, shard_rows=1000)
    assert len(found.samples) == 120
    assert sum(fetched) < len(content) // 50  # neither the images nor the spare column
    fetched.clear()
    bench.read(address, stored_as="parquet", columns={**ANSWER, "images": "image"}, shard_rows=1000)
    assert len(content) // 2 < sum(fetched) < 0.6 * len(content)  # the images once, the spare column not


def test_a_changed_object_is_noticed_after_planning(bench: Bench, bucket: str) -> None:
    from sources import ImageStore, read_unit

    for stored_as, name, encode in (("parquet", "rows.parquet", parquet), ("jsonl", "rows.jsonl", lines)):
        config = bench.config(put(f"{bucket}/{name}", encode(ROWS)), stored_as=stored_as, columns=ANSWER)
        unit = plan_units(config)[0]
        put(f"{bucket}/{name}", encode([*ROWS[:-1], {"question": "q9", "answer": "other"}]))
        with pytest.raises(SourceError, match="changed after the run was planned"):
            read_unit(unit, config, ImageStore(bench.folder / "images", config.images))


def test_a_missing_object_and_a_missing_bucket_are_named(bench: Bench, bucket: str) -> None:
    for address in (f"{bucket}/none.jsonl", "s3://no-such-bucket-here/rows.jsonl", f"{bucket}/none/*.jsonl"):
        with pytest.raises(SourceError, match=r"source s: .*(does not exist|matches no file|cannot read)"):
            plan_units(bench.config(address))


def test_missing_credentials_end_the_run_with_a_named_source(
    bench: Bench, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{bucket}/rows.jsonl", lines(ROWS))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(SourceError, match=r"source s: cannot read s3://.*credentials"):
        plan_units(bench.config(f"{bucket}/rows.jsonl"))


# --- Images by path


def roots(bucket: str) -> ImageRoots:
    return ImageRoots.at_address(f"{bucket}/images/")


def only_image(value: Any, where: ImageRoots, max_bytes: int = 10_000) -> bytes:
    (content,) = encoded_images(value, roots=where, max_bytes=max_bytes)
    return content


def test_paths_are_read_below_an_address(bucket: str) -> None:
    put(f"{bucket}/images/a/red image.png", png("red"))
    assert only_image("a/red image.png", roots(bucket)) == png("red")
    assert only_image("./a//red image.png", roots(bucket)) == png("red")
    assert only_image({"bytes": None, "path": "a/red image.png"}, roots(bucket)) == png("red")


def test_a_path_cannot_name_another_file_system(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    for path in (f"x::file://{tmp_path}/secret.png", f"a::local://{tmp_path}/secret.png"):
        with pytest.raises(RowError) as raised:
            only_image(path, roots(bucket))
        assert raised.value.reason == "image_missing"


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/secret.png", "a/.."])
def test_no_path_leaves_the_address(bucket: str, path: str) -> None:
    put(f"{bucket}/secret.png", png())
    with pytest.raises(RowError) as raised:
        only_image(path, roots(bucket))
    assert raised.value.reason == "image_outside_root"


def test_an_address_inside_a_row_is_still_not_fetched(bucket: str) -> None:
    put(f"{bucket}/images/a.png", png())
    with pytest.raises(RowError) as raised:
        only_image(f"{bucket}/images/a.png", roots(bucket))
    assert raised.value.reason == "image_address_not_fetched"


def test_a_missing_an_empty_and_a_large_image_are_matters_of_their_rows(bucket: str) -> None:
    put(f"{bucket}/images/empty.png", b"")
    put(f"{bucket}/images/large.png", bytes(10_001))
    put(f"{bucket}/images/fits.png", bytes(10_000))
    reasons = []
    for name in ("none.png", "large.png"):
        with pytest.raises(RowError) as raised:
            only_image(name, roots(bucket))
        reasons.append(raised.value.reason)
    assert reasons == ["image_missing", "image_too_large_bytes"]
    assert only_image("empty.png", roots(bucket)) == b""  # as from a disk: it is found unreadable when it is decoded
    assert len(only_image("fits.png", roots(bucket))) == 10_000


def test_a_store_that_fails_is_no_matter_of_a_row(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{bucket}/images/a.png", png())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(SourceError, match=r"cannot read the image 'a\.png' at s3://"):
        only_image("a.png", roots(bucket))


def test_an_address_of_the_local_disk_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RowError) as raised:
        only_image("link.png", ImageRoots.at_address(f"file://{tmp_path}/images"))
    assert raised.value.reason == "image_outside_root"


def test_the_folder_of_an_object_is_an_address_and_a_folder(bucket: str) -> None:
    put(f"{bucket}/data/rows.jsonl", b"")
    assert folder_address(f"{bucket}/data/rows.jsonl") == f"{bucket}/data"
    assert is_folder(f"{bucket}/data")
    assert not is_folder(f"{bucket}/none")


def test_a_source_at_an_address_finds_its_images_beside_it_or_below_its_image_root(bench: Bench, bucket: str) -> None:
    put(f"{bucket}/data/red.png", png("red"))
    put(f"{bucket}/pictures/lime.png", png("lime"))
    rows = [{"question": "q", "image": name} for name in ("red.png", "lime.png", "../pictures/lime.png")]
    address = put(f"{bucket}/data/rows.jsonl", lines(rows))
    beside = bench.read(address, columns={"images": "image"})
    below = bench.read(address, columns={"images": "image"}, image_root=f"{bucket}/pictures")
    assert (len(beside.samples), sorted(beside.reasons)) == (1, ["image_missing", "image_outside_root"])
    assert (len(below.samples), sorted(below.reasons)) == (1, ["image_missing", "image_outside_root"])
    assert beside.samples[0].images != below.samples[0].images


def test_local_rows_may_have_their_images_at_an_address(bench: Bench, bucket: str) -> None:
    put(f"{bucket}/pictures/lime.png", png("lime"))
    path = bench.lines({"question": "q", "image": "lime.png"})
    assert len(bench.read(path, columns={"images": "image"}, image_root=f"{bucket}/pictures").samples) == 1
    with pytest.raises(SourceError, match=f"image_root {bucket}/none is not a folder"):
        bench.read(path, columns={"images": "image"}, image_root=f"{bucket}/none")
