"""`bimode curate`: raw questions and images in, a corpus out; or what that would cost."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from flows.commands.options import (
    ConfigOption,
    JsonOption,
    WorkdirOption,
    examples,
    prepare_prefect,
    print_json,
    user_errors,
)
from flows.commands.summary import result_text
from schemas.errors import ConfigError

EXAMPLES = examples(
    "bimode curate --config my.yaml",
    "bimode curate --config my.yaml --dry-run --sample 50",
    "bimode curate --config my.yaml --teacher-url http://gpu-1:8000/v1",
    "bimode curate --config my.yaml --wait",
)


def curate(
    config: ConfigOption,
    teacher_url: Annotated[
        str | None, typer.Option(help="Use this OpenAI-compatible endpoint as the teacher; starts no vLLM.")
    ] = None,
    workdir: WorkdirOption = None,
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
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for a run that is at work in the same folder instead of giving up.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Curate a bi-mode corpus. Killed and started again, it goes on where it was.

    Two runs never work in one folder: the second names the first and gives up with exit status 6, or waits. Where
    nothing is new, no version is made, and nothing is paid.
    """
    prepare_prefect()
    from flows.curate import curate as curate_flow  # noqa: PLC0415 - Prefect takes seconds to import
    from flows.estimate import estimate_run, render_estimate  # noqa: PLC0415
    from flows.run_config import load_run  # noqa: PLC0415

    with user_errors():
        if sample and not dry_run:
            raise ConfigError(f"--sample {sample} belongs to --dry-run: a run labels all rows")
        settings = load_run(str(config), teacher_url=teacher_url, workdir=workdir)
        if dry_run:
            estimate = estimate_run(settings, num_sampled=sample)
            print(json.dumps(estimate.to_record(), indent=2) if as_json else render_estimate(estimate))
            return
        result: Any = curate_flow(str(config.resolve()), teacher_url=teacher_url, workdir=workdir, wait=wait)
        if as_json:
            print_json(result)
            return
        if not result["is_new"]:
            print(f"no news: {result['version']} stays the newest version")
        print(result_text(result))
