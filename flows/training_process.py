"""Training programs as supervised subprocesses: started, followed, stopped; what their exit statuses mean.

The program runs under `flows.supervisor`, in a session of its own, and only one at a time writes to a folder: a lock
on its `.lock` is held by whoever lives of flow, supervisor and program, and falls with the last of them. What a killed
run left behind is stopped, with time for its checkpoint, before the folder is used again.

Everything shown is read from the program's files (its log and `metrics.jsonl`), so that it runs the same without us.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corpus.storage import storage_errors
from flows import heartbeats, processes, supervisor
from flows.heartbeats import Pulse
from flows.processes import Report
from schemas.errors import BimodeError, ConfigError, CorpusError, Interrupted, StorageError, TrainingError

LOG_FILE = "program.log"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
TAIL_LINES = 25
_POLL_SECONDS = 1.0
_STOP_MARGIN_SECONDS = 15.0
"""More than the supervisor needs to kill a program whose time for a checkpoint is over."""
_MAX_LINE = 2000
_WORKER_STATUS = re.compile(r"exitcode\s*:\s*(-?\d+)")
"""In torchrun's report of a failed worker; torchrun itself always exits with 1."""


class ProgramCrashed(TrainingError):
    """A program ended in a way that it did not choose: a traceback or a signal. Started again, it may go on."""


_MEANT_FOR_USERS: dict[int, type[BimodeError]] = {
    error.exit_code: error for error in (ConfigError, StorageError, CorpusError, TrainingError, Interrupted)
}


@dataclass(frozen=True, slots=True)
class Program:
    """One training program, ready to start.

    command: the argument list. folder: what it writes to. cwd: where relative paths of its configuration begin.
    stop_seconds: time for a checkpoint when it is stopped. held: open files that are held for as long as it runs, such
    as the leases of its GPUs.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    cwd: Path
    environment: Mapping[str, str]
    stop_seconds: float
    held: tuple[int, ...] = ()

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS_FILE


def run_supervised(program: Program, *, watch: Callable[[], None], report: Report, pulse: Pulse | None = None) -> None:
    """Runs a program to its end. `watch` is called about once a second meanwhile, and once after it.

    pulse: of the flow run, which makes way for another one's while it holds the folder (`flows.heartbeats`).

    Whatever ends the wait before, a cancelled flow run included, stops the program first: it gets its time for a
    checkpoint. If this process is killed meanwhile, the supervisor goes on alone.

    Raises Interrupted: the program was stopped and can go on. ProgramCrashed, or another BimodeError with the message
    that the program itself gave. TrainingError: another run is at work in the folder.
    """
    with _claimed(program, report, pulse) as lock:
        log_start = _begin_log(program)
        process = _start_supervisor(program, lock)
        _record_owner(lock)
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                watch()
        finally:
            if process.poll() is None:
                report(f"stopping {program.name}; it has {program.stop_seconds:.0f} s for a checkpoint")
                process.terminate()
                process.wait(program.stop_seconds + supervisor.KILL_SECONDS + _STOP_MARGIN_SECONDS)
        # Only a supervisor that was killed itself leaves anything.
        supervisor.end_marked(str(program.folder), program.stop_seconds)
    watch()
    if process.returncode != 0:
        raise ending(program, process.returncode, _text_since(program.log, log_start))


def ending(program: Program, status: int, log: str) -> BimodeError:
    """Returns what an exit status other than 0 means. log: what the program wrote in this start."""
    found = _WORKER_STATUS.findall(log) if status == 1 else []
    status = int(found[0]) if found else status
    if status == Interrupted.exit_code:
        return Interrupted(
            f"{program.name} was stopped; its checkpoints are in {program.folder}. Run it again to go on"
        )
    said = log.rfind("\nerror: ")
    kind = _MEANT_FOR_USERS.get(status)
    if said >= 0 and kind is not None:
        message = log[said + len("\nerror: ") :].strip()
        return kind(f"{program.name}: {message[: TAIL_LINES * _MAX_LINE]}")
    tail = "\n".join(f"  {line[:_MAX_LINE]}" for line in log.splitlines()[-TAIL_LINES:])
    died = "was killed" if status in {supervisor.KILLED, -9} else f"failed with exit status {status}"
    return ProgramCrashed(f"{program.name} {died}; run again, it goes on from its newest checkpoint. The end of "
                          f"{program.log}:\n{tail}")  # fmt: skip


@contextmanager
def _claimed(program: Program, report: Report, pulse: Pulse | None) -> Iterator[int]:
    """Holds the folder while the block runs, and yields the lock's descriptor, which children keep holding.

    Raises TrainingError: another run is at work there. StorageError: the folder cannot be used.
    """
    with storage_errors(program.folder, "use"):
        program.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(program.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        said = ""
        while not _try_lock(lock):
            owner = _owner(lock)
            if owner is not None and owner.is_alive:
                raise TrainingError(
                    f"process {owner.pid} is at work in {program.folder}: cancel its run, or wait for it"
                )
            line = f"a run that was killed left {program.name} behind; stopping it, with time for a checkpoint"
            if owner is not None and not owner.is_here:
                line = f"process {owner.pid} of {owner.host} is at work in {program.folder}; waiting for its end"
            if line != said:
                report(said := line)
            heartbeats.ask_to_make_way(program.folder)
            supervisor.end_marked(str(program.folder), program.stop_seconds + _STOP_MARGIN_SECONDS)
            time.sleep(_POLL_SECONDS)
        supervisor.end_marked(str(program.folder), program.stop_seconds)  # torchrun's workers do not hold the lock
        with nullcontext() if pulse is None else pulse.holding(program.folder):
            yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record_owner(lock: int) -> None:
    """Notes in the lock file whose run this is, for whoever finds the folder taken."""
    here = _Owner(socket.gethostname(), os.getpid(), processes.start_time(os.getpid()))
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(asdict(here)).encode(), 0)


@dataclass(frozen=True, slots=True)
class _Owner:
    """The process of a flow run that took a folder. started: see `processes.start_time`."""

    host: str
    pid: int
    started: str | None

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it runs on this host; of another host that is not known."""
        return self.is_here and self.started is not None and processes.start_time(self.pid) == self.started


def _owner(lock: int) -> _Owner | None:
    """Returns who took the folder last; None if that is not noted."""
    try:
        record = json.loads(os.pread(lock, 4096, 0))
        return _Owner(str(record["host"]), int(record["pid"]), record["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begin_log(program: Program) -> int:
    """Appends a headline to the log and returns where this start begins in it, in bytes."""
    with storage_errors(program.log, "write"), program.log.open("ab") as log:
        start = log.tell()
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} starting {' '.join(program.command)}\n".encode())
    return start


def _start_supervisor(program: Program, lock: int) -> subprocess.Popen[bytes]:
    watched = ["--while", str(os.getpid()), "--mark", str(program.folder), "--lock", str(lock)]
    with program.log.open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "flows.supervisor", *watched, "--stop-seconds", str(program.stop_seconds)),
                *("--", *program.command),
            ],
            cwd=program.cwd,
            env={
                **program.environment,
                supervisor.MARK: str(program.folder),
                supervisor.STOP_SECONDS: str(program.stop_seconds),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock, *program.held),
            start_new_session=True,
        )


def _text_since(path: Path, start: int) -> str:
    with storage_errors(path, "read"), path.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", errors="replace")


class LineReader:
    """Reads the whole lines that are appended to a file, from where it ended when the reader was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        """Returns the lines since the last call. A progress bar's carriage returns end lines too."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                read = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(read)
        *whole, self._rest = (self._rest + read).replace(b"\r", b"\n").split(b"\n")
        lines = (line.decode("utf-8", errors="replace")[:_MAX_LINE] for line in whole)
        return [line for line in lines if line.strip()]


@dataclass(slots=True)
class Metrics:
    """The newest state of a program, as its `metrics.jsonl` tells it.

    latest: by metric, its newest value and the step of it. seconds: since this start of the program.
    num_unreadable: lines that were no JSON object.
    """

    step: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    latest: dict[str, tuple[float, int]] = field(default_factory=dict)
    num_unreadable: int = 0
    _began: tuple[int, float] | None = None

    @property
    def percent(self) -> float:
        return min(100.0, 100.0 * self.step / self.num_steps) if self.num_steps > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this start, which a resumed run begins in the middle; None before there is one."""
        if self._began is None or self.step <= self._began[0]:
            return None
        step, seconds = self._began
        return (self.num_steps - self.step) * (self.seconds - seconds) / (self.step - step)

    def add(self, line: str) -> None:
        """Takes one line of the file."""
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self.num_unreadable += 1
            return
        numbers = {name: value for name, value in record.items() if _is_number(value)}
        self.step = int(numbers.pop("step", self.step))
        self.num_steps = int(numbers.pop("num_steps", self.num_steps))
        self.seconds = float(numbers.pop("seconds", self.seconds))
        if self._began is None:
            self._began = (self.step, self.seconds)
        for name, value in numbers.items():
            self.latest[name] = (float(value), self.step)

    def table(self) -> list[dict[str, Any]]:
        """Returns a row for each metric. A value that is not finite is text: JSON has no word for it."""
        return [
            {"metric": name, "value": value if math.isfinite(value) else str(value), "step": step}
            for name, (value, step) in sorted(self.latest.items())
        ]

    def line(self) -> str:
        """Returns one line for a log."""
        left = self.seconds_left
        shown = [f"step {self.step:,} of {self.num_steps:,}"]
        shown += [f"{name} {self.latest[name][0]:.4g}" for name in ("loss", "reward") if name in self.latest]
        return ", ".join([*shown, *([f"about {left:,.0f} s left"] if left is not None else [])])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
