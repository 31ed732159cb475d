"""What a vLLM engine says of its load, read from the Prometheus text at /metrics. Pure.

Checked against vLLM 0.32. Engines of a data-parallel server each have a line of their own; their counts are added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_CACHE = "vllm:kv_cache_usage_perc"
_PREEMPTIONS = "vllm:num_preemptions_total"
_STARTED = "process_start_time_seconds"
_NAMES = "|".join([_RUNNING, _WAITING, _CACHE, _PREEMPTIONS, _STARTED])
_LINE = re.compile(rf"^({_NAMES})(?:\{{[^\n]*\}})? (\S+)".encode(), re.MULTILINE)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One look at an engine.

    num_running, num_waiting: sequences being computed and queued. cache_usage: largest share of an engine's key-value
    cache in use, in [0, 1]. num_preemptions: sequences thrown out of the cache since the start. started: when the
    server began, in seconds since the epoch, or None; another value than before means that it has been restarted.
    num_engines: copies of the model behind the address.
    """

    num_running: int
    num_waiting: int
    cache_usage: float = 0.0
    num_preemptions: int = 0
    started: float | None = None
    num_engines: int = 1


def parse_load(text: bytes) -> EngineLoad | None:
    """Returns the load in the text of /metrics, or None when it is not vLLM that speaks."""
    values: dict[str, list[float]] = {}
    for name, value in _LINE.findall(text):
        try:
            values.setdefault(name.decode(), []).append(float(value))
        except ValueError:
            continue
    if _RUNNING not in values or _WAITING not in values:
        return None
    started = values.get(_STARTED)
    return EngineLoad(
        num_running=_whole(values, _RUNNING, sum),
        num_waiting=_whole(values, _WAITING, sum),
        cache_usage=max(values.get(_CACHE, [0.0])),
        num_preemptions=_whole(values, _PREEMPTIONS, sum),
        started=started[0] if started else None,
        num_engines=len(values[_RUNNING]),
    )


def _whole(values: dict[str, list[float]], name: str, combine: Callable[[Iterable[float]], float]) -> int:
    # NaN and the infinities compare false: a number nobody can count with is none.
    return int(combine(value for value in values.get(name, []) if 0 <= value < 2**53))
