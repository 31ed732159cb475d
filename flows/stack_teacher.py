"""The teacher of the local stack: started by `bimode up` on leased GPUs, shared by all runs, stopped when others need
its GPUs, and started again when nobody does.

That is done by a process of its own, `python -m flows.stack_teacher`, which waits in the queue before the GPUs with the
lowest priority (`flows.gpu_queue`). It is there from the moment the teacher is stopped, so a training that is killed
leaves no stack without its teacher. `bimode down` ends it.

What lies in the stack's folder: how the teacher was last started (`teacher.start.json`), what it answers from
(`teacher.json`), the records of both processes, their logs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType

import httpx

from corpus.storage import read_json, write_text
from flows import held_files, processes
from flows.gpu_devices import GpuHost
from flows.gpu_lease import Holder, Lease, Leases, Terms, serving_request
from flows.gpu_queue import Priority, Request
from flows.processes import Report, StackError
from flows.workspace import Workspace
from schemas.config import EndpointConfig, RunConfig, ServeConfig
from schemas.errors import BimodeError, ServingError
from teacher import serving


@dataclass(frozen=True, slots=True)
class TeacherStart:
    """How the teacher is started. serve: with absolute places."""

    endpoint: EndpointConfig
    serve: ServeConfig
    media_folder: Path

    def to_record(self) -> dict[str, object]:
        return {
            "endpoint": self.endpoint.model_dump(mode="json"),
            "serve": self.serve.model_dump(mode="json"),
            "media_folder": str(self.media_folder),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> TeacherStart:
        endpoint = EndpointConfig.model_validate(record["endpoint"])
        return cls(endpoint, ServeConfig.model_validate(record["serve"]), Path(str(record["media_folder"])))


class StackTeacher:
    """The teacher of the stack of a project folder. environment: of a process that belongs to that stack."""

    def __init__(self, home: Path, environment: Callable[[], dict[str, str]]) -> None:
        self.home = home
        self.root = home / ".local"
        self.pid_file = self.root / "teacher.pid"
        self._waiter = self.root / "teacher-waiter.pid"
        self._start_file = self.root / "teacher.start.json"
        self._memory = self.root / "teacher.json"
        self._environment = environment

    @cached_property
    def leases(self) -> Leases:
        return Leases(GpuHost.here(self.home))

    def ensure(self, config: RunConfig, report: Report) -> None:
        """Starts vLLM for the teacher, if the configuration has a `serve` section and nothing serves the model yet.

        Our own server is started anew when its settings or the files of its model have changed since. Where others
        hold its GPUs, it is left to start when they are free.

        Raises ServingError: it does not start. StackError: a run asks the one that would have to be started anew.
        """
        endpoint = config.teacher
        if config.serve is None:
            report(f"the teacher is expected at {endpoint.url}")
            return
        self._stop_waiting()
        start = TeacherStart(endpoint, _absolute(config.serve, self.home), self._media_folder(config))
        served = _served_models(endpoint)
        is_ours = serving.running_pid(self.pid_file) is not None
        is_current = not is_ours or self._is_remembered(start)
        if served is not None and endpoint.model in served and is_current:
            report(f"the teacher {endpoint.model} answers at {endpoint.url}")
            return
        if served is not None and not is_ours:
            raise ServingError(
                f"{endpoint.url} is taken by a server of {', '.join(served) or 'no model'}, not of {endpoint.model}: "
                "stop it, or change teacher.url and serve.port"
            )
        if is_ours:
            self._check_unasked(endpoint)
            report(
                "stopping the teacher: its settings or its model changed" if not is_current else "stopping the teacher"
            )
        serving.stop_server(self.pid_file)
        write_text(self._start_file, json.dumps(start.to_record()))
        request = self._request(start, "default")
        lease = None if request is None else self.leases.try_acquire(request, self._terms(start), say=report)
        if request is not None and lease is None:
            report("others hold the GPUs of the teacher: it starts when they are free; see `bimode pool status`")
            self._start_waiting()
            return
        self.start(start, lease, report)

    def start(self, start: TeacherStart, lease: Lease | None, report: Report) -> None:
        """Starts the server, which takes the lease over. Raises ServingError."""
        report(f"starting the teacher {start.endpoint.model} at {start.endpoint.url}")
        try:
            with _logged_to(report, "teacher.serving"):
                serving.start_server(
                    start.endpoint,
                    start.serve,
                    log_path=self.root / "logs" / "teacher.log",
                    pid_path=self.pid_file,
                    detached=True,
                    media_folder=start.media_folder,
                    grant=serving.Grant() if lease is None else lease.grant,
                )
            write_text(self._memory, _identity(start))
        finally:
            if lease is not None:
                lease.release()  # the server's launcher holds it too

    def stop(self, report: Report, *, restart: bool) -> None:
        """Stops the teacher, if it runs. restart: it starts again when nobody else wants its GPUs.

        Raises ServingError, StackError: a process survives SIGKILL, or the one that waits cannot be started.
        """
        self._stop_waiting()
        if serving.running_pid(self.pid_file) is not None:
            report("stopping the teacher" + (": others need its GPUs; it starts again after them" if restart else ""))
        if self.pid_file.exists():
            serving.stop_server(self.pid_file)
        if restart and self._start_file.exists():
            self._start_waiting()

    def wait_and_start(self, report: Report) -> None:
        """Waits until nobody else wants the GPUs, and starts the teacher as it was started last.

        Does nothing if somebody serves at its address by then. Raises as `start` and `Leases.acquire`.
        """
        start = TeacherStart.from_record(read_json(self._start_file) or {})

        def look(request: Request, holders: Sequence[Holder]) -> None:
            del request, holders

        request = self._request(start, "later")
        lease = None
        if request is not None:
            lease = self.leases.acquire(request, self._terms(start), say=report, make_room=look)
        if serving.is_answering(start.endpoint):
            report(f"{start.endpoint.url} is answered by another server; nothing to do")
            if lease is not None:
                lease.release()
            return
        self.start(start, lease, report)

    def _request(self, start: TeacherStart, priority: Priority) -> Request | None:
        name = f"the teacher {start.endpoint.model} of {self.home}"
        return serving_request(self.leases.host, start.endpoint, start.serve, name=name, priority=priority)

    def _terms(self, start: TeacherStart) -> Terms:
        return Terms(url=start.endpoint.url, pid_path=str(self.pid_file.resolve()), home=str(self.home))

    def _check_unasked(self, endpoint: EndpointConfig) -> None:
        holder = self.leases.server_at(endpoint.url)
        if holder is None:
            return
        file = held_files.open_file(self.leases.shared_file(holder))
        try:
            if not held_files.take(file):
                raise StackError("a run asks the teacher, whose settings or model changed: wait for it, or cancel it")
        finally:
            held_files.close(file)

    def _is_remembered(self, start: TeacherStart) -> bool:
        return self._memory.exists() and self._memory.read_text(encoding="utf-8") == _identity(start)

    def _media_folder(self, config: RunConfig) -> Path:
        return Workspace(self.home / config.workdir).images

    def _start_waiting(self) -> None:
        processes.start(
            [sys.executable, "-m", "flows.stack_teacher", str(self.home)],
            folder=self.home,
            environment=self._environment(),
            log=self.root / "logs" / "teacher-waiter.log",
            pid_file=self._waiter,
        )

    def _stop_waiting(self) -> None:
        pid = processes.recorded_pid(self._waiter)
        if pid is not None and pid != os.getpid():
            processes.stop([pid], "the process that would start the teacher", report=None)
        self._waiter.unlink(missing_ok=True)


def _absolute(serve: ServeConfig, home: Path) -> ServeConfig:
    """Returns the section with the project's own model folder and GPU-side Python filled in; hub names stay."""
    updates: dict[str, str] = {}
    if serve.model_path and (home / serve.model_path).exists():
        updates["model_path"] = str(home / serve.model_path)
    if serve.python is None and "BIMODE_GPU_PYTHON" not in os.environ:
        updates["python"] = str(home / ".venv-gpu" / "bin" / "python")
    return serve.model_copy(update=updates)


def _identity(start: TeacherStart) -> str:
    """Returns all that decides what a teacher answers: settings, and size and time of each file of its model."""
    endpoint, serve = start.endpoint, start.serve
    folder = Path(serve.model_path or endpoint.model)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    stamps = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in files]
    settings = {"model": endpoint.model, "revision": endpoint.revision, "serve": serve.model_dump(mode="json")}
    return json.dumps(settings | {"files": stamps})


def _served_models(endpoint: EndpointConfig) -> list[str] | None:
    """Returns the names of the models that a server on this machine has, or None when nothing answers there."""
    key = os.environ.get(endpoint.api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(f"{endpoint.url.rstrip('/')}/models", headers=headers, timeout=5.0, trust_env=False)
    except httpx.HTTPError:
        return None
    try:
        return [str(model["id"]) for model in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


class _ReportHandler(logging.Handler):
    """Hands log lines to whoever watches the start."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(f"  {record.getMessage()}")


@contextmanager
def _logged_to(report: Report, logger_name: str) -> Iterator[None]:
    logger, handler = logging.getLogger(logger_name), _ReportHandler(report)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends this process in order: a ticket is given back, a server that is starting is stopped."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Waits for the GPUs of the teacher of a project folder, and starts it. Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    teacher = StackTeacher(Path(arguments[0]), lambda: dict(os.environ))
    try:
        teacher.wait_and_start(lambda line: print(line, flush=True))
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
