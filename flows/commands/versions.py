"""`bimode versions`, `pin`, `unpin` and `collect`: what is there, what is kept, what may go."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, examples, print_json, user_errors
from flows.commands.places import CorpusOption, OptionalConfigOption, versions_folder
from schemas.errors import ConfigError, CorpusError

EXAMPLES = examples("bimode versions --config my.yaml", "bimode versions --corpus runs/my-corpus/corpus --json")
PIN_EXAMPLES = examples('bimode pin v0002 --config my.yaml --holder paper --why "the corpus of the paper"')
UNPIN_EXAMPLES = examples("bimode unpin v0002 --config my.yaml --holder paper")
COLLECT_EXAMPLES = examples(
    "bimode collect --config my.yaml --keep 7 --dry-run", "bimode collect --config my.yaml --keep 7"
)

VersionArgument = Annotated[str, typer.Argument(help="Name of the version, such as v0002.")]
HolderOption = Annotated[str, typer.Option(help="Who keeps it: a name of letters, digits, dots and dashes.")]


def versions(config: OptionalConfigOption = None, corpus: CorpusOption = None, as_json: JsonOption = False) -> None:
    """List the versions of a corpus: what each added, what it continues, and who pins it."""
    from corpus.keeping import list_pins  # noqa: PLC0415 - what reads data takes seconds to import
    from corpus.versions import list_versions  # noqa: PLC0415

    with user_errors():
        folder = _folder(config, corpus)
        pins = list_pins(folder)
        records = [_record(path, [pin for pin in pins if pin.version == path.name]) for path in list_versions(folder)]
        if as_json:
            print_json(records)
            return
        if not records:
            raise ConfigError(f"there is no finished corpus version in {folder}: run `bimode curate` first")
        for record in records:
            print(_line(record))


def pin(
    version: VersionArgument,
    config: OptionalConfigOption = None,
    corpus: CorpusOption = None,
    holder: HolderOption = "user",
    why: Annotated[str, typer.Option(help="Why it is kept, for people.")] = "",
) -> None:
    """Keep a version whatever `collect` removes."""
    from corpus.keeping import Pin, pin_version  # noqa: PLC0415 - what reads data takes seconds to import

    with user_errors():
        since = datetime.now(UTC).isoformat(timespec="seconds")
        pin_version(_folder(config, corpus), Pin(version, holder, why, since))
        print(f"{version} is kept for {holder}")


def unpin(
    version: VersionArgument,
    config: OptionalConfigOption = None,
    corpus: CorpusOption = None,
    holder: HolderOption = "user",
) -> None:
    """Take a pin away; the version may then be removed by `collect`."""
    from corpus.keeping import unpin_version  # noqa: PLC0415 - what reads data takes seconds to import

    with user_errors():
        unpin_version(_folder(config, corpus), version, holder)
        print(f"{version} is no longer kept for {holder}")


def collect(
    keep: Annotated[int, typer.Option(min=1, help="The newest versions that stay.")],
    config: OptionalConfigOption = None,
    corpus: CorpusOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old versions: all but the newest, those that are pinned, and those that a training run still needs.

    Shards that a kept version shares stay. Pin what somebody reads without a training run of this project.
    """
    from corpus.keeping import collect_versions  # noqa: PLC0415 - what reads data takes seconds to import

    with user_errors():
        collected = collect_versions(_folder(config, corpus), keep=keep, is_dry=dry_run)
        if as_json:
            print_json(asdict(collected))
            return
        for name, why in collected.kept.items():
            print(f"{name}  kept: {why}")
        for name in collected.removed:
            print(f"{name}  {'would be removed' if dry_run else 'removed'}")
        print(f"{collected.num_bytes / 1e6:,.1f} MB {'would be' if dry_run else 'were'} set free")


def _folder(config: Path | None, corpus: str | None) -> Path:
    from corpus.places import is_address  # noqa: PLC0415 - what reads data takes seconds to import

    folder = versions_folder(config, corpus)
    if folder is None:
        raise ConfigError("name the corpus: --config my.yaml, or --corpus with its folder")
    if is_address(folder):
        raise ConfigError(f"{folder} holds copies; name the run by --config, whose work folder holds the versions")
    return Path(folder)


def _record(path: Path, pins: list[Any]) -> dict[str, Any]:
    from corpus.versions import load_manifest  # noqa: PLC0415 - what reads data takes seconds to import

    kept = [pin.holder for pin in pins if pin.holds]
    try:
        manifest = load_manifest(path)
    except CorpusError as error:
        return {"version": path.name, "problem": str(error), "pinned_by": kept}
    change = manifest.changes
    return {
        **asdict(change),
        "rows": manifest.num_rows,
        "marked": manifest.num_marked,
        "shards": len(manifest.shards),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "pinned_by": kept,
    }


def _line(record: dict[str, Any]) -> str:
    pinned = f"; pinned by {', '.join(record['pinned_by'])}" if record["pinned_by"] else ""
    if "problem" in record:
        return f"{record['version']}  cannot be read: {record['problem']}{pinned}"
    added = record["num_added_think"] + record["num_added_direct"]
    continues = f"continues {record['base']}" if record["base"] else "anew"
    vanished = f", {record['num_vanished']:,} vanished" if record["num_vanished"] else ""
    size = f"{record['bytes'] / 1e6:,.1f} MB in {record['shards']} shards"
    text = f"{record['rows']:,} rows ({record['num_think']:,} thinking), {added:,} added{vanished}; {size}; {continues}"
    return f"{record['version']}  {record['created']}  {text}{pinned}"
