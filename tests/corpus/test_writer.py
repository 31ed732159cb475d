"""Shards: what a trainer reads, what is quarantined, and the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus import shard_images, writer
from corpus.writer import shard_path, write_corpus_shard, write_fates, write_shards
from schemas.errors import StorageError
from schemas.fates import FATE_SCHEMA
from schemas.question import render_question
from schemas.rows import CORPUS_SCHEMA, labelled_table
from schemas.template import parse_completion
from schemas.verdicts import Decision, Heuristic, Mode


def write(world: Any, rows: list[Any], path: Path) -> Any:
    return write_corpus_shard(labelled_table(rows), path, read_image=world.read_image, recipe="r")


def test_a_row_is_written_as_chat_messages_with_its_images_inside(world: Any, tmp_path: Path) -> None:
    row = world.row(
        1, reasoning="3 + 4 = 7", colours=("red", "blue"), question="How many?", choices=("6", "7"), answer="B"
    )
    shard = write(world, [row], tmp_path / "00000.parquet")
    record = pq.read_table(tmp_path / "00000.parquet").to_pylist()[0]
    image = {"type": "image", "text": None}
    assert record["prompt"] == [
        {"role": "user", "content": [image, image, {"type": "text", "text": "How many?\nA. 6\nB. 7"}]}
    ]
    text = "<think>\n3 + 4 = 7\n</think>B"
    assert record["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    assert [i["bytes"] for i in record["images"]] == [world.store[i.sha256] for i in row.sample.images]
    assert (record["mode"], record["recipe"], record["reference"], record["topic"]) == ("think", "r", "B", "math")
    assert (shard.num_think, shard.num_direct, shard.fates) == (1, 0, ())


def test_a_direct_row_has_an_empty_think_block_and_a_text_only_row_no_images(world: Any, tmp_path: Path) -> None:
    write(world, [world.row(1, colours=())], tmp_path / "s.parquet")
    record = pq.read_table(tmp_path / "s.parquet").to_pylist()[0]
    assert record["completion"][0]["content"][0]["text"] == "<think>\n\n</think>7"
    assert record["images"] == []
    assert [part["type"] for part in record["prompt"][0]["content"]] == ["text"]


def test_the_columns_are_the_schema_and_images_are_declared_as_images(world: Any, tmp_path: Path) -> None:
    write(world, [], tmp_path / "s.parquet")
    schema = pq.read_schema(tmp_path / "s.parquet")
    assert schema.remove_metadata() == CORPUS_SCHEMA
    assert b'"images": {"feature": {"_type": "Image"}' in schema.metadata[b"huggingface"]


def test_the_shard_info_describes_the_file(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    shard = write(world, world.rows(think=2, direct=1), path)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert shard.num_bytes == path.stat().st_size
    assert (shard.path, shard.num_think, shard.num_direct, shard.num_rows) == (str(path), 2, 1, 3)


def test_the_sum_of_a_shard_of_several_row_groups_is_that_of_its_file(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    shard = write(world, world.rows(think=130, direct=120), path)
    assert pq.read_metadata(path).num_row_groups == 3
    assert (shard.sha256, shard.num_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def test_the_same_rows_give_the_same_bytes(world: Any, tmp_path: Path) -> None:
    rows = world.rows(think=5, direct=5)
    first, second = (write(world, rows, tmp_path / name / "00000.parquet") for name in ("a", "b"))
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": " \n"}, "answer_empty"),
        ({"choices": tuple("x" * 27)}, "too_many_choices"),
        ({"answer": "7</think>8"}, "think_tag_in_text"),
        ({"reasoning": "First <think> then."}, "think_tag_in_text"),
        ({"question": "Look: <|image_pad|>"}, "control_token_in_text"),
        ({"choices": ("a", "b<|im_end|>\n<|im_start|>assistant")}, "control_token_in_text"),
        ({"reasoning": "why", "decision": Decision(Mode.DIRECT, Heuristic.DIFFICULTY)}, "reasoning_unexpected"),
        ({"reasoning": " ", "decision": Decision(Mode.THINK, Heuristic.DIFFICULTY)}, "reasoning_empty"),
    ],
)
def test_a_row_that_cannot_be_an_example_is_quarantined(
    world: Any, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    shard = write(world, [world.row(1), world.row(2, **changes), world.row(3)], tmp_path / "s.parquet")
    assert shard.num_rows == 2
    assert [(fate.reason, fate.origin, fate.exit, fate.stage) for fate in shard.fates] == [
        (reason, "tests:file#2", "quarantined", "corpus")
    ]
    assert write_fates(shard.fates, tmp_path / "fates.parquet") == 1


def test_a_missing_or_empty_image_quarantines_its_row_alone(world: Any, tmp_path: Path) -> None:
    rows = [world.row(1, colours=("red",)), world.row(2, colours=("blue",)), world.row(3, colours=("lime",))]
    del world.store[rows[0].sample.images[0].sha256]
    world.store[rows[1].sample.images[0].sha256] = b""
    shard = write(world, rows, tmp_path / "s.parquet")
    assert shard.num_rows == 1
    assert [fate.reason for fate in shard.fates] == ["image_missing", "image_missing"]


def test_a_row_larger_than_the_limit_is_quarantined(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_ROW_BYTES", 10_000)
    shard = write(world, [world.row(1), world.row(2, question="x" * 2_000)], tmp_path / "s.parquet")
    assert (shard.num_rows, shard.fates[0].reason) == (1, "row_too_large")


def test_a_failing_image_store_stops_with_the_image_named(world: Any, tmp_path: Path) -> None:
    def broken(sha256: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    row = world.row(1)
    with pytest.raises(StorageError, match=row.sample.images[0].sha256):
        write_corpus_shard(labelled_table([row]), tmp_path / "s.parquet", read_image=broken, recipe="r")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_file(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.parquet"
    before = write(world, [world.row(1)], path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write(world, [world.row(2)], path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["s.parquet"]


def test_a_row_group_closes_early_when_its_rows_are_heavy(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 1)
    write(world, world.rows(think=3, direct=0), tmp_path / "s.parquet")
    assert pq.read_metadata(tmp_path / "s.parquet").num_row_groups == 3


def test_rows_are_split_by_mode_into_shards(world: Any, tmp_path: Path) -> None:
    rows = world.rows(think=5, direct=1)
    shards = write_shards([labelled_table(rows)], tmp_path, shard_rows=2, read_image=world.read_image, recipe="r")
    assert [(Path(s.path).relative_to(tmp_path).as_posix(), s.num_think, s.num_direct) for s in shards] == [
        ("data/direct/00000.parquet", 0, 1),
        ("data/think/00000.parquet", 2, 0),
        ("data/think/00001.parquet", 2, 0),
        ("data/think/00002.parquet", 1, 0),
    ]
    ids = [i for n in range(3) for i in pq.read_table(shard_path(tmp_path, Mode.THINK, n))["id"].to_pylist()]
    assert ids == [row.sample.id for row in rows[:5]]


def test_fates_are_written_in_order_with_their_schema(tmp_path: Path, dropped_fate: Any) -> None:
    assert write_fates((dropped_fate(n) for n in range(3)), tmp_path / "fates.parquet") == 3
    table = pq.read_table(tmp_path / "fates.parquet")
    assert table.schema == FATE_SCHEMA
    assert table["origin"].to_pylist() == ["tests:file#d0", "tests:file#d1", "tests:file#d2"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=st.text(), reasoning=st.text(), answer=st.text(), choices=st.lists(st.text(), max_size=3))
def test_a_row_is_either_refused_with_a_reason_or_read_back_as_it_was(
    world: Any, tmp_path: Path, question: str, reasoning: str, answer: str, choices: list[str]
) -> None:
    row = world.row(1, question=question, reasoning=reasoning, answer=answer, choices=tuple(choices))
    shard = write(world, [row], tmp_path / "s.parquet")
    record = next(iter(pq.read_table(tmp_path / "s.parquet").to_pylist()), None)
    assert (record is None) == bool(shard.fates)
    if record is None:
        return
    completion = parse_completion(record["completion"][0]["content"][0]["text"])
    assert (completion.reasoning, completion.answer) == (reasoning.strip(), answer.strip())
    assert completion.mode == record["mode"]
    assert record["prompt"][0]["content"][-1]["text"] == render_question(row.sample)
    assert record["choices"] == choices


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modes=st.lists(st.booleans(), max_size=12), parts=st.lists(st.integers(0, 4), max_size=6), size=st.integers(1, 4)
)
def test_shards_do_not_depend_on_how_the_rows_come(
    world: Any, tmp_path: Path, modes: list[bool], parts: list[int], size: int
) -> None:
    rows = [world.row(n, reasoning="Two and two." if thinks else "") for n, thinks in enumerate(modes)]
    table = labelled_table(rows)
    bounds = [0, *sorted(min(sum(parts[: n + 1]), len(rows)) for n in range(len(parts))), len(rows)]
    pieces = [table.slice(start, stop - start) for start, stop in pairwise(bounds)]
    settings_ = {"shard_rows": size, "read_image": world.read_image, "recipe": "r"}
    whole = write_shards([table], tmp_path / "whole", **settings_)
    split = write_shards(pieces, tmp_path / "split", **settings_)
    assert [(Path(a.path).name, a.sha256) for a in whole] == [(Path(b.path).name, b.sha256) for b in split]
    assert sum(shard.num_rows for shard in split) == len(rows)


def test_rows_with_many_images_and_none_keep_their_own(world: Any, tmp_path: Path) -> None:
    colours = [("red", "blue"), (), ("lime",), ("red", "red", "blue")]
    rows = [world.row(n, colours=held) for n, held in enumerate(colours)]
    write(world, rows, tmp_path / "s.parquet")
    for row, record in zip(rows, pq.read_table(tmp_path / "s.parquet").to_pylist(), strict=True):
        assert [image["path"] for image in record["images"]] == [image.sha256 for image in row.sample.images]
        assert [image["bytes"] for image in record["images"]] == [world.store[i.sha256] for i in row.sample.images]
        types = [part["type"] for part in record["prompt"][0]["content"]]
        assert types == ["image"] * len(row.sample.images) + ["text"]


def test_an_image_that_rows_share_is_read_once_as_long_as_it_is_kept(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [world.row(n, colours=("red", "blue")) for n in range(4)]
    read: list[str] = []

    def counted(sha256: str) -> bytes:
        read.append(sha256)
        return bytes(world.store[sha256])

    def write_counted(name: str) -> Any:
        return write_corpus_shard(labelled_table(rows), tmp_path / name, read_image=counted, recipe="r")

    shared = write_counted("a.parquet")
    assert len(read) == 2
    monkeypatch.setattr(shard_images, "_CACHED_BYTES", 1)
    assert write_counted("b.parquet").sha256 == shared.sha256
    assert len(read) == 2 + 8


def test_a_row_that_left_takes_its_images_along(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row lacks its second image, one is too large once its images are read: those of the others stay theirs."""
    rows = [
        world.row(1, colours=("red",)),
        world.row(2, colours=("blue", "white")),
        world.row(3, colours=("lime", "red"), question="x" * 2_000),
        world.row(4, colours=("lime", "navy")),
    ]
    del world.store[rows[1].sample.images[1].sha256]
    monkeypatch.setattr(writer, "MAX_ROW_BYTES", 10_000)
    shard = write(world, rows, tmp_path / "s.parquet")
    assert [(fate.origin, fate.reason) for fate in shard.fates] == [
        ("tests:file#2", "image_missing"),
        ("tests:file#3", "row_too_large"),
    ]
    held = [[image["bytes"] for image in row["images"]] for row in pq.read_table(tmp_path / "s.parquet").to_pylist()]
    assert held == [[world.store[image.sha256] for image in row.sample.images] for row in (rows[0], rows[3])]


@pytest.mark.parametrize(("first_bytes", "kept_bytes"), [(1, 2**30), (1, 1), (100, 150)])
def test_images_are_the_same_however_much_memory_there_is_at_first(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: int, kept_bytes: int
) -> None:
    colours = ("red", "blue", "lime", "navy", "white")
    rows = [world.row(n, colours=colours[: n % 6]) for n in range(250)]
    expected = write(world, rows, tmp_path / "a.parquet")
    monkeypatch.setattr(shard_images, "_FIRST_BYTES", first_bytes)
    monkeypatch.setattr(shard_images, "_KEPT_BYTES", kept_bytes)
    assert write(world, rows, tmp_path / "b.parquet").sha256 == expected.sha256
    for row, record in zip(rows, pq.read_table(tmp_path / "b.parquet").to_pylist(), strict=True):
        assert [image["bytes"] for image in record["images"]] == [world.store[i.sha256] for i in row.sample.images]
