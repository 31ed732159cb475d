"""An OpenAI-compatible HTTP server for tests: scripted or recorded answers, faults on demand, a log of every call.

In a test: `with ReplayTeacher(answer) as teacher: ... teacher.url ... teacher.calls`, where `answer` gets the request's
JSON body (with `_index` and `_purpose` from the client's headers) and returns a text, or a whole answer as a dict; a
LookupError is a 400. On the command line, the MATH-Vision answers of real models:
`python tests/replay_teacher.py --port 8009 --mathvision FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from PIL import Image

Body = dict[str, Any]
Answer = Callable[[Body], str | Body]


class Fault(StrEnum):
    """What a server may do instead of answering."""

    RESET = "reset"
    HANG = "hang"
    DRIP = "drip"
    BAD_REQUEST = "400"
    UNAUTHORISED = "401"
    FORBIDDEN = "403"
    NOT_FOUND = "404"
    TIMEOUT = "408"
    CONFLICT = "409"
    TOO_LONG = "413"
    UNPROCESSABLE = "422"
    RATE_LIMIT = "429"
    SERVER_ERROR = "500"
    BAD_GATEWAY = "502"
    UNAVAILABLE = "503"
    GATEWAY_TIMEOUT = "504"
    CUT_JSON = "cut_json"
    CUT_BODY = "cut_body"
    HTML = "html"
    EMPTY_BODY = "empty_body"
    EMPTY_CHOICES = "empty_choices"
    NULL_CONTENT = "null_content"


@dataclass(frozen=True)
class FaultSchedule:
    """Which calls go wrong: the first ones as listed, all of one kind for ever, or a random share by seed.

    first: faults of calls 0, 1, 2, ... (None for a good answer). always: the fault of every later call. share, kinds,
    seed: each later call fails with this probability, by the number of the call alone.
    """

    first: Sequence[Fault | None] = ()
    always: Fault | None = None
    share: float = 0.0
    kinds: Sequence[Fault] = (Fault.RESET, Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.UNAVAILABLE, Fault.CUT_JSON)
    seed: int = 0
    retry_after: str = "0"

    def fault_of(self, number: int) -> Fault | None:
        if number < len(self.first):
            return self.first[number]
        if self.always is not None:
            return self.always
        generator = random.Random(f"{self.seed}:{number}")
        return generator.choice(list(self.kinds)) if generator.random() < self.share else None


@dataclass(frozen=True)
class Call:
    """One call as the server saw it. digest: of the whole body and index, so that repeated calls can be counted."""

    number: int
    digest: str
    purpose: str
    index: int
    seed: int | None
    model: str
    text: str
    num_images: int
    fault: Fault | None
    began: float
    body: Body = field(repr=False, compare=False)


class ReplayTeacher:
    """The server, in a thread of its own, between `start` and `stop` (or in a `with`).

    answer: see the module. Deterministic answers make runs comparable, whatever the order of calls.
    models: what /v1/models lists; another model name in a call is a 404, as in vLLM. delay_seconds: before each answer.
    unknown_fields: names of body fields that are refused with a 400, as OpenAI refuses those of vLLM.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        models: Sequence[str] = ("teacher",),
        faults: FaultSchedule | None = None,
        delay_seconds: float = 0.0,
        unknown_fields: Sequence[str] = (),
        api_key: str | None = None,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.models = tuple(models)
        self.faults = faults or FaultSchedule()
        self.delay_seconds = delay_seconds
        self.unknown_fields = tuple(unknown_fields)
        self.api_key = api_key
        self.port = port
        self.calls: list[Call] = []
        self.headers: list[Mapping[str, str]] = []
        self.max_in_flight = 0
        self._in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def num_repeated(self) -> int:
        """How many calls repeated an earlier one byte for byte."""
        return sum(number - 1 for number in Counter(call.digest for call in self.calls).values())

    def start(self) -> ReplayTeacher:
        started: threading.Event = threading.Event()
        failures: list[BaseException] = []

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            try:
                runner = self._loop.run_until_complete(self._open())
            except OSError as error:
                failures.append(error)
                return
            finally:
                started.set()
            self._loop.run_forever()
            self._loop.run_until_complete(runner.cleanup())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

        self._thread = threading.Thread(target=serve, name="replay-teacher", daemon=True)
        self._thread.start()
        started.wait()
        if failures:
            raise failures[0]
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None
            self._loop.close()

    def __enter__(self) -> ReplayTeacher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _open(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1024)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _list_models(self, request: web.Request) -> web.Response:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "Unauthorized")
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            return await self._answer(request)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body: Body = json.loads(raw)
        call = self._log_call(request, raw, body)
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "Unauthorized")
        if call.fault is not None:
            return await self._fail(call.fault, request)
        if body.get("model") not in self.models:
            return _error(404, f"The model `{body.get('model')}` does not exist.", param="model")
        unknown = [name for name in self.unknown_fields if name in body]
        if unknown:
            return _error(400, f"Unrecognized request argument supplied: {unknown[0]}")
        try:
            answer = self.answer({**body, "_index": call.index, "_purpose": call.purpose})
        except LookupError as error:
            return _error(400, f"nothing to replay: {error}")
        return web.json_response(answer if isinstance(answer, dict) else completion(answer, body))

    def _log_call(self, request: web.Request, raw: bytes, body: Body) -> Call:
        index = int(request.headers.get("X-Bimode-Sample-Index", "0"))
        number = len(self.calls)
        call = Call(
            number=number,
            digest=hashlib.sha256(raw + b"\0" + str(index).encode()).hexdigest(),
            purpose=unquote(request.headers.get("X-Bimode-Purpose", "")),
            index=index,
            seed=body.get("seed"),
            model=str(body.get("model")),
            text=question_text(body),
            num_images=len(image_urls(body)),
            fault=self.faults.fault_of(number),
            began=time.monotonic(),
            body=body,
        )
        self.calls.append(call)
        self.headers.append(dict(request.headers))
        return call

    async def _fail(self, fault: Fault, request: web.Request) -> web.StreamResponse:
        if fault is Fault.HANG:
            await asyncio.sleep(3600)
        if fault is Fault.RESET:
            return _reset(request)
        if fault is Fault.DRIP:
            return await _drip(request)
        if fault is Fault.CUT_BODY:
            response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            assert request.transport is not None
            request.transport.close()
            return response
        if fault in _FAULT_BODIES:
            return web.Response(body=_FAULT_BODIES[fault], content_type="application/json")
        headers = {"Retry-After": self.faults.retry_after} if fault is Fault.RATE_LIMIT else {}
        return _error(int(fault.value), f"a scheduled fault: {fault.name}", headers=headers)


_FAULT_BODIES = {
    Fault.CUT_JSON: b'{"id": "x", "choices": [{"index": 0, "message": {"role": "assi',
    Fault.HTML: b"<html><body>It works!</body></html>",
    Fault.EMPTY_BODY: b"",
    Fault.EMPTY_CHOICES: b'{"id": "x", "choices": []}',
    Fault.NULL_CONTENT: b'{"choices": [{"index": 0, "message": {"content": null}, "finish_reason": "stop"}]}',
}


def completion(
    text: str | None,
    body: Body,
    *,
    finish_reason: str = "stop",
    reasoning: str | None = None,
    top_logprobs: Sequence[tuple[str, float]] = (),
    cached_tokens: int = 0,
) -> Body:
    """Returns a whole answer as vLLM would give it; a token is a word. top_logprobs: of the first token."""
    prompt_tokens = len(question_text(body).split())
    completion_tokens = len((text or "").split())
    logprobs = None
    if body.get("logprobs") and top_logprobs:
        alternatives = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top_logprobs]
        logprobs = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
    return {
        "id": "chatcmpl-replay",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "reasoning": reasoning},
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    }


def constrained_completion(choice_probabilities: Mapping[str, float], body: Body) -> Body:
    """Returns the answer to a constrained request: the likeliest choice, with the logarithms of all."""
    ranked = sorted(choice_probabilities.items(), key=lambda item: -item[1])
    logprobs = [(choice, math.log(probability)) for choice, probability in ranked if probability > 0]
    return completion(ranked[0][0], body, top_logprobs=logprobs)


def question_text(body: Body) -> str:
    """Returns the texts of all user turns of a request."""
    texts: list[str] = []
    for message in body.get("messages", []):
        if message.get("role") == "user":
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            texts += [part["text"] for part in parts if part.get("type") == "text"]
    return "\n".join(texts)


def image_urls(body: Body) -> list[str]:
    """Returns the addresses of all images of a request, in order."""
    contents = [message.get("content") for message in body.get("messages", [])]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]


class MathVisionReplay:
    """Answers questions of MATH-Vision's testmini with what real models answered, by the index of the sample.

    folder: holds problems.jsonl, responses.jsonl and images/. A request is recognised by the question inside its text
    (two problems share one; there the image decides). otherwise: answers requests of other purposes than `purposes`;
    without it they get a 400. Sample number i gets recorded answer number i, starting again after the last.
    """

    def __init__(
        self, folder: Path, *, otherwise: Answer | None = None, purposes: Sequence[str] = ("performance", "")
    ) -> None:
        self.folder = folder
        self.problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text("utf-8").splitlines()]
        recorded = [json.loads(line) for line in (folder / "responses.jsonl").read_text("utf-8").splitlines()]
        self.responses: dict[str, list[Body]] = {record["id"]: record["responses"] for record in recorded}
        self._otherwise = otherwise
        self._purposes = frozenset(purposes)
        self._questions = [(_squeezed(problem["question"]), problem) for problem in self.problems]

    def __call__(self, body: Body) -> str | Body:
        purpose = body.get("_purpose", "")
        if purpose not in self._purposes:
            if self._otherwise is None:
                raise LookupError(f"no recorded answers for the purpose {purpose!r}")
            return self._otherwise(body)
        responses = self.responses[self.problem_of(body)["id"]]
        response: str = responses[body.get("_index", 0) % len(responses)]["response"]
        return response

    def problem_of(self, body: Body) -> Body:
        """Returns the problem a request asks about. Raises LookupError: if it asks about none of them."""
        asked = _squeezed(question_text(body))
        found = [(len(question), problem) for question, problem in self._questions if question in asked]
        if not found:
            raise LookupError(f"no problem of MATH-Vision is asked about in {asked[:200]!r}")
        longest = max(length for length, _ in found)
        problems: list[Body] = [problem for length, problem in found if length == longest]
        if len(problems) == 1:
            return problems[0]
        seen = _thumbnail(_decoded(image_urls(body)[0]))
        return min(
            problems, key=lambda problem: _distance(seen, _thumbnail(Image.open(self.folder / problem["image"])))
        )


def _squeezed(text: str) -> str:
    """Returns the text without image marks and white space, which sources and prompts may treat as they like."""
    return "".join(re.sub(r"<image\d*>|\[image \d+\]", "", text).split())


def _decoded(url: str) -> Image.Image:
    if url.startswith("file://"):
        return Image.open(unquote(url.removeprefix("file://")))
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _thumbnail(image: Image.Image) -> bytes:
    return image.convert("RGBA").convert("L").resize((32, 32)).tobytes()


def _distance(one: bytes, other: bytes) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _error(
    status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    body = {"error": {"message": message, "type": "ReplayError", "param": param, "code": status}}
    return web.json_response(body, status=status, headers=headers)


def _reset(request: web.Request) -> web.Response:
    """Breaks the connection with a TCP reset instead of an orderly end."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


async def _drip(request: web.Request) -> web.StreamResponse:
    """Sends a body that never ends, one space at a time (valid before JSON)."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", action="append", help="a model name to list; repeatable")
    parser.add_argument("--mathvision", type=Path, help="folder with problems.jsonl and responses.jsonl")
    parser.add_argument("--text", default="yes", help="the answer to everything else")
    parser.add_argument("--delay-seconds", type=float, default=0.0)
    parser.add_argument("--fault-share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def say(body: Body) -> str:
        choices = body.get("structured_outputs", {}).get("choice")
        return str(choices[0]) if choices else str(options.text)

    server = ReplayTeacher(
        MathVisionReplay(options.mathvision, otherwise=say) if options.mathvision else say,
        models=options.model or ["teacher"],
        faults=FaultSchedule(share=options.fault_share, seed=options.seed),
        delay_seconds=options.delay_seconds,
        port=options.port,
    ).start()
    print(f"answering at {server.url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
