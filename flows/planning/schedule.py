"""The schedule of a plan, as it is simulated: what each stage asks of which resource, and what there is of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flows.planning.demand import CORPUS
from flows.planning.plan import Plan
from flows.planning.request import MAX_TASKS
from flows.planning.stage_plans import StagePlan

UNITS_PER_LANE = 16
"""Of a task: so many parts a lane's shards are done in."""


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What a stage is to the schedule, in seconds; of one shard unless said otherwise.

    gpu_seconds: of one copy of the model. gpu_cap: copies that its sequences under way can fill. core_seconds,
    client_seconds: of one core. chain: calls of a row, one after the other; call_seconds: the mean of one. rows: that
    ask. serial_seconds: of the driver, for the whole stage.
    """

    name: str
    gpu_seconds: float = 0.0
    gpu_cap: float = 1.0
    core_seconds: float = 0.0
    client_seconds: float = 0.0
    chain: int = 0
    call_seconds: float = 0.0
    max_call_seconds: float = math.inf
    rows: float = 0.0
    serial_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run to be simulated.

    num_workers: tasks in work at once. num_lanes: shards that each does at once. num_copies: of the model. num_cores,
    num_loops: that the pipeline has, of processors and of event loops that ask. task_seconds: Prefect's server, for
    each task. copy_life_hours, worker_life_hours: mean time until one is lost; inf for never.
    """

    stages: tuple[StageLoad, ...]
    num_shards: int
    num_workers: int
    num_lanes: int
    num_copies: float
    num_cores: float
    num_loops: float
    task_seconds: float = 0.005
    copy_life_hours: float = math.inf
    copy_restart_seconds: float = 600.0
    worker_life_hours: float = math.inf
    worker_restart_seconds: float = 60.0
    max_tasks: int = MAX_TASKS
    units_per_lane: int = UNITS_PER_LANE
    seed: int = 0


def schedule_of(
    plan: Plan, *, seed: int = 0, copy_life_hours: float = 500.0, worker_life_hours: float = 720.0
) -> Schedule:
    """Returns the schedule of a plan at its expected values.

    A copy of the model is lost every three weeks, a worker every month: assumed, as nobody recorded such a run; in
    Llama 3's training a GPU was lost every 50,000 hours, servers end more often for reasons of their own.
    """
    per_process = plan.setup.parallel_per_process
    tasks = min(plan.request.num_shards, MAX_TASKS)
    processes = plan.request.machines.num_busy_processes
    workers, lanes = (min(processes, tasks), per_process) if plan.request.is_ray else (min(per_process, tasks), 1)
    return Schedule(
        tuple(_stage_load(plan, stage) for stage in plan.stages),
        plan.request.num_shards,
        workers,
        lanes,
        plan.layout.num_copies,
        plan.setup.usable_cores,
        processes,
        plan.request.assumptions.task_ms.expected / 1e3,
        copy_life_hours=copy_life_hours,
        # Without Ray all tasks are threads of one process.
        worker_life_hours=worker_life_hours * (1 if plan.request.is_ray else workers),
        seed=seed,
    )


def _stage_load(plan: Plan, stage: StagePlan) -> StageLoad:
    """Returns the load of a stage. Of several purposes, the one with the longest calls says how many are under way."""
    shards, serial, tail = plan.request.num_shards, float(stage.serial_seconds[0]), stage.tail
    if stage.name == CORPUS:  # the driver writes it
        return StageLoad(stage.name, serial_seconds=serial)
    load = StageLoad(
        stage.name,
        core_seconds=float(stage.core_seconds[0] - stage.client_seconds[0]) / shards,
        client_seconds=float(stage.client_seconds[0]) / shards,
        serial_seconds=serial,
    )
    if tail is None:
        return load
    asked = next(each for each in stage.demand.asked if each.purpose == tail.purpose)
    rows = float(stage.demand.looked_at[0]) / shards
    under_way = max(rows * float(asked.samples[0] / asked.calls[0]), 1.0)
    return replace(
        load,
        gpu_seconds=float(stage.gpu_seconds[0]) / plan.layout.tensor / shards,
        gpu_cap=min(plan.layout.num_copies, under_way / float(tail.sequences[0])),
        chain=tail.chain,
        call_seconds=float(tail.call_seconds[0]),
        max_call_seconds=float(tail.max_call_seconds[0]),
        rows=rows,
    )
