"""Who does a stage's calls: threads of this process here, the workers of a Ray cluster in `flows.ray_crew`.

A task, as Prefect sees it, is a group of consecutive shards. However many rows a run has, a step has at most
`MAX_TASKS` tasks, so that Prefect's database and its work do not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows.accounting import Load
from flows.runtime import Runtime
from flows.shard_calls import Call
from flows.stages import Progress

_Result = TypeVar("_Result")

MAX_TASKS = 64
"""Of one step. A run has fourteen steps at most (duplicates have five, traces three): fewer than a thousand tasks."""

TASKS_PER_WORKER = 4
"""Of one step: so many that the last ones to end leave few workers idle, and so few that their cost does not show. On
Ray a task costs about a seventh of a second. Larger ones lose nothing with a worker: finished shards stand."""


class Crew(Protocol):
    """The workers of one run."""

    @property
    def task_runner(self) -> Any:
        """A new task runner of Prefect's for the subflow of one stage."""

    @property
    def num_workers(self) -> int:
        """How many tasks are done at once."""

    def working(self, stage: str, progress: Progress) -> AbstractContextManager[None]:
        """Holds while the calls of a stage are done; their progress is counted in the one given."""

    def order(self, calls: Sequence[Call[_Result]]) -> Callable[[], list[_Result]]:
        """Returns what one task does, wherever it runs: the calls, in order."""

    def submitting(self) -> AbstractContextManager[None]:
        """Holds while tasks are handed to the task runner."""

    def has_ended(self, future: PrefectFuture[Any], seconds: float) -> bool:
        """Waits for a task for so long; returns whether it has ended, well or not. Asks no server."""

    def look(self) -> Load:
        """Brings the progress up to date, and returns what is going on at the endpoints."""


class ThreadCrew:
    """Threads of this process, which share its `Runtime`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stage, self._progress = "", Progress(0)

    @property
    def task_runner(self) -> Any:
        return ThreadPoolTaskRunner(max_workers=self._runtime.config.parallel_shards)

    @property
    def num_workers(self) -> int:
        return self._runtime.config.parallel_shards

    @contextmanager
    def working(self, stage: str, progress: Progress) -> Iterator[None]:
        self._stage, self._progress = stage, progress
        yield

    def order(self, calls: Sequence[Call[_Result]]) -> Callable[[], list[_Result]]:
        return lambda: [call(self._runtime, self._progress) for call in calls]

    def submitting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def has_ended(self, future: PrefectFuture[Any], seconds: float) -> bool:
        try:
            future.result(timeout=seconds, raise_on_failure=False)
        except TimeoutError:
            return False
        return True

    def look(self) -> Load:
        return self._runtime.load(self._stage)


def groups(names: Sequence[str], num_workers: int) -> list[list[str]]:
    """Returns consecutive names in groups, one for each task, whose sizes differ by one at most."""
    number = min(len(names), MAX_TASKS, TASKS_PER_WORKER * num_workers)
    bounds = [len(names) * place // number for place in range(number + 1)] if number else []
    return [list(names[start:stop]) for start, stop in pairwise(bounds)]


def group_name(names: Sequence[str]) -> str:
    """Returns what a group of shards is called: its first and its last."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def in_threads(runtime: Runtime, progress: Progress, calls: Iterable[Call[_Result]]) -> list[_Result]:
    """Does calls in threads of this process, `parallel_shards` at once. Returns their results in order."""
    with ThreadPoolExecutor(runtime.config.parallel_shards) as threads:
        return list(threads.map(lambda call: call(runtime, progress), calls))
