"""`bimode annotate`: a sample of the corpus for people to mark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import ConfigOption, JsonOption, WorkdirOption, examples, print_json, user_errors
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from corpus.annotation import Check
    from flows.annotating import FileFormat

EXAMPLES = examples(
    "bimode annotate --config my.yaml --output to-mark",
    "bimode annotate --config my.yaml --output to-mark --rows 400 --format label-studio",
    "bimode annotate --config my.yaml --output to-mark --check difficulty --near 0.1",
)
MAX_ROWS = 10_000


def annotate(
    config: ConfigOption,
    output: Annotated[Path, typer.Option(help="The folder to write: empty, or not there yet.")],
    rows: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="How many questions people shall answer.")] = 200,
    format_: Annotated[
        str, typer.Option("--format", help="csv: a table for any spreadsheet, images beside it; or label-studio.")
    ] = "csv",
    check: Annotated[
        str,
        typer.Option(
            help="Whom to check: difficulty (does an open question need reasoning?), verifier (is a stored reply "
            "right?) or both."
        ),
    ] = "both",
    near: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Draw rows within so much of the difficulty threshold apart, so that many are seen."
        ),
    ] = 0.0,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a sample of the newest version for people to mark; what the judges said is not shown.

    Every kind of row is in it, rare ones more than their share; their weights are kept. `bimode agreement` reads the
    marks back.
    """
    from corpus.versions import find_version  # noqa: PLC0415 - what reads data takes seconds to import
    from flows.annotating import export_annotations  # noqa: PLC0415
    from flows.run_config import corpus_folder, load_run  # noqa: PLC0415
    from flows.runtime import Runtime  # noqa: PLC0415

    with user_errors():
        settings = load_run(str(config), workdir=workdir)
        runtime = Runtime(settings)
        try:
            exported = export_annotations(
                runtime,
                find_version(corpus_folder(settings)),
                output,
                num_rows=rows,
                checks=_checks(check),
                file_format=_file_format(format_),
                near=near,
            )
        finally:
            runtime.close()
        if as_json:
            print_json(exported.to_record())
            return
        asked = " and ".join(f"{number:,} of the {judge}" for judge, number in exported.num_items.items())
        print(f"{asked} in {exported.folder}; see the README.txt there")
        if exported.num_missing:
            print(f"{exported.num_missing:,} replies are left out: they are not stored, or judged otherwise, by now")
        print(f"When it is marked: bimode agreement --config {config} FILE")


def _checks(name: str) -> list[Check]:
    """Returns the checks of a name. Raises ConfigError."""
    from corpus.annotation import Check  # noqa: PLC0415

    if name == "both":
        return list(Check)
    try:
        return [Check(name)]
    except ValueError as error:
        raise ConfigError(f"--check {name!r} is none of: {', '.join([*Check, 'both'])}") from error


def _file_format(name: str) -> FileFormat:
    """Returns the format of a name. Raises ConfigError."""
    from flows.annotating import FileFormat  # noqa: PLC0415

    try:
        return FileFormat(name)
    except ValueError as error:
        raise ConfigError(f"--format {name!r} is none of: {', '.join(FileFormat)}") from error
