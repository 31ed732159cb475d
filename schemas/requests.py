"""What is asked of a teacher and what comes back, and the key under which a reply is stored for ever.

A judge renders a `TeacherRequest` and reads a `Reply`; neither does any I/O. The key covers everything that shaped
the reply, and nothing else: a changed model, prompt, image, parameter or seed is another call, a changed parser or
threshold is not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

SEED_RANGE = 2**31
"""Seeds are in [0, 2**31): what every engine takes."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. images: sha256 of stored images, shown before the text, in order."""

    role: Role
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the reply is drawn. max_tokens bounds the completion; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One call to be made, independent of the endpoint that will answer it.

    sample_id: the sample it is about. purpose: the judge that asks ("difficulty", "performance", ...).
    index: which of several samples of the same question this is. seed: passed to the engine; that of sample i is the
    question's own plus i, as vLLM seeds the choices of a call, so that samples may be asked for singly or together.
    choices: if not empty, the reply is constrained to exactly one of these strings (vLLM structured outputs), and
    logprobs of the first token are asked for.
    """

    sample_id: str
    purpose: str
    messages: tuple[Message, ...]
    sampling: Sampling
    seed: int = 0
    index: int = 0
    choices: tuple[str, ...] = ()

    @property
    def question(self) -> tuple[object, ...]:
        """What all samples of a question share, whoever asks it."""
        return self.messages, self.sampling, self.choices, (self.seed - self.index) % SEED_RANGE

    def sample(self, index: int) -> TeacherRequest:
        """Returns the request for another sample of the same question."""
        seed = (self.seed + index - self.index) % SEED_RANGE
        # Not by `replace`, which takes four times as long, for every sample.
        return TeacherRequest(
            self.sample_id, self.purpose, self.messages, self.sampling, seed, index=index, choices=self.choices
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """One completed call.

    text: the content of the message. reasoning: what the server's reasoning parser split off, if it has one.
    finish_reason: "stop" or "length" (or what the server says). top_logprobs: for a constrained request, the natural
    logarithms of the first token's alternatives, as (token, logprob) pairs. Token counts are the server's own; a call
    with several choices gets one count for all, which is shared out by the length of their texts. choice: place among
    the choices of its call. The prompt of a call is computed once: a sum over replies counts prompt_tokens,
    cached_tokens and seconds where choice is 0. num_attempts: of the call, the failed ones included.
    """

    text: str
    finish_reason: str
    model: str
    reasoning: str | None = None
    top_logprobs: tuple[tuple[str, float], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    choice: int = 0
    num_attempts: int = 1

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class CallFailure:
    """A request that got no usable reply although every retry was spent. It is recorded, never scored.

    reason: stable snake_case code ("teacher_rejected", "teacher_timeout", ...).
    """

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What of the endpoint shapes a reply: the served model, its revision, and the extra body sent with each call."""

    model: str
    revision: str = ""
    extra_body: dict[str, Any] = field(default_factory=dict)


def request_key(request: TeacherRequest, identity: ModelIdentity) -> str:
    """Returns the sha256 (hex) of everything that shapes the reply to a request. For many requests see `RequestKeys`.

    sample_id and purpose are left out on purpose: two judges that ask the very same thing share the reply.
    """
    return RequestKeys(identity).key(request)


class RequestKeys:
    """The keys of requests to one model; what they have in common is rendered once."""

    def __init__(self, identity: ModelIdentity) -> None:
        self._identity = tuple(map(_canonical_json, (identity.model, identity.revision, identity.extra_body)))

    def key(self, request: TeacherRequest) -> str:
        """Returns the key of a request, see `request_key`."""
        sampling = _sampling_json(*_sampling_values(request.sampling))
        before_index, before_seed, after_seed = _rendered_question(
            request.messages, sampling, request.choices, self._identity
        )
        content = b"%b%d%b%d%b" % (before_index, request.index, before_seed, request.seed, after_seed)
        return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=4096)
def _rendered_question(
    messages: tuple[Message, ...], sampling: str, choices: tuple[str, ...], identity: tuple[str, ...]
) -> tuple[bytes, bytes, bytes]:
    """Returns the canonical JSON of a request but for index and seed, cut where these stand.

    Kept, because the samples of a question differ in nothing else, and each is looked up several times.
    """
    model, revision, extra_body = identity
    # Not by dataclasses.asdict, which copies deeply and takes longer than all the rest.
    asked = _canonical_json([dict(zip(_MESSAGE_FIELDS, _message_values(item), strict=True)) for item in messages])
    before_index = f'{{"choices":{_canonical_json(choices)},"extra_body":{extra_body},"index":'
    before_seed = f',"messages":{asked},"model":{model},"revision":{revision},"sampling":{sampling},"seed":'
    return _encoded(before_index), _encoded(before_seed), b"}"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=64, typed=True)
def _sampling_json(*values: float) -> str:
    """Returns sampling parameters as JSON; 1 and 1.0, which are equal, are rendered each in its way."""
    return _canonical_json(dict(zip(_SAMPLING_FIELDS, values, strict=True)))


_MESSAGE_FIELDS = tuple(field.name for field in fields(Message))
_message_values = attrgetter(*_MESSAGE_FIELDS)
_SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
_sampling_values = attrgetter(*_SAMPLING_FIELDS)
_canonical_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def derived_seed(*parts: str | int) -> int:
    """Returns a seed below `SEED_RANGE` that depends on the parts alone: no order or worker count changes it."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % SEED_RANGE
