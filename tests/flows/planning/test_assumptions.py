"""Assumptions: ranges with a source, and how they are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.assumptions import NUM_DRAWS, Assumption, Assumptions, Range


@given(st.lists(st.floats(0, 1e12), min_size=3, max_size=3).map(sorted), st.integers(0, 9))
def test_draws_lie_within_the_range_half_of_them_below_the_expected_value(bounds: list[float], seed: int) -> None:
    low, expected, high = bounds
    values = Assumption(low, expected, high, "", "", "x").drawn(seed)
    assert values.shape == (1 + NUM_DRAWS,) and values[0] == expected
    assert values.min() >= low and values.max() <= high
    assert (values[1:] <= expected).sum() >= 0.4 * NUM_DRAWS


def test_what_is_drawn_depends_on_name_and_seed_alone() -> None:
    one = Assumption(1, 2, 3, "", "", "one")
    assert np.array_equal(one.drawn(), Assumption(1, 2, 3, "other unit", "", "one").drawn())
    assert not np.array_equal(one.drawn(), one.drawn(1))
    assert abs(np.corrcoef(one.drawn()[1:], Assumption(1, 2, 3, "", "", "two").drawn()[1:])[0, 1]) < 0.2


def test_a_range_holds_nine_tenths_of_the_draws_and_always_the_expected_value() -> None:
    assert Range.of(np.concatenate([[50.0], np.arange(101.0)])) == Range(5.0, 50.0, 95.0)
    assert Range.of(np.array([7.0, 1.0, 1.0])) == Range(1.0, 7.0, 7.0)


def test_every_assumption_has_its_name_unit_and_source() -> None:
    assumptions = Assumptions()
    names = [each.name for each in assumptions]
    assert len(set(names)) == len(names) and all(getattr(assumptions, name).name == name for name in names)
    assert all(each.unit and each.source for each in assumptions)


def test_shares_of_topics_are_those_of_the_papers_table() -> None:
    assumptions = Assumptions()
    # Math, code, chart, OCR, grounding, knowledge: 6,478,648 direct rows and 3,804,989 that reason, of 16,366,767.
    assert assumptions.objective_share.expected == pytest.approx(10_283_637 / 16_366_767)
    assert assumptions.thinking_objective_share.expected == pytest.approx(3_804_989 / 10_283_637)
    assert assumptions.text_only_share.expected == pytest.approx(2_065_961 / 16_366_767)


def test_rates_that_were_measured_lie_within_what_is_assumed() -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "results" / "planning_rates.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    stages, prefect, assumed = recorded["stages"], recorded["prefect"], Assumptions()
    performance, call_ms = stages["performance"], stages["routing"]["ms_a_call"]
    measured = {
        "read_ms": stages["sources"]["ms_a_row"],
        "picture_ms": stages["duplicates"]["ms_a_row"],  # each row has a picture of its own
        "call_ms": call_ms,
        "verify_ms": (performance["ms_a_call"] - call_ms) * performance["calls"] / performance["replies"],
        "publish_ms": stages["corpus"]["ms_a_row"],
        "feature_bytes": stages["duplicates"]["stage_bytes_a_row"],
        "reply_bytes": performance["journal_bytes_a_reply"],
        "task_ms": 1000 * prefect["task_seconds"],
        "database_bytes": prefect["task_bytes"],
    }
    for name, value in measured.items():
        assumption = getattr(assumed, name)
        assert assumption.low <= value <= assumption.high, name


def test_a_known_figure_has_no_range_and_the_others_stay() -> None:
    before = Assumptions()
    after = before.known("a run", duplicate_share=0.25)
    assert set(after.duplicate_share.drawn()) == {0.25} and after.duplicate_share.source == "a run"
    assert after.image_tokens == before.image_tokens


def test_without_draws_there_is_the_expected_value_alone() -> None:
    assert [len(each.drawn()) for each in Assumptions().expected()] == [1] * len(list(Assumptions()))
