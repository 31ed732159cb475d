"""Plans as text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.gpus import gpu_kind
from flows.planning.plan import plan_run
from flows.planning.rendering import ranged, render_explanation, render_plan, short
from flows.planning.request import Machines, Request
from flows.planning.schedule import schedule_of
from flows.planning.schedule_text import render_schedule
from flows.planning.simulation import simulate_schedule

REQUEST = Request(16_400_000, 8, gpu_kind("H100"), Machines.beside(8))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.0012"),
        (0.25, "0.250"),
        (9.999, "10.0"),
        (64, "64.0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (999_999, "1.00M"),
        (16_400_000, "16.4M"),
        (1.25e12, "1.25T"),
        (3e19, "30000P"),
    ],
)
def test_numbers_have_three_digits_and_a_letter(value: float, text: str) -> None:
    assert short(value) == text


@given(st.floats(1e-3, 1e17))
def test_a_short_number_is_that_number(value: float) -> None:
    text = short(value)
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1.0)
    assert float(text.rstrip("kMGTP")) * factor == pytest.approx(value, rel=0.0051, abs=5e-5)


def test_a_range_stands_in_brackets_and_a_known_figure_alone() -> None:
    assert ranged(np.array([5.0, *range(101)])) == "5.00 (5.00 to 95.0)"
    assert ranged(np.full(9, 3.0)) == "3.00"


def test_a_plan_names_every_stage_the_bottleneck_and_what_to_do() -> None:
    plan = plan_run(REQUEST)
    text = render_plan(plan, plan_run(replace(REQUEST, num_rows=100_000)))
    for stage in plan.stages:
        assert f"\n{stage.name} " in text
    assert "16,400,000 rows on 8 x H100 with Qwen/Qwen2.5-VL-32B-Instruct: 4 copies on 2 GPUs each" in text
    assert "What sets the pace: GPUs 9" in text
    assert "A night that adds 100,000 rows:" in text and "in a year" in text
    assert "no prices are known: --gpu-hour-price" in text
    assert "memory for comparing traces" in text and "`ray` section" in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_an_explanation_shows_every_assumption_and_how_the_speed_follows() -> None:
    plan = plan_run(REQUEST)
    text = render_explanation(plan)
    assert "66.9 GB in bfloat16, 32.0 G parameters a token" in text and "256 KiB a token" in text
    assert "64 GFLOP, of an image 69; at 989 TFLOP/s" in text and "2 x 3.35 TB/s" in text
    for assumption in plan.request.assumptions:
        assert assumption.name in text and assumption.source in text


def test_a_simulation_shows_what_was_used_of_each_resource() -> None:
    schedule = schedule_of(plan_run(REQUEST))
    text = render_schedule(schedule, simulate_schedule(schedule))
    assert "GPUs  client  processors  driver  Prefect" in text
    assert "no schedule could avoid" in text and "workers were lost" in text
