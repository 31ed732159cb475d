"""What the journal keeps of one reply, and its form as ASCII JSON.

The key comes first, so that opening a journal need not parse the JSON. The part that all samples of a question share
(who asks what of which images) is rendered once for all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from schemas.requests import Message, Reply, Sampling, TeacherRequest

_SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
_KEY_PREFIX = b'{"key":"'
# ASCII keeps the marker of a frame unforgeable, and lone surrogates, which JSON from a server may hold, writable.
_to_json = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One stored reply and what it was asked for.

    key: sha256 (hex) of all that shaped the reply. The other fields are those of `TeacherRequest`; images stand in
    the messages as sha256. stored_at: seconds since 1970, to the millisecond. Records of the journal's first version
    have neither messages, sampling, seed nor time.
    """

    key: str
    purpose: str
    sample_id: str
    index: int
    reply: Reply
    seed: int | None = None
    messages: tuple[Message, ...] = ()
    sampling: Sampling | None = None
    choices: tuple[str, ...] = ()
    stored_at: float | None = None


def rendered_question(request: TeacherRequest) -> bytes:
    """Returns the JSON members that all samples of a question share."""
    members = {
        "purpose": request.purpose,
        "sample_id": request.sample_id,
        "messages": [
            {"role": message.role, "text": message.text, "images": message.images} for message in request.messages
        ],
        "sampling": {name: getattr(request.sampling, name) for name in _SAMPLING_FIELDS},
        "choices": request.choices,
    }
    return _to_json(members)[1:-1].encode("ascii")


def is_same_question(request: TeacherRequest, other: TeacherRequest) -> bool:
    """Whether two requests share their rendered question; judged by identity, so it costs nothing to ask."""
    return (
        request.messages is other.messages
        and request.sampling is other.sampling
        and request.choices is other.choices
        and request.purpose is other.purpose
        and request.sample_id is other.sample_id
    )


def rendered_record(key: str, request: TeacherRequest, question: bytes, reply: Reply, *, stored_at: float) -> bytes:
    """Returns a record as ASCII JSON. question: `rendered_question` of the request."""
    # Written out, as dataclasses.asdict copies deeply and takes longer than all the rest.
    members = {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "model": reply.model,
        "reasoning": reply.reasoning,
        "top_logprobs": reply.top_logprobs,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cached_tokens": reply.cached_tokens,
        "seconds": reply.seconds,
        "choice": reply.choice,
        "num_attempts": reply.num_attempts,
    }
    numbers = f'","index":{request.index},"seed":{request.seed},"stored_at":{stored_at:.3f},"reply":'
    head = _KEY_PREFIX + (key + numbers + _to_json(members)).encode("ascii")
    return head + b"," + question + b"}"


def record_key(payload: bytes) -> bytes | None:
    """Returns the key (32 bytes) of a rendered record without parsing its JSON, None if the payload is no record."""
    if not payload.startswith(_KEY_PREFIX):
        return None
    start = len(_KEY_PREFIX)
    return bytes.fromhex(payload[start : payload.index(b'"', start)].decode("ascii"))


def parsed_record(payload: bytes | str) -> JournalRecord:
    """Returns the record that was rendered, by this version of the journal or the first."""
    members: dict[str, Any] = json.loads(payload)
    sampling = members.get("sampling")
    return JournalRecord(
        key=members["key"],
        purpose=members["purpose"],
        sample_id=members["sample_id"],
        index=members["index"],
        reply=_reply(members["reply"]),
        seed=members.get("seed"),
        messages=tuple(
            Message(message["role"], message["text"], tuple(message["images"]))
            for message in members.get("messages", ())
        ),
        sampling=None if sampling is None else Sampling(**sampling),
        choices=tuple(members.get("choices", ())),
        stored_at=members.get("stored_at"),
    )


def parsed_reply(payload: bytes) -> Reply:
    """Returns the reply of a rendered record alone."""
    return _reply(json.loads(payload)["reply"])


def json_text(record: JournalRecord) -> str:
    """Returns a record as ASCII JSON that `parsed_record` reads."""
    return _to_json(asdict(record))


def _reply(members: dict[str, Any]) -> Reply:
    members["top_logprobs"] = tuple((token, logprob) for token, logprob in members["top_logprobs"])
    return Reply(**members)
