"""Where a reply states its final answer: boxed, after a cue such as "the answer is", in bold, or in its last line.

Nothing here knows the answer's type: readers try the statements from the most to the least binding one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from judges.answers.text import MAX_READ_CHARS, sentences, strip_markup, unify_characters

_MAX_STATEMENT_CHARS = 1000
_MAX_BLOCK_CHARS = 4000


class Origin(StrEnum):
    """How a statement was recognised, from the most to the least binding."""

    BOXED = "boxed"
    CUED = "cued"
    BOLD = "bold"
    LAST = "last"

    @property
    def is_explicit(self) -> bool:
        """Whether the writer marked the statement as the answer, so that its first words are the answer."""
        return self is not Origin.LAST


@dataclass(frozen=True, slots=True)
class Statement:
    """A part of a reply that may be its final answer.

    text: without markup. raw: as written (unified characters). block: raw with the lines that follow it, for answers
    that span lines.
    """

    text: str
    raw: str
    block: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Statements:
    """All statements of a reply, most binding first. text: the part of the reply that was read, unified.

    is_cut: the last box opens and never closes, so the answer in it is incomplete.
    """

    items: Iterable[Statement]
    text: str
    is_cut: bool = False


_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_TAGS = (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>"))
_BETWEEN_BOXES = re.compile(
    r"^(?:[\s$,;.()\\\[\]*]|\\(?:text|quad|mathrm|textbf)|[{}]|\b(?P<word>and|or|und|oder|et|ou|y|o|e)\b){0,40}$",
    re.IGNORECASE,
)

_THE = r"(?:the|my|our|your|this)\s+"
_KIND = r"(?:final|correct|right|best|overall|only|only\s+possible|most\s+likely|resulting|only\s+correct|proper)\s+"
_NOUN = r"(?:answers?|options?|choices?|solution|result|response)"
_ABOUT = (
    r"(?:\s+(?:to|for|of)\s+(?:the|this|that|your|our)\s+(?:\w+\s+)?(?:question|problem|exercise|task|puzzle|riddle))?"
)
_LINK = (
    r"(?:\s*(?:is|are|was|would\s+be|should\s+be|must\s+be|will\s+be|becomes?|equals)\b\s*"
    r"(?:therefore|thus|then|hence|simply|just)?\s*:?|\s*[:=→]|\s+-(?=\s))"
)
_CUE = re.compile(
    # All of one group look once whether a word begins here, and not each for itself.
    r"(?<!\w)(?:"
    rf"(?:(?:{_THE})?(?:{_KIND}){{0,2}}answers?{_ABOUT}|(?:{_THE})?(?:{_KIND}){{1,2}}{_NOUN}{_ABOUT})"
    rf"[*_\"']{{0,3}}{_LINK}"
    r"|ans(?:wer)?\s*[.:=]"
    r"|i\s+(?:would\s+|will\s+|'ll\s+)?(?:choose|pick|select|answer|go\s+with)\b"
    r"|(?:la\s+)?(?:respuesta|resposta)(?:\s+(?:final|correcta|correta))?\s*(?:es|é|:)(?!\w)"
    r"|(?:la\s+)?(?:bonne\s+)?réponse(?:\s+(?:finale|correcte))?\s*(?:est|:)(?!\w)"
    r"|(?:die\s+)?(?:richtige\s+|endgültige\s+|korrekte\s+)?(?:antwort|lösung)\s*(?:ist|lautet|:)(?!\w)"
    r"|(?:la\s+)?risposta(?:\s+(?:finale|corretta))?\s*(?:è|:)(?!\w)"
    r"|(?:правильный\s+|окончательный\s+)?ответ\s*(?:это|:|-)"
    r")"
    r"|^\s*#{4}(?!#)"
    # Scripts in which no space need stand before a cue.
    r"|(?=[最正答选故因所应回최정답اसउ])(?:"
    r"(?:最终|正确)?(?:答案|选项)(?:应该|应)?(?:是|为|選|选|:)\s*:?"
    r"|(?:故选|因此选|所以选|应选)\s*:?"
    r"|(?:最終的な)?(?:答え|正解|回答)(?:は|:)"
    r"|(?:최종\s*)?(?:정답|답)(?:은|:)"
    r"|(?:الجواب|الإجابة)(?:\s+(?:النهائية|النهائي|الصحيحة|الصحيح))?\s*(?:هو|هي|:)"
    r"|(?:सही\s+)?उत्तर\s*(?:है|:)"
    r")",
    re.IGNORECASE | re.MULTILINE,
)
_REVERSED_CUE = re.compile(
    r"(?P<answer>[^.\n!?]{1,120}?)\s+(?:is|are|must be|would be|should be|has to be)\s+(?:therefore\s+|thus\s+)?"
    r"(?:the\s+)?(?:(?:final|only|best)\s+)?(?:correct|right|best|answer)(?:\s+(?:answer|option|choice|one|solution))?"
    r"\s*(?:[.!]|$)",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*\n]{1,300})\*\*|<(?:b|strong)>([^<\n]{1,300})</(?:b|strong)>|\\textbf\{([^{}\n]{1,300})\}")
_PLEASANTRY = re.compile(
    r"^(?:i\s+hope\b|(?:i\s+)?hope\s+(?:this|that|it)\b|(?:please\s+)?let\s+me\s+know\b|feel\s+free\b|(?:if\s+you|should\s+you)\b"
    r"[^.!?]{0,60}\b(?:question|help|need)|thank|is\s+there\s+anything|have\s+a\s+)",
    re.IGNORECASE,
)
_CALCULATION = re.compile(r"<<[^<>\n]{0,200}>>")
"""GSM8K's calculator notes ("48+24 = <<48+24=72>>72"), which models trained on it repeat."""

_ONLY_MARKUP = re.compile(r"^[\s*_`#>=~\-$|\\\[\](){}.:]*$")


def find_statements(answer: str) -> Statements:
    """Returns the candidates for the final answer in what follows the thought, most binding first."""
    text = _CALCULATION.sub("", unify_characters(answer[-MAX_READ_CHARS:])).strip()
    boxed, is_cut = _boxed(text)
    return Statements(_Found(text, boxed), text, is_cut)


class _Found(Iterable[Statement]):
    """The statements of a text, looked for one after the other: the first settles most replies."""

    def __init__(self, text: str, boxed: Sequence[Statement]) -> None:
        self._text, self._boxed = text, boxed

    def __iter__(self) -> Iterator[Statement]:
        seen: set[Statement] = set()
        for item in self._all():
            if item.text and item not in seen:
                seen.add(item)
                yield item

    def _all(self) -> Iterator[Statement]:
        yield from self._boxed
        yield from _cued(self._text)
        lines = _closing_lines(self._text)
        yield from _bold(lines)
        yield from _last(lines)


def _statement(raw: str, origin: Origin, block: str | None = None) -> Statement:
    raw = raw.strip()[:_MAX_STATEMENT_CHARS]
    return Statement(strip_markup(raw), raw, (block or raw)[:_MAX_BLOCK_CHARS], origin)


def _boxed(text: str) -> tuple[list[Statement], bool]:
    """Returns the last box, or the last boxes that only "and", "or" or a comma separates, and whether it is cut off."""
    starts = [match.end() for match in _BOX_COMMAND.finditer(text)][-8:]
    boxes: list[tuple[int, int, str]] = []  # start, end, content
    for start in starts:
        end = _closing_brace(text, start)
        if end is None:
            if start == starts[-1]:
                return [], True
            continue
        content = text[start + 1 : end] if text[start : start + 1] == "{" else text[start:end]
        boxes.append((start, end, content))
    for opening, closing in _TAGS:
        start = text.rfind(opening)
        end = text.find(closing, start)
        if start >= 0 and end >= 0:
            boxes.append((start + len(opening), end, text[start + len(opening) : end]))
    if not boxes:
        return [], False
    boxes.sort()
    content, next_start = boxes[-1][2], boxes[-1][0]
    for start, end, earlier in reversed(boxes[:-1]):
        gap = _BOX_COMMAND.sub("", text[end + 1 : next_start])
        between = _BETWEEN_BOXES.match(gap) if len(gap) <= 40 else None
        if between is None:
            break
        if earlier.strip() not in (content.strip(), ""):
            content = f"{earlier} {between.group('word') or ','} {content}"
        next_start = start
    return [_statement(content, Origin.BOXED, content)], False


def _closing_brace(text: str, start: int) -> int | None:
    """Returns where the group that opens at start ends, or the end of a single token; None if it never closes."""
    if text[start : start + 1] != "{":
        token = re.compile(r"\S{1,40}").match(text, start)
        return token.end() if token else start
    depth, index = 0, start
    while index < min(len(text), start + _MAX_BLOCK_CHARS):
        character = text[index]
        if character == "\\":
            index += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index
        index += 1
    return None


def _cued(text: str) -> Iterator[Statement]:
    """Yields what follows the last cues ("the answer is"), the last one first."""
    for match in _last_cues(text):
        block = text[match.end() : match.end() + _MAX_BLOCK_CHARS]
        lines = [line for line in block.splitlines() if not _ONLY_MARKUP.match(line[:_MAX_STATEMENT_CHARS])]
        if lines:
            yield _statement(lines[0], Origin.CUED, block)


def _last_cues(text: str) -> Iterator[re.Match[str]]:
    """Yields the last cue, and before it the last one that opens a line and goes on in it ("Answer: B")."""
    cues = _cues_backwards(text)
    last = next(cues, None)
    if last is None:
        return
    yield last
    for cue in cues:
        if _ONLY_MARKUP.match(text[text.rfind("\n", 0, cue.start()) + 1 : cue.start()]) and not _ONLY_MARKUP.match(
            text[cue.end() : cue.end() + 80].partition("\n")[0]
        ):
            yield cue
            return


def _cues_backwards(text: str) -> Iterator[re.Match[str]]:
    """Yields the cues that `_CUE.finditer` finds, the last one first.

    No cue goes on behind a full stop ("ans." ends with one), so what stands between two of them is searched by itself.
    """
    end = len(text)
    while end > 0:
        start = text.rfind(".", 0, end - 1) + 1
        yield from reversed(list(_CUE.finditer(text, start, end)))
        end = start


def _closing_lines(text: str) -> list[str]:
    """Returns the last lines that say something, in order, without closing pleasantries."""
    lines = [line.strip() for line in text.splitlines()[-200:]]
    lines = [line for line in lines if line and not _ONLY_MARKUP.match(line[:_MAX_STATEMENT_CHARS])]
    while len(lines) > 1 and _PLEASANTRY.match(strip_markup(lines[-1][:_MAX_STATEMENT_CHARS])):
        lines.pop()
    return lines


def _bold(lines: list[str]) -> list[Statement]:
    """Returns the bold part of the last line, unless it is a heading such as "**Answer:**"."""
    if not lines:
        return []
    parts = [next(filter(None, match.groups())) for match in _BOLD.finditer(lines[-1][-_MAX_BLOCK_CHARS:])]
    parts = [part for part in dict.fromkeys(parts) if not part.rstrip().endswith(":")]
    return [_statement(parts[0], Origin.BOLD)] if len(parts) == 1 else []


def _last(lines: list[str]) -> list[Statement]:
    """Returns the last sentence and the last line; a reply of one short line is its own last line."""
    if not lines:
        return []
    line = lines[-1][-_MAX_BLOCK_CHARS:]
    block = "\n".join(lines)[-_MAX_BLOCK_CHARS:]
    parts = sentences(line)
    while len(parts) > 1 and _PLEASANTRY.match(strip_markup(parts[-1])):
        parts.pop()
    found = []
    if parts:
        reverse = _REVERSED_CUE.search(strip_markup(parts[-1])[:_MAX_STATEMENT_CHARS])
        if reverse:
            found.append(_statement(reverse.group("answer"), Origin.LAST))
        found.append(_statement(parts[-1][-_MAX_STATEMENT_CHARS:], Origin.LAST, block))
    if len(parts) > 1 and len(line) <= _MAX_STATEMENT_CHARS:
        found.append(_statement(line, Origin.LAST, block))
    return found
