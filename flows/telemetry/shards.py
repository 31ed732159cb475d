"""The work of shards, watched wherever it is done: in a thread, in another process, on another machine.

Neither threads nor processes take the context along by themselves, and Prefect puts spans of its own in between. So
each call carries its `Place`: where in the run it belongs, and below which span. In another process than the run's, the
first call sets logs, traces and metrics up, by the environment there, for as long as that process lives.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from opentelemetry.trace import Tracer

from flows.runtime import Runtime
from flows.shard_calls import Call
from flows.stages import Progress
from flows.telemetry import tracing
from flows.telemetry.endpoint import served
from flows.telemetry.logs import logging_of
from flows.telemetry.metrics import SHARD_SECONDS, RunBooks, registry_of
from flows.telemetry.secrets import Redactor
from flows.telemetry.settings import TelemetrySettings
from schemas.context import RunContext, within
from teacher.tracing import trace_calls

Result = TypeVar("Result")
_log = logging.getLogger("bimode.shards")


@dataclass(frozen=True, slots=True)
class Process:
    """A process among those of all machines."""

    host: str
    pid: int

    @classmethod
    def this(cls) -> Process:
        return cls(os.uname().nodename, os.getpid())


@dataclass(frozen=True, slots=True)
class Place:
    """Where work belongs; can be pickled. headers: of the span above. home: the process that makes the run."""

    context: RunContext
    headers: Mapping[str, str]
    home: Process


@dataclass(frozen=True, slots=True)
class WatchedCall(Generic[Result]):
    """A `Call` that logs, is traced and is timed in the name of its shard. what: the step of its stage, if it has some.

    Can be pickled if its call can.
    """

    call: Call[Result]
    place: Place
    what: str = ""

    def __call__(self, runtime: Runtime, progress: Progress) -> Result:
        watch = _watch(self.place, runtime)
        context, began, outcome = self.place.context, time.monotonic(), "failed"
        attributes = {
            "bimode.run": context.run,
            "bimode.corpus": context.corpus,
            "bimode.stage": context.stage,
            "bimode.shard": context.shard,
        }
        if self.what:
            attributes["bimode.step"] = self.what
        try:
            with (
                within(context),
                tracing.below(self.place.headers),
                tracing.span(watch.tracer, "shard", attributes, watch.redactor),
            ):
                made = self.call(runtime, progress)
                outcome = "done"
                _log.info("shard done", extra={"seconds": round(time.monotonic() - began, 3)})
            return made
        finally:
            stage = f"{context.stage} ({self.what})" if self.what else context.stage
            SHARD_SECONDS.labels(stage, outcome).observe(time.monotonic() - began)


def watched_calls(place: Place, calls: Mapping[str, Call[Result]], what: str = "") -> dict[str, Call[Result]]:
    """Returns calls by shard that are watched. place: of their stage."""
    return {
        shard: WatchedCall(call, replace(place, context=replace(place.context, shard=shard)), what)
        for shard, call in calls.items()
    }


@dataclass(frozen=True, slots=True)
class Watch:
    """What this process was set up with. run: the one it works for."""

    run: str
    tracer: Tracer | None
    redactor: Redactor


_lock = threading.Lock()
_here: Watch | None = None
_opened = ExitStack()


def begin_here(watch: Watch) -> None:
    """From now on calls in this process are watched so."""
    global _here  # noqa: PLW0603  (one for the process, as its logging is)
    _here = watch


def end_here() -> None:
    global _here  # noqa: PLW0603
    _here = None


def _watch(place: Place, runtime: Runtime) -> Watch:
    """Returns what watches calls in this process; a worker of a run that is made elsewhere is set up first."""
    here = _here
    if here is not None and here.run == place.context.run:
        return here
    if place.home == Process.this():
        # The run has ended here, and a call of it has not.
        return Watch(place.context.run, None, Redactor())
    with _lock:
        if _here is None or _here.run != place.context.run:
            _set_up_worker(place, runtime)
        assert _here is not None
        return _here


def _set_up_worker(place: Place, runtime: Runtime) -> None:
    """Makes this process log, trace and show metrics for a run that is made elsewhere."""
    atexit.unregister(_opened.close)
    _opened.close()
    settings, redactor = TelemetrySettings.of_environment(), Redactor.of(runtime.config)
    config, context = runtime.config, place.context
    books = RunBooks(context.run, context.corpus, [source.name for source in config.sources])
    # What was paid is told to the run's own process, which exposes it; shown here too, it would count twice.
    books.view = lambda: replace(runtime.view(), paid={})
    _opened.enter_context(logging_of(settings, redactor, workdir=None))
    _opened.enter_context(served(settings, registry_of(books)))
    tracer = tracing.tracer_of_environment()
    trace_calls(tracer, settings.trace_calls)
    begin_here(Watch(context.run, tracer, redactor))
    atexit.register(_opened.close)
