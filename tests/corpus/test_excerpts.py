"""The rows a report shows."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corpus.excerpts import SHARED_IMAGE_BYTES, evidence_sentence, pick_fates, pick_pairs, pick_rows, questions_of
from corpus.thumbnails import IMAGE_BYTES, thumbnail
from corpus.writer import write_fates, write_shards
from schemas.errors import CorpusError, StorageError
from schemas.fates import Exit
from schemas.rows import labelled_table
from schemas.samples import ImageRef, Topic


def write(world: Any, folder: Path, rows: list[Any]) -> None:
    write_shards([labelled_table(rows)], folder, shard_rows=7, read_image=world.read_image, recipe="r")


def opened(data_url: str | None) -> Image.Image:
    assert data_url is not None
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


@pytest.mark.parametrize(("think", "direct"), [(30, 3), (2, 30), (0, 0)])
def test_up_to_so_many_rows_of_each_mode_are_shown_thinking_ones_first(
    world: Any, tmp_path: Path, think: int, direct: int
) -> None:
    write(world, tmp_path, world.rows(think=think, direct=direct))
    modes = [row.mode for row in pick_rows(tmp_path, num_rows=10)]
    assert modes == ["think"] * min(think, 10) + ["direct"] * min(direct, 10)


def test_rows_of_a_rare_topic_source_and_answer_type_are_among_those_shown(world: Any, tmp_path: Path) -> None:
    rare = [world.row(900, topic=Topic.CODE), world.row(901, topic=None), world.row(902, source="rare")]
    write(world, tmp_path, [*world.rows(think=0, direct=40), *rare])
    shown = pick_rows(tmp_path, num_rows=4)
    assert {row.topic for row in shown} == {"math", "code", ""}
    assert {row.source for row in shown} == {"tests", "rare"}


def test_pictures_share_their_room_so_that_many_are_small(world: Any, tmp_path: Path) -> None:
    noise = [os.urandom(96 * 96 * 3) for _ in range(3)]
    for n, content in enumerate(noise):
        buffer = io.BytesIO()
        Image.frombytes("RGB", (96, 96), content).save(buffer, "PNG")
        world.store[f"noise{n}"] = buffer.getvalue()
    images = tuple(ImageRef(f"noise{n}", 96, 96) for n in range(3))
    rows = world.rows(think=60, direct=60)
    write(world, tmp_path, [replace(row, sample=replace(row.sample, images=images)) for row in rows])
    shown = [image for row in pick_rows(tmp_path) for image in row.images]
    assert len(shown) == 360 and None not in shown
    num_bytes = [len(base64.b64decode(str(image).partition(",")[2])) for image in shown]
    assert max(num_bytes) <= SHARED_IMAGE_BYTES // 360 < len(world.store["noise0"])


def test_the_same_rows_are_picked_however_they_are_sharded(world: Any, tmp_path: Path) -> None:
    rows = world.rows(think=25, direct=25)
    for name, shard_rows, order in (("a", 4, rows), ("b", 50, rows[::-1])):
        write_shards(
            [labelled_table(order)], tmp_path / name, shard_rows=shard_rows, read_image=world.read_image, recipe="r"
        )
    assert pick_rows(tmp_path / "a") == pick_rows(tmp_path / "b")


def test_a_shown_row_has_its_texts_its_evidence_and_its_first_images(world: Any, tmp_path: Path) -> None:
    row = world.row(1, colours=("red", "blue", "lime", "white"), choices=("6", "7"), answer="B")
    write_shards([labelled_table([row])], tmp_path, shard_rows=7, read_image=world.read_image, recipe="r")
    (shown_row,) = pick_rows(tmp_path)
    assert (shown_row.question, shown_row.choices, shown_row.answer) == (row.sample.question, ("6", "7"), "B")
    assert shown_row.evidence == "Performance heuristic: 1 of 8 scored answers right; 8 drawn."
    assert (len(shown_row.images), shown_row.num_images) == (3, 4)
    assert opened(shown_row.images[1]).convert("RGB").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"num_right": 0, "num_scored": 8, "num_sampled": 8, "is_audit": True},
            "0 of 8 scored answers right; 8 drawn (audit).",
        ),
        (
            {"num_right": 1, "num_scored": 2, "num_sampled": 4, "is_audit": False},
            "1 of 2 scored answers right, 2 unscored; 4 drawn.",
        ),
    ],
)
def test_evidence_of_the_performance_heuristic_is_a_sentence(record: dict[str, Any], sentence: str) -> None:
    assert evidence_sentence({"heuristic": "performance", **record}) == f"Performance heuristic: {sentence}"


def test_evidence_of_the_difficulty_heuristic_may_lack_a_probability() -> None:
    assert "probability 0.82" in evidence_sentence({"heuristic": "difficulty", "probability": 0.8199})
    assert "without a probability" in evidence_sentence({"heuristic": "difficulty", "probability": None})


def test_fates_of_every_reason_are_shown_before_a_second_of_one(world: Any, tmp_path: Path, dropped_fate: Any) -> None:
    fates = [dropped_fate(n) for n in range(20)] + [dropped_fate(100, "rare"), dropped_fate(101, "rarest")]
    write_fates(fates, tmp_path / "f.parquet")
    reasons = [s.fate.reason for s in pick_fates(tmp_path / "f.parquet", num_fates=4, read_image=world.read_image)]
    assert sorted(reasons[:3]) == ["near_duplicate", "rare", "rarest"] and reasons[3] == "near_duplicate"


def test_dropped_and_quarantined_fates_are_picked_apart(world: Any, tmp_path: Path, dropped_fate: Any) -> None:
    fates = [dropped_fate(n) for n in range(9)] + [replace(dropped_fate(50), exit=Exit.QUARANTINED, id=None)]
    write_fates(fates, tmp_path / "f.parquet")
    exits = [s.fate.exit for s in pick_fates(tmp_path / "f.parquet", num_fates=4, read_image=world.read_image)]
    assert exits == [Exit.DROPPED] * 4 + [Exit.QUARANTINED]


def test_a_duplicate_stands_beside_the_row_that_was_kept_or_that_left_later(
    world: Any, tmp_path: Path, dropped_fate: Any
) -> None:
    kept = world.row(500, question="Which one is kept?")
    write(world, tmp_path, [kept, *world.rows(think=3, direct=3)])
    red = world.image("red").sha256
    fates = [
        dropped_fate(1, resembles=kept.sample.id, similarity=0.9, images=(red,)),
        dropped_fate(2, resembles=f"{3:032x}", similarity=0.85),
        dropped_fate(3, "trace_too_short", question="It left later."),
        dropped_fate(4, resembles="f" * 32, similarity=0.95),
        dropped_fate(5, "leaks", resembles="benchmark:7", similarity=1.0),
    ]
    write_fates(fates, tmp_path / "f.parquet")
    pairs = pick_pairs(tmp_path, tmp_path / "f.parquet", read_image=world.read_image)
    # Nothing is known of the row that fate 4 resembles, and a benchmark's question is no row.
    assert [(pair.fate.similarity, pair.kept_question) for pair in pairs] == [
        (pytest.approx(0.85), "It left later."),
        (pytest.approx(0.9), "Which one is kept?"),
    ]
    assert len(pairs[1].images) == 1 and len(pairs[1].kept_images) == 1


def test_questions_of_rows_that_left_are_found_by_origin(tmp_path: Path, dropped_fate: Any) -> None:
    write_fates([dropped_fate(n, question=f"Question {n}?") for n in range(5)], tmp_path / "f.parquet")
    found = questions_of(tmp_path / "f.parquet", {"tests:file#d3", "tests:file#nowhere"})
    assert found == {"tests:file#d3": "Question 3?"}


def test_a_fate_whose_image_cannot_be_read_shows_the_gap(world: Any, tmp_path: Path, dropped_fate: Any) -> None:
    good = world.image("red")
    world.store["broken"] = b"\x89PNG\r\n\x1a\nnothing"
    write_fates([dropped_fate(1, images=(good.sha256, "absent", "broken"))], tmp_path / "f.parquet")
    (shown_fate,) = pick_fates(tmp_path / "f.parquet", read_image=world.read_image)
    assert shown_fate.images[0] is not None
    assert shown_fate.images[1:] == (None, None)


def test_a_thumbnail_is_small_in_pixels_and_bytes_even_for_noise() -> None:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (700, 500), os.urandom(700 * 500 * 3)).save(buffer, "PNG")
    url = thumbnail(buffer.getvalue())
    image = opened(url)
    assert max(image.size) <= 384
    assert len(base64.b64decode(str(url).partition(",")[2])) <= IMAGE_BYTES


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_image_has_a_thumbnail(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (500, 3)).save(buffer, "TIFF")
    assert opened(thumbnail(buffer.getvalue())).size == (384, 2)


def test_transparent_parts_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    assert opened(thumbnail(buffer.getvalue())).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_an_image_of_too_many_pixels_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    assert thumbnail(buffer.getvalue()) is None
    assert thumbnail(b"") is None


def test_a_damaged_file_is_named(tmp_path: Path, world: Any) -> None:
    path = tmp_path / "fates.parquet"
    with pytest.raises(StorageError, match=r"fates\.parquet"):
        pick_fates(path, read_image=world.read_image)
    path.write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(CorpusError, match=r"fates\.parquet"):
        pick_fates(path, read_image=world.read_image)
