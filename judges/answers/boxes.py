"""Bounding boxes [x1, y1, x2, y2] in the ways models write them, compared by intersection over union.

Coordinates are compared in the reference's own frame. Where the reference is in pixels and the reply in fractions (all
between 0 and 1), or the other way round, the size of the sample's first image converts; grids of 1000 are not guessed,
because a box of pixels looks just the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from judges.answers.comparison import judged
from judges.answers.statements import Statement
from schemas.samples import Sample
from schemas.verdicts import Verdict

_MAX_BOXES = 64
_NUMBER = r"([-+]?\d{1,9}(?:\.\d{1,12})?|[-+]?\.\d{1,12})"
_GAP = r"\s{0,8},?\s{0,8}"
_FOUR = re.compile(
    rf"[\[(]\s{{0,8}}{_NUMBER}{_GAP}{_NUMBER}\s{{0,4}}[\])]?{_GAP}[\[(]?\s{{0,4}}{_NUMBER}{_GAP}{_NUMBER}\s{{0,8}}[\])]"
)
_NAMED = re.compile(
    rf"[\"']?x_?(?:1|min)[\"']?\s?[:=]\s?{_NUMBER}[,;\s]{{1,4}}[\"']?y_?(?:1|min)[\"']?\s?[:=]\s?{_NUMBER}[,;\s]{{1,4}}"
    rf"[\"']?x_?(?:2|max)[\"']?\s?[:=]\s?{_NUMBER}[,;\s]{{1,4}}[\"']?y_?(?:2|max)[\"']?\s?[:=]\s?{_NUMBER}",
    re.IGNORECASE,
)
_BARE = re.compile(
    rf"^\s*(?:<\|?box[^>]{{0,20}}>)?\s*{_NUMBER}[,\s]\s*{_NUMBER}[,\s]\s*{_NUMBER}[,\s]\s*{_NUMBER}\s*(?:</?\|?box[^>]{{0,20}}>)?[\s.]*$"
)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; corners in any order are sorted, so that x1 <= x2 and y1 <= y2."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    @property
    def is_fraction(self) -> bool:
        return min(self.x1, self.y1) >= 0 and max(self.x2, self.y2) <= 1

    def scaled(self, width: float, height: float) -> Box:
        return Box(self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height)


def find_boxes(text: str) -> list[Box]:
    """Returns the boxes in a text: "[1, 2, 3, 4]", "(1,2),(3,4)", JSON, "x1=1, y1=2, ..." or four bare numbers."""
    matches = [*_FOUR.finditer(text), *_NAMED.finditer(text)]
    if not matches:
        bare = _BARE.match(text[:400])
        matches = [bare] if bare else []
    boxes = []
    for match in sorted(matches, key=lambda match: match.start())[-_MAX_BOXES:]:
        a, b, c, d = (float(group) for group in match.groups())
        boxes.append(Box(min(a, c), min(b, d), max(a, c), max(b, d)))
    return list(dict.fromkeys(boxes))


def intersection_over_union(first: Box, second: Box) -> float:
    """Returns the IoU in [0, 1]; 0 if a box has no area."""
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (first.area + second.area - shared)


def check_boxes(statement: Statement, reference: list[Box], sample: Sample, threshold: float) -> Verdict | None:
    """Returns the verdict on the boxes of a statement; None if it has none.

    There must be as many as in the reference, each matching its own one: a spray of boxes is no answer.
    """
    given = find_boxes(statement.block) or find_boxes(statement.text)
    if not given:
        return None
    extracted = "; ".join(f"[{box.x1:g}, {box.y1:g}, {box.x2:g}, {box.y2:g}]" for box in given[:8])
    if len(given) != len(reference):
        return judged(False, extracted, f"{len(given)} boxes instead of {len(reference)}")
    given = [_in_frame_of(box, reference[0], sample) for box in given]
    remaining = list(given)
    for expected in reference:
        best = max(remaining, key=lambda box: intersection_over_union(expected, box))
        if intersection_over_union(expected, best) < threshold:
            return judged(False, extracted)
        remaining.remove(best)
    return judged(True, extracted)


def _in_frame_of(box: Box, reference: Box, sample: Sample) -> Box:
    if box.is_fraction == reference.is_fraction or not sample.images:
        return box
    width, height = sample.images[0].width, sample.images[0].height
    return box.scaled(width, height) if box.is_fraction else box.scaled(1 / width, 1 / height)
