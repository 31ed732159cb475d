"""`bimode up` and `bimode down`: Prefect's server, a worker and the teacher on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import ConfigOption, examples, say, user_errors

UP_EXAMPLES = examples(
    "bimode up --config sampleworld/demo.yaml",
    "bimode up --config my.yaml --database postgresql://bimode@db.example/prefect",
)
DOWN_EXAMPLES = examples("bimode down")


def up(
    config: ConfigOption,
    database: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL for Prefect's server: postgresql://USER@HOST:5432/NAME; BIMODE_DATABASE by default, which "
            "may hold a password. SQLite without either."
        ),
    ] = None,
) -> None:
    """Start Prefect's server, the deployments, a worker and the teacher on this machine, as far as they do not run."""
    from flows import stack  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        info = stack.up(config, report=say, database_url=database)
    print(f"Prefect UI: {info.api_url.removesuffix('/api')}")


def down() -> None:
    """Stop everything that `bimode up` started on this machine; all data stays."""
    from flows import stack  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        stack.down(report=say)
