"""What the fault server says: texts by hash, whole answers in vLLM's form, and what a call's body holds. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from schemas.errors import ConfigError

Body = dict[str, Any]
"""A JSON object: the body of a call or of its answer."""
Answer = Callable[[Body, int], str | Body]
"""(body of the call, number of the choice) -> its text, or a whole chat completion, whose first choice is taken.

The body also holds `_purpose` and `_index` (from the client's headers X-Bimode-Purpose and X-Bimode-Sample-Index) and
`_question`, the sha256 of the messages. Choice j of a call belongs to the seed `body["seed"] + j`, as in vLLM. A
LookupError becomes a 400, any other exception a logged 500. A call for one choice gets a whole answer as it is.
"""

IMAGE_TOKENS = 64
"""What an image adds to the prompt tokens of an answer; a token of text is a word."""
_CHOSEN_PROBABILITY = 0.9
"""Of the constrained choice that an `Answer` gives as a text; the others share the rest."""


def hashed_answer(mean_tokens: int = 16) -> Answer:
    """Returns an `Answer` that depends on the messages and the seed of the choice alone.

    Its texts have 1 to 2 * mean_tokens - 1 words, but no more than the call allows; a constrained call gets one of
    its choices.
    """
    if mean_tokens < 1:
        raise ConfigError(f"answers of {mean_tokens} tokens on average cannot be given; it must be 1 or more")

    def answer(body: Body, choice: int) -> str:
        seed = (body.get("seed") or 0) + choice
        stream = hashlib.shake_128(f"{body['_question']}:{seed}".encode())
        number = int.from_bytes(stream.digest(8), "big")
        if allowed := allowed_choices(body):
            return allowed[number % len(allowed)]
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 2**31
        num_words = min(1 + number % (2 * mean_tokens - 1), limit)
        letters = stream.hexdigest(8 + 2 * num_words)[16:]
        return " ".join(letters[at : at + 4] for at in range(0, 4 * num_words, 4))

    return answer


def completion(
    text: str | None,
    body: Body,
    *,
    finish_reason: str = "stop",
    reasoning: str | None = None,
    top_logprobs: Sequence[tuple[str, float]] = (),
    cached_tokens: int = 0,
) -> Body:
    """Returns a whole answer of one choice as vLLM gives it; a token is a word. top_logprobs: of the first token.

    They are left out where the call does not ask for them.
    """
    prompt_tokens = num_prompt_tokens(body)
    completion_tokens = len((text or "").split())
    logprobs = None
    if body.get("logprobs") and top_logprobs:
        alternatives = [_token_record(token, logprob) for token, logprob in top_logprobs]
        logprobs = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
    return {
        "id": "chatcmpl-fault-server",
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
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    }


def constrained_completion(choice_probabilities: Mapping[str, float], body: Body) -> Body:
    """Returns the answer to a constrained call: the likeliest choice, with the logarithms of all that are possible."""
    ranked = sorted(choice_probabilities.items(), key=lambda item: -item[1])
    logprobs = [(choice, math.log(probability)) for choice, probability in ranked if probability > 0]
    return completion(ranked[0][0], body, top_logprobs=logprobs)


def _token_record(token: str, logprob: float) -> Body:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}


def text_completion(text: str, body: Body, cached_tokens: int) -> Body:
    """Returns the answer with a text; a constrained one brings log-probabilities of all its choices."""
    others = [choice for choice in allowed_choices(body) if choice != text]
    logprobs: list[tuple[str, float]] = []
    if others and body.get("logprobs"):
        logprobs = [(choice, math.log((1 - _CHOSEN_PROBABILITY) / len(others))) for choice in others]
        logprobs = [(text, math.log(_CHOSEN_PROBABILITY)), *logprobs][: max(1, body.get("top_logprobs") or 1)]
    return completion(text, body, top_logprobs=logprobs, cached_tokens=cached_tokens)


def joined_completion(replies: Sequence[Body]) -> Body:
    """Returns one answer with the first choice of each; the prompt counts once, as in vLLM."""
    if len(replies) == 1:
        return replies[0]
    choices = [{**reply["choices"][0], "index": place} for place, reply in enumerate(replies)]
    usage = replies[0]["usage"]
    num_tokens = sum(reply["usage"]["completion_tokens"] for reply in replies)
    usage = {**usage, "completion_tokens": num_tokens, "total_tokens": usage["prompt_tokens"] + num_tokens}
    return {**replies[0], "choices": choices, "usage": usage}


def question_text(body: Body) -> str:
    """Returns the texts of all user turns of a call."""
    return "\n".join(
        str(part.get("text", ""))
        for message in body.get("messages", [])
        if message.get("role") == "user"
        for part in content_parts(message)
        if part.get("type") == "text"
    )


def image_urls(body: Body) -> list[str]:
    """Returns the addresses of all images of a call, in order."""
    parts = [part for message in body.get("messages", []) for part in content_parts(message)]
    return [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]


def allowed_choices(body: Body) -> list[str]:
    """Returns the strings that vLLM's structured outputs allow as an answer; none means any text."""
    constraint = body.get("structured_outputs")
    choices = constraint.get("choice") if isinstance(constraint, dict) else None
    return [str(choice) for choice in choices] if isinstance(choices, list) else []


def num_prompt_tokens(body: Body) -> int:
    """Returns the words of all turns, and `IMAGE_TOKENS` for each image."""
    num_tokens = 0
    for message in body.get("messages", []):
        for part in content_parts(message):
            num_tokens += IMAGE_TOKENS if part.get("type") == "image_url" else len(str(part.get("text", "")).split())
    return num_tokens


def content_parts(message: Body) -> list[Body]:
    """Returns the parts of a message; a plain text is one."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def num_choices(body: Body) -> int:
    """Returns n, which is 1 where the call does not say."""
    return body.get("n") or 1


def num_generated_tokens(reply: Body) -> list[int]:
    """Returns the words of each choice of an answer; of one without any choices, that it has none."""
    choices = [choice for choice in reply.get("choices") or [] if isinstance(choice, dict)]
    return [len(str((choice.get("message") or {}).get("content") or "").split()) for choice in choices] or [0]


def sha256_of_json(value: object) -> bytes:
    """Returns the digest of a JSON value, whatever the order of its keys."""
    hasher = hashlib.sha256()
    _feed(value, hasher.update)
    return hasher.digest()


def _feed(value: object, update: Callable[[bytes], None]) -> None:
    # Long strings (images) go in as they are: rendering them as JSON again would cost most of a call's time.
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        update(b"s%d:" % len(encoded))
        update(encoded)
    elif isinstance(value, dict):
        update(b"d%d:" % len(value))
        for name in sorted(value):
            _feed(name, update)
            _feed(value[name], update)
    elif isinstance(value, list):
        update(b"l%d:" % len(value))
        for item in value:
            _feed(item, update)
    else:
        update(b"v%s;" % repr(value).encode())
