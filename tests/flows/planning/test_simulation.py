"""The simulated schedule: bounds that no schedule can leave, laws, and what failures cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flows.planning.latencies import recorded_spread
from flows.planning.schedule import Schedule, StageLoad
from flows.planning.simulation import Outcome, simulate_schedule

ASKING = StageLoad("asking", gpu_seconds=10.0, gpu_cap=0.5)


def schedule(*stages: StageLoad, **changes: float) -> Schedule:
    """Returns a schedule in which nothing but the GPUs is scarce, and nothing fails."""
    plain = Schedule(stages, 100, 8, 1, 4.0, 100.0, 100.0, task_seconds=0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def seconds(planned: Schedule) -> float:
    return simulate_schedule(planned).seconds


@st.composite
def gpu_schedules(draw: st.DrawFn) -> Schedule:
    load = StageLoad("asking", gpu_seconds=draw(st.floats(0.1, 100)), gpu_cap=draw(st.floats(0.05, 4)))
    return schedule(
        load,
        num_shards=draw(st.integers(1, 400)),
        num_workers=draw(st.integers(1, 64)),
        num_lanes=draw(st.integers(1, 4)),
        num_copies=draw(st.floats(0.5, 64)),
    )


def test_a_saturated_stage_takes_its_work_over_what_there_is() -> None:
    # 640 shards of 10 s on 4 copies, in 64 tasks; 8 tasks under way fill them.
    outcome = simulate_schedule(schedule(ASKING, num_shards=640))
    assert outcome.least_seconds == pytest.approx(1600)
    assert outcome.seconds == pytest.approx(1600)
    assert outcome.stages[0].saturated == "GPUs" and outcome.stages[0].loads["GPUs"] > 0.9


def test_too_few_shards_under_way_leave_gpus_idle() -> None:
    outcome = simulate_schedule(schedule(ASKING, num_workers=2))
    assert outcome.seconds == pytest.approx(100 * 10 / (2 * 0.5), rel=0.05)
    assert outcome.stages[0].loads["GPUs"] == pytest.approx(0.25, rel=0.05)


@given(gpu_schedules())
@settings(max_examples=50)
def test_the_time_lies_between_the_work_and_the_work_plus_the_longest_task(planned: Schedule) -> None:
    """A server that is busy while anybody waits ends after W / C, and before W / C and the longest task alone.

    Where tasks at once cannot fill it, C is what they can: a task fills one lane at least.
    """
    load = planned.stages[0]
    outcome = simulate_schedule(planned)
    work = planned.num_shards * load.gpu_seconds
    least = work / min(planned.num_copies, planned.num_workers * planned.num_lanes * load.gpu_cap)
    certain = work / min(planned.num_copies, planned.num_workers * load.gpu_cap)
    longest_task = math.ceil(planned.num_shards / min(planned.num_shards, planned.max_tasks)) * load.gpu_seconds
    assert least * (1 - 1e-9) <= outcome.seconds
    assert outcome.seconds <= certain + longest_task / min(load.gpu_cap, planned.num_copies) + 1e-6
    assert outcome.least_seconds == pytest.approx(least)


@given(gpu_schedules(), st.floats(1.0, 8.0))
@settings(max_examples=50)
def test_more_gpus_are_never_slower(planned: Schedule, factor: float) -> None:
    more = replace(planned, num_copies=planned.num_copies * factor)
    assert seconds(more) <= seconds(planned) * (1 + 1e-9)


@given(gpu_schedules(), st.integers(2, 64))
@settings(max_examples=30)
def test_all_shards_are_done_in_every_stage(planned: Schedule, max_tasks: int) -> None:
    two = replace(planned, stages=(*planned.stages, StageLoad("second", core_seconds=1.0)), max_tasks=max_tasks)
    assert [stage.num_shards for stage in simulate_schedule(two).stages] == [planned.num_shards] * 2


@given(gpu_schedules(), st.integers(0, 3))
@settings(max_examples=20)
def test_the_same_seed_gives_the_same_run(planned: Schedule, seed: int) -> None:
    chained = replace(planned.stages[0], chain=3, call_seconds=5.0, rows=300.0)
    failing = replace(planned, stages=(chained,), copy_life_hours=0.1, worker_life_hours=0.2, seed=seed)
    assert simulate_schedule(failing) == simulate_schedule(failing)


def test_another_seed_gives_another_run() -> None:
    chained = schedule(replace(ASKING, chain=2, call_seconds=20.0, rows=300.0))
    assert seconds(chained) != seconds(replace(chained, seed=1))


@given(st.integers(100, 3000), st.integers(1, 3))
@settings(max_examples=20)
def test_how_fine_the_units_are_changes_nothing(num_shards: int, lanes: int) -> None:
    planned = schedule(ASKING, num_shards=num_shards, num_lanes=lanes)
    coarse, fine = seconds(planned), seconds(replace(planned, units_per_lane=64))
    assert coarse == pytest.approx(fine, rel=0.03)


def test_a_billion_rows_take_as_many_events_as_a_million_and_a_thousand_times_the_time() -> None:
    small = schedule(ASKING, num_shards=64 * 16 * 10)
    assert seconds(replace(small, num_shards=1000 * small.num_shards)) == pytest.approx(1000 * seconds(small), rel=0.01)


def test_a_shard_waits_for_its_slowest_row() -> None:
    # Nobody shares: each of 100 shards, in 8 lanes, takes three mean calls and a slowest one.
    chained = StageLoad("asking", gpu_seconds=0.001, gpu_cap=1.0, chain=4, call_seconds=30.0, rows=1000.0)
    slowest = recorded_spread().typical_slowest(1000.0)
    assert seconds(schedule(chained)) == pytest.approx(100 / 8 * (3 * 30 + 30 * slowest), rel=0.2)
    bounded = replace(chained, max_call_seconds=30.0)
    assert seconds(schedule(bounded, num_shards=64)) == pytest.approx(64 / 8 * 4 * 30)


def test_starting_tasks_queues_at_prefects_server() -> None:
    # 64 tasks of no work: the server takes them one after the other, each 2 s.
    outcome = simulate_schedule(schedule(StageLoad("empty"), num_shards=500, num_workers=64, task_seconds=2.0))
    assert outcome.seconds == pytest.approx(128)
    assert outcome.stages[0].saturated == "Prefect" and outcome.stages[0].loads["Prefect"] == pytest.approx(1.0)


def test_the_drivers_own_time_is_added() -> None:
    outcome = simulate_schedule(schedule(StageLoad("planned", core_seconds=1.0, serial_seconds=1000.0), num_cores=1.0))
    assert outcome.seconds == pytest.approx(1100)
    assert outcome.stages[0].saturated == "driver" and outcome.least_seconds == pytest.approx(1100)


def test_the_scarcest_resource_is_named() -> None:
    loads = {"client": StageLoad("a", client_seconds=9.0), "processors": StageLoad("b", core_seconds=9.0)}
    for name, load in loads.items():
        outcome = simulate_schedule(schedule(load, num_cores=1.0, num_loops=1.0))
        assert outcome.stages[0].saturated == name and outcome.seconds == pytest.approx(900)


def test_copies_that_are_lost_cost_the_time_they_are_away() -> None:
    # Each of 4 copies is lost about once an hour for 6 minutes: it is there 10 parts of 11.
    failing = schedule(ASKING, num_shards=64_000, copy_life_hours=1.0, copy_restart_seconds=360.0)
    outcome = simulate_schedule(failing)
    assert outcome.num_copies_lost > 100
    assert outcome.seconds / outcome.least_seconds == pytest.approx(1.1, rel=0.03)


def test_lost_workers_repeat_what_was_under_way_and_nothing_else() -> None:
    load = replace(ASKING, gpu_cap=0.4, chain=1, call_seconds=10.0, rows=1.0)
    failing = schedule(load, num_shards=6400, worker_life_hours=1.0)
    outcome, calm = simulate_schedule(failing), simulate_schedule(replace(failing, worker_life_hours=math.inf))
    assert outcome.num_workers_lost > 10 and calm.num_workers_lost == 0
    lost = outcome.num_workers_lost * (60 + 10 / 2)
    assert calm.seconds < outcome.seconds <= calm.seconds + lost


@given(gpu_schedules(), st.floats(0.01, 10))
@settings(max_examples=30)
def test_a_run_ends_whatever_fails(planned: Schedule, life_hours: float) -> None:
    assume(planned.num_shards * planned.stages[0].gpu_seconds < 5000)
    failing = replace(planned, copy_life_hours=life_hours, worker_life_hours=life_hours)
    outcome: Outcome = simulate_schedule(failing)
    assert outcome.seconds >= outcome.least_seconds * (1 - 1e-9)
