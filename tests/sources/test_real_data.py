"""MATH-Vision and GSM8K as they were published, when they stand beside the checkout."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from schemas.config import parse_config
from sources import ImageStore, plan_units, read_unit

DATA = Path(__file__).parents[2].parent / "shared/data"


def need(path: Path) -> str:
    if not path.exists():
        message = f"NOT TESTED on real data: {path} is not there"
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    return str(path)


def test_every_row_of_mathvision_becomes_a_sample(tmp_path: Path) -> None:
    path = need(DATA / "mathvision/problems.jsonl")
    columns = {"question": "question", "choices": "options", "answer": "answer", "images": "image", "id": "id"}
    source = {"name": "mathvision", "format": "jsonl", "path": path, "columns": columns, "topic": "math"}
    config = parse_config({"sources": [source], "shard_rows": 100})
    store = ImageStore(tmp_path, config.images)
    units = plan_units(config)
    results = [read_unit(unit, config, store) for unit in units]
    samples = [sample for kept, _ in results for sample in kept]
    assert [fate for _, fates in results for fate in fates] == []
    assert (len(units), len(samples), len({sample.id for sample in samples})) == (4, 304, 304)
    assert all(len(sample.images) == 1 and store.path(sample.images[0].sha256).is_file() for sample in samples)
    assert sum(bool(sample.choices) for sample in samples) == 190
    assert all(sample.answer in set("ABCDE") for sample in samples if sample.choices)
    assert not any("<image" in text for sample in samples for text in (sample.question, *sample.choices))


def test_every_row_of_gsm8k_becomes_a_sample_with_its_final_answer(tmp_path: Path) -> None:
    path = need(DATA / "gsm8k/train-1000.jsonl")
    source = {"name": "gsm8k", "format": "jsonl", "path": path, "columns": {"answer": "answer"}}
    config = parse_config({"sources": [{**source, "answer_pattern": "#### (.+)"}]})
    (unit,) = plan_units(config)
    samples, fates = read_unit(unit, config, ImageStore(tmp_path, config.images))
    assert (len(samples), fates) == (1000, [])
    assert samples[0].answer == "72"
    assert all(sample.answer and len(sample.answer) < 20 for sample in samples)
