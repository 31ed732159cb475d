"""No variable of the machine decides what is watched here; a receiver of traces for those tests that want one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flows.runtime import Runtime
from flows.telemetry import WatchedRun, tracing
from teacher.fault_server import Fault, FaultSchedule
from tests import waiting
from tests.flows.conftest import EMPTY_CHART
from tests.flows.telemetry.watched_world import OtlpReceiver, Seen, cards, curate_watched, scrape

SECRET = "Tr0ub4dor-3-planted"


@pytest.fixture(autouse=True)
def only_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OTEL_", "BIMODE_LOG_", "BIMODE_METRICS_", "BIMODE_TRACE_")):
            monkeypatch.delenv(name)


@contextmanager
def tracing_to(receiver: OtlpReceiver, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names a receiver to the environment. The process's tracer provider is made for it, and ended with it."""
    patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    patch.setenv("BIMODE_TRACE_CALLS", "1")
    yield
    if has_provider():
        tracing._provider().shutdown()
    tracing._provider.cache_clear()


def has_provider() -> bool:
    return tracing._provider.cache_info().currsize > 0


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    """A receiver of traces that the environment names."""
    with OtlpReceiver() as receiver, tracing_to(receiver, monkeypatch):
        yield receiver


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A curation under faults, watched in every way at once, and all that was seen of it."""
    folder = tmp_path_factory.mktemp("seen")
    faults = FaultSchedule(share=0.2, kinds=(Fault.RESET, Fault.SERVER_ERROR, Fault.RATE_LIMIT, Fault.CUT_JSON))
    with pytest.MonkeyPatch.context() as patch, OtlpReceiver() as receiver, tracing_to(receiver, patch):
        patch.setattr("corpus.charts._svg", lambda spec, width: EMPTY_CHART)
        port = waiting.free_port()
        for name, value in {
            "BIMODE_LOG_FORMAT": "json",
            "BIMODE_LOG_FILE": "logs/run.jsonl",
            "BIMODE_METRICS_PORT": str(port),
            "BIMODE_METRICS_FOLDER": str(folder / "textfiles"),
            "BIMODE_API_KEY": SECRET,
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-team={SECRET}-of-traces",
        }.items():
            patch.setenv(name, value)
        seen = Seen(folder, receiver, SECRET)
        duplicates = {"near": False, "images": "bytes"}  # what else takes is compiled first
        with cards(folder, faults=faults, duplicates=duplicates) as (config, teacher):

            def look(run: WatchedRun, runtime: Runtime) -> None:
                assert run.port == port
                seen.scrapes.append(scrape(port))
                seen.paid, seen.verdicts = runtime.snapshot().paid, dict(runtime.verifiers.verdicts)

            seen.published = curate_watched(config, look)
            seen.calls = list(teacher.calls)
    return seen


@pytest.fixture
def free_port() -> int:
    return waiting.free_port()


@pytest.fixture
def metrics_port(monkeypatch: pytest.MonkeyPatch, free_port: int) -> int:
    """A free port at which the metrics of the next run are."""
    monkeypatch.setenv("BIMODE_METRICS_PORT", str(free_port))
    return free_port
