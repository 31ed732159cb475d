"""Rows of JSON Lines files and of JSON arrays, both plain or gzipped, without ever holding a whole file.

Planning is one pass that notes where each shard begins and hashes its rows, so that a shard is recognised by its
content. Reading seeks there. (In a gzip file a seek unpacks what lies before.) Blank lines are not rows. A line that is
no JSON object is a bad row; an array that is no JSON has no further rows that could be told apart, so it is a bad file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from schemas.errors import RowError, SourceError
from sources.files import SourceFile, open_binary, reading
from sources.text import describe
from sources.units import RowRange, Unit

MAX_ROW_BYTES = 256 * 2**20
"""Longest row, in bytes. A row with inlined images may well have some tens of MiB."""

_WINDOW_BYTES = 2**20
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row as it stands in the file. offset: in bytes. content: None if it is longer than `MAX_ROW_BYTES`.

    digest: of the content when that was not kept, else empty.
    """

    offset: int
    content: bytes | None
    digest: bytes = b""

    def parse(self) -> dict[str, Any]:
        """Returns the object. Raises RowError: `row_too_large`, `row_not_utf8`, `row_not_json`, `row_not_object`."""
        if self.content is None:
            raise RowError("row_too_large", f"the row has more than {MAX_ROW_BYTES:,} bytes")
        try:
            value = json.loads(self.content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError("row_not_utf8", f"the row is not UTF-8: {error.reason} at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            detail = f"the row is not JSON: {error}; it begins {self.content[:60]!r}"
            raise RowError("row_not_json", detail) from error
        if not isinstance(value, dict):
            raise RowError("row_not_object", f"the row is {describe(value)}, not an object")
        return value


def plan_ranges(
    file: SourceFile,
    *,
    source: str,
    shard_rows: int,
    max_rows: int | None,
    observers: Sequence[Callable[[JsonRow], None]],
) -> list[RowRange]:
    """Returns the ranges of a file's shards, up to `max_rows`. Each row is shown once to every observer.

    Raises SourceError: if the file cannot be read.
    """
    ranges: list[RowRange] = []
    hasher, start, stop, offset = hashlib.sha256(), 0, 0, 0
    with reading(source, file.path), open_binary(file.path) as stream:
        for row in _rows(stream, file, source=source):
            if stop == max_rows:
                break
            if stop - start == shard_rows:
                ranges.append(RowRange(start, stop, offset, hasher.hexdigest()))
                hasher, start = hashlib.sha256(), stop
            if stop == start:
                offset = row.offset
            hasher.update(_hashed(row))
            for observe in observers:
                observe(row)
            stop += 1
    if stop > start:
        ranges.append(RowRange(start, stop, offset, hasher.hexdigest()))
    return ranges


def read_rows(unit: Unit) -> Iterator[JsonRow]:
    """Yields the rows of a unit.

    Raises SourceError: if the file cannot be read, or its rows are no longer those that were planned.
    """
    hasher = hashlib.sha256()
    file = SourceFile(unit.path, unit.file)
    with reading(unit.source, unit.path), open_binary(unit.path) as stream:
        for row in islice(_rows(stream, file, source=unit.source, offset=unit.offset), unit.num_rows):
            hasher.update(_hashed(row))
            yield row
    if hasher.hexdigest() != unit.digest:
        raise SourceError(f"source {unit.source}: {unit.path} changed after the run was planned; start the run again")


def _hashed(row: JsonRow) -> bytes:
    return (row.digest if row.content is None else row.content) + b"\n"


def _rows(stream: IO[bytes], file: SourceFile, *, source: str, offset: int = 0) -> Iterator[JsonRow]:
    head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"source {source}: {file.path} is UTF-16; convert it to UTF-8")
    stream.seek(offset)
    is_array = head.startswith(b"[") and file.name.lower().endswith((".json", ".json.gz"))
    return _array_rows(stream, file, source, offset) if is_array else _line_rows(stream, offset)


def _line_rows(stream: IO[bytes], offset: int) -> Iterator[JsonRow]:
    while line := stream.readline(MAX_ROW_BYTES + 1):
        start = offset
        offset += len(line)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            digest = hashlib.sha256(line)
            while not line.endswith(b"\n") and (line := stream.readline(_WINDOW_BYTES)):
                digest.update(line)
                offset += len(line)
            yield JsonRow(start, None, digest.digest())
            continue
        content = (line.removeprefix(codecs.BOM_UTF8) if start == 0 else line).strip()
        if content:
            yield JsonRow(start, content)


def _array_rows(stream: IO[bytes], file: SourceFile, source: str, offset: int) -> Iterator[JsonRow]:
    """Yields the elements of a JSON array; with an offset, those from the element that begins there."""
    window = _Window(stream, offset)
    if offset == 0:
        window.skip("\xef\xbb\xbf \t\r\n")
        window.skip("[", at_most=1)
    window.skip(_SPACE)
    while window.peek() != "]":
        element = window.element()
        if element is None:
            where = f"byte {window.offset:,}, {window.beginning()!r}"
            raise SourceError(f"source {source}: {file.path} is not a valid JSON array at {where}; repair the file")
        yield element
        window.skip(_SPACE)
        if window.peek() not in {",", "]"}:
            where = f"byte {window.offset:,}, {window.beginning()!r}"
            raise SourceError(f"source {source}: {file.path} lacks a comma or the closing bracket at {where}")
        window.skip("," + _SPACE)


class _Window:
    """A part of a stream that slides over it, from which whole JSON values are taken. offset: of its first byte.

    It holds Latin-1 text: one character per byte, so that positions are offsets. JSON's own structure is ASCII.
    """

    def __init__(self, stream: IO[bytes], offset: int) -> None:
        self._stream = stream
        self._text = ""
        self._start = 0
        # Whole numbers as floats: Python refuses integers of more than 4,300 digits, and only the end is wanted.
        self._decoder = json.JSONDecoder(parse_int=float)
        self.offset = offset

    def _fill(self, num_bytes: int) -> bool:
        """Reads on; False at the end of the file."""
        more = self._stream.read(num_bytes)
        self._text = self._text[self._start :] + more.decode("latin-1")
        self._start = 0
        return bool(more)

    def peek(self) -> str:
        if self._start == len(self._text):
            self._fill(_WINDOW_BYTES)
        return self._text[self._start : self._start + 1]

    def skip(self, characters: str, *, at_most: int | None = None) -> None:
        num_skipped = 0
        while (at_most is None or num_skipped < at_most) and (character := self.peek()) and character in characters:
            self._start += 1
            self.offset += 1
            num_skipped += 1

    def beginning(self) -> str:
        return self._text[self._start : self._start + 60]

    def element(self) -> JsonRow | None:
        """Takes the next value; None if there is no valid one, or it is longer than `MAX_ROW_BYTES`."""
        while True:
            try:
                end = self._decoder.raw_decode(self._text, self._start)[1]
            except (ValueError, RecursionError):
                end = len(self._text)
            # A value that ends with the window may go on behind it ("12" of "123").
            if end < len(self._text):
                row = JsonRow(self.offset, self._text[self._start : end].encode("latin-1"))
                self.offset += end - self._start
                self._start = end
                return row
            size = len(self._text) - self._start
            if size > MAX_ROW_BYTES or not self._fill(max(_WINDOW_BYTES, size)):
                return None
