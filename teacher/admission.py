"""How many sequences an endpoint is given at once: a window that grows until the engine has a small queue, and no more.

Pure, with the time handed in. Two laws, by what the server says of itself:

- *vLLM's load* (`on_load`): the window doubles while the engine runs everything it is given, then grows by the room in
  the queue that is wanted (additive increase), and gives back what waits beyond it. A preemption means that the cache
  is overfull: everything since has been computed twice, so the window shrinks by a share (multiplicative decrease).
- *nothing* (`on_finished` alone): it doubles as long as that brings more finished sequences per second, then tries a
  tenth more from time to time and goes back when that brings nothing.

A refusal for overload (429, 503) halves the window under both laws, once for all calls that were refused together.
There is nothing to tune: `most` is a bound for endpoints that must not be asked more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from teacher.engine_load import EngineLoad

FIRST_WINDOW = 16
"""Sequences given to an endpoint nobody has asked yet; after eight looks of half a second it can be 4,096."""
QUEUE_SHARE = 0.1
MIN_QUEUE = 4
"""Wanted queue: a tenth of what runs, at least 4, so that no engine step finds a free place and nobody to take it."""
FULL_CACHE = 0.95
"""Share of the key-value cache in use from which on more sequences would soon throw out others."""
PREEMPTION_CUT = 0.8
OVERLOAD_CUT = 0.5
OVERLOAD_SECONDS = 1.0
"""Refusals within this time are one sign: the calls were sent together, before the first of them came back."""
EPOCH_SECONDS = 1.0
"""A rate is measured over at least this time and one window of finished sequences, after one more to settle."""
GROWTH_GAIN = 1.1
"""Doubling the window must bring at least a tenth more per second to be doubled again."""
PROBE_STEP = 1.1
PROBE_GAIN = 1.02
NUM_HOLD_EPOCHS = 8


@dataclass(slots=True)
class Window:
    """Most sequences in flight at one endpoint. most: it never grows beyond. size: what it is now."""

    most: int
    size: float = FIRST_WINDOW
    is_doubling: bool = True
    is_told: bool = False
    """Whether the server tells its load; rates of finished sequences are not looked at then."""

    _num_preemptions: int | None = None
    _overloaded_at: float = -math.inf
    _epoch_began: float | None = None
    _num_finished: int = 0
    _was_full: bool = False
    _last_rate: float = 0.0
    _last_size: float = 0.0
    _num_held: int = 0

    def __post_init__(self) -> None:
        self._resize(self.size)

    @property
    def limit(self) -> int:
        return int(self.size)

    def on_load(self, load: EngineLoad, num_in_flight: int) -> None:
        """Follows what the engine says. num_in_flight: sequences that we have there at this moment."""
        self.is_told = True
        preempted = self._num_preemptions is not None and load.num_preemptions > self._num_preemptions
        self._num_preemptions = load.num_preemptions
        wanted = max(MIN_QUEUE, math.ceil(QUEUE_SHARE * load.num_running))
        # What the engine has not seen yet waits as well: in the server's own process, for images to be prepared.
        num_unseen = max(0, num_in_flight - load.num_running - load.num_waiting)
        if preempted:
            self.is_doubling = False
            self._resize(min(self.size, PREEMPTION_CUT * max(num_in_flight, 1)))
        elif load.num_waiting > 2 * wanted:
            self.is_doubling = False
            self._resize(min(self.size, max(self.size / 2, num_in_flight - (load.num_waiting - wanted))))
        elif (
            load.num_waiting >= wanted or load.cache_usage >= FULL_CACHE or num_unseen > load.num_running + FIRST_WINDOW
        ):
            self.is_doubling = False
        elif num_in_flight >= 0.9 * self.limit:
            self._resize(2 * self.size if self.is_doubling else self.size + wanted - load.num_waiting)

    def on_overload(self, now: float) -> None:
        """The endpoint refused a call because it has too many. now: seconds of a steady clock."""
        if now - self._overloaded_at >= OVERLOAD_SECONDS:
            self._overloaded_at = now
            self.is_doubling = False
            self._resize(OVERLOAD_CUT * self.size)
            self._begin_epoch(now)

    def on_restart(self) -> None:
        """The endpoint is back: it begins small, as its caches are empty and what ended it may have been the load."""
        self._num_preemptions = None
        self.is_doubling = True
        self._resize(min(self.size, FIRST_WINDOW))
        self._epoch_began = None

    def on_finished(self, num_sequences: int, now: float, *, is_full: bool) -> None:
        """Counts finished sequences. is_full: the window was full when they ended, so a larger one might bring more."""
        if self.is_told:
            return
        if self._epoch_began is None:
            self._begin_epoch(now)
            return
        if self._num_finished < 0 <= self._num_finished + num_sequences:
            # Settled: those that were under way when the window changed have ended.
            self._epoch_began, self._num_finished, self._was_full = now, 0, is_full
            return
        self._num_finished += num_sequences
        self._was_full |= is_full
        seconds = now - self._epoch_began
        if seconds >= EPOCH_SECONDS and self._num_finished >= self.size:
            self._end_epoch(self._num_finished / seconds)
            self._begin_epoch(now)

    def _end_epoch(self, rate: float) -> None:
        if not self._was_full:
            # Too little to do: the rate says nothing about the endpoint.
            return
        gain = GROWTH_GAIN if self.is_doubling else PROBE_GAIN
        has_grown = self.size > self._last_size > 0
        if has_grown and rate < gain * self._last_rate:
            self._resize(self._last_size)
            self.is_doubling = False
            self._num_held, self._last_size = 0, 0.0
        elif self.is_doubling:
            self._last_rate, self._last_size = rate, self.size
            self._resize(2 * self.size)
        elif has_grown or self._num_held >= NUM_HOLD_EPOCHS:
            self._last_rate, self._last_size, self._num_held = rate, self.size, 0
            self._resize(max(self.size + 1, PROBE_STEP * self.size))
        else:
            self._num_held += 1

    def _begin_epoch(self, now: float) -> None:
        self._epoch_began, self._num_finished, self._was_full = now, -self.limit, False

    def _resize(self, size: float) -> None:
        self.size = min(float(self.most), max(1.0, size))
