"""The sample as a table for any spreadsheet, with the images beside it, and the table as people send it back.

Cells that a spreadsheet would take for a formula are given a leading apostrophe (OWASP, CSV Injection); nothing of the
texts is read back. The table is UTF-8 with a byte order mark, which Excel needs, and comma-separated.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from PIL import Image

from corpus.annotation import ASKED, AnnotationItem, Mark
from corpus.marks import GivenMark, Problems
from corpus.shown_text import plain_text
from corpus.storage import storage_errors, write_bytes
from schemas.errors import SourceError

TABLE = "annotation.csv"
COLUMNS = ("item", "asked", "images", "question", "reference", "reply", "mark", "comment", "annotator")
_CELL_CHARACTERS = 32_000
"""Excel's cells hold 32,767."""
_MAX_BYTES = 512 * 2**20
_FORMULA = re.compile(r"\s*[=+\-@\t\r＝＋－＠]")
_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}

_SAID: Mapping[str, Mark] = {
    **dict.fromkeys(["yes", "y", "1", "true", "ja", "j", "oui", "si", "sí", "да", "是"], Mark.YES),
    **dict.fromkeys(["no", "n", "0", "false", "nein", "non", "нет", "否"], Mark.NO),
    **dict.fromkeys(
        ["can't tell", "cant tell", "cannot tell", "can not tell", "?", "unsure", "unclear"], Mark.CANT_TELL
    ),
    **dict.fromkeys(["don't know", "dont know", "unklar", "weiß nicht", "weiss nicht"], Mark.CANT_TELL),
}
"""What people write, in lower case and without a full stop."""


def read_mark(text: str) -> Mark | None:
    """Returns what a person wrote as a mark, None if it cannot be told."""
    # Spreadsheets make typographic apostrophes of straight ones.
    return _SAID.get(" ".join(text.replace("’", "'").lower().split()).rstrip(".!"))


def safe_cell(text: str) -> str:
    """Returns a text as a cell that no spreadsheet computes: no formula, no control characters, not too long."""
    clipped = plain_text(text, _CELL_CHARACTERS)
    shown = clipped.text + (f"\n[{clipped.note}]" if clipped.note else "")
    return f"'{shown}" if _FORMULA.match(shown) else shown


def write_table(items: Iterable[AnnotationItem], folder: Path) -> Path:
    """Writes the table, in order, and the images beside it. Raises StorageError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for item in items:
        images = [write_image(image, folder / "images") for image in item.images]
        names = "\n".join(path.relative_to(folder).as_posix() for path in images)
        shown = [item.id, ASKED[item.check], names, item.question, item.reference, item.reply]
        writer.writerow([*map(safe_cell, shown), "", "", ""])
    path = folder / TABLE
    write_bytes(path, text.getvalue().encode("utf-8-sig", "replace"))
    return path


def write_image(content: bytes, folder: Path) -> Path:
    """Writes an image under a name made of its bytes, once. Returns its path. Raises StorageError."""
    path = folder / image_name(content)
    if not path.exists():
        write_bytes(path, content)
    return path


def image_name(content: bytes) -> str:
    """Returns a file name that says what an image is, whatever it was called."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix = _SUFFIXES.get(image.format or "", "img")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        suffix = "img"
    return f"{hashlib.sha256(content).hexdigest()[:24]}.{suffix}"


def read_table(path: Path, *, annotator: str) -> tuple[list[GivenMark], Problems]:
    """Returns the marks in a table that came back, and the lines without one.

    The separator (comma, semicolon, tab), the order of columns, further columns and the encoding may have changed. Its
    columns `item` and `mark` must be there; `annotator` names who marked a line, else it is the one given.

    Raises SourceError: it is no table, or lacks a column. StorageError: it cannot be read.
    """
    problems = Problems()
    marks = []
    for place, row in _rows(_decoded(path), path):
        item, said = row.get("item", "").strip(), row.get("mark", "").strip()
        if not any(value.strip() for value in row.values()):
            problems.note("blank line", place)
        elif not item:
            problems.note("no item", f"{place}: {said[:40]!r}")
        elif not said:
            problems.note("no mark", f"{place}: {item[:80]}")
        elif (mark := read_mark(said)) is None:
            problems.note("mark that cannot be read", f"{place}: {said[:40]!r}")
        else:
            who = row.get("annotator", "").strip() or annotator
            marks.append(GivenMark(item, plain_text(who, 100).text, mark, row.get("comment", "").strip(), place))
    return marks, problems


def _decoded(path: Path) -> str:
    """Returns the text of a file in UTF-8 or UTF-16 with a mark, UTF-8, or else what Excel writes on Windows."""
    with storage_errors(path, "read"):
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path} has more than {_MAX_BYTES:,} bytes: it is no table of marks")
        content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each line as its cells by column, in lower case, and where it stands."""
    csv.field_size_limit(_MAX_BYTES)
    # Excel announces its separator so, if asked to.
    announced = re.match(r"sep=(.)\r?\n", text)
    body = text[announced.end() :] if announced else text
    for delimiter in dict.fromkeys([*([announced[1]] if announced else []), ",", ";", "\t"]):
        reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
        header = [name.strip().lower() for name in next(reader, [])]
        if {"item", "mark"} <= set(header):
            break
    else:
        raise SourceError(f"{path} has no columns 'item' and 'mark' in its first line: is it the table of marks?")
    try:
        for cells in reader:
            row: dict[str, str] = {}
            for name, cell in zip(header, cells, strict=False):
                # Of two columns of one name, the first that says something counts.
                row[name] = row.get(name) or cell
            yield f"{path.name}, line {reader.line_num}", row
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: {error}") from error
