"""A small curation that is watched as the flow is, without Prefect, and what scraping and receiving it takes."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.cards import PlainCuration, configuration, teacher_answer, write_cards
from flows import telemetry
from flows.publishing import Published
from flows.runtime import Runtime
from flows.shard_calls import Spread, Work
from flows.workspace import Workspace
from schemas.config import RunConfig
from schemas.usage import Ledger
from sources import plan_units
from teacher.fault_server import Call, FaultSchedule, FaultServer

RUN = "0b2f5c1e-run"
Sample = tuple[str, frozenset[tuple[str, str]]]


@dataclass
class Seen:
    """All that was seen of a watched curation.

    secret: was the teacher's key. scrapes: of /metrics, after each stage and twice at the end. calls: as the teacher
    saw them. paid, verdicts: the run's own counts at its end.
    """

    folder: Path
    receiver: OtlpReceiver
    secret: str
    scrapes: list[dict[Sample, float]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    paid: Ledger = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)
    published: Published | None = None

    @property
    def log(self) -> list[dict[str, Any]]:
        text = (self.folder / "work" / "logs" / "run.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "work")


class SeenCuration(PlainCuration):
    """A curation that somebody looks at after each stage."""

    looking: Callable[[], None] = staticmethod(lambda: None)

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Spread], Work]) -> None:
        super()._stage(stage, num_rows, plan)
        self.looking()


@contextmanager
def cards(
    folder: Path, num_rows: int = 60, *, faults: FaultSchedule | None = None, **settings: Any
) -> Iterator[tuple[RunConfig, FaultServer]]:
    """Yields the configuration of a curation of cards, and its teacher, which answers while the block lasts."""
    with FaultServer(teacher_answer, models=["cards"], faults=faults) as server:
        path = write_cards(folder / "cards", num_rows)
        yield configuration(path, folder / "work", server.url, max_quarantine_share=0.5, **settings), server


def curate_watched(
    config: RunConfig, looking: Callable[[telemetry.WatchedRun, Runtime], None] = lambda run, runtime: None
) -> Published:
    """Runs a curation that is watched as the environment says. looking: called after each stage and at the end."""
    runtime = Runtime(config)
    with telemetry.run(runtime, run_id=RUN) as watched:
        try:
            with runtime.workspace.locked():
                curation = SeenCuration(runtime, plan_units(config))
                curation.looking = lambda: looking(watched, runtime)
                published = curation.run()
        finally:
            runtime.close()
        looking(watched, runtime)
    return published


def scrape(port: int) -> dict[Sample, float]:
    """Returns what /metrics says, by name and labels, read by Prometheus's own parser."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return parsed(text)


def parsed(text: str) -> dict[Sample, float]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a sample is there twice"
    return found


def value_of(samples: Mapping[Sample, float], name: str, **labels: str) -> float:
    """Returns the sum of a metric over all samples that have these labels; there must be one."""
    found = [value for (of, its), value in samples.items() if of == name and labels.items() <= dict(its).items()]
    assert found, f"there is no {name} with {labels}"
    return sum(found)


class OtlpReceiver:
    """An OTLP receiver over HTTP on the loopback interface; keeps the spans it was sent. Used as a context."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.headers: list[Mapping[str, str]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                receiver._take(ExportTraceServiceRequest.FromString(body), dict(self.headers))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> OtlpReceiver:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, request: ExportTraceServiceRequest, headers: Mapping[str, str]) -> None:
        self.headers.append(headers)
        for resource in request.resource_spans:
            self.resources.append({pair.key: pair.value.string_value for pair in resource.resource.attributes})
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def attributes_of(span: Span) -> dict[str, Any]:
    """Returns the attributes of a span as plain values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in span.attributes}
