"""How long the fault server's answers take: a continuously batching engine with a queue and a KV cache, simulated."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from schemas.errors import ConfigError
from teacher.fault_server.schedule import uniforms

BLOCK_TOKENS = 16
"""vLLM's block of the KV cache. A sequence is only let in where every running one has room for another block."""


@dataclass(frozen=True)
class EngineModel:
    """How long answers take. The default takes no time at all.

    latency_seconds: until a sequence has its first token, counted from when it is let in: exactly so long ("fixed"),
    spread evenly over latency_seconds * (1 +- latency_spread) ("uniform"), or with this median and latency_spread as
    the standard deviation of its logarithm ("lognormal"). It is drawn by `seed` and request, as faults are.
    max_sequences: as many run at once, the rest wait in order. tokens_per_second: of a sequence that runs alone; where
    b generate, each has tokens_per_second / (1 + (b - 1) / half_speed_sequences), so that all together come near
    tokens_per_second * half_speed_sequences. kv_cache_tokens: room for prompts and answers of the running sequences;
    where it overflows, the last one let in goes back to the head of the queue and later computes its prompt anew, but
    a sequence that runs alone is always let finish. cached_prompts: as many prompts, the last ones, count as cached.

    Raises ConfigError: a number that is not positive, an unknown shape, a uniform spread above 1.
    """

    latency_seconds: float = 0.0
    latency_shape: Literal["fixed", "uniform", "lognormal"] = "fixed"
    latency_spread: float = 0.5
    max_sequences: int | None = None
    tokens_per_second: float | None = None
    half_speed_sequences: float = math.inf
    kv_cache_tokens: int | None = None
    cached_prompts: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "tokens_per_second", "half_speed_sequences", "kv_cache_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} of the simulated engine is {value}; it must be above 0")
        if self.latency_seconds < 0 or self.latency_spread < 0 or self.cached_prompts < 0:
            raise ConfigError(f"latency, its spread and cached prompts cannot be below 0: {self}")
        if self.latency_shape not in {"fixed", "uniform", "lognormal"}:
            raise ConfigError(f"latency_shape is {self.latency_shape!r}; it must be fixed, uniform or lognormal")
        if self.latency_shape == "uniform" and self.latency_spread > 1:
            raise ConfigError(f"a uniform latency_spread of {self.latency_spread} would give times below 0")

    @property
    def is_instant(self) -> bool:
        return not self.latency_seconds and self.tokens_per_second is None

    def latency_of(self, digest: str, num_asked: int) -> float:
        """Returns the seconds until the first token of a request that was asked `num_asked` times before."""
        if self.latency_shape == "fixed" or not self.latency_seconds:
            return self.latency_seconds
        drawn = uniforms(self.seed, digest, num_asked)[2]
        if self.latency_shape == "uniform":
            return self.latency_seconds * (1 + self.latency_spread * (2 * drawn - 1))
        return self.latency_seconds * math.exp(NormalDist(0.0, self.latency_spread or 1e-9).inv_cdf(drawn))


@dataclass(eq=False, slots=True)
class Generation:
    """One sequence in the engine. num_generated: tokens it had when it last ran; they survive a preemption."""

    prompt_tokens: int
    num_tokens: int
    latency_seconds: float
    on_finish: Callable[[], None]
    num_generated: float = 0.0
    began_at: float = 0.0
    """The engine's progress when it began to generate, less what it already had."""
    is_generating: bool = False
    ticket: int = 0
    """Of its place in a heap; a place with another ticket is void."""


_Event = tuple[float, Literal["ready", "finish", "overflow"]]


class Engine:
    """A continuously batching engine as a simulation of discrete events, in a time that the caller gives.

    All sequences that generate do so at one speed, so `_progress` (tokens since the start of one that never left) says
    where each of them is: one that began at progress p has its k-th token at p + k. That makes an event O(log n).
    """

    def __init__(self, model: EngineModel, now: float) -> None:
        self.model = model
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self._num_final_tokens = 0  # of sequences that have finished or left
        self._num_partial_tokens = 0.0  # of those that have not
        self._now = now
        self._progress = 0.0
        self._num_generating = 0
        self._used_tokens = 0.0
        self._running: dict[Generation, None] = {}  # in the order they were let in
        self._waiting: deque[Generation] = deque()
        self._ready: list[tuple[float, int, Generation]] = []  # by the time of the first token
        self._finish: list[tuple[float, int, Generation]] = []  # by the progress of the last token
        self._tickets = itertools.count(1)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_generated_tokens(self) -> int:
        return self._num_final_tokens + int(max(0.0, self._num_partial_tokens))

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache in use, from 0 to 1; 0 where its size is not modelled."""
        capacity = self.model.kv_cache_tokens
        return min(1.0, max(0.0, self._used_tokens) / capacity) if capacity else 0.0

    def count(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Counts the tokens of a call that takes no time."""
        self.num_prompt_tokens += prompt_tokens
        self._num_final_tokens += generated_tokens

    def submit(self, generations: Sequence[Generation], now: float) -> None:
        self.advance(now)
        self._waiting.extend(generations)
        self._admit()

    def abort(self, generation: Generation, now: float) -> None:
        """Takes a sequence out, wherever it is; one that has finished is left alone."""
        self.advance(now)
        if generation in self._running:
            self._leave(generation)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        else:
            return
        self._settle(generation, int(generation.num_generated))
        self._admit()

    def advance(self, now: float) -> None:
        """Lets time pass up to `now`, and calls `on_finish` of each sequence that has its last token by then."""
        while (event := self._next_event()) is not None and event[0] <= now:
            at, kind = event
            self._elapse(max(at, self._now))
            if kind == "ready":
                self._begin(heapq.heappop(self._ready)[2])
            elif kind == "finish":
                self._end(heapq.heappop(self._finish)[2])
            else:
                self._preempt()
            self._admit()
        self._elapse(max(now, self._now))

    def next_event_at(self) -> float | None:
        """Returns when something will happen by itself, or None while nothing runs."""
        event = self._next_event()
        return event[0] if event else None

    def _next_event(self) -> _Event | None:
        for heap in (self._ready, self._finish):
            while heap and heap[0][1] != heap[0][2].ticket:
                heapq.heappop(heap)
        events: list[_Event] = []
        if self._ready:
            events.append((self._ready[0][0], "ready"))
        speed = self._speed()
        if self._finish:
            events.append((self._now + max(0.0, self._finish[0][0] - self._progress) / speed, "finish"))
        capacity = self.model.kv_cache_tokens
        if capacity is not None and self._num_generating and len(self._running) > 1:
            left = max(0.0, capacity - self._used_tokens)
            events.append((self._now + left / (speed * self._num_generating), "overflow"))
        return min(events, key=lambda event: event[0], default=None)

    def _speed(self) -> float:
        """Returns the tokens per second of each sequence that generates."""
        if self.model.tokens_per_second is None:
            return math.inf
        return self.model.tokens_per_second / (1 + max(0, self._num_generating - 1) / self.model.half_speed_sequences)

    def _elapse(self, at: float) -> None:
        if self._num_generating and at > self._now:
            tokens = (at - self._now) * self._speed()
            self._progress += tokens
            self._used_tokens += tokens * self._num_generating
            self._num_partial_tokens += tokens * self._num_generating
        self._now = at

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            generation = self._waiting.popleft()
            if not generation.num_generated:
                self.num_prompt_tokens += generation.prompt_tokens
            self._running[generation] = None
            self._used_tokens += generation.prompt_tokens + generation.num_generated
            self._push(self._ready, self._now + generation.latency_seconds, generation)

    def _fits(self, generation: Generation) -> bool:
        model = self.model
        if model.max_sequences is not None and len(self._running) >= model.max_sequences:
            return False
        if model.kv_cache_tokens is None or not self._running:
            return True
        margin = BLOCK_TOKENS * (len(self._running) + 1)
        wanted = generation.prompt_tokens + generation.num_generated
        return self._used_tokens + wanted + margin <= model.kv_cache_tokens

    def _begin(self, generation: Generation) -> None:
        """The prompt is computed: the sequence generates from now on."""
        if self.model.tokens_per_second is None:
            self._end(generation)
            return
        generation.is_generating = True
        generation.began_at = self._progress - generation.num_generated
        self._num_generating += 1
        self._push(self._finish, generation.began_at + generation.num_tokens, generation)

    def _end(self, generation: Generation) -> None:
        self._leave(generation)
        self._settle(generation, generation.num_tokens)
        generation.on_finish()

    def _settle(self, generation: Generation, num_tokens: int) -> None:
        """Counts the tokens of a sequence for good."""
        self._num_partial_tokens -= generation.num_generated
        self._num_final_tokens += num_tokens
        if not self._running and not self._waiting:
            self._num_partial_tokens = 0.0  # what rounding has left over

    def _leave(self, generation: Generation) -> None:
        del self._running[generation]
        generation.ticket = 0
        if generation.is_generating:
            generation.num_generated = self._progress - generation.began_at
            generation.is_generating = False
            self._num_generating -= 1
        self._used_tokens -= generation.prompt_tokens + generation.num_generated
        if not self._running:
            self._used_tokens = 0.0  # what rounding has left over

    def _preempt(self) -> None:
        generation = next(reversed(self._running))
        self._leave(generation)
        self._waiting.appendleft(generation)
        self.num_preemptions += 1

    def _push(self, heap: list[tuple[float, int, Generation]], at: float, generation: Generation) -> None:
        generation.ticket = next(self._tickets)
        heapq.heappush(heap, (at, generation.ticket, generation))


class EngineLife:
    """One life of the engine's process: what a restart begins anew. Bound to the running event loop."""

    def __init__(self, model: EngineModel) -> None:
        self.started_at = time.time()
        self._loop = asyncio.get_running_loop()
        self.engine = Engine(model, self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._cached: dict[str, None] = {}  # questions, the last asked at the end

    async def generate(self, prompt_tokens: int, num_tokens: Sequence[int], latency_seconds: float) -> None:
        """Returns when the engine has generated one sequence of each length; aborts them when it is cancelled."""
        done: asyncio.Future[None] = self._loop.create_future()
        num_left = len(num_tokens)

        def finish() -> None:
            nonlocal num_left
            num_left -= 1
            if not num_left and not done.done():
                done.set_result(None)

        generations = [Generation(prompt_tokens, number, latency_seconds, finish) for number in num_tokens]
        self.engine.submit(generations, self._loop.time())
        self._wind()
        try:
            await done
        finally:
            if num_left:
                for generation in generations:
                    self.engine.abort(generation, self._loop.time())
                self._wind()

    def cached_tokens(self, question: str, prompt_tokens: int) -> int:
        """Returns how many of the prompt's tokens are cached, and caches it: whole blocks short of the last token."""
        is_cached = question in self._cached
        self._cached.pop(question, None)
        self._cached[question] = None
        if len(self._cached) > self.engine.model.cached_prompts:
            del self._cached[next(iter(self._cached))]
        return max(0, prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS if is_cached else 0

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wind(self) -> None:
        """Sets the timer to the engine's next event."""
        self.end()
        at = self.engine.next_event_at()
        self._timer = None if at is None else self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self.engine.advance(self._loop.time())
        self._wind()


def render_metrics(engine: Engine, started_at: float, model: str) -> bytes:
    """Returns the engine's state as vLLM's /metrics shows it, in Prometheus's text format."""
    name = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'{{engine="0",model_name="{name}"}}'
    metrics = [
        ("vllm:num_requests_running", "gauge", "Number of requests in model execution batches.", engine.num_running),
        ("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.", engine.num_waiting),
        ("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", engine.kv_cache_usage),
        (
            "vllm:num_preemptions_total",
            "counter",
            "Cumulative number of preemption from the engine.",
            engine.num_preemptions,
        ),
        ("vllm:prompt_tokens_total", "counter", "Number of prefill tokens processed.", engine.num_prompt_tokens),
        (
            "vllm:generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            engine.num_generated_tokens,
        ),
    ]
    lines = [
        f"# HELP {metric} {documentation}\n# TYPE {metric} {kind}\n{metric}{labels} {float(value)}\n"
        for metric, kind, documentation, value in metrics
    ]
    lines.append(
        "# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.\n"
        f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {started_at!r}\n"
    )
    return "".join(lines).encode()
