"""Runs one training program and sees to it that nothing of it is left: started by `flows.training_process`.

    python -m flows.supervisor --while PID --mark VALUE --stop-seconds N [--lock FD] -- COMMAND...

It stands between the flow run and the program because the flow run cannot do this itself: when a run is cancelled,
Prefect's worker kills the flow's process and its group after 30 seconds, and a checkpoint may take longer; and a flow
process that the kernel killed can do nothing at all. So the supervisor leads a session of its own, and stops the
program when it is told to (SIGTERM) and when the flow's process is no longer its parent.

Stopping means: SIGTERM to the program alone, which ends its step and writes a checkpoint; a wait; SIGKILL to all that
is left of it. Its processes are found by a mark in their environment, for torchrun gives each of its workers a session
of its own. What a launcher that dies at once (accelerate's) leaves behind is asked in its place.

Exit status: the program's, 128 + N if signal N ended it; that of `Interrupted` if it was stopped in time, 137 if it
was killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from types import FrameType

from flows import processes
from flows.processes import StackError
from schemas.errors import Interrupted

MARK = "BIMODE_TRAINING"
"""Environment variable of a program and all its processes: the folder that it writes to."""

STOP_SECONDS = "BIMODE_TRAINING_STOP_SECONDS"
"""Environment variable of the same processes: how long they have for a checkpoint."""

KILLED = 128 + signal.SIGKILL
KILL_SECONDS = 10.0
LEFTOVER_SECONDS = 10.0
"""For what a program that ended by itself leaves behind, e.g. the processes of an inference engine."""
_POLL_SECONDS = 0.2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a training program and end all its processes with it.")
    parser.add_argument(
        "--while", dest="parent", type=int, required=True, help="stop when this is no longer the parent"
    )
    parser.add_argument("--mark", required=True, help="value of the mark that the program's processes carry")
    parser.add_argument("--stop-seconds", type=float, required=True, help="time for a checkpoint")
    parser.add_argument("--lock", type=int, help="descriptor of a lock that the program holds while it lives")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    is_told_to_stop = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_told_to_stop
        is_told_to_stop = True

    # Installed before the program exists: a signal in between must not leave it behind.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    program = subprocess.Popen(
        options.command,
        stdin=subprocess.DEVNULL,
        pass_fds=() if options.lock is None else (options.lock,),
        process_group=0,
    )
    while program.poll() is None and not is_told_to_stop and os.getppid() == options.parent:
        time.sleep(_POLL_SECONDS)
    if program.poll() is not None:
        end_marked(options.mark, LEFTOVER_SECONDS)
        return program.returncode if program.returncode >= 0 else 128 - program.returncode
    return _stop(program, options.mark, options.stop_seconds)


def _stop(program: subprocess.Popen[bytes], mark: str, seconds: float) -> int:
    """Stops a running program and returns the supervisor's exit status."""
    _say(f"stopping the program; it has {seconds:.0f} s for a checkpoint")
    program.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    with suppress(subprocess.TimeoutExpired):
        program.wait(seconds)
    is_killed = end_marked(mark, deadline - time.monotonic(), asked={program.pid})
    if program.poll() is None:  # where marks cannot be read
        is_killed = True
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
    if is_killed:
        _say(f"the program did not end within {seconds:.0f} s and was killed; its newest whole checkpoint is kept")
        return KILLED
    _say(f"the program ended with status {program.returncode}")
    return 0 if program.returncode == 0 else Interrupted.exit_code


def end_marked(mark: str, seconds: float, *, asked: Collection[int] = (), variable: str = MARK) -> bool:
    """Ends all processes that carry a mark, but for this one, and returns whether any had to be killed.

    Only processes whose parent is not marked are asked (SIGTERM), each once: a program decides by itself how its own
    children end. asked: processes that were asked already. What lives after `seconds` is killed.

    Raises StackError: if a process survives SIGKILL.
    """
    done, deadline = set(asked), time.monotonic() + seconds
    while members := set(processes.marked_with(variable, mark)):
        for pid in members - done:
            if processes.parent(pid) not in members:
                done.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    if not members:
        return False
    deadline = time.monotonic() + KILL_SECONDS
    while members := set(processes.marked_with(variable, mark)):
        if time.monotonic() > deadline:
            raise StackError(f"processes {sorted(members)} of {variable}={mark} survived SIGKILL")
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return True


def _say(line: str) -> None:
    print(f"supervisor: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
