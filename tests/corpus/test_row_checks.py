"""The rules of a row: each of them broken by one changed value."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from corpus.row_checks import row_problems
from corpus.writer import write_corpus_shard
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, Kind
from schemas.verdicts import Decision, Heuristic, Mode
from tests.corpus.small_versions import IMAGES, RECIPE, a_row


def record(**row: Any) -> dict[str, Any]:
    """Returns the record of a row as the writer writes it."""
    return written(a_row(1, **row))


def written(row: LabelledSample) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.parquet")
        write_corpus_shard(labelled_table([row]), path, read_image=IMAGES.__getitem__, recipe=RECIPE)
        return dict(pq.read_table(path).to_pylist()[0])


def codes(changed: dict[str, Any]) -> list[str]:
    return [problem.code for problem in row_problems(changed, recipe=RECIPE)]


OPEN = {"kind": Kind.SUBJECTIVE, "answer_type": AnswerType.OPEN, "answer": None}


@pytest.mark.parametrize(
    "row",
    [
        {"thinks": True},
        {"thinks": False},
        {"thinks": True, **OPEN},
        {"thinks": False, **OPEN},
        {"images": ()},
        {"choices": ("6", "7"), "answer": "B", "answer_type": AnswerType.CHOICE},
        {"question": "<script>alert(1)</script> <b>how many</b> dots &amp; lines?"},
        {"question": "كم عدد النقاط في الصورة؟ \u202eمرحبا"},
        {"question": "dots " * 2_000_000},
        {"topic": None, "licence": None, "source_id": None},
    ],
    ids=[
        "think",
        "direct",
        "open think",
        "open direct",
        "no image",
        "choice",
        "html",
        "right to left",
        "10 MB",
        "bare",
    ],
)
def test_a_row_as_the_pipeline_writes_it_has_no_problem(row: dict[str, Any]) -> None:
    assert row_problems(record(**row), recipe=RECIPE) == []


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"completion": said("<think>\n\n</think>8")}, "completion_differs"),
        ({"completion": said("7")}, "completion_differs"),
        ({"completion": []}, "completion_differs"),
        ({"answer": " 7"}, "text_not_stripped"),
        ({"answer": ""}, "answer_empty"),
        ({"answer": "</think>7"}, "think_tag_in_text"),
        ({"reasoning": "Three and four make seven."}, "reasoning_unexpected"),
        ({"mode": "think"}, "reasoning_empty"),
        ({"mode": "auto"}, "value_unknown"),
        ({"topic": "cats"}, "value_unknown"),
        ({"kind": None}, "value_missing"),
        ({"id": None}, "value_missing"),
        ({"id": "0" * 32}, "id_differs"),
        ({"reference": "8"}, "id_differs"),
        ({"question": "How many dots?"}, "prompt_differs"),
        ({"question": "<|im_start|>system"}, "control_token_in_text"),
        ({"num_right": 0}, "mode_differs"),
        ({"num_right": 9}, "evidence_impossible"),
        ({"num_scored": 0, "num_right": 0}, "evidence_impossible"),
        ({"probability": 0.5}, "evidence_impossible"),
        ({"heuristic": "difficulty"}, "heuristic_differs"),
        ({"recipe": "other"}, "recipe_differs"),
        ({"images": [{"bytes": b"\x89PNG", "path": "ab" * 32}]}, "image_altered"),
        ({"images": [{"bytes": None, "path": "ab" * 32}]}, "image_missing"),
        ({"images": []}, "prompt_differs"),
        ({"choices": ["6", None]}, "choices_impossible"),
        ({"choices": ["6"] * 27}, "choices_impossible"),
        ({"choices": ["6", "7"]}, "prompt_differs"),
        ({"prompt": [None]}, "prompt_differs"),
    ],
)
def test_a_changed_value_is_found(change: dict[str, Any], found: str) -> None:
    assert found in codes(record() | change)


def test_an_image_more_or_less_than_the_prompt_announces_is_found() -> None:
    row = record()
    twice = row | {"images": row["images"] * 2}
    assert "prompt_differs" in codes(twice)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_is_a_number_between_0_and_1(probability: float) -> None:
    assert "evidence_impossible" in codes(record(**OPEN) | {"probability": probability})


def test_an_open_row_has_no_samples() -> None:
    row = replace(a_row(1, **OPEN), decision=Decision(Mode.DIRECT, Heuristic.DIFFICULTY, 1, 1, 1, probability=0.1))
    assert codes(written(row)) == ["evidence_impossible"]


def test_a_long_value_is_shortened_in_what_is_said_about_it() -> None:
    (problem,) = (p for p in row_problems(record() | {"id": "x" * 10_000}, recipe=RECIPE) if p.code == "id_differs")
    assert len(problem.detail) < 300
