"""Reading one number out of a statement: plain numbers, counts and chart values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from judges.answers.comparison import Matrix, Pending, judged, unclear, unparsed
from judges.answers.formulas import formula_of, looks_like_formula, without_name
from judges.answers.numbers import LARGE_NUMBERS, Quantity, find_quantities, same_number, whole_quantity
from judges.answers.statements import Origin, Statement
from judges.answers.text import strip_markup, unify_characters
from schemas.config import VerificationConfig
from schemas.samples import AnswerType, Sample
from schemas.verdicts import Verdict

_ASKS_PERCENT = re.compile(r"%|\bper\s?cent|\bpercentage|百分|prozent|pourcent|porcentaje", re.IGNORECASE)
_SCALE = re.compile(r"\b(thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_ASKS_YEAR = re.compile(r"\byears?\b|\bwhen\b|\bdates?\b", re.IGNORECASE)
_NONE = re.compile(r"^(?:none|nothing|there\s+(?:is|are|were|was)\s+(?:no|none)\b|no\s+\w+|nil)\b", re.IGNORECASE)
_HEDGE = re.compile(
    r"^[\s,]*(?:(?P<word>or|to|versus|vs)\b\.?\s*(?:maybe|possibly|perhaps|even)?\s*(?:\w{1,2}\s?=\s?)?|[-~/]\s*)[\s$€£]*$",
    re.IGNORECASE,
)
_SERIES = re.compile(r"^\s*(?:,|;|and|&|,\s*and)\s*(?:\w{1,2}\s?=\s?)?$", re.IGNORECASE)
_BOUND = re.compile(r"(?:\b(?:more|less|greater|fewer|larger|smaller)\s+than|[<>]|\bnot)\s*$", re.IGNORECASE)
_SETTLED = re.compile(
    r"\b(?:is|are|was|were|equals|be|costs?|totals?|makes?|contains?)\s*(?:therefore|thus|then|about|approximately|exactly|only|just"
    r"|now|also|roughly|around|equal\s+to|a\s+total\s+of)?\s*[:$€£≈]?\s*$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\b(?:step|figure|fig\.?|image|picture|question|problem|option|part|equation|eq\.?|case|line)\s*#?\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The numbers that a statement may mean; several when it cannot be told which, or when it hedges."""

    quantities: tuple[Quantity, ...]
    is_hedged: bool = False


@lru_cache(maxsize=1024)
def reference_quantity(answer: str) -> Quantity | None:
    """Returns the number that a reference answer is, with its unit, or None."""
    text = strip_markup(unify_characters(answer)).strip()
    return whole_quantity(text) or whole_quantity(without_name(text))


def check_number(
    statement: Statement, reference: Quantity, sample: Sample, config: VerificationConfig
) -> Verdict | Pending | None:
    """Returns the verdict on a statement for a NUMBER, COUNT or CHART sample; None if it states no number."""
    matches = _matcher(reference, sample, config)
    if sample.answer_type is AnswerType.COUNT and _NONE.match(statement.text):
        return judged(reference.value == 0, statement.text)
    is_formula = statement.origin.is_explicit or looks_like_formula(statement.text)
    formula = formula_of(statement) if is_formula else None
    if formula and r"\begin{" in formula:
        return judged(False, formula, "a table or matrix, not a number")
    reading = _read(statement)
    is_plain = reading is not None and len(reading.quantities) == 1 and not reading.is_hedged
    if formula and looks_like_formula(formula) and not (is_plain and whole_quantity(without_name(formula))):
        tail = whole_quantity(strip_markup(formula.rpartition("=")[2])) if "=" in formula else None
        if tail is not None and not re.search(r"(?<![a-z])or(?![a-z])|[,;]", formula):
            return judged(matches(tail), formula)
        if not (reading and reading.is_hedged) and re.search(r"[-+*/^√!]|\\|\d\s?[a-z]|:", formula):
            return _pending(formula, sample, statement.origin)
    if reading is None:
        return None
    extracted = statement.text[:200]
    if reading.is_hedged:
        return judged(False, extracted, "several numbers offered")
    if len(reading.quantities) == 1:
        return judged(_is_exact(statement, reading.quantities[0]) and matches(reading.quantities[0]), extracted)
    return unclear(any(map(matches, reading.quantities)), extracted, "cannot tell which number is the answer")


def _pending(formula: str, sample: Sample, origin: Origin) -> Pending:
    def conclude(matrix: Matrix) -> Verdict:
        if matrix[0][0] is None:
            return unparsed(formula, sample.answer or "", origin)
        return judged(matrix[0][0], formula)

    return Pending((formula,), (sample.answer or "",), conclude)


def _matcher(reference: Quantity, sample: Sample, config: VerificationConfig) -> Callable[[Quantity], bool]:
    factor, asks_percent = _asked_scale(sample.question)
    is_same = _unscaled_matcher(reference, sample, config, asks_percent=asks_percent)
    if factor is None:
        return is_same
    return lambda quantity: is_same(quantity) or is_same(replace(quantity, value=quantity.value / factor))


@lru_cache(maxsize=256)
def _asked_scale(question: str) -> tuple[int | None, bool]:
    """Returns what a question counts in and whether that is percent: "How many million ...?" is 2.5 or 2.5 million.

    Kept, as the replies to a question are verified one after the other. Most questions have none of the letters that
    any such word has, which is seen in a tenth of the time.
    """
    lowered = question.lower() if question.isascii() else None
    may_scale = lowered is None or "illion" in lowered or "thousand" in lowered
    may_ask_percent = lowered is None or any(part in lowered for part in ("%", "cent", "prozent"))
    scale = _SCALE.search(question) if may_scale else None
    factor = LARGE_NUMBERS[scale.group(1).lower()] if scale else None
    return factor, may_ask_percent and _ASKS_PERCENT.search(question) is not None


def _unscaled_matcher(
    reference: Quantity, sample: Sample, config: VerificationConfig, *, asks_percent: bool
) -> Callable[[Quantity], bool]:
    if sample.answer_type is AnswerType.COUNT:
        return lambda quantity: not quantity.is_percent and quantity.value == reference.value
    if sample.answer_type is AnswerType.CHART and not _is_year(reference, sample.question):
        return lambda quantity: same_number(
            reference,
            quantity,
            relative_tolerance=config.chart_tolerance,
            asks_percent=asks_percent,
            is_relaxed=True,
        )
    return lambda quantity: same_number(
        reference, quantity, relative_tolerance=config.relative_tolerance, asks_percent=asks_percent
    )


def _is_year(reference: Quantity, question: str) -> bool:
    """Whether a chart value is a year: a whole number of 1500 to 2100 where the question asks for one.

    ChartQA's own metric gives years the 5 % too, which makes every year right; ours does not.
    """
    is_bare = reference.value.denominator == 1 and not reference.unit and not reference.is_percent
    return is_bare and 1500 <= reference.value <= 2100 and _ASKS_YEAR.search(question) is not None


def _is_exact(statement: Statement, quantity: Quantity) -> bool:
    """Whether the statement gives the number itself, not a bound on it or its denial."""
    return _BOUND.search(statement.text[: quantity.start]) is None


def _read(statement: Statement) -> _Reading | None:
    text = statement.text
    quantities = _without_pronouns(find_quantities(text), text)
    if not quantities:
        return None
    hedged_until = _hedge_end(text, quantities)
    settled = None if statement.origin.is_explicit else _settled(text, quantities)
    if hedged_until is not None and (settled is None or settled.start <= hedged_until):
        return _Reading(tuple(quantities), is_hedged=True)
    settled = _after_equals(text) or whole_quantity(text)
    if settled is None:
        distinct = _distinct(quantities)
        if len(distinct) > 1 and statement.origin.is_explicit:
            settled = _leading(text, quantities)
        elif len(distinct) > 1:
            settled = _settled(text, quantities)
        else:
            settled = distinct[0]
        return _Reading((settled,)) if settled else _Reading(tuple(distinct))
    return _Reading((settled,))


def _without_pronouns(quantities: list[Quantity], text: str) -> list[Quantity]:
    """Returns the numbers without "one" (mostly a pronoun) and numbered labels, where other numbers remain."""
    kept = [
        quantity
        for quantity in quantities
        if text[quantity.start : quantity.end].lower() not in ("one", "zero")
        and not _LABEL.search(text[max(0, quantity.start - 20) : quantity.start])
    ]
    return kept or quantities


def _hedge_end(text: str, quantities: list[Quantity]) -> int | None:
    """Returns where two different numbers end that "or", "to" or a dash without a result ("9 - 2 = 7") joins."""
    for first, second in pairwise(quantities):
        joint = _HEDGE.match(text[first.end : second.start])
        is_range = joint is not None and (joint.group("word") is not None or "=" not in text[second.end :])
        if is_range and len(_distinct([first, second])) == 2:
            return second.end
    return None


def _after_equals(text: str) -> Quantity | None:
    """Returns the number after the last "=", if the text has one equation or ends a chain of calculations."""
    head, sign, tail = text.rpartition("≈" if "≈" in text.rpartition("=")[2] else "=")
    if not sign:
        return None
    if "=" in head and not re.search(r"[\d)\]}%]\s*$", head):
        return None
    found = find_quantities(tail.strip())
    return found[0] if found and found[0].start <= 2 else None


def _leading(text: str, quantities: list[Quantity]) -> Quantity | None:
    """Returns the number that an explicit statement begins with, unless a series of numbers begins there."""
    first, second = quantities[0], quantities[1]
    if len(text[: first.start].split()) > 1 or _SERIES.match(text[first.end : second.start]):
        return None
    return first


def _settled(text: str, quantities: list[Quantity]) -> Quantity | None:
    """Returns the number directly after the last verb of being in a sentence with several numbers."""
    for quantity in reversed(quantities):
        if _SETTLED.search(text[max(0, quantity.start - 40) : quantity.start]):
            return quantity
    return None


def _distinct(quantities: list[Quantity]) -> list[Quantity]:
    kept: list[Quantity] = []
    for quantity in quantities[:50]:
        if not any(same_number(other, quantity, relative_tolerance=1e-9) for other in kept):
            kept.append(quantity)
    return kept
