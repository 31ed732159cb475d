"""Texts as they are compared: what may differ between two spellings of one question, and what may not.

Comparing is done on three views, each a pure function:
- `plain_text`: the same characters for the same signs on paper. Nothing a reader could tell apart is merged.
- `normalise_text`: plain text without the case of ordinary words and without the closing punctuation. Two texts that
  are equal here are the same text. The view is idempotent.
- `tokens`: words, numbers and signs in order, without prose punctuation; the unit of near comparison.

What is merged, and what is kept because it can change an answer:
- Unicode: NFC, not NFKC. NFKC turns "x²" into "x2", "2½" into "21/2" and a vector's bold letter into a plain one. Of
  the compatibility characters only those that differ in width or joining form are folded (full-width Latin, no-break
  spaces, Arabic presentation forms, "fi" ligatures).
- Dashes and minus signs become "-", curly quotes straight ones. "+", "-", "×", "*" stay as they are.
- Invisible characters go: zero-width spaces, byte order marks, soft hyphens, directional marks (a model reads the
  logical order, which they do not touch), emoji variation selectors. Joiners stay: they make emoji and Persian words.
- White space becomes one space. So two programs that differ in indentation alone are compared as equal.
- Case is folded where it carries no meaning ("What", "what", "WHAT IS THIS"), and kept in single letters ("x" and "X"
  are two variables), LaTeX commands ("\\\\Delta", "\\\\delta"), short capitals ("CO" and "Co", "AB" and "ab") and mixed
  spellings ("mW", "MW", "NaCl").
- Closing ".", "?", ":", ";", "," go, and "!" unless it may be a factorial ("5!", "n!", "(n+1)!"). A text of nothing but
  punctuation stays whole, since options such as "?" and "." differ.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

_MAX_MARKS = 30
"""Combining marks kept in a row, as in Unicode's Stream-Safe Text Format (UAX 15, section 13). Without the bound NFC
takes time quadratic in the length of a run of marks: 33 s for 200,000 of them."""

_INVISIBLE = (0x00AD, 0x061C, 0x180E, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065))
_INVISIBLE_TOO = (*range(0x2066, 0x206A), 0xFE0E, 0xFE0F, 0xFEFF)
_DASHES = "‐‑‒–—―−⁃﹘﹣－"
_SINGLE_QUOTES = "‘’‚‛＇"
_DOUBLE_QUOTES = "“”„‟＂"
_FOLDED_FORMS = ("<wide>", "<narrow>", "<noBreak>", "<initial>", "<medial>", "<final>", "<isolated>")
_LIGATURES = (*range(0xFB00, 0xFB07), *range(0xFB13, 0xFB18))
_CLOSING = frozenset(" ?.:;,…؟،؛。、।॥")

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters. Each of
their characters counts as a word."""

_DECISIVE = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
    first second third fourth fifth sixth seventh eighth ninth tenth last half halves thirds quarter quarters once twice
    thrice double triple dozen pair both
    not no none never neither nor without except cannot can't don't doesn't didn't isn't aren't wasn't weren't won't
    true false incorrect wrong all any every each some only least most more less fewer greater smaller larger bigger
    higher lower longer shorter older younger maximum minimum max min largest smallest biggest highest lowest longest
    shortest greatest fewest increase decrease increased decreased increasing decreasing add subtract plus minus times
    multiply multiplied divide divided sum difference product quotient average mean median mode percent odd even
    left right above below over under top bottom up down front behind before after inside outside between north south
    east west horizontal vertical clockwise counterclockwise row column near far
    red orange yellow green blue purple pink brown black white gray grey
    who whom whose where when why how
    不 没 無 无 非 未 左 右 上 下 前 后 後 内 外 大 小 多 少 最 加 减 減 乘 除 两 兩 半 东 西 南 北 红 黄 绿 蓝 黑 白
"""
_DECISIVE_WORDS = frozenset(_DECISIVE.split())
"""Words whose replacement makes another question of it, however long the text: numbers, negations, quantities,
comparisons, operations, directions, the basic colour terms (Berlin and Kay 1969) and question words."""

_FILLER = "a A an the is are was were be been of please kindly this that these those there it its"
_FILLERS = frozenset(_FILLER.split())
"""Words whose place says nothing about the order of what is asked."""


def plain_text(text: str) -> str:
    """Returns the text in NFC, with one spelling of dashes, quotes, widths and white space and nothing invisible.

    Case and punctuation stay. Linear in the length of the text, whatever it holds; lone surrogates pass unchanged.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", _bound_marks(text.translate(_translation())))
    elif _CONTROL.search(text):
        text = _CONTROL.sub(" ", text)
    return " ".join(text.split())


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")


def normalise_text(text: str) -> str:
    """Returns the text as exact comparison sees it (rules above). Idempotent; "" only for a text without content."""
    folded = _fold_case(plain_text(text))
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", folded)
    end = len(folded)
    while end and (folded[end - 1] in _CLOSING or (folded[end - 1] == "!" and not _may_be_factorial(folded, end - 1))):
        end -= 1
    closed = folded[:end].lstrip("¿¡ ")
    return closed or folded


def tokens(text: str) -> list[str]:
    """Returns the words, numbers, LaTeX commands and signs of a *normalised* text, in order.

    Prose punctuation and hyphens inside words are left out. Brackets, signs, emoji and runs of "_" are tokens of their
    own, and so is each character of a script written without spaces.
    """
    return [text[match.start() : match.end()] for match in _TOKEN.finditer(text.translate(_SHADOW)) if match.lastindex]


def is_decisive(token: str) -> bool:
    """Says whether a token must agree in texts that ask the same: numbers, signs, single letters, decisive words."""
    first = token[0]
    if first.isnumeric() or not first.isalpha() or token in _DECISIVE_WORDS:
        return True
    is_one_letter = sum(map(str.isalpha, token)) == 1  # "x", and "x̄" with its mark
    return is_one_letter and token not in ("a", "A", "I") and not _UNSPACED.match(token)


def decisive_tokens(text_tokens: Iterable[str]) -> list[str]:
    """Returns the tokens that must agree in order, see `is_decisive`."""
    return [token for token in text_tokens if is_decisive(token)]


def content_tokens(text_tokens: Iterable[str]) -> list[str]:
    """Returns the tokens whose order must agree: all but articles, forms of "to be" and the like."""
    return [token for token in text_tokens if token not in _FILLERS]


def spaced_words(text: str) -> list[str]:
    """Returns words as people count them: split at white space, and each character of an unspaced script by itself."""
    if text.isascii():
        return text.split()
    return [text[match.start() : match.end()] for match in _WORD.finditer(text.translate(_SHADOW))]


def num_unspaced(words: Iterable[str]) -> int:
    """Returns how many words are single characters of a script written without spaces."""
    return sum(1 for word in words if _UNSPACED.match(word))


def _bound_marks(text: str) -> str:
    shadow = text.translate(_SHADOW)
    if "M" * (_MAX_MARKS + 1) not in shadow:
        return text
    pieces, end = [], 0
    for match in _LONG_MARKS.finditer(shadow):
        pieces.append(text[end : match.start()])
        end = match.end()
    return "".join([*pieces, text[end:]])


def _may_be_factorial(text: str, place: int) -> bool:
    before = text[place - 1 : place]
    if not before:
        return False
    lone_letter = before.isalpha() and not text[place - 2 : place - 1].isalnum()
    return before.isdigit() or before in ")]}" or lone_letter


def _fold_case(text: str) -> str:
    """Returns the text with the case of ordinary words folded; a text without any small letter counts as shouted."""
    if text.islower():
        return _LETTER_RUN.sub(lambda match: match[0].casefold(), text) if not text.isascii() else text
    is_shouted = not any(char.islower() for char in text) and _LONG_RUN.search(text) is not None

    def fold(match: re.Match[str]) -> str:
        run = match[0]
        if run[0] == "\\":
            return run
        return run.casefold() if is_shouted or len(run) >= 5 or run.islower() or run.istitle() else run

    return _LETTER_RUN.sub(fold, text)


_LETTER_RUN = re.compile(r"\\[A-Za-z]+|[^\W\d_]{2,}")
_LONG_RUN = re.compile(r"[^\W\d_]{4,}")


@cache
def _translation() -> dict[int, str | None]:
    """Returns the table of `str.translate` for characters that are folded, replaced or dropped one by one."""
    table: dict[int, str | None] = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")
    for code in (*range(0xA0, 0x3100), *range(0xFB00, 0x10000)):
        form, _, codes = unicodedata.decomposition(chr(code)).partition(" ")
        if form in _FOLDED_FORMS or (form == "<compat>" and code in _LIGATURES):
            table[code] = "".join(chr(int(part, 16)) for part in codes.split())
    table |= dict.fromkeys((*_INVISIBLE, *_INVISIBLE_TOO))
    table |= {ord(dash): "-" for dash in _DASHES} | {ord("…"): "..."}
    table |= {ord(quote): "'" for quote in _SINGLE_QUOTES} | {ord(quote): '"' for quote in _DOUBLE_QUOTES}
    return table


class _Shadow(dict[int, str]):
    """The table of `str.translate` that turns a text into one letter per character, by kind, filled as it is used.

    A A-Z or a-z, L another letter, M mark or joiner, D decimal digit, N other numeral, U unspaced script, S white
    space, C closing bracket, P prose punctuation, X any other sign; a few characters stand for themselves. Patterns
    over such shadows need no classes of hundreds of ranges, through which `re` goes one by one (five times slower).
    """

    def __missing__(self, code: int) -> str:
        self[code] = kind = _kind(chr(code))
        return kind


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\\.,:'\"!-_":
        return char
    if category[0] == "M" or char in "\u200c\u200d" or 0x1F3FB <= ord(char) <= 0x1F3FF:  # the last: skin tones
        return "M"
    if _UNSPACED.match(char):
        return "U"
    if category[0] == "L":
        return "A" if char.isascii() else "L"
    if category[0] == "N":
        return "D" if category == "Nd" else "N"
    if char.isspace():
        return "S"
    if char in ")]}":
        return "C"
    return "P" if category[0] == "P" and char not in "%‰&*/@#([{·′″†" else "X"


_SHADOW = _Shadow()

_LONG_MARKS = re.compile(f"(?<=M{{{_MAX_MARKS}}})M+")
_WORD = re.compile(r"UM*|[^US]+")
_TOKEN = re.compile(
    r"(\\A+"  # a LaTeX command
    r"|D+(?:[.,]D+)*|(?<![ALDNU])\.D+"  # 3, 1,000.5 and .5
    r"|[AL][ALM]*(?:'[AL][ALM]*)*"  # a word with its marks: don't
    r"|[UN]M*"
    r"|(?<=D):(?=S?D)|(?<=DS):(?=S?D)"  # a ratio
    r"|(?<=[AL])(?<![ALM][AL])'+(?![ALDNU])|(?<=D)[\"']"  # f'(x), 5'3"
    r"|(?<=[DC])!|(?<=[AL])(?<![ALM][AL])!"  # a factorial
    r"|_(?!_)"  # a blank to fill in, however wide
    r"|(?<![AL][AL])-|-(?![AL][AL])"  # a minus, not a hyphen between two words
    r"|[XCM\\]M*"
    r")|."
)
"""Tokens of a shadow. Every alternative takes a character and none can split a text in two ways: the time is linear."""
