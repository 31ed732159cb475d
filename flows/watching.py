"""The watch over the flow runs of one Prefect server: looks every few seconds, prunes once a day.

    bimode watch [--api-url http://HOST:4200/api]          beside the server; `bimode up` starts it

What it decides is in `flows.restarts` and `flows.retention`; here are its loop and its process.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows.processes import Report
from flows.restarts import EVERY_SECONDS, SILENCE_SECONDS, Patience, Watch
from flows.retention import Keep, prune

_REQUEST_SECONDS = 10.0
_FIRST_PRUNE_SECONDS, _PRUNE_SECONDS = 300.0, 24 * 3600.0

_log = logging.getLogger("bimode.watch")


def watch(
    api_url: str,
    report: Report,
    stopped: threading.Event,
    patience: Patience | None = None,
    keep: Keep | None = None,
) -> None:
    """Looks every few seconds until it is told to stop, and prunes once a day. A server that is away is waited for."""
    keep = keep or Keep.chosen()
    with _client(api_url) as client:
        watching, is_away, prune_at = Watch(client, report, patience), False, time.monotonic() + _FIRST_PRUNE_SECONDS
        while not stopped.is_set():
            try:
                watching.look()
                if time.monotonic() >= prune_at:
                    prune_at = time.monotonic() + _PRUNE_SECONDS
                    report(str(prune(client, keep)))
                if is_away:
                    report(f"the server at {api_url} answers again; silence counts from now on")
                is_away = False
            except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                if not is_away:
                    report(f"the server at {api_url} does not answer ({type(error).__name__}); waiting for it")
                is_away = True
            stopped.wait(EVERY_SECONDS)


@contextmanager
def _client(api_url: str) -> Iterator[SyncPrefectClient]:
    settings = {
        PREFECT_API_URL: api_url,
        PREFECT_CLIENT_MAX_RETRIES: 0,  # it looks again anyway
        PREFECT_API_REQUEST_TIMEOUT: _REQUEST_SECONDS,
    }
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def watch_until_signalled(
    api_url: str, report: Report, patience: Patience | None = None, keep: Keep | None = None
) -> None:
    """Watches until SIGTERM or SIGINT."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    watch(api_url, report, stopped, patience, keep)


def main() -> None:
    """Watches the server of PREFECT_API_URL; what `bimode up` starts."""
    parser = argparse.ArgumentParser(prog="python -m flows.watching", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--silence", type=float, default=SILENCE_SECONDS, help="of a run, in seconds")
    options = parser.parse_args()
    url = PREFECT_API_URL.value()
    assert url is not None, "whoever starts this names the server"
    logging.basicConfig(format="%(asctime)s %(message)s")
    _log.setLevel(logging.INFO)
    watch_until_signalled(url, _log.info, Patience(options.silence))


if __name__ == "__main__":
    main()
