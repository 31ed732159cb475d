"""Lost and crashed runs on a real Prefect server: who is given up, who is started again, and how often."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import typer
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events import Event as PrefectEvent
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running
from typer.testing import CliRunner

from flows.commands.watch import watch as watch_command
from flows.events import RUN_RESTARTED
from flows.heartbeats import HEARTBEAT, RESTART
from flows.restarts import RESTARTED, Patience, Watch
from flows.stack import STOPPED
from flows.watching import watch

pytestmark = pytest.mark.usefixtures("prefect")
PATIENCE = Patience(25.0, pending_seconds=180.0)


class Clock:
    """Time as a test lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A server with a deployment of one flow, and a watch over it. lines: what it reported."""

    def __init__(self, client: SyncPrefectClient, flow_name: str) -> None:
        self.client, self.lines, self.clock = client, list[str](), Clock()
        flow_id = client.create_flow_from_name(flow_name)
        client.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
        self.deployment = client.create_deployment(
            flow_id, f"d-{uuid4()}", work_pool_name="gpu", enforce_parameter_schema=False
        )
        self.watch = Watch(client, self.lines.append, PATIENCE, self.clock)

    def run(self, *states: State[Any], tags: list[str] | None = None, **parameters: Any) -> FlowRun:
        run = self.client.create_flow_run_from_deployment(self.deployment, parameters=parameters, tags=tags)
        for state in states:
            self.client.set_flow_run_state(run.id, state)
        return self.client.read_flow_run(run.id)

    def state(self, run: FlowRun) -> StateType | None:
        return self.client.read_flow_run(run.id).state_type

    def restarts(self, lost: FlowRun) -> list[FlowRun]:
        return [run for run in self.client.read_flow_runs() if f"{RESTART}-of:{lost.id}" in run.tags]

    def look_for(self, seconds: float, every: float = 5.0) -> None:
        """Looks as the watch does, while so much time passes."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += every
            self.watch.look()

    def beat(self, run_id: UUID) -> None:
        """Sends a heartbeat, and waits until the server shows it."""
        event = PrefectEvent(
            event=HEARTBEAT, resource={"prefect.resource.id": f"prefect.flow-run.{run_id}"}, occurred=datetime.now(UTC)
        )
        self.client.request("POST", "/events", json=[event.model_dump(mode="json")])
        self.event({"id": {"id": [str(event.id)]}})

    def event(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Waits until the server shows an event, and returns it."""
        deadline = time.monotonic() + 60
        while not (found := self.client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"]):
            assert time.monotonic() < deadline, "the server has no such event"
            time.sleep(0.2)
        return dict(found[0])


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened
        for run in opened.read_flow_runs():
            opened.delete_flow_run(run.id)


@pytest.fixture
def scene(client: SyncPrefectClient) -> Scene:
    return Scene(client, "curate")


def test_a_crashed_run_is_started_again_with_its_parameters_tags_and_queue(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed(), tags=["corpus:x"], config="a.yaml", overrides={"n": 3})
    scene.watch.look()
    (again,) = scene.restarts(lost)
    assert again.parameters == {"config": "a.yaml", "overrides": {"n": 3}}
    assert again.state_type == StateType.SCHEDULED
    assert set(again.tags) == {"corpus:x", RESTART, f"{RESTART}-of:{lost.id}"}
    assert (again.deployment_id, again.work_queue_name) == (lost.deployment_id, lost.work_queue_name)
    assert RESTARTED in scene.client.read_flow_run(lost.id).tags
    assert [line for line in scene.lines if str(lost.id) in line and str(again.id) in line]
    told = scene.event({"event": {"name": [RUN_RESTARTED]}, "resource": {"id": [f"bimode.run.{lost.id}"]}})
    assert told["payload"] == {"run": str(again.id), "lost": str(lost.id), "flow": "curate"}


def test_it_is_started_once_however_often_one_looks(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed())
    scene.look_for(60)
    assert len(scene.restarts(lost)) == 1


def test_two_watches_make_one_run_even_if_one_died_before_it_noted_so(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed())
    scene.watch.look()
    scene.client.update_flow_run(lost.id, tags=lost.tags)  # as if the note had never been made
    Watch(scene.client, scene.lines.append, PATIENCE).look()
    assert len(scene.restarts(lost)) == 1


def test_a_restart_that_crashes_is_not_started_again(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed())
    scene.watch.look()
    (again,) = scene.restarts(lost)
    steps: list[State[Any]] = [Pending(), Running(), Crashed()]
    for state in steps:
        scene.client.set_flow_run_state(again.id, state)
    scene.look_for(60)
    assert scene.restarts(again) == []
    assert len(scene.restarts(lost)) == 1


@pytest.mark.parametrize("state", [Completed(), Failed(), Cancelled()], ids=["completed", "failed", "cancelled"])
def test_a_run_that_ended_otherwise_is_left_alone(scene: Scene, state: State[Any]) -> None:
    run = scene.run(Running(), state)
    scene.look_for(60)
    assert scene.restarts(run) == []


def test_a_run_that_a_person_stopped_is_left_alone(scene: Scene) -> None:
    run = scene.run(Running(), Crashed(), tags=[STOPPED])
    scene.watch.look()
    assert scene.restarts(run) == []


def test_a_run_of_a_paused_deployment_waits_until_it_is_resumed(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed())
    scene.client.pause_deployment(scene.deployment)
    scene.watch.look()
    assert scene.restarts(lost) == []
    scene.client.resume_deployment(scene.deployment)
    scene.watch.look()
    assert len(scene.restarts(lost)) == 1


def test_flows_of_others_are_nobody_s_business(client: SyncPrefectClient) -> None:
    scene = Scene(client, "somebody-elses")
    run = scene.run(Running(), Crashed())
    scene.watch.look()
    assert scene.restarts(run) == []


def test_a_silent_run_is_recorded_as_crashed_with_its_stages_and_started_again(scene: Scene) -> None:
    lost = scene.run(Pending(), Running())

    @flow(name="routing")
    def stage() -> None: ...

    parent = scene.client.create_task_run(task=_a_task(), flow_run_id=lost.id, dynamic_key="0", state=Running())
    child = scene.client.create_flow_run(stage, parent_task_run_id=parent.id, state=Running())
    scene.look_for(25)
    assert scene.state(lost) == StateType.RUNNING, "its patience is not over yet"
    scene.look_for(10)
    assert scene.state(lost) == StateType.CRASHED
    assert scene.state(child) == StateType.CRASHED
    assert len(scene.restarts(lost)) == 1
    assert any("nothing was heard of it for 25 s" in line for line in scene.lines)


def _a_task() -> Any:
    from prefect import task

    @task
    def stage() -> None: ...

    return stage


def test_a_run_that_beats_is_not_given_up(scene: Scene) -> None:
    run = scene.run(Pending(), Running())
    for _ in range(3):
        scene.look_for(20)
        scene.beat(run.id)
        scene.look_for(5)
    assert scene.state(run) == StateType.RUNNING


def test_a_silent_training_is_given_up_as_a_curation_is(client: SyncPrefectClient) -> None:
    scene = Scene(client, "train")
    run = scene.run(Pending(), Running())
    scene.look_for(20)
    assert scene.state(run) == StateType.RUNNING
    scene.look_for(15)
    assert scene.state(run) == StateType.CRASHED


def test_a_run_that_no_process_begins_with_is_given_up_after_minutes(scene: Scene) -> None:
    run = scene.run(Pending())
    scene.look_for(170)
    assert scene.state(run) == StateType.PENDING
    scene.look_for(20)
    assert scene.state(run) == StateType.CRASHED


def test_time_in_which_nobody_looked_is_no_silence(scene: Scene) -> None:
    run = scene.run(Pending(), Running())
    scene.look_for(20)
    scene.clock.now += 3600  # the server was away, or this process was stopped
    scene.look_for(20)
    assert scene.state(run) == StateType.RUNNING
    scene.look_for(15)
    assert scene.state(run) == StateType.CRASHED


def test_time_in_which_the_server_was_away_is_no_silence(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scene.run(Pending(), Running())
    scene.look_for(20)
    with monkeypatch.context() as away:
        away.setattr(scene.client._client, "send", _refused)
        for _ in range(4):
            scene.clock.now += 5
            with pytest.raises(httpx.ConnectError):
                scene.watch.look()
    scene.look_for(20)
    assert scene.state(run) == StateType.RUNNING


def _refused(*arguments: Any, **options: Any) -> None:
    raise httpx.ConnectError("refused")


def test_a_crash_of_the_day_before_is_history(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scene.run(Running(), Crashed())
    monkeypatch.setattr("flows.restarts._NO_LONGER", timedelta(seconds=-60))
    scene.watch.look()
    assert scene.restarts(run) == []


def test_a_run_whose_deployment_is_gone_is_left_alone(scene: Scene) -> None:
    run = scene.run(Running(), Crashed())
    scene.client.delete_deployment(scene.deployment)
    scene.look_for(20)
    assert scene.restarts(run) == []


def test_a_run_that_the_server_refuses_to_start_again_is_reported_once(scene: Scene) -> None:
    lost = scene.run(Running(), Crashed(), n="three")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    changed = {"enforce_parameter_schema": True, "parameter_openapi_schema": schema}
    scene.client.request("PATCH", f"/deployments/{scene.deployment}", json=changed)  # type: ignore[arg-type]
    scene.look_for(20)
    assert scene.restarts(lost) == []
    (line,) = scene.lines
    assert line.endswith("cannot be started again: the server refused it with status 409")


def test_a_watch_waits_for_a_server_that_is_away_and_stops_when_told() -> None:
    lines, stopped = list[str](), Event()

    def report(line: str) -> None:
        lines.append(line)
        stopped.set()

    watch("http://127.0.0.1:9/api", report, stopped)
    assert lines == ["the server at http://127.0.0.1:9/api does not answer (ConnectError); waiting for it"]


def test_without_a_server_the_command_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    app = typer.Typer()
    app.command()(watch_command)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "no Prefect server is known: start one with `bimode up`" in result.output
