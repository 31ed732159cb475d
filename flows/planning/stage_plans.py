"""One stage of a plan: its work on GPUs and processors, what its driver does alone, and what sets its pace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flows.estimate import VERDICT_TOKENS
from flows.planning.assumptions import Assumptions, Range, Values
from flows.planning.demand import CORPUS, DUPLICATES, SOURCES, TRACES, Asked, StageDemand
from flows.planning.gpus import Layout, speed
from flows.planning.latencies import recorded_spread
from flows.planning.request import Request
from judges import performance, reasoning

SHARDS_WRITTEN_AT_ONCE = 2
"""As in `corpus.writer`: the corpus is written by the driver."""
_LEAST = 1e-9
"""Calls and samples that are none, where they divide."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a stage is planned with. parallel_per_process: shards in work at once in each process."""

    request: Request
    layout: Layout
    parallel_per_process: int

    @property
    def num_parallel(self) -> int:
        """Shards in work at once, of all processes."""
        return self.request.num_parallel(self.parallel_per_process)

    @property
    def usable_cores(self) -> int:
        return self.request.usable_cores(self.parallel_per_process)

    def max_tokens(self, purpose: str) -> int:
        """Returns the longest reply of a purpose that the settings allow; verdicts are a word or two."""
        config = self.request.config
        bounds = {
            performance.PURPOSE: config.performance.max_tokens,
            reasoning.PURPOSE: config.reasoning.max_tokens,
            reasoning.DIRECT: config.direct.max_tokens,
        }
        return bounds.get(purpose, VERDICT_TOKENS)


@dataclass(frozen=True, slots=True)
class Tail:
    """The slowest row of a shard, whose calls follow one another: a shard is not done before it is.

    sequences: that a step of one copy holds. call_seconds: the mean call with so many. max_call_seconds: the longest
    that the settings allow. chain: calls of that row. seconds: of all of them.
    """

    purpose: str
    sequences: Values
    call_seconds: Values
    max_call_seconds: Values
    chain: int
    seconds: Values


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage; arrays are [1 + draws]. gpu_seconds: of GPUs at full load. core_seconds: of processors.

    client_seconds: those of them that a process spends in its event loop. serial_seconds: of the driver, alone.
    tail: of a shard, None where nothing is asked. wall_seconds: on the clock. bound_by: what sets the pace.
    """

    demand: StageDemand
    gpu_seconds: Values
    core_seconds: Values
    client_seconds: Values
    serial_seconds: Values
    tail: Tail | None
    wall_seconds: Values
    bound_by: str

    @property
    def name(self) -> str:
        return self.demand.stage

    def total(self, field: str) -> Values:
        """Returns the sum of a field of all that is asked; zeros if nothing is."""
        nothing = np.zeros_like(self.gpu_seconds)
        return np.asarray(sum((getattr(asked, field) for asked in self.demand.asked), nothing))

    def to_record(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "rows": as_range(self.demand.rows),
            "looked_at": as_range(self.demand.looked_at),
            "calls": as_range(self.total("calls")),
            "prompt_tokens": as_range(self.total("prompt_tokens")),
            "completion_tokens": as_range(self.total("completion_tokens")),
            "gpu_hours": as_range(self.gpu_seconds / 3600),
            "core_hours": as_range(self.core_seconds / 3600),
            "wall_hours": as_range(self.wall_seconds / 3600),
            "bound_by": self.bound_by,
        }


def as_range(values: Values) -> Mapping[str, float]:
    return asdict(Range.of(values))


def plan_stage(setup: Setup, stage: StageDemand) -> StagePlan:
    """Returns the plan of a stage: the slowest of what works on it sets its pace."""
    a, layout = setup.request.assumptions, setup.layout
    nothing = np.zeros_like(stage.rows)
    works = [(asked, _gpu_work(setup, stage, asked)) for asked in stage.asked]
    works = [(asked, work) for asked, work in works if work.copy_seconds[0] > 0]
    gpu_seconds = sum((work.copy_seconds for _, work in works), nothing) * layout.tensor
    client = sum((asked.calls for asked in stage.asked), nothing) * a.call_ms.drawn() / 1e3
    core = client + stage.rows * a.pass_ms.drawn() / 1e3 + _stage_core_seconds(stage, a)
    serial = _serial_seconds(stage, core, a)
    if stage.stage == CORPUS:
        return StagePlan(stage, gpu_seconds, core, client, serial, None, serial, "driver")
    paces = {
        "GPUs": gpu_seconds / (layout.num_copies * layout.tensor * a.busy_share.drawn()),
        "processors": core / setup.usable_cores,
        "client": client / setup.request.machines.num_busy_processes,
    }
    tail = None
    if works:
        tail = max((_tail(setup, stage, *each) for each in works), key=lambda each: float(each.seconds[0]))
        paces["slowest rows"] = tail.seconds * setup.request.num_shards / setup.num_parallel
    wall = np.max(list(paces.values()), axis=0)
    slowest = max(paces, key=lambda name: float(paces[name][0]))
    bound_by = "driver" if serial[0] > wall[0] else slowest
    return StagePlan(stage, gpu_seconds, core, client, serial, tail, wall + serial, bound_by)


@dataclass(frozen=True, slots=True)
class _GpuWork:
    """copy_seconds: of one copy of the model, for a purpose. sequences: in a step of it."""

    copy_seconds: Values
    sequences: Values


def _gpu_work(setup: Setup, stage: StageDemand, asked: Asked) -> _GpuWork:
    """Returns the work of one purpose of a stage; none for a model that is asked elsewhere."""
    a, layout = setup.request.assumptions, setup.layout
    if asked.model in setup.request.elsewhere:
        return _GpuWork(np.zeros_like(asked.calls), np.ones_like(asked.calls))
    calls, samples = np.maximum(asked.calls, _LEAST), np.maximum(asked.samples, _LEAST)
    context = np.maximum(asked.prompt_tokens / calls + asked.completion_tokens / samples / 2, 1.0)
    rows = setup.num_parallel * setup.request.config.shard_rows * stage.looked_at / stage.rows
    pace = speed(
        layout,
        np.maximum(rows * samples / calls, 1.0) / layout.num_copies,
        context,
        prefill=a.prefill_utilisation.drawn(),
        decode=a.decode_utilisation.drawn(),
    )
    copy_seconds = (
        asked.new_text_tokens * pace.prompt_token
        + asked.new_image_tokens * pace.image_token
        + asked.completion_tokens * pace.completion_token
    )
    return _GpuWork(copy_seconds, pace.sequences)


def _tail(setup: Setup, stage: StageDemand, asked: Asked, work: _GpuWork) -> Tail:
    """Returns the slowest row of a shard. A mean call takes its share of a busy copy, times the sequences there."""
    call_seconds = work.copy_seconds * work.sequences / np.maximum(asked.samples, _LEAST)
    tokens = np.maximum(asked.completion_tokens / np.maximum(asked.samples, _LEAST), _LEAST)
    longest = call_seconds * setup.max_tokens(asked.purpose) / tokens
    rows = float(stage.looked_at[0]) / setup.request.num_shards
    last = np.minimum(call_seconds * recorded_spread().typical_slowest(rows), longest)
    chain = asked.longest_chain
    return Tail(asked.purpose, work.sequences, call_seconds, longest, chain, (chain - 1) * call_seconds + last)


def _serial_seconds(stage: StageDemand, core_seconds: Values, a: Assumptions) -> Values:
    """Returns what the driver does alone, on the clock: comparing across shards, and writing the corpus."""
    if stage.stage in {DUPLICATES, TRACES}:
        return np.asarray(stage.looked_at * a.compare_us.drawn() / 1e6)
    return core_seconds / SHARDS_WRITTEN_AT_ONCE if stage.stage == CORPUS else np.zeros_like(stage.rows)


def _stage_core_seconds(stage: StageDemand, a: Assumptions) -> Values:
    """Returns what a stage computes beside passing rows on and asking."""
    images = (1 - a.text_only_share.drawn()) * a.images_per_row.drawn() * a.distinct_image_share.drawn()
    if stage.stage == SOURCES:
        return np.asarray(stage.rows * a.read_ms.drawn() / 1e3)
    if stage.stage == DUPLICATES:
        return np.asarray(stage.rows * images * a.picture_ms.drawn() / 1e3)
    if stage.stage == performance.PURPOSE:
        return np.asarray(stage.asked[0].samples * a.verify_ms.drawn() / 1e3)
    if stage.stage == CORPUS:
        return np.asarray(stage.rows * a.publish_ms.drawn() / 1e3)
    return np.zeros_like(stage.rows)
