"""How far two judges agree, or several: Cohen's kappa, Krippendorff's alpha and the share of equal answers, each with
an interval of 95 %. Pure functions of counts.

The interval of kappa is that of Fleiss, Cohen and Everitt (Large sample standard errors of kappa and weighted kappa,
Psychological Bulletin 72, 1969). Their variance is that of a mean of one number per row, which also holds for a sample
drawn by strata: the numbers then have the strata's weights and variances (Cochran, Sampling Techniques, 1977, 5.5).

Libraries have kappa and its interval for simple random samples alone; tests hold ours to theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

NORMAL_QUANTILE = 1.959964
"""Of the standard normal distribution, for intervals of 95 %."""
NUM_RESAMPLES = 2000
_HIGH_AGREEMENT, _LOW_KAPPA = 0.8, 0.4

Cells = Mapping[tuple[str, str], int]
"""Rows by the answers of a first and a second judge."""


@dataclass(frozen=True, slots=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Stratum:
    """Rows that were drawn alike.

    weight: how many rows each of them stands for, up to a factor that is common to all strata. drawn_share: the part
    of the stratum that was drawn, in [0, 1]; a stratum that was looked at whole adds no doubt.
    """

    cells: Cells
    weight: float = 1.0
    drawn_share: float = 0.0

    @property
    def num_rows(self) -> int:
        return sum(self.cells.values())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two judges agree.

    num_rows: that both answered. cells: those rows by both answers, as counted. kappa: None where it is undefined:
    without rows, or if both gave one and the same answer throughout. share: of equal answers, with Wilson's interval;
    None without rows. Both are weighted by stratum.
    """

    num_rows: int
    cells: Cells
    kappa: Interval | None
    share: Interval | None


def agreement_of(cells: Cells) -> Agreement:
    """Returns the agreement of two judges on a simple random sample."""
    return stratified_agreement([Stratum(cells)])


def stratified_agreement(strata: Iterable[Stratum]) -> Agreement:
    """Returns the agreement of two judges on a sample that was drawn by strata; empty strata say nothing."""
    filled = [stratum for stratum in strata if stratum.num_rows]
    cells: Counter[tuple[str, str]] = Counter()
    for stratum in filled:
        cells.update(stratum.cells)
    if not filled:
        return Agreement(0, {}, None, None)
    shares = _weighted_shares(filled)
    share = min(1.0, sum(part for (first, second), part in shares.items() if first == second))
    return Agreement(cells.total(), dict(cells), _kappa(filled, shares), wilson(share, _effective_size(filled)))


def wilson(share: float, num_rows: float) -> Interval:
    """Returns a share with its score interval (Wilson, JASA 22, 1927). num_rows: > 0; of a weighted sample its
    effective size."""
    square = NORMAL_QUANTILE**2
    middle = (share + square / (2 * num_rows)) / (1 + square / num_rows)
    spread = math.sqrt(share * (1 - share) / num_rows + square / (4 * num_rows**2))
    reach = NORMAL_QUANTILE * spread / (1 + square / num_rows)
    # At 0 and 1 the bound is the share itself, but for rounding.
    return Interval(share, min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach)))


def _weighted_shares(strata: Sequence[Stratum]) -> dict[tuple[str, str], float]:
    total = sum(stratum.weight * stratum.num_rows for stratum in strata)
    shares: dict[tuple[str, str], float] = {}
    for stratum in strata:
        for cell, number in stratum.cells.items():
            shares[cell] = shares.get(cell, 0.0) + stratum.weight * number / total
    return shares


def _effective_size(strata: Sequence[Stratum]) -> float:
    """Returns the size of the simple random sample that tells as much (Kish, Survey Sampling, 1965)."""
    total = sum(stratum.weight * stratum.num_rows for stratum in strata)
    return total**2 / sum(stratum.weight**2 * stratum.num_rows for stratum in strata)


def _kappa(strata: Sequence[Stratum], shares: Mapping[tuple[str, str], float]) -> Interval | None:
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    for (one, other), part in shares.items():
        first[one] = first.get(one, 0.0) + part
        second[other] = second.get(other, 0.0) + part
    if len(first.keys() | second.keys()) == 1:
        return None
    seen = sum(part for (one, other), part in shares.items() if one == other)
    by_chance = sum(part * second.get(answer, 0.0) for answer, part in first.items())
    kappa = min(1.0, (seen - by_chance) / (1 - by_chance))
    # What one more row of each cell does to kappa, times the number of rows: its partial derivatives.
    slopes = {
        (one, other): ((one == other) * (1 - by_chance) - (1 - seen) * (second.get(one, 0.0) + first.get(other, 0.0)))
        / (1 - by_chance) ** 2
        for one, other in shares
    }
    reach = NORMAL_QUANTILE * math.sqrt(_variance_of_mean(strata, slopes))
    return Interval(kappa, max(-1.0, kappa - reach), min(1.0, kappa + reach))


def _variance_of_mean(strata: Sequence[Stratum], values: Mapping[tuple[str, str], float]) -> float:
    """Returns the variance of the weighted mean of a number that each cell gives its rows.

    One stratum: over n, as published. Several: over n - 1 in each; one of a single row has the variance of all rows.
    """
    pooled: Counter[tuple[str, str]] = Counter()
    for stratum in strata:
        pooled.update(stratum.cells)
    total = sum(stratum.weight * stratum.num_rows for stratum in strata)
    variance = 0.0
    for stratum in strata:
        num_rows = stratum.num_rows
        spread = _variance(stratum.cells if num_rows > 1 else pooled, values)
        degrees = num_rows if len(strata) == 1 or num_rows == 1 else num_rows - 1
        part = stratum.weight * num_rows / total
        variance += part**2 * (1 - stratum.drawn_share) * spread / degrees
    return variance


def _variance(cells: Cells, values: Mapping[tuple[str, str], float]) -> float:
    num_rows = sum(cells.values())
    mean = sum(number * values[cell] for cell, number in cells.items()) / num_rows
    return sum(number * (values[cell] - mean) ** 2 for cell, number in cells.items()) / num_rows


Ratings = Mapping[tuple[str | None, ...], int]
"""Rows by the answers of all judges in order; None where one gave none."""


@dataclass(frozen=True, slots=True)
class JudgeShare:
    """What one of several judges tends to.

    num_given: answers it gave; num_missing: rows that it left out. num_by_answer: of those given. num_alone: by
    answer, rows on which it stood against all others, of whom at least two answered: its bias.
    """

    num_given: int
    num_missing: int
    num_by_answer: Mapping[str, int]
    num_alone: Mapping[str, int]


def krippendorff_alpha(ratings: Ratings, *, seed: int = 0) -> Interval | None:
    """Returns Krippendorff's alpha for nominal answers, some of which may be missing; None where it is undefined.

    Rows with fewer than two answers say nothing. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011. The
    interval holds the middle 95 % of `NUM_RESAMPLES` samples drawn from the rows with replacement.
    """
    # In one order, so that the samples drawn do not depend on how the rows were counted.
    ordered = sorted(ratings.items(), key=str)
    paired = {row: number for row, number in ordered if number and sum(answer is not None for answer in row) > 1}
    answers = sorted({answer for row in paired for answer in row if answer is not None})
    if len(answers) < 2:
        return None
    coincidences = np.array([_coincidences(row, answers) for row in paired])
    counts = np.array(list(paired.values()), dtype=np.float64)
    value = float(_alphas(counts[None, :], coincidences)[0])
    generator = np.random.default_rng(seed)
    num_rows = int(counts.sum())
    drawn = generator.multinomial(num_rows, counts / counts.sum(), size=NUM_RESAMPLES).astype(np.float64)
    alphas = _alphas(drawn, coincidences)
    # A sample in which all answers are one has no alpha; there is nothing in it that anybody disagreed on.
    low, high = np.nanpercentile(alphas, [2.5, 97.5])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _coincidences(row: Sequence[str | None], answers: Sequence[str]) -> list[list[float]]:
    """Returns how often two judges of a row gave each pair of answers, so that the row sums to its answers."""
    counts = Counter(answer for answer in row if answer is not None)
    others = counts.total() - 1
    return [[counts[one] * (counts[other] - (one == other)) / others for other in answers] for one in answers]


def _alphas(counts: np.ndarray[Any, Any], coincidences: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """counts: rows of each kind, [samples, kinds]. coincidences: [kinds, answers, answers]. Returns [samples]."""
    matrices = np.einsum("sk,kij->sij", counts, coincidences)
    totals = matrices.sum(axis=2)
    num_answers = totals.sum(axis=1)
    disagreed = num_answers - np.trace(matrices, axis1=1, axis2=2)
    by_chance = num_answers**2 - (totals**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        alphas = 1 - (num_answers - 1) * disagreed / by_chance
    return np.asarray(np.where(by_chance > 0, alphas, np.nan))


def pair_cells(ratings: Ratings, first: int, second: int) -> dict[tuple[str, str], int]:
    """Returns the rows by the answers of two judges, as far as both answered."""
    cells: dict[tuple[str, str], int] = {}
    for row, number in ratings.items():
        one, other = row[first], row[second]
        if one is not None and other is not None:
            cells[one, other] = cells.get((one, other), 0) + number
    return cells


def judge_share(ratings: Ratings, judge: int) -> JudgeShare:
    """Returns what one judge tends to beside the others."""
    num_missing = 0
    by_answer: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for row, number in ratings.items():
        own = row[judge]
        if own is None:
            num_missing += number
            continue
        by_answer[own] += number
        others = [answer for place, answer in enumerate(row) if place != judge and answer is not None]
        if len(others) > 1 and len(set(others)) == 1 and others[0] != own:
            alone[own] += number
    return JudgeShare(by_answer.total(), num_missing, dict(by_answer), dict(alone))


@dataclass(frozen=True, slots=True)
class ConfusionCell:
    """Rows on which a first judge said one thing and a second, mostly a person, another."""

    judge: str
    person: str
    rows: int


@dataclass(frozen=True, slots=True)
class AgreementEntry:
    """One line of the report: who was compared, on what, and how far they agree.

    kappa: Cohen's, or Krippendorff's alpha where `what` says so; None where it is undefined. agreement: share of equal
    answers. low, high, agreement_low, agreement_high: intervals of 95 %. note: what to know when reading it.
    """

    name: str
    what: str
    num_rows: int
    kappa: float | None
    low: float | None
    high: float | None
    agreement: float | None
    agreement_low: float | None = None
    agreement_high: float | None = None
    confusion: tuple[ConfusionCell, ...] = ()
    note: str = ""

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        return {**asdict(self), "confusion": [asdict(cell) for cell in self.confusion]}


def agreement_entry(name: str, what: str, agreement: Agreement, *, note: str = "") -> AgreementEntry:
    """Returns the line of a comparison of two judges. note: said before what the figures themselves give cause for."""
    cells = sorted(agreement.cells.items(), reverse=True)
    return AgreementEntry(
        name,
        what,
        agreement.num_rows,
        *_figures(agreement.kappa),
        *_figures(agreement.share),
        tuple(ConfusionCell(judge, person, rows) for (judge, person), rows in cells),
        " ".join(filter(None, [note, _caution(agreement)])),
    )


def _figures(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if interval is None else (interval.value, interval.low, interval.high)


def _caution(agreement: Agreement) -> str:
    """Returns what to beware of: kappa that is undefined, that misleads, or whose interval does."""
    kappa, share = agreement.kappa, agreement.share
    if share is None:
        return "Nothing was answered by both."
    if kappa is None:
        return "Both gave one and the same answer throughout, so kappa is undefined; look at the share of agreement."
    if all(one == other for one, other in agreement.cells):
        return "They never disagreed, so kappa's interval has no width; that of the share of agreement says more."
    if share.value >= _HIGH_AGREEMENT and kappa.value < _LOW_KAPPA:
        return (
            "One answer prevails, so that much agreement is expected by chance and kappa is low although they agree "
            "(Feinstein and Cicchetti, 1990)."
        )
    return ""


def panel_entries(names: Sequence[str], ratings: Ratings, *, what: str, seed: int = 0) -> list[AgreementEntry]:
    """Returns the lines of several judges who answered the same rows: all together, and each two of them.

    names: of the judges, in the order of the ratings. The note of the first line tells what each tends to.
    """
    num_judges = len(names)
    pairs = list(combinations(range(num_judges), 2))
    num_rows = sum(number for row, number in ratings.items() if sum(answer is not None for answer in row) > 1)
    alpha = krippendorff_alpha(ratings, seed=seed)
    tables = [pair_cells(ratings, *pair) for pair in pairs]
    num_pairs = sum(sum(cells.values()) for cells in tables)
    num_equal = sum(n for cells in tables for (one, other), n in cells.items() if one == other)
    together = AgreementEntry(
        f"all {num_judges} together",
        f"{what} (Krippendorff's alpha)",
        num_rows,
        *_figures(alpha),
        num_equal / num_pairs if num_pairs else None,
        note=" ".join(_tendency(name, judge_share(ratings, place)) for place, name in enumerate(names)),
    )
    by_pair = [
        agreement_entry(f"{names[one]} and {names[other]}", what, agreement_of(cells))
        for (one, other), cells in zip(pairs, tables, strict=True)
    ]
    return [together, *by_pair]


def _tendency(name: str, share: JudgeShare) -> str:
    """Returns in a sentence how often a judge gave each answer, and how often it stood alone with it."""
    if not share.num_given:
        return f"{name} gave no answer."
    answers = ", ".join(
        f"{answer} {100 * number / share.num_given:.1f} %" for answer, number in sorted(share.num_by_answer.items())
    )
    alone = " and ".join(f"{_times(number)} with {answer}" for answer, number in sorted(share.num_alone.items()))
    missing = f"; {share.num_missing:,} missing" if share.num_missing else ""
    return f"{name}: {answers} of {share.num_given:,}{missing}; alone {alone or 'never'}."


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"
