"""From a plan to its schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.planning.gpus import gpu_kind
from flows.planning.latencies import recorded_spread
from flows.planning.plan import Plan, plan_run
from flows.planning.request import Machines, Request
from flows.planning.schedule import schedule_of
from flows.planning.simulation import simulate_schedule


def planned(num_rows: int = 16_400_000, num_gpus: int = 8, processes: int = 1) -> Plan:
    machines = replace(Machines.beside(num_gpus), num_processes=processes)
    return plan_run(Request(num_rows, num_gpus, gpu_kind("H100"), machines))


@pytest.mark.parametrize("processes", [1, 16])
@pytest.mark.parametrize("num_rows", [1_000_000, 1_000_000_000])
def test_the_work_of_a_plan_is_that_of_its_schedule(num_rows: int, processes: int) -> None:
    plan = planned(num_rows, 16, processes)
    schedule = schedule_of(plan)
    assert [load.name for load in schedule.stages] == [stage.name for stage in plan.stages]
    work = sum(load.gpu_seconds for load in schedule.stages) * schedule.num_shards * plan.layout.tensor
    assert work == pytest.approx(float(plan.gpu_seconds[0]))
    serial = sum(load.serial_seconds for load in schedule.stages)
    assert serial == pytest.approx(float(plan.serial_seconds[0]))


def test_without_ray_a_task_has_one_lane_and_on_it_as_many_as_shards_in_work() -> None:
    plain, ray = planned(), planned(processes=16)
    assert (schedule_of(plain).num_workers, schedule_of(plain).num_lanes) == (plain.setup.num_parallel, 1)
    assert (schedule_of(ray).num_workers, schedule_of(ray).num_lanes) == (16, ray.setup.parallel_per_process)


@pytest.mark.parametrize(("num_rows", "num_gpus"), [(16_400_000, 8), (1_000_000_000, 64)])
def test_plan_and_simulation_agree_though_neither_knows_the_other(num_rows: int, num_gpus: int) -> None:
    plan = planned(num_rows, num_gpus)
    outcome = simulate_schedule(schedule_of(plan, copy_life_hours=1e9, worker_life_hours=1e9))
    assert outcome.seconds == pytest.approx(float(plan.wall_seconds[0]), rel=0.15)
    assert outcome.seconds >= outcome.least_seconds


def test_recorded_latencies_spread_around_their_mean_and_the_slowest_of_many_is_slow() -> None:
    spread = recorded_spread()
    for quantiles in (spread.lengths, spread.calls):
        assert np.all(np.diff(quantiles) >= 0) and np.trapezoid(quantiles, dx=0.01) == pytest.approx(1.0, abs=0.05)
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.interp(rng.random(10**6), np.linspace(0, 1, 101), spread.lengths), (1000, 300)).max(axis=1)
    assert float(np.median(drawn)) == pytest.approx(spread.typical_slowest(300), rel=0.03)
    slowest = spread.slowest(rng, 20_000, 300)
    assert float(slowest.mean()) == pytest.approx(float(drawn.mean()) * float(spread.calls.mean()), rel=0.1)
    assert spread.typical_slowest(0.2) == spread.typical_slowest(1) < spread.typical_slowest(1000)


def test_the_recorded_file_says_where_it_comes_from() -> None:
    path = Path(__file__).parents[3] / "flows" / "planning" / "recorded_latencies.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["lengths"]["number"] > 1000 and "MATH-Vision" in record["lengths"]["source"]
    assert record["calls"]["number"] > 1000 and "vLLM" in record["calls"]["source"]
