"""Replies are found again wherever their rows come to lie, and only those."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cards import curate_plainly
from flows.run_config import load_run
from teacher.replies import scan_rows
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher


@pytest.fixture
def teacher() -> Any:
    with ReplayTeacher(scripted_answer, models=["scripted"]) as server:
        yield server


def test_rows_in_another_order_and_other_shards_cost_no_call(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in", 24)
    config = load_run(str(write_config(tmp_path, questions, teacher.url, shard_rows=10)))
    curate_plainly(config)
    num_calls = len(teacher.calls)
    lines = questions.read_text(encoding="utf-8").splitlines()
    random.Random(7).shuffle(lines)
    questions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    again = curate_plainly(load_run(str(write_config(tmp_path, questions, teacher.url, shard_rows=7))))
    assert len(teacher.calls) == num_calls
    assert not again.is_new


def test_a_file_that_comes_before_the_others_moves_their_rows_and_only_its_own_are_asked(
    tmp_path: Path, teacher: ReplayTeacher
) -> None:
    questions = write_questions(tmp_path / "in", 24)
    path = write_config(tmp_path, questions.with_name("*.jsonl"), teacher.url, shard_rows=10)
    curate_plainly(load_run(str(path)))
    row = {"id": "first", "question": "What is the sum of 40 and 41?", "answer": "81"}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    num_calls = len(teacher.calls)
    published = curate_plainly(load_run(str(path)))
    assert published.changes.num_added == 1
    assert 1 <= len(teacher.calls) - num_calls <= 9 and teacher.num_repeated == 0


def test_every_stored_reply_is_found_by_its_row(tmp_path: Path, teacher: ReplayTeacher) -> None:
    config = load_run(str(write_config(tmp_path, write_questions(tmp_path / "in", 12), teacher.url, shard_rows=5)))
    curate_plainly(config)
    found = scan_rows(tmp_path / "work" / "journals" / "performance").unique().collect()
    assert found["journal"].n_unique() == 3
    assert found["sample_id"].n_unique() == found.height
