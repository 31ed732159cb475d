"""The workers of a Ray cluster do a run's calls, by prefect-ray's task runner (`ray` in the configuration).

The flow's process is the driver: it plans, and passes on calls and markers, never rows. A worker makes a `Runtime` from
the configuration and keeps it from task to task, with its connections and verifier processes. Work folder and sources
must lie where every node sees them under the same path.

A task whose worker or node is lost is done again by Ray, elsewhere. What its shards had finished stands, and what the
teacher had answered lies in their journals, so no durable reply is asked for again. Work that waits for a processor
waits in Ray's queue, as a few numbers.

Workers tell a board how far they are: an actor on the driver's node. Its counts feed the live line and the accounts;
what a lost worker paid in its last second is not in them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from prefect.futures import PrefectFuture

from flows.accounting import Accounts, Load, stage_total
from flows.crew import in_threads
from flows.garbage import collect_rarely
from flows.runtime import Runtime
from flows.shard_calls import Call
from flows.stages import Progress
from schemas.config import RayConfig, RunConfig
from schemas.errors import ConfigError
from schemas.usage import Ledger, merged_ledgers

try:
    import ray
    import ray.util.scheduling_strategies
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options
except ImportError as error:
    raise ConfigError(f"`ray` in the configuration needs packages that are not installed: {error}") from error

_Result = TypeVar("_Result")
_REPORT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """How far one try at a task is. num_in_flight, num_waiting: at the endpoints, by this worker."""

    num_done: int = 0
    num_skipped: int = 0
    paid: Ledger = field(default_factory=dict)
    num_in_flight: int = 0
    num_waiting: int = 0


class Board:
    """What the workers last said, by task and try. Rows of a task are those of its last try, paid is what all paid."""

    def __init__(self) -> None:
        self._reports: dict[str, dict[str, Report]] = {}

    def put(self, task: str, attempt: str, report: Report) -> None:
        tries = self._reports.setdefault(task, {})
        tries.pop(attempt, None)
        tries[attempt] = report

    def clear(self) -> None:
        self._reports.clear()

    def total(self) -> Report:
        tries = [list(tries.values()) for tries in self._reports.values()]
        last = [reports[-1] for reports in tries]
        return Report(
            sum(report.num_done for report in last),
            sum(report.num_skipped for report in last),
            merged_ledgers(report.paid for reports in tries for report in reports),
            sum(report.num_in_flight for report in last),
            sum(report.num_waiting for report in last),
        )


class RayCrew:
    """The workers of a cluster; used as a context, which connects to it and leaves it. See `flows.crew.Crew`.

    Raises ConfigError on entering: there is no such cluster.
    """

    def __init__(self, runtime: Runtime) -> None:
        assert runtime.config.ray is not None, "only made where a cluster is configured"
        self._runtime, self._settings = runtime, runtime.config.ray
        self._stage, self._progress = "", Progress(0)
        self._opened = ExitStack()

    def __enter__(self) -> RayCrew:
        self._opened.enter_context(connected(self._settings))
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.close()

    @property
    def task_runner(self) -> Any:
        return RayTaskRunner()  # finds the connection of this process

    @property
    def num_workers(self) -> int:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return max(1, int(resources.get("CPU", 1)) // self._cpus_per_task)

    @property
    def _cpus_per_task(self) -> int:
        return self._settings.cpus_per_task or self._runtime.config.parallel_shards

    @contextmanager
    def working(self, stage: str, progress: Progress) -> Iterator[None]:
        self._stage, self._progress = stage, progress
        ray.get(self._board.clear.remote())
        with self._runtime.accounts.counted(lambda: self._told().paid):
            yield

    def order(self, calls: Sequence[Call[_Result]]) -> Callable[[], list[_Result]]:
        return _Order(self._runtime.config.model_dump_json(), list(calls), self._board, uuid4().hex)

    def submitting(self) -> AbstractContextManager[None]:
        options: AbstractContextManager[None] = remote_options(
            num_cpus=self._cpus_per_task, max_retries=self._settings.max_retries
        )
        return options

    def has_ended(self, future: PrefectFuture[Any], seconds: float) -> bool:
        ended, _ = ray.wait([future.wrapped_future], timeout=seconds)  # type: ignore[attr-defined]
        return bool(ended)

    def look(self) -> Load:
        total = self._told()
        self._progress.show(num_done=total.num_done, num_skipped=total.num_skipped)
        return Load(stage_total(total.paid, self._stage), total.num_in_flight, total.num_waiting)

    def _told(self) -> Report:
        total: Report = ray.get(self._board.total.remote())
        return total


@contextmanager
def connected(settings: RayConfig) -> Iterator[None]:
    """Connects this process to the cluster and leaves it. Raises ConfigError: there is none at that address."""
    options: dict[str, Any] = {"namespace": "bimode", "log_to_driver": False, "logging_level": "warning"}
    if settings.address == "local":
        options["include_dashboard"] = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if ":" in settings.address:
            # Ray itself tries for many minutes.
            host, port = settings.address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=settings.address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at ray.address = {settings.address}: {error}. Start one with `ray start --head`, join it "
            "with `ray start --address HEAD:6379`, or take `local`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Order:
    """What one task does on its worker. settings: the configuration as JSON. task: a name of its own."""

    def __init__(self, settings: str, calls: list[Call[Any]], board: Any, task: str) -> None:
        self._settings, self._calls, self._board, self._task = settings, calls, board, task

    def __call__(self) -> list[Any]:
        runtime, progress = _runtime(self._settings), Progress(0)
        runtime.accounts = Accounts()
        with _reporting(self._board, self._task, runtime, progress):
            return in_threads(runtime, progress, self._calls)


@contextmanager
def _reporting(board: Any, task: str, runtime: Runtime, progress: Progress) -> Iterator[None]:
    """Tells the board every second how far the task is, and at the end, however that comes."""
    attempt, ended = uuid4().hex, threading.Event()

    def put() -> Any:
        seen = runtime.snapshot()
        report = Report(
            progress.num_done, progress.num_skipped, seen.paid, seen.num_in_flight, sum(seen.num_waiting.values())
        )
        return board.put.remote(task, attempt, report)

    def keep_telling() -> None:
        while not ended.wait(_REPORT_SECONDS):
            put()

    teller = threading.Thread(target=keep_telling, name="report", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        ray.get(put())


_made: dict[str, Runtime] = {}


def _runtime(settings: str) -> Runtime:
    """Returns this worker's runtime of a configuration; that of another one is closed."""
    if settings not in _made:
        for runtime in _made.values():
            runtime.close()
        _made.clear()
        collect_rarely()
        config = RunConfig.model_validate_json(settings)
        # A task has a processor or a few of its own node; the verifiers of all tasks together are many.
        verification = config.verification.model_copy(update={"num_workers": 1})
        _made[settings] = Runtime(config.model_copy(update={"verification": verification}))
    return _made[settings]
