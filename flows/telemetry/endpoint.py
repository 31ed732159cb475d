"""The HTTP endpoint at which Prometheus finds the metrics of a process, while its run lasts.

Why no Pushgateway: a run takes minutes to days, so it is scraped like any server, and `up` says when it died. What is
left to be known once the process has gone is in a file (`flows.telemetry.last_run`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from flows.telemetry.settings import TelemetrySettings

_log = logging.getLogger(__name__)


@contextmanager
def served(settings: TelemetrySettings, registry: CollectorRegistry) -> Iterator[int | None]:
    """Serves /metrics while the block lasts; yields the port, None where none was asked for or free.

    A port that is taken stops no run: it is said, and the run goes on unwatched.
    """
    opened = _open(settings, registry)
    if opened is None:
        yield None
        return
    server, thread, port = opened
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _open(settings: TelemetrySettings, registry: CollectorRegistry) -> tuple[WSGIServer, Thread, int] | None:
    problem: OSError | None = None
    for port in settings.metrics_port:
        try:
            server, thread = start_http_server(port, settings.metrics_host, registry)
        except OSError as error:
            problem = error
            continue
        _log.info("metrics at http://%s:%d/metrics", settings.metrics_host, port)
        return server, thread, port
    if problem is not None:
        ports = "-".join(str(port) for port in dict.fromkeys((settings.metrics_port[0], settings.metrics_port[-1])))
        _log.warning(
            "no metrics: BIMODE_METRICS_PORT=%s cannot be used on %s (%s)", ports, settings.metrics_host, problem
        )
    return None
