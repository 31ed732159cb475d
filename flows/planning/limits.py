"""What breaks first when rows or GPUs grow, at which number, and what then.

Each limit is a load against what there is, at the expected values. Loads that grow with the rows are memory and files;
those that grow with the GPUs are rates. A load of 1 is where the limit is reached; how far it is from there says at
how many rows or GPUs, all else as planned, it would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flows.planning.assumptions import Values
from flows.planning.gpus import GPUS_PER_HOST
from flows.planning.plan import Plan, best_settings
from flows.planning.stage_plans import StagePlan
from flows.planning.storage import FILES_PER_SHARD, MAX_FOLDER_FILES

IMAGE_FOLDERS = 4096
_BASE_BYTES = 0.6 * 2**30
"""Of the driver before it compares anything (`benchmarks.duplicates`)."""
_BASE64 = 4 / 3
_ON_RAY = "a `ray` section (`address: local` on one machine): partitions through files, as much memory as a part has"


@dataclass(frozen=True, slots=True)
class Limit:
    """load: of what there is; above 1 it is too little. grows_with, at: how many rows or GPUs reach it, or how many
    times as fast a copy of the model would have to be."""

    name: str
    load: float
    grows_with: Literal["rows", "GPUs", "speed"]
    at: float
    what: str
    then: str

    def to_record(self) -> dict[str, Any]:
        return {"name": self.name, "load": self.load, "grows_with": self.grows_with, "at": self.at, "then": self.then}


def limits(plan: Plan) -> list[Limit]:
    """Returns the limits of a plan, the tightest first."""
    found = [*_rate_limits(plan), *_size_limits(plan)]
    return sorted(found, key=lambda limit: -limit.load)


def _rate_limits(plan: Plan) -> Iterator[Limit]:
    machines, a = plan.request.machines, plan.request.assumptions
    asking = [stage for stage in plan.stages if stage.gpu_seconds[0] > 0]
    if not asking:
        return

    def by_gpus(name: str, load: float, what: str, then: str) -> Limit:
        return Limit(name, load, "GPUs", plan.layout.num_gpus / max(load, 1e-12), what, then)

    slowest = max(asking, key=lambda stage: _tail_seconds(stage) / float(stage.wall_seconds[0]))
    then = "larger shards, or more of them at once (shard_rows, parallel_shards)"
    if plan.request.is_own:
        better = best_settings(plan.request)
        then = f"shard_rows: {better.request.config.shard_rows}, parallel_shards: {better.setup.parallel_per_process}"
    yield by_gpus(
        "rows under way",
        _waiting_share(plan, asking),
        f"{plan.setup.num_parallel} shards of {plan.request.config.shard_rows:,} rows in work; in {slowest.name} each "
        f"waits {_tail_seconds(slowest):,.0f} s for its slowest row",
        then,
    )
    client = max(_load(stage, stage.client_seconds) / machines.num_busy_processes for stage in asking)
    yield by_gpus(
        "client process",
        client,
        f"one event loop makes {1e3 / a.call_ms.expected:,.0f} calls/s, with {machines.num_busy_processes} of them",
        "shards on Ray: each host asks with processes of its own",
    )
    cores = plan.setup.usable_cores
    num_hosts = math.ceil(plan.layout.num_gpus / GPUS_PER_HOST) if plan.request.is_ray else 1
    yield by_gpus(
        "processors",
        max(_load(stage, stage.core_seconds) / cores for stage in asking),
        f"{cores} cores that the pipeline can use pass on rows, ask and verify",
        "shards on Ray: workers with cores alone; parallel_shards as many as cores",
    )
    yield by_gpus(
        "network of the client",
        max(_load(stage, _image_bytes(plan, stage) * _BASE64) for stage in asking)
        / (machines.network_bytes * num_hosts),
        f"images travel as base64 from {num_hosts} host(s) of {machines.network_bytes * 8 / 1e9:.0f} Gbit/s",
        "images by name (`images_as: file_url`) from storage that the servers mount; or clients on Ray workers",
    )
    images_per_second = max(_load(stage, _num_new_images(plan, stage)) for stage in asking) / plan.layout.num_copies
    prepared = images_per_second * a.prepare_ms.expected / 1e3
    yield Limit(
        "vLLM's image preparation",
        prepared,
        "speed",
        1 / max(prepared, 1e-12),
        f"{images_per_second:,.1f} new images/s on the one core of a copy that cuts them into patches",
        "serve.extra_args: [--api-server-count, N]",
    )
    yield by_gpus(
        "Prefect's server",
        plan.num_tasks * a.task_ms.expected / 1e3 / float(plan.wall_seconds[0]),
        f"{plan.num_tasks:,} task runs of {a.task_ms.expected:.0f} ms",
        "fewer, larger groups of shards",
    )
    without = sum(float(stage.wall_seconds[0]) for stage in plan.stages if stage not in asking)
    yield by_gpus(
        "stages without the GPUs",
        without / max(float(plan.wall_seconds[0]) - without, 1e-9),
        f"{without / 3600:,.1f} h of reading, comparing and writing",
        "GPUs from `routing` to `answers` alone; shards on Ray before",
    )


def _size_limits(plan: Plan) -> Iterator[Limit]:
    storage, rows = plan.storage, plan.request.num_rows
    memory = plan.request.machines.memory_bytes

    def by_rows(name: str, base: float, load: float, capacity: float, what: str, then: str) -> Limit:
        at = rows * (capacity - base) / max(load, 1e-12)
        return Limit(name, (base + load) / capacity, "rows", at, what, then)

    gib = memory / 2**30
    traces, compared = float(storage.traces_memory[0]), float(storage.compared_memory[0])
    if traces:
        yield by_rows(
            "memory for comparing traces",
            _BASE_BYTES,
            traces,
            memory,
            f"{traces / 2**30:,.1f} of {gib:,.0f} GiB: the words of all traces at once",
            _ON_RAY,
        )
    yield by_rows(
        "memory for comparing rows",
        _BASE_BYTES,
        compared,
        memory,
        f"{compared / 2**30:,.1f} of {gib:,.0f} GiB: keys and bands of all rows at once",
        _ON_RAY if not plan.request.is_ray else "a driver with more memory",
    )
    markers = float(storage.markers_memory[0])
    yield by_rows(
        "memory for markers",
        0.0,
        markers,
        memory / 4,
        f"{markers / 2**30:,.2f} GiB of a quarter of {gib:,.0f} GiB: one of each shard and stage",
        "larger shards (shard_rows)",
    )
    yield by_rows(
        "files of a stage in one folder",
        0.0,
        float(FILES_PER_SHARD * plan.request.num_shards),
        MAX_FOLDER_FILES,
        f"{FILES_PER_SHARD * plan.request.num_shards:,} files",
        "larger shards (shard_rows)",
    )
    images = float(storage.image_files[0]) / IMAGE_FOLDERS
    yield by_rows(
        "images in one folder",
        0.0,
        images,
        MAX_FOLDER_FILES,
        f"{images:,.0f} files in each of {IMAGE_FOLDERS:,} folders, {float(storage.image_files[0]):,.0f} inodes in all",
        "a file system with inodes on demand (XFS, object storage); images packed per shard",
    )


def _tail_seconds(stage: StagePlan) -> float:
    return 0.0 if stage.tail is None else float(stage.tail.seconds[0])


def _waiting_share(plan: Plan, asking: Sequence[StagePlan]) -> float:
    """Returns what shards wait for their slowest rows, one after the other in each lane, in parts of the GPUs' work."""
    waits = sum(_tail_seconds(stage) for stage in asking) * plan.request.num_shards / plan.setup.num_parallel
    gpus = sum(float(stage.gpu_seconds[0]) for stage in asking) / (plan.layout.num_copies * plan.layout.tensor)
    return waits / max(gpus, 1e-9)


def _load(stage: StagePlan, amount: Values) -> float:
    """Returns so much of anything per second of a stage whose pace the GPUs set."""
    return float(amount[0]) / max(float(stage.wall_seconds[0] - stage.serial_seconds[0]), 1e-9)


def _num_new_images(plan: Plan, stage: StagePlan) -> Values:
    """Returns the images that a stage sends and no cache holds."""
    tokens = max(plan.request.assumptions.image_tokens.expected, 1e-9)
    return np.asarray(stage.total("new_image_tokens") / tokens)


def _image_bytes(plan: Plan, stage: StagePlan) -> Values:
    """Returns the bytes of images in all calls of a stage: later calls of a row carry them again."""
    a = plan.request.assumptions
    images = (1 - a.text_only_share.expected) * a.images_per_row.expected
    return np.asarray(stage.total("calls") * images * a.image_bytes.expected)
