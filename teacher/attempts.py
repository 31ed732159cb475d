"""The files of one shard's journal, which of their bytes are believed, and who may still write.

    {shard}/attempt-00001.journal            one per run that stored something; written by that run alone
    {shard}/attempt-00002.journal
    {shard}/replies-00002-1f3c9a07.parquet   what was compacted: covers attempts 1 and 2; crc32 of its bytes
    {shard}/attempt-00001.journal.damaged    copies of bytes that were not believed
    {shard}.journal                          a journal of the first version: read as attempt 0, never written

An attempt file is append-only: `HEADER`, a statement of belief (twice, as a flipped bit must not cost it), then the
replies (`teacher.frames`). A run makes its file with O_EXCL, *then* reads how much there is of every earlier attempt,
and states that. What such a zombie (a hung process, another machine, a killed task that was retried) appends later
lies beyond the statement and is never believed, by anybody. After each fsync, before anyone is told that a reply is
stored, a run looks whether there is a higher attempt. If there is none, every later one will read these bytes; if there
is one, this run is told that it was taken over and acknowledges nothing any more. So no lock is needed: locks do not
hold on every network folder, and a hung process would keep its successor out.

Numbers are never used twice: compaction removes lower attempts first, and the Parquet file that bears the highest
number stays. An attempt compacts under its own number, so a zombie's Parquet file never replaces a later one.

All this needs a file system that shows a file made on one machine to the next that lists the folder there, as local
disks, NFS and the parallel file systems do; not an object store that is mounted as a folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import StorageError
from teacher.crash_points import reach
from teacher.frames import framed, scan

HEADER = b"bimode-journal 2\n"
_FIRST_VERSION = 0
_HEADER_OF_FIRST_VERSION = b"bimode-journal 1\n"
_ATTEMPT = re.compile(r"attempt-(\d{5,})\.journal")
_COMPACTED = re.compile(r"replies-(\d{5,})-([0-9a-f]{8})\.parquet")
_TEMPORARY = re.compile(r"\.replies-(\d{5,})\.tmp")
_BELIEF_PREFIX = b'{"attempt":'
_NUM_READINGS = 20
"""How often a folder is read again because a file was compacted away between listing and opening."""


@dataclass(frozen=True, slots=True)
class Part:
    """The believed bytes [0, stop) of an attempt."""

    number: int
    path: Path
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is believed of a folder: one compacted file at most, then the attempts it does not cover, in order.

    newest: highest number in use, of an attempt or a compacted file. num_compacted: highest attempt that the compacted
    file covers, -1 without such a file.
    """

    compacted: Path | None
    num_compacted: int
    parts: tuple[Part, ...]
    newest: int

    @property
    def content(self) -> tuple[Path | None, tuple[Part, ...]]:
        """What is equal as long as the same bytes are believed."""
        return self.compacted, self.parts


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError: "cannot {action} {path}: reason"."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}") from error


def attempt_path(folder: Path, number: int) -> Path:
    if number == _FIRST_VERSION:
        return folder.with_name(f"{folder.name}.journal")
    return folder / f"attempt-{number:05d}.journal"


def compacted_path(folder: Path, number: int, crc32: int) -> Path:
    return folder / f"replies-{number:05d}-{crc32:08x}.parquet"


def temporary_path(folder: Path, number: int) -> Path:
    return folder / f".replies-{number:05d}.tmp"


def compacted_crc32(path: Path) -> int:
    """Returns the checksum that a compacted file's bytes must have, as its name says."""
    found = _COMPACTED.fullmatch(path.name)
    assert found, path
    return int(found[2], 16)


def is_journal_name(name: str) -> bool:
    """Whether a file of this name makes its folder a journal's."""
    return bool(_ATTEMPT.fullmatch(name) or _COMPACTED.fullmatch(name))


def is_first_version(name: str) -> bool:
    """Whether a file of this name is a journal of the first version."""
    return name.endswith(".journal") and not _ATTEMPT.fullmatch(name)


def read_plan(folder: Path, *, before: int | None = None) -> Plan:
    """Returns what is believed of a folder; a missing one is empty.

    before: only attempts with a lower number count, as seen by the attempt of that number.

    Raises StorageError: a file is no journal of this version. Raises OSError: the disk refuses.
    """
    for _ in range(_NUM_READINGS):
        try:
            return _read_plan_once(folder, before)
        except FileNotFoundError:
            continue  # compacted away meanwhile: the new listing shows the compacted file
    raise StorageError(f"the journal {folder} changes faster than it can be read: do several runs work on this shard?")


def _read_plan_once(folder: Path, before: int | None) -> Plan:
    numbers, compacted = _list(folder)
    num_compacted, path = max(compacted.items(), default=(-1, None))
    parts: list[Part] = []
    limits: dict[int, int] | None = None
    for number in sorted(numbers, reverse=True):
        if number <= num_compacted or (before is not None and number >= before):
            continue
        limit = None if limits is None else limits.get(number, 0)
        part, believed = _read_part(number, attempt_path(folder, number), limit)
        parts.append(part)
        # A statement counts only if a later attempt believed the bytes it stands in. Later ones imply earlier ones.
        if believed is not None and limits is None:
            limits = believed
    newest = max([num_compacted, *numbers], default=0)
    return Plan(path, num_compacted, tuple(reversed(parts)), max(newest, 0))


def _list(folder: Path) -> tuple[list[int], dict[int, Path]]:
    """Returns the numbers of the attempts, and the compacted files by number."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    numbers = [int(found[1]) for name in names if (found := _ATTEMPT.fullmatch(name))]
    if attempt_path(folder, _FIRST_VERSION).is_file():
        numbers.append(_FIRST_VERSION)
    compacted = {int(found[1]): folder / name for name in names if (found := _COMPACTED.fullmatch(name))}
    return numbers, compacted


def _read_part(number: int, path: Path, limit: int | None) -> tuple[Part, dict[int, int] | None]:
    """Returns the believed part of an attempt, and what it states of earlier attempts if that can be read."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        stop = size if limit is None else min(size, limit)
        first = next((payload for _, _, payload in scan(file, 0, stop)), None)
        if first is None:
            _check_header(number, path, os.pread(file, min(stop, len(HEADER)), 0))
    finally:
        os.close(file)
    if first is None or not first.startswith(_BELIEF_PREFIX):
        return Part(number, path, stop), None
    stated = json.loads(first)["believes"]
    return Part(number, path, stop), {int(earlier): num_bytes for earlier, num_bytes in stated.items()}


def _check_header(number: int, path: Path, head: bytes) -> None:
    """Tells a file without records that a crash left behind (a torn header) from somebody else's file."""
    expected = _HEADER_OF_FIRST_VERSION if number == _FIRST_VERSION else HEADER
    if not expected.startswith(head.rstrip(b"\0")):
        raise StorageError(
            f"{path} is not a reply journal of this version (it begins with {head!r}); move it away to start afresh"
        )


def create_attempt(folder: Path) -> tuple[int, int]:
    """Makes the next attempt's file, still empty, and returns (number, file). From now on earlier attempts are fenced.

    Raises OSError.
    """
    _make_folder(folder)
    while True:
        numbers, compacted = _list(folder)
        number = max([0, *numbers, *compacted]) + 1
        path = attempt_path(folder, number)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue  # another run was faster
        reach("attempt-created")
        # Between listing and making, others may have used this number up and compacted it away.
        if max(_list(folder)[1], default=0) < number:
            return number, file
        os.close(file)
        path.unlink()


def write_header(folder: Path, number: int, file: int, believed: dict[int, int]) -> int:
    """Makes the attempt durable, with how many bytes of each earlier one it believes; returns its length.

    Raises OSError.
    """
    statement = {"attempt": number, "believes": {str(earlier): size for earlier, size in sorted(believed.items())}}
    frame = framed(json.dumps(statement, separators=(",", ":")).encode("ascii"))
    content = HEADER + frame + frame
    write_all(file, content, 0)
    os.fsync(file)
    sync_folder(folder)
    reach("attempt-opened")
    return len(content)


def check_newest(folder: Path, number: int) -> None:
    """Raises StorageError: another run has taken over from this attempt. Raises OSError: the disk refuses."""
    numbers, compacted = _list(folder)
    newest = max([0, *numbers, *compacted])
    advice = "stop one of the two and start again, every reply stored so far is kept"
    if newest > number:
        raise StorageError(
            f"the journal {folder} was taken over by attempt {newest} (this is attempt {number}): another run works "
            f"on the same shard; {advice}"
        )
    # Looked at last: lower files are removed first, so a successor that is gone from the listing took this one along.
    if not attempt_path(folder, number).exists():
        raise StorageError(
            f"the journal {folder} was taken over: {attempt_path(folder, number).name} was removed while it was being "
            f"written. If another run compacted the same shard, {advice}"
        )


def remove_covered(folder: Path, number: int) -> None:
    """Removes what the compacted file of this number has made superfluous; lower attempts first. Raises OSError."""
    numbers, compacted = _list(folder)
    for covered in sorted(numbers):
        if covered <= number:
            attempt_path(folder, covered).unlink(missing_ok=True)
            reach("compact-removing")
    for older, path in compacted.items():
        if older < number:
            path.unlink(missing_ok=True)
    for name in os.listdir(folder):
        if (found := _TEMPORARY.fullmatch(name)) and int(found[1]) <= number:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def write_all(file: int, content: bytes, at: int) -> None:
    """Writes all bytes at a place, however many calls that takes. Raises OSError."""
    view = memoryview(content)
    while view:
        num_written = os.pwrite(file, view, at)
        view, at = view[num_written:], at + num_written


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: fsync of a new file alone does not. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each name durable."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
