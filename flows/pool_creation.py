"""Creates the work pool on Prefect's server, with a work queue for each priority (`flows.gpu_queue`)."""

from __future__ import annotations

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound, PrefectException

from flows.pools import PoolKind, Template, queue_priorities
from schemas.errors import ConfigError


def create_pool(name: str, kind: PoolKind, template: Template, *, limit: int | None) -> bool:
    """Creates a work pool, or brings the one of this name up to date; returns whether it is new.

    limit: runs at once, over all workers; None leaves that of an existing pool as it is.

    Raises ConfigError: the pool is of another kind, or Prefect's server does not take it or does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            is_new = _put_pool(client, name, kind, template, limit)
            for queue, priority in queue_priorities().items():
                _put_queue(client, name, queue, priority)
    except (httpx.HTTPError, PrefectException) as error:
        raise ConfigError(f"Prefect's server did not take the work pool {name}: {error}") from error
    return is_new


def _put_pool(client: SyncPrefectClient, name: str, kind: PoolKind, template: Template, limit: int | None) -> bool:
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=limit)
        )
        return True
    if pool.type != kind:
        raise ConfigError(
            f"the work pool {name} is of the kind {pool.type}, which cannot be changed: delete it (`prefect work-pool "
            f"delete {name}`), or choose another --name"
        )
    changes = {"base_job_template": template} | ({} if limit is None else {"concurrency_limit": limit})
    client.update_work_pool(name, WorkPoolUpdate.model_validate(changes))
    return False


def _put_queue(client: SyncPrefectClient, pool: str, name: str, priority: int) -> None:
    try:
        queue = client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(name, priority=priority, work_pool_name=pool)
        return
    if queue.priority != priority:
        client.update_work_queue(queue.id, priority=priority)
