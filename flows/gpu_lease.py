"""Leases of GPUs: a GPU serves a teacher or trains, never both at once.

A lease is a lock on a file of each GPU, in a folder of its host (`flows.gpu_devices`, `flows.held_files`). The programs
that compute hold it with us: the launcher of vLLM, the supervisor of a training program. So a GPU is free when the last
of them has ended, not when a timeout says so, and whatever killed them: a lost holder costs nobody a wait, and a flow
that was killed gives no GPU away on which its program still writes a checkpoint.

One case is left: those who hold the lock are all killed at once, and what they started lives on. Its processes carry
the name of their lease in their environment; whoever gets the GPU next ends them first, with time for a checkpoint.

Who is served next, `flows.gpu_queue` decides. Prefect queues runs before there is a process; what it knows may be
lost or wrong (two servers, a server restarted from a backup, a run marked as crashed that lives), and no GPU is used
twice for it.

Left out on purpose: GPUs of other hosts. A job on Kubernetes gets whole GPUs from the device plugin; its lease lies in
its own container, and keeps apart what runs in there.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpus.storage import storage_errors
from flows import held_files, supervisor
from flows.gpu_devices import Device, GpuHost, visible_to
from flows.gpu_queue import Kind, Place, Priority, Queue, Request, Ticket, kind_of
from flows.processes import Report, marked_with
from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import BimodeError, ConfigError, Interrupted
from teacher import serving
from teacher.serving import Grant

MARK = "BIMODE_GPU_LEASE"
"""Environment variable of all processes that compute under a lease: its id."""
_POLL_SECONDS = 0.5
_SAY_SECONDS = 60.0
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]")


class GpusTaken(BimodeError):
    """GPUs are held by somebody who does not give them back, and nobody was to wait for him."""

    exit_code = 9


@dataclass(frozen=True, slots=True)
class Terms:
    """What those who wait for a holder must know.

    stop_seconds: what his programs need to end in order. url: where a teacher of his answers. pid_path: of that server.
    home: the project folder of a teacher that belongs to a stack (`bimode up`), which may be stopped when nobody asks
    it; empty where it belongs to a run.
    """

    stop_seconds: float = 30.0
    url: str = ""
    pid_path: str = ""
    home: str = ""


def _process_space() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds GPUs, as he says himself. devices: keys of all of them.

    lease: its id. space: of process numbers, which mean something within one container only.
    """

    kind: Kind
    name: str
    devices: tuple[str, ...]
    terms: Terms = Terms()
    lease: str = field(default_factory=lambda: uuid.uuid4().hex)
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    space: str = field(default_factory=_process_space)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def is_here(self) -> bool:
        """Whether his process numbers are ours."""
        return (self.host, self.space) == (socket.gethostname(), _process_space())

    def __str__(self) -> str:
        where = f"process {self.pid}" if self.is_here else f"process {self.pid} on {self.host}"
        return f"{self.kind} of {self.name} ({where}, since {self.since})"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Holder:
        """Raises KeyError, TypeError, ValueError: it is damaged."""
        said = record["terms"]
        terms = Terms(float(said["stop_seconds"]), *(str(said[name]) for name in ("url", "pid_path", "home")))
        kind = kind_of(str(record["kind"]))
        texts = (str(record[name]) for name in ("host", "space", "since"))
        devices = tuple(str(key) for key in record["devices"])
        return cls(kind, str(record["name"]), devices, terms, str(record["lease"]), int(record["pid"]), *texts)


@dataclass(slots=True)
class Lease:
    """GPUs that are ours until we give them back and all programs that hold them with us have ended.

    devices, descriptors: in the same order.
    """

    holder: Holder
    devices: list[Device]
    descriptors: list[int]

    @property
    def grant(self) -> Grant:
        """What a program gets that is to compute on these GPUs."""
        return Grant({**visible_to(self.devices), MARK: self.holder.lease}, tuple(self.descriptors))

    def keep(self, number: int) -> None:
        """Gives back all but the first so many, on which no program of ours computes any more. Raises StorageError."""
        while len(self.devices) > number:
            self.devices.pop()
            descriptor = self.descriptors.pop()
            os.ftruncate(descriptor, 0)  # what goes on under this lease is not on that GPU
            held_files.close(descriptor)
        self.holder = replace(self.holder, devices=tuple(device.key for device in self.devices))
        self.note()

    def note(self) -> None:
        """Writes who holds the devices, for all who look. Raises StorageError."""
        for device, descriptor in zip(self.devices, self.descriptors, strict=True):
            with storage_errors(Path(device.key), "lease"):
                held_files.write_note(descriptor, asdict(self.holder))

    def release(self) -> None:
        """Gives the GPUs back; programs that were started under the lease hold them until they end."""
        while self.descriptors:
            held_files.close(self.descriptors.pop())
        self.devices.clear()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()


class Leases:
    """The leases of a host: who has them, and how to get one."""

    def __init__(self, host: GpuHost) -> None:
        self.host = host
        self.queue = Queue(host.folder)

    def acquire(
        self,
        request: Request,
        terms: Terms = Terms(),
        *,
        say: Report,
        make_room: Callable[[Request, Sequence[Holder]], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Lease:
        """Waits for its turn and for the GPUs, and takes them.

        say: gets a line about what it waits for, at once and every minute. make_room: called again and again, with the
        request and those who hold GPUs, when it is this request's turn but too few are free; it may take its time, and
        nobody comes in between. should_stop: asked while waiting.

        Raises ConfigError: there are not so many. Interrupted: `should_stop` said so. StorageError: the folder cannot
        be used. StackError: what a killed holder left on a GPU cannot be ended. And what make_room raises.
        """
        self._check(request)
        said = -_SAY_SECONDS
        with self.queue.waiting(request) as place:
            while True:
                lease, before, holders, ahead = self._attempt(place, terms)
                if lease is not None:
                    break
                if should_stop():
                    raise Interrupted(f"{request.name} was stopped while it waited for a GPU")
                if time.monotonic() - said >= _SAY_SECONDS:
                    said = time.monotonic()
                    say(_reason_to_wait(request, ahead, holders))
                if make_room is not None and not ahead:
                    make_room(request, holders)
                time.sleep(_POLL_SECONDS)
        return _cleared(lease, before, say)

    def try_acquire(self, request: Request, terms: Terms = Terms(), *, say: Report) -> Lease | None:
        """Returns a lease if enough GPUs are free and nobody waits for them, else None. Raises as `acquire`."""
        self._check(request)
        with self.queue.waiting(request) as place:
            lease, before, _, _ = self._attempt(place, terms)
        return None if lease is None else _cleared(lease, before, say)

    def look(self) -> tuple[dict[str, Holder | None], list[Ticket]]:
        """Returns who holds each device that is taken (None: he did not say), and who waits, in order."""
        if not self.host.folder.exists():
            return {}, []
        with self.queue.locked():
            return self._holders(), self.queue.tickets()

    def server_at(self, url: str) -> Holder | None:
        """Returns who serves at an address, on GPUs that he holds now. Raises StorageError."""
        holders = self.look()[0].values()
        return next((holder for holder in holders if holder is not None and holder.terms.url == url), None)

    def holder_of(self, key: str) -> Holder | None:
        """Returns who holds a device, or None if nobody does or he did not say. Called while the queue is locked."""
        return self._last_holder(key) if held_files.is_held(self.path(key)) else None

    def shared_file(self, holder: Holder) -> Path:
        """Returns the file that those who ask a shared server hold together: one for each place of a server."""
        return self.path(holder.devices[0]).with_suffix(".askers")

    def path(self, key: str) -> Path:
        """Returns the file of a device."""
        return self.host.folder / f"gpu-{_NO_NAME.sub('_', key)}.json"

    def _check(self, request: Request) -> None:
        if not 0 < request.number <= len(request.wanted):
            names = ", ".join(map(str, self.host.devices))
            raise ConfigError(
                f"{request.name} asks for {request.number} GPUs, and this worker has {len(request.wanted)} ({names})"
            )

    def _attempt(self, place: Place, terms: Terms) -> tuple[Lease | None, list[Holder], list[Holder], list[Ticket]]:
        """Takes the GPUs if it is the place's turn and they are free.

        Returns the lease, who held them before, who holds GPUs now, and who comes first.
        """
        with self.queue.locked():
            ahead = self.queue.ahead(place)
            if not ahead and (taken := self._take(place.ticket.request, terms)) is not None:
                place.leave()
                return *taken, [], []
            holders = [holder for holder in self._holders().values() if holder is not None]
        return None, [], list({holder.lease: holder for holder in holders}.values()), ahead

    def _take(self, request: Request, terms: Terms) -> tuple[Lease, list[Holder]] | None:
        """Takes the devices if enough are free; returns the lease and who held them last. Called while it is locked."""
        chosen: list[Device] = []
        descriptors: list[int] = []
        try:
            for device in self.host.devices:
                if device.key in request.wanted and len(chosen) < request.number:
                    descriptor = held_files.open_file(self.path(device.key))
                    if held_files.take(descriptor):
                        chosen.append(device)
                        descriptors.append(descriptor)
                    else:
                        held_files.close(descriptor)
            if len(chosen) == request.number:
                before = [holder for device in chosen if (holder := self._last_holder(device.key)) is not None]
                holder = Holder(request.kind, request.name, tuple(device.key for device in chosen), terms)
                lease = Lease(holder, chosen, descriptors)
                lease.note()
                return lease, before
        except BaseException:
            _close_all(descriptors)
            raise
        _close_all(descriptors)
        return None

    def _holders(self) -> dict[str, Holder | None]:
        taken = [device.key for device in self.host.devices if held_files.is_held(self.path(device.key))]
        return {key: self._last_holder(key) for key in taken}

    def _last_holder(self, key: str) -> Holder | None:
        try:
            return Holder.from_record(held_files.read_note(self.path(key)) or {})
        except (KeyError, TypeError, ValueError):
            return None


def serving_request(
    host: GpuHost, endpoint: EndpointConfig, serve: ServeConfig, *, name: str, priority: Priority
) -> Request | None:
    """Returns what a server of vLLM needs; None where it is built for the processor and GPUs are there for others.

    Raises ServingError: there is no vLLM, or more GPUs are asked for than there are.
    """
    number = serving.num_gpus_wanted(endpoint, serve) if host.num_gpus else 1
    wanted = tuple(device.key for device in host.devices)
    return Request("serving", name, wanted, number, priority) if number else None


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        held_files.close(descriptor)


def _cleared(lease: Lease, before: Sequence[Holder], say: Report) -> Lease:
    """Ends what the holders before were killed without ending, and returns the lease. Raises StackError."""
    try:
        for holder in {holder.lease: holder for holder in before if holder.is_here}.values():
            left = marked_with(MARK, holder.lease)
            if left:
                say(f"{holder} was killed and left processes {sorted(left)} on the GPU; stopping them")
                supervisor.end_marked(holder.lease, holder.terms.stop_seconds, variable=MARK)
    except BaseException:
        lease.release()
        raise
    return lease


def _reason_to_wait(request: Request, ahead: Sequence[Ticket], holders: Sequence[Holder]) -> str:
    what = f"waiting for {request.number} of {len(request.wanted)} GPUs"
    if ahead:
        return f"{what}; first comes the {ahead[0]}" + (f" and {len(ahead) - 1} more" if len(ahead) > 1 else "")
    return f"{what}, held by the " + " and the ".join(map(str, holders)) if holders else what
