"""HTTP to one address of an OpenAI-compatible API, with the errors of the openai package.

The package's own transport makes several objects of its own for every call, which costs more processor time than all
else we do for a reply; aiohttp beneath it, asked directly, answers several times as many calls per second
(`benchmarks/teacher_client.py` shows both). Its error types are kept, for they are what users of such endpoints know.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
import openai

from schemas.errors import TeacherMisconfigured

MAX_REPLY_BYTES = 16 * 2**20
"""Longest body that is read. A reply of 32,000 tokens with its log-probabilities is a tenth of it."""
_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 4.0
"""vLLM's server closes idle connections after 5 s; reusing one at that very moment would cost a retry."""

NO_KEY = "none"
"""Sent where no key is set: servers that want none take any."""
_SHORTEST_KEY = 8
"""Characters; shorter keys are placeholders, and may stand in any message as a word."""

STATUS_ERRORS: Mapping[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


class ReplyTooLong(Exception):
    """The body exceeds `MAX_REPLY_BYTES`."""


class Transport:
    """Connections to one address, used in one event loop; `close` ends them. url: of the API, ending in /v1.

    Raises TeacherMisconfigured: if address or key cannot be used at all.
    """

    def __init__(self, url: str, *, api_key_env: str) -> None:
        self.url = url.rstrip("/")
        self._proxy = _proxy_of(_checked_address(url))
        self._headers = {
            "Authorization": f"Bearer {_api_key(api_key_env)}",
            # Compressing a reply saves nothing next to generating it, and a small body could unpack to gigabytes.
            "Accept-Encoding": "identity",
        }
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, path: str, content: bytes, headers: Mapping[str, str]) -> bytes:
        """Returns the body of the answer to a JSON body.

        Raises openai.APIStatusError: for any status that is not 2xx. ReplyTooLong: if the body is too long to be read.
        httpx2.ConnectTimeout: if there is no connection in time. aiohttp.ClientError, OSError: if the connection fails.
        """
        return await self._request("POST", self.url + path, content, headers)

    async def get(self, path: str) -> bytes:
        """Returns the body at a path below /v1. Raises as `post` does."""
        return await self._request("GET", self.url + path, None, {})

    async def get_beside(self, path: str) -> bytes:
        """Returns the body at a path beside /v1, where servers tell of themselves. Raises as `post` does."""
        return await self._request("GET", self.url.removesuffix("/v1") + path, None, {})

    async def _request(self, method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> bytes:
        session = self._opened()
        try:
            async with session.request(method, url, data=content, headers=headers, allow_redirects=False) as response:
                body = await _read(response)
                if 200 <= response.status < 300:
                    return body
                raise _status_error(method, url, response, self._without_key(body))
        except aiohttp.ConnectionTimeoutError:
            pass
        # Raised here, so that it has no cause: aiohttp's is a TimeoutError, as if an answer had taken too long.
        raise httpx2.ConnectTimeout(f"no connection within {_CONNECT_SECONDS:g} s")

    def _without_key(self, body: bytes) -> bytes:
        """Returns what a server says of a failure without our key, which some repeat: it goes into logs and fates."""
        key = self._headers["Authorization"].removeprefix("Bearer ")
        return body.replace(key.encode(), b"[the key]") if len(key) >= _SHORTEST_KEY else body

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={**self._headers, "Content-Type": "application/json"},
                # How many calls are under way is decided by admission, not by a pool of connections.
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=_KEEPALIVE_SECONDS, socket_factory=_watched_socket
                ),
                # The caller bounds the whole call; a limit per read would not end a body that drips for ever.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                proxy=self._proxy,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _checked_address(url: str) -> SplitResult:
    """Returns the parts of an address. Raises TeacherMisconfigured: if nothing can be asked there."""
    try:
        address = urlsplit(url)
        is_usable = address.scheme in {"http", "https"} and bool(address.hostname) and address.port != 0
    except ValueError:  # of the port, or of brackets that do not match
        is_usable = False
    if not is_usable:
        raise TeacherMisconfigured(
            f"the teacher's address {url!r} is no http address; it looks like http://127.0.0.1:8000/v1"
        )
    if address.username is not None:
        raise TeacherMisconfigured(
            f"the teacher's address at {address.hostname} holds a user name; the key goes into the environment "
            "variable that api_key_env names"
        )
    return address


def _proxy_of(address: SplitResult) -> str | None:
    """Returns the proxy that the environment names for an address.

    Looked up once. aiohttp's own `trust_env` asks in a thread for every call, and once ~/.netrc has a password for the
    host, it refuses each call for having two keys.
    """
    host = address.hostname or ""
    # A proxy cannot reach this machine's own loopback.
    if host in {"localhost", "127.0.0.1", "::1"} or proxy_bypass(host):
        return None
    proxy = getproxies().get(address.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _api_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip() or NO_KEY
    if not key.isascii() or not key.isprintable():
        raise TeacherMisconfigured(f"the environment variable {variable} holds characters that no API key has")
    return key


async def _read(response: aiohttp.ClientResponse) -> bytes:
    length = response.content_length
    if length is not None and length <= MAX_REPLY_BYTES:
        return await response.read()
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in response.content.iter_any():
        num_bytes += len(chunk)
        if num_bytes > MAX_REPLY_BYTES:
            raise ReplyTooLong(f"the answer is longer than {MAX_REPLY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _status_error(method: str, url: str, response: aiohttp.ClientResponse, content: bytes) -> openai.APIStatusError:
    status = response.status
    kind = STATUS_ERRORS.get(status, openai.InternalServerError if status >= 500 else openai.APIStatusError)
    body: Any
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        body = body.get("error", body)
    retry_after = response.headers.get("Retry-After")
    shown = httpx2.Response(
        status,
        headers={} if retry_after is None else {"retry-after": retry_after},
        content=content,
        request=httpx2.Request(method, url),
    )
    return kind(f"HTTP {status}", response=shown, body=body)


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Returns a socket on which a host that is cut off is noticed within 25 s: such a host closes no connection.

    A server that takes long to answer is not such a host: its system acknowledges the probes.
    """
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setblocking(False)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened
