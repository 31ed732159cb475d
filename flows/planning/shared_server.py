"""A resource of the simulation that all its jobs share equally: processor sharing."""

from __future__ import annotations

import heapq
import itertools

import simpy

_LEAST = 1e-9
"""Work below it is none: rounding must not keep a server awake."""


class SharedServer:
    """A resource that all jobs share equally, none having more than a cap of it (processor sharing).

    capacity, cap: in units of work per second. Each of n jobs gets min(cap, capacity / n). A virtual time runs at that
    rate: a job that begins at V ends when it has reached V plus its work, however many come and go, so that each event
    costs a look into a heap.
    """

    def __init__(self, env: simpy.Environment, capacity: float, cap: float) -> None:
        assert capacity > 0 and cap > 0, (capacity, cap)
        self._env, self._capacity, self._cap = env, capacity, cap
        self._jobs: list[tuple[float, int, simpy.Event]] = []
        self._numbers = itertools.count()
        self._virtual, self._looked_at, self._version = 0.0, env.now, 0
        self.work_done = 0.0
        self.offered = 0.0
        """Capacity times time so far."""

    def serve(self, work: float) -> simpy.Event:
        """Returns the event of so much work being done."""
        done = self._env.event()
        if work <= _LEAST:
            return done.succeed()
        self._advance()
        heapq.heappush(self._jobs, (self._virtual + work, next(self._numbers), done))
        self._wake()
        return done

    def change_capacity(self, change: float) -> None:
        """Adds to the capacity; a server without any stands still."""
        self._advance()
        self._capacity += change
        self._wake()

    def settle(self) -> None:
        """Brings `work_done` and `offered` up to now."""
        self._advance()

    @property
    def _rate(self) -> float:
        return min(self._cap, max(0.0, self._capacity) / len(self._jobs)) if self._jobs else 0.0

    def _advance(self) -> None:
        passed, rate = self._env.now - self._looked_at, self._rate
        self._virtual += rate * passed
        self.work_done += rate * passed * len(self._jobs)
        self.offered += max(0.0, self._capacity) * passed
        self._looked_at = self._env.now

    def _wake(self) -> None:
        """Looks again when the next job ends, unless something changes before."""
        self._version += 1
        if self._jobs and self._rate > 0:
            version, after = self._version, max(0.0, (self._jobs[0][0] - self._virtual) / self._rate)
            self._env.timeout(after).callbacks.append(lambda _: self._end_jobs(version))

    def _end_jobs(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        # The first one has ended, whatever rounding says.
        self._virtual = max(self._virtual, self._jobs[0][0])
        while self._jobs and self._jobs[0][0] <= self._virtual * (1 + 1e-12) + _LEAST:
            heapq.heappop(self._jobs)[2].succeed()
        if not self._jobs:
            self._virtual = 0.0
        self._wake()
