"""Finds flow runs that nobody works on any more, records them as crashed, and starts each crashed run once more.

`flows.watching` looks through it every few seconds (`bimode watch`).

A run is lost when its host dies or is cut off: it stays "Running" on the server, holds the only slot of its deployment,
and nobody is told. It is known by its silence (`flows.heartbeats`). A crashed run is started again with its own
parameters, in the same queue, and what it had done is found in the work folder.

Once means once, whatever happens meanwhile:

- The new run is made under the key `restart-of-ID`, which the server's database admits once, so two watches at work, or
  one that dies between making the run and noting so, make one run.
- A run that is itself a restart (tag `restart`) is not started again: what kills two runs in a row wants a person.
- A run that has ended in any other way meanwhile is left alone: the server refuses to call an ended run crashed.
- A run that was given up but lives on (its host was cut off) keeps its work folder while it reaches the server, and
  makes way otherwise; the new run waits for it, and finds what it has done.

The server's own automations were not enough. A trigger on missing heartbeats counts the time in which the server was
away: after a restart of the server every run would be called crashed. Events are lost with the process that carries
them, an automation knows no "once" for a run and its restart, and cannot pass on parameters that it does not know by
name. So this looks at what stands in the database, again and again, counts only silence that it heard itself, and
begins to count anew whenever the server was away. Messages about restarts are automations (`bimode notify`).

Left out: runs without a deployment, flows that are not ours, and deployments that somebody paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Crashed, Scheduled

from flows.events import RUN_RESTARTED
from flows.heartbeats import HEARTBEAT, RESTART
from flows.processes import Report
from flows.stack import STOPPED

EVERY_SECONDS = 3.0
SILENCE_SECONDS = 25.0
"""Silence of a run that is taken for its end: five beats."""
FLOWS = ("curate", "train")
RESTARTED = "restarted"
"""Tag of a crashed run that another one has taken the place of."""
_NO_LONGER = timedelta(hours=24)
"""A run that crashed before is history: who wants it starts it."""
_PAGE = 200
_SPOKEN_FROM, _SPOKEN_UNTIL = timedelta(days=1), timedelta(hours=1)
"""Hosts' clocks differ, so heartbeats are looked for in a wide time around now."""
_WORKING = (StateType.RUNNING, StateType.PENDING)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a run may be silent that works.

    pending_seconds: for a process to begin with a run that a process worker has taken; other kinds may wait long for
    a node, and their workers watch them.
    """

    silence_seconds: float = SILENCE_SECONDS
    pending_seconds: float = 180.0


@dataclass(slots=True)
class _Heard:
    """What was last heard of a run: a heartbeat or a state, and when that was new to us (monotonic seconds)."""

    sign: str
    at: float


class Watch:
    """Looks at the runs of one server, again and again. report: gets a line about all that is done.

    clock: seconds that only grow.
    """

    def __init__(
        self,
        client: SyncPrefectClient,
        report: Report,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._report, self._clock = client, report, clock
        self._patience = patience or Patience()
        self._heard: dict[UUID, _Heard] = {}
        self._flow_names: dict[UUID, str] = {}
        self._refused: set[UUID] = set()
        self._looked: float | None = None

    def look(self) -> None:
        """Looks once: records silent runs as crashed, starts crashed ones again.

        Raises httpx.HTTPError, PrefectHTTPStatusError: the server is away; the silence of that time is not counted.
        """
        try:
            self._begin_anew_after_a_gap()
            self._give_up_silent_runs()
            for run in self._crashed_runs():
                self._restart(run)
            self._looked = self._clock()
        except (httpx.HTTPError, PrefectHTTPStatusError):
            self._looked = None
            raise

    def _begin_anew_after_a_gap(self) -> None:
        now = self._clock()
        if self._looked is None or now - self._looked > 4 * EVERY_SECONDS:
            self._client.hello()
            for heard in self._heard.values():
                heard.at = now

    # Silence

    def _give_up_silent_runs(self) -> None:
        working = list(self._runs(*_WORKING))
        self._heard = {run.id: self._heard[run.id] for run in working if run.id in self._heard}
        for run in working:
            sign, now = self._sign_of(run), self._clock()
            heard = self._heard.setdefault(run.id, _Heard(sign, now))
            if heard.sign != sign:
                heard.sign, heard.at = sign, now
            if now - heard.at > (allowed := self._allowed_silence(run)):
                self._give_up(run, f"nothing was heard of it for {allowed:.0f} s")

    def _sign_of(self, run: FlowRun) -> str:
        """Returns the newest sign of life of a run, to be compared only."""
        assert run.state is not None, "the server keeps no run without a state"
        state = f"{run.state.type.value} since {run.state.timestamp.isoformat()}"
        now = datetime.now(UTC)
        found = self._client.read_events(
            EventFilter(
                event=EventNameFilter(name=[HEARTBEAT]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
                occurred=EventOccurredFilter(since=now - _SPOKEN_FROM, until=now + _SPOKEN_UNTIL),
            ),
            limit=1,
        )
        return f"{state}, {found.events[0].id}" if found.events else state

    def _allowed_silence(self, run: FlowRun) -> float:
        if run.state_type == StateType.PENDING:
            return self._patience.pending_seconds if self._is_of_a_process_worker(run) else float("inf")
        return self._patience.silence_seconds

    def _is_of_a_process_worker(self, run: FlowRun) -> bool:
        if run.work_pool_name is None:
            return False
        try:
            return bool(self._client.read_work_pool(run.work_pool_name).type == "process")
        except ObjectNotFound:
            return False

    def _give_up(self, run: FlowRun, reason: str) -> None:
        """Records a run and its stages as crashed. A run that has just ended is left as it ended."""
        crashed: State[None] = Crashed(message=f"Recorded by `bimode watch`: {reason}.")
        result = self._client.set_flow_run_state(run.id, crashed)
        if result.status != SetStateStatus.ACCEPT:
            return
        self._report(f"{self._flow_name(run)} '{run.name}' ({run.id}) is lost: {reason}")
        stages = FlowRunFilter(
            parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_WORKING))),
        )
        for stage in self._client.read_flow_runs(flow_run_filter=stages, limit=_PAGE):
            self._client.set_flow_run_state(stage.id, Crashed(message="The run that it is a stage of is lost."))

    # Restarts

    def _crashed_runs(self) -> Iterator[FlowRun]:
        """Yields the crashed runs that nothing was done about yet."""
        since = FlowRunFilterEndTime(after_=datetime.now(UTC) - _NO_LONGER)
        for run in self._runs(StateType.CRASHED, end_time=since):
            if not {RESTART, RESTARTED, STOPPED} & set(run.tags) and run.id not in self._refused:
                yield run

    def _restart(self, lost: FlowRun) -> None:
        assert lost.deployment_id is not None and lost.state is not None, "only runs of deployments are looked for"
        try:
            if self._client.read_deployment(lost.deployment_id).paused:
                return
            run = self._client.create_flow_run_from_deployment(
                lost.deployment_id,
                parameters=lost.parameters,
                state=Scheduled(message=f"In place of '{lost.name}' ({lost.id}), which crashed."),
                tags=[*lost.tags, RESTART, f"{RESTART}-of:{lost.id}"],
                idempotency_key=f"{RESTART}-of-{lost.id}",
                work_queue_name=lost.work_queue_name,
                job_variables=lost.job_variables,
            )
        except ObjectNotFound:
            self._refuse(lost, "its deployment is gone")
            return
        except PrefectHTTPStatusError as error:
            if error.response.is_server_error:
                raise
            self._refuse(lost, f"the server refused it with status {error.response.status_code}")
            return
        self._client.update_flow_run(lost.id, tags=[*lost.tags, RESTARTED])
        self._report(f"{self._flow_name(lost)} '{lost.name}' ({lost.id}) crashed; '{run.name}' ({run.id}) goes on")
        self._tell(lost, run)

    def _refuse(self, lost: FlowRun, reason: str) -> None:
        self._refused.add(lost.id)
        self._report(f"{self._flow_name(lost)} '{lost.name}' ({lost.id}) crashed and cannot be started again: {reason}")

    def _tell(self, lost: FlowRun, run: FlowRun) -> None:
        flow = self._flow_name(lost)
        emit_event(
            RUN_RESTARTED,
            resource={"prefect.resource.id": f"bimode.run.{lost.id}", "prefect.resource.name": lost.name},
            related=[
                {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.role": "flow-run"},
                {
                    "prefect.resource.id": f"prefect.flow.{run.flow_id}",
                    "prefect.resource.role": "flow",
                    "prefect.resource.name": flow,
                },
            ],
            payload={"run": str(run.id), "lost": str(lost.id), "flow": flow},
        )

    # What the server knows

    def _runs(self, *states: StateType, end_time: FlowRunFilterEndTime | None = None) -> Iterator[FlowRun]:
        """Yields the runs of our flows' deployments that are in one of the states."""
        wanted = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(is_null_=False),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
            end_time=end_time,
        )
        flows = FlowFilter(name=FlowFilterName(any_=list(FLOWS)))
        found = self._client.read_flow_runs(flow_filter=flows, flow_run_filter=wanted, limit=_PAGE)
        yield from found

    def _flow_name(self, run: FlowRun) -> str:
        if run.flow_id not in self._flow_names:
            self._flow_names[run.flow_id] = self._client.read_flow(run.flow_id).name
        return self._flow_names[run.flow_id]
