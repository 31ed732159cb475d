"""The queue before the GPUs of a host: who waits, in which order, and whose turn it is.

Everyone who needs GPUs draws a ticket: a file that its process holds while it waits (`flows.held_files`), so a ticket
whose process was killed is seen by the next who looks, and removed.

Order: first come, first served within a priority. A step of priority is worth PRIORITY_STEP_SECONDS of waiting: an
urgent ticket goes before those that have waited less than that, and none waits for ever, as every ticket that comes
later than that is behind it.

Strictly in order: a ticket is served when no earlier one wants a GPU that it could get. A small request does not slip
past a large one, even if its GPU stands idle meanwhile: how long the small one would stay nobody knows, and small ones
could keep the large one waiting for ever.

Prefect's global concurrency limits were no substitute: whoever is refused asks again after a random time, so the last
to come may be the first to be served; and a limit belongs to a server, where a GPU belongs to its host.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from corpus.storage import storage_errors
from flows import held_files
from flows.gpu_devices import make_folder
from schemas.errors import ConfigError

Priority = Literal["urgent", "default", "later"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""In order. The work queues of the pool have the same names."""
PRIORITY_VARIABLE = "BIMODE_GPU_PRIORITY"
PRIORITY_STEP_SECONDS = 6 * 3600.0
Kind = Literal["serving", "training", "asking"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_MUTEX = "mutex"
_TICKETS = "ticket-*.json"


def priority_of(name: str) -> Priority:
    """Returns the priority of a name. Raises ConfigError."""
    for priority in PRIORITIES:
        if name == priority:
            return priority
    raise ConfigError(f"{name!r} is no priority; choose one of {', '.join(PRIORITIES)} ({PRIORITY_VARIABLE})")


def kind_of(name: str) -> Kind:
    """Returns the kind of a name. Raises ValueError."""
    return KINDS[KINDS.index(name)]


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody wants. name: as people know it. wanted: keys of the devices of which it takes `number`.

    An asker (kind "asking") takes none: it waits for its turn to ask the server that holds those devices.
    """

    kind: Kind
    name: str
    wanted: tuple[str, ...]
    number: int
    priority: Priority = "default"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A place in the queue. order: moments of this host's clock since its start; number: what was drawn, rising."""

    request: Request
    order: float
    number: int
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def place(self) -> tuple[float, int]:
        return (self.order, self.number)

    def __str__(self) -> str:
        return f"{self.request.kind} of {self.request.name} (process {self.pid} on {self.host}, since {self.since})"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Ticket:
        """Raises KeyError, TypeError, ValueError: it is damaged."""
        asked = record["request"]
        wanted = tuple(str(key) for key in asked["wanted"])
        priority = PRIORITIES[PRIORITIES.index(asked["priority"])]
        request = Request(kind_of(asked["kind"]), str(asked["name"]), wanted, int(asked["number"]), priority)
        place = (float(record["order"]), int(record["number"]))
        return cls(request, *place, int(record["pid"]), str(record["host"]), str(record["since"]))


@dataclass(slots=True)
class Place:
    """A ticket that this process holds."""

    ticket: Ticket
    path: Path
    descriptor: int
    is_left: bool = False

    def leave(self) -> None:
        """Gives the ticket back; a second call does nothing."""
        if not self.is_left:
            self.is_left = True
            with suppress(OSError):
                self.path.unlink()
            held_files.close(self.descriptor)


class Queue:
    """The queue in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keeps all others from looking and taking, for a moment; yields the lock's descriptor. Raises StorageError."""
        make_folder(self.folder)
        descriptor = held_files.open_file(self.folder / _MUTEX)
        try:
            held_files.wait_for(descriptor)
            yield descriptor
        finally:
            held_files.close(descriptor)

    @contextmanager
    def waiting(self, request: Request) -> Iterator[Place]:
        """Draws a ticket and gives it back in the end, unless it was given back before. Raises StorageError."""
        with self.locked() as mutex:
            place = self._draw(request, mutex)
        try:
            yield place
        finally:
            place.leave()

    def tickets(self) -> list[Ticket]:
        """Returns who waits, in order, and removes the tickets of those that have ended. Called while it is locked."""
        waiting = []
        for path in self.folder.glob(_TICKETS):
            if not held_files.is_held(path):
                with suppress(OSError):  # another user's, or given back since
                    path.unlink()
                continue
            with suppress(KeyError, TypeError, ValueError):
                waiting.append(Ticket.from_record(held_files.read_note(path) or {}))
        return sorted(waiting, key=lambda ticket: ticket.place)

    def ahead(self, place: Place) -> list[Ticket]:
        """Returns the earlier tickets that want a device which this one could get. Called while it is locked."""
        mine = place.ticket
        wanted = set(mine.request.wanted)
        earlier = [ticket for ticket in self.tickets() if ticket.place < mine.place]
        return [ticket for ticket in earlier if wanted & set(ticket.request.wanted)]

    def _draw(self, request: Request, mutex: int) -> Place:
        """Draws a ticket. Called while it is locked. Raises StorageError."""
        number = self._next_number(mutex)
        # The clock counts from the start of the host and is one for all its processes.
        order = time.monotonic() + PRIORITIES.index(request.priority) * PRIORITY_STEP_SECONDS
        ticket = Ticket(request, order, number)
        path = self.folder / f"ticket-{number:012d}.json"
        descriptor = held_files.open_file(path)
        place = Place(ticket, path, descriptor)
        try:
            held_files.wait_for(descriptor)
            with storage_errors(path, "write"):
                held_files.write_note(descriptor, asdict(ticket))
        except BaseException:
            place.leave()
            raise
        return place

    def _next_number(self, mutex: int) -> int:
        names = [path.stem.rpartition("-")[2] for path in self.folder.glob(_TICKETS)]
        numbers = [int(name) for name in names if name.isdecimal()]
        drawn = (held_files.read_note(self.folder / _MUTEX) or {}).get("drawn")
        number = 1 + max([*numbers, drawn if isinstance(drawn, int) else 0])
        with storage_errors(self.folder / _MUTEX, "write"):
            held_files.write_note(mutex, {"drawn": number})
        return number
