"""The reply journal: every reply the teacher ever gave to this run, durable before anyone uses it.

Labels are pure functions over stored replies, so this file is what a run may not lose: a killed run asks again only for
what was in flight. The format is append-only and made for damage:

    header   b"bimode-journal 1\\n"
    record   marker (4 bytes) | length (u32, little endian) | crc32 of length and payload (u32) | payload

A payload is ASCII JSON that begins with the key of the request. The marker holds bytes that are not ASCII, so no reply,
however hostile, can contain one, and after damage the reader finds the next true record by looking for it: a flipped
bit costs one reply and not all that follow. A record is believed only when its checksum agrees.

Not here: which key a request has (`schemas.requests.request_key`), and failures, which are asked again by the next run.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import queue
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from schemas.errors import StorageError
from schemas.requests import Reply, TeacherRequest

_log = logging.getLogger(__name__)

HEADER = b"bimode-journal 1\n"
_MARKER = b"\xb1\xf0J\x01"
_FRAME = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
MAX_PAYLOAD_BYTES = 64 * 2**20
"""Longest payload that is written or believed: a damaged length must not make us allocate gigabytes."""
_SCAN_BYTES = 2**20
_KEY_PREFIX = b'{"key":"'
_MAX_BATCH = 4096
"""Records written under one fsync at most; it bounds the memory of a batch, not the throughput."""


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One stored reply and what it was asked for. key: sha256 (hex) of all that shaped it."""

    key: str
    purpose: str
    sample_id: str
    index: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes [start, stop) of the file; a believed record's span is its payload."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class _Pending:
    """A framed record on its way to the disk, and who waits for it."""

    key: bytes
    frame: bytes
    done: Future[None]


class Journal:
    """The journal of one run, open for reading and appending by this process alone.

    Memory grows by about 200 bytes per stored reply (the index from keys to places), never with their length. The
    first reply stored under a key stays its reply, so a label never changes because a call was made twice.
    Safe to use from several threads and event loops.

    Raises StorageError: if another process has it open, the file is no journal, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: dict[bytes, _Span] = {}
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._is_closed = False
        self._file = _open_locked(path)
        try:
            self._end = self._recover()
        except BaseException:
            os.close(self._file)
            raise
        _close_in_forks(self)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return _key_bytes(key) in self._index

    def lookup(self, key: str) -> Reply | None:
        """Returns the stored reply of a key, or None. A record that was damaged since opening counts as not stored.

        Raises StorageError: if the disk refuses to be read.
        """
        span = self._index.get(_key_bytes(key))
        if span is None:
            return None
        try:
            frame = os.pread(self._file, _FRAME.size + span.num_bytes, span.start - _FRAME.size)
        except OSError as error:
            raise StorageError(f"cannot read the journal {self.path}: {error}") from error
        payload = _believed_payload(frame)
        if payload is None:
            _log.warning("journal %s: the record at byte %d was damaged while open", self.path, span.start)
            self._index.pop(_key_bytes(key), None)
            return None
        return _parse_payload(payload).reply

    def append(self, key: str, request: TeacherRequest, reply: Reply) -> None:
        """Stores the reply and returns when it is on the disk.

        Raises StorageError: if the disk is full or fails; nothing is stored then, and the journal takes no more.
        """
        self._submit(key, request, reply).result()

    async def append_durably(self, key: str, request: TeacherRequest, reply: Reply) -> None:
        """Stores the reply and returns when it is on the disk, without holding up the event loop.

        All replies that arrive while one fsync runs share the next one. Raises as `append` does.
        """
        await asyncio.wrap_future(self._submit(key, request, reply))

    def close(self) -> None:
        """Writes what is pending and releases the lock. Safe to call twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            writer = self._writer
            self._queue.put(None)
        if writer is not None:
            writer.join()
        self._close_file()

    def close_after_fork(self) -> None:
        """Gives up this process's hold on the file without writing; for children that were forked from the owner."""
        if not self._is_closed:
            self._is_closed = True
            self._close_file()

    def _close_file(self) -> None:
        os.close(self._file)
        # The number may soon be another file's; reading that one must fail, not succeed.
        self._file = -1

    def _submit(self, key: str, request: TeacherRequest, reply: Reply) -> Future[None]:
        pending = _Pending(_key_bytes(key), _frame(key, request, reply), Future())
        with self._lock:
            if self._is_closed:
                raise StorageError(f"the journal {self.path} is closed")
            if self._broken is not None:
                raise StorageError(self._broken)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_batches, name="journal", daemon=True)
                self._writer.start()
            self._queue.put(pending)
        return pending.done

    def _write_batches(self) -> None:
        """The writer thread: one write and one fsync for all that has queued up meanwhile."""
        is_open = True
        while is_open:
            first = self._queue.get()
            batch: list[_Pending] = []
            item = first
            while item is not None:
                batch.append(item)
                if len(batch) >= _MAX_BATCH or self._queue.empty():
                    break
                item = self._queue.get()
            is_open = item is not None
            if batch:
                self._write_batch(batch)

    def _write_batch(self, batch: list[_Pending]) -> None:
        # A waiter whose task was cancelled has cancelled its future too; its reply is stored all the same.
        waiting = [pending for pending in batch if pending.done.set_running_or_notify_cancel()]
        try:
            if self._broken is not None:
                raise StorageError(self._broken)
            spans = self._write_durably(batch)
        except BaseException as error:  # noqa: BLE001  (handed on to everyone who waits)
            for pending in waiting:
                pending.done.set_exception(error)
            return
        self._index.update({key: span for key, span in spans.items() if key not in self._index})
        for pending in waiting:
            pending.done.set_result(None)

    def _write_durably(self, batch: list[_Pending]) -> dict[bytes, _Span]:
        """Returns where each new key was written, once it is on the disk.

        After an error the file is cut back and the journal takes no more: what a failed fsync left behind is unknown.
        """
        new: dict[bytes, _Span] = {}
        frames: list[bytes] = []
        end = self._end
        for pending in batch:
            if pending.key not in self._index and pending.key not in new:
                new[pending.key] = _Span(end + _FRAME.size, end + len(pending.frame))
                frames.append(pending.frame)
                end += len(pending.frame)
        if not frames:
            return new
        try:
            _write_all(self._file, b"".join(frames), self._end)
            os.fsync(self._file)
        except OSError as error:
            self._broken = (
                f"cannot write the journal {self.path}: {error.strerror or error}. Free space or repair the disk and "
                "start again; every reply stored so far is kept"
            )
            self._cut_back()
            raise StorageError(self._broken) from error
        self._end = end
        return new

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as error:
            _log.warning("journal %s: the torn tail could not be cut: %s", self.path, error)

    def _recover(self) -> int:
        """Fills the index, cuts a torn tail into the side file, and returns the end of what is kept."""
        try:
            size = os.fstat(self._file).st_size
            self._check_header(size)
            damaged, end = self._index_records(size)
            if end < size:
                damaged.append(_Span(end, size))
            if damaged:
                self._report_damage(damaged)
            if end < size:
                os.ftruncate(self._file, end)
                os.fsync(self._file)
        except OSError as error:
            raise StorageError(f"cannot read the journal {self.path}: {error}") from error
        return end

    def _check_header(self, size: int) -> None:
        head = os.pread(self._file, len(HEADER), 0)
        if head == HEADER:
            return
        # A prefix is a header torn by a crash. Another header above true records of this version is a damaged one.
        has_records = next(_scan(self._file, 0, size), None) is not None
        if not has_records and not HEADER.startswith(head):
            raise StorageError(
                f"{self.path} is not a reply journal of this version (it begins with {head!r}); move it away to start "
                "afresh"
            )
        if head:
            _log.warning("journal %s: the header was damaged and is written anew", self.path)
        _write_all(self._file, HEADER, 0)
        os.fsync(self._file)
        _sync_folder(self.path.parent)

    def _index_records(self, size: int) -> tuple[list[_Span], int]:
        """Returns the damaged spans between records, and the end of the last record."""
        damaged: list[_Span] = []
        end = len(HEADER)
        for span, payload in _scan(self._file, end, size):
            start = span.start - _FRAME.size
            if start > end:
                damaged.append(_Span(end, start))
            self._index.setdefault(_key_bytes(_payload_key(payload)), span)
            end = span.stop
        return damaged, end

    def _report_damage(self, damaged: list[_Span]) -> None:
        """Keeps a copy of the damaged bytes beside the journal: someone may want to look, and they cost little.

        Damage between records stays where it is, to be skipped on each opening: the journal is never rewritten. Its
        copy is made once, when the side file has none yet for that place.
        """
        side = self.path.with_name(self.path.name + ".damaged")
        num_bytes = sum(span.num_bytes for span in damaged)
        _log.warning(
            "journal %s: %d damaged bytes in %d places are not believed (%d replies are); a copy is in %s",
            self.path, num_bytes, len(damaged), len(self._index), side,
        )  # fmt: skip
        known = _read_or_empty(side)
        with side.open("ab") as copy:
            for span in damaged:
                title = f"\n# bytes {span.start} to {span.stop}\n".encode()
                content = title + os.pread(self._file, min(span.num_bytes, MAX_PAYLOAD_BYTES), span.start)
                if content not in known:
                    copy.write(content)


def read_journal(path: Path) -> Iterator[JournalRecord]:
    """Yields every believed record in the order it was stored, for reports; reads without the lock and writes nothing.

    A missing file has no records. Raises StorageError: if the disk refuses to be read.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read the journal {path}: {error}") from error
    try:
        for _, payload in _scan(file, 0, os.fstat(file).st_size):
            yield _parse_payload(payload)
    except OSError as error:
        raise StorageError(f"cannot read the journal {path}: {error}") from error
    finally:
        os.close(file)


def _scan(file: int, start: int, stop: int) -> Iterator[tuple[_Span, bytes]]:
    """Yields the payload of every believed record in bytes [start, stop), with its place; skips what is damaged."""
    at = start
    while at < stop:
        payload = _payload_at(file, at, stop)
        if payload is not None:
            span = _Span(at + _FRAME.size, at + _FRAME.size + len(payload))
            yield span, payload
            at = span.stop
        else:
            at = _next_marker(file, at + 1, stop)


def _payload_at(file: int, at: int, stop: int) -> bytes | None:
    """Returns the payload of the record at a place, or None when no believable record begins there."""
    # Most records are small: one read takes frame and payload together.
    head = os.pread(file, min(4096, stop - at), at)
    if len(head) < _FRAME.size or not head.startswith(_MARKER):
        return None
    length = _FRAME.unpack_from(head)[1]
    size = _FRAME.size + length
    if length > MAX_PAYLOAD_BYTES or at + size > stop:
        return None
    frame = head[:size] if size <= len(head) else head + os.pread(file, size - len(head), at + len(head))
    return _believed_payload(frame)


def _believed_payload(frame: bytes) -> bytes | None:
    """Returns the payload of exactly one whole frame, or None when marker, length or checksum disagree."""
    if len(frame) < _FRAME.size:
        return None
    marker, length, checksum = _FRAME.unpack_from(frame)
    payload = frame[_FRAME.size :]
    if marker != _MARKER or length != len(payload) or _checksum(payload) != checksum:
        return None
    # A checksum of 32 bits agrees by chance once in four thousand million: look at the shape, too.
    return payload if payload.startswith(_KEY_PREFIX) and payload.endswith(b"}") else None


def _next_marker(file: int, at: int, stop: int) -> int:
    """Returns the first place from `at` on where a marker begins, or `stop`."""
    while at < stop:
        window = os.pread(file, min(_SCAN_BYTES, stop - at), at)
        if not window:
            return stop
        found = window.find(_MARKER)
        if found >= 0:
            return at + found
        # A marker may straddle two windows.
        at += max(1, len(window) - len(_MARKER) + 1)
    return stop


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_LENGTH.pack(len(payload))))


def _frame(key: str, request: TeacherRequest, reply: Reply) -> bytes:
    record = {
        "key": key,
        "purpose": request.purpose,
        "sample_id": request.sample_id,
        "index": request.index,
        "reply": asdict(reply),
    }
    # ASCII keeps the marker unforgeable and lone surrogates, which JSON from a server may hold, writable.
    payload = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise StorageError(f"a reply of {len(payload)} bytes is too long for the journal (sample {request.sample_id})")
    return _FRAME.pack(_MARKER, len(payload), _checksum(payload)) + payload


def _payload_key(payload: bytes) -> str:
    """Returns the key without parsing the JSON: opening a journal of a million replies takes seconds, not a minute."""
    start = len(_KEY_PREFIX)
    return payload[start : payload.index(b'"', start)].decode("ascii")


def _parse_payload(payload: bytes) -> JournalRecord:
    record: dict[str, Any] = json.loads(payload)
    fields = record["reply"]
    fields["top_logprobs"] = tuple((token, logprob) for token, logprob in fields["top_logprobs"])
    return JournalRecord(record["key"], record["purpose"], record["sample_id"], record["index"], Reply(**fields))


def _key_bytes(key: str) -> bytes:
    return bytes.fromhex(key)


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _close_in_forks(journal: Journal) -> None:
    """Makes forked children (verification workers, say) let go of the lock.

    A lock taken with flock lives as long as any process has the file open: a worker that outlives a killed run would
    keep the next run out.
    """
    if not _fork_hook:
        os.register_at_fork(after_in_child=_close_all_after_fork)
        _fork_hook.append(True)
    _open_journals.add(journal)


_fork_hook: list[bool] = []


def _close_all_after_fork() -> None:
    for journal in list(_open_journals):
        journal.close_after_fork()


def _open_locked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot open the journal {path}: {error.strerror or error}") from error
    try:
        # flock belongs to this opening, so a second Journal in the same process is refused as well.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise StorageError(
            f"the journal {path} is in use by another run; wait for it or stop it before starting this one"
        ) from None
    except OSError as error:
        os.close(file)
        raise StorageError(f"cannot lock the journal {path}: {error.strerror or error}") from error
    return file


def _write_all(file: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        num_written = os.pwrite(file, view, at)
        view, at = view[num_written:], at + num_written


def _sync_folder(folder: Path) -> None:
    """Makes the file's name durable: fsync of a new file alone does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
