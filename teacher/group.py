"""One call to the teacher, seen through to its end: sent to an address, repeated as the failure demands, or given up.

The group is shared by all that ask one endpoint in a process, so that what one call learns (a field the server does not
know, an address that is down, a set-up that is wrong) holds for all. It stores nothing: see `teacher.client`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any
from urllib.parse import quote

from opentelemetry.trace import Span

from schemas.config import EndpointConfig
from schemas.errors import RowError, TeacherMisconfigured
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from teacher import metrics, tracing
from teacher.endpoints import Address, Addresses, Revive, State, Wish, is_served
from teacher.failures import (
    BAD_REPLY,
    NETWORK_ERRORS,
    TIMED_OUT,
    Action,
    Trouble,
    refused_fields,
    trouble_of_exception,
)
from teacher.images import ImagePath, ReadImage, SentImages
from teacher.transport import ReplyTooLong
from teacher.wire import OPTIONAL_FIELDS, BadReply, parse_replies, render_body, served_models

_log = logging.getLogger(__name__)
_calls_log = logging.getLogger("bimode.calls")
"""What befell single calls. Structured logs have it, with the row that asked; a run's text log does not."""

NUM_HOPELESS_CALLS = 20
"""So many calls refused without one success mean that the set-up is wrong, not the rows."""
NUM_DEATHS = 2
"""A call that was under way when so many engines died is suspected of it: it is tried alone, then given up."""
NUM_IGNORED = 3
"""So many single choices where several were asked for mean that the endpoint ignores `n`."""
MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 600.0
CRASHED = "teacher_crashed"
_NO_FILES = re.compile("allowed.local.media.path", re.IGNORECASE)
"""vLLM's words, in a 400 or a 500, for a file outside the folder that it was started with, or without one."""
_REFUSALS = frozenset({"teacher_rejected", "teacher_misconfigured", "teacher_bad_reply"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to. outcome: at least one reply, though a server may give fewer than asked for; or the failure.

    num_attempts: calls made for it, the failed ones included.
    """

    outcome: list[Reply] | CallFailure
    num_attempts: int


@dataclass(slots=True)
class _Call:
    """A call on its way. num_spent: retries used up; num_deaths: engines that died while it was there.

    span: of its trace, for the few calls that have one; trace_headers: what tells the server of it.
    """

    request: TeacherRequest
    num_choices: int
    wish: Wish
    span: Span | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    num_attempts: int = 0
    num_spent: int = 0
    num_deaths: int = 0


class EndpointGroup:
    """The calls to one endpoint, used as an async context manager in one event loop.

    read_image: gives the bytes of a stored image; called in a thread. image_path: file of a stored image, needed for
    `images_as: file_url` alone; the server must be allowed to read there. revive: see `teacher.endpoints`.
    first_backoff_seconds: mean of twice the first pause before a retry; it doubles with each, with full jitter, up to
    `MAX_BACKOFF_SECONDS`.

    Raises TeacherMisconfigured: if address or key cannot be used at all.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        read_image: ReadImage,
        image_path: ImagePath | None = None,
        *,
        revive: Revive | None = None,
        first_backoff_seconds: float = 0.5,
    ) -> None:
        self.endpoint = endpoint
        self.images = SentImages(endpoint, read_image, image_path)
        self.addresses = Addresses(endpoint, revive)
        self._first_backoff_seconds = first_backoff_seconds
        self._unknown_fields: frozenset[str] = frozenset()
        self._num_successes = 0
        self._num_refused_in_row = 0
        self._num_single_choices: float = 0

    async def __aenter__(self) -> EndpointGroup:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.addresses.close()

    @property
    def takes_several_choices(self) -> bool:
        return "n" not in self._unknown_fields

    async def call(self, request: TeacherRequest, num_choices: int = 1) -> Answer:
        """Returns the replies to a request: choice j is the sample `request.index + j`.

        Raises TeacherUnreachable, TeacherMisconfigured: if asking further would be useless, now and at every later
        call.
        """
        images = [sha256 for message in request.messages for sha256 in message.images]
        call = _Call(request, num_choices, Wish(images[0] if images else request.sample_id, num_choices))
        if not tracing.is_traced():
            return await self._see_through(call)
        with tracing.call_span(request, self.endpoint.model, num_choices) as call.span:
            call.trace_headers = tracing.trace_headers()
            answer = await self._see_through(call)
            tracing.note_answer(call.span, answer.outcome, answer.num_attempts)
            return answer

    async def _see_through(self, call: _Call) -> Answer:
        """Makes attempts until the call has its answer. Raises as `call` does."""
        while True:
            address = await self.addresses.acquire(call.wish)
            generation, without, were_named = address.generation, self._unknown_fields, self.images.are_named
            call.num_attempts += 1
            try:
                outcome = await self._attempt(address, call, without)
                if isinstance(outcome, Trouble) and not outcome.handling.is_answer:
                    # Before its room goes to another, which a dead engine would take along.
                    await self.addresses.confirm(address)
            finally:
                self.addresses.release(address, call.wish)
            _note_attempt(call, address, outcome)
            if isinstance(outcome, CallFailure):
                return Answer(outcome, call.num_attempts)
            if not isinstance(outcome, Trouble):
                self._note_success(address, len(outcome))
                self._note_choices(address, call.num_choices, len(outcome))
                if call.num_attempts > 1:
                    outcome = [replace(reply, num_attempts=call.num_attempts) for reply in outcome]
                return Answer(outcome, call.num_attempts)
            if not self._learn(address, outcome, without, were_named=were_named):
                failure = await self._after(outcome, call, address, generation)
                if failure is not None:
                    return Answer(failure, call.num_attempts)
            metrics.RETRIES.labels(address.url, outcome.handling.reason).inc()

    async def check(self) -> None:
        """Asks what the addresses serve, before any row is asked; waits for one that is just starting.

        Raises TeacherUnreachable: after `unreachable_seconds` without an answer. Raises TeacherMisconfigured: if none
        is such an API, takes the key and serves the model; names the models that are served.
        """
        await self.addresses.wait_until_one_answers()
        await asyncio.gather(*map(self._check_set_up, self.addresses.up))
        self.addresses.raise_if_fatal()

    async def _check_set_up(self, address: Address) -> None:
        """Leaves out an address that answers, but not as this teacher."""
        outcome = await self.addresses.models(address)
        error = self._served_error(address, outcome) if isinstance(outcome, bytes) else None
        if isinstance(outcome, Trouble) and not outcome.handling.is_passing:
            error = await self._error_without_models(address, outcome)
        if error is not None:
            self.addresses.take_out(address, error)

    def _served_error(self, address: Address, content: bytes) -> TeacherMisconfigured | None:
        names = served_models(content)
        if names is None:
            return TeacherMisconfigured(
                f"{address.url}/models gives no list of models but {content[:200]!r}; the address must be that "
                "of an OpenAI-compatible API, ending in /v1"
            )
        if is_served(self.endpoint.model, names):
            return None
        return TeacherMisconfigured(
            f"{address.url} does not serve the model {self.endpoint.model!r}; {_name_models(names)}"
        )

    async def _error_without_models(self, address: Address, trouble: Trouble) -> TeacherMisconfigured | None:
        """Asks one short question of an address that does not list its models: some gateways cannot."""
        outcome: list[Reply] | CallFailure | Trouble = trouble
        if trouble.status in {404, 405, 501}:
            question = TeacherRequest("", "check", (Message("user", "Hello"),), Sampling(max_tokens=16))
            outcome = await self._attempt(address, _Call(question, 1, Wish("")), frozenset())
        if not isinstance(outcome, Trouble):
            return None
        return TeacherMisconfigured(
            f"{address.url} answers, but not as a teacher (model {self.endpoint.model!r}): {outcome.detail}. "
            f"Check that the address ends in /v1 and that the environment variable {self.endpoint.api_key_env} "
            "holds the key, if one is needed"
        )

    async def _attempt(
        self, address: Address, call: _Call, without: frozenset[str]
    ) -> list[Reply] | CallFailure | Trouble:
        """Makes one call. A CallFailure is about the request's own images; trouble is everything else."""
        request = call.request
        try:
            images = await self.images.of_request(request)
        except RowError as error:
            return CallFailure(error.reason, error.detail)
        num_choices = 1 if "n" in without else call.num_choices
        body = render_body(
            request,
            model=self.endpoint.model,
            images=images,
            extra_body=self.endpoint.extra_body,
            num_choices=num_choices,
            without=without,
        )
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                content = await address.transport.post("/chat/completions", _encode(body), _headers(call, address))
        except TimeoutError:
            return Trouble(TIMED_OUT, f"no whole answer within {self.endpoint.timeout_seconds:g} s")
        except NETWORK_ERRORS as error:
            return trouble_of_exception(error)
        except ReplyTooLong as error:
            return Trouble(BAD_REPLY, str(error))
        try:
            return parse_replies(
                content,
                model=self.endpoint.model,
                num_choices=num_choices,
                seconds=time.monotonic() - began,
                is_constrained=bool(request.choices),
            )
        except BadReply as error:
            return Trouble(BAD_REPLY, str(error))

    async def _after(self, trouble: Trouble, call: _Call, address: Address, generation: int) -> CallFailure | None:
        """Acts on a failed attempt. Returns the failure of the call when repeating it has no more sense.

        Raises TeacherMisconfigured: if all calls are refused.
        """
        handling = trouble.handling
        if handling.is_answer:
            self.addresses.note_answer(address)
        if self._is_misconfigured(trouble):
            self.addresses.take_out(address, await self._misconfigured(trouble, address))
            return None
        if address.generation == generation:
            # While nothing answers at all, waiting is bounded by time; a retry is spent only on an address that lives.
            call.num_spent += handling.is_answer or address.state is State.UP
        elif not handling.is_unsent:
            call.num_deaths += 1
            if call.wish.is_alone:
                detail = f"{call.num_deaths} engines died while it was there, the last time it alone: {trouble.detail}"
                return CallFailure(CRASHED, detail)
        if not handling.is_passing or call.num_spent > self.endpoint.max_retries:
            return await self._give_up(trouble, call.num_attempts, address)
        wished = min(trouble.retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS)
        if handling.action is Action.BACK_OFF:
            self.addresses.back_off(address, wished)
        others = [other for other in self.addresses.up if other is not address and other not in call.wish.avoid]
        call.wish = replace(
            call.wish, avoid=call.wish.avoid | {address} if others else set(), is_alone=call.num_deaths >= NUM_DEATHS
        )
        if not others and address.state is State.UP:
            await asyncio.sleep(wished + self._jitter_seconds(call.num_attempts))
        return None

    def _is_misconfigured(self, trouble: Trouble) -> bool:
        if trouble.handling.action is not Action.STOP:
            return False
        # Some gateways forbid single prompts (moderation). Where others were answered, it is the row.
        if trouble.status == 403 and self._num_successes:
            return self._num_refused_in_row >= NUM_HOPELESS_CALLS
        return True

    async def _give_up(self, trouble: Trouble, num_attempts: int, address: Address) -> CallFailure:
        if trouble.handling.is_answer and trouble.handling.reason in _REFUSALS:
            self._num_refused_in_row += 1
            if not self._num_successes and self._num_refused_in_row >= NUM_HOPELESS_CALLS:
                self.addresses.take_out(address, await self._misconfigured(trouble, address))
                self.addresses.raise_if_fatal()
        reason = "teacher_rejected" if trouble.handling.action is Action.STOP else trouble.handling.reason
        times = "once" if num_attempts == 1 else f"{num_attempts} times"
        return CallFailure(reason, f"asked {times}: {trouble.detail}")

    async def _misconfigured(self, trouble: Trouble, address: Address) -> TeacherMisconfigured:
        models = await self.addresses.models(address)
        names = None if isinstance(models, Trouble) else served_models(models)
        hopeless = "" if trouble.handling.action is Action.STOP else "refuses every call: "
        return TeacherMisconfigured(
            f"the teacher at {address.url} (model {self.endpoint.model!r}) {hopeless}{trouble.detail}; "
            f"{_name_models(names)}"
        )

    def _note_success(self, address: Address, num_replies: int) -> None:
        self.addresses.note_answer(address)
        self.addresses.note_finished(address, num_replies)
        self._num_successes += 1
        self._num_refused_in_row = 0

    def _note_choices(self, address: Address, num_asked: int, num_given: int) -> None:
        """Learns whether the endpoint ignores `n`; one that once gave two choices knows it."""
        if num_asked == 1 or not self.takes_several_choices:
            return
        if num_given > 1:
            self._num_single_choices = -math.inf
        self._num_single_choices += 1
        if self._num_single_choices >= NUM_IGNORED:
            _log.warning("%s gives one choice where several are asked for; it is asked for one at a time", address.url)
            self._unknown_fields |= {"n"}

    def _learn(self, address: Address, trouble: Trouble, without: frozenset[str], *, were_named: bool) -> bool:
        """Returns whether the call is worth repeating in a form that the endpoint knows.

        without, were_named: the form of the call that was refused; another may have learnt of it meanwhile.
        """
        if were_named and _NO_FILES.search(trouble.detail):
            if self.images.are_named:
                _log.warning("%s may not read our files (%s); images are sent as bytes", address.url, trouble.detail)
                self.images.send_bytes()
            return True
        unknown = refused_fields(trouble, OPTIONAL_FIELDS - without - self.endpoint.extra_body.keys())
        for name in sorted(unknown - self._unknown_fields):
            _log.warning("%s does not know %r; it is asked without from now on", address.url, name)
        self._unknown_fields |= unknown
        return trouble.status in {400, 422} and bool(self._unknown_fields - without)

    def _jitter_seconds(self, num_attempts: int) -> float:
        """Returns the pause before the next attempt: full jitter over a time that doubles."""
        longest = min(MAX_BACKOFF_SECONDS, self._first_backoff_seconds * 2 ** min(num_attempts - 1, 16))
        return random.uniform(0.0, longest)


def _headers(call: _Call, address: Address) -> dict[str, str]:
    """Returns headers harmless to servers that do not know them.

    The first two tell a recorded teacher which answer is meant. vLLM spreads calls over the copies of a data-parallel
    server, and the choices of one call too, without regard to what a copy has in its caches, unless it is told which.
    """
    request = call.request
    headers = {"X-Bimode-Purpose": quote(request.purpose, safe=" "), "X-Bimode-Sample-Index": str(request.index)}
    if address.load is not None and address.load.num_engines > 1:
        headers["X-data-parallel-rank"] = str(zlib.crc32(call.wish.affinity.encode()) % address.load.num_engines)
    headers.update(call.trace_headers)
    return headers


def _note_attempt(call: _Call, address: Address, outcome: list[Reply] | CallFailure | Trouble) -> None:
    """Counts an attempt, by what became of it. One whose own image could not be sent was none."""
    if isinstance(outcome, CallFailure):
        return
    purpose = call.request.purpose
    if not isinstance(outcome, Trouble):
        metrics.note_answered(address.url, purpose, outcome[0].seconds)
        return
    reason = outcome.handling.reason
    metrics.ATTEMPTS.labels(address.url, purpose, reason).inc()
    if _calls_log.isEnabledFor(logging.INFO):
        known = {"purpose": purpose, "endpoint": address.url, "attempt": call.num_attempts, "reason": reason}
        _calls_log.info("an attempt failed: %.300s", outcome.detail, extra=known)
    if call.span is not None:
        tracing.note_trouble(call.span, address.url, reason, outcome.status)


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _encode(body: dict[str, Any]) -> bytes:
    return _to_json(body).encode()


def _name_models(names: list[str] | None) -> str:
    if names is None:
        return "what it serves could not be asked"
    return "it serves " + (", ".join(map(repr, names[:20])) or "no model") + (" and more" if len(names) > 20 else "")
