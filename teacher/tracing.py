"""Spans of single calls to the teacher: a sampled share of them, and only where a run is traced.

A call that is traced tells its server so (the W3C header `traceparent`): a vLLM that was started with
`--otlp-traces-endpoint` adds its own span to ours. A span names model, judge and row, and counts tokens; it never
holds a question, an answer or a key.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import propagate
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from schemas.requests import CallFailure, Reply, TeacherRequest


@dataclass(frozen=True, slots=True)
class _Sampling:
    tracer: Tracer
    share: float


_sampling: _Sampling | None = None
"""Read before every call: None costs a comparison."""


def trace_calls(tracer: Tracer | None, share: float = 0.0) -> None:
    """From now on this share of the process's calls is traced; None ends it."""
    global _sampling  # noqa: PLW0603  (one for the process, as its event loop is)
    _sampling = _Sampling(tracer, share) if tracer is not None and share > 0 else None


def is_traced() -> bool:
    """Draws whether the next call is traced."""
    return _sampling is not None and random.random() < _sampling.share


@contextmanager
def call_span(request: TeacherRequest, model: str, num_choices: int) -> Iterator[Span]:
    """Yields the span of a call; an exception ends it with an error."""
    assert _sampling is not None, "a call is traced only while tracing is on"
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": num_choices,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "bimode.purpose": request.purpose,
        "bimode.row": request.sample_id,
        "bimode.sample_index": request.index,
    }
    with _sampling.tracer.start_as_current_span(
        f"chat {model}",
        kind=SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            # Its message may quote what a server said; the log has it, without secrets.
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise


def trace_headers() -> dict[str, str]:
    """Returns the headers that name the current span to a server."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def note_trouble(span: Span, endpoint: str, reason: str, status: int | None) -> None:
    """Records an attempt that failed on the span of its call."""
    attributes: dict[str, str | int] = {"server.address": endpoint, "error.type": reason}
    if status is not None:
        attributes["http.response.status_code"] = status
    span.add_event("attempt failed", attributes)


def note_answer(span: Span, outcome: list[Reply] | CallFailure, num_attempts: int) -> None:
    """Records on the span of a call what it came to."""
    span.set_attribute("bimode.attempts", num_attempts)
    if isinstance(outcome, CallFailure):
        span.set_attribute("error.type", outcome.reason)
        span.set_status(Status(StatusCode.ERROR, outcome.reason))
        return
    span.set_attribute("gen_ai.usage.input_tokens", sum(reply.prompt_tokens for reply in outcome if reply.choice == 0))
    span.set_attribute("gen_ai.usage.output_tokens", sum(reply.completion_tokens for reply in outcome))
    span.set_attribute("gen_ai.response.finish_reasons", [reply.finish_reason for reply in outcome])
