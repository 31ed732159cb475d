"""What Prefect's server keeps and for how long, so that a year of nights takes no more room than a month of them.

The server's own vacuum does the work, in its database, whatever that is: flow runs that ended long ago go with their
stages, task runs, logs and artifacts; events go, heartbeats sooner. It leaves flow runs alone unless it is told
otherwise, so `Keep.server_environment` tells it. `prune` does by the server's API what the vacuum leaves for ever: runs
that never ended (late, pending, paused, or left "Running" by a lost host), and workers that went long ago. `bimode
watch` prunes once a day, `bimode prune` at once; the latter also serves a server whose settings are not ours.

Freed pages are used again, so files stop growing and do not shrink: SQLite's by its free list, PostgreSQL's by
autovacuum, which is on unless somebody switched it off (`python -m benchmarks.retention` shows a year of both).

What a corpus needs is not here: versions, replies and shards lie in work folders, and `bimode collect` bounds those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

VARIABLE = "BIMODE_KEEP_DAYS"
_EVENTS, _HEARTBEATS = timedelta(days=7), timedelta(days=1)
_BATCH = 1000
"""Rows that the vacuum deletes in one transaction; Prefect's own 200 takes five times as many for a busy night."""
_PAGE = 200
_BULK = 50
"""Prefect's limit for one call."""
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_NEVER_ENDED = ("SCHEDULED", "PENDING", "PAUSED", "CANCELLING", "RUNNING")


@dataclass(frozen=True, slots=True)
class Keep:
    """How long the server keeps what. runs: since their end. events, heartbeats: since they happened."""

    runs: timedelta = timedelta(days=30)
    events: timedelta = _EVENTS
    heartbeats: timedelta = _HEARTBEATS

    @classmethod
    def of_days(cls, days: float) -> Keep:
        """Returns what is kept if runs are kept so long. Raises ConfigError: it is too short for a night to pass."""
        if not 1 <= days < 36_500:
            raise ConfigError(f"runs cannot be kept for {days} days ({VARIABLE}, --keep-days): it is 1 at least")
        runs = timedelta(days=days)
        return cls(runs, min(_EVENTS, runs), min(_HEARTBEATS, runs))

    @classmethod
    def chosen(cls, environment: Mapping[str, str] = os.environ) -> Keep:
        """Returns what the environment says. Raises ConfigError."""
        text = environment.get(VARIABLE)
        if not text:
            return cls()
        try:
            return cls.of_days(float(text))
        except ValueError:
            raise ConfigError(f"{VARIABLE} is {text!r}, which is no number of days") from None

    def server_environment(self) -> dict[str, str]:
        """Returns the settings of Prefect's server that keep so much."""
        overrides = {"prefect.flow-run.heartbeat": self.heartbeats.total_seconds()}
        return {
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(int(self.runs.total_seconds())),
            "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": json.dumps(overrides),
            "PREFECT_SERVER_SERVICES_DB_VACUUM_BATCH_SIZE": str(_BATCH),
            "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{int(self.events.total_seconds())}S",
        }


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a pruning removed: runs that ended long ago, runs that never ended, workers that went long ago."""

    num_ended: int
    num_never_ended: int
    num_workers: int

    def __str__(self) -> str:
        return (
            f"removed {self.num_ended} runs that ended long ago, {self.num_never_ended} that never ended, and "
            f"{self.num_workers} workers that went long ago"
        )


def prune(client: SyncPrefectClient, keep: Keep, *, is_rehearsed: bool = False) -> Pruned:
    """Removes by the server's API what is older than is kept, but for a run that still gives signs of life.

    is_rehearsed: count only. Raises httpx.HTTPError, PrefectHTTPStatusError: the server does not answer or refuses.
    """
    before = datetime.now(UTC) - keep.runs
    ended = _remove_runs(client, _ENDED, {"end_time": {"before_": before.isoformat()}}, (), is_rehearsed)
    old = {"expected_start_time": {"before_": before.isoformat()}}
    alive = _runs_alive(client, old)
    return Pruned(
        ended,
        _remove_runs(client, _NEVER_ENDED, old, alive, is_rehearsed),
        _remove_workers(client, before, is_rehearsed),
    )


def _remove_runs(
    client: SyncPrefectClient,
    states: Collection[str],
    condition: Mapping[str, Any],
    spared: Collection[str],
    is_rehearsed: bool,
) -> int:
    """Removes the runs in one of the states that meet a condition, and returns how many there were."""
    wanted = {"state": {"type": {"any_": list(states)}}, **condition, "id": {"not_any_": list(spared)}}
    if is_rehearsed:
        return int(_post(client, "/flow_runs/count", {"flow_runs": wanted}))
    removed = 0
    while found := _post(client, "/flow_runs/bulk_delete", {"flow_runs": wanted, "limit": _BULK})["deleted"]:
        removed += len(found)
    return removed


def _runs_alive(client: SyncPrefectClient, condition: Mapping[str, Any]) -> list[str]:
    """Returns the runs among old ones that work: a training may take longer than others are kept."""
    body = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}, **condition}, "sort": "START_TIME_ASC"}
    return [run["id"] for run in _pages(client, "/flow_runs/filter", body) if _was_heard(client, run["id"])]


def _was_heard(client: SyncPrefectClient, run_id: str) -> bool:
    from flows.heartbeats import HEARTBEAT  # noqa: PLC0415 - Prefect takes seconds to import

    since = datetime.now(UTC) - _HEARTBEATS
    wanted = {
        "event": {"name": [HEARTBEAT]},
        "resource": {"id": [f"prefect.flow-run.{run_id}"]},
        "occurred": {"since": since.isoformat()},
    }
    return bool(_post(client, "/events/filter", {"filter": wanted, "limit": 1})["events"])


def _remove_workers(client: SyncPrefectClient, before: datetime, is_rehearsed: bool) -> int:
    """Removes the workers that were last heard of before a moment: each start under a new name leaves one."""
    removed = 0
    for pool in list(_pages(client, "/work_pools/filter", {})):
        address = f"/work_pools/{pool['name']}/workers"
        for worker in list(_pages(client, f"{address}/filter", {})):
            heard = worker["last_heartbeat_time"]
            if heard is not None and datetime.fromisoformat(heard) < before:
                removed += 1
                if not is_rehearsed:
                    client.request("DELETE", f"{address}/{{name}}", path_params={"name": worker["name"]})  # type: ignore[arg-type]
    return removed


def _pages(client: SyncPrefectClient, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    offset = 0
    while found := _post(client, path, {**body, "limit": _PAGE, "offset": offset}):
        yield from found
        offset += len(found)


def _post(client: SyncPrefectClient, path: str, body: Mapping[str, Any]) -> Any:
    return client.request("POST", path, json=body).json()  # type: ignore[arg-type]
