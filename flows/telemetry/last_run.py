"""What became of the last run of a corpus, as a file that node_exporter's textfile collector shows to Prometheus.

It outlives the process and belongs to the host, so that an alert can tell a night without a run from a quiet one. Its
metrics have names of their own: they are gauges of the past, not counters of something that runs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

from flows.telemetry.metrics import RunBooks

_log = logging.getLogger(__name__)
SUCCEEDED = "bimode_last_success_timestamp_seconds"
_USAGES = {"calls": "num_calls", "prompt_tokens": "prompt_tokens", "completion_tokens": "completion_tokens"}


def last_run_path(folder: Path, corpus: str) -> Path:
    """Returns the file of a corpus. Its name holds nothing that leaves the folder."""
    return folder / f"bimode-{re.sub(r'[^A-Za-z0-9_.-]', '_', corpus)}.prom"


def write_last_run(folder: Path, books: RunBooks, *, has_succeeded: bool, now: float) -> None:
    """Writes how a run ended. A folder that cannot be written stops no run: it is said. now: Unix time."""
    path = last_run_path(folder, books.corpus)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        succeeded_at = now if has_succeeded else _succeeded_at(path)
        write_to_textfile(str(path), last_run_registry(books, succeeded_at, has_succeeded=has_succeeded, now=now))
    except OSError as error:
        _log.warning("cannot write %s (BIMODE_METRICS_FOLDER): %s", path, error.strerror or error)


def last_run_registry(
    books: RunBooks, succeeded_at: float | None, *, has_succeeded: bool, now: float
) -> CollectorRegistry:
    """Returns the gauges of the file. succeeded_at: when a run last succeeded; None if none is known to have."""
    registry = CollectorRegistry()

    def gauge(name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, documentation, ["corpus", *labels], registry=registry)

    gauge("bimode_last_run_success", "1 if the last run ended well.").labels(books.corpus).set(float(has_succeeded))
    gauge("bimode_last_run_end_timestamp_seconds", "When the last run ended (Unix time).").labels(books.corpus).set(now)
    seconds = gauge("bimode_last_run_seconds", "How long the last run took.")
    seconds.labels(books.corpus).set(now - books.began_at)
    if succeeded_at is not None:
        gauge(SUCCEEDED, "When a run last ended well (Unix time).").labels(books.corpus).set(succeeded_at)
    rows = gauge(
        "bimode_last_run_rows", "Rows of the last run, by stage and what became of them.", ("stage", "outcome")
    )
    for stage, book in books.stages.items():
        count = book.count
        for outcome, number in (
            ("kept", count.num_kept), ("dropped", count.num_dropped), ("quarantined", count.num_quarantined)
        ):  # fmt: skip
            rows.labels(books.corpus, stage, outcome).set(number)
    paid, usage = gauge("bimode_last_run_teacher", "What the last run paid, by kind.", ("kind",)), books.totals()
    for kind, name in _USAGES.items():
        paid.labels(books.corpus, kind).set(getattr(usage, name))
    return registry


def _succeeded_at(path: Path) -> float | None:
    """Returns what the file of the run before says; nothing if it cannot be read."""
    try:
        families = text_string_to_metric_families(path.read_text(encoding="utf-8"))
        return next((s.value for family in families for s in family.samples if s.name == SUCCEEDED), None)
    except (OSError, ValueError):
        return None
