"""A run and its stages, watched in the process that makes them."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import INVALID_SPAN, Span, Tracer

from flows.runtime import Runtime
from flows.shard_calls import Call
from flows.telemetry import tracing
from flows.telemetry.endpoint import served
from flows.telemetry.last_run import write_last_run
from flows.telemetry.logs import logging_of
from flows.telemetry.metrics import RunBooks, StageBook, StageProgress, registry_of
from flows.telemetry.secrets import Redactor
from flows.telemetry.settings import TelemetrySettings
from flows.telemetry.shards import Place, Process, Result, Watch, begin_here, end_here, watched_calls
from flows.workspace import Marker
from schemas.context import RunContext, within
from schemas.fates import StageCount
from teacher.tracing import trace_calls


@dataclass(slots=True)
class WatchedRun:
    """A run that is being watched. headers: of its span. port: where its metrics are, None where nowhere."""

    settings: TelemetrySettings
    redactor: Redactor
    books: RunBooks
    tracer: Tracer | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None


_current: contextvars.ContextVar[WatchedRun | None] = contextvars.ContextVar("bimode_watched_run", default=None)
_place: contextvars.ContextVar[Place | None] = contextvars.ContextVar("bimode_place", default=None)


@contextmanager
def run(runtime: Runtime, *, run_id: str) -> Iterator[WatchedRun]:
    """Watches a run as the environment asks. run_id: of the Prefect flow run, or another that tells runs apart.

    To be left after the runtime is closed, or while it still is open: both show the same.

    Raises ConfigError: a variable cannot be used. StorageError: the log file cannot be opened.
    """
    config, settings = runtime.config, TelemetrySettings.of_environment()
    books = RunBooks(run_id, config.name, [source.name for source in config.sources])
    books.view = runtime.view
    watched = WatchedRun(settings, Redactor.of(config), books)
    context = RunContext(run=run_id, corpus=config.name)
    with ExitStack() as opened:
        opened.enter_context(within(context))
        opened.enter_context(logging_of(settings, watched.redactor, runtime.workspace.root))
        if settings.metrics_port:
            watched.port = opened.enter_context(served(settings, registry_of(books)))
        opened.enter_context(_ended(watched))
        opened.enter_context(_traced(watched, context))
        token = _current.set(watched)
        opened.callback(_current.reset, token)
        begin_here(Watch(run_id, watched.tracer, watched.redactor))
        opened.callback(end_here)
        yield watched


@contextmanager
def _traced(watched: WatchedRun, context: RunContext) -> Iterator[None]:
    """Makes the span of the run, where traces are wanted, and sends what is left at its end."""
    watched.tracer = tracing.tracer_of_environment()
    trace_calls(watched.tracer, watched.settings.trace_calls)
    attributes = {"bimode.run": context.run, "bimode.corpus": context.corpus}
    try:
        with tracing.span(watched.tracer, "curate", attributes, watched.redactor):
            if watched.tracer is not None:
                watched.headers = tracing.headers_of_current_span()
            yield
    finally:
        trace_calls(None)
        tracing.flush()


@contextmanager
def _ended(watched: WatchedRun) -> Iterator[None]:
    """Leaves behind how the run ended, where a folder for it is named."""
    has_succeeded = False
    try:
        yield
        has_succeeded = True
    finally:
        folder = watched.settings.metrics_folder
        if folder is not None:
            write_last_run(folder, watched.books, has_succeeded=has_succeeded, now=time.time())


@dataclass(slots=True)
class WatchedStage:
    """A stage that is being watched, or that nobody watches."""

    span: Span
    book: StageBook

    def count(self, markers: Iterable[Marker]) -> None:
        """Takes note of what became of the rows: the markers of all shards."""
        self.book.count = count = sum((marker.count for marker in markers), StageCount())
        for name, number in (
            ("in", count.num_in),
            ("kept", count.num_kept),
            ("dropped", count.num_dropped),
            ("quarantined", count.num_quarantined),
        ):
            self.span.set_attribute(f"bimode.rows.{name}", number)


@contextmanager
def stage(name: str, progress: StageProgress | None = None) -> Iterator[WatchedStage]:
    """Watches a stage of the run at hand. progress: of its rows, looked at whenever somebody asks."""
    num_rows = progress.num_total if progress is not None else 0
    book = StageBook(began=time.monotonic(), num_rows=num_rows, progress=progress)
    watched = _current.get()
    if watched is None:
        yield WatchedStage(INVALID_SPAN, book)
        return
    books = watched.books
    books.stages[name] = book
    context = RunContext(run=books.run, corpus=books.corpus, stage=name)
    attributes: dict[str, str | int] = {
        "bimode.run": books.run, "bimode.corpus": books.corpus, "bimode.stage": name, "bimode.rows": num_rows,
    }  # fmt: skip
    try:
        # The current span may be one of Prefect's, which leads nowhere.
        with (
            within(context),
            tracing.below(watched.headers),
            tracing.span(watched.tracer, "stage", attributes, watched.redactor) as span,
        ):
            headers = tracing.headers_of_current_span() if watched.tracer is not None else {}
            token = _place.set(Place(context, headers, Process.this()))
            try:
                yield WatchedStage(span, book)
            finally:
                _place.reset(token)
    finally:
        book.ended = time.monotonic()


def watched(calls: Mapping[str, Call[Result]], what: str = "") -> dict[str, Call[Result]]:
    """Returns the calls of the stage at hand, by shard, so that they are watched wherever they are done.

    what: the step of the stage, where it has several. Outside a watched run they are returned as they are.
    """
    place = _place.get()
    return dict(calls) if place is None else watched_calls(place, calls, what)
