"""The marks that people gave, and the key to them, kept in the work folder for every later version.

    {folder}/keys/{time}-{digest}.jsonl     what the judge said about the items of one export, and their weights
    {folder}/marks/{time}-{digest}.jsonl    the marks of one file that was read

Files are only ever added, each whole or absent. A mark belongs to an item, which is one question, or one reply to it:
it outlives the verdict it was given beside, so that another judge can be held against the same people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from corpus.annotation import Check, Mark
from corpus.shown_text import plain_text
from corpus.storage import storage_errors, write_text
from schemas.errors import StorageError

MAX_EXAMPLES = 10
_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What is known of an item and kept from the people who mark it.

    row_id, source: of the row. reply: the one that is judged, whole; "" for difficulty. verdict: the judge's at the
    time, under the settings whose digest is `judge`. stratum, num_in_stratum, num_drawn: how it was drawn. num_equal:
    how many of the rows drawn it stands for: a row may have the same reply several times, and is asked about it once.
    export: name of the file of keys, which orders them in time.
    """

    item: str
    check: Check
    row_id: str
    source: str
    reply: str
    verdict: Mark
    judge: str
    stratum: str
    num_in_stratum: int
    num_drawn: int
    num_equal: int = 1
    export: str = ""


@dataclass(frozen=True, slots=True)
class GivenMark:
    """A mark as it stands in a file. place: where, for messages."""

    item: str
    annotator: str
    mark: Mark
    comment: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class StoredMark:
    """A mark that was read. row_id, check, judge: of the item's key at that time. read_at: ISO 8601."""

    item: str
    annotator: str
    mark: Mark
    comment: str
    row_id: str
    check: Check
    judge: str
    read_at: str


@dataclass(slots=True)
class Problems:
    """What was seen in a file and not taken as a mark, by reason, with the first `MAX_EXAMPLES` places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < MAX_EXAMPLES:
            # What stands in a file may be anything, and this is printed on a terminal.
            places.append(plain_text(place, 200).text)

    def add(self, other: Problems) -> None:
        for reason, number in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + number
            room = MAX_EXAMPLES - len(self.examples.setdefault(reason, []))
            self.examples[reason] += other.examples[reason][:room]

    def to_record(self) -> dict[str, Any]:
        return {reason: {"number": n, "examples": self.examples[reason]} for reason, n in sorted(self.counts.items())}


class Annotations:
    """The keys and marks of one work folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write_key(self, entries: Iterable[KeyEntry], *, time: str) -> Path:
        """Writes the key of an export. time: ISO 8601. Raises StorageError."""
        return self._write("keys", [{**asdict(entry), "export": ""} for entry in entries], time)

    def store_marks(self, marks: Sequence[StoredMark], *, time: str) -> Path:
        """Writes marks that were read. time: ISO 8601. Raises StorageError."""
        return self._write("marks", [asdict(mark) for mark in marks], time)

    def read_keys(self) -> dict[str, KeyEntry]:
        """Returns the key of each item; of one that was exported again the newest. Raises StorageError."""
        return {entry.item: entry for entry in self._read("keys", _key_entry)}

    def read_marks(self) -> dict[tuple[str, str], StoredMark]:
        """Returns the newest mark of each annotator for each item, by (annotator, item). Raises StorageError."""
        return {(mark.annotator, mark.item): mark for mark in self._read("marks", _stored_mark)}

    def _write(self, kind: str, records: Sequence[Mapping[str, Any]], time: str) -> Path:
        text = "".join(json.dumps(record) + "\n" for record in records)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.folder / kind / f"{time.replace(':', '')}-{digest}.jsonl"
        write_text(path, text)
        return path

    def _read(self, kind: str, parse: Callable[[dict[str, Any], str], _Record]) -> Iterator[_Record]:
        """Yields what all files hold, oldest first. parse: takes a line, and the name of its file."""
        for path in sorted((self.folder / kind).glob("*.jsonl")):
            with storage_errors(path, "read"):
                lines = path.read_text(encoding="utf-8").splitlines()
            try:
                yield from [parse(json.loads(line), path.stem) for line in lines]
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(f"{path} is damaged ({error!r}); restore it or delete it") from error


def _key_entry(record: dict[str, Any], name: str) -> KeyEntry:
    check, verdict = Check(record["check"]), Mark(record["verdict"])
    return KeyEntry(**{**record, "check": check, "verdict": verdict, "export": name})


def _stored_mark(record: dict[str, Any], _: str) -> StoredMark:
    return StoredMark(**{**record, "check": Check(record["check"]), "mark": Mark(record["mark"])})


def settle_marks(
    given: Iterable[GivenMark], keys: Mapping[str, KeyEntry], stored: Mapping[tuple[str, str], StoredMark], *, time: str
) -> tuple[list[StoredMark], Problems]:
    """Returns the marks that are new, in order of item, and what became of the others.

    A mark equal to one that is stored changes nothing; another one of the same person takes its place. Two marks of one
    person for one item in the same file, if they differ, cancel each other.
    """
    problems = Problems()
    seen: dict[tuple[str, str], list[GivenMark]] = {}
    for mark in given:
        if mark.item in keys:
            seen.setdefault((mark.annotator, mark.item), []).append(mark)
        else:
            problems.note("unknown item", f"{mark.place}: {mark.item[:80]!r}")
    new = []
    for (annotator, item), marks in sorted(seen.items()):
        if len({mark.mark for mark in marks}) > 1:
            for mark in marks:
                problems.note("contradicted by another mark", f"{mark.place}: {item}")
            continue
        for mark in marks[1:]:
            problems.note("repeated", f"{mark.place}: {item}")
        before, key = stored.get((annotator, item)), keys[item]
        if before is not None and before.mark is marks[0].mark:
            problems.note("already read", f"{marks[0].place}: {item}")
            continue
        if before is not None:
            problems.note("changed since it was read before (taken)", f"{marks[0].place}: {item}")
        comment = marks[0].comment
        new.append(StoredMark(item, annotator, marks[0].mark, comment, key.row_id, key.check, key.judge, time))
    return new, problems
