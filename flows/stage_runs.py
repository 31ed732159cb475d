"""One stage of curation as Prefect sees it: a subflow, its tasks, and what the log and the UI show of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import prefect
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TagsContext
from prefect.futures import PrefectFuture

from flows import stages, telemetry
from flows.accounting import Load, Pace, duration, paid_line, progress_line, stage_total
from flows.artifacts import RunArtifacts, Throttle
from flows.crew import Crew, group_name, groups
from flows.runtime import Runtime
from flows.shard_calls import Call, Spread, Work
from flows.stages import Progress
from flows.workspace import Marker

_Result = TypeVar("_Result")
_POLL_SECONDS = 1.0
_LOG_SECONDS = 10.0


@task(task_run_name="{stage}/{shards}", cache_policy=NO_CACHE, persist_result=False)
def run_shards(stage: str, shards: str, work: Callable[[], list[Any]]) -> list[Any]:
    """Some shards of one stage; `stage` and `shards` are for the eye."""
    del stage, shards
    return work()


class StageView:
    """A running stage as the log and the UI show it: in the artifact of the run, and in one of its own.

    The latter lies on the page of the flow run in which `look` or `finish` is first called. num_before, num_stages:
    stages done before this one, and of the whole run.
    """

    def __init__(self, artifacts: RunArtifacts, stage: str, num_before: int, num_stages: int) -> None:
        self._artifacts, self._key, self._title = artifacts, f"progress-{stage}", stages.STAGE_TITLES[stage]
        self._num_before, self._num_stages = num_before, num_stages
        self._throttle, self._logged = Throttle(time.monotonic()), time.monotonic()

    def begin(self, num_rows: int) -> None:
        """Shows in the artifact of the run that the stage begins; its own comes with the first news of it."""
        self._show_run(0.0, f"{num_rows:,} rows")

    def look(self, percent: float, line: str) -> None:
        """Takes note of how far the stage is; called every second."""
        now = time.monotonic()
        if self._throttle.is_due(now, percent):
            self._artifacts.show_progress(self._key, percent, f"{self._title}: {line}")
            self._show_run(percent, line)
        if now - self._logged > _LOG_SECONDS:
            self._logged = now
            get_run_logger().info("%s: %s", self._title, line)

    def finish(self, line: str) -> None:
        self._artifacts.show_progress(self._key, 100.0, f"{self._title}: {line}")
        get_run_logger().info("%s: done, %s", self._title, line)

    def _show_run(self, percent: float, line: str) -> None:
        number, total = self._num_before + 1, self._num_stages
        overall = (100.0 * self._num_before + percent) / total
        self._artifacts.show_progress("progress", overall, f"Stage {number} of {total}, {self._title}: {line}")


def run_stage(
    runtime: Runtime, crew: Crew, stage: str, num_rows: int, plan: Callable[[Spread], Work], view: StageView
) -> list[Marker]:
    """Runs a stage as a subflow: plans its shards, does them in tasks, and returns their markers in order."""

    body = _OnlyHere(lambda: _StageRun(runtime, crew, stage, num_rows, view).run(plan))

    # The subflow closes over its work, so that Prefect neither stores nor validates what the shards are made of.
    @flow(
        name=stage,
        flow_run_name=f"{runtime.config.name}: {stages.STAGE_TITLES[stage]}",
        task_runner=crew.task_runner,
        persist_result=False,
    )
    def run() -> list[Marker]:
        with TagsContext(current_tags=set()):  # tasks have none
            return body()

    with prefect.tags(f"corpus:{runtime.config.name}", f"stage:{stage}"):
        markers: list[Marker] = run()
    return markers


class _OnlyHere:
    """The body of a stage's subflow. A task takes the flow that it belongs to along to its worker, but not this."""

    def __init__(self, body: Callable[[], list[Marker]] | None = None) -> None:
        self._body = body

    def __reduce__(self) -> tuple[type[_OnlyHere], tuple[()]]:
        return (_OnlyHere, ())

    def __call__(self) -> list[Marker]:
        assert self._body is not None, "called in the process that plans the stage"
        return self._body()


class _StageRun:
    """The body of a stage's subflow."""

    def __init__(self, runtime: Runtime, crew: Crew, stage: str, num_rows: int, view: StageView) -> None:
        self._runtime, self._crew, self._stage, self._view = runtime, crew, stage, view
        self._began = time.monotonic()
        self._progress, self._pace = Progress(num_rows), Pace(num_rows, self._began)

    def run(self, plan: Callable[[Spread], Work]) -> list[Marker]:
        self._view.begin(self._progress.num_total)
        with telemetry.stage(self._stage, self._progress) as seen, self._crew.working(self._stage, self._progress):
            markers = list(self._spread("", plan(self._spread)).values())
            self._crew.look()
            seen.count(markers)
        ended = f"{self._progress.num_done:,} rows in {duration(time.monotonic() - self._began)}"
        if self._stage in stages.LABELLING:
            ended += f"; {paid_line(stage_total(self._runtime.accounts.paid(), self._stage))}"
        self._view.finish(ended)
        return markers

    def _spread(self, what: str, calls: Mapping[str, Call[_Result]]) -> dict[str, _Result]:
        """Does calls in tasks; see `Spread`. All tasks end, however, before an error is raised."""
        title = f"{self._stage} ({what})" if what else self._stage
        calls = telemetry.watched(calls, what)
        with self._crew.submitting():
            futures = [
                _submit(title, group_name(group), self._crew.order([calls[name] for name in group]))
                for group in groups(list(calls), self._crew.num_workers)
            ]
        self._await_all(futures)
        return dict(zip(calls, (made for future in futures for made in future.result()), strict=True))

    def _await_all(self, futures: Sequence[PrefectFuture[list[Any]]]) -> None:
        """Waits until all tasks have ended, however, and looks every second."""
        looked = time.monotonic()
        for future in futures:
            has_ended = False
            while not has_ended:
                has_ended = self._crew.has_ended(future, max(0.0, looked + _POLL_SECONDS - time.monotonic()))
                if time.monotonic() - looked >= _POLL_SECONDS:
                    self._view.look(self._progress.percent, self._live_line(self._crew.look()))
                    looked = time.monotonic()

    def _live_line(self, load: Load) -> str:
        """Returns what is to be said of the stage now."""
        done, tokens = self._progress, load.paid.completion_tokens
        self._pace.look(time.monotonic(), num_done=done.num_done, num_skipped=done.num_skipped, num_tokens=tokens)
        return progress_line(self._pace, done.num_done, load)


def _submit(stage: str, shards: str, work: Callable[[], list[Any]]) -> PrefectFuture[list[Any]]:
    """Returns the running task of a group. Its work is a plain callable, so Prefect does not look inside."""
    future: PrefectFuture[list[Any]] = run_shards.submit(stage, shards, work)
    return future
