"""Processes in the background: starting, recording, finding and stopping them.

A record (pid file) also holds when its process started: the pid alone may have been given to a stranger since. A mark
is an environment variable that children inherit; it finds what outlived its parent and its record.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from corpus.storage import write_text
from schemas.errors import BimodeError

STOP_SECONDS = 20.0
KILL_SECONDS = 5.0
LOG_TAIL_LINES = 25

Report = Callable[[str], None]

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Children of this very process, kept so that they can be reaped: a dead child that nobody waits for looks alive."""


class StackError(BimodeError):
    """The local stack cannot be started or stopped; the message quotes the end of the log that says why."""

    exit_code = 9


def start(command: list[str], *, folder: Path, environment: dict[str, str], log: Path, pid_file: Path) -> None:
    """Starts a program in the background as the leader of a session of its own, and records it.

    Its output goes to `log`; the log of the last start is kept beside it as `NAME.previous.log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[process.pid] = process
    record = {"pid": process.pid, "started": start_time(process.pid)}
    write_text(pid_file, json.dumps(record) + "\n")


def recorded_pid(pid_file: Path) -> int | None:
    """Returns the pid in a record if that very process still runs, None for a missing, damaged or outlived record."""
    try:
        record = json.loads(pid_file.read_text(encoding="utf-8"))
        pid, started = int(record["pid"]), record["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if started is not None and start_time(pid) == started else None


def start_time(pid: int) -> str | None:
    """Returns when a process started, in a form to compare only, or None if it does not run. A zombie does not run."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
        return None
    if Path("/proc/self/stat").exists():
        fields = _stat_fields(pid)
        if fields is None:
            return None
        # Field 22 counts clock ticks since boot, so it says nothing without the boot.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return None if fields[0] in {"Z", "X"} else f"{boot}:{fields[19]}"
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def parent(pid: int) -> int | None:
    """Returns a process's parent, or None when it is gone or cannot be told (where there is no /proc)."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


def _stat_fields(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the third on, or None when there are none."""
    try:
        # The name in parentheses may itself hold parentheses and spaces: what follows the last one counts.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def stop(pids: Iterable[int], what: str, report: Report | None, *, with_group: bool = True) -> None:
    """Stops processes: SIGTERM, a wait, SIGKILL. with_group: the groups they lead are signalled as a whole.

    Raises StackError: if one still runs after that.
    """
    running = {pid: started for pid in pids if (started := start_time(pid)) is not None}
    if running and report is not None:
        report(f"stopping {what} ({len(running)})")
    for signal_number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        for pid in running:
            _signal(pid, signal_number, with_group=with_group)
        deadline = time.monotonic() + seconds
        while running and time.monotonic() < deadline:
            running = {pid: started for pid, started in running.items() if start_time(pid) == started}
            time.sleep(0.1)
    if running:
        raise StackError(f"{what} cannot be stopped: {', '.join(map(str, running))} survived SIGKILL")


def _signal(pid: int, signal_number: signal.Signals, *, with_group: bool) -> None:
    try:
        if with_group and os.getpgid(pid) == pid:
            os.killpg(pid, signal_number)
        else:
            os.kill(pid, signal_number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise StackError(f"process {pid} belongs to another user: stop it yourself") from error


def marked_with(name: str, value: str) -> dict[int, dict[str, str]]:
    """Returns the environment of every process that has this variable with this value, by pid, but for this process.

    It finds what outlived its parent: the flow run of a killed worker, for example. Linux only; elsewhere it is empty.
    """
    mark = f"{name}={value}".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*/environ"):
        pid = int(entry.parent.name)
        try:
            variables = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in variables and pid != os.getpid():
            pairs = (variable.decode(errors="replace").partition("=") for variable in variables)
            found[pid] = {name: value for name, _, value in pairs}
    return found


def tail(log: Path) -> str:
    """Returns the end of a log, to be quoted in an error."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
    except OSError as error:
        return f"(unreadable: {error})"
