"""What is to be planned: rows, GPUs, settings, machines; and how many shards of it are in work at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flows.planning.assumptions import Assumptions, Values
from flows.planning.demand import SamplingCost
from flows.planning.gpus import GpuKind
from schemas.config import RunConfig, parse_config

CORES_PER_GPU = 4
"""Of a host's cores for the pipeline: a machine of eight GPUs has a hundred or more, of which vLLM needs some too."""
CORES_PER_PROCESS = 8
"""That the threads of one process keep busy: decoding, comparing and writing leave Python's lock, the rest does not."""
MAX_TASKS = 64
"""As `flows.crew.MAX_TASKS`: the shards of a step are dealt to so many Prefect tasks at most. (That module imports
Prefect, which takes seconds.)"""
DEFAULT_CONFIG = parse_config({"sources": [{"name": "planned", "format": "jsonl", "path": "."}]})
"""All settings at their defaults; of the source nothing is known."""


@dataclass(frozen=True, slots=True)
class Machines:
    """What the run has. num_processes: of the pipeline; one without Ray, with it as many tasks as are done at once;
    each asks by an event loop on one core. memory_bytes: of the driver's host. network_bytes: per second and host."""

    num_cores: int
    num_processes: int = 1
    memory_bytes: float = 256 * 2**30
    network_bytes: float = 25e9 / 8

    @classmethod
    def beside(cls, num_gpus: int) -> Machines:
        """Returns what stands beside so many GPUs by default; see `CORES_PER_GPU`."""
        return cls(max(2, CORES_PER_GPU * num_gpus))

    @property
    def num_busy_processes(self) -> int:
        """Returns how many have a task."""
        return min(self.num_processes, MAX_TASKS)


@dataclass(frozen=True, slots=True)
class Request:
    """What is planned.

    config: its settings count, and of its sources what they settle. is_own: whether it is the user's; else size and
    number of shards in work are chosen. elsewhere: models that are asked elsewhere: their tokens have a price, but no
    GPU here. sampling: measured, see `demand`.
    """

    num_rows: int
    num_gpus: int
    gpu: GpuKind
    machines: Machines
    config: RunConfig = DEFAULT_CONFIG
    is_own: bool = False
    assumptions: Assumptions = field(default_factory=Assumptions)
    elsewhere: frozenset[str] = frozenset()
    sampling: SamplingCost | None = None

    @property
    def is_ray(self) -> bool:
        """Whether workers of a Ray cluster do the shards, instead of threads of the flow's process."""
        return self.config.ray is not None or self.machines.num_processes > 1

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_rows / self.config.shard_rows)

    def num_parallel(self, per_process: int) -> int:
        """Returns how many shards are in work at once: a step has 64 tasks at most, without Ray of one each."""
        at_once = self.machines.num_busy_processes * per_process if self.is_ray else min(per_process, MAX_TASKS)
        return min(at_once, self.num_shards)

    def usable_cores(self, per_process: int) -> int:
        """Returns how many cores the pipeline keeps busy: a shard in work takes one."""
        most = CORES_PER_PROCESS * self.machines.num_busy_processes
        return min(self.machines.num_cores, self.num_parallel(per_process), most)


def context_tokens(assumptions: Assumptions) -> Values:
    """Returns the mean length of a sequence of the performance stage: its prompt, and half of its reply."""
    a = assumptions
    images = (1 - a.text_only_share.drawn()) * a.images_per_row.drawn() * a.image_tokens.drawn()
    return np.asarray(a.question_tokens.drawn() + images + a.answer_tokens.drawn() / 2)
