"""The local stack: Prefect's server, its watch, a worker on the pool `gpu`, and the teacher, in the background.

`up` starts what is missing and reuses what is healthy; `down` stops everything and keeps the data. All state lies
under `.local/` of the project folder (BIMODE_HOME, else the current folder): Prefect's home with its SQLite database,
logs, and one pid file per process. The user's own Prefect profile and PREFECT_* variables are neither read nor changed.

One trap shapes this file: a flow run whose process was killed stays "Running" in Prefect's database, where it holds the
only slot of its deployment for ever. So `up` closes such runs before it starts a worker, and `down` ends running flows
while the server can still record it. Between the two, `flows.restarts` watches.

The server keeps its state in SQLite, or in the PostgreSQL database that one setting names (`flows.database`), and for
as long as `flows.retention` says.

Left out on purpose: other machines, authentication. The server listens on the loopback interface alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from corpus.storage import write_text
from flows import database, processes, supervisor
from flows.database import Database
from flows.gpu_devices import GpuHost
from flows.gpu_queue import PRIORITIES
from flows.processes import Report, StackError
from flows.retention import Keep
from flows.stack_teacher import StackTeacher
from schemas.config import load_config
from schemas.errors import ConfigError
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
STOPPED = "stopped"
"""Tag of a flow run that a person stopped, by `down`: nobody starts it again."""


@dataclass(frozen=True, slots=True)
class StackInfo:
    """Where the stack is, and which of its processes run (None: it does not, or it is not ours)."""

    home: Path
    api_url: str
    server_pid: int | None
    worker_pid: int | None
    teacher_pid: int | None
    watch_pid: int | None = None

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
    def database_file(self) -> Path:
        return self.root / "database"

    @property
    def last_database(self) -> str | None:
        """The database of the last server, without its password; None before the first start."""
        try:
            return self.database_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    @property
    def api_url(self) -> str:
        """The address of the server, remembered from its last start."""
        try:
            return self.api_url_file.read_text(encoding="utf-8").strip() or _api_url(DEFAULT_PORT)
        except FileNotFoundError:
            return _api_url(DEFAULT_PORT)


def up(config_path: Path, *, report: Report, database_url: str | None = None) -> StackInfo:
    """Starts whatever of the stack does not run yet, and returns where it is. A second call reuses everything.

    config_path: the run configuration, relative to the current or else the project folder; its `serve` section says
    whether a teacher is started when the teacher's address does not answer. database_url: of the server, else what
    the environment says (`flows.database`), else SQLite.

    Raises ConfigError: if the configuration, the database or `prefect.yaml` cannot be used. Raises StackError: if
    Prefect's server, a deployment or the worker does not start. Raises ServingError: if the teacher does not start.
    """
    folder = _Folder(project_folder())
    config = load_config(config_path if config_path.exists() else folder.home / config_path)
    if not (folder.home / "prefect.yaml").is_file():
        raise ConfigError(f"no prefect.yaml in {folder.home}: run this in the project folder, or set BIMODE_HOME to it")
    chosen, keep = database.chosen_database(database_url), Keep.chosen()
    with _locked(folder, report):
        _ensure_server(folder, chosen, keep, report)
        _deploy(folder, report)
        _ensure_worker(folder, report)
        _ensure_watch(folder, report)
        _teacher(folder).ensure(config, report)
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
        _stop_recorded(folder, "watch", report)
        # Flow runs first, while the server can still record how they ended.
        runs = _flow_runs(folder)
        _mark_stopped(folder, set(runs.values()), report)
        processes.stop(runs, "flow runs", report, with_group=False)
        _end_training(folder, report)
        _stop_recorded(folder, "worker", report)
        _teacher(folder).stop(report, restart=False)
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
        watch_pid=processes.recorded_pid(folder.pid("watch")),
    )


def stop_teacher(home: Path, *, restart: bool, report: Report) -> None:
    """Stops the teacher that `up` started for a project folder, so that others have its GPUs.

    restart: it starts again when nobody else wants them. Whoever calls this has seen to it that no run asks it.

    Raises ServingError, StackError: a process survives SIGKILL, or none can be left to start it again.
    """
    folder = _Folder(home)
    with _locked(folder, report):
        _teacher(folder).stop(report, restart=restart)


def project_folder() -> Path:
    """Returns the folder that relative paths of a run belong to: BIMODE_HOME, else the current folder."""
    return Path(os.environ.get("BIMODE_HOME") or Path.cwd()).resolve()


def prefect_environment(home: Path, api_url: str) -> dict[str, str]:
    """Returns the environment in which a program speaks to the local server and nothing else.

    Inherited PREFECT_* settings are dropped: they may point to another server or database. What may hold the
    database's password is dropped too: the server alone gets it.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT_") and name not in database.SECRET_VARIABLES
    }
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
        # Prefect's shortest; `flows.restarts` takes a longer silence for the end of a run.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # While its database starts again, the server answers 500, which Prefect's client takes for final by default.
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
    }


# Prefect's server


def server_environment(chosen: Database, keep: Keep) -> dict[str, str]:
    """Returns what Prefect's server gets beside the environment of all programs; holds the database's password."""
    return {
        **chosen.server_environment(),
        **keep.server_environment(),
        # Slots of deployments are leased. In memory, Prefect's default, leases end with the server's process, and a run
        # that cannot renew its own is ended by its own client: a restart of the server would end all runs.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def _ensure_server(folder: _Folder, chosen: Database, keep: Keep, report: Report) -> None:
    """Starts the server unless ours answers. One that does not answer, or has another database, is started anew.

    Raises ConfigError: the last server had another database and nothing was said of one, or it cannot be used.
    """
    if folder.last_database not in {None, chosen.shown} and not chosen.is_postgres:
        raise ConfigError(
            f"the server's state lies in {folder.last_database}: name it again ({database.VARIABLE} or --database), or "
            f"delete {folder.database_file} to begin with an empty SQLite database"
        )
    if processes.recorded_pid(folder.pid("server")) is not None and folder.last_database not in {None, chosen.shown}:
        report(f"Prefect's server moves from {folder.last_database} to {chosen.shown}, which knows nothing of old runs")
        _stop_recorded(folder, "worker", report)
        _stop_recorded(folder, "server", report)
    if processes.recorded_pid(folder.pid("server")) is not None:
        if _wait_for(lambda: _is_healthy(folder.api_url), RUNNING_SERVER_SECONDS, "the running Prefect server", report):
            report(f"Prefect's server runs at {folder.api_url}")
            return
        _stop_recorded(folder, "server", report)
    port = _choose_port(folder, report)
    api_url = _api_url(port)
    database.check_database(chosen)
    report(f"starting Prefect's server at {api_url}, with {chosen.shown}")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    _start(folder, "server", command, api_url=api_url, more=server_environment(chosen, keep))
    _await_start(folder, "server", lambda: _is_healthy(api_url), START_SECONDS, report)
    write_text(folder.api_url_file, api_url + "\n")
    write_text(folder.database_file, chosen.shown + "\n")


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
        # More runs than GPUs would only wait for a lease, each in a process.
        limit = max(1, GpuHost.here(folder.home).num_gpus)
        _call(folder.api_url, "PATCH", f"/work_pools/{POOL}", {"concurrency_limit": limit})
    _ensure_queues(folder)
    report("deploying prefect.yaml")
    _run_prefect(folder, ["deploy", "--all"])


def _ensure_queues(folder: _Folder) -> None:
    """Creates the work queues of the pool, one for each priority, unless they exist; `default` always does."""
    queues = _call(folder.api_url, "POST", f"/work_pools/{POOL}/queues/filter", {}) or []
    for priority, name in enumerate(PRIORITIES, start=1):
        if name not in {queue["name"] for queue in queues}:
            _call(folder.api_url, "POST", f"/work_pools/{POOL}/queues", {"name": name, "priority": priority})


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
    command = [sys.executable, "-m", "prefect", "worker", "start"]
    command += ["--pool", POOL, "--type", "process", "--name", WORKER_NAME]
    _start(folder, "worker", command, api_url=folder.api_url)
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


def _mark_stopped(folder: _Folder, runs: set[str], report: Report) -> None:
    """Tags flow runs as stopped by a person, so that the watch of the next start leaves them alone."""
    for run_id in runs:
        try:
            run = _call(folder.api_url, "GET", f"/flow_runs/{run_id}")
            if run is not None:
                _call(folder.api_url, "PATCH", f"/flow_runs/{run_id}", {"tags": [*run["tags"], STOPPED]})
        except StackError as error:  # what is to be stopped must stop, whatever the server says
            report(f"  {error}")


def _ensure_watch(folder: _Folder, report: Report) -> None:
    """Starts what watches the runs, unless ours runs; it waits for the server by itself."""
    if processes.recorded_pid(folder.pid("watch")) is None:
        report("starting the watch over runs")
        _start(folder, "watch", [sys.executable, "-m", "flows.watching"], api_url=folder.api_url)


# The teacher


def _teacher(folder: _Folder) -> StackTeacher:
    return StackTeacher(folder.home, lambda: prefect_environment(folder.home, folder.api_url))


# Processes


def _start(
    folder: _Folder, name: str, command: list[str], *, api_url: str, more: Mapping[str, str] | None = None
) -> None:
    """Starts a program that speaks to the local server in the background. more: of its environment."""
    processes.start(
        command,
        folder=folder.home,
        environment={**prefect_environment(folder.home, api_url), **(more or {})},
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
