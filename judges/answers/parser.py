"""Equality of expressions by math-verify and sympy. Slow or endless on hostile input: see `judges.answers.pool`."""

from __future__ import annotations

import cmath
import importlib
import logging
from functools import lru_cache
from typing import Any

from judges.answers.comparison import Matrix
from judges.answers.formulas import compact, is_too_complex, to_latex, without_name

_RELATIVE_ERROR = 1e-6
"""Values further apart than this are different; math-verify rounds to six decimals."""


def equality_matrix(candidates: tuple[str, ...], references: tuple[str, ...]) -> Matrix:
    """Returns which candidates equal which references; None where one of the two cannot be parsed."""
    return tuple(tuple(equal(candidate, reference) for reference in references) for candidate in candidates)


def equal(candidate: str, reference: str) -> bool | None:
    """Whether two formulas are equal. A name on one side only is dropped: "x = 3" equals "3"."""
    if compact(candidate) == compact(reference):
        return True
    bare_candidate, bare_reference = without_name(candidate), without_name(reference)
    if (bare_candidate == candidate) != (bare_reference == reference):
        candidate, reference = bare_candidate, bare_reference
    if compact(candidate) == compact(reference):
        return True
    expected, given = _parsed(reference), _parsed(candidate)
    if not expected or not given:
        return None
    numerically = _numerically_equal(expected[0], given[0])
    return _verified(expected, given) if numerically is None else numerically


def _numerically_equal(expected: Any, given: Any) -> bool | None:
    """Returns what values say: numbers are equal or not, expressions that differ anywhere are unequal; else None.

    Spares most comparisons the symbolic simplification, which takes seconds to find that two numbers differ.
    """
    sympy = importlib.import_module("sympy")  # loaded where a formula is compared: few processes need it

    if not all(isinstance(side, sympy.Expr) and side.is_commutative for side in (expected, given)):
        return None
    symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
    for start in (7, 11):
        point = {symbol: sympy.Rational(start + index, 5 + 2 * index) for index, symbol in enumerate(symbols)}
        try:
            first, second = (complex(side.subs(point).evalf(20)) for side in (expected, given))
        except Exception:  # noqa: BLE001  (sympy raises anything; the symbolic comparison then decides)
            return None
        if not (cmath.isfinite(first) and cmath.isfinite(second)):
            return None
        if abs(first - second) > _RELATIVE_ERROR * max(abs(first), abs(second)):
            return False
    return None if symbols else True


def _verified(expected: list[Any], given: list[Any]) -> bool | None:
    math_verify = importlib.import_module("math_verify")

    try:
        return bool(math_verify.verify(expected, given, timeout_seconds=None, raise_on_error=True))
    except Exception:  # noqa: BLE001  (sympy raises anything; the comparison is then recorded as not possible)
        return None


@lru_cache(maxsize=256)
def _parsed(formula: str) -> list[Any]:
    """Returns math-verify's readings of a formula, empty if it has none. Cached: a reference meets eight replies."""
    if is_too_complex(formula):
        return []
    math_verify = importlib.import_module("math_verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its alarm timer is off
    try:
        found = math_verify.parse(
            f"${to_latex(formula)}$",
            [math_verify.LatexExtractionConfig(boxed_match_priority=-1)],
            parsing_timeout=None,
            raise_on_error=False,
            fallback_mode="no_fallback",
        )
    except Exception:  # noqa: BLE001  (as above)
        return []
    return list(found)
