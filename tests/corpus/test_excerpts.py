"""The rows a report shows."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corpus.excerpts import IMAGE_BYTES, evidence_sentence, pick_fates, pick_rows, thumbnail
from corpus.writer import write_fates, write_shards
from schemas.errors import CorpusError, StorageError
from schemas.rows import labelled_table


def shown(world: Any, folder: Path, *, think: int, direct: int) -> list[str]:
    write_shards(
        [labelled_table(world.rows(think=think, direct=direct))],
        folder,
        shard_rows=7,
        read_image=world.read_image,
        recipe="r",
    )
    return [row.mode for row in pick_rows(folder)]


def opened(data_url: str | None) -> Image.Image:
    assert data_url is not None
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


@pytest.mark.parametrize(
    ("think", "direct", "expected"),
    [(30, 30, (10, 10)), (3, 30, (3, 17)), (30, 2, (18, 2)), (4, 5, (4, 5)), (0, 0, (0, 0)), (30, 0, (20, 0))],
)
def test_both_modes_are_shown_and_one_makes_room_for_the_other(
    world: Any, tmp_path: Path, think: int, direct: int, expected: tuple[int, int]
) -> None:
    modes = shown(world, tmp_path, think=think, direct=direct)
    assert (modes.count("think"), modes.count("direct")) == expected
    assert modes == sorted(modes, reverse=True)


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
    assert reasons == ["near_duplicate", "rare", "rarest", "near_duplicate"]


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
