"""`bimode diff`: what changed between two versions of a corpus, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import JsonOption, examples, print_json, user_errors
from flows.commands.places import CorpusOption, OptionalConfigOption, versions_folder
from flows.commands.terminal import columns, fields, shown_line, shown_text

if TYPE_CHECKING:
    from corpus.difference import Difference, Example
    from corpus.versions import Manifest

EXAMPLES = examples(
    "bimode diff v0001 v0002 --config my.yaml",
    "bimode diff v0001 latest --corpus runs/my-corpus/corpus --ids changed.csv",
    "bimode diff runs/old/corpus runs/new/corpus --json",
    "bimode diff v0001 v0002 --config my.yaml --exit-code",
)

_DIFFERENT = 1
"""Exit status with --exit-code, as git's. Every error has another one (see schemas/errors.py)."""

_TITLES = {
    "think_to_direct": "think to direct",
    "direct_to_think": "direct to think",
    "answer": "another answer",
    "trace": "another chain of thought",
    "routing": "another topic, kind or answer type",
    "provenance": "another place, own id or licence",
    "evidence": "other evidence, the same label",
}


def diff(
    old: Annotated[str, typer.Argument(help="The older version: its folder, or its name in the corpus folder.")],
    new: Annotated[str, typer.Argument(help="The newer version.")],
    config: OptionalConfigOption = None,
    corpus: CorpusOption = None,
    ids: Annotated[
        Path | None, typer.Option(help="Write the ids of all rows that differ, and how, to this .parquet or .csv file.")
    ] = None,
    num_examples: Annotated[int, typer.Option("--examples", min=0, help="Rows shown of each change.")] = 3,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with status 1 if a row differs, with 0 if none does.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what changed between two versions: rows added, removed, marked, and labelled otherwise.

    A row that changed counts once, under the first of: mode, answer, chain of thought, topic or kind, place or licence,
    evidence. Shards that both versions share are not read.
    """
    from corpus.difference import compare_versions  # noqa: PLC0415 - what reads data takes seconds to import
    from corpus.lookup import resolve_version  # noqa: PLC0415

    with user_errors():
        folder = versions_folder(config, corpus)
        found = compare_versions(
            resolve_version(old, folder), resolve_version(new, folder), ids_path=ids, num_examples=num_examples
        )
        print_json(_record(found)) if as_json else print(_text(found))
    if exit_code and not found.is_equal:
        raise typer.Exit(_DIFFERENT)


def _record(found: Difference) -> dict[str, Any]:
    """Returns the comparison as plain JSON-able values."""
    from corpus.difference import Change  # noqa: PLC0415

    return {
        "old": _version_record(found.old_folder, found.old),
        "new": _version_record(found.new_folder, found.new),
        "is_equal": found.is_equal,
        "is_same_recipe": found.old.recipe == found.new.recipe,
        "num_rows": {"old": found.old.num_rows, "new": found.new.num_rows, "both": found.num_common},
        "num_unread": found.num_unread,
        "num_changed": found.num_changed,
        "changes": {str(change): found.num_rows(change) for change in Change},
        "aspects": dict(found.aspects),
        **{
            f"by_{group}": {
                value: {str(change): number for change, number in counts.items()}
                for value, counts in found.by(group).items()
            }
            for group in ("mode", "topic", "source")
        },
        "examples": [
            {"id": row.id, "change": str(row.change), "old": row.old, "new": row.new} for row in found.examples
        ],
    }


def _version_record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        **{name: getattr(manifest, name) for name in ("name", "version", "created", "recipe", "digest", "num_think")},
        "num_direct": manifest.num_direct,
    }


def _text(found: Difference) -> str:
    """Returns the comparison in words and tables, fit for a terminal."""
    versions = [("old", found.old, found.old_folder), ("new", found.new, found.new_folder)]
    head = [
        (
            side,
            f"{shown_line(manifest.name)} {shown_line(manifest.version)}, {manifest.num_rows:,} rows, "
            f"{manifest.num_think:,} of them thinking, made {shown_line(manifest.created)}, in {folder}",
        )
        for side, manifest, folder in versions
    ]
    recipes = [shown_line(manifest.recipe, 12) for _, manifest, _ in versions]
    is_same = found.old.recipe == found.new.recipe
    head.append(("recipe", "the same" if is_same else f"{recipes[0]} became {recipes[1]}"))
    sections = [fields(head), fields(_counts(found))]
    sections += [_table(found, group) for group in ("topic", "source") if found.counts]
    sections += [_example_lines(example) for example in found.examples]
    if found.is_equal:
        sections.append(["No row differs."])
    return "\n\n".join("\n".join(section) for section in sections)


def _counts(found: Difference) -> list[tuple[str, str]]:
    from corpus.difference import Change  # noqa: PLC0415

    by_mode = found.by("mode")

    def of_modes(change: Change) -> str:
        number = found.num_rows(change)
        thinking = by_mode.get("think", {}).get(change, 0)
        return f"{number:,}" + (f", {thinking:,} of them thinking" if number else "")

    rows = [
        ("added", of_modes(Change.ADDED)),
        ("removed", of_modes(Change.REMOVED)),
        ("marked as gone from their source", f"{found.num_marked:,}"),
        ("marks taken back", f"{found.num_unmarked:,}"),
        ("in both", f"{found.num_common:,}, of which {found.num_unread:,} lie in shards that are the same"),
        ("  unchanged", f"{found.num_common - found.num_changed:,}"),
    ]
    return rows + [(f"  {title}", f"{found.num_rows(Change(name)):,}") for name, title in _TITLES.items()]


def _table(found: Difference, group: str) -> list[str]:
    """Returns the changes by topic or source; those that occur nowhere have no column."""
    from corpus.difference import Change  # noqa: PLC0415

    by_value = found.by(group)
    occurring = [change for change in Change if any(change in counts for counts in by_value.values())]
    header = [f"by {group}", *(change.replace("_", " ") for change in occurring)]
    rows = [
        [shown_line(value), *(f"{counts.get(change, 0):,}" for change in occurring)]
        for value, counts in by_value.items()
    ]
    return columns(header, rows)


def _example_lines(example: Example) -> list[str]:
    """Returns one row that differs: its question, and what each version says of it."""
    row = example.new or example.old or {}
    title = f"{_TITLES.get(example.change, example.change)}: {example.id}"
    lines = [("from", shown_line(str(row.get("origin")))), ("question", shown_text(str(row.get("question"))))]
    for side, record in (("old", example.old), ("new", example.new)):
        if record is not None and (side == "new" or record != example.new):
            lines += [
                (side, f"{record['mode']}; {record['evidence']}"),
                ("  answer", shown_text(str(record["answer"]))),
                *([("  thought", shown_text(record["reasoning"]))] if record["reasoning"] else []),
            ]
    return [title, *fields(lines, indent=2)]
