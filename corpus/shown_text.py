"""Text and numbers as a person reads them: clipped at a stated length, without characters that act on a terminal.

Escaping is not done here: it belongs to whatever the text is put into.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text fit for the page. note: "" or what was cut."""

    text: str
    note: str = ""


def plain_text(text: str, limit: int) -> Clipped:
    """Returns a text with at most `limit` characters, without control characters and lone surrogates."""
    clipped = _CONTROL_CHARACTERS.sub("\ufffd", text[:limit].replace("\r\n", "\n"))
    if len(text) <= limit:
        return Clipped(clipped)
    return Clipped(clipped + "…", f"clipped after {limit:,} of {len(text):,} characters")


def in_words(name: str, limit: int) -> str:
    """Returns a name of the code, such as trace_answer_wrong, as words."""
    return plain_text(name.replace("_", " "), limit).text


def whole(number: float) -> str:
    """Returns 1,234."""
    return f"{number:,.0f}"


def short_number(number: float) -> str:
    """Returns 987, 12.3 K, 4.56 M or 7.89 G: three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if number >= size:
            scaled = number / (1e3 if unit == "K" else size)
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {unit}"
    return whole(number)


def percent(share: float) -> str:
    """Returns a share in [0, 1] as 12.3 %; a share that is neither 0 nor 1 is never shown as if it were."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def points(difference: float) -> str:
    """Returns a difference of two shares as +1.2 points, with a true minus sign."""
    rounded = round(100 * difference, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded):.1f} points"


def signed(number: float) -> str:
    """Returns +1,234, −5 or ±0, with a true minus sign."""
    return f"{'+' if number > 0 else '−' if number < 0 else '±'}{whole(abs(number))}"
