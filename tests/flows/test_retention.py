"""What Prefect's server keeps: our settings, what is pruned by its API, and that nights do not add up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import typer
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Pending, Running, Scheduled
from typer.testing import CliRunner

from benchmarks.retention import POSTGRES, is_level, simulate
from flows.commands.prune import prune as prune_command
from flows.database import SQLITE
from flows.retention import VARIABLE, Keep, prune
from schemas.errors import ConfigError
from tests.cluster.postgres import why_unavailable

PAST = timedelta(seconds=-60)
"""A time that makes everything old, up to a minute from now."""


def test_the_server_takes_our_settings_as_they_are_meant() -> None:
    program = (
        "import json; from prefect.settings import get_current_settings as now; s = now().server; "
        "v = s.services.db_vacuum; print(json.dumps([sorted(v.enabled_vacuum_types), v.retention_period.days, "
        "s.events.retention_period.days, v.event_retention_overrides['prefect.flow-run.heartbeat'].days]))"
    )
    environment = {"PATH": "", "PREFECT_HOME": "/nowhere", **Keep.of_days(14).server_environment()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [["events", "flow_runs", "orphans"], 14, 7, 1]


@pytest.mark.parametrize(("text", "days"), [(None, 30), ("", 30), ("14", 14), ("1.5", 1.5), ("365", 365)])
def test_the_environment_says_how_many_days_are_kept(text: str | None, days: float) -> None:
    keep = Keep.chosen({} if text is None else {VARIABLE: text})
    assert keep.runs == timedelta(days=days)
    assert keep.heartbeats <= keep.events <= max(keep.runs, timedelta(days=7))


@pytest.mark.parametrize("text", ["0", "-3", "0.5", "a month", "nan", "1e9"])
def test_days_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        Keep.chosen({VARIABLE: text})


# On a real server


@pytest.fixture
def client(prefect: None) -> Iterator[SyncPrefectClient]:
    del prefect
    with get_client(sync_client=True) as opened:
        yield opened
        for run in opened.read_flow_runs():
            opened.delete_flow_run(run.id)


def add_run(client: SyncPrefectClient, *states: Any) -> FlowRun:
    flow = client.create_flow_from_name("curate")
    deployment = client.create_deployment(flow, "kept", enforce_parameter_schema=False)
    run = client.create_flow_run_from_deployment(deployment, state=states[0])
    for state in states[1:]:
        client.set_flow_run_state(run.id, state)
    return client.read_flow_run(run.id)


def left(client: SyncPrefectClient) -> set[Any]:
    return {run.id for run in client.read_flow_runs()}


def test_what_is_younger_than_is_kept_stays(client: SyncPrefectClient) -> None:
    runs = [add_run(client, Scheduled()), add_run(client, Running(), Completed())]
    pruned = prune(client, Keep.of_days(1))
    assert (pruned.num_ended, pruned.num_never_ended, pruned.num_workers) == (0, 0, 0)
    assert left(client) == {run.id for run in runs}


def test_old_runs_go_and_those_that_never_ended_too(client: SyncPrefectClient) -> None:
    add_run(client, Running(), Completed())
    add_run(client, Scheduled())
    add_run(client, Pending())
    add_run(client, Running())
    later = add_run(client, Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1)))
    pruned = prune(client, Keep(PAST, PAST, PAST))
    assert (pruned.num_ended, pruned.num_never_ended) == (1, 3)
    assert left(client) == {later.id}, "the next night is planned"
    assert str(pruned).startswith("removed 1 runs that ended long ago, 3 that never ended")


def test_an_old_run_that_works_stays(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, dead = add_run(client, Running()), add_run(client, Running())
    monkeypatch.setattr("flows.retention._was_heard", lambda client, run_id: run_id == str(alive.id))
    assert prune(client, Keep(PAST, PAST, PAST)).num_never_ended == 1
    assert left(client) == {alive.id}
    assert dead.id not in left(client)


def test_workers_that_went_long_ago_go_and_others_stay(client: SyncPrefectClient) -> None:
    client.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
    client.send_worker_heartbeat("gpu", "worker of the day")
    assert prune(client, Keep()).num_workers == 0
    assert prune(client, Keep(PAST, PAST, PAST)).num_workers == 1
    assert client.read_workers_for_work_pool("gpu") == []


def test_the_command_rehearses_and_then_removes(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.retention.Keep.of_days", lambda days: Keep(PAST, PAST, PAST))
    add_run(client, Running(), Completed())
    app, url = typer.Typer(), PREFECT_API_URL.value()
    app.command()(prune_command)

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["--keep-days", "1", "--api-url", str(url), *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert said("--dry-run").startswith("would have removed 1 runs that ended long ago")
    assert len(left(client)) == 1
    assert json.loads(said("--json"))["num_ended"] == 1
    assert left(client) == set()


# Nights


@pytest.mark.slow
@pytest.mark.parametrize("database", [SQLITE, POSTGRES])
def test_a_database_stops_growing_once_the_nights_that_are_kept_have_passed(database: str) -> None:
    if database == POSTGRES and (reason := why_unavailable()):
        pytest.skip(f"NO POSTGRESQL: nothing was tried on it; {reason}")
    keep = Keep.of_days(2)
    year = simulate(database, num_nights=11, num_task_runs=20, keep=keep, num_heartbeats=60, every=1)
    assert is_level(year, keep), year.sizes
    # Without the vacuum every night would add as much as the second.
    per_night = year.sizes[2] - year.sizes[1]
    assert year.sizes[11] < year.sizes[1] + 7 * per_night
