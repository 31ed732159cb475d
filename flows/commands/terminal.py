"""Texts from data on a terminal: they move no cursor, change no colour, and reorder nothing but themselves."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from corpus.shown_text import plain_text

TEXT_CHARACTERS = 600
LABEL_CHARACTERS = 200

_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Marks that turn the direction of what follows them, beyond their own text if they are not closed."""

_SEPARATORS = re.compile("[\u2028\u2029]")
_ISOLATE, _POP_ISOLATE = "\u2068", "\u2069"


def shown_text(text: str, limit: int | None = TEXT_CHARACTERS) -> str:
    """Returns a text fit for a terminal, cut after `limit` characters with a note of what is left out.

    Control characters become U+FFFD, direction marks go, and a line with right-to-left letters is isolated, so that it
    does not draw in what stands beside it. limit: None for all of it.
    """
    clipped = plain_text(text, len(text) if limit is None else limit)
    lines = _SEPARATORS.sub("\n", _DIRECTIONS.sub("", clipped.text)).split("\n")
    shown = "\n".join(f"{_ISOLATE}{line}{_POP_ISOLATE}" if _is_right_to_left(line) else line for line in lines)
    return f"{shown} [{clipped.note}]" if clipped.note else shown


def shown_line(text: str, limit: int | None = LABEL_CHARACTERS) -> str:
    """Returns a text as one line fit for a terminal; runs of white space become one space."""
    # Cut before words are counted, so that a text of megabytes costs no more than one of pages.
    start = text if limit is None else text[: 4 * limit]
    line = " ".join(start.split())
    if (limit is not None and len(line) > limit) or len(start) < len(text):
        line = line[:limit].rstrip() + "…"
    return shown_text(line, None)


def fields(rows: Sequence[tuple[str, str]], *, indent: int = 0) -> list[str]:
    """Returns lines "name  value", the values below one another; a value of several lines stays in its column."""
    width = max((len(name) for name, _ in rows), default=0)
    margin = " " * indent
    lines = []
    for name, value in rows:
        first, *more = value.split("\n")
        lines.append(f"{margin}{name:<{width}}  {first}".rstrip())
        lines += [f"{margin}{'':<{width}}  {line}".rstrip() for line in more]
    return lines


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Returns a table: the first columns to the left, all others to the right."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _is_right_to_left(line: str) -> bool:
    return any(unicodedata.bidirectional(character) in {"R", "AL", "AN"} for character in line)
