"""Named moments at which a test may have a run killed: what survives a SIGKILL there can then be looked at.

`BIMODE_CRASH_AT=journal-after-fsync` kills the process group when that moment is reached for the first time,
`BIMODE_CRASH_AT=journal-after-fsync:7` at the seventh. The whole group dies, as when a machine goes down; so the
program under test is started in a group of its own (`subprocess.Popen(..., start_new_session=True)`). Without the
variable nothing happens.

The moments of the journal: `attempt-created` (the file exists, without its header), `attempt-opened` (the header is on
the disk), `journal-before-fsync`, `journal-after-fsync`; and of its compaction: `compact-before-fsync`,
`compact-after-fsync`, `compact-before-rename`, `compact-after-rename`, `compact-removing` (between two removals),
`compact-done`.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "BIMODE_CRASH_AT"
_lock = threading.Lock()
_num_reached: dict[str, int] = {}


def reach(name: str) -> None:
    """Marks a moment; kills the own process group if the environment asks for it here.

    Raises ValueError: the number behind the colon is no positive number.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    moment, _, number = wanted.partition(":")
    if moment != name:
        return
    if number and not (number.isdecimal() and int(number)):
        raise ValueError(f"{VARIABLE}={wanted!r}: behind the colon stands which time it is, from 1 on")
    with _lock:
        _num_reached[name] = _num_reached.get(name, 0) + 1
        if _num_reached[name] == int(number or 1):
            os.killpg(os.getpgrp(), signal.SIGKILL)
