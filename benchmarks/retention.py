"""A year of nights in Prefect's database: what the server's vacuum leaves, with our settings, on SQLite and PostgreSQL.

    python -m benchmarks.retention [--nights 365] [--task-runs 100] [--keep-days 30] [--database SQLite PostgreSQL]

Each night writes the rows of a curation as Prefect's server writes them (`benchmarks.orchestration` counts those of a
real one): a run, ten stages, task runs with their states, logs, artifacts, events and heartbeats. Then the server's own
vacuum runs, at that night's time. The claim: once as many nights have passed as are kept, the database stops growing.
A year must not take a year, so the rows go into the database by Prefect's own models, without a server; the vacuum is
told the time; and PostgreSQL is told VACUUM after each night, as its autovacuum, which looks every minute, has a day.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.cards import table_lines
from flows.database import SERVER_VARIABLE, SQLITE, sqlite_bytes
from flows.retention import Keep
from tests.cluster.postgres import running_postgres, why_unavailable

RESULT = Path(__file__).parent / "results" / "retention.json"
POSTGRES = "PostgreSQL"
NUM_STAGES, NUM_LOGS, NUM_ARTIFACTS = 10, 60, 16
LEVEL = 1.15
"""The last size may be this much above the one when as many nights had passed as are kept, and a few more."""
_MORE_NIGHTS = 3


@dataclass(frozen=True, slots=True)
class Year:
    """Sizes by night, in bytes. seconds: of the vacuum's last run."""

    database: str
    sizes: dict[int, int]
    vacuum_seconds: float


# In the process of its own that has the database's settings


class Nights:
    """Writes nights into a database and lets Prefect's vacuum run."""

    def __init__(self, num_task_runs: int, num_heartbeats: int) -> None:
        from prefect.server.database import provide_database_interface  # noqa: PLC0415
        from prefect.server.services import db_vacuum  # noqa: PLC0415

        self.db, self._vacuum = provide_database_interface(), db_vacuum
        self._num_task_runs, self._num_heartbeats = num_task_runs, num_heartbeats

    async def prepare(self) -> None:
        """Makes the tables, and the flows that the runs are of."""
        await self.db.create_db()
        self._flow = uuid.uuid4()
        await self._insert(self.db.Flow, [{"id": self._flow, "name": "curate", "tags": []}])

    async def write(self, moment: datetime) -> None:
        """Writes one night's rows, as of a moment."""
        run = uuid.uuid4()
        await self._insert_run(run, None, moment)
        stage_tasks = [uuid.uuid4() for _ in range(NUM_STAGES)]
        await self._insert_tasks(run, stage_tasks, moment)
        for stage_task in stage_tasks:
            stage = uuid.uuid4()
            await self._insert_run(stage, stage_task, moment)
            tasks = [uuid.uuid4() for _ in range(self._num_task_runs // NUM_STAGES)]
            await self._insert_tasks(stage, tasks, moment)
        await self._insert(self.db.Log, [self._log(run, moment) for _ in range(NUM_LOGS)])
        await self._insert(self.db.Artifact, [self._artifact(run, moment) for _ in range(NUM_ARTIFACTS)])
        await self._insert_events("prefect.flow-run.heartbeat", [run] * self._num_heartbeats, moment)

    async def vacuum(self, moment: datetime) -> None:
        """Runs what the server runs every hour and every day, at a moment."""
        vars(self._vacuum)["now"] = lambda zone: moment
        services: list[Callable[..., Awaitable[None]]] = [
            self._vacuum.vacuum_old_flow_runs,
            self._vacuum.vacuum_events_with_retention_overrides,
            self._vacuum.vacuum_old_events,
            self._vacuum.vacuum_orphaned_logs,
            self._vacuum.vacuum_orphaned_artifacts,
        ]
        for service in services:
            await service(db=self.db)

    async def _insert_run(self, run: uuid.UUID, parent: uuid.UUID | None, moment: datetime) -> None:
        times = {"start_time": moment, "end_time": moment, "expected_start_time": moment}
        row = {"id": run, "flow_id": self._flow, "name": "a-night", "state_type": "COMPLETED", "tags": ["corpus:x"]}
        row |= {"parameters": {"config": "my.yaml"}, "parent_task_run_id": parent, **times}
        await self._insert(self.db.FlowRun, [row])
        await self._insert_states(self.db.FlowRunState, "flow_run_id", [run], moment)
        await self._insert_events("prefect.flow-run.Completed", [run] * 4, moment)

    async def _insert_tasks(self, run: uuid.UUID, tasks: Sequence[uuid.UUID], moment: datetime) -> None:
        common = {"flow_run_id": run, "task_key": "run_shards", "state_type": "COMPLETED", "tags": []}
        times = {"start_time": moment, "end_time": moment, "expected_start_time": moment}
        rows = [{"id": task, "name": f"routing/{task}", "dynamic_key": str(task), **common, **times} for task in tasks]
        await self._insert(self.db.TaskRun, rows)
        await self._insert_states(self.db.TaskRunState, "task_run_id", tasks, moment)
        await self._insert_events("prefect.task-run.Completed", [task for task in tasks for _ in range(3)], moment)

    async def _insert_states(self, model: type, owner: str, owners: Sequence[uuid.UUID], moment: datetime) -> None:
        states = [("PENDING", "Pending"), ("RUNNING", "Running"), ("COMPLETED", "Completed")]
        rows = [
            {"id": uuid.uuid4(), owner: one, "type": kind, "name": name, "timestamp": moment + timedelta(seconds=at)}
            for one in owners
            for at, (kind, name) in enumerate(states)
        ]
        await self._insert(model, rows)

    async def _insert_events(self, event: str, subjects: Sequence[uuid.UUID], moment: datetime) -> None:
        events: list[dict[str, Any]] = []
        resources: list[dict[str, Any]] = []
        for subject in subjects:
            number, resource = uuid.uuid4(), {"prefect.resource.id": f"prefect.flow-run.{subject}"}
            related = [{"prefect.resource.id": f"prefect.flow.{self._flow}", "prefect.resource.role": "flow"}] * 3
            times = {"occurred": moment, "received": moment, "recorded": moment}
            body = {"resource": resource, "resource_id": resource["prefect.resource.id"], "related": related}
            body |= {
                "related_resource_ids": [one["prefect.resource.id"] for one in related],
                "payload": {"n": "x" * 300},
            }
            events.append({"id": number, "event": event, "follows": None, **times, **body})
            for one in [resource, *related]:
                role = one.get("prefect.resource.role", "")
                row = {"resource_id": one["prefect.resource.id"], "resource_role": role, "resource": one}
                resources.append({"id": uuid.uuid4(), "occurred": moment, "event_id": number, **row})
        await self._insert(self.db.Event, events)
        await self._insert(self.db.EventResource, resources)

    def _log(self, run: uuid.UUID, moment: datetime) -> dict[str, Any]:
        line = {"name": "prefect.flow_runs", "level": 20, "message": "stage: 1,000 rows done; " * 4}
        return {"id": uuid.uuid4(), "flow_run_id": run, "task_run_id": None, "timestamp": moment, **line}

    def _artifact(self, run: uuid.UUID, moment: datetime) -> dict[str, Any]:
        times = {"created": moment, "updated": moment}
        return {
            "id": uuid.uuid4(),
            "key": "x-progress",
            "type": "table",
            "data": "x" * 2000,
            "flow_run_id": run,
            **times,
        }

    async def _insert(self, model: type, rows: Sequence[dict[str, Any]]) -> None:
        import sqlalchemy as sa  # noqa: PLC0415

        async with self.db.session_context(begin_transaction=True) as session:
            for start in range(0, len(rows), 400):
                await session.execute(sa.insert(model), list(rows[start : start + 400]))


async def pass_nights(num_nights: int, num_task_runs: int, num_heartbeats: int) -> None:
    """Lets nights pass; before the first, and after each, waits for a line, so that the size can be looked at."""
    nights = Nights(num_task_runs, num_heartbeats)
    await nights.prepare()
    first = datetime.now(UTC) - timedelta(days=num_nights)
    for night in range(1, num_nights + 1):
        moment = first + timedelta(days=night)
        await nights.write(moment)
        began = asyncio.get_running_loop().time()
        await nights.vacuum(moment + timedelta(hours=1))
        print(json.dumps({"night": night, "seconds": asyncio.get_running_loop().time() - began}), flush=True)
        sys.stdin.readline()


# In the process that measures


@contextmanager
def _store(name: str, home: Path) -> Iterator[tuple[dict[str, str], Callable[[], int]]]:
    """Yields the setting of a database, and what tells its size after a day of its own housekeeping."""
    if name == SQLITE:
        yield {}, lambda: sqlite_bytes(home)
        return
    with running_postgres() as server:

        def size() -> int:
            server.query("VACUUM")
            return server.size_bytes()

        yield {SERVER_VARIABLE: server.url}, size


def simulate(
    name: str, *, num_nights: int, num_task_runs: int, keep: Keep, num_heartbeats: int = 600, every: int = 10
) -> Year:
    """Lets nights pass in a new database, and returns its size every few of them. Raises AssertionError: it fails."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-m", "benchmarks.retention", "--child"]
    command += ["--nights", str(num_nights), "--task-runs", str(num_task_runs), "--heartbeats", str(num_heartbeats)]
    sizes: dict[int, int] = {}
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="bimode-retention-") as folder, _store(name, Path(folder)) as (more, size):
        environment = {**inherited, "PREFECT_HOME": folder, "PREFECT_LOGGING_LEVEL": "ERROR", **more}
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment | keep.server_environment(), **pipe) as child:  # type: ignore[call-overload]
            for line in child.stdout:
                said = json.loads(line)
                num_bytes = size()
                if said["night"] % every == 0:
                    sizes[said["night"]] = num_bytes
                seconds = said["seconds"]
                child.stdin.write("\n")
                child.stdin.flush()
        assert child.returncode == 0, f"the nights ended with {child.returncode}"
    return Year(name, sizes, seconds)


def is_level(year: Year, keep: Keep) -> bool:
    """Returns whether the database stopped growing once the nights that are kept, and a few, had passed."""
    settled = min(night for night in year.sizes if night >= keep.runs.days + _MORE_NIGHTS)
    return year.sizes[max(year.sizes)] <= LEVEL * year.sizes[settled]


def main() -> int:
    """Returns 1 if a database goes on growing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--task-runs", type=int, default=100, help="of each night")
    parser.add_argument("--heartbeats", type=int, default=600, help="of each night; one every five seconds")
    parser.add_argument("--keep-days", type=float, default=30)
    parser.add_argument("--database", nargs="+", default=[SQLITE, POSTGRES], choices=[SQLITE, POSTGRES])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asyncio.run(pass_nights(options.nights, options.task_runs, options.heartbeats))
        return 0
    if POSTGRES in options.database and (reason := why_unavailable()):
        print(f"PostgreSQL cannot be measured here: {reason}")
        return 2
    keep, years = Keep.of_days(options.keep_days), []
    for name in options.database:
        sizes_of = {"num_task_runs": options.task_runs, "num_heartbeats": options.heartbeats}
        year = simulate(name, num_nights=options.nights, keep=keep, **sizes_of)
        years.append(year)
        sizes = [(f"{name} after {night} nights, MB", f"{size / 1e6:.1f}") for night, size in year.sizes.items()]
        print(*table_lines([*sizes, ("stops growing", "yes" if is_level(year, keep) else "NO")]), sep="\n", flush=True)
    command = f"python -m benchmarks.retention --nights {options.nights} --task-runs {options.task_runs}"
    record = {
        "command": f"{command} --keep-days {options.keep_days:g}",
        "megabytes_by_night": {year.database: {n: round(s / 1e6, 1) for n, s in year.sizes.items()} for year in years},
        "vacuum_seconds_of_last_night": {year.database: round(year.vacuum_seconds, 2) for year in years},
        "stops_growing": {year.database: is_level(year, keep) for year in years},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(is_level(year, keep) for year in years) else 1


if __name__ == "__main__":
    raise SystemExit(main())
