"""`bimode report`: the report of a published version, made anew from what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import ConfigOption, JsonOption, WorkdirOption, examples, print_json, user_errors
from schemas.errors import ConfigError

EXAMPLES = examples(
    "bimode report --config my.yaml",
    "bimode report --config my.yaml --version v0002 --output v0002.html",
    "bimode report --config my.yaml --json",
)


def report(
    config: ConfigOption,
    version: Annotated[str | None, typer.Option(help="This version instead of the newest one, such as v0002.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the page into this file; by default the report in the version's folder is replaced."),
    ] = None,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the report of a published version anew, with replies judged by today's settings. Nobody is asked."""
    with user_errors():
        # What reads data takes seconds to import.
        from corpus.report import summary_table  # noqa: PLC0415
        from corpus.versions import REPORT, find_version, list_versions  # noqa: PLC0415
        from flows.reporting import remake_report  # noqa: PLC0415
        from flows.run_config import corpus_folder, load_run  # noqa: PLC0415
        from flows.runtime import Runtime  # noqa: PLC0415

        settings = load_run(str(config), workdir=workdir)
        versions = corpus_folder(settings)
        if version is not None and version not in {path.name for path in list_versions(versions)}:
            known = ", ".join(path.name for path in list_versions(versions)) or "none"
            raise ConfigError(f"--version {version!r} is no finished version in {versions}; there are: {known}")
        folder = versions / version if version else find_version(versions)
        runtime = Runtime(settings)
        try:
            figures = remake_report(runtime, folder, page=output)
        finally:
            runtime.close()
        if as_json:
            print_json(figures)
            return
        print(summary_table(figures))
        print(f"\nreport         {output or folder / REPORT}")
