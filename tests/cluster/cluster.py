"""A whole installation on hosts of its own: Prefect's server with PostgreSQL and its watch, two workers, two teachers.

Nothing is a stand-in but the teacher, which answers the cards of `benchmarks.cards`: server, database, workers, flow
runs and the network are real. The file system is common to all hosts, as an NFS mount would be. A flow run on a host
that is cut off still writes there, which is the harder case: nothing but its own sense keeps it from the work folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types.entrypoint import EntrypointType

from benchmarks.cards import configuration
from flows.curate import curate
from flows.database import Database
from flows.restarts import SILENCE_SECONDS
from flows.retention import Keep
from flows.stack import FLOW_RUN_MARK, POOL, prefect_environment, server_environment
from schemas.config import RunConfig
from tests.cluster.hosts import Host, HostProcess, Network
from tests.cluster.postgres import Postgres

ROOT = Path(__file__).parents[2]
PREFECT_PORT, TEACHER_PORT = 4200, 8000
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_WAIT_SECONDS = 600.0


class Cluster:
    """The installation; it goes with its network. folder: all users may pass through it.

    latency_seconds: of a teacher's call. silence_seconds: after which the watch takes a run for lost.
    """

    def __init__(self, network: Network, folder: Path, *, latency_seconds: float, silence_seconds: float) -> None:
        self._network, self.folder = network, folder
        self._latency, self._silence = latency_seconds, silence_seconds
        self.control = network.add_host("control")
        self.workers = [network.add_host(name) for name in ("work1", "work2")]
        self.teachers = [network.add_host(name) for name in ("teach1", "teach2")]
        self.postgres = Postgres(folder / "postgres", self.control)
        self.calls_log = folder / "calls.jsonl"
        self._running: dict[str, HostProcess] = {}

    @property
    def api_url(self) -> str:
        return f"http://{self.control.address}:{PREFECT_PORT}/api"

    def start(self) -> None:
        """Starts everything and waits until a run can be given to it."""
        self.postgres.create()
        for teacher in self.teachers:
            self.start_teacher(teacher)
        self.start_control()
        self._deploy()
        for worker in self.workers:
            self.start_worker(worker)

    def start_control(self) -> None:
        """Starts PostgreSQL, Prefect's server and the watch, and waits for the server."""
        self.postgres.start()
        self.start_server()
        command = [sys.executable, "-m", "flows.watching", "--silence", str(self._silence)]
        self._start(self.control, "watch", command)

    def start_server(self) -> None:
        """Starts Prefect's server and waits until it answers."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "0.0.0.0", "--port", str(PREFECT_PORT)]
        environment = server_environment(Database(self.postgres.url, "PostgreSQL"), Keep())
        self._start(self.control, "server", command, environment)
        self.wait_for(self._is_healthy, "Prefect's server", self.logs)

    def start_worker(self, host: Host) -> None:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        self._start(host, "worker", [*command, "--name", host.name])

    def start_teacher(self, host: Host) -> None:
        command = [sys.executable, "-m", "tests.cluster.card_teacher", "--host", host.address]
        command += ["--port", str(TEACHER_PORT), "--log", str(self.calls_log), "--latency", str(self._latency)]
        self._start(host, "teacher", command)

    def process(self, host: Host, name: str) -> HostProcess:
        """Returns the program of a host: "server", "watch", "worker" or "teacher"."""
        return self._running[f"{host.name}/{name}"]

    def _start(self, host: Host, name: str, command: list[str], more: dict[str, str] | None = None) -> None:
        home = self.folder / host.name
        (home / ".local").mkdir(parents=True, exist_ok=True)
        environment = prefect_environment(home, self.api_url) | {
            "PYTHONPATH": str(ROOT),
            "BIMODE_HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*",
            **(more or {}),
        }
        log = home / f"{name}.log"
        self._running[f"{host.name}/{name}"] = host.start(command, log=log, environment=environment)

    def _deploy(self) -> None:
        with temporary_settings({PREFECT_API_URL: self.api_url}):
            with get_client(sync_client=True) as client:
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            deployment = curate.to_deployment(
                "bimode", concurrency_limit=1, entrypoint_type=EntrypointType.MODULE_PATH, tags=["curation"]
            )
            deployment.apply(work_pool_name=POOL)  # type: ignore[union-attr]

    def _is_healthy(self) -> bool:
        try:
            return bool(self.call("GET", "/health") is True)
        except (httpx.HTTPError, ValueError):
            return False

    # Curations

    def write_config(self, cards: Path, name: str) -> RunConfig:
        """Writes a run configuration with a work folder of its own below the cluster's; both teachers are asked."""
        first, second = (f"http://{host.address}:{TEACHER_PORT}/v1" for host in self.teachers)
        config = configuration(cards, self.folder / name, first, teacher={"more_urls": [second]})
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        return config

    def start_run(self, name: str) -> str:
        """Starts a curation of the configuration of this name and returns the id of its flow run."""
        deployment = self.call("GET", "/deployments/name/curate/bimode")
        body = {"parameters": {"config": str(self.folder / f"{name}.yaml")}, "state": {"type": "SCHEDULED"}}
        return str(self.call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/flow_runs/{run_id}"))

    def runs(self) -> list[dict[str, Any]]:
        """Returns the runs of the deployment, oldest first."""
        body = {"deployments": {"name": {"any_": ["bimode"]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.call("POST", "/flow_runs/filter", body))

    def wait_until_quiet(self) -> list[dict[str, Any]]:
        """Waits until all runs have ended, restarts included, and returns them."""

        def ended() -> list[dict[str, Any]] | None:
            try:
                runs = self.runs()
            except httpx.HTTPError:
                return None
            crashed = [run for run in runs if run["state_type"] == "CRASHED"]
            is_settled = all({"restart", "restarted", "stopped"} & set(run["tags"]) for run in crashed)
            return runs if is_settled and all(run["state_type"] in FINAL for run in runs) else None

        found: list[dict[str, Any]] = self.wait_for(ended, "the end of all runs", self.logs)
        return found

    def host_of_run(self) -> Host:
        """Waits until a flow run has a process, and returns the host that it is on."""
        hosts: list[Host] = self.wait_for(
            lambda: [host for host in self.workers if self.flow_processes(host)], "a flow run's process", self.logs
        )
        return hosts[0]

    def flow_processes(self, host: Host) -> list[int]:
        """Returns the processes on a host that Prefect started for a flow run, as this machine counts."""
        found = []
        for pid in host.processes() if host.is_on else []:
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes()
                if f"{FLOW_RUN_MARK}=".encode() in variables and os.getpgid(pid) == pid:
                    found.append(pid)
        return found

    def kill_flow_runs(self, host: Host) -> None:
        for pid in self.flow_processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yields the calls that the teachers got."""
        if self.calls_log.exists():
            for line in self.calls_log.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def wait_for_calls(self, number: int) -> None:
        """Waits until the teachers have got so many more calls."""
        goal = sum(1 for _ in self.calls()) + number
        self.wait_for(lambda: sum(1 for _ in self.calls()) >= goal, f"{number} calls", self.logs)

    # Talking to the server

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Returns what the server replies. Raises httpx.HTTPError."""
        reply = httpx.request(method, f"{self.api_url}{path}", json=body, timeout=20.0, trust_env=False)
        reply.raise_for_status()
        return reply.json()

    def wait_for(self, probe: Callable[[], Any], what: str, tell: Callable[[], str]) -> Any:
        """Returns what the probe says once that is true. Raises AssertionError: it takes too long."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not (said := probe()):
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{tell()}"
            time.sleep(0.3)
        return said

    def logs(self) -> str:
        """Returns the ends of all logs."""
        shown = [f"--- {name}\n{process.tail(40)}" for name, process in self._running.items()]
        return "\n".join(shown)


@contextlib.contextmanager
def running_cluster(
    folder: Path, *, latency_seconds: float, silence_seconds: float = SILENCE_SECONDS
) -> Iterator[tuple[Network, Cluster]]:
    """Yields a network and the installation on it, started."""
    with Network() as network:
        cluster = Cluster(network, folder, latency_seconds=latency_seconds, silence_seconds=silence_seconds)
        (folder / "postgres").mkdir()
        cluster.start()
        yield network, cluster
