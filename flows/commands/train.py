"""`bimode train`: annealing, BPO and evaluation on a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, examples, prepare_prefect, print_json, user_errors
from schemas.errors import ConfigError, Interrupted
from schemas.training_config import PROGRAMS, ProgramName

EXAMPLES = examples(
    "bimode train --config sampleworld/train.yaml --dry-run",
    "bimode train --config sampleworld/train.yaml",
    "bimode train --config sampleworld/train.yaml --only evaluate",
    "bimode train --config my.yaml --corpus runs/my-corpus/corpus/v0002",
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
    prepare_prefect()
    from flows.train import INTERRUPTED  # noqa: PLC0415 - Prefect takes seconds to import
    from flows.train import train as train_flow  # noqa: PLC0415
    from flows.training_plan import load_training, plan_training, render_plan  # noqa: PLC0415

    with user_errors():
        program = _program_name(only)
        plan = plan_training(load_training(str(config)), only=program, corpus=corpus)
        if dry_run:
            print_json(plan.to_record()) if as_json else print(render_plan(plan))
            return
        state: Any = train_flow(
            str(config.resolve() if config.exists() else config), only=program, corpus=corpus, return_state=True
        )
        if state.name == INTERRUPTED:
            raise Interrupted(state.message)
        result = state.result()
        print_json(result) if as_json else print(_training_text(result))


def _program_name(name: str | None) -> ProgramName | None:
    """Returns the program of that name. Raises ConfigError."""
    for program in PROGRAMS:
        if name == program:
            return program
    if name is not None:
        raise ConfigError(f"--only {name!r} is no program; choose one of {', '.join(PROGRAMS)}")
    return None


def _training_text(result: dict[str, Any]) -> str:
    lines = [f"corpus     {result['corpus']}"]
    lines += [f"{program['program']:10} {program['folder']}" for program in result["programs"]]
    return "\n".join(lines)
