"""`bimode validate`: whether a version of a corpus is complete and right."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import JsonOption, examples, print_json, say, user_errors
from flows.commands.places import CorpusOption, OptionalConfigOption, versions_folder
from flows.commands.terminal import fields, shown_text
from schemas.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from corpus.validation import Problem, Validation

EXAMPLES = examples(
    "bimode validate runs/my-corpus/corpus",
    "bimode validate v0003 --config my.yaml --images",
    "bimode validate runs/my-corpus/corpus/v0003 --json",
)

_SAY_SECONDS = 5.0


def validate(
    version: Annotated[
        str | None,
        typer.Argument(help="A version: its folder, or its name in the corpus folder. By default the newest one."),
    ] = None,
    config: OptionalConfigOption = None,
    corpus: CorpusOption = None,
    images: Annotated[
        bool, typer.Option("--images", help="Decode every image; else the first thousand and every 64th after them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a version: files and checksums, every row of every shard, the rows that left, card and marks.

    Names each problem with its file, row and id, and exits with status 7 if there is one. Rows are counted from 0. With
    --config, images are held to the limits of that run.
    """
    from corpus.validation import validate_version  # noqa: PLC0415 - what reads data takes seconds to import
    from flows.run_config import load_run  # noqa: PLC0415
    from schemas.config import ImageLimits  # noqa: PLC0415

    with user_errors():
        settings = None if config is None else load_run(str(config))
        found = validate_version(
            _version_folder(version, versions_folder(config, corpus)),
            check_image=partial(_check_image, limits=settings.images if settings else ImageLimits()),
            checks_all_images=images,
            may_repeat_ids=settings is not None and not settings.duplicates.exact,
            watch=_Progress(),
        )
    print_json(_record(found)) if as_json else print(_text(found))
    if not found.is_valid:
        raise typer.Exit(CorpusError.exit_code)


def _version_folder(name: str | None, corpus: str | Path | None) -> Path:
    """Returns the folder to look at: a version, or what should be one and is not finished. Raises ConfigError."""
    from corpus.lookup import resolve_version  # noqa: PLC0415

    if name is None:
        if corpus is None:
            raise ConfigError("name a version, or a corpus folder by --config or --corpus")
        name = str(corpus)
    try:
        return resolve_version(name, corpus)
    except ConfigError:
        # Whatever is there should have been a version: that is what is to be found out.
        for place in (*([Path(corpus) / name] if corpus else []), Path(name)):
            if place.is_dir():
                return place.resolve()
        raise


def _check_image(content: bytes, *, limits: Any) -> None:
    """Decodes an image. Raises RowError: it is none that the image store would hold."""
    from schemas.errors import RowError  # noqa: PLC0415
    from sources.images import normalised_image  # noqa: PLC0415

    stored, _, _ = normalised_image(content, limits)
    if stored is not content:
        raise RowError("image_not_plain", "it is no upright RGB image of 8 bits, as the image store keeps them")


class _Progress:
    """Says every few seconds how far the rows are."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, num_done: int, num_rows: int) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            say(f"{num_done:,} of {num_rows:,} rows")


def _record(found: Validation) -> dict[str, Any]:
    """Returns the findings as plain JSON-able values."""
    return {
        "folder": str(found.folder),
        "version": found.version,
        "is_valid": found.is_valid,
        "num_files": found.num_files,
        "num_rows": found.num_rows,
        "num_images": found.num_images,
        "num_decoded": found.num_decoded,
        "num_problems": dict(found.num_problems),
        "problems": [
            {name: getattr(problem, name) for name in ("code", "file", "row", "id", "detail")}
            for problem in found.problems
        ],
        "notes": found.notes,
    }


def _text(found: Validation) -> str:
    """Returns the findings in words, fit for a terminal."""
    num_problems = found.num_problems.total()
    seen = [
        ("version", f"{shown_text(found.version) or '(none)'} in {found.folder}"),
        ("looked at", f"{found.num_files:,} files, {found.num_rows:,} rows, {found.num_images:,} images"),
        ("decoded", f"{found.num_decoded:,} images"),
        *(("note", shown_text(note)) for note in found.notes),
        ("problems", f"{num_problems:,}" if num_problems else "none: the version is complete and right"),
    ]
    sections = ["\n".join(fields(seen)), *("\n".join(_problem_lines(problem)) for problem in found.problems)]
    unlisted = num_problems - len(found.problems)
    if unlisted:
        counts = ", ".join(f"{number:,} {code}" for code, number in found.num_problems.most_common())
        sections.append(f"{unlisted:,} more of these kinds are not listed; in all: {counts}")
    return "\n\n".join(sections)


def _problem_lines(problem: Problem) -> list[str]:
    row = "" if problem.row is None else f", row {problem.row:,}"
    id_ = "" if problem.id is None else f", id {shown_text(problem.id, 80)}"
    return [f"{problem.code}: {shown_text(problem.file, 200)}{row}{id_}", f"  {shown_text(problem.detail)}"]
