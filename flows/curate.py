"""The flow `curate`: raw questions and images in, a bi-mode corpus out. Deployed as `curate/bimode`.

Prefect sees stages and shards. Each stage is a subflow with one task per shard and a progress artifact; the data and
all that must survive lie in the work folder, so a run that was killed goes on where it was, whatever Prefect remembers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from flows import publishing, removing, stages
from flows.accounting import Pace, duration, paid_line, progress_line, stage_total
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.moved_replies import fetch_moved
from flows.publishing import Published
from flows.removing import RemovalPlan
from flows.runtime import Runtime
from flows.stack import project_folder
from flows.stages import Progress
from flows.workspace import Marker
from schemas.config import RunConfig, ServeConfig, SourceConfig, load_config
from schemas.errors import ConfigError, QuarantineExceeded
from schemas.usage import total_usage
from sources import Unit, plan_units

CORPUS_EVENT = "bimode.corpus.created"
_POLL_SECONDS = 1.0
_LOG_SECONDS = 10.0


def load_run(config: str, *, teacher_url: str | None = None, workdir: str | None = None) -> RunConfig:
    """Returns the configuration of a file, with its addresses made absolute and overrides applied.

    Raises ConfigError.
    """
    home = project_folder().resolve()
    path = Path(config)
    loaded = load_config(path if path.is_absolute() or path.exists() else home / path)
    teacher = loaded.teacher.model_copy(update={"url": teacher_url}) if teacher_url else loaded.teacher
    return loaded.model_copy(
        update={
            "teacher": teacher,
            "serve": None if teacher_url else _serve_section(loaded.serve, home),
            "sources": _placed(loaded.sources, home),
            "decontamination": loaded.decontamination.model_copy(
                update={"benchmarks": _placed(loaded.decontamination.benchmarks, home)}
            ),
            "workdir": _absolute(workdir or loaded.workdir, home),
            "corpus": loaded.corpus.model_copy(update={"folder": _absolute(loaded.corpus.folder, home)}),
        }
    )


def _serve_section(serve: ServeConfig | None, home: Path) -> ServeConfig | None:
    """Returns how vLLM is started. A model path that is no folder here is a name on the hub."""
    if serve is None or serve.model_path is None or not (home / serve.model_path).exists():
        return serve
    return serve.model_copy(update={"model_path": str(home / serve.model_path)})


def _placed(sources: Sequence[SourceConfig], home: Path) -> list[SourceConfig]:
    """Returns sources whose addresses are absolute."""
    return [
        source.model_copy(update={"path": _source_path(source, home), "image_root": _absolute(source.image_root, home)})
        for source in sources
    ]


def _source_path(source: SourceConfig, home: Path) -> str | None:
    """Returns where a source lies. A `datasets` source that is no folder here is a name on the hub."""
    is_hub_name = source.format == "datasets" and not (home / source.path).exists()
    return source.path if is_hub_name else _absolute(source.path, home)


def _absolute(path: str | None, home: Path) -> str | None:
    """Returns a local path made absolute from the project folder; addresses with a protocol stay as they are."""
    return path if path is None or "://" in path else str(home / path)


@task(task_run_name="{stage}/{shard}", cache_policy=NO_CACHE, persist_result=False)
def run_shard(stage: str, shard: str, work: Callable[[], Marker]) -> Marker:
    """One shard of one stage; `stage` and `shard` are for the eye."""
    del stage, shard
    return work()


Work = dict[str, Callable[[], Marker]]
"""What a stage has to do: by shard, the call that does it and returns its marker."""


def _run_stage(runtime: Runtime, stage: str, num_rows: int, plan: Callable[[Progress], Work]) -> list[Marker]:
    """The body of a stage's subflow: plans its shards, runs a task for each, and shows progress while they run."""
    title = stages.STAGE_TITLES[stage]
    logger = get_run_logger()
    progress = Progress(num_rows)
    artifact: Any = create_progress_artifact(0.0, key=f"progress-{stage}", description=f"{title}: {num_rows:,} rows")
    began = logged = time.monotonic()
    pace = Pace(num_rows, began)
    work = plan(progress)
    futures = [_submit(stage, shard, call) for shard, call in work.items()]
    while waiting := [future for future in futures if not future.state.is_final()]:
        waiting[0].wait(timeout=_POLL_SECONDS)
        now, line = time.monotonic(), _live_line(runtime, stage, progress, pace)
        update_progress_artifact(artifact, progress.percent, description=f"{title}: {line}")
        if now - logged > _LOG_SECONDS:
            logged = now
            logger.info("%s: %s", title, line)
    markers = [future.result() for future in futures]
    ended = f"{progress.num_done:,} rows in {duration(time.monotonic() - began)}"
    if stage in stages.LABELLING:
        ended += f"; {paid_line(stage_total(runtime.accounts.paid(), stage))}"
    update_progress_artifact(artifact, 100.0, description=f"{title}: {ended}")
    logger.info("%s: done, %s", title, ended)
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


class Curation:
    """The stages of one run in order. `markers` holds what is done so far, by stage."""

    def __init__(self, runtime: Runtime, units: Sequence[Unit]) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.units = units
        self.markers: dict[str, list[Marker]] = {}
        self.benchmarks = Benchmarks(runtime) if self.config.decontamination.benchmarks else None

    def run(self) -> Published:
        """Runs every stage and publishes the corpus. Raises BimodeError: with what to do."""
        before = ""
        for stage in stages.stages_of(self.config):
            num_rows = self._num_kept(before) if before else sum(unit.num_rows for unit in self.units)
            self._stage(stage, num_rows, self._planner(stage, before))
            if stage == stages.DUPLICATES:
                compared = self.markers[before]
            before = stage
        published = publishing.publish(self.runtime, self.markers, self.benchmarks)
        removing.settle(self.runtime, compared, self.markers[stages.DUPLICATES])
        return published

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Progress], Work]) -> None:
        runner: Any = ThreadPoolTaskRunner(max_workers=self.config.parallel_shards)

        # The subflow closes over its work, so that Prefect neither stores nor validates what the shards are made of.
        @flow(name=stage, task_runner=runner, persist_result=False)
        def run_stage() -> list[Marker]:
            return _run_stage(self.runtime, stage, num_rows, plan)

        self.markers[stage] = run_stage()
        self._check_quarantine(stage)

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

    def _check_quarantine(self, stage: str) -> None:
        """Raises QuarantineExceeded: more than the configured share of all rows is quarantined so far."""
        num_rows = sum(unit.num_rows for unit in self.units)
        reasons: dict[str, int] = {}
        for done in self.markers.values():
            for marker in done:
                for reason, number in marker.count.quarantined.items():
                    reasons[reason] = reasons.get(reason, 0) + number
        num_quarantined = sum(reasons.values())
        if num_quarantined > self.config.max_quarantine_share * num_rows:
            listed = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
            raise QuarantineExceeded(
                f"after stage {stage}, {num_quarantined} of {num_rows} rows are quarantined ({listed}), more than "
                f"max_quarantine_share = {self.config.max_quarantine_share}. See {self.runtime.workspace.root}/stages/"
                f"{stage}/*.fates.parquet for each row's reason; fix the input or raise the share"
            )


@flow(name="curate", persist_result=False, log_prints=True)
def curate(config: str = "bimode.yaml", teacher_url: str | None = None, workdir: str | None = None) -> dict[str, Any]:
    """Curates a bi-mode corpus as a configuration file says and returns where it is.

    config: path of the YAML file, relative to BIMODE_HOME or the current folder. teacher_url: use this endpoint instead
    of the configured one. workdir: use this work folder instead of the configured one.
    """
    settings = load_run(config, teacher_url=teacher_url, workdir=workdir)
    logger = get_run_logger()
    runtime = Runtime(settings)
    try:
        with _library_logs_shown(), runtime.workspace.locked():
            units = plan_units(settings)
            num_rows = sum(unit.num_rows for unit in units)
            if num_rows == 0:
                raise ConfigError("the sources hold no rows: check their paths and max_rows")
            logger.info("%s rows in %s shards of %s sources", f"{num_rows:,}", len(units), len(settings.sources))
            published = Curation(runtime, units).run()
    except BaseException:
        # What a run has paid is told even where it made no corpus.
        if paid := runtime.accounts.paid():
            logger.info("this run %s", paid_line(total_usage(paid.values())))
        raise
    finally:
        runtime.close()
    _announce(settings.name, published)
    return published.to_record()


def _announce(name: str, published: Published) -> None:
    """Shows the result in Prefect's UI and, where it is new and not empty, emits the event that triggers training.

    name: of the corpus; by it the event tells apart two corpora in folders of like names.
    """
    logger = get_run_logger()
    report = published.report.resolve()
    create_markdown_artifact(
        f"[{report.name}]({report.as_uri()})\n\n```\n{published.summary}\n```",
        key="corpus-report",
        description=f"Corpus {published.version}: {published.num_rows:,} rows",
    )
    create_table_artifact([published.to_record()], key="corpus", description="The version that this run published")
    logger.info("corpus %s: %s\nreport: %s\n%s", published.version, published.folder, report, published.summary)
    logger.info("this run %s", published.paid_line)
    if published.is_new and published.num_rows:
        emit_event(
            CORPUS_EVENT,
            resource={"prefect.resource.id": f"bimode.corpus.{name}"},
            payload=published.to_record(),
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
