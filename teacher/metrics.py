"""What this process has seen of its teachers and journals, as Prometheus metrics. They count from its start.

They belong to no registry: `flows.telemetry` exposes them where a run is watched. What accounts and addresses know
anyway (calls, tokens, sequences in flight) is not counted here again, but read from them when somebody looks.

Labels are few: addresses are those that were configured, purposes and outcomes are codes of ours.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram

_CALL_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SYNC_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

ANSWERED = "answered"

ATTEMPTS = Counter(
    "bimode_teacher_attempts",
    f"HTTP calls to an address, by the judge that asks; outcome is '{ANSWERED}' or the code of what went wrong.",
    ["endpoint", "purpose", "outcome"],
    registry=None,
)
ATTEMPT_SECONDS = Histogram(
    "bimode_teacher_attempt_seconds",
    "Time from sending a call to its whole answer, of calls that were answered.",
    ["purpose"],
    buckets=_CALL_SECONDS,
    registry=None,
)
RETRIES = Counter(
    "bimode_teacher_retries",
    "Attempts that were followed by another one for the same call, by the code of what went wrong.",
    ["endpoint", "kind"],
    registry=None,
)
JOURNAL_BYTES = Counter("bimode_journal_bytes", "Bytes of replies made durable in journals.", registry=None)
JOURNAL_SYNC_SECONDS = Histogram(
    "bimode_journal_sync_seconds",
    "Time to write and sync one batch of replies.",
    buckets=_SYNC_SECONDS,
    registry=None,
)


@cache
def _answered(endpoint: str, purpose: str) -> tuple[Counter, Histogram]:
    return ATTEMPTS.labels(endpoint, purpose, ANSWERED), ATTEMPT_SECONDS.labels(purpose)


def note_answered(endpoint: str, purpose: str, seconds: float) -> None:
    """Counts an attempt that was answered. Looking labels up would take longer than counting."""
    counter, histogram = _answered(endpoint, purpose)
    counter.inc()
    histogram.observe(seconds)


PROCESS_METRICS = (ATTEMPTS, ATTEMPT_SECONDS, RETRIES, JOURNAL_BYTES, JOURNAL_SYNC_SECONDS)
