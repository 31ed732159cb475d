"""The plan of a curation: time on the GPUs and on the clock, processors, storage, Prefect's share, money.

Stages run one after the other, so their times add up. Within a stage GPUs, processors and the client work at the same
time, and the slowest sets the pace; the plans of `duplicates` and `traces` are made by the driver alone, before, and it
writes the corpus alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from flows.planning.assumptions import Values
from flows.planning.demand import demand, known_from_sources
from flows.planning.gpus import Layout, lay_out, model_shape
from flows.planning.request import MAX_TASKS, Request
from flows.planning.stage_plans import Setup, StagePlan, as_range, plan_stage
from flows.planning.storage import FILES_PER_SHARD, MAX_FOLDER_FILES, Storage, storage_of
from schemas.config import RunConfig, ServeConfig
from schemas.errors import ConfigError

RAY_STEPS = 4
"""Steps that a run on Ray has beside its stages: `duplicates` and `traces` have three each."""
SHARD_ROWS = (1000, 2000, 5000, 10_000, 20_000, 50_000)
PARALLEL_SHARDS = (2, 4, 8, 16, 32, 64)
"""Settings that are tried where the user has none."""
_NEAR = 1.1


@dataclass(frozen=True)
class Plan:
    """A curation planned. setup: with the settings given or chosen."""

    setup: Setup
    storage: Storage
    stages: tuple[StagePlan, ...]

    @property
    def request(self) -> Request:
        return self.setup.request

    @property
    def layout(self) -> Layout:
        return self.setup.layout

    @property
    def num_tasks(self) -> int:
        """Prefect's task runs: groups of shards in every stage but the last, which the driver does."""
        num_steps = len(self.stages) - 1 + RAY_STEPS * self.request.is_ray
        return num_steps * min(self.request.num_shards, MAX_TASKS)

    @property
    def database_bytes(self) -> Values:
        """Of Prefect."""
        return np.asarray(self.num_tasks * self.request.assumptions.database_bytes.drawn())

    def total(self, field: str) -> Values:
        """Returns the sum over all stages of a field of what is asked."""
        return np.asarray(np.sum([stage.total(field) for stage in self.stages], axis=0))

    @cached_property
    def gpu_seconds(self) -> Values:
        return np.asarray(np.sum([stage.gpu_seconds for stage in self.stages], axis=0))

    @cached_property
    def core_seconds(self) -> Values:
        return np.asarray(np.sum([stage.core_seconds for stage in self.stages], axis=0))

    @cached_property
    def serial_seconds(self) -> Values:
        return np.asarray(np.sum([stage.serial_seconds for stage in self.stages], axis=0))

    @cached_property
    def wall_seconds(self) -> Values:
        return np.asarray(np.sum([stage.wall_seconds for stage in self.stages], axis=0))

    @property
    def held_gpu_seconds(self) -> Values:
        """GPU time that is paid for: all GPUs, from the first stage to the last."""
        return self.wall_seconds * self.layout.num_gpus

    @property
    def gpu_cost(self) -> Values:
        """The price of the GPUs while they are held."""
        config = self.request.config
        return self.held_gpu_seconds / 3600 * config.prices.of(config.teacher.model).gpu_hour

    @property
    def token_cost(self) -> Values:
        """The price of all tokens."""
        prices, total = self.request.config.prices, np.zeros_like(self.wall_seconds)
        for asked in (asked for stage in self.stages for asked in stage.demand.asked):
            price = prices.of(asked.model)
            cached_price = price.prompt if price.cached_prompt is None else price.cached_prompt
            new = asked.new_text_tokens + asked.new_image_tokens
            total += new * price.prompt + (asked.prompt_tokens - new) * cached_price
            total += asked.completion_tokens * price.completion
        return total / 1e6

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values; every range as low, expected, high."""
        request, storage = self.request, self.storage
        return {
            "rows": request.num_rows,
            "gpus": self.layout.num_gpus,
            "gpu": self.layout.gpu.name,
            "model": self.layout.model.name,
            "copies": self.layout.num_copies,
            "gpus_per_copy": self.layout.tensor,
            "processes": request.machines.num_processes,
            "parallel_shards": self.setup.parallel_per_process,
            "shard_rows": request.config.shard_rows,
            "shards": request.num_shards,
            "stages": [stage.to_record() for stage in self.stages],
            "total": {
                **{name: as_range(self.total(name)) for name in ("calls", "prompt_tokens", "completion_tokens")},
                "gpu_hours": as_range(self.gpu_seconds / 3600),
                "held_gpu_hours": as_range(self.held_gpu_seconds / 3600),
                "core_hours": as_range(self.core_seconds / 3600),
                "wall_hours": as_range(self.wall_seconds / 3600),
            },
            "cost": {"gpus": as_range(self.gpu_cost), "tokens": as_range(self.token_cost)},
            "storage_bytes": {
                name: as_range(getattr(storage, name)) for name in ("images", "journals", "stages", "corpus", "total")
            },
            "driver_memory_bytes": {
                name: as_range(getattr(storage, f"{name}_memory")) for name in ("compared", "traces", "markers")
            },
            "files": {"images": as_range(storage.image_files), "others": storage.other_files},
            "prefect": {"task_runs": self.num_tasks, "database_bytes": as_range(self.database_bytes)},
            "assumptions": [asdict(assumption) for assumption in request.assumptions],
        }


def plan_run(request: Request) -> Plan:
    """Returns the plan; where the settings are not the user's, with shards as large and as many as serve it.

    Raises ConfigError: a number is none, the model is unknown or does not fit.
    """
    if request.num_rows < 1 or request.num_gpus < 1:
        raise ConfigError(f"{request.num_rows} rows on {request.num_gpus} GPUs: both must be at least 1")
    if request.is_own:
        known = known_from_sources(request.assumptions, request.config)
        return plan_with_settings(replace(request, assumptions=known), request.config.parallel_shards)
    return best_settings(request)


def best_settings(request: Request) -> Plan:
    """Returns the plan with the fewest rows in work at once that is within a tenth of the fastest.

    Too few, and GPUs wait for the slowest rows of shards; too many, and each holds memory, and a killed run repeats
    more. Shards are so large that the files of a stage fit into a folder. Raises ConfigError as `plan_run` does.
    """
    quickly = replace(request, assumptions=request.assumptions.expected())
    fitting = [rows for rows in SHARD_ROWS if 2 * FILES_PER_SHARD * request.num_rows <= MAX_FOLDER_FILES * rows]
    plans = [
        plan_with_settings(_with_shard_rows(quickly, rows), parallel)
        for rows in fitting or SHARD_ROWS[-1:]
        for parallel in PARALLEL_SHARDS
    ]
    fastest = min(float(plan.wall_seconds[0]) for plan in plans)
    quick = [plan for plan in plans if float(plan.wall_seconds[0]) <= _NEAR * fastest]
    best = min(
        quick, key=lambda plan: (plan.setup.num_parallel * plan.request.config.shard_rows, plan.setup.num_parallel)
    )
    return plan_with_settings(
        _with_shard_rows(request, best.request.config.shard_rows), best.setup.parallel_per_process
    )


def _with_shard_rows(request: Request, rows: int) -> Request:
    return replace(request, config=request.config.model_copy(update={"shard_rows": rows}))


def plan_with_settings(request: Request, per_process: int) -> Plan:
    """Returns the plan with the settings given. Raises ConfigError as `plan_run` does."""
    config = request.config
    layout = lay_out(model_shape(_served(config)), request.gpu, request.num_gpus, config.serve or ServeConfig())
    demands = demand(request.num_rows, config, request.assumptions, request.sampling)
    setup = Setup(request, layout, per_process)
    return Plan(setup, storage_of(request, demands), tuple(plan_stage(setup, stage) for stage in demands))


def _served(config: RunConfig) -> str:
    """Returns the name or folder of the teacher's weights."""
    return (config.serve.model_path if config.serve else None) or config.teacher.model
