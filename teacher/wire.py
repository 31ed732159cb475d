"""The OpenAI chat format: requests rendered into bodies, bodies read into replies. Pure.

Checked against vLLM 0.32, which takes `structured_outputs: {"choice": [...]}` and returns log-probabilities that the
constraint has already masked; its first tokens may be mere beginnings of a choice ("y" beside "yes").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from schemas.requests import Message, Reply, TeacherRequest
from schemas.template import CLOSE_THINK
from teacher.images import SentImage

OPTIONAL_FIELDS = frozenset(
    {"structured_outputs", "logprobs", "top_logprobs", "seed", "max_completion_tokens", "n", "uuid"}
)
"""Fields an endpoint may not know. Each is left out, or replaced by its older name, once the endpoint has said so."""
_GOES_WITH = {"logprobs": "top_logprobs", "top_logprobs": "logprobs"}
_TOP_LOGPROBS = 20
"""As many alternatives as OpenAI and an unconfigured vLLM give."""
_NO_LOGPROB = -9999.0
"""vLLM fills up the alternatives of a constrained token with this value."""
_MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens")


class BadReply(Exception):
    """The endpoint answered 200 with something that is no chat completion; the message says what was seen."""


def render_body(
    request: TeacherRequest,
    *,
    model: str,
    images: Mapping[str, SentImage],
    extra_body: Mapping[str, Any],
    num_choices: int = 1,
    without: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Returns the JSON body of a call.

    images: those of the request by their sha256. extra_body: wins over our own fields, as in the openai package.
    num_choices: samples drawn by the one call. without: fields of `OPTIONAL_FIELDS` that the endpoint does not know.
    """
    has_uuid = "uuid" not in without
    body: dict[str, Any] = {
        "model": model,
        "messages": [_render_message(message, images, has_uuid=has_uuid) for message in request.messages],
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "seed": request.seed,
        # OpenAI's newer models refuse max_tokens, vLLM takes both names; who knows only the older says so.
        "max_completion_tokens": request.sampling.max_tokens,
    }
    if num_choices > 1:
        body["n"] = num_choices
    if "max_completion_tokens" in without:
        body["max_tokens"] = request.sampling.max_tokens
    if request.choices:
        body["structured_outputs"] = {"choice": [_encodable(choice) for choice in request.choices]}
        body["logprobs"] = True
        body["top_logprobs"] = _TOP_LOGPROBS
    dropped = without | {_GOES_WITH[name] for name in without if name in _GOES_WITH}
    body = {name: value for name, value in body.items() if name not in dropped}
    if any(name in extra_body for name in _MAX_TOKENS_NAMES):
        # Both names at once would be refused.
        body = {name: value for name, value in body.items() if name not in _MAX_TOKENS_NAMES}
    return {**body, **extra_body}


def parse_replies(content: bytes, *, model: str, num_choices: int, seconds: float, is_constrained: bool) -> list[Reply]:
    """Returns the replies in the body of a 200 answer, in order of their choices, which begin with choice 0.

    model: the name asked for, taken when the server names none. num_choices: as many were asked for; a server may give
    fewer. seconds: how long the call took. An empty text is a reply, and so is a missing one when the server's
    reasoning parser took all of it or the length ran out. The list ends before the first choice that is no reply.

    Raises BadReply: no JSON, no choice, or a first choice without message or text.
    """
    body = _parse_body(content)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"the answer has no choices: {content[:200]!r}")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    chosen: list[_Choice] = []
    for choice in _in_order(choices)[:num_choices]:
        try:
            chosen.append(_parse_choice(choice, content, is_constrained=is_constrained))
        except BadReply:
            if not chosen:
                raise
            break
    shares = _shared_out(_count(usage, "completion_tokens"), chosen, num_others=len(choices) - len(chosen))
    name = _text_or(body.get("model"), model)
    prompt_tokens = _count(usage, "prompt_tokens")
    cached_tokens = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    return [
        Reply(
            text=choice.text,
            finish_reason=choice.finish_reason,
            model=name,
            reasoning=choice.reasoning,
            top_logprobs=choice.top_logprobs,
            prompt_tokens=prompt_tokens,
            completion_tokens=share,
            cached_tokens=cached_tokens,
            seconds=seconds,
            choice=place,
        )
        for place, (choice, share) in enumerate(zip(chosen, shares, strict=True))
    ]


class _Choice(NamedTuple):
    """What one choice of an answer says; the fields are those of `Reply`."""

    text: str
    finish_reason: str
    reasoning: str | None
    top_logprobs: tuple[tuple[str, float], ...]


def _in_order(choices: list[Any]) -> list[Any]:
    """Returns the choices by their index, where each has one of its own; else as they came."""
    if len(choices) == 1:
        return choices
    indices = [choice.get("index") if isinstance(choice, dict) else None for choice in choices]
    if sorted(index for index in indices if isinstance(index, int)) != list(range(len(choices))):
        return choices
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _parse_choice(choice: Any, content: bytes, *, is_constrained: bool) -> _Choice:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BadReply(f"the choice has no message: {content[:200]!r}")
    finish_reason = _text_or(choice.get("finish_reason"), "unknown")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    reasoning = reasoning if isinstance(reasoning, str) else None
    text = _content_text(message)
    if text is None and not reasoning and finish_reason != "length":
        raise BadReply(f"the message has no content: {content[:200]!r}")
    return _Choice(text or "", finish_reason, reasoning, _first_top_logprobs(choice) if is_constrained else ())


def _shared_out(num_tokens: int, chosen: Sequence[_Choice], *, num_others: int) -> list[int]:
    """Returns each choice's part of the tokens of a call, by length of text; they sum to the whole, exactly.

    num_others: choices that were no replies; they are taken to be of mean length.
    """
    if num_others > 0:
        num_tokens = num_tokens * len(chosen) // (len(chosen) + num_others)
    lengths = [1 + len(choice.text) + len(choice.reasoning or "") for choice in chosen]
    bounds = [num_tokens * part // sum(lengths) for part in accumulate(lengths, initial=0)]
    return [end - start for start, end in pairwise(bounds)]


def served_models(content: bytes) -> list[str] | None:
    """Returns the model names in the body of GET /models, or None when it is no such list."""
    try:
        data = _parse_body(content).get("data")
    except BadReply:
        return None
    if not isinstance(data, list):
        return None
    return [item["id"] for item in data if isinstance(item, dict) and isinstance(item.get("id"), str)]


def _parse_body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"the answer is no JSON ({type(error).__name__}): {content[:200]!r}") from error
    if not isinstance(body, dict):
        raise BadReply(f"the answer is no JSON object: {content[:200]!r}")
    return body


def _content_text(message: dict[str, Any]) -> str | None:
    """Returns the text of a message: its content, the text parts of it, or a refusal in the server's own field."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "".join(texts) if texts else None
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else None


def _first_top_logprobs(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Returns the alternatives of the first token of the answer: behind a thought, and behind white space."""
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list):
        return ()
    entries = [entry for entry in entries if isinstance(entry, dict)]
    closings = [at for at, entry in enumerate(entries) if str(entry.get("token")).strip() == CLOSE_THINK]
    answer = entries[closings[-1] + 1 :] if closings else entries
    first = next((entry for entry in answer if str(entry.get("token", "")).strip()), None)
    alternatives = first.get("top_logprobs") if first else None
    if not isinstance(alternatives, list):
        return ()
    pairs: list[tuple[str, float]] = []
    for item in alternatives:
        token, logprob = (item.get("token"), item.get("logprob")) if isinstance(item, dict) else (None, None)
        if isinstance(token, str) and isinstance(logprob, int | float) and _NO_LOGPROB < logprob < 1.0:
            # A rounded 0 may exceed it a little; NaN and the infinities fail the comparison.
            pairs.append((token, float(logprob)))
    return tuple(pairs)


def _count(usage: object, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _text_or(value: object, default: str) -> str:
    return value if isinstance(value, str) and value else default


def _render_message(message: Message, images: Mapping[str, SentImage], *, has_uuid: bool) -> dict[str, Any]:
    text = _encodable(message.text)
    if not message.images:
        return {"role": message.role, "content": text}
    parts: list[dict[str, Any]] = []
    for image in (images[sha256] for sha256 in message.images):
        parts.append({"type": "image_url", "image_url": {"url": image.url}})
        if has_uuid:
            parts[-1]["uuid"] = image.uuid
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": message.role, "content": parts}


def _encodable(text: str) -> str:
    """Returns the text with lone surrogates, which UTF-8 cannot carry, replaced by U+FFFD; pairs become one letter."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
