"""Text as all readers see it: one form for the many ways to write the same characters, without markup.

Everything here is linear in the length of the text, and no text longer than `MAX_READ_CHARS` reaches it: a reply of
ten megabytes costs what its end costs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

MAX_READ_CHARS = 20_000
"""A final answer stands at the end of a reply; nothing before the last so many characters is looked at."""

_INVISIBLE = dict.fromkeys(
    [0x00AD, 0xFEFF, 0xFE0E, 0xFE0F, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)]
)
_LOOKALIKES = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–﹣－➖", "-"),
        **dict.fromkeys("—―", " - "),
        **dict.fromkeys("“”„«»″", '"'),
        **dict.fromkeys("‘’‚′`´", "'"),
        **dict.fromkeys("⁄∕", "/"),
        "º": "°",
        "˚": "°",
        "٫": ".",
        "٬": ",",
        "٪": "%",
        "⋅": "·",
        "∙": "·",
        "✕": "×",
        "✖": "×",
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mathcal|mathbb"
    r"|boldsymbol|bm|mbox|hbox|operatorname\*?|emph|underline|displaystyle|boxed|fbox|framebox)\s*\{([^{}]*)\}"
)
_SWITCH = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|bf|rm|it|cal|limits|nolimits)(?![A-Za-z])"
)
_SPACING = re.compile(r"\\[,;:!> ]|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\})(?![A-Za-z])|(?<!\\)~")
_MATH_FENCE = re.compile(r"\\[()\[\]]|(?<!\\)\$\$?")
_CURRENCY = re.compile(r"\\?\\\$|\\textdollar(?![A-Za-z])\s*")
_HTML = re.compile(r"</?(?:b|i|em|strong|p|br|span|div|u|center|code|li|ul|ol)\b[^<>]{0,100}>", re.IGNORECASE)
_EMPHASIS = re.compile(
    r"(?<![0-9A-Za-z)])\*{2,3}|\*{2,3}(?![0-9A-Za-z(\\-])"  # not the power in "2**3"
    r"|(?<![\w)*\]}])\*(?=\S)|(?<=[^\s*])\*(?![\w(*\\])"  # not the product in "2*x"
    r"|(?<!\w)_{1,3}(?=\w)|(?<=\w)_{1,3}(?![\w{\\(])"  # not the index in "x_1"
    r"|`+"
)
_LINE_PREFIX = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[*•▪◦][ \t]+)", re.MULTILINE)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b ?")


def unify_characters(text: str) -> str:
    """Returns the text in compatible, visible characters: ASCII digits and minus signs, plain quotes.

    Superscripts become "^{2}" and vulgar fractions "1/2" set apart by a space, because plain compatibility forms would
    make "cm²" into "cm2" and "2½" into "21/2".
    """
    if text.isascii():
        return text
    text = text.translate(_INVISIBLE).translate(_LOOKALIKES)
    text = _RAISED.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + match.group().translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda match: f" {match.group()} ", text)
    text = unicodedata.normalize("NFKC", text).translate(_LOOKALIKES)
    return "".join(_ascii_digits(text))


def _ascii_digits(text: str) -> Iterator[str]:
    for character in text:
        if character.isascii():
            yield character
        else:
            digit = unicodedata.decimal(character, None)
            yield character if digit is None else str(digit)


def strip_markup(text: str) -> str:
    """Returns the text without Markdown emphasis, HTML formatting, math fences and LaTeX font commands.

    Commands that carry meaning (\\frac, \\sqrt, \\pi) stay.
    """
    text = _CURRENCY.sub("", text)
    text = _HTML.sub(" ", text) if "<" in text else text
    if "\\" in text:
        text = _MATH_FENCE.sub(" ", text)
        text = _SWITCH.sub("", _SPACING.sub(" ", text))
        for _ in range(6):
            unwrapped = _WRAPPER.sub(r" \1 ", text)
            if unwrapped == text:
                break
            text = unwrapped
    else:
        text = text.replace("$", " ")
    text = _LINE_PREFIX.sub("", text)
    text = _EMPHASIS.sub("", text.replace("'''", "").replace("''", ""))
    return re.sub(r"[ \t]+", " ", text).strip()


@lru_cache(maxsize=4096)
def canonical_words(text: str) -> str:
    """Returns the text for comparison by words: case folded, without punctuation, articles and outer space.

    Signs that distinguish answers stay ("C++", "C#", "50%"), and so do points and commas between digits. A text of
    nothing but punctuation is returned as it is, so that it equals itself only.
    """
    folded = unify_characters(strip_markup(unify_characters(text))).casefold()
    characters = []
    for index, character in enumerate(folded):
        if (
            character.isalnum() or character in "%+#&@/=<>*°€£$" or unicodedata.category(character)[0] in "MS"
        ):  # marks, emoji
            characters.append(character)
        elif (
            character in ".,:" and folded[index - 1 : index].isdigit() and folded[index + 1 : index + 2].isdigit()
        ) or (character == "-" and folded[index + 1 : index + 2].isdigit()):
            characters.append(character)
        elif character not in "'.":
            characters.append(" ")
    words = " ".join("".join(characters).split())
    without_articles = " ".join(_ARTICLE.sub("", words).split())
    return without_articles or words or " ".join(folded.split())


def sentences(line: str) -> list[str]:
    """Returns the sentences of one line, split after a full stop and space, or after an ideographic full stop.

    The point of a label ("B. Paris", "2. Add them") ends no sentence.
    """
    parts: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", line):
        if parts and re.fullmatch(r"\W*\w{1,2}\.", parts[-1]):
            parts[-1] += f" {part}"
        elif part.strip():
            parts.append(part.strip())
    return parts
