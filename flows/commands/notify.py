"""`bimode notify`: have Prefect's server tell a person or a program what happens to corpora and trainings."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import JsonOption, examples, print_json, user_errors
from flows.commands.prefect_server import ApiUrlOption, prefect_server
from schemas.errors import ConfigError

EXAMPLES = examples(
    "bimode notify",
    "bimode notify --block slack-webhook/team",
    "bimode notify --block webhook/pager --only failed --only quarantine",
    "bimode notify --block sendgrid-email/data --only quiet --nights 7",
    "bimode notify --remove",
)


def notify(
    block: Annotated[
        str | None,
        typer.Option(help="TYPE/NAME of a notification or webhook block on the server; made in its UI under Blocks."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="This notification alone; may be repeated. All of them by default.")
    ] = None,
    nights: Annotated[int, typer.Option(min=1, help="Nights without a new version, after which `quiet` is sent.")] = 3,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the notifications from the server.")] = False,
    api_url: ApiUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set up notifications on the Prefect server, as automations that can be changed or switched off in its UI.

    failed: a run failed or crashed. restarted: one that crashed was started again. quarantine: too many rows could not
    be used. quiet: no new version for some nights. created: a new version. approval: a training waits for a person.
    Without --block or --remove, list them.
    """
    from flows import automations  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        if block is not None and remove:
            raise ConfigError("--block sets notifications up and --remove takes them away: give one of them")
        wanted = automations.templates(nights=nights)
        if only:
            known = [template.name for template in wanted]
            if unknown := sorted(set(only) - set(known)):
                raise ConfigError(f"--only {unknown[0]!r} is none of {', '.join(known)}")
            wanted = [template for template in wanted if template.name in only]
        with prefect_server(api_url) as client:
            if block is not None:
                automations.apply(client, wanted, automations.find_block(client, block))
            if remove:
                automations.remove(client, wanted)
            states = automations.states(client, wanted)
        if as_json:
            print_json(states)
            return
        for template in wanted:
            print(f"{template.name:<11} {states[template.name]:<7} {template.description}")
