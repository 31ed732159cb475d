"""A simulation of the schedule: shards through stages, events in simulated time, the same for the same seed.

As `flows.curate` does it: a stage begins when the one before has ended. The driver plans alone where rows are compared
across shards. Then a stage's shards are dealt to at most 64 tasks. Each task is started by Prefect's server, takes a
worker, and does its shards in order, in as many lanes as the worker has. A shard in work shares the GPUs, the client's
event loop and the processors with all others, equally, as far as it can use them: no more of the GPUs than its rows
have sequences under way. And it is not done before its slowest row is, whose calls follow one another.

A billion rows have a million shards. Shards that one lane does in order are one *unit* then, with the work of all and
the slowest rows of each; how many units there are changes nothing but the time the simulation takes.

Latencies: the mean of a call follows from the plan (tokens times the time of a step); how far calls spread around it
was recorded from real ones (`latencies`). Servers that die take a copy of the model away until it is loaded again; lost
workers repeat the calls that they had under way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import simpy

from flows.planning.latencies import Spread, recorded_spread
from flows.planning.schedule import Schedule, StageLoad
from flows.planning.shared_server import SharedServer

_Process: TypeAlias = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What became of a stage. least_seconds: its work over what there is, which no schedule can beat.

    loads: of each resource, the share of it that was used while the stage ran.
    """

    name: str
    seconds: float
    least_seconds: float
    num_shards: int
    loads: dict[str, float]

    @property
    def saturated(self) -> str:
        """The resource that was used most."""
        return max(self.loads, key=lambda name: self.loads[name])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    stages: tuple[StageOutcome, ...]
    num_copies_lost: int
    num_workers_lost: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def least_seconds(self) -> float:
        return sum(stage.least_seconds for stage in self.stages)

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        stages = [asdict(stage) | {"saturated": stage.saturated} for stage in self.stages]
        return {
            "hours": self.seconds / 3600,
            "least_hours": self.least_seconds / 3600,
            "copies_lost": self.num_copies_lost,
            "workers_lost": self.num_workers_lost,
            "stages": stages,
        }


def simulate_schedule(schedule: Schedule) -> Outcome:
    """Returns what becomes of a run."""
    simulation = _Simulation(schedule, recorded_spread())
    return simulation.run()


@dataclass(slots=True)
class _Unit:
    """Shards that a lane does in order. chain_seconds: their slowest rows, added up."""

    num_shards: int
    chain_seconds: float


@dataclass(slots=True)
class _Running:
    """The stage at work and what it shares."""

    load: StageLoad
    gpus: SharedServer
    cores: SharedServer
    loop: SharedServer
    num_done: int = 0
    prefect_seconds: float = 0.0


@dataclass(slots=True)
class _Counts:
    copies_lost: int = 0
    workers_lost: int = 0
    copies_up: float = 0.0


class _Simulation:
    """One simulated run."""

    def __init__(self, schedule: Schedule, spread: Spread) -> None:
        self._schedule, self._spread = schedule, spread
        self._env = simpy.Environment()
        self._random = np.random.default_rng(schedule.seed)
        self._prefect = simpy.Resource(self._env)
        self._counts = _Counts(copies_up=schedule.num_copies)
        self._running: _Running | None = None
        self._outcomes: list[StageOutcome] = []

    def run(self) -> Outcome:
        if math.isfinite(self._schedule.copy_life_hours):
            self._env.process(self._lose_copies())
        self._env.run(until=self._env.process(self._all_stages()))
        return Outcome(tuple(self._outcomes), self._counts.copies_lost, self._counts.workers_lost)

    def _all_stages(self) -> _Process:
        for load in self._schedule.stages:
            began = self._env.now
            running = self._begin(load)
            yield self._env.timeout(load.serial_seconds)
            workers = simpy.Resource(self._env, self._schedule.num_workers)
            tasks = [self._env.process(self._task(units, running, workers)) for units in self._deal(load)]
            yield self._env.all_of(tasks)
            self._outcomes.append(self._finish(running, self._env.now - began))

    def _begin(self, load: StageLoad) -> _Running:
        schedule, env = self._schedule, self._env
        self._running = _Running(
            load,
            SharedServer(env, schedule.num_copies, load.gpu_cap),  # less those that are just being loaded, below
            SharedServer(env, schedule.num_cores, 1.0),
            SharedServer(env, schedule.num_loops, 1.0),
        )
        self._running.gpus.change_capacity(self._counts.copies_up - schedule.num_copies)
        return self._running

    def _deal(self, load: StageLoad) -> Iterator[list[_Unit]]:
        """Yields the units of each task: consecutive shards, as evenly as they go."""
        schedule = self._schedule
        num_tasks = min(schedule.num_shards, schedule.max_tasks)
        for num_shards in _dealt(schedule.num_shards, num_tasks):
            parts = min(num_shards, schedule.num_lanes * schedule.units_per_lane)
            yield [_Unit(number, self._chain_seconds(load, number)) for number in _dealt(num_shards, parts)]

    def _chain_seconds(self, load: StageLoad, num_shards: int) -> float:
        """Returns how long the slowest rows of so many shards take, one shard after the other."""
        if not load.chain:
            return 0.0
        slowest = self._spread.slowest(self._random, num_shards, load.rows)
        last = np.minimum(slowest * load.call_seconds, load.max_call_seconds)
        return float(np.sum((load.chain - 1) * load.call_seconds + last))

    def _task(self, units: list[_Unit], running: _Running, workers: simpy.Resource) -> _Process:
        with workers.request() as worker:
            yield worker
            with self._prefect.request() as turn:
                yield turn
                yield self._env.timeout(self._schedule.task_seconds)
                running.prefect_seconds += self._schedule.task_seconds
            waiting = deque(units)
            lanes = [self._env.process(self._lane(waiting, running)) for _ in range(self._schedule.num_lanes)]
            yield self._env.all_of(lanes)

    def _lane(self, waiting: deque[_Unit], running: _Running) -> _Process:
        while waiting:
            unit, began = waiting.popleft(), self._env.now
            load, number = running.load, unit.num_shards
            yield self._env.all_of(
                [
                    running.gpus.serve(number * load.gpu_seconds),
                    running.loop.serve(number * load.client_seconds),
                    running.cores.serve(number * load.core_seconds),
                    self._env.timeout(unit.chain_seconds),
                ]
            )
            yield from self._lose_workers(running, self._env.now - began)
            running.num_done += number

    def _lose_workers(self, running: _Running, seconds: float) -> _Process:
        """A worker that is lost is replaced, and its calls under way are made again: a call's time and more GPU work.

        What its shards had finished, and every reply that was stored, stands.
        """
        life = 3600 * self._schedule.worker_life_hours * self._schedule.num_lanes
        for _ in range(self._random.poisson(seconds / life) if math.isfinite(life) else 0):
            self._counts.workers_lost += 1
            yield self._env.timeout(self._schedule.worker_restart_seconds)
            yield running.gpus.serve(running.load.gpu_cap * running.load.call_seconds / 2)

    def _lose_copies(self) -> _Process:
        """Copies of the model die, one by one, and come back when they are loaded again; their calls are repeated."""
        schedule = self._schedule
        mean_seconds = 3600 * schedule.copy_life_hours / schedule.num_copies
        while True:
            yield self._env.timeout(self._random.exponential(mean_seconds))
            self._env.process(self._lose_copy())

    def _lose_copy(self) -> _Process:
        self._counts.copies_lost += 1
        lost = min(1.0, self._counts.copies_up)
        self._change_copies(-lost)
        repeated = self._running.load.call_seconds / 2 if self._running else 0.0
        yield self._env.timeout(self._schedule.copy_restart_seconds + repeated)
        self._change_copies(lost)

    def _change_copies(self, change: float) -> None:
        self._counts.copies_up += change
        if self._running is not None:
            self._running.gpus.change_capacity(change)

    def _finish(self, running: _Running, seconds: float) -> StageOutcome:
        schedule, load = self._schedule, running.load
        assert running.num_done == schedule.num_shards, "a shard was lost"
        for server in (running.gpus, running.loop, running.cores):
            server.settle()
        lanes = schedule.num_workers * schedule.num_lanes
        loads = {
            "GPUs": _used(running.gpus),
            "client": _used(running.loop),
            "processors": _used(running.cores),
            "driver": load.serial_seconds / seconds if seconds else 0.0,
            "Prefect": running.prefect_seconds / seconds if seconds else 0.0,
        }
        least = load.serial_seconds + schedule.num_shards * max(
            load.gpu_seconds / min(schedule.num_copies, lanes * load.gpu_cap),
            load.client_seconds / min(schedule.num_loops, lanes),
            load.core_seconds / min(schedule.num_cores, lanes),
        )
        return StageOutcome(load.name, seconds, least, running.num_done, loads)


def _used(server: SharedServer) -> float:
    return server.work_done / server.offered if server.offered else 0.0


def _dealt(number: int, num_parts: int) -> Iterator[int]:
    """Yields the sizes of so many parts of a number, which differ by one at most."""
    for place in range(num_parts):
        yield number * (place + 1) // num_parts - number * place // num_parts
