"""Traces of a run by OpenTelemetry: curate > stage > shard > a sampled share of the calls to the teacher.

On where the standard variables name a receiver (`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`);
all others of the SDK and its exporter apply (headers, timeouts, resource attributes, sampler). Without them nothing is
imported of the SDK, and a span costs a comparison.

A program that already has a tracer provider keeps it, and ours goes there. Else ours is not made the global one:
Prefect would then add a span of its own for each flow and task run, beside these.

Left out on purpose: gRPC, which needs another exporter. Every receiver of OTLP takes HTTP, too, on port 4318.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from opentelemetry import context as trace_context
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer

from flows.telemetry.secrets import Redactor

_log = logging.getLogger(__name__)

NAME = "bimode"
FLUSH_MILLISECONDS = 5_000
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment asks for traces, and for such as can be sent."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    if not any(environment.get(name) for name in _ENDPOINTS):
        return False
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        _log.warning("no traces are sent: %s is %r, only http/protobuf is spoken here", _PROTOCOLS[1], protocol)
        return False
    return True


def tracer_of_environment() -> Tracer | None:
    """Returns what makes spans in this process, or None where nobody wants any."""
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return trace.get_tracer(NAME)
    return _provider().get_tracer(NAME) if is_wanted() else None


@cache
def _provider() -> Any:
    """Returns the process's tracer provider; it sends what is left when the process ends."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  (half a second)
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # Variables of the environment go before these.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": NAME}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def flush() -> None:
    """Sends the spans that wait. A receiver that does not answer costs a few seconds and these spans."""
    if _provider.cache_info().currsize and not _provider().force_flush(FLUSH_MILLISECONDS):
        _log.warning("some spans could not be sent within %d s", FLUSH_MILLISECONDS // 1000)


@contextmanager
def span(tracer: Tracer | None, name: str, attributes: Mapping[str, str | int], redactor: Redactor) -> Iterator[Span]:
    """Yields a span that is the current one within the block; an exception ends it with an error, without its stack.

    tracer: None makes none.
    """
    if tracer is None:
        yield trace.INVALID_SPAN
        return
    with tracer.start_as_current_span(
        name, attributes=dict(attributes), record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(Status(StatusCode.ERROR, redactor.text(str(error))[:1000]))
            raise


def headers_of_current_span() -> dict[str, str]:
    """Returns the current span as W3C headers, to be taken along to another thread, process or machine."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


@contextmanager
def below(headers: Mapping[str, str]) -> Iterator[None]:
    """Makes the span of such headers the parent of spans within the block. Without headers nothing changes."""
    if not headers:
        with nullcontext():
            yield
        return
    token = trace_context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        trace_context.detach(token)
