"""Addresses and proxies of a transport; how calls succeed and fail over it is tested through the client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

import teacher.transport as transport_module
from schemas.errors import TeacherMisconfigured
from teacher.failures import UNREACHABLE, trouble_of_exception
from teacher.transport import Transport


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """Yields host and port of a proxy that answers all calls itself, and the heads of the calls it got."""
    heads: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nanswer")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}", heads


@pytest.mark.parametrize("scheme", ["http://me:secret@", "me:secret@"])
async def test_calls_go_through_the_proxy_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    async with proxy() as (place, heads):
        monkeypatch.setenv("http_proxy", scheme + place)
        monkeypatch.setenv("no_proxy", "")
        async with Transport("http://teacher.invalid/v1", api_key_env="NO_KEY") as transport:
            assert await transport.get("/models") == b"answer"
    [head] = heads
    assert head.startswith("GET http://teacher.invalid/v1/models HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in head


async def test_a_password_in_netrc_does_not_meddle_with_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("TEACHER_KEY", "ours")
    async with proxy() as (place, heads):
        monkeypatch.setenv("http_proxy", f"http://{place}")
        monkeypatch.setenv("no_proxy", "")
        async with Transport("http://teacher.invalid/v1", api_key_env="TEACHER_KEY") as transport:
            await transport.get("/models")
    assert "Authorization: Bearer ours\r\n" in heads[0] and "Basic" not in heads[0]


async def test_hosts_that_the_environment_exempts_and_this_machine_are_asked_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with proxy() as (place, heads):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "")
        async with Transport(f"http://{place}/v1", api_key_env="NO_KEY") as transport:
            assert await transport.get("/models") == b"answer"
        monkeypatch.setenv("no_proxy", "localtest.invalid,0.0.0.0")
        async with Transport(f"http://{place.replace('127.0.0.1', '0.0.0.0')}/v1", api_key_env="NO_KEY") as transport:
            assert await transport.get("/models") == b"answer"
    assert all(head.startswith("GET /v1/models HTTP/1.1\r\n") for head in heads) and len(heads) == 2


@pytest.mark.parametrize(
    "url", ["ftp://teacher/v1", "teacher:8000/v1", "http:///v1", "http://teacher:99999/v1", "http://[::1/v1", ""]
)
def test_an_address_where_nothing_can_be_asked_is_refused(url: str) -> None:
    with pytest.raises(TeacherMisconfigured, match="is no http address"):
        Transport(url, api_key_env="NO_KEY")


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(TeacherMisconfigured, match="holds a user name") as caught:
        Transport("http://me:secret@teacher/v1", api_key_env="NO_KEY")
    assert "secret" not in str(caught.value)


async def test_a_host_that_takes_no_connection_in_time_has_not_seen_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "_CONNECT_SECONDS", 0.2)
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # they fill its queue; the system drops what comes further
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        async with Transport(url, api_key_env="NO_KEY") as transport:
            with pytest.raises(httpx2.ConnectTimeout, match=r"no connection within 0\.2 s") as caught:
                await transport.post("/chat/completions", b"{}", {})
    assert trouble_of_exception(caught.value).handling is UNREACHABLE
