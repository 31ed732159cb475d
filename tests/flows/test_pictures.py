"""Rows whose images are copies of one another: equal pixels, near copies, and pages that differ in one digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from filters.duplicates import EXACT, NEAR
from flows.removing import plan_duplicates, settle, settled_shards
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.shard_calls import RemoveRows
from flows.stages import DUPLICATES, Progress, read_source_shard
from flows.workspace import Marker
from sources import plan_units
from tests.filters.test_images import encoded, page_of_text, photo
from tests.flows.scripted_world import write_config

QUESTION = "What is to be seen in this picture?"


def runtime_with(tmp_path: Path, files: dict[str, bytes], answers: dict[str, str], **settings: Any) -> Runtime:
    """Returns a runtime whose rows ask one question of each image; two rows a shard."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    lines = []
    for name, image in files.items():
        (folder / name).write_bytes(image)
        lines.append(json.dumps({"id": name, "question": QUESTION, "image": name, "answer": answers.get(name)}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = write_config(tmp_path, folder / "rows.jsonl", "http://127.0.0.1:9/v1", shard_rows=2, duplicates=settings)
    return Runtime(load_run(str(config)))


def sources(runtime: Runtime) -> list[Marker]:
    return [read_source_shard(runtime, unit, Progress(0)) for unit in plan_units(runtime.config)]


def run(runtime: Runtime) -> dict[int, tuple[str, int]]:
    """Runs the stage and publishes it; returns (reason, row that stays) by the row that goes."""
    before = sources(runtime)
    settled = settled_shards(runtime, before)
    new = [marker for marker in before if marker.shard not in settled]
    plan = plan_duplicates(runtime, new, list(settled.values()))
    done = {
        marker.shard: RemoveRows(DUPLICATES, marker, plan.get(marker.shard), marker.output)(runtime, Progress(0))
        for marker in new
    }
    settle(runtime, before, [done.get(marker.shard) or settled[marker.shard] for marker in before])
    found = {}
    for marker in done.values():
        for fate in runtime.workspace.read_fates(marker.stage, marker.shard).to_pylist():
            number, kept = (origin.rsplit("#", 1)[1].split(",")[0] for origin in (fate["origin"], fate["detail"]))
            found[int(number)] = (fate["reason"], int(kept.split()[0]))
    return found


def test_copies_of_an_image_are_one_image(tmp_path: Path) -> None:
    images = {
        "a.png": encoded(photo(1)),
        "b.bmp": encoded(photo(1), "BMP"),
        "c.jpg": encoded(photo(1), "JPEG", quality=80),
        "d.png": encoded(photo(2)),
        "e.png": encoded(page_of_text()),
        "f.png": encoded(page_of_text("37")),
    }
    assert run(runtime_with(tmp_path, images, {"a.png": "noise"})) == {1: (EXACT, 0), 2: (NEAR, 0)}


def test_near_copies_with_other_answers_both_stay(tmp_path: Path) -> None:
    images = {"a.png": encoded(photo(1)), "b.jpg": encoded(photo(1), "JPEG", quality=80)}
    assert run(runtime_with(tmp_path, images, {"a.png": "a cat", "b.jpg": "a dog"})) == {}


def test_only_files_are_compared_if_so_configured(tmp_path: Path) -> None:
    images = {"a.png": encoded(photo(1)), "b.jpg": encoded(photo(1), "JPEG", quality=80)}
    assert run(runtime_with(tmp_path, images, {}, images="bytes")) == {}


def test_a_refresh_knows_the_pictures_of_published_rows(tmp_path: Path) -> None:
    images = {f"{seed}.png": encoded(photo(seed)) for seed in range(4)}
    assert run(runtime_with(tmp_path, images, {})) == {}
    images["copy.jpg"] = encoded(photo(3), "JPEG", quality=80)
    images["other.png"] = encoded(photo(9))
    images["again.jpg"] = encoded(photo(9), "JPEG", quality=80)
    images["more.png"] = encoded(photo(10))
    runtime = runtime_with(tmp_path, images, {})
    assert len(settled_shards(runtime, sources(runtime))) == 2
    assert run(runtime) == {4: (NEAR, 3), 6: (NEAR, 5)}


@pytest.mark.parametrize("name", ["pictures.published", "sums-00000.pictures"])
def test_damaged_fingerprints_are_told_or_made_again(tmp_path: Path, name: str) -> None:
    images = {f"{seed}.png": encoded(photo(seed)) for seed in range(2)}
    runtime = runtime_with(tmp_path, images, {})
    before = sources(runtime)
    plan_duplicates(runtime, before)
    path = runtime.workspace.root / "stages" / "duplicates" / name
    path.write_bytes(b"rubbish")
    if name.endswith("published"):
        with pytest.raises(Exception, match="delete it and run again"):
            plan_duplicates(runtime, before)
    else:
        plan_duplicates(runtime, before)
        assert path.read_bytes() != b"rubbish"
