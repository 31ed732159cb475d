"""Which GPUs there are, and how a model is laid out on them.

Two ways to use several GPUs: side by side, each with a whole copy of the model (data parallel), or together on one
copy (tensor parallel). Copies scale throughput almost linearly, for they never wait for each other; GPUs that share a
copy exchange their partial sums twice in every layer. What labels a corpus is throughput, so the rule is: the fewest
GPUs per copy that hold the weights *and* a batch worth the name, and as many copies as fit.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.config import ServeConfig
from schemas.errors import ServingError
from teacher.weights import ModelFacts

_log = logging.getLogger(__name__)

_GIB = 2**30
_WORK_BYTES = 3 * _GIB
"""Of each GPU for what is neither weights nor cache: activations of the image encoder, logits, graphs, NCCL."""
_BATCH_TOKENS = 64 * 1024
"""Tokens that must fit into the cache of one copy: 64 sequences of a kilotoken (an image and a worked answer). A
decoding step reads all weights once, however many sequences share it; below some 64 it does little else."""
_UNKNOWN_CACHE_SHARE = 0.25
"""Of the usable memory, for the cache of a model whose size per token is unknown."""
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that the server may use. memory_bytes: None where it cannot be told."""

    index: str
    uuid: str = ""
    memory_bytes: int | None = None
    name: str = "GPU"


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How the model is laid out. tensor: GPUs per copy. data: copies."""

    tensor: int = 1
    data: int = 1


def find_gpus() -> list[Gpu]:
    """Returns the NVIDIA GPUs that this process may use: those of nvidia-smi, within CUDA_VISIBLE_DEVICES.

    As in CUDA, a name that is none ends the list of visible devices. Slices of a GPU (MIG) have names of their own,
    and a process can use one of them only.
    """
    present = _present_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    chosen: list[Gpu] = []
    for name in (word.strip() for word in visible.split(",")):
        if name.startswith("MIG-"):
            return [Gpu(name)]
        found = [gpu for gpu in present if name == gpu.index or (name.startswith("GPU-") and gpu.uuid.startswith(name))]
        if present and len(found) != 1:
            break
        # Without nvidia-smi the names are all there is to go by.
        if not present and not (name.isdigit() or name.startswith("GPU-")):
            break
        chosen += found or [Gpu(name)]
    return chosen


def choose_parallelism(gpus: Sequence[Gpu], facts: ModelFacts, serve: ServeConfig) -> Parallelism:
    """Returns how to lay a model out on the GPUs; what the settings say is taken as it is.

    Without GPUs known to us (other makers', the CPU build) it is one copy on one device. The smallest GPU counts for
    all. Where memory or model are unknown, a copy spreads over as many GPUs as its heads allow: that cannot fail for
    want of memory where less would do.

    Raises ServingError: if the settings ask for more GPUs than there are.
    """
    tensor, data = serve.tensor_parallel_size, serve.data_parallel_size
    if not gpus:
        return Parallelism(tensor or 1, data or 1)
    if (tensor or 1) * (data or 1) > len(gpus):
        raise ServingError(
            f"serve.tensor_parallel_size = {tensor or 1} times serve.data_parallel_size = {data or 1} needs more GPUs "
            f"than the {len(gpus)} there are"
        )
    if tensor is None:
        sizes = tensor_sizes(len(gpus) // (data or 1), facts)
        tensor = next((size for size in sizes if _fits(size, gpus, facts, serve.gpu_memory_utilization)), sizes[-1])
    chosen = Parallelism(tensor, data or len(gpus) // tensor)
    num_idle = len(gpus) - chosen.tensor * chosen.data
    _log.info("%d x %s: %d copies of the model on %d GPUs each", len(gpus), gpus[0].name, chosen.data, chosen.tensor)
    if num_idle:
        _log.warning("%d GPUs stay idle: %d copies of %d GPUs leave them over", num_idle, chosen.data, chosen.tensor)
    return chosen


def tensor_sizes(num_gpus: int, facts: ModelFacts) -> list[int]:
    """Returns over how many GPUs one copy can be spread, in rising order.

    Powers of two: hidden sizes and heads are multiples of them, and links between GPUs are built for them. Each GPU
    takes whole attention heads, and whole key-value heads or, beyond their number, copies of one.
    """
    sizes = [1]
    while (size := sizes[-1] * 2) <= num_gpus and _divides(size, facts):
        sizes.append(size)
    return sizes


def _divides(size: int, facts: ModelFacts) -> bool:
    kv_heads = facts.num_kv_heads
    has_whole_heads = facts.num_heads is None or facts.num_heads % size == 0
    return has_whole_heads and (kv_heads is None or kv_heads % size == 0 or size % kv_heads == 0)


def _fits(size: int, gpus: Sequence[Gpu], facts: ModelFacts, utilization: float) -> bool:
    """Returns whether weights and a batch fit into so many GPUs; False when it cannot be told."""
    memory = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    if len(memory) < len(gpus) or facts.weights_bytes is None:
        return False
    usable = utilization * min(memory)
    if facts.token_bytes is None:
        cache = _UNKNOWN_CACHE_SHARE * usable
    else:
        # Beyond the number of key-value heads, each further GPU holds a copy of what another one has.
        cache = _BATCH_TOKENS * facts.token_bytes / min(size, facts.num_kv_heads or size)
    return facts.weights_bytes / size + cache + _WORK_BYTES <= usable


def _present_gpus() -> list[Gpu]:
    """Returns the GPUs that the driver lists, in the order of their indices; none where there is no driver."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus: list[Gpu] = []
    for line in done.stdout.splitlines():
        words = [word.strip() for word in line.split(",", maxsplit=3)]
        if len(words) != 4:
            continue
        index, uuid, mebibytes, name = words
        # GPUs that share the machine's memory say "[N/A]".
        gpus.append(Gpu(index, uuid, int(mebibytes) * 2**20 if mebibytes.isdigit() else None, name))
    return gpus
