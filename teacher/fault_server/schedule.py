"""Which calls of the fault server go wrong, in which of many ways, and what a damaged answer looks like. Pure."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from schemas.errors import ConfigError
from teacher.fault_server.answers import Body, allowed_choices, num_choices


class Fault(StrEnum):
    """What the server may do instead of answering well."""

    REFUSE = "refuse"
    """The connection is reset, and for a while the address takes no other; those that exist go on."""
    KILL = "kill"
    """The engine dies: every connection is reset, the address takes none, and another process comes back."""
    RESET = "reset"
    """A TCP reset instead of an answer."""
    RESET_BODY = "reset_body"
    """A TCP reset in the middle of the body."""
    HANG = "hang"
    """Nothing at all, for as long as the client waits."""
    DRIP = "drip"
    """A body that never ends, one space at a time (spaces may stand before JSON)."""
    SLOW_HEADERS = "slow_headers"
    """A good answer whose head arrives byte by byte."""
    BAD_REQUEST = "400"
    UNAUTHORISED = "401"
    FORBIDDEN = "403"
    NOT_FOUND = "404"
    TIMEOUT = "408"
    CONFLICT = "409"
    TOO_LARGE = "413"
    UNPROCESSABLE = "422"
    RATE_LIMIT = "429"
    SERVER_ERROR = "500"
    BAD_GATEWAY = "502"
    UNAVAILABLE = "503"
    GATEWAY_TIMEOUT = "504"
    CUT_JSON = "cut_json"
    """Half the JSON, with a Content-Length that fits."""
    CUT_BODY = "cut_body"
    """Half the body, and then an orderly end of the connection before Content-Length is reached."""
    HTML = "html"
    EMPTY_BODY = "empty_body"
    EMPTY_CHOICES = "empty_choices"
    FEWER_CHOICES = "fewer_choices"
    """One choice less than asked for; only where n is above 1."""
    NULL_CONTENT = "null_content"
    LENGTH = "length"
    """Half of each text, with finish_reason "length"."""
    OFF_SCHEMA = "off_schema"
    """A text that is none of the choices allowed; only where the call names some."""
    BAD_ENCODING = "bad_encoding"
    """Plain JSON that calls itself gzip."""


PASSING_FAULTS = (
    Fault.REFUSE, Fault.RESET, Fault.RESET_BODY, Fault.TIMEOUT, Fault.RATE_LIMIT, Fault.SERVER_ERROR,
    Fault.BAD_GATEWAY, Fault.UNAVAILABLE, Fault.GATEWAY_TIMEOUT, Fault.CUT_JSON, Fault.CUT_BODY, Fault.HTML,
    Fault.EMPTY_BODY, Fault.EMPTY_CHOICES, Fault.FEWER_CHOICES, Fault.NULL_CONTENT, Fault.BAD_ENCODING,
)  # fmt: skip
"""Those a client may overcome by asking again, and notices at once."""
STATUS_FAULTS = {kind: int(kind) for kind in Fault if kind.isdigit()}
WITH_RETRY_AFTER = frozenset({Fault.RATE_LIMIT, Fault.UNAVAILABLE})


@dataclass(frozen=True)
class FaultSchedule:
    """Which calls go wrong. A request is what a call asks; the same body asked again is the same request.

    share: probability that a request fails when it is asked, for its first `max_faults_per_request` times; after
    those it is answered well. kinds: drawn from with equal probability, those apart that the request cannot show.
    first: faults of the first times that each request is asked, before any is drawn (None: a good answer). always:
    the fault of every later time. persistent: the fault of a request whenever it is asked, before all others; with
    `Fault.KILL` it marks rows that kill the engine. retry_after: the header of 429 and 503. refuse_seconds: how long
    REFUSE closes the address. drip_seconds: between the bytes of DRIP and SLOW_HEADERS.

    Raises ConfigError: a share outside [0, 1], no kinds.
    """

    share: float = 0.0
    kinds: Sequence[Fault] = PASSING_FAULTS
    seed: int = 0
    max_faults_per_request: int = 3
    first: Sequence[Fault | None] = ()
    always: Fault | None = None
    persistent: Callable[[Body], Fault | None] | None = None
    retry_after: str = "0"
    refuse_seconds: float = 0.1
    drip_seconds: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"the share of calls that fail is {self.share}; it must be from 0 to 1")
        if not self.kinds:
            raise ConfigError("no kinds of faults are given; leave them out for those that pass")

    def fault_of(self, digest: str, num_asked: int, body: Body) -> Fault | None:
        """Returns the fault of a request (`digest`) that has been asked `num_asked` times before, if it has one."""
        if self.persistent is not None and (fault := self.persistent(body)) is not None:
            return fault
        if num_asked < len(self.first):
            return self.first[num_asked]
        if self.always is not None:
            return self.always
        if not self.share or num_asked - len(self.first) >= self.max_faults_per_request:
            return None
        whether, which, _ = uniforms(self.seed, digest, num_asked)
        kinds = [kind for kind in self.kinds if _can_show(kind, body)]
        return kinds[int(which * len(kinds))] if kinds and whether < self.share else None


def _can_show(fault: Fault, body: Body) -> bool:
    if fault is Fault.FEWER_CHOICES:
        return num_choices(body) > 1
    return fault is not Fault.OFF_SCHEMA or bool(allowed_choices(body))


def uniforms(seed: int, digest: str, num_asked: int) -> tuple[float, float, float]:
    """Returns three numbers in (0, 1) that depend on the arguments alone."""
    drawn = hashlib.sha256(f"{seed}:{digest}:{num_asked}".encode()).digest()
    first, second, third = ((number + 0.5) / 2**32 for number in struct.unpack(">3I", drawn[:12]))
    return first, second, third


@dataclass(frozen=True)
class Restarts:
    """When the engine dies besides `Fault.KILL`, and for how long.

    at_calls: numbers of the calls (from 0, in order of arrival) that it dies of. every_seconds: from one death to the
    next. down_seconds: how long nothing listens.
    """

    at_calls: Sequence[int] = ()
    every_seconds: float | None = None
    down_seconds: float = 0.5


def damaged_reply(fault: Fault | None, reply: Body, body: Body) -> Body:
    """Returns a good answer with a fault that leaves it well-formed JSON; other faults leave it as it is."""
    choices = reply["choices"]
    if fault is Fault.EMPTY_CHOICES:
        return {**reply, "choices": []}
    if fault is Fault.FEWER_CHOICES:
        return {**reply, "choices": choices[:-1]}
    if fault is Fault.NULL_CONTENT:
        return {**reply, "choices": [_with_content(choice, None) for choice in choices]}
    if fault is Fault.OFF_SCHEMA:
        # Longer than every choice, so it is none of them.
        text = "neither " + " nor ".join(allowed_choices(body))
        return {**reply, "choices": [_with_content(choice, text) for choice in choices]}
    if fault is Fault.LENGTH:
        texts = [choice["message"]["content"] or "" for choice in choices]
        halves = [
            {**_with_content(choice, text[: len(text) // 2]), "finish_reason": "length"}
            for choice, text in zip(choices, texts, strict=True)
        ]
        return {**reply, "choices": halves}
    return reply


def damaged_content(fault: Fault | None, content: bytes) -> bytes:
    """Returns the body of an answer with a fault that leaves HTTP in order; other faults leave it as it is."""
    if fault is Fault.CUT_JSON:
        return content[: len(content) // 2]
    if fault is Fault.HTML:
        return b"<!DOCTYPE html><html><body><h1>It works!</h1></body></html>"
    return b"" if fault is Fault.EMPTY_BODY else content


def _with_content(choice: Body, text: str | None) -> Body:
    return {**choice, "message": {**choice["message"], "content": text}}
