"""The flow `train`: a corpus in, a model that thinks when it needs to out. Deployed as `train/annealing`, `train/bpo`
and `train/bimode`, which is annealing, BPO and evaluation in order.

Prefect sees one task for each program, its progress, its newest metrics and its log. What must survive lies in the
output folder: a program that was cancelled, crashed or killed goes on from its checkpoint when the flow runs again, and
one that has finished is not repeated, whatever Prefect remembers.

Left out on purpose: several machines. There, start the programs with torchrun or accelerate; they need no Prefect.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, suspend_flow_run, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import PrefectException
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from prefect.tasks import Task

from corpus.places import is_address
from corpus.storage import append_json_line, storage_errors
from corpus.versions import verify_version
from flows.gpu_lease import Lease
from flows.heartbeats import Pulse, beating
from flows.training_gpus import fit, leased_gpus
from flows.training_plan import (
    Step,
    TrainingPlan,
    check_settings,
    keep_version,
    load_training,
    plan_training,
    program_of,
    render_plan,
)
from flows.training_process import LineReader, Metrics, Program, ProgramCrashed, run_supervised
from schemas.errors import ConfigError, Interrupted, StorageError
from schemas.training_config import ProgramName, TrainingConfig

INTERRUPTED = "Interrupted"
"""Name of the state of a run that was stopped and can go on."""
APPROVALS_FILE = "approvals.jsonl"
EVALUATION_TABLE = "table.md"
_SHOWN_FILES = {".png", ".svg", ".jsonl"}
_SHOW_SECONDS = 2.0
_LOG_SECONDS = 10.0
_MAX_LOG_LINES = 50
"""Lines of a program's log that are passed on to Prefect at once; its file has them all."""

RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]


class Approval(RunInput):
    """What Prefect's UI asks a person before a new corpus version takes the GPUs."""

    approve: bool
    note: str = ""


@flow(name="train", persist_result=False)
def train(
    config: str = "train.yaml",
    only: ProgramName | None = None,
    corpus: str | None = None,
    announced: str | None = None,
) -> Any:
    """Trains and evaluates as a configuration file says, and returns where the results are.

    config: path of the YAML file, relative to BIMODE_HOME or the current folder. only: run this program alone. corpus:
    use this corpus, or this version of one, instead of the configured one. announced: the version whose event started
    this run; then the threshold on new rows and the approval of the configuration hold. A person's run waits for
    neither.
    """
    settings = load_training(config)
    with beating() as pulse:
        return _train(settings, only=only, corpus=corpus, announced=announced, pulse=pulse)


def _train(
    settings: TrainingConfig,
    *,
    only: ProgramName | None,
    corpus: str | None,
    announced: str | None,
    pulse: Pulse | None,
) -> Any:
    logger = get_run_logger()
    plan = plan_training(settings, only=only, corpus=corpus)
    logger.info("%s", render_plan(plan))
    if announced is not None and (reason := _reason_to_wait(plan, announced)):
        return _nothing_done(reason)
    try:
        if any(step.result() is None for step in plan.selected):
            if announced is not None and settings.trigger.approval and (refusal := _ask(plan)):
                return _nothing_done(refusal)
            _check(plan)
        with leased_gpus(plan, flow_run.get_name() or "train", logger.info) as gpus:
            for step in plan.selected:
                _run_step(step, plan, gpus, pulse)
    except Interrupted as error:
        logger.warning("%s", error)
        return Cancelled(name=INTERRUPTED, message=str(error))
    if all(step.result() is not None for step in plan.steps):
        plan.record_trained()
    return _announce(plan)


def _check(plan: TrainingPlan) -> None:
    """Looks at the corpus and at the settings of all programs, before any takes hours. Raises BimodeError."""
    verify_version(plan.corpus)
    try:
        keep_version(plan)
    except (ConfigError, StorageError) as error:
        get_run_logger().warning("%s is not kept from being removed during this run: %s", plan.corpus, error)
    waiting = [step for step in plan.selected if step.result() is None]
    for step in waiting if len(waiting) > 1 else []:
        check_settings(step, plan)


def _is_version_of(version: str, corpus: str) -> bool:
    """Whether a version is one of a corpus, or beside the version that is named in its place."""
    if is_address(version) or is_address(corpus):
        return version.rstrip("/").rpartition("/")[0] in {corpus.rstrip("/"), corpus.rstrip("/").rpartition("/")[0]}
    ours = Path(corpus).resolve()
    return Path(version).resolve().parent in {ours, ours.parent}


def _reason_to_wait(plan: TrainingPlan, announced: str) -> str | None:
    """Returns why a new version starts no training, or None if it does."""
    ours = plan.config.corpus
    if not _is_version_of(announced, ours):
        return f"the new version {announced} is not of the corpus that this configuration trains on, {ours}"
    threshold = plan.config.trigger.min_new_rows
    if plan.num_new_rows < threshold:
        since = f"version {plan.trained.version}" if plan.trained else "the beginning"
        return (
            f"{plan.num_new_rows:,} new rows since {since}, fewer than trigger.min_new_rows = {threshold:,}: "
            "training waits for more"
        )
    return None


def _nothing_done(reason: str) -> State[dict[str, Any]]:
    get_run_logger().info("%s", reason)
    state: State[dict[str, Any]] = Completed(message=reason, data={"trained": False, "reason": reason})
    return state


def _ask(plan: TrainingPlan) -> str | None:
    """Suspends the run until a person has answered, and returns the refusal, or None if training may begin.

    While it waits, no process runs and no slot is taken: the run begins anew when it is resumed.
    """
    manifest = plan.manifest
    programs = ", ".join(step.program for step in plan.selected)
    question = (
        f"Corpus **{manifest.name} {manifest.version}** is new: {manifest.num_rows:,} rows, {plan.num_new_rows:,} of "
        f"them since the version last trained on. Run {programs} on the worker's GPUs?"
    )
    answer = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description=question, approve=False),
        timeout=plan.config.trigger.approval_timeout_seconds,
        key="approval",
    )
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "flow_run": flow_run.get_id(),
        "version": manifest.version,
        "digest": manifest.digest,
        "approve": answer.approve,
        "note": answer.note,
    }
    path = Path(plan.config.output) / APPROVALS_FILE
    append_json_line(path, record)
    if answer.approve:
        return None
    return f"training on version {manifest.version} was refused" + (f": {answer.note}" if answer.note else "")


def _run_step(step: Step, plan: TrainingPlan, gpus: Lease | None, pulse: Pulse | None) -> None:
    """Runs one program as a task of its own, unless it has finished before.

    Raises Interrupted: it was stopped and can go on. Another BimodeError: it failed, for good or too often.
    """
    if step.result() is not None:
        get_run_logger().info("%s has finished before: %s", step.program, step.folder)
        return
    config = plan.config
    if gpus is not None:
        fit(gpus, step, plan)

    # The task closes over its work, so that Prefect neither stores nor validates it.
    @task(
        name=step.program,
        task_run_name=step.program,
        retries=config.retries,
        retry_delay_seconds=config.retry_delay_seconds,
        retry_condition_fn=_is_crash,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def run() -> Any:
        try:
            _run_program(step, plan, gpus, pulse)
        except Interrupted as error:
            return Cancelled(name=INTERRUPTED, message=str(error))
        return None

    state: State[Any] = run(return_state=True)
    if state.name == INTERRUPTED:
        raise Interrupted(state.message or "the program was stopped")
    state.result()


def _is_crash(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Returns whether starting a program again may help: it did not say itself what is wrong."""
    del task, run
    return isinstance(state.result(raise_on_failure=False), ProgramCrashed)


def _run_program(step: Step, plan: TrainingPlan, gpus: Lease | None, pulse: Pulse | None) -> None:
    logger = get_run_logger()
    program = program_of(step, plan)
    if gpus is not None:
        environment = {**program.environment, **gpus.grant.environment}
        program = replace(program, environment=environment, held=gpus.grant.descriptors)
    view = ProgramView(program, logger)
    run_supervised(program, watch=view.update, report=logger.info, pulse=pulse)
    view.finish()
    if step.result() is None:
        raise ProgramCrashed(f"{step.program} ended well but left no result in {step.folder}; see {program.log}")


class ProgramView:
    """A running program as Prefect shows it: its log in the run's log, its progress and newest metrics as artifacts.

    A server that does not answer costs a picture, never the training.
    """

    def __init__(self, program: Program, logger: RunLogger) -> None:
        self._program = program
        self._logger = logger
        self._log = LineReader(program.log)
        self._lines = LineReader(program.metrics)
        self._progress: UUID | None = None
        self._table: UUID | None = None
        self._shown = self._said = time.monotonic()
        self.metrics = Metrics()

    def update(self) -> None:
        """Passes on what is new; called about once a second."""
        self._pass_on_log()
        lines = self._lines.new_lines()
        for line in lines:
            self.metrics.add(line)
        now = time.monotonic()
        if now - self._shown >= _SHOW_SECONDS:
            self._shown = now
            self._show(self.metrics.percent)
        if now - self._said >= _LOG_SECONDS and lines:
            self._said = now
            self._logger.info("%s: %s", self._program.name, self.metrics.line())

    def finish(self) -> None:
        """Shows the last state of a program that has ended well."""
        self._show(100.0)
        if self.metrics.num_unreadable:
            number, path = self.metrics.num_unreadable, self._program.metrics
            self._logger.warning("%s lines of %s cannot be read and were left out", number, path)

    def _pass_on_log(self) -> None:
        lines = self._log.new_lines()
        for line in lines[:_MAX_LOG_LINES]:
            self._logger.info("%s", line)
        if len(lines) > _MAX_LOG_LINES:
            self._logger.info("... %s more lines in %s", len(lines) - _MAX_LOG_LINES, self._program.log)

    def _show(self, percent: float) -> None:
        name = self._program.name
        with self._forgiving():
            if self._progress is None:
                self._progress = _created(create_progress_artifact(percent, key=f"progress-{name}", description=name))
            else:
                update_progress_artifact(self._progress, percent)
            table = self.metrics.table()
            if self._table is None and table:
                title = f"Newest metrics of {name}; all are in {self._program.metrics}"
                self._table = _created(create_table_artifact(table, key=f"metrics-{name}", description=title))
            elif self._table is not None:
                with get_client(sync_client=True) as client:
                    client.update_artifact(self._table, ArtifactUpdate(data=json.dumps(table)))

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, PrefectException) as error:
            self._logger.warning("Prefect's server did not take the progress of %s: %s", self._program.name, error)


def _created(artifact: Any) -> UUID:
    """Returns the id of a new artifact; Prefect's types allow for a coroutine, which a flow like ours never gets."""
    assert isinstance(artifact, UUID)
    return artifact


def _announce(plan: TrainingPlan) -> dict[str, Any]:
    """Shows the results in Prefect's UI and returns them."""
    logger = get_run_logger()
    rows: list[dict[str, Any]] = []
    for step in plan.steps:
        result = step.result()
        if result is not None:
            rows.append(_result_row(step, result))
    title = f"What was made from corpus {plan.manifest.name} {plan.manifest.version}"
    create_table_artifact(rows, key="training", description=title)
    evaluation = next((step for step in plan.selected if step.program == "evaluate"), None)
    if evaluation is not None:
        text = evaluation_text(evaluation)
        create_markdown_artifact(text, key="evaluation", description=f"Evaluation of {plan.config.name}")
        logger.info("%s", text)
    for row in rows:
        logger.info("%s: %s", row["program"], row["folder"])
    return {"trained": True, "corpus": str(plan.corpus), "version": plan.manifest.version, "programs": rows}


def _result_row(step: Step, result: dict[str, Any]) -> dict[str, Any]:
    model = step.folder / "model"
    shown = {name: result.get(name) for name in ("steps", "loss", "seconds", "num_rows")}
    return {
        "program": step.program,
        "folder": str(step.folder),
        "model": str(model) if model.is_dir() else None,
        **{name: value if value == value else str(value) for name, value in shown.items()},  # noqa: PLR0124 - NaN
    }


def evaluation_text(step: Step) -> str:
    """Returns the evaluation as markdown: its table, and links to the files beside it."""
    table = step.folder / EVALUATION_TABLE
    with storage_errors(table, "read"):
        text = table.read_text(encoding="utf-8").strip()
    files = sorted(path for path in step.folder.iterdir() if path.suffix in _SHOWN_FILES)
    links = [f"- [{path.name}]({path.resolve().as_uri()})" for path in files]
    return "\n".join([text, "", *links])
