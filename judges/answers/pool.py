"""Verdicts on many replies at once, with formulas parsed in processes that can be killed.

Each of a few threads owns one worker process and talks to it over its own pipes. Nothing is shared between workers, so
a worker may be killed at any moment, by us or by anyone, and costs the one comparison it was working on. Workers are
plain programs (`python -m`-like) and not multiprocessing children: those would import the caller's main module again
(Prefect's engine, for instance) and leave a tracker process behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from judges.answers.comparison import Matrix, Pending
from judges.answers.verification import decide
from schemas.config import VerificationConfig
from schemas.errors import BimodeError
from schemas.samples import Sample
from schemas.verdicts import Failure, Verdict, unscored

_START_SECONDS = 120.0
"""Longest wait for a worker's imports; half a second is usual, a busy machine with cold disks took twelve."""

_CLOCK_FACTOR = 10.0
"""The worker's own timer counts processor time; this many times as much may pass on the clock of a busy machine."""

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = f"import sys; sys.path[:0] = [{str(_ROOT)!r}]; from judges.answers.worker import main; main()"

Item = tuple[str, Sample, bool]
"""Reply text, its sample, and whether the reply was truncated."""


class WorkerLost(Exception):
    """The worker process ended in the middle of a comparison."""


class _Worker:
    """One worker process. Not thread-safe: each belongs to one thread."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._buffer = b""

    def compare(self, pending: Pending) -> Matrix:
        """Returns the matrix of a comparison. Raises TimeoutError or WorkerLost; the next call starts a new process."""
        task = json.dumps({"candidates": pending.candidates, "references": pending.references})
        try:
            self._begin(task.encode() + b"\n")
            reply = self._line(self._limit_seconds * _CLOCK_FACTOR)
        except BaseException:
            self.stop()
            raise
        return tuple(tuple(row) for row in json.loads(reply))

    def _begin(self, task: bytes) -> None:
        """Hands the task to a process that takes it up; one that died while it was idle is replaced.

        Raises WorkerLost when three processes in a row die before they begin.
        """
        for remaining in (2, 1, 0):
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(task)
                process.stdin.flush()
                assert self._line(_START_SECONDS) == b"begun"
                return
            except (WorkerLost, BrokenPipeError) as error:
                self.stop()
                if not remaining:
                    raise WorkerLost(f"three workers died before they began: {error}") from error

    def stop(self) -> None:
        """Ends the process, if there is one, and frees its pipes."""
        process, self._process, self._buffer = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._errors):
                if stream is not None:
                    with_closed(stream)
            self._errors = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        for is_last_try in (False, True):
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process that writes it)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self._limit_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
            try:
                if self._line(_START_SECONDS) == b"ready":
                    return self._process
            except (TimeoutError, WorkerLost):
                complaint = self._complaint()
                self.stop()
                if is_last_try:
                    raise BimodeError(f"the verification worker does not start: {complaint or 'no message'}") from None
        raise AssertionError("the worker said something else than ready")

    def _complaint(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 500))
        return self._errors.read().decode("utf-8", "replace").strip()

    def _line(self, limit_seconds: float) -> bytes:
        """Returns the worker's next line. Raises TimeoutError after the limit, WorkerLost if the process ended."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + limit_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not selector.select(remaining):
                    raise TimeoutError(f"no answer within {limit_seconds:g} s")
                received = os.read(self._process.stdout.fileno(), 1 << 16)
                if not received:
                    status = self._process.wait()
                    if status == -signal.SIGPROF:
                        raise TimeoutError("the worker's time is up")
                    raise WorkerLost(f"the worker ended with status {status}")
                self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def with_closed(stream: IO[bytes]) -> None:
    """Closes a pipe whose other end may be gone already."""
    try:
        stream.close()
    except BrokenPipeError:
        return


class VerifierPool:
    """Verdicts on many replies, from any number of threads or coroutines. A context manager.

    Letters, numbers, words and boxes are decided at once in the calling thread. Formulas go to `config.num_workers`
    processes, started when the first formula comes. A comparison that takes longer than `config.timeout_seconds` of
    processor time, or ten times as much on the clock, is unscored with TIMEOUT, one whose worker dies with CRASHED;
    both go on with a new worker.
    """

    def __init__(self, config: VerificationConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="verifier")
        self._own = threading.local()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and their processes; comparisons that have not begun are cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def verify(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        """Returns the verdict on one reply; blocks while a formula is compared."""
        return self._submit((reply_text, sample, is_truncated)).result()

    def verify_many(self, items: Sequence[Item]) -> list[Verdict]:
        """Returns the verdicts on replies, in order."""
        return [future.result() for future in [self._submit(item) for item in items]]

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        """Returns the verdict on one reply without blocking the event loop; call it for many replies at once.

        A verdict that needs no formula is returned without waiting for the loop's next turn.
        """
        decided = _decide((reply_text, sample, is_truncated), self._config)
        return decided if isinstance(decided, Verdict) else await asyncio.wrap_future(self._begin(decided))

    def _submit(self, item: Item) -> Future[Verdict]:
        decided = _decide(item, self._config)
        if isinstance(decided, Pending):
            return self._begin(decided)
        done: Future[Verdict] = Future()
        done.set_result(decided)
        return done

    def _begin(self, pending: Pending) -> Future[Verdict]:
        return self._threads.submit(self._conclude, pending)

    def _conclude(self, pending: Pending) -> Verdict:
        extracted = pending.candidates[0][:200]
        try:
            return pending.conclude(self._worker().compare(pending))
        except TimeoutError:
            limit_seconds = self._config.timeout_seconds
            limits = f"{limit_seconds:g} s of processor time, {limit_seconds * _CLOCK_FACTOR:g} s on the clock"
            return unscored(Failure.TIMEOUT, f"not compared within {limits}", extracted)
        except WorkerLost as lost:
            return unscored(Failure.CRASHED, str(lost), extracted)

    def _worker(self) -> _Worker:
        """Returns the worker of the current thread."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(self._config.timeout_seconds)
            with self._lock:
                self._workers.append(worker)
        return worker


def _decide(item: Item, config: VerificationConfig) -> Verdict | Pending:
    reply_text, sample, is_truncated = item
    try:
        return decide(reply_text, sample, config, is_truncated=is_truncated)
    except Exception as error:  # noqa: BLE001  (a bug met by one reply is recorded on it and costs no other row)
        return unscored(Failure.CRASHED, f"{type(error).__name__}: {error}")
