"""The fault server itself: routes, the log of calls, faults carried out, an engine that dies and comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast
from urllib.parse import unquote

from schemas.errors import ConfigError
from teacher.fault_server.answers import (
    Answer,
    Body,
    content_parts,
    hashed_answer,
    joined_completion,
    num_choices,
    num_generated_tokens,
    num_prompt_tokens,
    sha256_of_json,
    text_completion,
)
from teacher.fault_server.connection import Connection, Request, render_error, render_response
from teacher.fault_server.engine import EngineLife, EngineModel, render_metrics
from teacher.fault_server.schedule import (
    STATUS_FAULTS,
    WITH_RETRY_AFTER,
    Fault,
    FaultSchedule,
    Restarts,
    damaged_content,
    damaged_reply,
)

_log = logging.getLogger(__name__)

_MAX_CHOICES = 1024
_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the server saw it.

    number: order of arrival, from 0. began: seconds since the epoch. digest: sha256 (hex) of all that it asks.
    question: of its messages alone; question, seed and n name the samples it asks for. num_asked: how often the same
    had been asked before. index, purpose: from the client's headers.
    """

    number: int
    began: float
    digest: str
    question: str
    num_asked: int
    purpose: str
    index: int
    seed: int | None
    n: int
    model: str
    fault: Fault | None
    body: Body = field(repr=False, compare=False)
    headers: Mapping[str, str] = field(repr=False, compare=False)

    def to_record(self) -> Body:
        """Returns what is logged: everything but body and headers."""
        return {name: getattr(self, name) for name in _LOGGED}


_LOGGED = tuple(name for name in Call.__dataclass_fields__ if name not in {"body", "headers"})


class FaultServer:
    """The server, in a thread of its own, between `start` and `stop` (or in a `with`).

    models: what /v1/models lists; a call for another is a 404. unknown_fields: names of fields of a call (or of a part
    of its messages) that are refused with a 400, as OpenAI refuses those of vLLM. api_key: demanded if given.
    max_body_bytes: a longer body is a 413. log_path: a JSON line of each call is appended there as it begins.
    keep_calls: whether `calls` keeps them with their bodies; without it memory grows by some 200 bytes a request.

    num_calls and num_deaths count since the start; num_in_flight and max_in_flight count the calls that take time, now
    and at most. `faults` may be replaced while the server runs.

    Raises ConfigError: from `start`, where it cannot listen or log.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        models: Sequence[str] = ("teacher",),
        faults: FaultSchedule | None = None,
        engine: EngineModel | None = None,
        restarts: Restarts | None = None,
        unknown_fields: Sequence[str] = (),
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        max_body_bytes: int = 2**26,
        log_path: Path | None = None,
        keep_calls: bool = True,
    ) -> None:
        self.answer = answer or hashed_answer()
        self.models = tuple(models)
        self.faults = faults or FaultSchedule()
        self.engine_model = engine or EngineModel()
        self.restarts = restarts or Restarts()
        self.unknown_fields = frozenset(unknown_fields)
        self.api_key = api_key
        self.host, self.port = host, port
        self.max_body_bytes = max_body_bytes
        self.log_path = log_path
        self.keep_calls = keep_calls
        self.calls: list[Call] = []
        self.num_calls = 0
        self.num_deaths = 0
        self.num_in_flight = 0
        self.max_in_flight = 0
        self._times_asked: Counter[str] = Counter()
        self._connections: set[Connection] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._life: EngineLife
        self._stopped: asyncio.Event
        self._emptied: asyncio.Event
        self._log_file: TextIO | None = None
        self._holder: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._down_until = 0.0

    @property
    def address(self) -> str:
        """Where /health and /metrics are."""
        return f"http://{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base address of the API, as the openai package wants it."""
        return f"{self.address}/v1"

    @property
    def num_repeated(self) -> int:
        """How many calls asked the very same as an earlier one."""
        return self._times_asked.total() - len(self._times_asked)

    def start(self) -> FaultServer:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(started)), name="fault-server")
        self._thread.daemon = True
        self._thread.start()
        try:
            started.result()
        except OSError as error:
            self._thread.join()
            self._thread = None
            raise ConfigError(f"the fault server cannot listen on {self.host}:{self.port}, or log: {error}") from error
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> FaultServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def restart(self) -> None:
        """Kills the engine from any thread; it comes back after `down_seconds`."""
        self._loop.call_soon_threadsafe(self._die)

    async def _live(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._emptied = asyncio.Event()
        self._life = EngineLife(self.engine_model)
        try:
            try:
                if self.log_path is not None:
                    self._log_file = self.log_path.open("a", encoding="utf-8", buffering=1)
                self._holder = _bound_socket(self.host, self.port)
                self.port = self._holder.getsockname()[1]
                await self._listen()
            except OSError as error:
                started.set_exception(error)
                return
            if self.restarts.every_seconds is not None:
                self._loop.call_later(self.restarts.every_seconds, self._die_regularly, self.restarts.every_seconds)
            started.set_result(None)
            await self._stopped.wait()
        finally:
            await self._shut_down()

    async def _shut_down(self) -> None:
        self._life.end()
        if self._reopening is not None:
            await self._reopening
        self._close_listener()
        for connection in list(self._connections):
            connection.reset()
        if self._connections:
            self._emptied.clear()
            await self._emptied.wait()
        if self._holder is not None:
            self._holder.close()
        if self._log_file is not None:
            self._log_file.close()

    # Listening and dying

    async def _listen(self) -> None:
        # Another socket keeps the port while none listens: connections are refused, and nobody else can take it.
        listening = _bound_socket(self.host, self.port)
        self._listener = await self._loop.create_server(lambda: Connection(self), sock=listening, backlog=4096)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _refuse_for(self, seconds: float) -> None:
        """Takes no connections for so long; does not shorten a longer time that has begun."""
        self._down_until = max(self._down_until, self._loop.time() + seconds)
        if self._listener is not None:
            self._close_listener()
            self._loop.call_at(self._down_until, self._reopen)

    def _reopen(self) -> None:
        if self._stopped.is_set():
            return
        if self._loop.time() < self._down_until:
            self._loop.call_at(self._down_until, self._reopen)
        else:
            self._reopening = self._loop.create_task(self._listen_again())

    async def _listen_again(self) -> None:
        while not self._stopped.is_set():
            try:
                await self._listen()
                return
            except OSError as error:
                _log.warning("the fault server cannot come back to %s yet: %s", self.address, error)
                await asyncio.sleep(_RETRY_SECONDS)

    def _die(self) -> None:
        self._refuse_for(self.restarts.down_seconds)
        self._life.end()
        for connection in list(self._connections):
            connection.reset()
        self._life = EngineLife(self.engine_model)
        self.num_deaths += 1  # last: who sees it finds the address closed

    def _die_regularly(self, every_seconds: float) -> None:
        self._die()
        self._loop.call_later(every_seconds, self._die_regularly, every_seconds)

    def greet(self, connection: Connection) -> None:
        """Called by a connection that begins."""
        self._connections.add(connection)
        if self._listener is None:
            connection.reset()  # it was accepted at the moment the engine died

    def forget(self, connection: Connection) -> None:
        """Called by a connection that has ended."""
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()

    # Answering

    def handle(self, connection: Connection, request: Request) -> None:
        """Answers a request, at once or later."""
        if request.path == "/v1/chat/completions":
            if request.method == "POST":
                self._complete(connection, request)
            else:
                connection.send(render_error(405, "Method Not Allowed"))
        elif request.method != "GET":
            connection.send(render_error(404, "Not Found"))
        elif request.path == "/health":
            connection.send(render_response(200, b""))
        elif request.path == "/metrics":
            connection.send(render_response(200, self._metrics(), content_type="text/plain; version=0.0.4"))
        elif request.path == "/v1/models":
            connection.send(self._models(request))
        else:
            connection.send(render_error(404, "Not Found"))

    def _models(self, request: Request) -> bytes:
        if not self._is_allowed(request):
            return render_error(401, "Unauthorized")
        models = [{"id": name, "object": "model", "owned_by": "fault-server"} for name in self.models]
        return render_response(200, json.dumps({"object": "list", "data": models}).encode())

    def _metrics(self) -> bytes:
        self._life.engine.advance(self._loop.time())
        return render_metrics(self._life.engine, self._life.started_at, self.models[0])

    def _is_allowed(self, request: Request) -> bool:
        return self.api_key is None or request.headers.get("authorization") == f"Bearer {self.api_key}"

    def _complete(self, connection: Connection, request: Request) -> None:
        try:
            body = _parse_body(request.content)
        except ValueError as error:
            call = self._begin_call(request, {}, hashlib.sha256(request.content).hexdigest())
            refusal: bytes | None = render_error(400, str(error))
        else:
            call = self._begin_call(request, body)
            refusal = self._refusal(request, body)
        if call.number in self.restarts.at_calls:
            self._die()
        elif call.fault is None and (refusal is not None or self.engine_model.is_instant):
            connection.send(refusal or self._good_answer(call))
        else:
            self.num_in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
            connection.start(self._answer_later(connection, call, refusal), self._end_call)

    def _end_call(self) -> None:
        self.num_in_flight -= 1

    def _begin_call(self, request: Request, body: Body, unreadable: str | None = None) -> Call:
        """Returns the call, logged. unreadable: the digest of a body that is no JSON."""
        question = sha256_of_json(body.get("messages")).hex()
        rest = {name: value for name, value in body.items() if name != "messages"}
        digest = unreadable or hashlib.sha256((question + json.dumps(rest, sort_keys=True)).encode()).hexdigest()
        num_asked = self._times_asked[digest]
        self._times_asked[digest] += 1
        index = request.headers.get("x-bimode-sample-index", "0")
        body["_purpose"] = unquote(request.headers.get("x-bimode-purpose", ""))
        body["_index"] = int(index) if index.isdecimal() else 0
        body["_question"] = question
        call = Call(
            number=self.num_calls,
            began=time.time(),
            digest=digest,
            question=question,
            num_asked=num_asked,
            purpose=body["_purpose"],
            index=body["_index"],
            seed=body.get("seed"),
            n=num_choices(body),
            model=str(body.get("model")),
            fault=self.faults.fault_of(digest, num_asked, body),
            body=body,
            headers=request.headers,
        )
        self.num_calls += 1
        if self.keep_calls:
            self.calls.append(call)
        if self._log_file is not None:
            self._log_file.write(json.dumps(call.to_record()) + "\n")
        return call

    def _refusal(self, request: Request, body: Body) -> bytes | None:
        """Returns the refusal that a set-up gets which does not fit this server."""
        if not self._is_allowed(request):
            return render_error(401, "Unauthorized")
        if body.get("model") not in self.models:
            return render_error(404, f"The model `{body.get('model')}` does not exist.", param="model")
        names = {name for message in body["messages"] for part in content_parts(message) for name in part}
        unknown = sorted(self.unknown_fields & (names | body.keys()))
        return render_error(400, f"Unrecognized request argument supplied: {unknown[0]}") if unknown else None

    def _reply(self, call: Call) -> Body | bytes:
        """Returns the good answer to a call, or the response that refuses it."""
        cached_tokens = 0
        if self.engine_model.cached_prompts:
            cached_tokens = self._life.cached_tokens(call.question, num_prompt_tokens(call.body))
        replies: list[Body] = []
        try:
            for choice in range(call.n):
                reply = self.answer(call.body, choice)
                if isinstance(reply, str):
                    reply = text_completion(reply, call.body, cached_tokens)
                replies.append(reply)
        except LookupError as error:
            return render_error(400, f"nothing to answer: {error}")
        return joined_completion(replies)

    def _good_answer(self, call: Call) -> bytes:
        """Returns the response of an engine that takes no time."""
        reply = self._reply(call)
        if isinstance(reply, bytes):
            return reply
        usage = reply.get("usage", {})
        self._life.engine.count(usage.get("prompt_tokens", 0) * call.n, usage.get("completion_tokens", 0))
        return render_response(200, json.dumps(reply).encode())

    async def _answer_later(self, connection: Connection, call: Call, refusal: bytes | None) -> None:
        """Answers a call that takes time or goes wrong."""
        fault = call.fault
        if fault is Fault.KILL:
            self._die()
        elif fault is Fault.RESET:
            connection.reset()
        elif fault is Fault.REFUSE:
            self._refuse_for(self.faults.refuse_seconds)
            connection.reset()
        elif fault is Fault.HANG:
            await asyncio.Event().wait()
        elif fault is Fault.DRIP:
            await self._drip(connection)
        elif fault in STATUS_FAULTS:
            headers = [("Retry-After", self.faults.retry_after)] if fault in WITH_RETRY_AFTER else []
            message = f"a scheduled fault: {fault.name.lower()}"
            connection.send(render_error(STATUS_FAULTS[fault], message, headers=headers))
        elif refusal is not None:
            connection.send(refusal)
        else:
            await self._deliver(connection, call)

    async def _deliver(self, connection: Connection, call: Call) -> None:
        """Sends the answer after the engine's time, damaged as the call's fault wants it."""
        reply = self._reply(call)
        if isinstance(reply, bytes):
            connection.send(reply)
            return
        latency = self.engine_model.latency_of(call.digest, call.num_asked)
        prompt_tokens = reply.get("usage", {}).get("prompt_tokens", 0)
        await self._life.generate(prompt_tokens, num_generated_tokens(reply), latency)
        fault = call.fault
        content = damaged_content(fault, json.dumps(damaged_reply(fault, reply, call.body)).encode())
        headers = [("Content-Encoding", "gzip")] if fault is Fault.BAD_ENCODING else []
        content_type = "text/html" if fault is Fault.HTML else "application/json"
        response = render_response(200, content, headers=headers, content_type=content_type)
        if fault in {Fault.CUT_BODY, Fault.RESET_BODY}:
            connection.write(response[: len(response) - len(content) // 2])
            await asyncio.sleep(self.faults.drip_seconds)  # a reset takes what has not left yet with it
            connection.close() if fault is Fault.CUT_BODY else connection.reset()
        elif fault is Fault.SLOW_HEADERS:
            head_bytes = len(response) - len(content)
            for place in range(head_bytes - 1):
                connection.write(response[place : place + 1])
                await asyncio.sleep(self.faults.drip_seconds)
            connection.send(response[head_bytes - 1 :])
        else:
            connection.send(response)

    async def _drip(self, connection: Connection) -> None:
        connection.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.write(b"1\r\n \r\n")
            await asyncio.sleep(self.faults.drip_seconds)


def _bound_socket(host: str, port: int) -> socket.socket:
    """Returns a TCP socket bound to the address, beside others of ours that do not listen. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _parse_body(content: bytes) -> Body:
    """Returns the body of a call. Raises ValueError: if it is none, or its n, seed or limits are no numbers."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("the body has no messages")
    for name in ("n", "seed", "max_tokens", "max_completion_tokens", "top_logprobs"):
        value = body.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r}, which is no integer")
    if not 1 <= num_choices(body) <= _MAX_CHOICES or body.get("n") == 0:
        raise ValueError(f"n is {body['n']}; it must be from 1 to {_MAX_CHOICES}")
    return cast(Body, body)
