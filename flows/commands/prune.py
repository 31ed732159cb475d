"""`bimode prune`: removes old runs from a Prefect server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flows.commands.options import JsonOption, examples, print_json, user_errors
from flows.commands.prefect_server import ApiUrlOption, prefect_server

EXAMPLES = examples("bimode prune --dry-run", "bimode prune --keep-days 14")


def prune(
    keep_days: Annotated[
        float | None, typer.Option(help="Keep what is younger; BIMODE_KEEP_DAYS or 30 days by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be removed; remove nothing.")] = False,
    api_url: ApiUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old flow runs from a Prefect server, those that never ended too, and workers that went long ago.

    Runs that still work stay, however old. Corpora, versions and stored replies are untouched: `bimode collect` bounds
    those. A server of `bimode up` removes ended runs and old events by itself.
    """
    from flows.retention import Keep  # noqa: PLC0415
    from flows.retention import prune as prune_server  # noqa: PLC0415

    with user_errors():
        keep = Keep.chosen() if keep_days is None else Keep.of_days(keep_days)
        with prefect_server(api_url) as client:
            pruned = prune_server(client, keep, is_rehearsed=dry_run)
        if as_json:
            print_json(asdict(pruned))
        else:
            print(f"would have {pruned}" if dry_run else str(pruned))
