"""The local stack: Prefect's server, a worker on the pool `gpu`, and the teacher, on one machine and in the background.

`up` starts what is missing and reuses what is healthy; `down` stops everything and keeps the data. All state lies
under `.local/` of the project folder (BIMODE_HOME, else the current folder): Prefect's home with its SQLite database,
logs, and one pid file per process. The user's own Prefect profile and PREFECT_* variables are neither read nor changed.

One trap shapes this file: a flow run whose process was killed stays "Running" in Prefect's database, where it holds the
only slot of its deployment for ever. So `up` closes such runs before it starts a worker, and `down` ends running flows
while the server can still record it.

Left out on purpose: other machines, PostgreSQL, authentication. The server listens on the loopback interface alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from corpus.storage import write_text
from flows import processes, supervisor
from flows.processes import Report, StackError
from flows.workspace import Workspace
from schemas.config import EndpointConfig, RunConfig, ServeConfig, load_config
from schemas.errors import ConfigError, ServingError
from teacher import serving

POOL = "gpu"
WORKER_NAME = "local"
DEFAULT_PORT = 4200
# Only a process that hangs waits so long: one that ends is noticed at once. On a machine with every core taken, the
# server was seen to need two minutes.
START_SECONDS = 600.0
RUNNING_SERVER_SECONDS = 120.0
COMMAND_SECONDS = 600.0
REPORT_EVERY_SECONDS = 5.0

STACK_MARK = "BIMODE_STACK"
"""Environment variable that every process started here inherits: the `.local` folder of its stack."""
FLOW_RUN_MARK = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect gives to the process of a flow run."""


@dataclass(frozen=True, slots=True)
class StackInfo:
    """Where the stack is, and which of its processes run (None: it does not, or it is not ours)."""

    home: Path
    api_url: str
    server_pid: int | None
    worker_pid: int | None
    teacher_pid: int | None

    @property
    def ui_url(self) -> str:
        return self.api_url.removesuffix("/api")

    @property
    def log_folder(self) -> Path:
        return self.home / ".local" / "logs"


@dataclass(frozen=True, slots=True)
class _Folder:
    """The paths of one stack."""

    home: Path

    @property
    def root(self) -> Path:
        return self.home / ".local"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def pid(self, name: str) -> Path:
        return self.root / f"{name}.pid"

    @property
    def api_url_file(self) -> Path:
        return self.root / "api_url"

    @property
    def api_url(self) -> str:
        """The address of the server, remembered from its last start."""
        try:
            return self.api_url_file.read_text(encoding="utf-8").strip() or _api_url(DEFAULT_PORT)
        except FileNotFoundError:
            return _api_url(DEFAULT_PORT)


def up(config_path: Path, *, report: Report) -> StackInfo:
    """Starts whatever of the stack does not run yet, and returns where it is. A second call reuses everything.

    config_path: the run configuration, relative to the current or else the project folder; its `serve` section says
    whether a teacher is started when the teacher's address does not answer.

    Raises ConfigError: if the configuration or `prefect.yaml` cannot be used. Raises StackError: if Prefect's server,
    a deployment or the worker does not start. Raises ServingError: if the teacher does not start.
    """
    folder = _Folder(project_folder())
    config = load_config(config_path if config_path.exists() else folder.home / config_path)
    if not (folder.home / "prefect.yaml").is_file():
        raise ConfigError(f"no prefect.yaml in {folder.home}: run this in the project folder, or set BIMODE_HOME to it")
    with _locked(folder, report):
        _ensure_server(folder, report)
        _deploy(folder, report)
        _ensure_worker(folder, report)
        _ensure_teacher(folder, config, report)
    return status()


def down(report: Report) -> None:
    """Stops flow runs, worker, teacher and server, in this order, and keeps all data.

    Training programs have the time of their configuration (`stop_seconds`) to write a checkpoint.

    Raises StackError: if a process survives SIGKILL.
    """
    folder = _Folder(project_folder())
    if not folder.root.is_dir():
        report("nothing runs: there is no local stack in this folder")
        return
    with _locked(folder, report):
        # Flow runs first, while the server can still record how they ended.
        processes.stop(_flow_runs(folder), "flow runs", report, with_group=False)
        _end_training(folder, report)
        _stop_recorded(folder, "worker", report)
        if folder.pid("teacher").exists():
            report("stopping the teacher")
            serving.stop_server(folder.pid("teacher"))
        _stop_recorded(folder, "server", report)
        processes.stop(_marked_processes(folder), "processes that were left over", report)
    report(f"stopped; the data stays in {folder.root}")


def status() -> StackInfo:
    """Returns which processes of the stack run. Starts and stops nothing."""
    folder = _Folder(project_folder())
    return StackInfo(
        home=folder.home,
        api_url=folder.api_url,
        server_pid=processes.recorded_pid(folder.pid("server")),
        worker_pid=processes.recorded_pid(folder.pid("worker")),
        teacher_pid=serving.running_pid(folder.pid("teacher")),
    )


def release_teacher(report: Report) -> bool:
    """Stops the teacher that `up` started, if it runs, so that training has its GPUs; returns whether it did.

    Whoever needs it next starts it again: a curation with a `serve` section, or `up`.

    Raises StackError: another flow run is in work, which may be asking the teacher.
    """
    folder = _Folder(project_folder())
    if not folder.pid("teacher").exists():
        return False
    with _locked(folder, report):
        if serving.running_pid(folder.pid("teacher")) is None:
            return False
        others = set(_flow_runs(folder).values()) - {os.environ.get(FLOW_RUN_MARK)}
        if others:
            raise StackError(
                f"the flow run {', '.join(sorted(others))} may be asking the teacher, whose GPUs training needs: wait "
                "for it or cancel it, or set release_teacher: false"
            )
        report("stopping the teacher: training needs its GPUs; the next curation starts it again")
        serving.stop_server(folder.pid("teacher"))
    return True


def project_folder() -> Path:
    """Returns the folder that relative paths of a run belong to: BIMODE_HOME, else the current folder."""
    return Path(os.environ.get("BIMODE_HOME") or Path.cwd()).resolve()


def prefect_environment(home: Path, api_url: str) -> dict[str, str]:
    """Returns the environment in which a program speaks to the local server and nothing else.

    Inherited PREFECT_* settings are dropped: they may point to another server or database.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    folder = _Folder(home)
    # A proxy of the surroundings must not carry calls to this machine.
    no_proxy = ",".join(filter(None, [inherited.get("NO_PROXY") or inherited.get("no_proxy"), "127.0.0.1,localhost"]))
    return inherited | {
        STACK_MARK: str(folder.root),
        "BIMODE_HOME": str(home),
        "BIMODE_GPU_PYTHON": inherited.get("BIMODE_GPU_PYTHON") or str(home / ".venv-gpu" / "bin" / "python"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
        "PREFECT_HOME": str(folder.root / "prefect"),
        "PREFECT_API_URL": api_url,
        # Without internet the server logs an error for every event that it cannot send; the client has its own switch.
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # The newer UI asks an address of Amplitude from the reader's browser, whatever the switches above say. One
        # click in the UI switches to it.
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
    }


# Prefect's server


def _ensure_server(folder: _Folder, report: Report) -> None:
    """Starts the server unless ours answers. A server that runs without answering is stopped and started anew."""
    if processes.recorded_pid(folder.pid("server")) is not None:
        if _wait_for(lambda: _is_healthy(folder.api_url), RUNNING_SERVER_SECONDS, "the running Prefect server", report):
            report(f"Prefect's server runs at {folder.api_url}")
            return
        _stop_recorded(folder, "server", report)
    port = _choose_port(folder, report)
    api_url = _api_url(port)
    report(f"starting Prefect's server at {api_url}")
    arguments = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    _start(folder, "server", arguments, api_url=api_url)
    _await_start(folder, "server", lambda: _is_healthy(api_url), START_SECONDS, report)
    write_text(folder.api_url_file, api_url + "\n")


def _choose_port(folder: _Folder, report: Report) -> int:
    """Returns the port of the last start, or else a free one."""
    wanted = httpx.URL(folder.api_url).port or DEFAULT_PORT
    if _is_free(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    report(f"port {wanted} is taken by another program; using {port}")
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a connection in TIME_WAIT does not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _api_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _is_healthy(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/health", timeout=5.0, trust_env=False).json() is True
    except (httpx.HTTPError, ValueError):
        return False


def _call(api_url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Returns the server's JSON reply, or None for 404. Raises StackError: for any other failure."""
    try:
        reply = httpx.request(method, f"{api_url}{path}", json=body, timeout=60.0, trust_env=False)
        if reply.status_code == httpx.codes.NOT_FOUND:
            return None
        reply.raise_for_status()
        return reply.json() if reply.content else {}
    except (httpx.HTTPError, ValueError) as error:
        raise StackError(f"Prefect's server at {api_url} failed on {method} {path}: {error}") from error


# Pool and deployments


def _deploy(folder: _Folder, report: Report) -> None:
    """Creates the work pool, unless it exists, and deploys `prefect.yaml`."""
    pool = _call(folder.api_url, "GET", f"/work_pools/{POOL}")
    if pool is None:
        report(f"creating the work pool {POOL}")
        _run_prefect(folder, ["work-pool", "create", POOL, "--type", "process"])
    if pool is None or pool["concurrency_limit"] is None:
        # One run at a time: curation (its teacher) and training never share a GPU.
        _call(folder.api_url, "PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 1})
    report("deploying prefect.yaml")
    _run_prefect(folder, ["deploy", "--all"])


def _run_prefect(folder: _Folder, arguments: list[str]) -> None:
    """Runs one command of Prefect's command line. Raises StackError: if it fails, with what it printed."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    shown = "prefect " + " ".join(arguments)
    try:
        result = subprocess.run(
            command,
            cwd=folder.home,
            env=prefect_environment(folder.home, folder.api_url),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StackError(f"`{shown}` did not end within {COMMAND_SECONDS:.0f} s; see {folder.log('server')}") from error
    if result.returncode != 0:
        output = "\n".join((result.stdout + result.stderr).splitlines()[-processes.LOG_TAIL_LINES :])
        raise StackError(f"`{shown}` failed with exit status {result.returncode}:\n{output}")


# The worker


def _ensure_worker(folder: _Folder, report: Report) -> None:
    """Starts a process worker on the pool unless ours runs."""
    if processes.recorded_pid(folder.pid("worker")) is not None:
        report(f"a worker runs on the pool {POOL}")
        return
    _close_lost_runs(folder, report)
    report(f"starting a worker on the pool {POOL}")
    started = datetime.now(UTC)
    _start(
        folder,
        "worker",
        ["worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER_NAME],
        api_url=folder.api_url,
    )
    _await_start(folder, "worker", lambda: _worker_reported_since(folder, started), START_SECONDS, report)


def _worker_reported_since(folder: _Folder, moment: datetime) -> bool:
    workers = _call(folder.api_url, "POST", f"/work_pools/{POOL}/workers/filter", {}) or []
    return any(
        worker["name"] == WORKER_NAME
        and worker["last_heartbeat_time"]
        and datetime.fromisoformat(worker["last_heartbeat_time"]) >= moment
        for worker in workers
    )


def _close_lost_runs(folder: _Folder, report: Report) -> None:
    """Records runs as crashed that no process works on: they would hold the slot of their deployment for ever."""
    alive = set(_flow_runs(folder).values())
    body = {
        "flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}},
        "work_pools": {"name": {"any_": [POOL]}},
    }
    for run in _call(folder.api_url, "POST", "/flow_runs/filter", body) or []:
        if run["id"] in alive:
            report(f"flow run {run['name']} goes on")
            continue
        report(f"flow run {run['name']} was cut off; recording it as crashed")
        state = {"type": "CRASHED", "message": "Its process had ended when the local stack was started."}
        _call(folder.api_url, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


# The teacher


def _ensure_teacher(folder: _Folder, config: RunConfig, report: Report) -> None:
    """Starts vLLM for the teacher, if the configuration has a `serve` section and nothing serves the model yet.

    Our own server is started anew when its settings or the files of its model have changed since.
    """
    endpoint, pid_file, memory = config.teacher, folder.pid("teacher"), folder.root / "teacher.json"
    if config.serve is None:
        report(f"the teacher is expected at {endpoint.url}")
        return
    serve = _absolute_serve(config.serve, folder.home)
    wanted = _identity(endpoint, serve)
    served = _served_models(endpoint)
    is_ours = serving.running_pid(pid_file) is not None
    is_current = not is_ours or (memory.exists() and memory.read_text(encoding="utf-8") == wanted)
    if served is not None and endpoint.model in served and is_current:
        report(f"the teacher {endpoint.model} answers at {endpoint.url}")
        return
    if served is not None and not is_ours:
        raise ServingError(
            f"{endpoint.url} is taken by a server of {', '.join(served) or 'no model'}, not of {endpoint.model}: "
            "stop it, or change teacher.url and serve.port"
        )
    if is_ours:
        report("stopping the teacher: its settings or its model changed" if not is_current else "stopping the teacher")
    serving.stop_server(pid_file)
    report(f"starting the teacher {endpoint.model} at {endpoint.url}")
    with _logged_to(report, "teacher.serving"):
        serving.start_server(
            endpoint,
            serve,
            log_path=folder.log("teacher"),
            pid_path=pid_file,
            detached=True,
            media_folder=Workspace(folder.home / config.workdir).images,
        )
    write_text(memory, wanted)


def _absolute_serve(serve: ServeConfig, home: Path) -> ServeConfig:
    """Returns the section with the project's own model folder and GPU-side Python filled in; hub names stay."""
    updates: dict[str, str] = {}
    if serve.model_path and (home / serve.model_path).exists():
        updates["model_path"] = str(home / serve.model_path)
    if serve.python is None and "BIMODE_GPU_PYTHON" not in os.environ:
        updates["python"] = str(home / ".venv-gpu" / "bin" / "python")
    return serve.model_copy(update=updates)


def _identity(endpoint: EndpointConfig, serve: ServeConfig) -> str:
    """Returns all that decides what a teacher answers: settings, and size and time of each file of its model."""
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


# Processes


def _start(folder: _Folder, name: str, arguments: list[str], *, api_url: str) -> None:
    """Starts a command of Prefect's command line in the background."""
    processes.start(
        [sys.executable, "-m", "prefect", *arguments],
        folder=folder.home,
        environment=prefect_environment(folder.home, api_url),
        log=folder.log(name),
        pid_file=folder.pid(name),
    )


def _await_start(folder: _Folder, name: str, probe: Callable[[], bool], seconds: float, report: Report) -> None:
    """Waits until the probe says yes. Raises StackError: if the process ends before, or time is up; nothing is left."""

    def has_started_or_died() -> bool:
        return processes.recorded_pid(folder.pid(name)) is None or probe()

    ready = _wait_for(has_started_or_died, seconds, f"the {name}", report)
    if ready and processes.recorded_pid(folder.pid(name)) is not None:
        return
    reason = f"did not answer within {seconds:.0f} s" if not ready else "ended while it was starting"
    _stop_recorded(folder, name, report)
    raise StackError(f"Prefect's {name} {reason}. The end of {folder.log(name)}:\n{processes.tail(folder.log(name))}")


def _wait_for(probe: Callable[[], bool], seconds: float, what: str, report: Report) -> bool:
    """Returns whether the probe said yes in time, asking twice a second and reporting that it still waits."""
    begin = time.monotonic()
    next_report = REPORT_EVERY_SECONDS
    while not probe():
        waited = time.monotonic() - begin
        if waited > seconds:
            return False
        if waited >= next_report:
            report(f"  waiting for {what} ({waited:.0f} s)")
            next_report += REPORT_EVERY_SECONDS
        time.sleep(0.5)
    return True


def _stop_recorded(folder: _Folder, name: str, report: Report) -> None:
    """Stops the process group of a record, if it still runs, and removes the record."""
    pid = processes.recorded_pid(folder.pid(name))
    if pid is not None:
        report(f"stopping the {name}")
        processes.stop([pid], f"the {name}", report=None)
    folder.pid(name).unlink(missing_ok=True)


def _marked_processes(folder: _Folder) -> dict[int, dict[str, str]]:
    return processes.marked_with(STACK_MARK, str(folder.root))


def _flow_runs(folder: _Folder) -> dict[int, str]:
    """Returns the flow runs in work, by the process that Prefect started for each.

    A run's own children carry its mark too, but only the process that Prefect starts leads a session and runs Prefect.
    """
    runs = {}
    for pid, environment in _marked_processes(folder).items():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            is_leader = os.getsid(pid) == pid
        except OSError:
            continue
        if FLOW_RUN_MARK in environment and is_leader and any(word.startswith(b"prefect.") for word in command):
            runs[pid] = environment[FLOW_RUN_MARK]
    return runs


def _end_training(folder: _Folder, report: Report) -> None:
    """Waits for the training programs of ended flow runs: their supervisors give them time for a checkpoint."""
    marked = _marked_processes(folder).values()
    outputs = {environment[supervisor.MARK] for environment in marked if supervisor.MARK in environment}
    for output in sorted(outputs):
        report(f"waiting for the training in {output} to write a checkpoint")
        seconds = [
            float(environment[supervisor.STOP_SECONDS]) + supervisor.KILL_SECONDS
            for environment in marked
            if environment.get(supervisor.MARK) == output
        ]
        if supervisor.end_marked(output, max(seconds)):
            report("  it did not end and was killed; its newest whole checkpoint is kept")


@contextmanager
def _locked(folder: _Folder, report: Report) -> Iterator[None]:
    """Keeps two starts or stops of one stack from running at once."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = (folder.root / "lock").open("w")
    except OSError as error:
        raise StackError(f"cannot write to {folder.root}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another `bimode up` or `bimode down` to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
