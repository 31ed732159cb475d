"""Who holds a work folder, so that a second run can say whom it gives way to, or wait.

`Workspace.locked` decides: its lock goes with the process, however that ends. The note beside it only tells who
it is; a note whose process has gone is one that a killed run left.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from corpus.storage import write_text
from flows import heartbeats
from flows.workspace import Workspace
from schemas.errors import StorageError

HOLDER_FILE = ".holder.json"
_ASK_SECONDS = 1.0
_SAY_SECONDS = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Holder:
    """A run that works in a folder. name: as a person knows it. since: ISO 8601."""

    name: str
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid} on {self.host}, since {self.since})"


@contextmanager
def held(workspace: Workspace, name: str, *, wait: bool, say: Say) -> Iterator[None]:
    """Holds the work folder for this process. name: of this run, for those that come later.

    wait: until the run that holds it now has ended; `say` gets a line about it at once and every minute. A run in the
    place of a crashed one always waits, and asks the holder to make way if it is cut off (`flows.heartbeats`).

    Raises StorageError: another run holds the folder and `wait` is off, or it cannot be used.
    """
    note = workspace.root / HOLDER_FILE
    with ExitStack() as stack:
        pulse = stack.enter_context(heartbeats.beating())
        said = -_SAY_SECONDS
        while not _taken(workspace, stack):
            holder = find_holder(workspace) or "another run"
            if not wait and not heartbeats.is_restart():
                raise StorageError(
                    f"{holder} is at work in {workspace.root}. Nothing was changed: wait for it (--wait does), or use "
                    "another work folder (--workdir)"
                )
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                say(f"waiting for {holder}, which is at work in {workspace.root}")
            heartbeats.ask_to_make_way(workspace.root)
            time.sleep(_ASK_SECONDS)
        if pulse is not None:
            stack.enter_context(pulse.holding(workspace.root))
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(note, json.dumps(asdict(Holder(name, socket.gethostname(), os.getpid(), since))))
        stack.callback(note.unlink, missing_ok=True)
        yield


def _taken(workspace: Workspace, stack: ExitStack) -> bool:
    """Takes the folder if it is free; whether it was. Raises StorageError: it cannot be used."""
    try:
        stack.enter_context(workspace.locked())
    except StorageError as error:
        if isinstance(error.__cause__, BlockingIOError):
            return False
        raise
    return True


def find_holder(workspace: Workspace) -> Holder | None:
    """Returns who noted that it works in a folder, or None if nobody did, or its process has gone."""
    try:
        holder = Holder(**json.loads((workspace.root / HOLDER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    is_gone = (
        holder.host == socket.gethostname() and not Path(f"/proc/{holder.pid}").exists() and Path("/proc").exists()
    )
    return None if is_gone else holder
