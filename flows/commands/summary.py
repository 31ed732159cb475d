"""`bimode summary`: where the newest corpus is, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.commands.options import (
    ConfigOption,
    JsonOption,
    WorkdirOption,
    examples,
    prepare_prefect,
    print_json,
    user_errors,
)
from schemas.errors import ConfigError

EXAMPLES = examples("bimode summary --config my.yaml", "bimode summary --config my.yaml --json")


def summary(config: ConfigOption, workdir: WorkdirOption = None, as_json: JsonOption = False) -> None:
    """Show where the newest corpus and its report are, and a table of what is in it."""
    prepare_prefect()
    from corpus.report import summary_table  # noqa: PLC0415 - what reads data takes seconds to import
    from corpus.versions import FIGURES  # noqa: PLC0415
    from flows import stack  # noqa: PLC0415
    from flows.publishing import RUN_FILE  # noqa: PLC0415
    from flows.run_config import load_run  # noqa: PLC0415

    with user_errors():
        settings = load_run(str(config), workdir=workdir)
        last = Path(settings.workdir) / RUN_FILE
        if not last.exists():
            raise ConfigError(f"no finished run in {settings.workdir}: run `bimode curate --config {config}` first")
        result = json.loads(last.read_text(encoding="utf-8"))
        if as_json:
            print_json(result)
            return
        figures = json.loads((Path(result["corpus"]) / FIGURES).read_text(encoding="utf-8"))
        print(summary_table(figures))
        print()
        print(result_text(result))
        status = stack.status()
        if status.server_pid is not None:
            print(f"Prefect UI     {status.api_url.removesuffix('/api')}")


def result_text(result: dict[str, Any]) -> str:
    """Returns the record of a finished run in words."""
    # The record of a run that an earlier version made has the number of calls alone.
    paid = result.get("paid") or {"text": f"made {result['new_teacher_calls']} teacher calls"}
    lines = [
        f"corpus         {result['corpus']} ({result['rows']} rows, {result['think']} of them thinking)",
        f"report         {result['report']}",
        f"the last run   {paid['text']}",
    ]
    return "\n".join(lines)
