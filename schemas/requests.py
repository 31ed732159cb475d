"""What is asked of a teacher and what comes back, and the key under which a reply is stored for ever.

A judge renders a `TeacherRequest` and reads a `Reply`; neither does any I/O. The key covers everything that shaped
the reply, and nothing else: a changed model, prompt, image, parameter or seed is another call, a changed parser or
threshold is not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


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
    index: which of several samples of the same question this is. seed: passed to the engine.
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


@dataclass(frozen=True, slots=True)
class Reply:
    """One completed call.

    text: the content of the message. reasoning: what the server's reasoning parser split off, if it has one.
    finish_reason: "stop" or "length" (or what the server says). top_logprobs: for a constrained request, the natural
    logarithms of the first token's alternatives, as (token, logprob) pairs. Token counts are the server's own.
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
    """Returns the sha256 (hex) of everything that shapes the reply to a request.

    sample_id and purpose are left out on purpose: two judges that ask the very same thing share the reply.
    """
    shaped_by = {
        "model": identity.model,
        "revision": identity.revision,
        "extra_body": identity.extra_body,
        "messages": [asdict(message) for message in request.messages],
        "sampling": asdict(request.sampling),
        "seed": request.seed,
        "index": request.index,
        "choices": list(request.choices),
    }
    canonical = json.dumps(shaped_by, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def derived_seed(*parts: str | int) -> int:
    """Returns a seed in [0, 2**31) that depends on the parts alone, so that no order or worker count changes it."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
