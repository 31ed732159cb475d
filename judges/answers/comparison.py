"""What a reader concludes: a verdict, or a comparison that needs the mathematics parser first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from judges.answers.formulas import compact
from judges.answers.statements import Origin
from schemas.verdicts import Failure, Verdict, correct, unscored, wrong

Matrix = tuple[tuple[bool | None, ...], ...]
"""[candidate][reference]: whether the two expressions are equal; None where one could not be parsed."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A verdict that waits for the parser, which runs in a process that can be killed.

    conclude: turns the matrix into the verdict; stays in this process.
    """

    candidates: tuple[str, ...]
    references: tuple[str, ...]
    conclude: Callable[[Matrix], Verdict]


def judged(is_right: bool, extracted: str, detail: str = "") -> Verdict:
    """Returns correct or wrong for a final answer that could be read."""
    return correct(extracted, detail) if is_right else wrong(extracted, detail)


def unparsed(formula: str, reference: str, origin: Origin) -> Verdict:
    """Returns the verdict on a formula that cannot be parsed: unscored if it was marked as the answer.

    At the end of prose it is no answer, unless the reference occurs in it.
    """
    if origin.is_explicit or compact(reference) in compact(formula):
        return unscored(Failure.UNREADABLE, "the expression cannot be parsed", formula)
    return wrong(formula, "ends in an expression that cannot be parsed")


def unclear(reference_is_among_them: bool, extracted: str, detail: str) -> Verdict:
    """Returns the verdict on a statement with several readings: wrong if none of them is right, else unscored."""
    if reference_is_among_them:
        return unscored(Failure.UNREADABLE, detail, extracted)
    return wrong(extracted, detail)
