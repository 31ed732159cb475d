"""What Prometheus is told of a run, at /metrics of the process that makes it.

Most of it is not counted here: accounts, addresses, verifiers and stages know it, and are looked at when Prometheus
asks (`RunCollector`), so that a run nobody watches pays nothing. What a teacher's calls and journals do is counted in
`teacher.metrics`, from the start of the process. A process that makes a second run starts its counters anew, which
`rate` and `increase` take for what it is.

Labels are bounded: no rows, no shards; sources and reasons beyond the first ones count as `OTHER`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from flows.runtime_view import EndpointView, RuntimeView
from schemas.fates import StageCount
from schemas.usage import Usage
from teacher.metrics import PROCESS_METRICS

MAX_SOURCES = 50
MAX_REASONS = 100
OTHER = "(other)"
STATES = ("up", "down", "out")
_SHARD_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600)

SHARD_SECONDS = Histogram(
    "bimode_shard_seconds",
    "Time that shards took which were done in this process, those found done included.",
    ["stage", "outcome"],
    buckets=_SHARD_SECONDS,
    registry=None,
)


class StageProgress(Protocol):
    """How far a stage is: `flows.stages.Progress`."""

    num_total: int
    num_done: int
    num_skipped: int


@dataclass(slots=True)
class StageBook:
    """One stage of a run. began, ended: of the monotonic clock. count: what became of its rows, once that is known."""

    began: float
    num_rows: int
    ended: float | None = None
    progress: StageProgress | None = None
    count: StageCount = field(default_factory=StageCount)

    def seconds(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.began


class RunBooks:
    """What is known of one run in this process. Written by the run, read by whoever asks.

    sources: names of the run's sources, in order.
    """

    def __init__(self, run: str, corpus: str, sources: Sequence[str] = ()) -> None:
        self.run, self.corpus = run, corpus
        self.sources = frozenset(sources[:MAX_SOURCES])
        self.began_at = time.time()
        self.stages: dict[str, StageBook] = {}
        self.view: Callable[[], RuntimeView] = RuntimeView

    def totals(self) -> Usage:
        """Returns what this process has paid."""
        return sum(self.view().paid.values(), Usage())


class RunCollector(Collector):
    """Turns the books of a run into metrics whenever somebody asks."""

    def __init__(self, books: RunBooks) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._reasons: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        """Returns every family, with no samples: what there can be."""
        return list(self._families(RuntimeView(), {}))

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            return list(self._families(self._books.view(), dict(self._books.stages)))

    def _families(self, view: RuntimeView, stages: Mapping[str, StageBook]) -> Iterator[Metric]:
        books = self._books
        yield InfoMetricFamily(
            "bimode_run", "The run that this process works for.", {"run": books.run, "corpus": books.corpus}
        )
        yield GaugeMetricFamily("bimode_run_start_time_seconds", "When the run began (Unix time).", books.began_at)
        yield from self._stage_families(stages)
        yield from _teacher_families(view, books.sources)
        yield from _endpoint_families(view)
        yield _family(
            CounterMetricFamily, "bimode_verifications", "Replies compared with references, by verdict.", ["outcome"],
            [((outcome,), number) for outcome, number in sorted(view.verdicts.items())],
        )  # fmt: skip
        yield GaugeMetricFamily(
            "bimode_verifier_pending", "Replies that verifier processes have or wait for.", view.num_comparing
        )

    def _stage_families(self, stages: Mapping[str, StageBook]) -> Iterator[Metric]:
        now = time.monotonic()
        gauges: list[tuple[str, str, Callable[[StageBook], float]]] = [
            ("bimode_stage_rows", "Rows that the stage has to do.", lambda book: book.num_rows),
            (
                "bimode_stage_done_rows", "Rows done, those found done included.",
                lambda book: book.progress.num_done if book.progress else 0,
            ),
            (
                "bimode_stage_skipped_rows", "Of the rows done, those whose shards an earlier run had finished.",
                lambda book: book.progress.num_skipped if book.progress else 0,
            ),
            ("bimode_stage_running", "1 while the stage is at work.", lambda book: float(book.ended is None)),
            ("bimode_stage_seconds", "Time the stage took, or has taken so far.", lambda book: book.seconds(now)),
        ]  # fmt: skip
        for name, documentation, value in gauges:
            samples = [((stage,), value(book)) for stage, book in stages.items()]
            yield _family(GaugeMetricFamily, name, documentation, ["stage"], samples)
        rows: Counter[tuple[str, str, str]] = Counter()
        for stage, book in stages.items():
            rows[stage, "kept", ""] += book.count.num_kept
            for outcome, reasons in (("dropped", book.count.dropped), ("quarantined", book.count.quarantined)):
                for reason, number in reasons.items():
                    rows[stage, outcome, self._known_reason(reason)] += number
        yield _family(
            CounterMetricFamily, "bimode_rows", "What became of the rows of finished stages, by reason.",
            ["stage", "outcome", "reason"], list(rows.items()),
        )  # fmt: skip

    def _known_reason(self, reason: str) -> str:
        if len(self._reasons) < MAX_REASONS:
            self._reasons.add(reason)
        return reason if reason in self._reasons else OTHER


_USAGE: tuple[tuple[str, str, Callable[[Usage], float]], ...] = (
    ("calls", "Calls that had to be made, however they ended.", lambda usage: usage.num_calls),
    ("failures", "Calls that ended without a reply.", lambda usage: usage.num_failures),
    ("replies", "Replies that calls brought.", lambda usage: usage.num_replies),
    ("reused", "Requests answered by the journal or an equal call under way.", lambda usage: usage.num_reused),
    ("prompt_tokens", "Tokens of prompts, the cached ones included.", lambda usage: usage.prompt_tokens),
    ("cached_tokens", "Tokens of prompts that were not computed again.", lambda usage: usage.cached_tokens),
    ("completion_tokens", "Tokens of replies.", lambda usage: usage.completion_tokens),
    ("gpu_seconds", "Time of the GPUs of a server of ours, as far as known.", lambda usage: usage.gpu_seconds),
)


def _teacher_families(view: RuntimeView, sources: frozenset[str]) -> Iterator[Metric]:
    labels = ["stage", "purpose", "source", "model"]
    usages: dict[tuple[str, ...], Usage] = {}
    for key, usage in view.paid.items():
        source = key.source if key.source in sources else OTHER
        values = (key.stage, key.purpose, source, key.model)
        usages[values] = usages.get(values, Usage()) + usage
    for name, documentation, value in _USAGE:
        samples = [(values, value(usage)) for values, usage in usages.items()]
        yield _family(CounterMetricFamily, f"bimode_teacher_{name}", documentation, labels, samples)


def _endpoint_families(view: RuntimeView) -> Iterator[Metric]:
    # Teacher and reasoner may be one server, asked in two ways: then the two are one line.
    merged: dict[tuple[str, ...], list[EndpointView]] = {}
    for seen in view.endpoints:
        merged.setdefault((seen.url, seen.model), []).append(seen)
    labels = ["endpoint", "model"]

    def summed(value: Callable[[EndpointView], int]) -> list[tuple[tuple[str, ...], float]]:
        return [(values, sum(map(value, alike))) for values, alike in merged.items()]

    yield _family(
        GaugeMetricFamily, "bimode_endpoint_in_flight_sequences", "Sequences that the address has now.", labels,
        summed(lambda seen: seen.num_in_flight),
    )  # fmt: skip
    yield _family(
        GaugeMetricFamily, "bimode_endpoint_window_sequences", "Sequences that the address may have.", labels,
        summed(lambda seen: seen.window),
    )  # fmt: skip
    yield _family(
        GaugeMetricFamily, "bimode_endpoint_state",
        "1 for the state of the address: up takes calls, down is probed until it answers, out is set up wrongly.",
        [*labels, "state"],
        [
            ((*values, state), float(state == max((seen.state for seen in alike), key=_severity)))
            for values, alike in merged.items()
            for state in STATES
        ],
    )  # fmt: skip
    yield _family(
        CounterMetricFamily, "bimode_endpoint_deaths", "Times that the address was seen to die or restart.", labels,
        summed(lambda seen: seen.num_deaths),
    )  # fmt: skip
    yield _family(
        GaugeMetricFamily, "bimode_teacher_waiting_calls", "Calls that wait for room at any address.", ["model"],
        [((model,), number) for model, number in view.num_waiting.items()],
    )  # fmt: skip


def _severity(state: str) -> int:
    return STATES.index(state)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    documentation: str,
    labels: list[str],
    samples: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    family = kind(name, documentation, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family


def registry_of(books: RunBooks) -> CollectorRegistry:
    """Returns all that is exposed of a run: its books, this process's teachers and journals, and the process itself."""
    # Else each counter has a second series beside it, which nothing of ours asks for.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(books))
    for metric in (*PROCESS_METRICS, SHARD_SECONDS):
        registry.register(metric)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
