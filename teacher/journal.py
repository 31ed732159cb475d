"""The reply journal: every reply the teacher ever gave for a shard, durable before anyone uses it.

Labels are pure functions over stored replies, so this is what a run may not lose: a killed run asks again only for what
was in flight. `teacher.attempts` says which files there are and what keeps a zombie's replies out, `teacher.frames` how
a damaged file is read, `teacher.compacted` what becomes of them when the shard is done, `teacher.replies` how all
replies of a corpus are queried.

Not here: which key a request has (`schemas.requests.request_key`), and failures, which are asked again by the next run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import pyarrow as pa

from schemas.errors import StorageError
from schemas.requests import Reply, TeacherRequest
from teacher import frames, metrics
from teacher.attempts import (
    HEADER,
    Part,
    Plan,
    attempt_path,
    check_newest,
    create_attempt,
    read_plan,
    remove_covered,
    storage_errors,
    write_all,
    write_header,
)
from teacher.compacted import CompactedReplies, write_compacted
from teacher.crash_points import reach
from teacher.records import (
    JournalRecord,
    is_same_question,
    parsed_record,
    parsed_reply,
    record_key,
    rendered_question,
    rendered_record,
)

__all__ = ["Journal", "JournalRecord", "compact", "read_journal"]

_log = logging.getLogger(__name__)

_MAX_BATCH_BYTES = 32 * 2**20
"""Bytes written under one fsync, about; it bounds the memory of a batch, not the throughput."""
_GATHER_SECONDS = 0.005
"""How long a commit waits for more replies to share it. A call takes seconds; a commit each would take half a core."""
_NUM_OPENINGS = 20
_PLACE_BITS = 48
"""A place in the index is one integer, source << 48 | offset: a third of the memory of an object."""

_Entry: TypeAlias = tuple[bytes, bytes, Reply]  # key, frame, reply


class _AttemptReplies:
    """An attempt's file, open for looking replies up by the place of their frame."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def reply(self, start: int) -> Reply | None:
        """Returns the reply at a place, None if it was damaged since opening. Raises OSError."""
        payload = self._payload(lambda size, at: os.pread(self._file, size, at), start, self._size())
        return None if payload is None else parsed_reply(payload)

    def reader(self) -> Callable[[int], JournalRecord | None]:
        """Returns what reads the record at a place, the places ascending. It raises as `reply` does."""
        window, size = frames.Window(self._file), self._size()

        def record(start: int) -> JournalRecord | None:
            payload = self._payload(window.pread, start, size)
            return None if payload is None else parsed_record(payload)

        return record

    def _size(self) -> int:
        return os.fstat(self._file).st_size

    def _payload(self, pread: Callable[[int, int], bytes], start: int, stop: int) -> bytes | None:
        payload = frames.payload_at(pread, start, stop)
        if payload is None:
            _log.warning("journal %s: the record at byte %d was damaged while open", self.path, start)
        return payload

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        # The number may soon be another file's; reading that one must fail, not succeed.
        self._file = -1


@dataclass(slots=True)
class _View:
    """What is believed of a folder: from each key to the place of its first reply, in the order of the sources.

    ends: per attempt, where its last believed record ends. damaged: (attempt, start, stop) of bytes between and behind
    records that are not believed. num_lost: records that were damaged since. Memory: about 200 bytes per reply, and the
    texts of compacted ones once looked up.
    """

    plan: Plan
    compacted: CompactedReplies | None = None
    sources: list[CompactedReplies | _AttemptReplies] = field(default_factory=list)
    index: dict[bytes, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    damaged: list[tuple[Part, int, int]] = field(default_factory=list)
    num_lost: int = 0

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def reply(self, key: bytes) -> Reply | None:
        """Returns the reply of a key, None if it is not stored. Raises StorageError, OSError: it cannot be read."""
        place = self.index.get(key)
        if place is None:
            return None
        reply = self.sources[place >> _PLACE_BITS].reply(place & (1 << _PLACE_BITS) - 1)
        if reply is None and self.index.pop(key, None) is not None:
            self.num_lost += 1
        return reply

    def records(self) -> Iterator[JournalRecord]:
        """Yields the record of every key in order. Raises StorageError, OSError: it cannot be read."""
        if self.compacted is not None:
            yield from self.compacted.records()
        readers = {
            number: source.reader() for number, source in enumerate(self.sources) if isinstance(source, _AttemptReplies)
        }
        for place in list(self.index.values()):
            read = readers.get(place >> _PLACE_BITS)
            if read is not None:
                record = read(place & (1 << _PLACE_BITS) - 1)
                if record is None:
                    self.num_lost += 1
                else:
                    yield record


class Journal:
    """The journal of one shard: a folder, read at once, written from the first reply on that is appended.

    The first reply stored under a key stays its reply, so a label never changes because a call was made twice. Safe to
    use from several threads and event loops; of several runs that write the same shard, the last one to begin goes on
    and the others are told so. A run that finds all it needs writes nothing.

    Raises StorageError: the folder cannot be a journal's, a compacted file is damaged, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._is_closed = False
        self._attempt: _OwnAttempt | None = None
        self._retired: list[_View] = []
        self._view = _open_view(folder, durably=True)
        _close_in_forks(self)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._view.index)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._view.index

    def lookup(self, key: str) -> Reply | None:
        """Returns the stored reply of a key, or None. A record that was damaged since opening counts as not stored.

        Raises StorageError: if the disk refuses to be read.
        """
        if self._is_closed:
            raise StorageError(f"cannot read the journal {self.folder}: it is closed")
        with storage_errors("read the journal", self.folder):
            return self._view.reply(bytes.fromhex(key))

    def stored(self) -> pa.Table | None:
        """Returns whose replies are stored and what they cost (`CompactedReplies.without_texts`).

        None unless all are compacted: then the columns are there to be read.

        Raises StorageError: if the disk refuses to be read.
        """
        view = self._view
        if view.compacted is None or view.sources != [view.compacted]:
            return None
        return view.compacted.without_texts()

    def append(self, key: str, request: TeacherRequest, reply: Reply) -> Reply:
        """Stores the reply and returns when it is on the disk. Returns the reply that stays: the first under its key.

        Raises StorageError: if the disk is full or fails, or another run has taken over; nothing is acknowledged then,
        and the journal takes no more.
        """
        waiter: Future[list[Reply]] = Future()
        self._submit(_Pending(_framed([(key, request, reply)]), waiter))
        return waiter.result()[0]

    async def append_durably(self, key: str, request: TeacherRequest, reply: Reply) -> Reply:
        """Does what `append` does without holding up the event loop.

        All replies that arrive while one fsync runs share the next one.
        """
        return (await self.append_many_durably([(key, request, reply)]))[0]

    async def append_many_durably(self, records: Sequence[tuple[str, TeacherRequest, Reply]]) -> list[Reply]:
        """Stores several (key, request, reply) under one fsync; returns the replies that stay, as `append` does."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[list[Reply]] = loop.create_future()
        self._submit(_Pending(_framed(records), waiter))
        return await waiter

    def compact(self) -> Path | None:
        """Turns the journal of a finished shard into one Parquet file, and returns its path; None if nothing is stored.

        To be called while nothing is being appended; afterwards the journal answers as before, and takes more. Killed
        at any moment, nothing is lost, and the next call goes on from there. A second call does nothing; after more
        replies were appended, it merges them. Takes about 0.1 s per thousand replies, and their memory.

        Raises StorageError: another run works on the shard (it is left alone), or the disk refuses.
        """
        with storage_errors("compact the journal", self.folder):
            if self._attempt is None:
                plan = read_plan(self.folder)
                if not plan.parts:
                    if plan.compacted is not None:
                        remove_covered(self.folder, plan.num_compacted)
                    return plan.compacted
                if plan.content != self._view.plan.content:
                    raise StorageError(
                        f"the journal {self.folder} was taken over by attempt {plan.newest} since it was opened; it is "
                        "left to that run"
                    )
                self._attempt = self._begin_attempt()
            number = self._attempt.number
            check_newest(self.folder, number)
            path = write_compacted(self.folder, number, self._sorted_records())
            remove_covered(self.folder, number)
            reach("compact-done")
        self._attempt = None
        self._retired.append(self._view)
        self._view = _open_view(self.folder, durably=True)
        return path

    def close(self) -> None:
        """Writes what is pending and lets go of the files. Safe to call twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            writer = self._writer
            self._queue.put(None)
        if writer is not None:
            writer.join()
        self._close_files()

    def close_after_fork(self) -> None:
        """Gives up this process's hold on the files without writing; for children that were forked from the owner."""
        if not self._is_closed:
            self._is_closed = True
            self._close_files()

    def _close_files(self) -> None:
        for view in (self._view, *self._retired):
            view.close()

    def _submit(self, pending: _Pending) -> None:
        # Looked at without the lock first: in a forked child, another thread may have held it when the child was made.
        if self._is_closed:
            raise StorageError(f"the journal {self.folder} is closed")
        with self._lock:
            if self._is_closed:
                raise StorageError(f"the journal {self.folder} is closed")
            if self._broken is not None:
                raise StorageError(self._broken)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_batches, name="journal", daemon=True)
                self._writer.start()
            self._queue.put(pending)

    def _write_batches(self) -> None:
        """The writer thread: one write and one fsync for all that has queued up meanwhile."""
        is_open = True
        while is_open:
            item = self._queue.get()
            if item is not None and isinstance(item.waiter, asyncio.Future):  # a waiting thread brings no more
                time.sleep(_GATHER_SECONDS)
            batch: list[_Pending] = []
            num_bytes = 0
            while item is not None:
                batch.append(item)
                num_bytes += sum(len(frame) for _, frame, _ in item.entries)
                if num_bytes >= _MAX_BATCH_BYTES or self._queue.empty():
                    break
                item = self._queue.get()
            is_open = item is not None
            if batch:
                self._write_batch(batch)

    def _write_batch(self, batch: list[_Pending]) -> None:
        # A waiter that was cancelled is not told; its reply is stored all the same.
        outcomes: Sequence[list[Reply] | BaseException]
        try:
            if self._broken is not None:
                raise StorageError(self._broken)
            outcomes = self._store(batch)
        except BaseException as error:  # noqa: BLE001  (handed on to everyone who waits)
            self._broken = self._broken or str(error)
            outcomes = [error] * len(batch)
        _settle(batch, outcomes)

    def _store(self, batch: list[_Pending]) -> list[list[Reply]]:
        """Makes a batch durable; returns the replies that stay. Raises StorageError: the journal takes no more."""
        with storage_errors("write the journal", self.folder):
            if self._attempt is None:
                self._attempt = self._begin_attempt()
            attempt, index = self._attempt, self._view.index
            new: dict[bytes, int] = {}
            repeated: set[bytes] = set()
            content: list[bytes] = []
            end = attempt.end
            for pending in batch:
                for key, frame, _ in pending.entries:
                    if key in index or key in new:
                        repeated.add(key)
                    else:
                        new[key] = attempt.source << _PLACE_BITS | end
                        content.append(frame)
                        end += len(frame)
            if content:
                self._write_durably(attempt, b"".join(content), end)
                index.update(new)
            if not repeated:
                return [[reply for _, _, reply in pending.entries] for pending in batch]
            first = {key: self._view.reply(key) for key in repeated}
        return [[first.get(key) or reply for key, _, reply in pending.entries] for pending in batch]

    def _write_durably(self, attempt: _OwnAttempt, content: bytes, end: int) -> None:
        """Writes and syncs; when this returns, every later attempt will believe the bytes.

        Raises StorageError: another run has taken over. Raises OSError: the disk refuses; the file is cut back then, as
        what a failed fsync left behind is unknown.
        """
        check_newest(self.folder, attempt.number)
        try:
            with metrics.JOURNAL_SYNC_SECONDS.time():
                write_all(attempt.file, content, attempt.end)
                reach("journal-before-fsync")
                os.fsync(attempt.file)
        except OSError as error:
            self._cut_back(attempt)
            raise StorageError(
                f"cannot write the journal {self.folder}: {error.strerror or error}. Free space or repair the disk and "
                "start again; every reply stored so far is kept"
            ) from error
        reach("journal-after-fsync")
        check_newest(self.folder, attempt.number)
        metrics.JOURNAL_BYTES.inc(len(content))
        attempt.end = end

    def _cut_back(self, attempt: _OwnAttempt) -> None:
        try:
            # What a later attempt may have read already must stay as it is.
            check_newest(self.folder, attempt.number)
            os.ftruncate(attempt.file, attempt.end)
        except (OSError, StorageError) as error:
            _log.warning("journal %s: the torn tail could not be cut: %s", self.folder, error)

    def _begin_attempt(self) -> _OwnAttempt:
        """Fences every earlier attempt off, reads what they had stored until then, and states how much that is.

        Raises StorageError, OSError.
        """
        number, file = create_attempt(self.folder)
        try:
            plan = read_plan(self.folder, before=number)
            if plan.content != self._view.plan.content:
                view = _open_view(self.folder, durably=True, before=number)
                # Someone may be reading from the old one just now; its files are closed with the journal.
                self._retired.append(self._view)
                self._view = view
            _report_damage(self._view)
            end = write_header(self.folder, number, file, self._view.ends)
        except BaseException:
            os.close(file)
            raise
        source = len(self._view.sources)
        self._view.sources.append(_AttemptReplies(attempt_path(self.folder, number), file))
        return _OwnAttempt(number, file, source, end)

    def _sorted_records(self) -> Iterator[JournalRecord]:
        records = list(self._view.records())
        if self._view.num_lost:
            # Its bytes are looked at and kept when the journal is opened again; compacted now, they would be removed.
            raise StorageError(f"the journal {self.folder} was damaged while it was open; start again to go on without")
        records.sort(key=lambda record: (record.sample_id, record.purpose, record.index, record.key))
        return iter(records)


@dataclass(slots=True)
class _OwnAttempt:
    """The attempt this process writes. end: where the next record begins; source: its place in the view."""

    number: int
    file: int
    source: int
    end: int


@dataclass(frozen=True, slots=True)
class _Pending:
    """Framed records on their way to the disk, and who waits for them."""

    entries: list[_Entry]
    waiter: Future[list[Reply]] | asyncio.Future[list[Reply]]


def compact(folder: Path) -> Path | None:
    """Does what `Journal.compact` does, for a journal that nobody has open.

    A run that has it open and is idle just now is taken over. Raises as `Journal.compact` does.
    """
    with Journal(folder) as journal:
        return journal.compact()


def read_journal(folder: Path) -> Iterator[JournalRecord]:
    """Yields every believed record in the order it was stored (compacted ones sorted), for reports; writes nothing.

    folder: a journal, or the file of one of the first version. A missing one has no records.

    Raises StorageError: it is no journal, a compacted file is damaged, or the disk refuses to be read.
    """
    view = _open_view(folder.with_suffix("") if folder.is_file() else folder, durably=False)
    try:
        with storage_errors("read the journal", folder):
            yield from view.records()
    finally:
        view.close()


def _framed(records: Sequence[tuple[str, TeacherRequest, Reply]]) -> list[_Entry]:
    """Renders records. Raises StorageError: one is too long, so none is stored."""
    entries: list[_Entry] = []
    stored_at = time.time()
    before: TeacherRequest | None = None
    question = b""
    for key, request, reply in records:
        if before is None or not is_same_question(request, before):
            question, before = rendered_question(request), request
        payload = rendered_record(key, request, question, reply, stored_at=stored_at)
        if len(payload) > frames.MAX_PAYLOAD_BYTES:
            raise StorageError(
                f"a reply of {len(payload)} bytes is too long for the journal (sample {request.sample_id})"
            )
        entries.append((bytes.fromhex(key), frames.framed(payload), reply))
    return entries


def _settle(batch: list[_Pending], outcomes: Sequence[list[Reply] | BaseException]) -> None:
    """Tells every waiter its outcome; each event loop is woken once, not once per waiter."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[list[Reply]], list[Reply] | BaseException]]] = {}
    for pending, outcome in zip(batch, outcomes, strict=True):
        waiter = pending.waiter
        if isinstance(waiter, asyncio.Future):
            by_loop.setdefault(waiter.get_loop(), []).append((waiter, outcome))
        elif isinstance(outcome, BaseException):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle_in_loop, settled)
        except RuntimeError:
            _log.debug("an event loop was closed before its %d replies were stored", len(settled))


def _settle_in_loop(settled: list[tuple[asyncio.Future[list[Reply]], list[Reply] | BaseException]]) -> None:
    for waiter, outcome in settled:
        if waiter.done():
            continue
        if isinstance(outcome, BaseException):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)


def _open_view(folder: Path, *, durably: bool, before: int | None = None) -> _View:
    """Reads a folder. durably: what is believed is on the disk when this returns, so it cannot vanish later.

    before: as in `read_plan`. Raises StorageError.
    """
    if folder.is_file():
        raise StorageError(
            f"cannot open the journal {folder}: it is a file, and a journal is a folder. One of the first version, "
            "NAME.journal, is opened as the folder NAME beside it"
        )
    with storage_errors("open the journal", folder):
        for _ in range(_NUM_OPENINGS):
            view = _View(read_plan(folder, before=before))
            try:
                _fill(view, durably=durably)
            except FileNotFoundError:
                view.close()
                continue  # compacted away meanwhile
            except BaseException:
                view.close()
                raise
            return view
    raise StorageError(f"the journal {folder} changes faster than it can be read: do several runs work on this shard?")


def _fill(view: _View, *, durably: bool) -> None:
    if view.plan.compacted is not None:
        view.compacted = CompactedReplies(view.plan.compacted)
        view.sources.append(view.compacted)
        view.index.update((key, row) for row, key in enumerate(view.compacted.keys()))
    for part in view.plan.parts:
        file = os.open(part.path, os.O_RDONLY)
        view.sources.append(_AttemptReplies(part.path, file))
        if durably:
            os.fsync(file)
        _index_part(view, part, file)


def _index_part(view: _View, part: Part, file: int) -> None:
    source = len(view.sources) - 1 << _PLACE_BITS
    end = min(len(HEADER), part.stop)
    for start, stop, payload in frames.scan(file, end, part.stop):
        if start > end:
            view.damaged.append((part, end, start))
        key = record_key(payload)
        if key is not None:
            view.index.setdefault(key, source | start)
        end = stop
    if end < part.stop:
        view.damaged.append((part, end, part.stop))
    view.ends[part.number] = end


def _report_damage(view: _View) -> None:
    """Keeps a copy of bytes that are not believed beside their file: someone may want to look, and they cost little.

    The file itself is never changed. The copy is made once, when the side file has none yet for that place.
    """
    for part in dict.fromkeys(part for part, _, _ in view.damaged):
        spans = [(start, stop) for damaged, start, stop in view.damaged if damaged is part]
        side = part.path.with_name(part.path.name + ".damaged")
        _log.warning(
            "journal %s: %d damaged bytes in %d places are not believed; a copy is in %s",
            part.path, sum(stop - start for start, stop in spans), len(spans), side,
        )  # fmt: skip
        known = side.read_bytes() if side.exists() else b""
        with part.path.open("rb") as file, side.open("ab") as copy:
            for start, stop in spans:
                file.seek(start)
                content = f"\n# bytes {start} to {stop}\n".encode()
                content += file.read(min(stop - start, frames.MAX_PAYLOAD_BYTES))
                if content not in known:
                    copy.write(content)


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()
_fork_hook: list[bool] = []


def _close_in_forks(journal: Journal) -> None:
    """Makes forked children (verification workers, say) let go of the journal.

    The thread that writes is not forked: a child that appended would wait for ever.
    """
    if not _fork_hook:
        os.register_at_fork(after_in_child=_close_all_after_fork)
        _fork_hook.append(True)
    _open_journals.add(journal)


def _close_all_after_fork() -> None:
    for journal in list(_open_journals):
        journal.close_after_fork()
