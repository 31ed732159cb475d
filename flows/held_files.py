"""Files that a living process holds: taken by one or by several, and free again when the last holder has ended.

The kernel keeps the lock (flock) and drops it with the last process that has the file open, however that ends: no
heartbeat, no timeout, and a process number that was given to another process misleads nobody. What a file says of its
holder is there for people and for order; whether it is held, the lock alone decides.

A started program keeps a file held if its descriptor is handed on (`pass_fds`). A forked copy of this process drops it
at once: it would otherwise hold, unknown to all, what its parent has given back.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from corpus.storage import storage_errors

_MAX_BYTES = 2**16
"""Of a note. Larger files in a folder that others may write to are not ours."""
_held: set[int] = set()
_hooked = threading.Event()


def open_file(path: Path) -> int:
    """Returns a descriptor of a file that all may lock, made if it is missing. Raises StorageError."""
    with storage_errors(path, "use"):
        descriptor = _open(path)
    _held.add(descriptor)
    _hook()
    return descriptor


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Without O_CREAT first: in a folder that all may write to, Linux refuses it for another user's file.
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # made by another process since
            return _open(path)
        with suppress(OSError):
            os.fchmod(descriptor, 0o666 if path.parent.stat().st_mode & stat.S_ISVTX else 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no plain file")
    return descriptor


def take(descriptor: int, *, shared: bool = False) -> bool:
    """Takes an open file, if it is free or all who hold it share it; returns whether it did."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(descriptor: int) -> None:
    """Takes an open file, as soon as it is free. For files that are held for a moment only."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def close(descriptor: int) -> None:
    """Gives an open file back. Programs that it was handed on to go on holding it."""
    _held.discard(descriptor)
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Returns whether somebody holds a file alone. Only to be asked while nobody tries to take it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not take(descriptor, shared=True)
    finally:
        os.close(descriptor)


def write_note(descriptor: int, record: dict[str, Any]) -> None:
    """Writes what an open file says. Raises OSError."""
    text = json.dumps(record).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def read_note(path: Path) -> dict[str, Any] | None:
    """Returns what a file says; None when it is missing, empty, damaged or not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        record = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return record if isinstance(record, dict) else None


def _hook() -> None:
    if not _hooked.is_set():
        _hooked.set()
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
