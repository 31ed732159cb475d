"""The product as its users meet it: `datasets.load_dataset` on a version's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Image, List, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


def load(folder: Path, name: str | None, tmp_path: Path) -> Any:
    return load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"))


def test_all_three_configurations_load_with_decoded_images(build_version: Any, world: Any, tmp_path: Path) -> None:
    rows = [*world.rows(think=4, direct=2), world.row(77, colours=(), question="Two and five?")]
    folder = build_version(rows, is_whole=True).commit().folder
    think, direct = load(folder, "think", tmp_path), load(folder, "direct", tmp_path)
    everything = load(folder, None, tmp_path)
    assert (len(think), len(direct), len(everything)) == (4, 3, 7)
    assert sorted(everything["id"]) == sorted(row.sample.id for row in rows)
    assert set(think["mode"]) == {"think"} and set(direct["mode"]) == {"direct"}
    assert everything.features["images"] == List(Image())
    assert think[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert [image.getpixel((5, 3)) for image in direct[0]["images"]] == [(0, 0, 255), (0, 255, 0)]
    assert direct[2]["images"] == [] and direct[2]["prompt"][0]["content"][0]["text"] == "Two and five?"
    assert think[3]["completion"][0]["content"][0]["text"] == (
        "<think>\nThree and four make seven, says step 3.\n</think>7"
    )


@pytest.mark.parametrize(("think", "direct"), [(2, 0), (0, 2), (0, 0)])
def test_a_mode_without_rows_does_not_hinder_the_others_and_streams_as_empty(
    build_version: Any, world: Any, tmp_path: Path, think: int, direct: int
) -> None:
    # `datasets` itself refuses to load a split of no rows ("corresponds to no data") unless it is streamed.
    folder = build_version(world.rows(think=think, direct=direct), is_whole=True).commit().folder
    for name, num_rows in (("think", think), ("direct", direct), ("all", think + direct)):
        streamed = load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"), streaming=True)
        assert len(list(streamed)) == num_rows
        assert streamed.features["images"] == List(Image())
    if think + direct:
        assert len(load(folder, "all", tmp_path)) == think + direct


def test_the_link_latest_loads(build_version: Any, world: Any, tmp_path: Path) -> None:
    folder = build_version(world.rows(think=1, direct=1), is_whole=True).commit().folder
    assert len(load(folder.parent / "latest", "all", tmp_path)) == 2


def test_odd_text_survives_the_round_trip(build_version: Any, world: Any, tmp_path: Path) -> None:
    odd = "😀 \u202eעברית \x00\x1b[31m \u0301 C:\\n {{x}} </script> \r\n\t."
    folder = (
        build_version([world.row(1, question=odd, answer=odd, reasoning="so"), world.row(2)], is_whole=True)
        .commit()
        .folder
    )
    row = load(folder, "think", tmp_path)[0]
    assert (row["question"], row["answer"]) == (odd, odd)


def test_the_link_latest_loads_what_it_means_now(build_version: Any, world: Any, tmp_path: Path) -> None:
    """`datasets` caches a local folder under its name and card, whatever the files in it say."""
    first = build_version(world.rows(think=1, direct=1), is_whole=True).commit().folder
    assert len(load(first.parent / "latest", "all", tmp_path)) == 2
    second = build_version(world.rows(think=1, direct=2), is_whole=True).commit().folder
    assert first.parent == second.parent and first != second
    assert len(load(first.parent / "latest", "all", tmp_path)) == 3
    assert len(load(first.parent / "latest", "think", tmp_path)) == 1
