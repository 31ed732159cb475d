"""Lists: the same items, each once per mention; their order counts only where the question asks for one."""

from __future__ import annotations

import json
import re

from judges.answers.comparison import Matrix, Pending, judged
from judges.answers.formulas import looks_like_formula
from judges.answers.numbers import same_number, whole_quantity
from judges.answers.short_texts import TEXT_MIN_SIMILARITY, same_text
from judges.answers.statements import Statement
from judges.answers.text import strip_markup, unify_characters
from schemas.config import VerificationConfig
from schemas.verdicts import Verdict

_MAX_ITEMS = 100
_ASKS_ORDER = re.compile(
    r"\b(?:in\s+(?:\w+\s+){0,3}order|order\s+(?:of|from|the|them|these)|sort(?:ed)?|rank(?:ed|ing)?|sequence|ascending|descending|chronological"
    r"|from\s+(?:\w+\s+){0,2}(?:small|larg|low|high|left|right|top|bottom|first|least|most|old|young|short|tall|big)\w*\s+to\b|arrange)",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^[ \t]*(?:[-*•·]|\(?\d{1,3}[.)]|\(?[a-z][.)])[ \t]+(\S.*)$", re.MULTILINE)
_BRACKETED = re.compile(r"[\[({]([^\[\](){}]*)[\])}]")


def asks_for_order(question: str) -> bool:
    """Whether a question asks for its items in some order ("in order", "sort", "from left to right")."""
    return _ASKS_ORDER.search(question) is not None


def split_items(text: str) -> list[str]:
    """Returns the items of a list: JSON, brackets, bullets, lines, or separated by ";" or else "," and "and".

    A comma without a space separates too: in a list "1,234" is two items unless ";" separates others.
    """
    text = unify_characters(text).strip()
    parsed = _json_items(text)
    if parsed is not None:
        return parsed
    bullets = [match.group(1) for match in _BULLET.finditer(text)]
    if len(bullets) >= 2:
        return [_clean(item) for item in bullets[:_MAX_ITEMS]]
    text = strip_markup(text.replace("\\{", "{").replace("\\}", "}")).strip().rstrip(".")
    whole = re.fullmatch(r"[\[({](.*)[\])}]", text, re.DOTALL)
    text = whole.group(1) if whole else text
    separator = r";|\n" if ";" in text else r"\n" if "\n" in text else r",\s*(?:and\s+|or\s+)?|\s+and\s+|\s+&\s+|、|，"
    if re.search(r"[(\[{]", text) and separator[0] == ",":
        separator = r"(?:,\s*(?:and\s+)?|\s+and\s+)(?![^(\[{]*[)\]}])"  # not inside the brackets of an item
    return [item for item in map(_clean, re.split(separator, text)[:_MAX_ITEMS]) if item]


def _json_items(text: str) -> list[str] | None:
    start, end = text.find("["), text.rfind("]")
    if start < 0 or end < start or len(text) > 4000:
        return None
    try:
        items = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list) or any(isinstance(item, (list, dict)) for item in items):
        return None
    return [str(item).strip() for item in items[:_MAX_ITEMS]]


def _clean(item: str) -> str:
    return strip_markup(item).strip().strip("\"'").rstrip(".,;").strip()


def check_list(
    statement: Statement, reference: list[str], *, is_ordered: bool, config: VerificationConfig
) -> Verdict | Pending | None:
    """Returns the verdict on a statement for a list; None if it states nothing.

    Items are equal as numbers, as short texts, or as formulas; the latter wait for the parser.
    """
    given = _read_items(statement, len(reference))
    if not given:
        return None
    extracted = ", ".join(given)[:200]
    if len(given) != len(reference):
        return judged(False, extracted, f"{len(given)} items instead of {len(reference)}")
    known = tuple(tuple(_same_item(item, expected, config) for expected in reference) for item in given)
    if all(cell is not None for row in known for cell in row):
        return judged(_matches(known, is_ordered), extracted)

    def conclude(matrix: Matrix) -> Verdict:
        merged = tuple(
            tuple(cell if cell is not None else bool(parsed) for cell, parsed in zip(row, parsed_row, strict=True))
            for row, parsed_row in zip(known, matrix, strict=True)
        )
        return judged(_matches(merged, is_ordered), extracted)

    return Pending(tuple(given), tuple(reference), conclude)


def _read_items(statement: Statement, num_expected: int) -> list[str]:
    """Returns the items of a statement; a sentence's list is what follows its colon or verb."""
    block_items = [match.group(1) for match in _BULLET.finditer(statement.block)]
    if len(block_items) >= 2 and statement.origin.value != "boxed":
        return [_clean(item) for item in block_items[-_MAX_ITEMS:]]
    brackets = _BRACKETED.findall(statement.raw.replace("\\{", "{").replace("\\}", "}"))
    if len(brackets) == 1 and re.search(r"[,;]", brackets[0]):
        return split_items(f"[{brackets[0]}]")
    items = split_items(statement.raw)
    if len(items) == num_expected and all(len(item.split()) <= 4 for item in items):
        first = re.sub(r"^.*(?:\b(?:is|are|were|was)\b|:)\s*", "", items[0])
        return [first or items[0], *items[1:]]
    tail = re.sub(
        r"^.*?(?:\b(?:is|are|were|was|include|includes)\b|:)\s*(?=\S)", "", statement.raw, count=1, flags=re.DOTALL
    )
    return split_items(tail)


def _same_item(item: str, expected: str, config: VerificationConfig) -> bool | None:
    number, expected_number = whole_quantity(unify_characters(item)), whole_quantity(unify_characters(expected))
    if number and expected_number:
        return same_number(expected_number, number, relative_tolerance=config.relative_tolerance)
    if same_text(expected, item, max(config.anls_threshold, TEXT_MIN_SIMILARITY)):
        return True
    return None if looks_like_formula(item) or looks_like_formula(expected) else False


def _matches(equal: tuple[tuple[bool | None, ...], ...], is_ordered: bool) -> bool:
    """Whether items and references can be paired one to one (augmenting paths), or pair in order."""
    if is_ordered:
        return all(equal[index][index] for index in range(len(equal)))
    partner: dict[int, int] = {}

    def place(item: int, seen: set[int]) -> bool:
        for expected, is_equal in enumerate(equal[item]):
            if is_equal and expected not in seen:
                seen.add(expected)
                if expected not in partner or place(partner[expected], seen):
                    partner[expected] = item
                    return True
        return False

    return all(place(item, set()) for item in range(len(equal)))
