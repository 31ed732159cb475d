"""`bimode agreement`: reads the marks that people gave, and says how far the judges agree with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import ConfigOption, JsonOption, WorkdirOption, examples, print_json, user_errors

EXAMPLES = examples(
    "bimode agreement --config my.yaml to-mark/annotation.csv --annotator ann",
    "bimode agreement --config my.yaml label-studio-export.json",
    "bimode agreement --config my.yaml --json",
)


def agreement(
    config: ConfigOption,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="What people sent back: tables as CSV, Label Studio's exports as JSON. Without one, the marks that "
            "were read before are used.",
        ),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(help="Who marked a table whose column annotator is empty; the file's name by default."),
    ] = None,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read marks, and say how far the judges agree with the people, and the teachers of a panel with each other.

    The marks stay in the work folder; the report of every later version shows these figures, too.
    """
    from corpus.versions import find_version  # noqa: PLC0415 - what reads data takes seconds to import
    from flows.annotating import agreement_figures, read_annotations  # noqa: PLC0415
    from flows.panel_votes import judged_shards  # noqa: PLC0415
    from flows.run_config import corpus_folder, load_run  # noqa: PLC0415
    from flows.runtime import Runtime  # noqa: PLC0415

    with user_errors():
        settings = load_run(str(config), workdir=workdir)
        runtime = Runtime(settings)
        try:
            version = find_version(corpus_folder(settings))
            read: dict[str, Any] = {}
            if files:
                new, problems = read_annotations(runtime, files, annotator=annotator)
                read = {"new_marks": len(new), "left_out": problems.to_record()}
            figures = agreement_figures(runtime, version, judged_shards(runtime))
        finally:
            runtime.close()
    record = {"version": version.name, **({"read": read} if read else {}), **figures}
    print_json(record) if as_json else print("\n".join(_lines(record)))


def _lines(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if "read" in record:
        lines.append(f"{record['read']['new_marks']:,} new marks")
        for reason, seen in record["read"]["left_out"].items():
            more = "; ..." if seen["number"] > len(seen["examples"]) else ""
            lines.append(f"  {seen['number']:,} {reason}: {'; '.join(seen['examples'])}{more}")
        lines.append("")
    lines.append(f"version {record['version']}")
    for entry in record["entries"]:
        lines += ["", *_entry_lines(entry)]
    if not record["entries"]:
        lines += ["", "Nobody has been asked: `bimode annotate` writes a sample; difficulty.panel names more teachers."]
    return lines


def _entry_lines(entry: Mapping[str, Any]) -> list[str]:
    from flows.commands.terminal import shown_line, shown_text  # noqa: PLC0415

    measure = "alpha" if "alpha" in entry["what"] else "kappa"
    figures = [f"{entry['num_rows']:,} rows"]
    if entry["kappa"] is not None:
        figures.append(f"{measure} {entry['kappa']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})")
    if entry["agreement"] is not None:
        share = f"{100 * entry['agreement']:.1f} % equal"
        if entry["agreement_low"] is not None:
            share += f" ({100 * entry['agreement_low']:.1f} to {100 * entry['agreement_high']:.1f})"
        figures.append(share)
    lines = [shown_line(entry["name"]), f"  {shown_line(entry['what'])}", f"  {', '.join(figures)}"]
    if entry["confusion"]:
        cells = (f"{cell['judge']}/{cell['person']} {cell['rows']:,}" for cell in entry["confusion"])
        lines.append(f"  first/second: {', '.join(cells)}")
    if entry["note"]:
        lines.append(f"  {shown_text(entry['note'], None)}")
    return lines
