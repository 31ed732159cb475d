"""What each way of failing means: the table that decides where to ask again, when to give up the row or stop the run.

Pure. `teacher.group` acts on it; the tests walk it row by row. What is a reply and no failure stands elsewhere: one cut
by its length is stored, unscored, and asked once more with more room by the judge that cannot read it; so is one that
ignores the choices it was given.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum

import aiohttp
import httpx2
import openai


class Action(StrEnum):
    """What comes next.

    ELSEWHERE: at once at another endpoint; where there is none, here after a pause. BACK_OFF: the endpoint is given
    fewer calls at once, and a pause if it asks for one; the call goes where there is room. REJECT: this row cannot be
    answered. STOP: this endpoint answers no row until somebody changes the set-up; without another the run stops.
    """

    ELSEWHERE = "elsewhere"
    BACK_OFF = "back_off"
    REJECT = "reject"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Handling:
    """What to do about one kind of failure.

    reason: code of the `CallFailure` once retries are spent. is_answer: the endpoint itself spoke, so it is there;
    otherwise it is probed. is_unsent: the address took no connection, so the call cannot have harmed the engine.
    """

    action: Action
    reason: str
    is_answer: bool = True
    is_unsent: bool = False

    @property
    def is_passing(self) -> bool:
        """Whether the call is worth repeating."""
        return self.action in {Action.ELSEWHERE, Action.BACK_OFF}


@dataclass(frozen=True, slots=True)
class Trouble:
    """One failed attempt. detail: what was seen, for a person. retry_after_seconds: the server's own wish."""

    handling: Handling
    detail: str
    status: int | None = None
    retry_after_seconds: float | None = None


_REJECTED = Handling(Action.REJECT, "teacher_rejected")
_SET_UP = Handling(Action.STOP, "teacher_misconfigured")
_FAILED = Handling(Action.ELSEWHERE, "teacher_error")
_GATEWAY = Handling(Action.ELSEWHERE, "teacher_unavailable", is_answer=False)
"""A gateway spoke, not the teacher behind it."""
_OVERLOADED = Handling(Action.BACK_OFF, "teacher_unavailable", is_answer=False)
"""vLLM answers so while it sheds load, a gateway while nothing stands behind it."""
BAD_REPLY = Handling(Action.ELSEWHERE, "teacher_bad_reply")
TIMED_OUT = Handling(Action.ELSEWHERE, "teacher_timeout", is_answer=False)
UNREACHABLE = Handling(Action.ELSEWHERE, "teacher_unreachable", is_answer=False, is_unsent=True)
DISCONNECTED = Handling(Action.ELSEWHERE, "teacher_disconnected", is_answer=False)
ENGINE_DEAD = Handling(Action.ELSEWHERE, "teacher_error", is_answer=False)
"""vLLM's server outlives its engine for a moment and says so in a 500."""
_DEAD_ENGINE = re.compile("EngineDeadError|EngineCore encountered an issue")

STATUS_HANDLING: Mapping[int, Handling] = {
    400: _REJECTED,
    401: _SET_UP,
    402: _SET_UP,
    403: _SET_UP,
    404: _SET_UP,
    405: _SET_UP,
    408: Handling(Action.ELSEWHERE, "teacher_timeout"),
    409: _FAILED,
    410: _SET_UP,
    413: _REJECTED,
    422: _REJECTED,
    425: _FAILED,
    429: Handling(Action.BACK_OFF, "teacher_rate_limited"),
    500: _FAILED,
    501: _SET_UP,
    502: _GATEWAY,
    503: _OVERLOADED,
    504: _GATEWAY,
    529: _OVERLOADED,
}
"""HTTP status -> handling; `handling_of_status` fills the gaps."""

EXCEPTION_HANDLING: tuple[tuple[type[BaseException], Handling], ...] = (
    (aiohttp.ClientConnectorCertificateError, _SET_UP),
    (aiohttp.ClientSSLError, _SET_UP),
    (aiohttp.InvalidURL, _SET_UP),
    (httpx2.UnsupportedProtocol, _SET_UP),
    (httpx2.InvalidURL, _SET_UP),
    (aiohttp.ConnectionTimeoutError, UNREACHABLE),
    (aiohttp.ClientConnectorError, UNREACHABLE),
    (aiohttp.ServerDisconnectedError, DISCONNECTED),
    (aiohttp.ServerTimeoutError, TIMED_OUT),
    (aiohttp.ClientError, DISCONNECTED),
    (asyncio.IncompleteReadError, DISCONNECTED),
    (ConnectionRefusedError, UNREACHABLE),
    (ConnectionError, DISCONNECTED),
    (TimeoutError, TIMED_OUT),
    (httpx2.ConnectError, UNREACHABLE),
    (httpx2.ConnectTimeout, UNREACHABLE),
    (httpx2.TimeoutException, TIMED_OUT),
    (httpx2.TransportError, DISCONNECTED),
    (httpx2.DecodingError, BAD_REPLY),
    (openai.APITimeoutError, TIMED_OUT),
    (openai.APIConnectionError, DISCONNECTED),
    (openai.APIError, BAD_REPLY),
)
"""Exception -> handling, the first match from the root cause outwards, special types before general ones.

The root cause counts, for the layers above rename it: a server that hangs up reaches us as openai's APITimeoutError.
"""

NETWORK_ERRORS = (openai.APIError, httpx2.HTTPError, httpx2.InvalidURL, aiohttp.ClientError, OSError, EOFError)
"""What an attempt may raise because of the endpoint. Anything else is a bug of ours and is not caught."""


def trouble_of_exception(error: BaseException) -> Trouble:
    """Returns the failed attempt that an exception of `NETWORK_ERRORS` stands for."""
    if isinstance(error, openai.APIStatusError):
        return _trouble_of_status(error)
    causes = list(_causes(error))
    for cause in causes:
        for kind, handling in EXCEPTION_HANDLING:
            if isinstance(cause, kind):
                return Trouble(handling, f"{type(cause).__name__}: {cause}".removesuffix(": "))
    return Trouble(DISCONNECTED, repr(causes[0]))


def handling_of_status(status: int) -> Handling:
    """Returns the handling of an HTTP status that is not 2xx."""
    if status in STATUS_HANDLING:
        return STATUS_HANDLING[status]
    if status >= 500:
        return _FAILED
    # A redirect is not followed: the key would travel to an address nobody configured.
    return _REJECTED if status >= 400 else _SET_UP


def retry_after_seconds(value: str | None, *, now: float | None = None) -> float | None:
    """Returns the seconds of a Retry-After header (a number or an HTTP date), or None when it says nothing usable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


_UNKNOWN_FIELD = re.compile(
    r"unknown|unrecogni[sz]ed|unsupported|not supported|isn't supported|does(?:n't| not) support|not permitted|"
    r"not allowed|extra_forbidden|unexpected|cannot find field|invalid parameter",
    re.IGNORECASE,
)


def refused_fields(trouble: Trouble, fields: frozenset[str]) -> frozenset[str]:
    """Returns which of the request's optional fields an endpoint says it does not know (400 and 422 only).

    The words matter as well as the name: "max_tokens=5000 cannot be greater than ..." rejects a value, not a field.
    """
    if trouble.status not in {400, 422} or not _UNKNOWN_FIELD.search(trouble.detail):
        return frozenset()
    return frozenset(name for name in fields if _names_field(trouble.detail, name))


def _names_field(detail: str, name: str) -> bool:
    if len(name) > 1:
        return re.search(rf"\b{re.escape(name)}\b", detail) is not None
    # A single letter may be anything: it counts where it stands as a name or beside a value.
    return re.search(rf"""["'`]{name}["'`]|\b{name} ?[=><]|[|:] {name}(?: \||$)""", detail) is not None


def _trouble_of_status(error: openai.APIStatusError) -> Trouble:
    status = error.status_code
    handling = handling_of_status(status)
    # A spent budget comes as "too many requests"; waiting does not refill it.
    if status == 429 and error.code == "insufficient_quota":
        handling = _SET_UP
    if status == 500 and _DEAD_ENGINE.search(error.response.text):
        handling = ENGINE_DEAD
    wait = retry_after_seconds(error.response.headers.get("retry-after"))
    return Trouble(handling, f"HTTP {status}: {_server_message(error)}", status, wait)


def _server_message(error: openai.APIStatusError) -> str:
    """Returns what the server said, at most 2,000 characters; openai's own message is the body as a Python dict."""
    body = error.body if isinstance(error.body, dict) else {}
    parts = [body.get(name) for name in ("message", "param", "code")]
    if isinstance(parts[0], str) and parts[0]:
        return " | ".join(part for part in parts if isinstance(part, str))[:2000]
    return (error.response.text.strip() or "(no message)")[:2000]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the root cause first, then what was raised from it, out to the error itself."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return reversed(chain)
