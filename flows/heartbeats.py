"""Signs of life of a deployed run, and how one that was given up for lost makes way for the run in its place.

Prefect's own heartbeat comes every 30 seconds at most often. A run beats every `BEAT_SECONDS`, by the same event, so
that `flows.restarts` knows within half a minute that a host is gone.

A run that fell silent may be alive: its host was cut off from the server. The run in its place (tag `RESTART`) cannot
begin while the other one holds the work folder, and the server cannot reach that one; but both see the folder. So the
waiting run asks there, by a file whose content changes every second, and the holder decides. Is it in contact with the
server, it works on, and the other waits. Otherwise it kills its own process, as a power cut would: what was done is
kept by the work folder, and nothing of a killed run is paid for twice (`benchmarks.killing`). A training does the same
over the folder of the program at work, which its supervisor ends, with time for a checkpoint.

Runs without a deployment neither beat nor make way: who started them by hand sees how they are. Prefect takes seconds
to import, so commands that only hold a folder do without it.
"""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

HEARTBEAT = "prefect.flow-run.heartbeat"
BEAT_SECONDS = 5.0
RESTART = "restart"
"""Tag of a run that takes the place of a crashed one."""
WANTED_FILE = ".wanted"
YIELD_SECONDS = 4.0
"""So long a holder that is asked to make way must have been out of contact with the server."""
_FLOW_RUN_MARK = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect gives to the process of a flow run."""
_LOOK_SECONDS = 1.0
_CONTACT_SECONDS = 1.0
"""For each of the four attempts that Prefect's client makes to connect."""

_log = logging.getLogger(__name__)


def deployed_run() -> FlowRun | None:
    """Returns the flow run of a deployment in which this is called, or None."""
    if _FLOW_RUN_MARK not in os.environ:
        return None
    from prefect.context import FlowRunContext  # noqa: PLC0415

    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    return run if run is not None and run.deployment_id is not None else None


def is_restart() -> bool:
    """Returns whether this is called in a run that takes the place of a crashed one."""
    run = deployed_run()
    return run is not None and RESTART in run.tags


def ask_to_make_way(folder: Path) -> None:
    """Asks the run that holds a work folder to make way if it is cut off; called again and again while waiting."""
    if is_restart():
        with suppress(OSError):  # the folder's holder will say what is wrong with the disk
            (folder / WANTED_FILE).write_text(uuid4().hex, encoding="utf-8")


class Pulse:
    """The thread that beats for a run, and looks whether another wants the folder it holds."""

    def __init__(self, run: FlowRun) -> None:
        self._resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name or ""}
        self._related = [
            {"prefect.resource.id": f"prefect.flow.{run.flow_id}", "prefect.resource.role": "flow"},
            {"prefect.resource.id": f"prefect.deployment.{run.deployment_id}", "prefect.resource.role": "deployment"},
        ]
        self._wanted: Path | None = None
        self._stopped = threading.Event()
        # The server's address is part of the flow run's context, which a new thread does not have.
        body = contextvars.copy_context().run
        self._thread = threading.Thread(target=body, args=(self._live,), name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5 * _CONTACT_SECONDS)

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Within, the run holds a folder, and makes way if it is cut off and another run asks."""
        self._wanted = folder / WANTED_FILE
        try:
            yield
        finally:
            self._wanted = None
            with suppress(OSError):
                (folder / WANTED_FILE).unlink(missing_ok=True)

    def _live(self) -> None:
        beaten, asked, alone_since = -BEAT_SECONDS, None, None
        while not self._stopped.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                self._beat()
            asks = self._asked()
            if asked is None or asks in (None, asked) or is_in_contact():
                asked, alone_since = asks, None
                continue
            # Not noted as seen: a waiting run asks anew every second, but a slow look must not lose count.
            alone_since = now if alone_since is None else alone_since
            if time.monotonic() - alone_since >= YIELD_SECONDS:
                self._make_way()

    def _beat(self) -> None:
        from prefect.events import emit_event  # noqa: PLC0415

        try:
            emit_event(HEARTBEAT, resource=self._resource, related=self._related)
        except Exception:  # noqa: BLE001 - Prefect's client raises anything; a lost beat must not end the next ones
            _log.debug("a heartbeat was lost", exc_info=True)

    def _asked(self) -> str | None:
        """Returns what a waiting run wrote last; another text than before: it is waiting now. None: nothing is held."""
        wanted = self._wanted
        try:
            return None if wanted is None else wanted.read_text(encoding="utf-8")
        except OSError:
            return ""

    def _make_way(self) -> None:
        if self._wanted is None:  # the run has just ended by itself
            return
        _log.error(
            "this run is cut off from Prefect's server, which has put another one in its place; making way for it"
        )
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def beating() -> Iterator[Pulse | None]:
    """Beats for the flow run in whose context it is entered, if a deployment started it."""
    run = deployed_run()
    if run is None:
        yield None
        return
    pulse = Pulse(run)
    pulse.start()
    try:
        yield pulse
    finally:
        pulse.stop()


def is_in_contact() -> bool:
    """Returns whether Prefect's server answers this process, asked as every other call of it is: login, TLS, proxy."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.settings import (  # noqa: PLC0415
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    if PREFECT_API_URL.value() is None:
        return True  # a server within this very process
    at_once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _CONTACT_SECONDS}
    with temporary_settings(at_once), get_client(sync_client=True) as client:
        return client.api_healthcheck() is None
