"""Raw values -> clean text. What is not text is refused; content is never rewritten.

Done to every text: outer white space goes, line ends become "\\n", NULs and lone surrogates go (C stops at the
first, Arrow cannot store the second; surrogate pairs that JSON escapes split are joined before). Left out on purpose:
Unicode normalisation (NFC would change mathematics and names), HTML unescaping, collapsing of white space.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from schemas.errors import RowError
from schemas.template import THINK_TOKENS

MAX_TEXT_CHARS = 100_000
"""Longest question, answer or option. Beyond any teacher's context, so such a row could only fail later."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)
"""Tokens of Qwen's chat format. In data they would open a turn, or claim an image that is not there."""


def clean_text(text: str) -> str:
    """Returns the text as it is stored: see the module's description."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return text.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n").strip()


def is_blank(text: str) -> bool:
    """Whether nothing of the text is visible: white space, controls and zero-width characters only."""
    return all(unicodedata.category(character)[0] in "CZ" for character in text)


def is_missing(value: Any) -> bool:
    """Whether a raw value stands for "none": null, NaN (a null of pandas), or a text without a visible character."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and is_blank(value)


def number_text(value: int | float | Decimal) -> str:
    """Returns a number as a person writes it: 72.0 is "72" (tables with nulls turn whole numbers into floats)."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def scalar_text(value: Any, *, what: str) -> str | None:
    """Returns a text, number or boolean as clean text; None for a missing value. Booleans are "true" and "false".

    Raises RowError: `<what>_unreadable` for any other type or an infinite number, `<what>_too_long`.
    """
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal) and math.isfinite(value):
        text = number_text(value)
    elif isinstance(value, str):
        text = value
    else:
        raise RowError(f"{what}_unreadable", f"the {what} is {describe(value)}, not text or a number")
    check_length(text, what=what)
    return clean_text(text) or None


def check_length(text: str, *, what: str) -> None:
    """Raises RowError `<what>_too_long` beyond `MAX_TEXT_CHARS`."""
    if len(text) > MAX_TEXT_CHARS:
        raise RowError(f"{what}_too_long", f"the {what} has {len(text):,} characters, more than {MAX_TEXT_CHARS:,}")


def check_tokens(text: str, *, what: str) -> None:
    """Refuses text that holds tokens of the template or of the chat format, which would be read as structure.

    Raises RowError: `think_tag_in_text`, `control_token_in_text`.
    """
    if any(tag in text for tag in THINK_TOKENS):
        raise RowError("think_tag_in_text", f"the {what} contains a think tag: {text[:80]!r}")
    found = _CONTROL_TOKEN.search(text)
    if found:
        raise RowError("control_token_in_text", f"the {what} contains the chat token {found.group()!r}")


def describe(value: Any) -> str:
    """Returns a short description of a raw value for an error message: its type and how it begins."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value):,} bytes"
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(repr, list(value)[:8])) or '(none)'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
