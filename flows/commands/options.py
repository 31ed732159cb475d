"""What the commands share: options of one name and meaning, errors without a traceback, examples below a help text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from schemas.errors import BimodeError

ConfigOption = Annotated[Path, typer.Option("--config", help="The run configuration, a YAML file.")]
WorkdirOption = Annotated[str | None, typer.Option(help="Use this work folder instead of the configured one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def examples(*commands: str) -> str:
    """Returns the text below a command's help. click keeps its lines as they are."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n".join([title, "", "\b", *(f"  {command}" for command in commands)])


@contextmanager
def user_errors() -> Iterator[None]:
    """Prints an error that is meant for the user without a traceback and exits with its status."""
    try:
        yield
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


def print_json(record: Any) -> None:
    """Prints plain values as one JSON object, in UTF-8 whatever the terminal."""
    print(json.dumps(record, indent=2))


def say(line: str) -> None:
    """Prints a line about what goes on; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def prepare_prefect() -> None:
    """Sets what a run without a server of its own needs: no telemetry, and patience on a busy machine."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
