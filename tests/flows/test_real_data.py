"""The flow on real data that stands beside the checkout: GSM8K and MATH-Vision with answers of real models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.curate import curate
from judges.prompts import prompt
from tests.flows.scripted_world import texts_of, write_config
from tests.replay_teacher import MathVisionReplay, ReplayTeacher

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.usefixtures("prefect"),
    pytest.mark.skipif(
        not DATA.is_dir(),
        reason=f"REAL DATA NOT TESTED: GSM8K and MATH-Vision do not stand beside the checkout ({DATA})",
    ),
]
Body = dict[str, Any]


class RealDataTeacher:
    """Replays MATH-Vision, solves every third GSM8K problem, and thinks with the worked solutions of GSM8K."""

    def __init__(self) -> None:
        self.vision = MathVisionReplay(DATA / "mathvision")
        lines = (DATA / "gsm8k" / "train-1000.jsonl").read_text("utf-8").splitlines()
        self.solutions = {row["question"]: row["answer"].split("####") for row in map(json.loads, lines)}
        self.order = {question: number for number, question in enumerate(self.solutions)}

    def __call__(self, body: Body) -> str:
        system, user = texts_of(body)
        if system == prompt("topic"):
            return "math"
        question = user.split("\n\nEnd with a line")[0]
        if body.get("_purpose") == "reasoning":
            worked, answer = self.solutions.get(question, ("No idea how this could be solved at all.", "unknown"))
            return f"<think>{worked}</think>Answer: {answer.strip()}"
        if question in self.solutions:
            is_solved = self.order[question] % 3 == 0
            return f"Answer: {self.solutions[question][1].strip()}" if is_solved else "Answer: -1"
        answer = self.vision(body)
        assert isinstance(answer, str)
        return answer


def test_real_rows_are_all_accounted_for_and_labelled_as_the_benchmark_marks_them(tmp_path: Path) -> None:
    sources = [
        {
            "name": "gsm8k",
            "format": "jsonl",
            "path": str(DATA / "gsm8k" / "train-1000.jsonl"),
            "answer_pattern": "#### (.+)",
            "columns": {"answer": "answer"},
            "topic": "math",
            "licence": "MIT",
        },
        {
            "name": "mathvision",
            "format": "jsonl",
            "path": str(DATA / "mathvision" / "problems.jsonl"),
            "columns": {"images": "image", "choices": "options", "answer": "answer", "id": "id"},
            "licence": "MIT",
        },
    ]
    with ReplayTeacher(RealDataTeacher(), models=["scripted"]) as teacher:
        config = write_config(
            tmp_path, tmp_path, teacher.url, sources=sources, shard_rows=400, performance={"exhaustive": True}
        )
        result = curate(str(config))
    stages = tmp_path / "work" / "stages"
    report = json.loads(Path(result["report"]).with_suffix(".json").read_text("utf-8"))
    assert report["summary"]["rows_in"] == 1304
    assert result["rows"] + pq.read_table(Path(result["corpus"], "fates.parquet")).num_rows == 1304
    _assert_marks_agree(stages / "performance")
    modes = Counter(
        row["mode"]
        for path in stages.glob("performance/gsm8k-*[0-9].parquet")
        for row in pq.read_table(path).to_pylist()
    )
    assert modes == {"direct": 334, "think": 666}
    assert len(teacher.calls) >= 8 * 1304


def _assert_marks_agree(folder: Path) -> None:
    """Asserts that the mode of each problem follows from the benchmark's own marks of the first eight answers.

    Where our verification disagrees with a mark, the disagreement is listed in tests/judges/answers with a word on who
    is right; only such problems may have another label.
    """
    recorded = [json.loads(line) for line in (DATA / "mathvision" / "responses.jsonl").read_text("utf-8").splitlines()]
    marked = {row["id"]: [response["correct"] for response in row["responses"][:8]] for row in recorded}
    listed_file = Path(__file__).parents[1] / "judges" / "answers" / "mathvision_disagreements.jsonl"
    listed = {json.loads(line)["id"] for line in listed_file.read_text("utf-8").splitlines()}
    rows = [row for path in folder.glob("mathvision-*[0-9].parquet") for row in pq.read_table(path).to_pylist()]
    fates = [row for path in folder.glob("mathvision-*.fates.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) + len(fates) == 304
    assert not fates, f"rows without a label: {[(fate['origin'], fate['detail']) for fate in fates]}"
    wrong = {
        row["source_id"]
        for row in rows
        if (row["mode"] == "think") != (not any(marked[row["source_id"]])) and row["source_id"] not in listed
    }
    assert not wrong, f"labels that the marks contradict: {wrong}"
