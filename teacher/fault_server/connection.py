"""HTTP/1.1 as the fault server needs it: requests read, responses rendered, connections cut and reset."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, cast

_log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 2**16


@dataclass(slots=True)
class Request:
    """method and path as they came, without the query; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    num_bytes: int
    is_last: bool
    content: bytes = b""


def _parse_head(head: bytes) -> Request:
    """Returns the request that a head announces. Raises ValueError: if it is none of HTTP/1.1 that we take."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if version not in {"HTTP/1.1", "HTTP/1.0"}:
        raise ValueError(f"{version!r} is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(f"a header without a colon: {line[:100]!r}")
        headers[name.lower()] = value.strip()
    if "transfer-encoding" in headers:
        raise ValueError("chunked requests are not taken; send Content-Length")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise ValueError(f"Content-Length is {length[:100]!r}")
    connection = headers.get("connection", "").lower()
    is_last = connection == "close" or (version == "HTTP/1.0" and connection != "keep-alive")
    return Request(method, target.partition("?")[0], headers, int(length), is_last)


def render_response(
    status: int, content: bytes, *, headers: Sequence[tuple[str, str]] = (), content_type: str = "application/json"
) -> bytes:
    """Returns a whole HTTP/1.1 response; Content-Length fits the content."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\nContent-Type: {content_type}\r\n{lines}"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode("latin-1") + content


_REASONS = {int(status): status.phrase for status in HTTPStatus}


def render_error(
    status: int, message: str, *, param: str | None = None, headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """Returns a whole refusal in vLLM's form."""
    kind = _REASONS.get(status, "Error").title().replace(" ", "") + ("" if status >= 500 else "Error")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return render_response(status, json.dumps({"error": error}).encode(), headers=headers)


class Handler(Protocol):
    """What a connection needs of its server. max_body_bytes: a longer request is refused with a 413."""

    max_body_bytes: int

    def greet(self, connection: Connection) -> None:
        """Called when a connection begins."""

    def forget(self, connection: Connection) -> None:
        """Called when it has ended."""

    def handle(self, connection: Connection, request: Request) -> None:
        """Answers a request with `send`, or by a coroutine with `start`."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection: requests come in, and one after the other is handed to the server."""

    def __init__(self, server: Handler) -> None:
        self._server = server
        self._buffer = bytearray()
        self._head: Request | None = None
        self._is_answering = False
        self._is_last = False
        self._num_to_discard = 0
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.greet(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.forget(self)
        if self._task is not None:
            self._task.cancel()  # as vLLM aborts the sequences of a client that has left

    def data_received(self, data: bytes) -> None:
        if self._num_to_discard:
            self._num_to_discard -= len(data)
            if self._num_to_discard <= 0:
                self._transport.close()
            return
        self._buffer += data
        self._advance()

    def send(self, response: bytes) -> None:
        """Answers the request in hand."""
        self.write(response)
        self._is_answering = False
        if self._is_last:
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Writes a part of an answer."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Ends the connection in order, whatever was promised."""
        self._transport.close()

    def reset(self) -> None:
        """Breaks the connection with a TCP reset."""
        if not self._transport.is_closing():
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def start(self, answering: Coroutine[Any, Any, None], on_end: Callable[[], None]) -> None:
        """Answers the request in hand by a coroutine, which ends early when the client leaves."""
        self._task = asyncio.get_running_loop().create_task(answering)

        def end(task: asyncio.Task[None]) -> None:
            on_end()
            if task.cancelled():
                return
            if (error := task.exception()) is not None:
                self._fail(error)
            self._advance()

        self._task.add_done_callback(end)

    def _advance(self) -> None:
        while not self._is_answering and not self._transport.is_closing():
            request = self._take_request()
            if request is None:
                return
            self._is_answering = True
            self._is_last = request.is_last
            try:
                self._server.handle(self, request)
            except Exception as error:  # noqa: BLE001 (a function of the user: logged, told, and never an answer)
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Answers with a 500 what a function of the server's user (an answer, a predicate) raised."""
        _log.error("a call could not be answered", exc_info=error)
        self.send(render_error(500, repr(error)))

    def _take_request(self) -> Request | None:
        """Returns the next request once all of it has come."""
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEAD_BYTES:
                    self._refuse(431, f"the headers are longer than {_MAX_HEAD_BYTES} bytes")
                return None
            try:
                head = _parse_head(bytes(self._buffer[:end]))
            except ValueError as error:
                self._refuse(400, f"the request cannot be read: {error}")
                return None
            del self._buffer[: end + 4]
            if head.num_bytes > self._server.max_body_bytes:
                self._num_to_discard = head.num_bytes - len(self._buffer)
                self._refuse(413, f"the body is longer than {self._server.max_body_bytes} bytes")
                return None
            self._head = head
            if head.headers.get("expect") == "100-continue":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if len(self._buffer) < self._head.num_bytes:
            return None
        request, self._head = self._head, None
        request.content = bytes(self._buffer[: request.num_bytes])
        del self._buffer[: request.num_bytes]
        return request

    def _refuse(self, status: int, message: str) -> None:
        """Answers what cannot be read, and takes nothing further.

        What the client still sends is read and dropped: a socket closed before would reset it, answer and all.
        """
        self.write(render_error(status, message, headers=[("Connection", "close")]))
        self._is_answering = True
        if self._num_to_discard <= 0:
            self._transport.close()
