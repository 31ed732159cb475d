"""The Prefect server that a command speaks to: of `--api-url`, of PREFECT_API_URL, or of `bimode up`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ApiUrlOption = Annotated[
    str | None,
    typer.Option(help="Address of the Prefect server; PREFECT_API_URL or the server of `bimode up` by default."),
]


def known_url(api_url: str | None) -> str:
    """Returns the address of the server. Raises ConfigError: none is known."""
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - Prefect takes seconds to import

    from flows import stack  # noqa: PLC0415

    status = stack.status()
    url = api_url or PREFECT_API_URL.value() or (status.api_url if status.server_pid is not None else None)
    if url is None:
        raise ConfigError(
            "no Prefect server is known: start one with `bimode up`, set PREFECT_API_URL or use --api-url"
        )
    return url


@contextmanager
def prefect_server(api_url: str | None) -> Iterator[SyncPrefectClient]:
    """Yields a client of the server. Raises ConfigError: none is known. StackError: it does not answer, or refuses."""
    import httpx  # noqa: PLC0415
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.exceptions import PrefectHTTPStatusError  # noqa: PLC0415
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415

    from flows.processes import StackError  # noqa: PLC0415

    url = known_url(api_url)
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise StackError(f"the Prefect server at {url} refused: {error.response.text[:500]}") from error
    except httpx.HTTPError as error:
        raise StackError(f"the Prefect server at {url} does not answer: {error}") from error
