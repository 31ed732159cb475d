"""What watching costs: a call to the teacher with everything off, with metrics and logs on, and with traces sampled.

    python -m benchmarks.telemetry

The parts that a call adds are timed by themselves, many times over, as a whole call varies by more than they take; the
last line holds them against a whole call to a server that answers at once (`benchmarks.teacher_client`, 2,748 calls/s
on one core). Spans go to a processor that drops them: what sending costs depends on the receiver, and happens in
batches beside the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry.sdk.trace import TracerProvider

from schemas.context import RunContext, enter_row, within
from schemas.requests import Message, Reply, Sampling, TeacherRequest
from teacher import metrics, tracing

NUM_TIMES = 100_000
CALLS_PER_SECOND = 2_748
"""`python -m benchmarks.teacher_client`: so many calls a core makes, so this is what a call takes."""
_REQUEST = TeacherRequest(
    "4179fc36915773644873295c2efaa183", "routing", (Message("user", "?"),), Sampling(max_tokens=8)
)
_REPLY = Reply("objective", "stop", "m", prompt_tokens=70, completion_tokens=1, seconds=0.5)


def microseconds(work: Callable[[], object], num_times: int = NUM_TIMES) -> float:
    """Returns the processor time that one takes, the best of five rounds."""
    rounds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(num_times):
            work()
        rounds.append((time.thread_time() - began) / num_times * 1e6)
    return min(rounds)


def nothing() -> None:
    """What the loop itself takes."""


def counted() -> None:
    """What `teacher.group` counts of a call that is answered."""
    metrics.note_answered("http://127.0.0.1:8000/v1", "routing", 0.5)


def traced() -> None:
    """What a call adds that may be traced."""
    if tracing.is_traced():
        with tracing.call_span(_REQUEST, "m", 1) as span:
            tracing.trace_headers()
            tracing.note_answer(span, [_REPLY], 1)


def main() -> None:
    loop = microseconds(nothing)
    lines = [("counted for Prometheus, always", microseconds(counted) - loop)]
    with within(RunContext("r", "c", "routing", "s-0")):
        lines.append(("the row noted for the log, always", microseconds(lambda: enter_row("a")) - loop))
    tracing.trace_calls(None)
    lines.append(("traces off", microseconds(traced) - loop))
    provider = TracerProvider(shutdown_on_exit=False)
    for share in (0.01, 1.0):
        tracing.trace_calls(provider.get_tracer("benchmark"), share)
        lines.append((f"traces on, {share:.0%} of the calls", microseconds(traced, NUM_TIMES // 10) - loop))
    tracing.trace_calls(None)
    whole = 1e6 / CALLS_PER_SECOND
    print(f"{'added to a call':<38} {'microseconds':>12} {f'of {whole:.0f}':>9}")
    for name, took in lines:
        print(f"{name:<38} {took:>12.2f} {took / whole:>9.2%}")


if __name__ == "__main__":
    main()
