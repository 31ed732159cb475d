"""LLaVA and ShareGPT turns -> one question and one reply.

Of a longer conversation only the first question and the first reply after it are taken: later questions lean on what
was said before, and a corpus row is a single exchange. System turns and tool turns are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from schemas.errors import RowError
from sources.text import describe

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
"""Columns looked for, in this order, when a `conversations` source names none."""

IMAGE_COLUMNS = ("image", "images")
"""The same for images."""

_ASKS = frozenset({"human", "user"})
_REPLIES = frozenset({"gpt", "assistant", "model", "chatgpt", "bard", "bing"})


@dataclass(frozen=True, slots=True)
class Exchange:
    """question: with an image mark where a part of the message was an image. images: raw values inside the message."""

    question: str
    reply: str | None
    images: list[Any] = field(default_factory=list)


def first_exchange(turns: Any) -> Exchange:
    """Returns the first question and the reply to it (None if there is none) of a list of turns.

    Turns have `from` and `value` (LLaVA, ShareGPT) or `role` and `content`, a text or a list of parts (OpenAI).

    Raises RowError: `conversation_unreadable` if it is no such list, or nobody asks.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("conversation_unreadable", f"the conversation is {describe(turns)}, not a list of turns")
    question: str | None = None
    images: list[Any] = []
    for turn in turns:
        role = str(turn.get("from") or turn.get("role") or "").strip().lower()
        if question is None and role in _ASKS:
            question, images = _text_and_images(_content(turn))
        elif question is not None and role in _REPLIES:
            return Exchange(question, _text_and_images(_content(turn))[0], images)
    if question is None:
        roles = [str(turn.get("from") or turn.get("role")) for turn in turns[:6]]
        raise RowError("conversation_unreadable", f"no turn of a human or user among the turns of {roles}")
    return Exchange(question, None, images)


def _content(turn: dict[str, Any]) -> Any:
    value = turn.get("value")
    return turn.get("content") if value is None else value


def _text_and_images(content: Any) -> tuple[str, list[Any]]:
    """Returns the text of a message and the raw images among its parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RowError("conversation_unreadable", f"the content of a turn is {describe(content)}, not text or parts")
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and _is_image(part):
            texts.append("<image>")
            images += _images_of(part)
        else:
            raise RowError("conversation_unreadable", f"a part of a turn is {describe(part)}, not text or an image")
    return "\n".join(texts), images


def _is_image(part: dict[str, Any]) -> bool:
    return part.get("type") in {"image", "image_url"} or part.get("image") is not None


def _images_of(part: dict[str, Any]) -> list[Any]:
    """Returns the raw image a part carries; none if it only marks the place of one in the image column."""
    for key in ("image", "image_url", "url", "path", "bytes", "data"):
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None and not isinstance(value, int):
            return [value]
    return []
