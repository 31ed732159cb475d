"""`bimode watch`: lost flow runs are recorded as crashed, crashed ones started once more, old ones removed."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import examples, say, user_errors
from flows.commands.prefect_server import ApiUrlOption, known_url

EXAMPLES = examples("bimode watch", "bimode watch --api-url http://prefect.example:4200/api --silence 60")


def watch(
    api_url: ApiUrlOption = None,
    silence: Annotated[
        float, typer.Option(min=10, help="Seconds without a sign of life after which a run counts as lost.")
    ] = 25.0,
) -> None:
    """Watch the flow runs of a Prefect server until stopped; run it beside the server. `bimode up` starts it.

    A curation or training whose host has gone is recorded as crashed, and every crashed one is started once more with
    its own parameters: never twice, and not if it is such a restart itself. Once a day, runs are removed that are older
    than BIMODE_KEEP_DAYS (30). Two watches do no harm.
    """
    from flows import watching  # noqa: PLC0415 - Prefect takes seconds to import
    from flows.restarts import Patience  # noqa: PLC0415
    from flows.retention import Keep  # noqa: PLC0415

    with user_errors():
        url, keep = known_url(api_url), Keep.chosen()
        say(f"watching {url}")
        watching.watch_until_signalled(url, say, Patience(silence), keep)
