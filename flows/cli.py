"""The command line `bimode`.

bimode curate --config my.yaml            curate a corpus
bimode curate --config my.yaml --dry-run  say what would be asked, and what it would cost
bimode train --config my.yaml             train on a corpus: annealing, BPO, evaluation
bimode train --config my.yaml --dry-run   say what would run, and what has finished
bimode up --config my.yaml                start Prefect's server, a worker and the teacher on this machine
bimode summary --config my.yaml           show where the corpus is and what is in it
bimode down                               stop what `up` started
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from schemas.errors import BimodeError, ConfigError, Interrupted
from schemas.training_config import PROGRAMS, ProgramName

_HELP = (__doc__ or "").replace("\n\n", "\n\n\b\n", 1)
"""The \\b tells click to keep the lines of the examples as they are."""

app = typer.Typer(
    name="bimode",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="The run configuration, a YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """Prints an error that is meant for the user without a traceback and exits with its status."""
    try:
        yield
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


@app.command(
    epilog="Example: bimode curate --config my.yaml --teacher-url http://gpu-1:8000/v1",
)
def curate(
    config: ConfigOption,
    teacher_url: Annotated[
        str | None, typer.Option(help="Use this OpenAI-compatible endpoint as the teacher; starts no vLLM.")
    ] = None,
    workdir: Annotated[str | None, typer.Option(help="Use this work folder instead of the configured one.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be asked, how much, and at what price; ask nothing.")
    ] = False,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --dry-run: really ask about so many rows and scale what they cost; the run reuses the replies.",
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Curate a bi-mode corpus. Killed and started again, it goes on where it was."""
    _prepare_prefect()
    from flows.curate import curate as curate_flow  # noqa: PLC0415 - Prefect takes seconds to import
    from flows.curate import load_run  # noqa: PLC0415
    from flows.estimate import estimate_run, render_estimate  # noqa: PLC0415

    with _user_errors():
        if sample and not dry_run:
            raise ConfigError(f"--sample {sample} belongs to --dry-run: a run labels all rows")
        if dry_run:
            settings = load_run(str(config), teacher_url=teacher_url, workdir=workdir)
            estimate = estimate_run(settings, num_sampled=sample)
            print(json.dumps(estimate.to_record(), indent=2) if as_json else render_estimate(estimate))
            return
        load_run(str(config), teacher_url=teacher_url, workdir=workdir)
        result = curate_flow(str(config.resolve()), teacher_url=teacher_url, workdir=workdir)
        print(json.dumps(result, indent=2) if as_json else _result_text(result))


@app.command(
    epilog="""Examples:

\b
  bimode train --config sampleworld/train.yaml --dry-run
  bimode train --config sampleworld/train.yaml
  bimode train --config sampleworld/train.yaml --only evaluate
  bimode train --config my.yaml --corpus runs/my-corpus/corpus/v0002""",
)
def train(
    config: Annotated[Path, typer.Option("--config", help="The training configuration, a YAML file.")],
    only: Annotated[
        str | None,
        typer.Option(help="Run this program alone: annealing, bpo or evaluate. Those before it must have finished."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Train on this corpus, or version of one, instead of the configured one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and what has finished, and start nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on a corpus. Stopped (Ctrl-C) or killed and started again, it goes on from the newest checkpoint."""
    _prepare_prefect()
    from flows.train import INTERRUPTED  # noqa: PLC0415 - Prefect takes seconds to import
    from flows.train import train as train_flow  # noqa: PLC0415
    from flows.training_plan import load_training, plan_training, render_plan  # noqa: PLC0415

    with _user_errors():
        program = _program_name(only)
        plan = plan_training(load_training(str(config)), only=program, corpus=corpus)
        if dry_run:
            print(json.dumps(plan.to_record(), indent=2) if as_json else render_plan(plan))
            return
        state: Any = train_flow(
            str(config.resolve() if config.exists() else config), only=program, corpus=corpus, return_state=True
        )
        if state.name == INTERRUPTED:
            raise Interrupted(state.message)
        result = state.result()
        print(json.dumps(result, indent=2) if as_json else _training_text(result))


def _program_name(name: str | None) -> ProgramName | None:
    """Returns the program of that name. Raises ConfigError."""
    for program in PROGRAMS:
        if name == program:
            return program
    if name is not None:
        raise ConfigError(f"--only {name!r} is no program; choose one of {', '.join(PROGRAMS)}")
    return None


@app.command(epilog="Example: bimode up --config sampleworld/demo.yaml")
def up(config: ConfigOption) -> None:
    """Start Prefect's server, the deployments, a worker and the teacher on this machine, as far as they do not run."""
    from flows import stack  # noqa: PLC0415

    with _user_errors():
        info = stack.up(config, report=_say)
    print(f"Prefect UI: {info.api_url.removesuffix('/api')}")


@app.command(epilog="Example: bimode down")
def down() -> None:
    """Stop everything that `bimode up` started on this machine; all data stays."""
    from flows import stack  # noqa: PLC0415

    with _user_errors():
        stack.down(report=_say)


@app.command(epilog="Example: bimode summary --config my.yaml")
def summary(
    config: ConfigOption,
    workdir: Annotated[str | None, typer.Option(help="Use this work folder instead of the configured one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where the newest corpus and its report are, and a table of what is in it."""
    _prepare_prefect()
    from corpus.report import summary_table  # noqa: PLC0415
    from flows import stack  # noqa: PLC0415
    from flows.curate import load_run  # noqa: PLC0415
    from flows.publishing import REPORT_FIGURES, RUN_FILE  # noqa: PLC0415

    with _user_errors():
        settings = load_run(str(config), workdir=workdir)
        last = Path(settings.workdir) / RUN_FILE
        if not last.exists():
            raise ConfigError(f"no finished run in {settings.workdir}: run `bimode curate --config {config}` first")
        result = json.loads(last.read_text(encoding="utf-8"))
        if as_json:
            print(json.dumps(result, indent=2))
            return
        figures = json.loads((Path(result["corpus"]) / REPORT_FIGURES).read_text(encoding="utf-8"))
        print(summary_table(figures))
        print()
        print(_result_text(result))
        status = stack.status()
        if status.server_pid is not None:
            print(f"Prefect UI     {status.api_url.removesuffix('/api')}")


def _result_text(result: dict[str, Any]) -> str:
    # The record of a run that an earlier version made has the number of calls alone.
    paid = result.get("paid") or {"text": f"made {result['new_teacher_calls']} teacher calls"}
    lines = [
        f"corpus         {result['corpus']} ({result['rows']} rows, {result['think']} of them thinking)",
        f"report         {result['report']}",
        f"the last run   {paid['text']}",
    ]
    return "\n".join(lines)


def _training_text(result: dict[str, Any]) -> str:
    lines = [f"corpus     {result['corpus']}"]
    lines += [f"{program['program']:10} {program['folder']}" for program in result["programs"]]
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prepare_prefect() -> None:
    """Sets what a run without a server of its own needs: no telemetry, and patience on a busy machine."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")


def main() -> None:
    """Entry point of the `bimode` command."""
    app()


if __name__ == "__main__":
    main()
