"""`bimode pool`: creates the work pool in one of its kinds, and shows who holds the GPUs of this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, examples, print_json, say, user_errors
from schemas.errors import ConfigError

EXAMPLES = examples(
    "bimode pool status",
    "bimode pool create --type process",
    "bimode pool create --type kubernetes --image registry.example.com/bimode-gpu:0.1.0 --gpus 8",
    "bimode pool template --type docker > template.json",
)
_MAX_NAME = 200

app = typer.Typer(
    name="pool",
    help="The work pool `gpu`: its kinds, and who holds the GPUs of this machine.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode=None,
)

KindOption = Annotated[str, typer.Option("--type", help="process, docker or kubernetes.")]
ImageOption = Annotated[str | None, typer.Option(help="Image of the containers; for docker and kubernetes.")]
GpusOption = Annotated[int | None, typer.Option(min=0, help="GPUs of a job; for kubernetes.")]
SecretOption = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        help="NAME=REFERENCE, may be repeated: the environment variable NAME comes from a Prefect secret block, on "
        "kubernetes from SECRET/KEY.",
    ),
]


@app.command(epilog=examples("bimode pool status", "bimode pool status --json"))
def status(as_json: JsonOption = False) -> None:
    """Show who holds each GPU of this machine, and who waits, in the order in which they will be served."""
    from flows.gpu_devices import GpuHost  # noqa: PLC0415 - what reads processes and HTTP takes a second to import
    from flows.gpu_lease import Leases  # noqa: PLC0415
    from flows.stack import project_folder  # noqa: PLC0415

    with user_errors():
        leases = Leases(GpuHost.here(project_folder()))
        holders, tickets = leases.look()
        gpus: list[dict[str, Any]] = []
        for device in leases.host.devices:
            holder = holders.get(device.key)
            record = (
                None if holder is None else _record(holder.kind, holder.name, holder.pid, holder.host, holder.since)
            )
            gpus.append({"gpu": device.index, "key": device.key, "is_held": device.key in holders, "holder": record})
        waiting = [
            _record(ticket.request.kind, ticket.request.name, ticket.pid, ticket.host, ticket.since)
            | {"gpus": ticket.request.number, "priority": ticket.request.priority}
            for ticket in tickets
        ]
        if as_json:
            print_json({"leases": str(leases.host.folder), "gpus": gpus, "waiting": waiting})
            return
        for gpu in gpus:
            held = "free" if not gpu["is_held"] else _line(gpu["holder"])
            print(f"{'GPU ' + gpu['gpu'] if gpu['gpu'] != 'cpu' else 'no GPU':8} {held}")
        for number, ticket in enumerate(waiting, start=1):
            print(f"{number}. waits  {_line(ticket)}, for {ticket['gpus']} GPUs, {ticket['priority']}")


@app.command(epilog=examples("bimode pool template --type kubernetes --gpus 4 > template.json"))
def template(kind: KindOption, image: ImageOption = None, gpus: GpusOption = None, secret: SecretOption = None) -> None:
    """Print the base job template of a kind, for `prefect work-pool create --base-job-template`."""
    from flows import pools  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        made = pools.base_job_template(_kind(kind), image=image, gpus=gpus, secrets=_secrets(secret))
        print(pools.template_text(made), end="")


@app.command(
    epilog=examples(
        "bimode pool create --type process --limit 2",
        "bimode pool create --type docker --secret BIMODE_API_KEY=teacher-key",
        "bimode pool create --type kubernetes --gpus 8 --secret BIMODE_API_KEY=teacher/key",
    )
)
def create(
    kind: KindOption,
    name: Annotated[str, typer.Option(help="Name of the pool; the deployments of prefect.yaml go to `gpu`.")] = "gpu",
    image: ImageOption = None,
    gpus: GpusOption = None,
    secret: SecretOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at once, over all workers; no limit without.")] = None,
) -> None:
    """Create the work pool on Prefect's server (PREFECT_API_URL), or bring an existing one of its kind up to date."""
    from flows import pool_creation, pools  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        made = pools.base_job_template(_kind(kind), image=image, gpus=gpus, secrets=_secrets(secret))
        is_new = pool_creation.create_pool(name, _kind(kind), made, limit=limit)
        say(f"{'created' if is_new else 'updated'} the work pool {name} ({kind}), with the work queues "
            f"{', '.join(pools.queue_priorities())}")  # fmt: skip


def _kind(name: str) -> Any:
    from flows.pools import POOL_KINDS  # noqa: PLC0415

    if name not in POOL_KINDS:
        raise ConfigError(f"--type {name}: choose one of {', '.join(POOL_KINDS)}")
    return name


def _secrets(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, (_, found, _) in zip(given, pairs, strict=True) if not found), None)
    if wrong is not None:
        raise ConfigError(f"--secret {wrong}: write NAME=REFERENCE")
    return {name: reference for name, _, reference in pairs}


def _record(kind: str, name: str, pid: int, host: str, since: str) -> dict[str, Any]:
    """Returns who holds or waits. Notes in a folder that others write to are not believed to be printable."""
    from corpus.shown_text import plain_text  # noqa: PLC0415

    texts = {"kind": kind, "name": name, "host": host, "since": since}
    return {key: plain_text(text, _MAX_NAME).text for key, text in texts.items()} | {"process": pid}


def _line(record: dict[str, Any] | None) -> str:
    if record is None:
        return "held by somebody who did not say who"
    where = f"process {record['process']} on {record['host']}, since {record['since']}"
    return f"{record['kind']} of {record['name']} ({where})".replace("\n", " ")
