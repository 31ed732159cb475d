"""What Prefect costs: seconds and bytes of its database for each hundred task runs, with SQLite and with PostgreSQL.

    python -m benchmarks.orchestration [--task-runs 1000] [--stages 5]

A real server on this machine is given a flow like a curation's: stages as subflows, in each so many tasks that do
nothing, three at a time. The seconds are the flow's own, from its first stage to its last, without its start; the
bytes are what the database grew by once the server has written everything. PostgreSQL allocates pages of 8 KiB for each
table and index, so figures of few task runs are too high.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from benchmarks.cards import table_lines
from flows.database import SQLITE, Database, sqlite_bytes
from flows.retention import Keep
from flows.stack import prefect_environment, server_environment
from tests.cluster.postgres import running_postgres, why_unavailable
from tests.waiting import free_port

RESULT = Path(__file__).parent / "results" / "orchestration.json"
ROOT = Path(__file__).parents[1]
_START_SECONDS, _SETTLE_SECONDS = 300.0, 10.0
_TABLES = ("flow_run", "flow_run_state", "task_run", "task_run_state", "log", "artifact", "events", "event_resources")
_FLOW = """
import sys, time
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

@task(cache_policy=NO_CACHE, persist_result=False)
def shard(number):
    return number

@flow(name="stage", task_runner=ThreadPoolTaskRunner(max_workers=3), persist_result=False)
def stage(number):
    return [future.result() for future in [shard.submit(at) for at in range(number)]]

@flow(name="measured", persist_result=False)
def measured(stages, tasks):
    stage(10)
    began = time.monotonic()
    for _ in range(stages):
        stage(tasks)
    return time.monotonic() - began

print(measured(int(sys.argv[1]), int(sys.argv[2])))
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a hundred task runs. rows: by table."""

    database: str
    task_runs: int
    seconds_per_100: float
    kilobytes_per_100: float
    rows_per_100: dict[str, float]


@dataclass(frozen=True, slots=True)
class Store:
    """A database as it is measured. count: rows of a table. size: bytes, all that is pending written."""

    database: Database
    count: Callable[[str], int]
    size: Callable[[], int]


@contextmanager
def sqlite_store(home: Path) -> Iterator[Store]:
    path = home / ".local" / "prefect" / "prefect.db"

    def ask(statement: str) -> int:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            return int(connection.execute(statement).fetchone()[0])

    def size() -> int:
        ask("PRAGMA wal_checkpoint(TRUNCATE)")
        return sqlite_bytes(path.parent)

    yield Store(Database("", SQLITE), lambda table: ask(f"SELECT count(*) FROM {table}"), size)


@contextmanager
def postgres_store() -> Iterator[Store]:
    with running_postgres() as server:
        yield Store(
            Database(server.url, "PostgreSQL"),
            lambda table: int(server.query(f"SELECT count(*) FROM {table}")),
            server.size_bytes,
        )


@contextmanager
def prefect_server(home: Path, store: Store) -> Iterator[dict[str, str]]:
    """Starts Prefect's server and yields the environment of a program that speaks to it."""
    api_url = f"http://127.0.0.1:{free_port()}/api"
    environment = prefect_environment(home, api_url) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(httpx.URL(api_url).port)]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=environment | server_environment(store.database, Keep()),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _is_healthy(api_url):
            assert server.poll() is None, (home / "server.log").read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < deadline, "Prefect's server does not start"
            time.sleep(0.5)
        yield environment
    finally:
        server.terminate()
        server.wait()


def _is_healthy(api_url: str) -> bool:
    try:
        return bool(httpx.get(f"{api_url}/health", timeout=5.0, trust_env=False).json() is True)
    except (httpx.HTTPError, ValueError):
        return False


def measure(name: str, store: Store, home: Path, *, num_task_runs: int, num_stages: int) -> Cost:
    """Runs the flow on a server with this database and returns what it cost."""
    (home / ".local").mkdir()
    program = home / "measured_flow.py"
    program.write_text(_FLOW, encoding="utf-8")
    with prefect_server(home, store) as environment:

        def run(stages: int, tasks: int) -> float:
            command = [sys.executable, str(program), str(stages), str(tasks)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            return float(done.stdout.split()[-1])

        run(1, 10)
        before = _settled(store)
        seconds = run(num_stages, num_task_runs // num_stages)
        after = _settled(store)
    hundreds = num_task_runs / 100
    grown = {table: round((after[table] - before[table]) / hundreds, 1) for table in _TABLES}
    kilobytes = (after["bytes"] - before["bytes"]) / 1000 / hundreds
    return Cost(name, num_task_runs, round(seconds / hundreds, 2), round(kilobytes, 1), grown)


def _settled(store: Store) -> dict[str, int]:
    """Returns rows and bytes once the server has written what it was told: events and task runs come late."""
    last: dict[str, int] = {}
    while (counts := {table: store.count(table) for table in _TABLES}) != last:
        time.sleep(_SETTLE_SECONDS)
        last = counts
    return counts | {"bytes": store.size()}


def main() -> int:
    """Returns 2 where there is no PostgreSQL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-runs", type=int, default=1000)
    parser.add_argument("--stages", type=int, default=5, help="subflows that they are spread over")
    options = parser.parse_args()
    if reason := why_unavailable():
        print(f"PostgreSQL cannot be measured here: {reason}")
        return 2
    costs = []
    for name in (SQLITE, "PostgreSQL"):
        home = Path(tempfile.mkdtemp(prefix="bimode-orchestration-"))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, home)
            store = stack.enter_context(sqlite_store(home) if name == SQLITE else postgres_store())
            cost = measure(name, store, home, num_task_runs=options.task_runs, num_stages=options.stages)
        costs.append(cost)
        rows = [("seconds per 100 task runs", cost.seconds_per_100), ("kB per 100 task runs", cost.kilobytes_per_100)]
        rows += [(f"  rows of {table}", number) for table, number in cost.rows_per_100.items()]
        print(name, *table_lines(rows), sep="\n", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    record = {
        "command": f"python -m benchmarks.orchestration --task-runs {options.task_runs} --stages {options.stages}",
        "load_average": round(os.getloadavg()[1], 1),
        "databases": [asdict(cost) for cost in costs],
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
