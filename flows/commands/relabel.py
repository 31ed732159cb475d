"""`bimode relabel`: other thresholds, verifiers or parsers over the stored replies, without a call."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import ConfigOption, JsonOption, WorkdirOption, examples, print_json, say, user_errors
from flows.commands.terminal import columns, shown_line
from schemas.errors import ConfigError, Interrupted, TeacherError

if TYPE_CHECKING:
    from flows.relabelling import MissingReplies, OnMissing, Relabelled

EXAMPLES = examples(
    "bimode relabel --config my.yaml --set difficulty.threshold=0.7 --dry-run",
    "bimode relabel --config my.yaml --set difficulty.threshold=0.7",
    "bimode relabel --config my.yaml --set verification.relative_tolerance=0.01 --missing quarantine",
    "bimode relabel --config my.yaml --set 'reasoning.forbidden=[\"as mentioned above\"]'",
)

_POLICIES: tuple[OnMissing, ...] = ("stop", "quarantine")


def relabel(
    config: ConfigOption,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A labelling setting and its value in YAML, in place of the file's; may be repeated.",
        ),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            help="What becomes of rows whose label needs a reply that is not stored: `stop` publishes nothing and says "
            "how many there are, `quarantine` publishes the others."
        ),
    ] = "stop",
    workdir: WorkdirOption = None,
    num_processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Worker processes; one for each processor by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change and which replies are missing; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Label the published rows again from stored replies, with other settings; the teacher is never asked.

    The result is a new version, the same that `bimode curate` would make with these settings if it needed no new
    reply. Without --set, the settings are those of the file: for a file that was changed, or a newer program. Stopped
    (Ctrl-C) or killed and started again, it goes on where it was.
    """
    with user_errors():
        from flows import relabelling  # noqa: PLC0415 - what reads data takes seconds to import
        from flows.run_config import load_run  # noqa: PLC0415
        from flows.setting_changes import changed_config, lasting_lines, read_changes  # noqa: PLC0415

        on_missing = _policy(missing)
        changes = read_changes(settings or [])
        before = load_run(str(config), workdir=workdir)
        changed = changed_config(before, changes)
        try:
            found = relabelling.relabel(
                before, changed, on_missing=on_missing, is_dry=dry_run, num_processes=num_processes, say=say
            )
        except KeyboardInterrupt as error:
            raise Interrupted("stopped; what was labelled is kept, and the same command goes on from there") from error
        lines = lasting_lines(changes)
        if as_json:
            print_json({**found.to_record(), "settings": changes, "yaml": lines})
        else:
            print(relabelled_text(found))
            if lines and (found.published or dry_run):
                print(f"\nNothing in {config} was changed. To make the settings lasting, write there:\n\n{lines}")
        if found.missing and found.published is None and not dry_run:
            raise TeacherError(_missing_message(found, config=str(config), settings=settings or []))


def _policy(name: str) -> OnMissing:
    """Returns the policy of that name. Raises ConfigError."""
    for policy in _POLICIES:
        if name == policy:
            return policy
    raise ConfigError(f"--missing {name!r} is unknown; choose one of {', '.join(_POLICIES)}")


def relabelled_text(found: Relabelled) -> str:
    """Returns what relabelling found, as text for a terminal."""
    lines = [
        f"{found.num_changed:,} of {found.num_rows:,} rows change"
        + (f", {found.num_missing:,} cannot be labelled" if found.missing else "")
        + f"; no call was made ({found.seconds:,.1f} s).",
    ]
    if found.changes:
        lines += ["", *_changes_table(found)]
    if found.missing:
        lines += ["", *_missing_table(found.missing)]
    if found.published is not None:
        made = found.published
        is_new = "" if made.is_new else "; the latest version is this corpus already"
        lines += [
            "",
            f"corpus   {made.folder} ({made.num_rows:,} rows, {made.num_think:,} of them thinking){is_new}",
            f"report   {made.report}",
        ]
    return "\n".join(lines)


def _changes_table(found: Relabelled) -> list[str]:
    """Returns how many rows went from which mode to which: all, and for those that change, by topic and by source."""
    moves: Counter[tuple[str, str]] = Counter()
    parts: Counter[tuple[str, str, str, str]] = Counter()
    for change, number in found.changes.items():
        moves[change.old, change.new] += number
        if change.old != change.new:
            parts["topic", change.topic or "(none)", change.old, change.new] += number
            parts["source", change.source, change.old, change.new] += number
    rows = [("all", "", old, new, number) for (old, new), number in sorted(moves.items())]
    rows += [(*part, number) for part, number in sorted(parts.items(), reverse=True)]
    shown = [(shown_line(what), shown_line(name), f"{old} -> {new}", f"{n:,}") for what, name, old, new, n in rows]
    return columns(["by", "", "old -> new", "rows"], shown)


def _missing_table(missing: Sequence[MissingReplies]) -> list[str]:
    header = ["stage", "question", "model", "rows without reply", "prompt tokens", "completion tokens", "cost"]
    rows = [
        [
            one.stage,
            one.purpose,
            shown_line(one.model),
            f"{one.num_rows:,}",
            _figure(one.prompt_tokens),
            _figure(one.completion_tokens),
            _figure(one.cost),
        ]
        for one in missing
    ]
    note = "Of each such row the first reply that it lacks; more may follow. Tokens at the mean of the stored replies."
    return [*columns(header, rows), note]


def _figure(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _missing_message(found: Relabelled, *, config: str, settings: Sequence[str]) -> str:
    retry = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    return (
        f"{found.num_missing:,} rows need at least as many calls whose replies are not stored, so nothing "
        f"was published or changed. Write the settings into {config} and run `bimode curate --config {config}`, which "
        f"asks for them; or leave those rows out: `bimode relabel --config {config} {retry} --missing quarantine`"
    )
