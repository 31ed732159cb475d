"""The flow `curate`: raw questions and images in, a bi-mode corpus out. Deployed as `curate/bimode`.

Prefect sees stages and groups of shards: each stage is a subflow (`flows.stage_runs`), and `flows.crew` says who works
on its shards. The data and all that must survive lie in the work folder, so a run that was killed goes on where it was,
whatever Prefect remembers. What the UI shows of a run is made in `flows.artifacts`, what it tells automations in
`flows.events`.

Runs are tagged `corpus:NAME`, and at their end `new-version` or `no-news`; stages are tagged `stage:NAME`, too. Tasks
are not: Prefect would ask its server for a slot of each tag before every shard, which made 100 tasks take 0.9 s
instead of 0.4 s.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpx
import prefect
from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Completed
from pydantic.json_schema import SkipJsonSchema

from corpus.writer import STAGE
from flows import events, partitioned, publishing, removing, stages, telemetry
from flows.accounting import paid_line
from flows.artifact_texts import Places
from flows.artifacts import RunArtifacts
from flows.crew import Crew, ThreadCrew
from flows.decontaminating import Benchmarks
from flows.garbage import collected_rarely
from flows.holding import held
from flows.moved_replies import fetch_moved
from flows.publishing import Published
from flows.removals import RemovalPlan
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.shard_calls import Call, Finished, ProcessRows, ReadSource, RemoveRows, Spread, Work
from flows.stack import project_folder
from flows.stage_runs import StageView, run_stage
from flows.workspace import Marker
from schemas.config import RunConfig
from schemas.errors import BimodeError, ConfigError, QuarantineExceeded
from schemas.fates import StageCount
from schemas.overrides import RunOverrides, described, overridden
from schemas.usage import total_usage
from sources import Unit, plan_units

NO_NEWS = "No news"
"""Name of the state of a finished run that found nothing to make another version of."""
_AS_THE_FILE_SAYS = RunOverrides()


class Curation:
    """The stages of one run in order.

    stage: the one at work. markers: what is done so far, by stage. artifacts: what the UI shows; None where the stages
    run without Prefect. crew: who does the shards; threads of this process by default.
    """

    def __init__(
        self,
        runtime: Runtime,
        units: Sequence[Unit],
        artifacts: RunArtifacts | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.units = units
        self.artifacts = artifacts
        self.crew = crew or ThreadCrew(runtime)
        self.stage = ""
        self.markers: dict[str, list[Marker]] = {}
        self._counts: dict[str, StageCount] = {}
        self.benchmarks = runtime.shared(Benchmarks) if self.config.decontamination.benchmarks else None

    @property
    def num_rows(self) -> int:
        """Returns how many rows the sources hold."""
        return sum(unit.num_rows for unit in self.units)

    def run(self) -> Published:
        """Runs every stage and publishes the corpus. Raises BimodeError: with what to do."""
        with collected_rarely():
            return self._run()

    def _run(self) -> Published:
        before = ""
        for stage in stages.stages_of(self.config):
            self.stage = stage
            num_rows = self._num_kept(before) if before else self.num_rows
            self._stage(stage, num_rows, self._planner(stage, before))
            if stage == stages.DUPLICATES:
                compared = self.markers[before]
            before = stage
        self.stage = STAGE
        with telemetry.stage(STAGE):
            published = publishing.publish(self.runtime, self.markers, self.benchmarks)
        removing.settle(self.runtime, compared, self.markers[stages.DUPLICATES])
        return published

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Spread], Work]) -> None:
        assert self.artifacts is not None, "a stage in Prefect has something to show"
        names = stages.stages_of(self.config)
        view, began = StageView(self.artifacts, stage, names.index(stage), len(names)), time.monotonic()
        self.markers[stage] = run_stage(self.runtime, self.crew, stage, num_rows, plan, view)
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

    def _planner(self, stage: str, before: str) -> Callable[[Spread], Work]:
        """Returns what plans a stage, given the one before it."""
        if stage == stages.SOURCES:
            return lambda spread: {stages.shard_name(unit): ReadSource(unit) for unit in self.units}
        if stage == stages.DUPLICATES:
            return partial(self._plan_duplicates, before)
        if stage == stages.TRACES:
            return partial(self._plan_traces, before)

        def plan(spread: Spread) -> Work:
            del spread
            if stage in stages.LABELLING:
                fetch_moved(self.runtime.workspace, stage, self._undone(stage, before))
            return {marker.shard: ProcessRows(stage, marker) for marker in self.markers[before]}

        return plan

    def _undone(self, stage: str, before: str) -> list[Marker]:
        """Returns the markers of the stage before for the shards that this stage has still to do."""
        workspace, config = self.runtime.workspace, self.config
        return [
            marker
            for marker in self.markers[before]
            if workspace.find_marker(stage, marker.shard, stages.stage_digest(stage, config, marker.output)) is None
        ]

    def _plan_duplicates(self, before: str, spread: Spread) -> Work:
        """Plans the comparison of all shards but those whose published result stands."""
        done = self.markers[before]
        settled = removing.settled_shards(self.runtime, done)
        new = [marker for marker in done if marker.shard not in settled]

        def find() -> RemovalPlan:
            if self.config.ray is not None:
                return partitioned.plan_duplicates(self.runtime, new, list(settled.values()), spread)
            return removing.plan_duplicates(self.runtime, new, list(settled.values()))

        inputs = [[marker.output for marker in new], [marker.digest for marker in settled.values()]]
        work = self._plan_removals(stages.DUPLICATES, new, inputs, find)
        work |= {shard: Finished(marker) for shard, marker in settled.items()}
        return {marker.shard: work[marker.shard] for marker in done}

    def _plan_traces(self, before: str, spread: Spread) -> Work:
        done = self.markers[before]

        def find() -> RemovalPlan:
            if self.config.ray is not None:
                return partitioned.plan_traces(self.runtime, done, spread)
            return removing.plan_traces(self.runtime, done)

        return self._plan_removals(stages.TRACES, done, [marker.output for marker in done], find)

    def _plan_removals(
        self, stage: str, done: Sequence[Marker], inputs: object, find: Callable[[], RemovalPlan]
    ) -> Work:
        """Plans a stage that looks across shards: once for all of them, unless every shard is done already.

        done: markers of the stage before. inputs: all that the plan depends on beside the configuration.
        """
        digest = stages.stage_digest(stage, self.config, inputs)
        found = {marker.shard: self.runtime.workspace.find_marker(stage, marker.shard, digest) for marker in done}
        removals = {} if all(found.values()) else find()

        def call(marker: Marker) -> Call[Marker]:
            finished = found[marker.shard]
            if finished is not None:
                return Finished(finished)
            return RemoveRows(stage, marker, removals.get(marker.shard), digest)

        return {marker.shard: call(marker) for marker in done}


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
    with telemetry.run(runtime, run_id=prefect.runtime.flow_run.id or ""):
        published = _run(runtime, artifacts, wait=wait)
        return _announce(config, settings, artifacts, published)


def _run(runtime: Runtime, artifacts: RunArtifacts, *, wait: bool) -> Published:
    """Holds the work folder, runs all stages, and publishes. Raises BimodeError, after telling of it."""
    logger, curation = get_run_logger(), None
    try:
        with (
            telemetry.library_logs_shown(logger),
            held(runtime.workspace, _told_name(), wait=wait, say=logger.info),
        ):
            units = plan_units(runtime.config)
            num_rows = sum(unit.num_rows for unit in units)
            if num_rows == 0:
                raise ConfigError("the sources hold no rows: check their paths and max_rows")
            num_sources = len(runtime.config.sources)
            logger.info("%s rows in %s shards of %s sources", f"{num_rows:,}", len(units), num_sources)
            artifacts.show_progress("progress", 0.0, f"{num_rows:,} rows")
            with crew_of(runtime) as crew:
                curation = Curation(runtime, units, artifacts, crew)
                published = curation.run()
            artifacts.show_tables(runtime.accounts.paid())
            return published
    except BaseException as error:
        _tell_failure(runtime, artifacts, curation, error)
        raise
    finally:
        runtime.close()


@contextmanager
def crew_of(runtime: Runtime) -> Iterator[Crew]:
    """Yields the workers that the configuration names. Raises ConfigError: they cannot be reached."""
    if runtime.config.ray is None:
        yield ThreadCrew(runtime)
        return
    from flows.ray_crew import RayCrew  # noqa: PLC0415 - its packages are an extra

    with RayCrew(runtime) as crew:
        yield crew


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
