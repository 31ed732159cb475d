"""`<image>` marks inside texts. Images are always shown before the text, so a mark is only needed as a reference.

The known spellings are `<image>`, `<image1>`, `<image 1>`, `<image_1>`, `<|image|>`, `<|image_1|>`, `<ImageHere>` and
Qwen's `<|vision_start|><|image_pad|><|vision_end|>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from schemas.errors import RowError

_MARK = re.compile(r"<\|?image(?:here|_pad)?(?:[\s_-]?(?P<number>\d{1,3}))?\|?>", re.IGNORECASE)
_VISION = re.compile(r"<\|vision_start\|>\s*(<\|image_pad\|>)\s*<\|vision_end\|>")
_LEANS_ON_NEXT = re.compile(
    r"\b(?:a|above|an|and|as|at|below|beside|between|by|for|from|in|into|of|on|or|see|than|the|this|to|using|versus|with)"
    r"[ \t]*\Z",
    re.IGNORECASE,
)
"""A mark after one of these words is the object of a sentence ("as shown in <image 1>"), not a mere mark at its end."""


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text whose marks were resolved. num_marks: how many there were."""

    text: str
    num_marks: int


def resolve_marks(text: str, *, num_images: int) -> MarkedText:
    """Returns the text with marks at its start and end removed and those inside turned into "[image k]".

    k is the mark's own number, or its place among the marks. A mark at an edge stays where the sentence needs it:
    another mark stands inside the same line ("<image 1> and <image 2> differ"), a numbered one is followed by a lower
    case word ("<image 1> shows"), or the word before it calls for an object ("seen in <image 1>"). More marks than
    images are let through if there is an image at all: benchmarks merge the figures of a question into one picture.

    Raises RowError: `image_missing` if there is a mark but no image.
    """
    text = _VISION.sub(r"\1", text)
    marks = list(_MARK.finditer(text))
    if not marks:
        return MarkedText(text, 0)
    if num_images == 0:
        raise RowError("image_missing", f"the text refers to {marks[0].group()!r}, but the row has no image")
    first, last = _inner_marks(text, marks)
    pieces, end = [], 0
    for index, (mark, number) in enumerate(zip(marks, _numbers(marks), strict=True)):
        pieces += [text[end : mark.start()], f"[image {number}]" if first <= index < last else ""]
        end = mark.end()
    return MarkedText("".join([*pieces, text[end:]]).strip(), len(marks))


def number_marks(text: str, *, num_before: int = 0) -> MarkedText:
    """Returns the text with every mark as "[image k]", at the edges too: an option may be nothing but a picture.

    num_before: marks in the texts before this one, for marks that have no number of their own.
    """
    text = _VISION.sub(r"\1", text)
    marks = list(_MARK.finditer(text))
    pieces, end = [], 0
    for mark, number in zip(marks, _numbers(marks, num_before), strict=True):
        pieces += [text[end : mark.start()], f"[image {number}]"]
        end = mark.end()
    return MarkedText("".join([*pieces, text[end:]]), len(marks))


def _numbers(marks: list[re.Match[str]], num_before: int = 0) -> list[int]:
    """Returns each mark's number, from 1: its own (counted from 0 if any is 0) or its place among the marks."""
    own = [int(mark["number"]) if mark["number"] else None for mark in marks]
    shift = 1 if 0 in own else 0
    return [num_before + index + 1 if number is None else number + shift for index, number in enumerate(own)]


def _inner_marks(text: str, marks: list[re.Match[str]]) -> tuple[int, int]:
    """Returns the half-open range of marks that stay as references."""
    first, start = 0, 0
    while first < len(marks) and not text[start : marks[first].start()].strip():
        start = marks[first].end()
        first += 1
    last, stop = len(marks), len(text)
    while last > first and not text[marks[last - 1].end() : stop].strip():
        stop = marks[last - 1].start()
        last -= 1
    opens_sentence = first > 0 and marks[first - 1]["number"] and re.match(r"[ \t]*[a-z]", text[start:])
    if first > 0 and (opens_sentence or (first < last and "\n" not in text[start : marks[first].start()])):
        first -= 1
    closes_sentence = last < len(marks) and _LEANS_ON_NEXT.search(text[:stop])
    if last < len(marks) and (closes_sentence or (first < last and "\n" not in text[marks[last - 1].end() : stop])):
        last += 1
    return first, last
