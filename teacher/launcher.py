"""Runs a server and sees to it that nothing of it is left: started by `teacher.serving` as a script.

    python launcher.py --log PATH [--max-log-bytes N] [--num-old-logs N] [--grace-seconds S] [--while PID] -- COMMAND...

It ends the server when it is told to (SIGTERM, SIGINT) and, with --while, when that process is no longer its parent: a
run that was killed with SIGKILL cannot stop its server itself. A parent-death signal (PR_SET_PDEATHSIG) would not do:
Linux sends it when the *thread* that started us ends, and tasks run in threads.

It is two processes, for one of them may be killed as well: the outer one watches, the inner one runs the server, and
each ends the server when the other is gone. Both are subreapers: whatever a process of the server leaves behind, in a
session of its own or not, becomes their child and is found by descent alone. Only when both are killed in the same
moment may something outlive them; the server itself is then told by a parent-death signal, and what else there is
`teacher.serving` finds by its mark.

The server's output goes through the inner process to the log, which is continued in a new file beyond a size, and ends
with a line that says how the server ended.

A script of the standard library alone, so that it starts at once and needs nothing installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

MARK = "BIMODE_SERVER"
"""Environment variable of a server and all its processes: its pid file. Set by `teacher.serving`."""
ENDED_IN_ORDER = "the server was stopped"
"""In the last line of the log of a server that was told to stop."""
CONTINUED = "continued from"
"""In the first line of a log whose beginning is in another file."""

_POLL_SECONDS = 0.25
_KILL_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CHUNK_BYTES = 2**16
_NOT_FOUND = 127
"""Exit status of a shell that cannot find a program."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class _Wish:
    """What a signal leaves behind. No threading.Event: setting one takes a lock, and signals come at any moment."""

    to_stop: bool = False


class Stat(NamedTuple):
    """What /proc knows of a process. started: clock ticks since boot, which tell it from a later namesake."""

    state: str
    parent: int
    group: int
    started: str


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status of the server, 128 + N if signal N ended it."""
    parser = argparse.ArgumentParser(description="Run a server and end all its processes with it.")
    parser.add_argument("--while", dest="parent", type=int, help="end when this process is no longer the parent")
    parser.add_argument("--log", type=Path, required=True, help="where the server's output goes")
    parser.add_argument("--max-log-bytes", type=int, default=64 * 2**20, help="continue the log in a new file beyond")
    parser.add_argument("--num-old-logs", type=int, default=10, help="files of the continued log that are kept")
    parser.add_argument("--grace-seconds", type=float, default=15.0, help="time for the server to end in order")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    wish = _Wish()

    def tell_to_stop(number: int, frame: FrameType | None) -> None:
        wish.to_stop = True

    # Installed before there is a child: a signal in between must not leave it behind.
    for number in _SIGNALS:
        signal.signal(number, tell_to_stop)
    _set_process_option(_PR_SET_CHILD_SUBREAPER, 1)
    log = Log(options.log, max_bytes=options.max_log_bytes, num_old=options.num_old_logs)
    outer = os.getpid()
    # A new process forgets the signals that reach it while Python puts itself in order; held back, they reach it after.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    inner = os.fork()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if inner == 0:
        os._exit(_run_inner(options.command, options.grace_seconds, log, outer, wish))
    return _run_outer(inner, options.parent, options.grace_seconds, log, wish)


def _run_outer(inner: int, parent: int | None, grace_seconds: float, log: Log, wish: _Wish) -> int:
    """Watches the inner process, passes the wish to stop on to it, and ends what it leaves behind."""
    deadline = None
    while (status := _exit_status(inner)) is None:
        is_deserted = parent is not None and os.getppid() != parent
        if deadline is None and (wish.to_stop or is_deserted):
            if is_deserted:
                log.note("the process that started the server is gone")
            _send(inner, signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds + 2 * _KILL_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            _send(inner, signal.SIGKILL)  # it was suspended (SIGSTOP), or waits for a disk
        time.sleep(_POLL_SECONDS)
    if status < 0:
        log.note(f"the process that ran the server was {_words(status)}, so the server is ended too")
    end_descendants(grace_seconds if deadline is None else 0.0)
    return _shell_status(status)


def _run_inner(command: list[str], grace_seconds: float, log: Log, outer: int, wish: _Wish) -> int:
    """Runs the server, keeps its output, and ends it with all its processes. Returns its exit status."""
    os.setsid()  # a signal to the group of the outer process must not end both
    _set_process_option(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Safe: no thread was started yet. The signal comes when the thread that is here now ends: our last.
            preexec_fn=_tell_when_parent_dies,  # noqa: PLW1509
        )
    except OSError as error:
        log.note(f"the server cannot be started: {error}")
        return _NOT_FOUND
    assert server.stdout is not None
    reader = threading.Thread(target=log.copy, args=(server.stdout.fileno(),), daemon=True)
    reader.start()
    while server.poll() is None and not wish.to_stop and os.getppid() == outer:
        time.sleep(_POLL_SECONDS)
        _reap(keep=server.pid)
    by_itself = server.poll()
    end_descendants(grace_seconds, keep=server.pid)
    status = server.wait()
    reader.join(1.0)
    if by_itself is not None:
        log.note(f"the server ended by itself: {_words(by_itself)}")
    elif os.getppid() != outer:
        log.note(f"the launcher was killed, so {ENDED_IN_ORDER}")
    else:
        log.note(f"{ENDED_IN_ORDER}: {_words(status)}")
    return _shell_status(status)


def _shell_status(status: int) -> int:
    """Returns an exit status as a shell shows it: 128 + N for signal N."""
    return status if status >= 0 else 128 - status


def _tell_when_parent_dies() -> None:
    _set_process_option(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _set_process_option(option: int, value: int) -> None:
    """Sets an option of this process, where there are such options: on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _exit_status(pid: int) -> int | None:
    """Returns the exit status of a child, -N after signal N, or None while it runs; reaps adopted children."""
    _reap(keep=pid)
    ended, status = os.waitpid(pid, os.WNOHANG)
    return None if ended == 0 else os.waitstatus_to_exitcode(status)


def end_descendants(grace_seconds: float, *, keep: int | None = None) -> None:
    """Ends all descendants of this process: our children are asked, each once; what lives after the grace is killed.

    Children alone, for a server decides by itself how its own children end; what it leaves behind becomes our child
    and is asked in its place. keep: a child that the caller waits for.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    while (living := _descendants()) and time.monotonic() < deadline:
        for pid in living:
            stat = read_stat(pid)
            if pid not in asked and stat is not None and stat.parent == os.getpid():
                asked.add(pid)
                _send(pid, signal.SIGTERM)
        time.sleep(0.05)
        _reap(keep=keep)
    deadline = time.monotonic() + _KILL_SECONDS
    while (living := _descendants()) and time.monotonic() < deadline:
        for pid in living:
            _send(pid, signal.SIGKILL)
        time.sleep(0.05)
        _reap(keep=keep)


def _descendants() -> list[int]:
    """Returns all processes that descend from this one and are not zombies. Linux only; elsewhere there are none."""
    children: dict[int, list[int]] = {}
    states: dict[int, str] = {}
    for pid, stat in all_stats().items():
        children.setdefault(stat.parent, []).append(pid)
        states[pid] = stat.state
    found: list[int] = []
    next_ones = children.get(os.getpid(), [])
    while next_ones:
        found += next_ones
        next_ones = [child for pid in next_ones for child in children.get(pid, [])]
    return [pid for pid in found if states[pid] != "Z"]


def _reap(keep: int | None) -> None:
    """Reaps children that have ended, up to one whose exit status somebody waits for."""
    with contextlib.suppress(ChildProcessError, AttributeError):  # no children; no waitid, but no adopted ones either
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == keep:
                return
            os.waitpid(ended.si_pid, 0)


def all_stats() -> dict[int, Stat]:
    """Returns what /proc knows of all processes, by pid; empty where there is no /proc."""
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    stats = ((int(name), read_stat(int(name))) for name in names if name.isdigit())
    return {pid: stat for pid, stat in stats if stat is not None}


def read_stat(pid: int) -> Stat | None:
    """Returns what /proc knows of a process, or None when it is gone or there is no /proc."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # Fields 3, 4, 5 and 22 of proc(5), counted behind the name, which may hold spaces and brackets.
    return Stat(words[0].decode(), int(words[1]), int(words[2]), words[19].decode()) if len(words) > 19 else None


def marked(value: str) -> list[int]:
    """Returns the living processes that carry the mark with this value, but for this one. Linux only."""
    wanted = f"{MARK}={value}".encode()
    found: list[int] = []
    for pid, stat in all_stats().items():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if pid != os.getpid() and stat.state != "Z":
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                found += [pid] if wanted in environment.split(b"\0") else []
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _words(status: int) -> str:
    """Returns an exit status as words: negative ones are signals."""
    return f"exit status {status}" if status >= 0 else f"killed by {_signal_name(-status)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Log:
    """A file that a server's output goes to. Beyond max_bytes it is continued anew: PATH.1 is the part before, and so
    on up to num_old. A full disk costs lines, which are counted, never the server."""

    def __init__(self, path: Path, *, max_bytes: int, num_old: int) -> None:
        self._path, self._max_bytes, self._num_old = path, max_bytes, num_old
        self._num_lost_bytes = 0
        self._lock = threading.Lock()

    def copy(self, descriptor: int) -> None:
        """Copies what comes from a pipe until all who could write to it have closed it."""
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            self._write(chunk)

    def note(self, line: str) -> None:
        """Writes a line of our own, told from the server's by its mark."""
        self._write(note_line(line))

    def _write(self, chunk: bytes) -> None:
        with self._lock:
            if self._num_lost_bytes:
                chunk = note_line(f"{self._num_lost_bytes} bytes of output could not be written") + chunk
            try:
                # Opened for each piece: there are few, and a log that somebody removed comes back.
                with self._path.open("ab") as file:
                    file.write(chunk)
                    size = file.tell()
            except OSError:
                self._num_lost_bytes += len(chunk)
                return
            self._num_lost_bytes = 0
            if size > self._max_bytes:
                with contextlib.suppress(OSError):  # then it grows until it can be moved
                    shift_logs(self._path, self._num_old)
                    self._path.write_bytes(note_line(f"{CONTINUED} {self._path.name}.1"))


def note_line(line: str) -> bytes:
    """Returns a line for the log that is not the server's."""
    return f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode()


def shift_logs(path: Path, num_old: int) -> None:
    """Makes room for a new log: PATH becomes PATH.1, PATH.1 becomes PATH.2; the one beyond num_old goes."""
    files = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, num_old + 1))]
    for newer, older in reversed(list(itertools.pairwise(files))):
        if newer.exists():
            newer.replace(older)


if __name__ == "__main__":
    sys.exit(main())
