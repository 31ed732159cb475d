"""Odd texts and images through the sources and the duplicates stage: no crash, no lost row, each with its outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from filters.duplicates import EXACT
from flows.removing import plan_duplicates
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.shard_calls import RemoveRows
from flows.stages import DUPLICATES, Progress, read_source_shard
from flows.workspace import Marker
from sources import plan_units
from tests.filters.test_images import animated, encoded, photo
from tests.flows.scripted_world import write_config

CMYK = encoded(photo(3).convert("CMYK"), "JPEG")
BROKEN = encoded(photo(4))[:200]

ROWS: dict[str, tuple[Any, bytes | None, str | None]] = {
    "empty": ("", None, "question_empty"),
    "blank": (" \t\n", None, "question_empty"),
    "null question": (None, None, "question_missing"),
    "one word": ("Why?", None, None),
    "the same word": (" why ?", None, EXACT),
    "a megabyte of one word": ("a" * 2**20, None, "question_too_long"),
    "emoji": ("What does 👩‍👩‍👧 mean beside 👍🏽?", None, None),
    "right to left": ("ما هو لون السيارة في الصورة؟", None, None),
    "right to left, marked": ("\u200fما هو لون السيارة في الصورة؟\u200f", None, EXACT),
    "precomposed": ("Où est le café près de l'hôtel?", None, None),
    "combining": ("Ou\u0300 est le cafe\u0301 pre\u0300s de l'ho\u0302tel?", None, EXACT),
    "null image": ("What is this thing here?", None, EXACT),
    "no image": ("What is this thing here?", None, None),
    "animated": ("What is this thing here?", animated(), None),
    "cmyk": ("What is this thing here?", CMYK, None),
    "broken image": ("What is this thing here?", BROKEN, "image_unreadable"),
    "empty image": ("What is this thing here?", b"", "image_unreadable"),
    "null character": ("What\x00 is in the box?", None, None),
}
"""By name: question, image and the reason for which the row leaves; of equal rows either may go."""


@pytest.mark.parametrize("shard_rows", [1, 7, 1000])
def test_odd_rows_are_all_accounted_for(tmp_path: Path, shard_rows: int) -> None:
    lines = []
    for number, (name, (question, image, _)) in enumerate(ROWS.items()):
        row = {"id": name, "question": question, "answer": None, "image": None if image is None else f"{number}.img"}
        if image is not None:
            (tmp_path / f"{number}.img").write_bytes(image)
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = write_config(tmp_path, tmp_path / "rows.jsonl", "http://127.0.0.1:9/v1", shard_rows=shard_rows)
    runtime = Runtime(load_run(str(path)))
    before = [read_source_shard(runtime, unit, Progress(0)) for unit in plan_units(runtime.config)]
    done = removed(runtime, before)
    left: dict[str, str] = {}
    names = list(ROWS)
    for marker in [*before, *done]:
        for fate in runtime.workspace.read_fates(marker.stage, marker.shard).to_pylist():
            left[names[int(fate["origin"].rsplit("#", 1)[1])]] = fate["reason"]
    assert sum(marker.count.num_kept for marker in done) + len(left) == len(ROWS)
    pairs = [("one word", "the same word"), ("right to left", "right to left, marked"), ("precomposed", "combining")]
    for one, other in [*pairs, ("no image", "null image")]:
        assert len({one, other} & set(left)) == 1, "one of two equal rows goes"
        assert {left.pop(name) for name in (one, other) if name in left} == {EXACT}
    expected = {name: reason for name, (_, _, reason) in ROWS.items() if reason not in (None, EXACT)}
    assert left == expected


def removed(runtime: Runtime, before: list[Marker]) -> list[Marker]:
    """Removes the duplicates among some shards; returns their markers."""
    plan = plan_duplicates(runtime, before)
    return [RemoveRows(DUPLICATES, marker, plan.get(marker.shard), "")(runtime, Progress(0)) for marker in before]


def test_a_large_group_of_equal_rows_leaves_one(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    row = json.dumps(
        {"id": None, "answer": None, "question": "What colour is the whole of this picture?", "image": "red.png"}
    )
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3000, encoding="utf-8")
    path = write_config(tmp_path, tmp_path / "rows.jsonl", "http://127.0.0.1:9/v1", shard_rows=700)
    runtime = Runtime(load_run(str(path)))
    before = [read_source_shard(runtime, unit, Progress(0)) for unit in plan_units(runtime.config)]
    kept = [marker.count.num_kept for marker in removed(runtime, before)]
    assert sum(kept) == sum(marker.count.num_kept for marker in before) - 2999
    assert kept[0] == 1, "the first of copies stays"
