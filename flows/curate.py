"""The flow `curate`: raw questions and images in, a bi-mode corpus out. Deployed as `curate/bimode`.

Prefect sees stages and shards. Each stage is a subflow with one task per shard; the data and all that must survive lie
in the work folder, so a run that was killed goes on where it was, whatever Prefect remembers. What the UI shows of a
run is made in `flows.artifacts`, what it tells automations in `flows.events`.

Runs are tagged `corpus:NAME`, and at their end `new-version` or `no-news`; stages are tagged `stage:NAME`, too. Tasks
are not: Prefect would ask its server for a slot of each tag before every shard, which made 100 tasks take 0.9 s
instead of 0.4 s.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpx
import prefect
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from pydantic.json_schema import SkipJsonSchema

from corpus.writer import STAGE
from flows import events, publishing, removing, stages
from flows.accounting import Pace, duration, paid_line, progress_line, stage_total
from flows.artifact_texts import Places
from flows.artifacts import RunArtifacts, Throttle
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.holding import held
from flows.moved_replies import fetch_moved
from flows.publishing import Published
from flows.removing import RemovalPlan
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.stack import project_folder
from flows.stages import Progress
from flows.workspace import Marker
from schemas.config import RunConfig
from schemas.errors import BimodeError, ConfigError, QuarantineExceeded
from schemas.fates import StageCount
from schemas.overrides import RunOverrides, described, overridden
from schemas.usage import total_usage
from sources import Unit, plan_units

__all__ = ["Curation", "Work", "curate", "load_run"]

NO_NEWS = "No news"
"""Name of the state of a finished run that found nothing to make another version of."""
_AS_THE_FILE_SAYS = RunOverrides()
_POLL_SECONDS = 1.0
_LOG_SECONDS = 10.0


@task(task_run_name="{stage}/{shard}", cache_policy=NO_CACHE, persist_result=False)
def run_shard(stage: str, shard: str, work: Callable[[], Marker]) -> Marker:
    """One shard of one stage; `stage` and `shard` are for the eye."""
    del stage, shard
    return work()


Work = dict[str, Callable[[], Marker]]
"""What a stage has to do: by shard, the call that does it and returns its marker."""


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


def _run_stage(
    runtime: Runtime, stage: str, num_rows: int, plan: Callable[[Progress], Work], view: StageView
) -> list[Marker]:
    """The body of a stage's subflow: plans its shards, runs a task for each, shows progress, returns their markers."""
    progress = Progress(num_rows)
    view.begin(num_rows)
    began = time.monotonic()
    pace = Pace(num_rows, began)
    work = plan(progress)
    futures = [_submit(stage, shard, call) for shard, call in work.items()]
    _await_all(futures, lambda: view.look(progress.percent, _live_line(runtime, stage, progress, pace)))
    markers = [future.result() for future in futures]
    ended = f"{progress.num_done:,} rows in {duration(time.monotonic() - began)}"
    if stage in stages.LABELLING:
        ended += f"; {paid_line(stage_total(runtime.accounts.paid(), stage))}"
    view.finish(ended)
    return markers


def _live_line(runtime: Runtime, stage: str, progress: Progress, pace: Pace) -> str:
    """Looks at a stage and returns what is to be said of it now."""
    load = runtime.load(stage)
    num_done, num_skipped = progress.num_done, progress.num_skipped
    pace.look(time.monotonic(), num_done=num_done, num_skipped=num_skipped, num_tokens=load.paid.completion_tokens)
    return progress_line(pace, num_done, load)


def _submit(stage: str, shard: str, call: Callable[[], Marker]) -> PrefectFuture[Marker]:
    """Returns the running task of one shard. Quoted, its work is passed on without Prefect looking inside."""
    future: PrefectFuture[Marker] = run_shard.submit(stage, shard, quote(call))  # type: ignore[call-overload]
    return future


def _await_all(futures: Sequence[PrefectFuture[Marker]], look: Callable[[], None]) -> None:
    """Waits until all tasks have ended, however, and looks every second.

    A future's `state` would ask the server, for each shard at each look: here only what this process knows is asked.
    """
    looked = time.monotonic()
    for future in futures:
        has_ended = False
        while not has_ended:
            has_ended = _ends_within(future, max(0.0, looked + _POLL_SECONDS - time.monotonic()))
            if time.monotonic() - looked >= _POLL_SECONDS:
                look()
                looked = time.monotonic()


def _ends_within(future: PrefectFuture[Marker], seconds: float) -> bool:
    """Waits for a task for so long; returns whether it has ended, well or not."""
    try:
        future.result(timeout=seconds, raise_on_failure=False)
    except TimeoutError:
        return False
    return True


class Curation:
    """The stages of one run in order.

    stage: the one at work. markers: what is done so far, by stage. artifacts: what the UI shows; None where the stages
    run without Prefect.
    """

    def __init__(self, runtime: Runtime, units: Sequence[Unit], artifacts: RunArtifacts | None = None) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.units = units
        self.artifacts = artifacts
        self.stage = ""
        self.markers: dict[str, list[Marker]] = {}
        self._counts: dict[str, StageCount] = {}
        self.benchmarks = Benchmarks(runtime) if self.config.decontamination.benchmarks else None

    @property
    def num_rows(self) -> int:
        """Returns how many rows the sources hold."""
        return sum(unit.num_rows for unit in self.units)

    def run(self) -> Published:
        """Runs every stage and publishes the corpus. Raises BimodeError: with what to do."""
        before = ""
        for stage in stages.stages_of(self.config):
            self.stage = stage
            num_rows = self._num_kept(before) if before else self.num_rows
            self._stage(stage, num_rows, self._planner(stage, before))
            if stage == stages.DUPLICATES:
                compared = self.markers[before]
            before = stage
        self.stage = STAGE
        published = publishing.publish(self.runtime, self.markers, self.benchmarks)
        removing.settle(self.runtime, compared, self.markers[stages.DUPLICATES])
        return published

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Progress], Work]) -> None:
        assert self.artifacts is not None, "a stage in Prefect has something to show"
        names = stages.stages_of(self.config)
        runner: Any = ThreadPoolTaskRunner(max_workers=self.config.parallel_shards)
        run_name = f"{self.config.name}: {stages.STAGE_TITLES[stage]}"
        view, began = StageView(self.artifacts, stage, names.index(stage), len(names)), time.monotonic()

        # The subflow closes over its work, so that Prefect neither stores nor validates what the shards are made of.
        @flow(name=stage, flow_run_name=run_name, task_runner=runner, persist_result=False)
        def run_stage() -> list[Marker]:
            with TagsContext(current_tags=set()):  # tasks have none
                return _run_stage(self.runtime, stage, num_rows, plan, view)

        with prefect.tags(f"corpus:{self.config.name}", f"stage:{stage}"):
            self.markers[stage] = run_stage()
        counts = self.counts()
        self.artifacts.show_stage(counts, self.markers[stage], self.runtime.accounts.paid())
        count, seconds = counts[stage], round(time.monotonic() - began, 3)
        self._tell(events.STAGE_FINISHED, {"stage": stage, **count.to_record(), "seconds": seconds})
        try:
            stages.check_quarantine(
                self.config, self.markers, stage, num_rows=self.num_rows, folder=self.runtime.workspace.root
            )
        except QuarantineExceeded:
            self._tell(events.QUARANTINE_EXCEEDED, self._quarantine_record(stage, counts))
            raise

    def counts(self) -> dict[str, StageCount]:
        """Returns what became of the rows, by stage, in order."""
        for stage in self.markers.keys() - self._counts.keys():
            self._counts[stage] = sum((marker.count for marker in self.markers[stage]), StageCount())
        return {stage: self._counts[stage] for stage in self.markers}

    def _tell(self, event: str, payload: Mapping[str, Any]) -> None:
        events.emit(event, self.config.name, payload)

    def _quarantine_record(self, stage: str, counts: Mapping[str, StageCount]) -> dict[str, Any]:
        reasons = sum((count.quarantined for count in counts.values()), Counter[str]())
        return {
            "stage": stage,
            "rows": self.num_rows,
            "quarantined": reasons.total(),
            "max_quarantine_share": self.config.max_quarantine_share,
            "reasons": dict(reasons.most_common()),
        }

    def _num_kept(self, stage: str) -> int:
        return sum(marker.count.num_kept for marker in self.markers[stage])

    def _plan_sources(self, progress: Progress) -> Work:
        return {
            stages.shard_name(unit): lambda unit=unit: stages.read_source_shard(self.runtime, unit, progress)  # type: ignore[misc]
            for unit in self.units
        }

    def _planner(self, stage: str, before: str) -> Callable[[Progress], Work]:
        """Returns what plans a stage, given the one before it."""
        if stage == stages.SOURCES:
            return self._plan_sources
        if stage == stages.DUPLICATES:
            return partial(self._plan_duplicates, before)
        if stage == stages.TRACES:
            return partial(self._plan_traces, before)

        def plan(progress: Progress) -> Work:
            if stage in stages.LABELLING:
                fetch_moved(self.runtime.workspace, stage, self._undone(stage, before))
            return {
                marker.shard: lambda marker=marker: self._row_by_row(stage, marker, progress)  # type: ignore[misc]
                for marker in self.markers[before]
            }

        return plan

    def _undone(self, stage: str, before: str) -> list[Marker]:
        """Returns the markers of the stage before for the shards that this stage has still to do."""
        workspace, config = self.runtime.workspace, self.config
        return [
            marker
            for marker in self.markers[before]
            if workspace.find_marker(stage, marker.shard, stages.stage_digest(stage, config, marker.output)) is None
        ]

    def _row_by_row(self, stage: str, before: Marker, progress: Progress) -> Marker:
        """Runs a stage over one shard in which no row depends on another."""
        if self.benchmarks is not None and stage == DECONTAMINATION:
            return stages.remove_leaks(self.runtime, self.benchmarks, before, progress)
        return stages.label_shard(self.runtime, stage, before, progress)

    def _plan_duplicates(self, before: str, progress: Progress) -> Work:
        """Plans the comparison of all shards but those whose published result stands."""
        done = self.markers[before]
        settled = removing.settled_shards(self.runtime, done)
        new = [marker for marker in done if marker.shard not in settled]

        def find(runtime: Runtime, markers: Sequence[Marker]) -> RemovalPlan:
            return removing.plan_duplicates(runtime, markers, list(settled.values()))

        inputs = [[marker.output for marker in new], [marker.digest for marker in settled.values()]]
        work = self._plan_removals(stages.DUPLICATES, new, inputs, find, stages.remove_duplicates, progress)
        for marker in settled.values():
            progress.skip(marker.count.num_in)
            work[marker.shard] = lambda marker=marker: marker  # type: ignore[misc]
        return {marker.shard: work[marker.shard] for marker in done}

    def _plan_traces(self, before: str, progress: Progress) -> Work:
        done = self.markers[before]
        inputs = [marker.output for marker in done]
        return self._plan_removals(stages.TRACES, done, inputs, removing.plan_traces, stages.remove_traces, progress)

    def _plan_removals(
        self,
        stage: str,
        done: Sequence[Marker],
        inputs: object,
        find: Callable[[Runtime, Sequence[Marker]], RemovalPlan],
        remove: Callable[[Runtime, Marker, RemovalPlan, str, Progress], Marker],
        progress: Progress,
    ) -> Work:
        """Plans a stage that looks across shards: once for all of them, unless every shard is done already.

        done: markers of the stage before. inputs: all that the plan depends on beside the configuration.
        """
        digest = stages.stage_digest(stage, self.config, inputs)
        found = {marker.shard: self.runtime.workspace.find_marker(stage, marker.shard, digest) for marker in done}
        removals: RemovalPlan = {}
        if not all(found.values()):
            removals = find(self.runtime, done)

        def work(marker: Marker) -> Marker:
            finished = found[marker.shard]
            if finished is None:
                return remove(self.runtime, marker, removals, digest, progress)
            progress.skip(finished.count.num_in)
            return finished

        return {marker.shard: lambda marker=marker: work(marker) for marker in done}  # type: ignore[misc]


def _run_name() -> str:
    """Returns the name of a run of `curate`: its corpus and when it began, or what else is known of a wrong one."""
    moment = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    try:
        return f"{load_run(str(prefect.runtime.flow_run.parameters['config'])).name} {moment}"
    except BimodeError:  # the flow itself says what is wrong
        return f"curate {moment}"


@flow(name="curate", flow_run_name=_run_name, persist_result=False, log_prints=True)
def curate(
    config: str = "bimode.yaml",
    teacher_url: str | SkipJsonSchema[None] = "",
    workdir: str | SkipJsonSchema[None] = "",
    wait: bool = False,
    overrides: RunOverrides = _AS_THE_FILE_SAYS,
) -> Any:
    """Curates a bi-mode corpus as a configuration file says and returns where it is.

    Args:
        config: Path of the YAML file, relative to BIMODE_HOME or the current folder of the worker.
        teacher_url: Use this OpenAI-compatible endpoint instead of the configured one, and start no vLLM.
        workdir: Use this work folder instead of the configured one.
        wait: Wait for a run that is at work in the same folder. Otherwise this one gives up, and says for whom.
        overrides: Settings for this run alone. What is left empty is as the file says. Other labels are another
            recipe: the version that this run makes starts anew, and so does the next one without them.
    """
    given = overrides.model_dump()
    settings = overridden(load_run(config, teacher_url=teacher_url or None, workdir=workdir or None), overrides)
    places = Places.of_environment(project_folder())
    logger = get_run_logger()
    _tag_run(f"corpus:{settings.name}")
    for line in described(given):
        logger.info("for this run alone: %s", line)
    runtime = Runtime(settings)
    artifacts = RunArtifacts(settings, runtime.workspace, places, logger.warning)
    curation: Curation | None = None
    try:
        with _library_logs_shown(), held(runtime.workspace, _told_name(), wait=wait, say=logger.info):
            units = plan_units(settings)
            num_rows = sum(unit.num_rows for unit in units)
            if num_rows == 0:
                raise ConfigError("the sources hold no rows: check their paths and max_rows")
            logger.info("%s rows in %s shards of %s sources", f"{num_rows:,}", len(units), len(settings.sources))
            artifacts.show_progress("progress", 0.0, f"{num_rows:,} rows")
            curation = Curation(runtime, units, artifacts)
            published = curation.run()
            artifacts.show_tables(runtime.accounts.paid())
    except BaseException as error:
        _tell_failure(runtime, artifacts, curation, error)
        raise
    finally:
        runtime.close()
    return _announce(config, settings, artifacts, published)


def _told_name() -> str:
    """Returns what those that wait for this run are told of it."""
    context = FlowRunContext.get()
    name = context.flow_run.name if context is not None and context.flow_run is not None else None
    return f"the run '{name}'" if name else "a run"


def _tag_run(*tags: str) -> None:
    """Adds tags to the flow run, in whose context it is called. A server that does not take them stops nothing."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    context.flow_run.tags = sorted({*context.flow_run.tags, *tags})
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, tags=context.flow_run.tags)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("Prefect's server did not take the tags %s: %s", ", ".join(tags), error)


def _tell_failure(runtime: Runtime, artifacts: RunArtifacts, curation: Curation | None, error: BaseException) -> None:
    """Says what a run has paid even where it made no corpus; emits the event of a failure, unless it was stopped."""
    if paid := runtime.accounts.paid():
        get_run_logger().info("this run %s", paid_line(total_usage(paid.values())))
    artifacts.show_tables(paid)
    if isinstance(error, Exception):
        record = {
            "stage": curation.stage if curation is not None else "",
            "error": type(error).__name__,
            "exit_code": error.exit_code if isinstance(error, BimodeError) else 1,
        }
        events.emit(events.RUN_FAILED, runtime.config.name, record)


def _announce(config: str, settings: RunConfig, artifacts: RunArtifacts, published: Published) -> Any:
    """Shows the result in Prefect's UI, emits its event, and returns the final state of the run, with its record.

    The event of a new corpus triggers training, so one without rows has none. config: path of the configuration file.
    """
    logger = get_run_logger()
    record = published.to_record()
    artifacts.show_version(published, config)
    artifacts.show_progress("progress", 100.0, f"Done: {published.num_rows:,} rows in {published.version}")
    logger.info(
        "corpus %s: %s\nreport: %s\n%s", published.version, published.folder, published.report, published.summary
    )
    logger.info("this run %s", published.paid_line)
    _tag_run("new-version" if published.is_new else "no-news")
    if not published.is_new:
        told = {name: record[name] for name in ("corpus", "version", "rows", "new_teacher_calls")}
        events.emit(events.CORPUS_UNCHANGED, settings.name, told)
        message = f"{settings.name} {published.version} stays the newest version; this run {published.paid_line}"
        return Completed(name=NO_NEWS, message=message, data=record)
    if published.num_rows:
        events.emit(events.CORPUS_CREATED, settings.name, record)
    return Completed(
        message=f"{settings.name} {published.version}: {published.num_rows:,} rows, {published.num_think:,} think",
        data=record,
    )


class _ToFlowRun(logging.Handler):
    """Passes a library's messages on to the flow run's log, which names the run itself, so that any thread may log."""

    def __init__(self, run_logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        super().__init__(logging.INFO)
        self._run_logger = run_logger

    def emit(self, record: logging.LogRecord) -> None:
        self._run_logger.log(record.levelno, "%s", record.getMessage())


@contextmanager
def _library_logs_shown() -> Iterator[None]:
    """Shows the messages of the packages below in the flow run's log, so that waiting for a teacher is seen."""
    handler = _ToFlowRun(get_run_logger())
    libraries = [logging.getLogger(name) for name in ("teacher", "flows", "sources", "judges", "corpus")]
    levels = [library.level for library in libraries]
    for library in libraries:
        library.setLevel(logging.INFO)
        library.addHandler(handler)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.removeHandler(handler)
            library.setLevel(level)
