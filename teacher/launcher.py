"""Runs a server as its child and sees to it that nothing of it is left: started by `teacher.serving` as a script.

`python launcher.py [--while PID] -- COMMAND...` leads a process group of its own. It ends the group when it is told to
(SIGTERM, SIGINT) and, with --while, when that process is no longer its parent: a run that was killed with SIGKILL
cannot stop its server itself. A parent-death signal (PR_SET_PDEATHSIG) would not do: Linux sends it when the *thread*
that started us ends, and tasks run in threads.

A script of the standard library alone, so that it starts at once and needs nothing installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 15.0
"""vLLM needs a few seconds to release a GPU in order."""
_LEFTOVER_SECONDS = 5.0
"""The engine's processes end a moment after the server that told them to."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command and end its whole process group with it.")
    parser.add_argument("--while", dest="parent", type=int, help="end when this process is no longer the parent")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    is_told_to_stop = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_told_to_stop
        is_told_to_stop = True

    # Installed before the child exists: a signal in between must not leave it behind.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    child = subprocess.Popen(options.command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not is_told_to_stop:
        if options.parent is not None and os.getppid() != options.parent:
            break
        time.sleep(_POLL_SECONDS)
    _end_group(child)
    return child.returncode or 0


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the group, ourselves last; the server may have children that outlived it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while (members := _other_members()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def _other_members() -> list[int]:
    """Returns the other processes of our group that are not zombies."""
    members: list[int] = []
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    for name in filter(str.isdigit, names):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # "pid (name, which may hold anything) state parent group ..."
                state, _, group = file.read().rpartition(b")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == os.getpgrp() and int(name) != os.getpid() and state != b"Z":
            members.append(int(name))
    return members


if __name__ == "__main__":
    sys.exit(main())
