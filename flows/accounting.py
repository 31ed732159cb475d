"""What a run pays, counted while it runs: per shard and endpoint, per process, and how fast it goes.

`schemas.usage` says what is counted. Nothing counted here enters a digest: a run that was killed and started again pays
otherwise for the same corpus.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from corpus.accounting import amount
from schemas.usage import Cost, Ledger, Usage, UsageKey, merged_ledgers, total_usage

RATE_SECONDS = 60.0
"""Rates of the live line are those of the last minute: what a stage did before says little about what it does now."""


@dataclass(slots=True)
class Share:
    """What one call had of a clock. seconds: 0 until it has ended."""

    seconds: float = 0.0


class SharedClock:
    """Time on the clock, shared in equal parts by the sequences that are under way at the same time.

    The shares sum to the time during which anything was under way. A virtual time runs the slower the more share it
    (as in processor sharing), so that beginning and ending cost the same however many there are. For one event loop.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._num_sequences = 0
        self._virtual_seconds = 0.0
        self._looked_at = 0.0

    @contextmanager
    def shared(self, num_sequences: int) -> Iterator[Share]:
        """Counts so many sequences as under way; their share is known afterwards."""
        began = self.begin(num_sequences)
        share = Share()
        try:
            yield share
        finally:
            share.seconds = self.end(num_sequences, began)

    def begin(self, num_sequences: int) -> float:
        """Counts so many sequences as under way, until `end`. For calls by the million; others use `shared`."""
        return self._advance(num_sequences)

    def end(self, num_sequences: int, began: float) -> float:
        """Returns the share in seconds of sequences that end. began: what `begin` returned."""
        return num_sequences * (self._advance(-num_sequences) - began)

    def _advance(self, num_more: int) -> float:
        """Returns the virtual time; from now on so many more sequences share it."""
        now = self._now()
        if self._num_sequences:
            self._virtual_seconds += (now - self._looked_at) / self._num_sequences
        self._looked_at = now
        self._num_sequences += num_more
        return self._virtual_seconds


@dataclass(frozen=True, slots=True)
class AskedUsage:
    """What one endpoint was asked within one shard.

    model: the name by which it was asked. costs: of the replies, whoever paid, by (sample_id, purpose). paid: by this
    process, by purpose.
    """

    model: str
    costs: Mapping[tuple[str, str], Usage]
    paid: Mapping[str, Usage]

    def paid_ledger(self, stage: str, source: str) -> dict[UsageKey, Usage]:
        return {UsageKey(stage, purpose, source, self.model): usage for purpose, usage in self.paid.items()}

    def cost_ledger(self, stage: str, source: str) -> dict[UsageKey, Usage]:
        """Returns what the replies cost; GPU time is known of those that were paid now."""
        ledger: dict[UsageKey, Usage] = {}
        for (_, purpose), usage in self.costs.items():
            key = UsageKey(stage, purpose, source, self.model)
            ledger[key] = ledger.get(key, Usage()) + usage
        for key, usage in self.paid_ledger(stage, source).items():
            # The time of calls that brought no reply belongs to the cost of those that did.
            num_known = min(usage.num_gpu_calls, usage.num_calls - usage.num_failures)
            if key in ledger and num_known:
                ledger[key] = replace(ledger[key], gpu_seconds=usage.gpu_seconds, num_gpu_calls=num_known)
        return ledger


class Accounts:
    """What this process has paid so far. Threads may use it at once, but see `paid`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed: dict[UsageKey, Usage] = {}
        self._open: list[Callable[[], Ledger]] = []
        self._clocks: dict[str, SharedClock] = {}

    def clock(self, name: str) -> SharedClock:
        """Returns the clock that all calls of this name share; called in the event loop."""
        return self._clocks.setdefault(name, SharedClock())

    @contextmanager
    def counted(self, paid: Callable[[], Ledger]) -> Iterator[None]:
        """Counts what is paid within, however it ends. paid: gives what has been paid so far."""
        with self._lock:
            self._open.append(paid)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(paid)
                self._closed = merged_ledgers([self._closed, paid()])

    def paid(self) -> dict[UsageKey, Usage]:
        """Returns what was paid so far; called in the event loop while calls are made."""
        with self._lock:
            return merged_ledgers([self._closed, *(paid() for paid in self._open)])


@dataclass(frozen=True, slots=True)
class Load:
    """What is going on at the endpoints now.

    paid: by the stage so far. num_in_flight: sequences that engines have. num_waiting: calls that wait for room.
    """

    paid: Usage = field(default_factory=Usage)
    num_in_flight: int = 0
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    num_rows: int
    num_tokens: int


class Pace:
    """How fast a stage goes, by what it was seen to do within the last minute. Pure: the time is handed in.

    num_total: rows of the stage.
    """

    def __init__(self, num_total: int, now: float) -> None:
        self.num_total = num_total
        self._looks: deque[_Look] = deque([_Look(now, 0, 0)])
        self._num_left = num_total

    def look(self, now: float, *, num_done: int, num_skipped: int, num_tokens: int) -> None:
        """Takes note of what has been done. num_skipped: of the rows done, those that were done before this run.

        num_tokens: completion tokens paid so far.
        """
        self._num_left = max(0, self.num_total - num_done)
        self._looks.append(_Look(now, num_done - num_skipped, num_tokens))
        # The oldest look kept is the last one that is a minute old, so that the window is never shorter than that.
        while len(self._looks) > 2 and self._looks[1].at <= now - RATE_SECONDS:
            self._looks.popleft()

    @property
    def rows_per_second(self) -> float:
        return self._rate(self._looks[-1].num_rows - self._looks[0].num_rows)

    @property
    def tokens_per_second(self) -> float:
        return self._rate(self._looks[-1].num_tokens - self._looks[0].num_tokens)

    @property
    def seconds_left(self) -> float | None:
        """Returns how long the rest takes at this pace, or None when no row was finished within the last minute."""
        if self._num_left == 0:
            return 0.0
        return self._num_left / self.rows_per_second if self.rows_per_second > 0 else None

    def _rate(self, number: int) -> float:
        seconds = self._looks[-1].at - self._looks[0].at
        return number / seconds if seconds > 0 else 0.0


def progress_line(pace: Pace, num_done: int, load: Load) -> str:
    """Returns the live line of a stage: its rows, and where calls are made, those."""
    left = "time left unknown" if pace.seconds_left is None else f"{duration(pace.seconds_left)} left"
    line = f"{num_done:,} of {pace.num_total:,} rows, {pace.rows_per_second:,.1f} rows/s, {left}"
    paid = load.paid
    if paid.num_calls or paid.num_reused or load.num_in_flight or load.num_waiting:
        line += (
            f"; {pace.tokens_per_second:,.0f} tokens/s, {load.num_in_flight:,} in flight, {load.num_waiting:,} waiting"
            f"; {paid.num_replies:,} replies, {paid.num_reused:,} reused, {paid.num_retries:,} retries, "
            f"{paid.num_failures:,} failures"
        )
    return line


def paid_line(paid: Usage, cost: Cost | None = None) -> str:
    """Returns what was paid, as the end of a sentence about who paid. cost: None where nothing has a price."""
    if paid.num_calls == 0:
        stored = f"all {paid.num_reused:,} replies asked for were stored" if paid.num_reused else "nothing was asked"
        return f"paid nothing: {stored}"
    line = (
        f"paid {paid.num_calls:,} calls ({paid.num_retries:,} retries, {paid.num_failures:,} failures) for "
        f"{paid.num_replies:,} replies and reused {paid.num_reused:,}: {paid.prompt_tokens:,} prompt tokens "
        f"({paid.cached_tokens:,} cached) and {paid.completion_tokens:,} completion tokens in "
        f"{duration(paid.wall_seconds)}"
    )
    return line if cost is None else f"{line}, which cost {'' if cost.is_whole else 'at least '}{amount(cost.amount)}"


def duration(seconds: float) -> str:
    """Returns 42 s, 7 min 05 s or 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def stage_total(ledger: Ledger, stage: str) -> Usage:
    return total_usage(usage for key, usage in ledger.items() if key.stage == stage)


def merged_costs(asked: Iterable[AskedUsage], stage: str, source: str) -> dict[UsageKey, Usage]:
    """Returns what the replies to one shard cost, whichever of its endpoints gave them."""
    return merged_ledgers(endpoint.cost_ledger(stage, source) for endpoint in asked)
