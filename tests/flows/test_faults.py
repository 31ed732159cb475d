"""Curations under faults (`python -m benchmarks.faults` is the long one), and that the comparison sees what it must."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import (
    AS_SAID,
    CUT,
    FOREIGN,
    OFF_SCHEMA,
    REASONS,
    Comparison,
    Outcome,
    compare_rows,
    compare_runs,
    reply_kind,
)
from schemas.requests import Message, Reply, Sampling
from teacher.journal import JournalRecord

LABEL = {
    "mode": "direct",
    "heuristic": "performance",
    "num_right": 1,
    "num_scored": 1,
    "num_sampled": 1,
    "probability": None,
    "is_audit": False,
    "answer": "7",
    "reasoning": "",
}


def test_under_faults_a_row_has_its_label_or_is_quarantined_for_a_stated_reason(tmp_path: Path) -> None:
    compared = compare_runs(tmp_path, num_rows=60, share=0.2, seed=0, timeout_seconds=1.0)
    assert compared.wrong == []
    assert compared.replies[FOREIGN] == 0 and compared.replies[AS_SAID] > 100
    assert compared.faults.total() > 0.1 * compared.num_calls
    assert compared.quarantined.keys() <= REASONS
    assert compared.num_same > 40


def test_a_row_that_kills_the_engine_is_asked_three_times_and_harms_no_other(tmp_path: Path) -> None:
    compared = compare_runs(tmp_path, num_rows=60, share=0.0, seed=0, restart_calls=())
    assert compared.wrong == []
    assert compared.quarantined == Counter(teacher_crashed=1)
    assert compared.num_same == compared.num_rows - 1
    assert compared.num_poisoned_calls == 3


def record(text: str, finish_reason: str = "stop", *, purpose: str = "performance", **changes: Any) -> JournalRecord:
    """Returns a stored reply about card 1, which the teacher knows; with this seed nothing is cut."""
    messages = (Message("user", "Card 1 shows 3 and 7. What is their sum?"),)
    reply = Reply(text, finish_reason, "cards")
    return JournalRecord("0" * 64, purpose, "s", 0, reply, seed=5, messages=messages, sampling=Sampling(), **changes)


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (record("I look at it.\nAnswer: 10"), AS_SAID),
        (record("I look at", "length"), CUT),
        (record("Answer: 11", "length"), FOREIGN),
        (record("I look at"), FOREIGN),
        (record("<html>"), FOREIGN),
        (record(""), FOREIGN),
        (record("no", purpose="difficulty", choices=("yes", "no")), AS_SAID),
        (record("neither yes nor no", purpose="difficulty", choices=("yes", "no")), OFF_SCHEMA),
        (record("yes", purpose="difficulty", choices=("yes", "no")), FOREIGN),
    ],
)
def test_a_reply_is_held_against_the_teachers_own_word(stored: JournalRecord, kind: str) -> None:
    assert reply_kind(stored) == kind


@pytest.mark.parametrize(
    ("after", "is_touched"),
    [
        (LABEL | {"mode": "think"}, True),
        (LABEL | {"answer": "8"}, True),
        (LABEL | {"num_sampled": 2}, False),
        (("dropped", "teacher_rejected"), True),
        (("quarantined", "performance_unscored"), True),
    ],
)
def test_a_changed_label_or_an_unstated_fate_is_a_violation(after: Any, is_touched: bool) -> None:
    labels, fates = ({}, {"a": after}) if isinstance(after, tuple) else ({"a": after}, {})
    compared = Comparison()
    compare_rows(Outcome({"a": LABEL}, {}), Outcome(labels, fates), {"a"} if is_touched else set(), compared)
    assert len(compared.wrong) == 1 and compared.num_same == compared.num_other_evidence == 0


def test_a_row_that_is_lost_is_a_violation() -> None:
    compared = Comparison()
    compare_rows(Outcome({"a": LABEL}, {}), Outcome({}, {}), set(), compared)
    assert compared.wrong == ["a is in one of the runs only"]


def test_other_samples_may_speak_for_a_label_where_a_fault_lasted() -> None:
    compared = Comparison()
    compare_rows(Outcome({"a": LABEL}, {}), Outcome({"a": LABEL | {"num_sampled": 2}}, {}), {"a"}, compared)
    assert (compared.wrong, compared.num_other_evidence) == ([], 1)
