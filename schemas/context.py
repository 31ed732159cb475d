"""Where in a run the code at work is: its run, corpus, stage, shard and row. For logs and traces, never for labels.

It travels by context variable: into tasks, into `asyncio.to_thread`, and with `run_coroutine_threadsafe`, which hands
the caller's context to the loop (a test holds it). New threads and other processes begin without: there it is taken
along by hand and entered with `within`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RunContext:
    """Where the code at work is; "" where that does not apply.

    run: id of the Prefect flow run. corpus: its name in the configuration. row: id of the sample.
    """

    run: str = ""
    corpus: str = ""
    stage: str = ""
    shard: str = ""
    row: str = ""


_current: contextvars.ContextVar[RunContext] = contextvars.ContextVar("bimode_run_context", default=RunContext())  # noqa: B039  (frozen)


def current_context() -> RunContext:
    return _current.get()


@contextmanager
def within(context: RunContext) -> Iterator[None]:
    """Makes a context the current one for the block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def enter_row(sample_id: str) -> None:
    """From now on this task is about one row. Called in a task of its own, whose end ends it."""
    known = _current.get()
    # Not by `replace`, which takes three times as long, for every row.
    _current.set(RunContext(known.run, known.corpus, known.stage, known.shard, sample_id))


def outside_shards() -> contextvars.Context:
    """Returns a context for a task that outlives the shard in which it happens to be started."""
    context = contextvars.copy_context()
    context.run(_leave_shard)
    return context


def _leave_shard() -> None:
    _current.set(replace(_current.get(), stage="", shard="", row=""))
