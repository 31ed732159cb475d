"""How a run comes to a teacher on the GPUs of this machine, and how a teacher gives way to whoever needs its GPUs.

Three kinds of teachers answer at an address:
- the stack's (`bimode up`), shared by all runs of this machine. A run that asks it holds a file of it meanwhile, shared
  with others. Whoever needs its GPUs drains it: it waits in the queue, so that no run which came later begins to ask;
  those that ask already go on to their end; then it takes the file for itself, waits for calls of strangers for at most
  two minutes, and stops the server. A process that was left waiting starts it again when nobody else waits.
- a run's own, which it starts where nothing answers, on GPUs that it leases, and which ends with it. Another run that
  would ask at the same address waits for that, and starts its own.
- somebody else's, who holds no lease here. It is asked, and nothing more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows import held_files, processes, stack
from flows.gpu_lease import GpusTaken, Holder, Lease, Leases, Terms, serving_request
from flows.gpu_queue import Priority, Request
from flows.processes import Report
from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import Interrupted
from teacher import serving
from teacher.serving import ServerHandle

_POLL_SECONDS = 0.5
_SAY_SECONDS = 60.0
_IN_FLIGHT_SECONDS = 120.0
"""For the calls of those who hold no file of a server: they do not know of us, nor we of them."""


@dataclass(slots=True)
class Seat:
    """The right to ask a teacher on this machine, until it is left. server: our own, if this seat started one."""

    server: ServerHandle | None = None
    lease: Lease | None = None
    file: int | None = None

    def leave(self) -> None:
        """Stops our own server and gives back what is held; a second call does nothing. Raises ServingError."""
        try:
            if self.server is not None:
                self.server.stop()
        finally:
            self.server = None
            if self.lease is not None:
                self.lease.release()
                self.lease = None
            if self.file is not None:
                held_files.close(self.file)
                self.file = None


@dataclass(frozen=True, slots=True)
class Asker:
    """A run that needs a teacher. name: as people know it. should_stop: asked while it waits."""

    leases: Leases
    name: str
    priority: Priority
    say: Report
    should_stop: Callable[[], bool] = lambda: False

    def pause(self) -> None:
        """Waits a moment. Raises Interrupted."""
        if self.should_stop():
            raise Interrupted(f"{self.name} was stopped while it waited for its teacher")
        time.sleep(_POLL_SECONDS)


class _Answers(Exception):
    """Somebody began to serve at the address while we waited for GPUs."""


def open_seat(
    asker: Asker,
    endpoint: EndpointConfig,
    serve: ServeConfig,
    *,
    log_path: Path,
    pid_path: Path,
    media_folder: Path,
) -> Seat:
    """Returns the right to ask the teacher at an address, and starts it on leased GPUs where nothing answers.

    Waits for its turn, however long. Raises ServingError: it does not start. Interrupted: the asker was stopped.
    ConfigError: there are not so many GPUs. StorageError, StackError: see `Leases.acquire`.
    """
    said = -_SAY_SECONDS
    while True:
        if serving.is_answering(endpoint):
            holder = asker.leases.server_at(endpoint.url)
            if holder is None or _is_of(holder, pid_path):
                return Seat()
            if not holder.terms.home:
                if time.monotonic() - said >= _SAY_SECONDS:
                    said = time.monotonic()
                    asker.say(f"{endpoint.url} is answered by the {holder}; waiting for its end")
                asker.pause()
            elif (seat := _join(asker, holder)) is not None:
                return seat
            continue
        try:
            lease = _take_gpus(asker, endpoint, serve, pid_path)
        except _Answers:
            continue
        seat = Seat(lease=lease)
        try:
            if not serving.is_answering(endpoint):
                asker.say(f"starting vLLM for {endpoint.model}; its log is {log_path}")
                grant = serving.Grant() if lease is None else lease.grant
                paths = {"log_path": log_path, "pid_path": pid_path, "media_folder": media_folder}
                seat.server = serving.start_server(endpoint, serve, grant=grant, detached=False, **paths)
                return seat
        except BaseException:
            seat.leave()
            raise
        seat.leave()


def _is_of(holder: Holder, pid_path: Path) -> bool:
    """Whether a server was started by another process of the same run, which still lives."""
    is_gone = holder.is_here and processes.start_time(holder.pid) is None
    return holder.terms.pid_path == str(pid_path.resolve()) and not is_gone


def _take_gpus(asker: Asker, endpoint: EndpointConfig, serve: ServeConfig, pid_path: Path) -> Lease | None:
    """Returns the GPUs for a server, or None if it needs none. Raises _Answers, and as `Leases.acquire`."""
    request = serving_request(asker.leases.host, endpoint, serve, name=asker.name, priority=asker.priority)
    if request is None:
        return None
    drain = Drain(asker.leases, asker.say, restart=True, should_stop=asker.should_stop)

    def make_room(request: Request, holders: Sequence[Holder]) -> None:
        if serving.is_answering(endpoint):
            raise _Answers
        if not any(holder.terms.url == endpoint.url for holder in holders):  # it is about to serve what we want
            drain(request, holders)

    terms = Terms(url=endpoint.url, pid_path=str(pid_path.resolve()))
    return asker.leases.acquire(request, terms, say=asker.say, make_room=make_room, should_stop=asker.should_stop)


def _join(asker: Asker, holder: Holder) -> Seat | None:
    """Waits for the turn to ask a shared server and returns the seat, or None if the server has gone meanwhile."""
    said = -_SAY_SECONDS
    queue = asker.leases.queue
    with queue.waiting(Request("asking", asker.name, holder.devices, 0, asker.priority)) as place:
        while True:
            with queue.locked():
                ahead = queue.ahead(place)
                if not ahead:
                    if asker.leases.holder_of(holder.devices[0]) != holder:
                        return None
                    file = held_files.open_file(asker.leases.shared_file(holder))
                    if held_files.take(file, shared=True):
                        return Seat(file=file)
                    held_files.close(file)
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                asker.say(f"waiting to ask the teacher; first comes the {ahead[0] if ahead else holder}")
            asker.pause()


class Drain:
    """Makes room on GPUs by stopping shared teachers that nobody asks; given to `Leases.acquire`.

    restart: they are started again when nobody waits for their GPUs.
    """

    def __init__(
        self, leases: Leases, say: Report, *, restart: bool, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._leases, self._say, self._restart, self._should_stop = leases, say, restart, should_stop

    def __call__(self, request: Request, holders: Sequence[Holder]) -> None:
        """Stops as few shared teachers as free enough GPUs, and none as long as others must end first anyway.

        Raises ServingError, StackError: one cannot be stopped.
        """
        wanted = set(request.wanted)
        num_missing = request.number - (len(wanted) - len(wanted & _devices_of(holders)))
        shared = [holder for holder in holders if holder.is_here and _is_of_this_user(holder)]
        if len(wanted & _devices_of(shared)) < num_missing:
            return
        for holder in sorted(shared, key=lambda holder: -len(wanted & set(holder.devices))):
            if num_missing > 0 and self._stop(holder):
                num_missing -= len(wanted & set(holder.devices))

    def _stop(self, holder: Holder) -> bool:
        """Stops a shared teacher unless a run asks it; returns whether it did."""
        file = held_files.open_file(self._leases.shared_file(holder))
        try:
            if not held_files.take(file):
                return False  # a run asks it
            self._await_strangers(holder)
            stack.stop_teacher(Path(holder.terms.home), restart=self._restart, report=self._say)
        finally:
            held_files.close(file)
        return True

    def _await_strangers(self, holder: Holder) -> None:
        deadline = time.monotonic() + _IN_FLIGHT_SECONDS
        while (number := serving.num_in_flight(holder.terms.url)) and not self._should_stop():
            if time.monotonic() > deadline:
                self._say(f"stopping the teacher although it still works on {number} calls of unknown callers")
                return
            time.sleep(_POLL_SECONDS)


def refuse(request: Request, holders: Sequence[Holder]) -> None:
    """Raises GpusTaken where only a shared teacher could make room; given to `Leases.acquire` in place of a drain."""
    wanted = set(request.wanted)
    shared = [holder for holder in holders if holder.terms.home]
    if len(wanted - _devices_of(shared)) < request.number:
        raise GpusTaken(
            f"{request.name} needs {request.number} of {len(wanted)} GPUs, held by the {shared[0]}: stop it "
            "(`bimode down`), give it fewer GPUs (serve.data_parallel_size), or set release_teacher: true"
        )


def _is_of_this_user(holder: Holder) -> bool:
    """Whether a server belongs to a stack of ours: what stands in another user's folder is neither run nor stopped."""
    try:
        return bool(holder.terms.home) and (Path(holder.terms.home) / ".local").stat().st_uid == os.getuid()
    except OSError:
        return False


def _devices_of(holders: Sequence[Holder]) -> set[str]:
    return {key for holder in holders for key in holder.devices}
