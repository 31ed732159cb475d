"""Asking a teacher: one durable reply per request, from the journal if it is there, else from the endpoint.

Any OpenAI-compatible endpoint will do. Retries, admission and the meaning of each failure are ours and not the openai
package's, because a run of days must tell a restarting server from a wrong model name and a bad row from both
(`teacher.failures` holds the table). Left out on purpose: streaming, several choices per call (each sample has its own
seed and its own key) and balancing over endpoints, which a gateway does better.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, urlsplit

import httpx2
import openai
from PIL import Image

from schemas.config import EndpointConfig
from schemas.errors import BimodeError, RowError, StorageError, TeacherMisconfigured, TeacherUnreachable
from schemas.requests import CallFailure, Message, ModelIdentity, Reply, Sampling, TeacherRequest, request_key
from teacher.failures import (
    BAD_REPLY,
    NETWORK_ERRORS,
    TIMED_OUT,
    Action,
    Trouble,
    refused_fields,
    trouble_of_exception,
)
from teacher.journal import Journal
from teacher.usage import Usage
from teacher.wire import OPTIONAL_FIELDS, BadReply, parse_reply, render_body, served_models

_log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 16 * 2**20
"""Longest body that is read. A reply of 32,000 tokens with its log-probabilities is a tenth of it."""
NUM_HOPELESS_CALLS = 20
"""So many calls refused without one success mean that the set-up is wrong, not the rows."""
MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 600.0
_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 10.0
_POLL_SECONDS = 1.0
_LOG_EVERY_SECONDS = 10.0
_KEEPALIVE_SECONDS = 4.0
"""vLLM's server closes idle connections after 5 s; reusing one at that very moment would cost a retry."""
_IMAGE_CACHE_BYTES = 128 * 2**20

ReadImage = Callable[[str, int], tuple[bytes, str]]
"""(sha256, max_pixels) -> (encoded image reduced to at most so many pixels, MIME type)."""


def reply_key(request: TeacherRequest, endpoint: EndpointConfig) -> str:
    """Returns the journal key of a request to an endpoint.

    How far images are reduced shapes the reply of a request that has some, so it is part of the key; how they travel
    does not, and is not.
    """
    extra_body = dict(endpoint.extra_body)
    if any(message.images for message in request.messages):
        extra_body["bimode:max_image_pixels"] = endpoint.max_image_pixels
    return request_key(request, ModelIdentity(endpoint.model, endpoint.revision, extra_body))


class Teacher:
    """The client of one endpoint, used as an async context manager in one event loop.

    read_image: gives the bytes of a stored image; called in a thread. image_path: where a stored image lies, needed
    for `images_as: file_url` alone; the server must be allowed to read there. first_backoff_seconds: mean of twice the
    first pause before a retry; it doubles with each, with full jitter, up to `MAX_BACKOFF_SECONDS`.

    Raises TeacherMisconfigured: if address or key cannot be used at all.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        journal: Journal,
        read_image: ReadImage,
        image_path: Callable[[str], Path] | None = None,
        *,
        first_backoff_seconds: float = 0.5,
    ) -> None:
        if endpoint.images_as == "file_url" and image_path is None:
            raise TeacherMisconfigured("images_as: file_url needs images in a local folder; use data_url")
        self.endpoint = endpoint
        self.journal = journal
        self._images = _ImageUrls(endpoint, read_image, image_path)
        self._client = _open_client(endpoint)
        self._first_backoff_seconds = first_backoff_seconds
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._probing = asyncio.Lock()
        self._in_flight: dict[str, asyncio.Task[Reply | CallFailure]] = {}
        self._usage: dict[str, Usage] = {}
        self._unknown_fields: frozenset[str] = frozenset()
        self._outage_since: float | None = None
        self._num_answers = 0
        self._num_successes = 0
        self._num_refused_in_row = 0
        self._fatal: BimodeError | None = None

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A call outlives an asker that was cancelled (its reply is paid for), but not the teacher.
        calls = list(self._in_flight.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._client.close()

    @property
    def usage(self) -> dict[str, Usage]:
        """A snapshot of what asking has cost so far, by purpose."""
        return dict(self._usage)

    async def ask(self, request: TeacherRequest) -> Reply | CallFailure:
        """Returns the reply, durably stored, or why this request got none.

        Equal requests share one call, also while it is under way.

        Raises TeacherUnreachable, TeacherMisconfigured: if asking further would be useless, now and at every later
        call. Raises StorageError: if the journal cannot be written.
        """
        key = reply_key(request, self.endpoint)
        stored = self.journal.lookup(key)
        if stored is not None:
            self._count(request, Usage(num_reused=1))
            return stored
        call = self._in_flight.get(key)
        if call is None:
            call = asyncio.create_task(self._ask_anew(key, request))
            self._in_flight[key] = call
            call.add_done_callback(partial(self._forget, key))
        else:
            self._count(request, Usage(num_reused=1))
        return await asyncio.shield(call)

    async def check(self) -> None:
        """Asks what the endpoint serves, before any row is asked; waits for one that is just starting.

        Raises TeacherUnreachable: after `unreachable_seconds` without an answer. Raises TeacherMisconfigured: if the
        address is no such API, the key is refused, or the model is not served; names those that are.
        """
        url, began, logged = self.endpoint.url, time.monotonic(), time.monotonic()
        while True:
            outcome = await self._get_models()
            if not isinstance(outcome, Trouble):
                break
            waited = time.monotonic() - began
            if outcome.handling.action is not Action.RETRY:
                await self._check_without_models(outcome)
                return
            if waited >= self.endpoint.unreachable_seconds:
                raise self._unreachable(outcome, waited)
            if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
                logged = time.monotonic()
                _log.info("waiting for the teacher at %s: %.0f s so far (%s)", url, waited, outcome.detail)
            await asyncio.sleep(min(_POLL_SECONDS, max(0.05, self.endpoint.unreachable_seconds - waited)))
        self._check_served(outcome)

    def _check_served(self, content: bytes) -> None:
        names = served_models(content)
        if names is None:
            raise TeacherMisconfigured(
                f"{self.endpoint.url}/models gives no list of models but {content[:200]!r}; the address must be that "
                "of an OpenAI-compatible API, ending in /v1"
            )
        # Google's endpoint lists "models/NAME" and takes NAME.
        if not {self.endpoint.model, f"models/{self.endpoint.model}"} & set(names):
            raise TeacherMisconfigured(
                f"{self.endpoint.url} does not serve the model {self.endpoint.model!r}; {_name_models(names)}"
            )

    async def _check_without_models(self, trouble: Trouble) -> None:
        """Asks one short question of an endpoint that does not list its models: some gateways cannot."""
        outcome: Reply | CallFailure | Trouble = trouble
        if trouble.status in {404, 405, 501}:
            question = TeacherRequest("", "check", (Message("user", "Hello"),), Sampling(max_tokens=16))
            outcome = await self._attempt(question, frozenset())
        if isinstance(outcome, Trouble):
            raise TeacherMisconfigured(
                f"{self.endpoint.url} answers, but not as a teacher (model {self.endpoint.model!r}): {outcome.detail}. "
                f"Check that the address ends in /v1 and that the environment variable {self.endpoint.api_key_env} "
                "holds the key, if one is needed"
            )

    async def _ask_anew(self, key: str, request: TeacherRequest) -> Reply | CallFailure:
        async with self._slots:
            outcome = await self._call(request)
        if isinstance(outcome, CallFailure):
            self._count(request, Usage(num_calls=1, num_failures=1))
            return outcome
        try:
            await self.journal.append_durably(key, request, outcome)
        except StorageError as error:
            self._fatal = error
            raise
        self._count(
            request,
            Usage(
                num_calls=1,
                prompt_tokens=outcome.prompt_tokens,
                completion_tokens=outcome.completion_tokens,
                cached_tokens=outcome.cached_tokens,
                seconds=outcome.seconds,
            ),
        )
        return outcome

    async def _call(self, request: TeacherRequest) -> Reply | CallFailure:
        """Returns the reply of the endpoint, or the failure that is left when retrying has no more sense."""
        num_spent = 0
        for num_attempts in itertools.count(1):
            self._raise_if_fatal()
            num_answers = self._num_answers
            without = self._unknown_fields
            outcome = await self._attempt(request, without)
            if not isinstance(outcome, Trouble):
                self._note_answer()
                self._num_successes += 1
                self._num_refused_in_row = 0
                return outcome
            self._note_trouble(outcome)
            if self._learn_unknown_fields(outcome, without):
                continue
            if self._is_misconfigured(outcome):
                raise await self._misconfigured(outcome)
            if self._outage_since is not None:
                await self._raise_if_unreachable(outcome)
            # While nothing answers at all, waiting is bounded by time; a retry is spent only on an endpoint that lives.
            if not outcome.handling.is_outage or self._num_answers > num_answers:
                num_spent += 1
            if outcome.handling.action is not Action.RETRY or num_spent > self.endpoint.max_retries:
                return await self._give_up(outcome, num_attempts)
            self._count(request, Usage(num_retries=1))
            await asyncio.sleep(self._backoff_seconds(outcome, num_attempts))
        raise AssertionError("unreachable: count never ends")

    async def _attempt(self, request: TeacherRequest, without: frozenset[str]) -> Reply | CallFailure | Trouble:
        """Makes one call. A CallFailure is about the request's own images; trouble is everything else."""
        try:
            image_urls = await self._images.of_request(request)
        except RowError as error:
            return CallFailure(error.reason, error.detail)
        body = render_body(
            request,
            model=self.endpoint.model,
            image_urls=image_urls,
            extra_body=self.endpoint.extra_body,
            without=without,
        )
        # Harmless to servers, and what a recorded teacher needs to give the answer with this number.
        headers = {
            "Content-Type": "application/json",
            "X-Bimode-Purpose": quote(request.purpose, safe=" "),
            "X-Bimode-Sample-Index": str(request.index),
        }
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                response = await self._client.post(
                    "/chat/completions",
                    content=json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(),
                    cast_to=httpx2.Response,
                    options={"headers": headers},
                )
        except TimeoutError:
            return Trouble(TIMED_OUT, f"no whole answer within {self.endpoint.timeout_seconds:g} s")
        except NETWORK_ERRORS as error:
            return trouble_of_exception(error)
        except _ReplyTooLong as error:
            return Trouble(BAD_REPLY, str(error))
        try:
            return parse_reply(
                response.content,
                model=self.endpoint.model,
                seconds=time.monotonic() - began,
                is_constrained=bool(request.choices),
            )
        except BadReply as error:
            return Trouble(BAD_REPLY, str(error))

    async def _get_models(self) -> bytes | Trouble:
        """Returns the body of GET /models, or why there is none."""
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                response = await self._client.get("/models", cast_to=httpx2.Response)
        except TimeoutError:
            return Trouble(TIMED_OUT, f"no answer to GET /models within {_PROBE_SECONDS:g} s")
        except NETWORK_ERRORS as error:
            return trouble_of_exception(error)
        except _ReplyTooLong as error:
            return Trouble(BAD_REPLY, str(error))
        return response.content

    def _learn_unknown_fields(self, trouble: Trouble, without: frozenset[str]) -> bool:
        """Returns whether the call is worth repeating without fields that the endpoint refuses."""
        unknown = refused_fields(trouble, OPTIONAL_FIELDS - without - self.endpoint.extra_body.keys())
        for name in sorted(unknown - self._unknown_fields):
            _log.warning("%s does not know %r; it is asked without from now on", self.endpoint.url, name)
        self._unknown_fields |= unknown
        # Another call may have learnt the same while this one was under way.
        return trouble.status in {400, 422} and bool(self._unknown_fields - without)

    def _is_misconfigured(self, trouble: Trouble) -> bool:
        if trouble.handling.action is not Action.STOP:
            return False
        # Some gateways forbid single prompts (moderation). Where others were answered, it is the row.
        if trouble.status == 403 and self._num_successes:
            return self._num_refused_in_row >= NUM_HOPELESS_CALLS
        return True

    async def _give_up(self, trouble: Trouble, num_attempts: int) -> CallFailure:
        if trouble.handling.is_answer and trouble.handling.reason in _REFUSALS:
            self._num_refused_in_row += 1
            if not self._num_successes and self._num_refused_in_row >= NUM_HOPELESS_CALLS:
                raise await self._misconfigured(trouble)
        reason = "teacher_rejected" if trouble.handling.action is Action.STOP else trouble.handling.reason
        times = "once" if num_attempts == 1 else f"{num_attempts} times"
        return CallFailure(reason, f"asked {times}: {trouble.detail}")

    def _note_answer(self) -> None:
        self._num_answers += 1
        self._outage_since = None

    def _note_trouble(self, trouble: Trouble) -> None:
        if trouble.handling.is_answer:
            self._note_answer()
        elif self._outage_since is None:
            self._outage_since = time.monotonic()
            _log.warning(
                "the teacher at %s does not answer (%s); trying for %g s",
                self.endpoint.url, trouble.detail, self.endpoint.unreachable_seconds,
            )  # fmt: skip

    async def _raise_if_unreachable(self, trouble: Trouble) -> None:
        """Stops the run when nothing has answered for too long and nothing answers now.

        The last question matters: a server busy with one endless generation answers no call, but it is there.
        """
        async with self._probing:
            self._raise_if_fatal()
            since = self._outage_since
            if since is None or time.monotonic() - since < self.endpoint.unreachable_seconds:
                return
            probe = await self._get_models()
            if isinstance(probe, Trouble) and not probe.handling.is_answer:
                self._fatal = self._unreachable(trouble, time.monotonic() - since)
                raise self._fatal
            self._note_answer()

    def _unreachable(self, trouble: Trouble, waited_seconds: float) -> TeacherUnreachable:
        return TeacherUnreachable(
            f"the teacher at {self.endpoint.url} has not answered for {waited_seconds:.0f} s ({trouble.detail}). Start "
            "it or correct its address, then run again: stored replies are not asked for twice"
        )

    async def _misconfigured(self, trouble: Trouble) -> TeacherMisconfigured:
        models = await self._get_models()
        names = None if isinstance(models, Trouble) else served_models(models)
        hopeless = "" if trouble.handling.action is Action.STOP else "refuses every call: "
        self._fatal = TeacherMisconfigured(
            f"the teacher at {self.endpoint.url} (model {self.endpoint.model!r}) {hopeless}{trouble.detail}; "
            f"{_name_models(names)}"
        )
        return self._fatal

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            # A new exception for each asker: one that is raised in many tasks collects all their tracebacks.
            raise type(self._fatal)(str(self._fatal))

    def _backoff_seconds(self, trouble: Trouble, num_attempts: int) -> float:
        """Returns the pause before the next attempt: full jitter, but not before the server's own Retry-After."""
        longest = min(MAX_BACKOFF_SECONDS, self._first_backoff_seconds * 2 ** min(num_attempts - 1, 16))
        if self._outage_since is not None and trouble.handling.is_outage:
            left = self._outage_since + self.endpoint.unreachable_seconds - time.monotonic()
            longest = min(longest, max(left, 0.01))
        wished = min(trouble.retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS)
        return wished + random.uniform(0.0, longest)

    def _count(self, request: TeacherRequest, usage: Usage) -> None:
        self._usage[request.purpose] = self._usage.get(request.purpose, Usage()) + usage

    def _forget(self, key: str, call: asyncio.Task[Reply | CallFailure]) -> None:
        del self._in_flight[key]
        # An asker that was cancelled never looks at the exception; looking here keeps asyncio from complaining.
        if not call.cancelled():
            call.exception()


_REFUSALS = frozenset({"teacher_rejected", "teacher_misconfigured", "teacher_bad_reply"})


class _ReplyTooLong(Exception):
    """The body exceeds `MAX_REPLY_BYTES`."""


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that is read no further than `MAX_REPLY_BYTES`."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > MAX_REPLY_BYTES:
                raise _ReplyTooLong(f"the answer is longer than {MAX_REPLY_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class _ImageUrls:
    """The images of requests as URLs. Recent data URLs are kept: the samples of one question share its images."""

    def __init__(
        self, endpoint: EndpointConfig, read_image: ReadImage, image_path: Callable[[str], Path] | None
    ) -> None:
        self._max_pixels = endpoint.max_image_pixels
        self._read_image = read_image
        self._image_path = image_path if endpoint.images_as == "file_url" else None
        self._urls: dict[str, asyncio.Task[str]] = {}
        self._num_bytes = 0

    async def of_request(self, request: TeacherRequest) -> dict[str, str]:
        """Returns the URL of each image by its sha256. Raises RowError: an image cannot be read."""
        hashes = {sha256 for message in request.messages for sha256 in message.images}
        return {sha256: await self._url(sha256) for sha256 in sorted(hashes)}

    async def _url(self, sha256: str) -> str:
        task = self._urls.pop(sha256, None)
        is_new = task is None
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._render, sha256))
        self._urls[sha256] = task  # to the end: the dictionary is in order of use
        try:
            url = await asyncio.shield(task)
        except BaseException:
            if task.done():
                self._urls.pop(sha256, None)
            raise
        if is_new:
            self._num_bytes += len(url)
            self._shrink()
        return url

    def _shrink(self) -> None:
        for sha256 in list(self._urls)[:-1]:
            if self._num_bytes <= _IMAGE_CACHE_BYTES:
                return
            task = self._urls[sha256]
            if task.done() and not task.cancelled() and task.exception() is None:
                self._num_bytes -= len(task.result())
                del self._urls[sha256]

    def _render(self, sha256: str) -> str:
        try:
            if self._image_path is not None:
                path = self._image_path(sha256)
                if _is_within(path, self._max_pixels):
                    return path.absolute().as_uri()
            content, mime = self._read_image(sha256, self._max_pixels)
        except RowError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise RowError("image_unreadable", f"image {sha256}: {error}") from error
        return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _is_within(path: Path, max_pixels: int) -> bool:
    """Returns whether a stored image may be sent as it is; reads its header alone."""
    try:
        with Image.open(path) as image:
            return image.width * image.height <= max_pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def _open_client(endpoint: EndpointConfig) -> openai.AsyncOpenAI:
    address = urlsplit(endpoint.url)
    if address.scheme not in {"http", "https"} or not address.hostname:
        raise TeacherMisconfigured(
            f"the teacher's address {endpoint.url!r} is no http address; it looks like http://127.0.0.1:8000/v1"
        )
    key = os.environ.get(endpoint.api_key_env, "").strip() or "none"
    if not key.isascii() or not key.isprintable():
        raise TeacherMisconfigured(
            f"the environment variable {endpoint.api_key_env} holds characters that no API key has"
        )
    # One line per call at level INFO would fill the logs of a run with millions of them.
    logger = logging.getLogger("httpx2")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
    http_client = openai.DefaultAioHttpClient(
        # asyncio.timeout bounds the whole call; a limit per read would not end a body that drips for ever.
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=endpoint.concurrency + 4, keepalive_expiry=_KEEPALIVE_SECONDS),
        follow_redirects=False,
        # A proxy from the environment cannot reach this machine's own loopback.
        trust_env=address.hostname not in {"localhost", "127.0.0.1", "::1"},
        event_hooks={"response": [_bound_body]},
    )
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=endpoint.url,
        max_retries=0,
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        http_client=http_client,
        # Compressing a reply saves nothing next to generating it, and a small body could unpack to gigabytes.
        default_headers={"Accept-Encoding": "identity"},
    )


async def _bound_body(response: httpx2.Response) -> None:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _BoundedStream(response.stream)


def _name_models(names: list[str] | None) -> str:
    if names is None:
        return "what it serves could not be asked"
    return "it serves " + (", ".join(map(repr, names[:20])) or "no model") + (" and more" if len(names) > 20 else "")
