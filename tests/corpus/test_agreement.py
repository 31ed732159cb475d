"""Agreement: published examples worked out by others, peers where they are installed, and laws."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.agreement import (
    Ratings,
    Stratum,
    agreement_entry,
    agreement_of,
    judge_share,
    krippendorff_alpha,
    pair_cells,
    panel_entries,
    stratified_agreement,
    wilson,
)

COHEN = {
    ("1", "1"): 106, ("1", "2"): 10, ("1", "3"): 4,
    ("2", "1"): 22, ("2", "2"): 28, ("2", "3"): 10,
    ("3", "1"): 2, ("3", "2"): 12, ("3", "3"): 6,
}  # fmt: skip
"""Cohen's own example (1960), which Fleiss, Cohen and Everitt (1969) take up with 200 rows."""

KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Example C of Computing Krippendorff's Alpha-Reliability (2011): four observers, twelve units, values missing."""


def ratings_of(text: str) -> Counter[tuple[str | None, ...]]:
    """text: a line for each judge, a word for each row."""
    columns = zip(*(line.split() for line in text.strip().splitlines()), strict=True)
    return Counter(tuple(None if value == "." else value for value in row) for row in columns)


def table(both_yes: int, yes_no: int, no_yes: int, both_no: int) -> dict[tuple[str, str], int]:
    cells = {("yes", "yes"): both_yes, ("yes", "no"): yes_no, ("no", "yes"): no_yes, ("no", "no"): both_no}
    return {cell: number for cell, number in cells.items() if number}


def test_kappa_and_its_interval_are_those_of_fleiss_cohen_and_everitt() -> None:
    agreement = agreement_of(COHEN)
    assert agreement.num_rows == 200
    assert agreement.share is not None and agreement.share.value == pytest.approx(0.70)
    assert agreement.kappa is not None
    # Chance: .60 * .65 + .30 * .25 + .10 * .10 = .475. The published variance is .002885.
    assert agreement.kappa.value == pytest.approx((0.70 - 0.475) / (1 - 0.475))
    error = (agreement.kappa.high - agreement.kappa.value) / 1.959964
    assert error**2 == pytest.approx(0.002885, abs=5e-7)


def test_kappa_of_two_answers_worked_out_by_hand() -> None:
    # 35 of 50 equal; chance: .5 * .6 + .5 * .4 = .5; kappa = .2 / .5.
    kappa = agreement_of(table(20, 5, 10, 15)).kappa
    assert kappa is not None and kappa.value == pytest.approx(0.4)
    # Slopes: yes,yes (.5 - .3 * 1.1) / .25 = .68; no,no (.5 - .3 * .9) / .25 = .92; yes,no -.3 * 1.1 ... by cell:
    # (first i, second j): second's share of i plus first's share of j. yes,no: .6 + .5; no,yes: .4 + .5.
    slopes = {
        ("yes", "yes"): 0.68,
        ("no", "no"): 0.92,
        ("yes", "no"): -0.3 * 1.1 / 0.25,
        ("no", "yes"): -0.3 * 0.9 / 0.25,
    }
    shares = {cell: number / 50 for cell, number in table(20, 5, 10, 15).items()}
    mean = sum(shares[cell] * slope for cell, slope in slopes.items())
    variance = sum(shares[cell] * (slope - mean) ** 2 for cell, slope in slopes.items()) / 50
    assert kappa.high - kappa.value == pytest.approx(1.959964 * math.sqrt(variance))


@pytest.mark.parametrize(
    ("num_yes", "num_rows", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(num_yes: int, num_rows: int, low: float, high: float) -> None:
    share = wilson(num_yes / num_rows, num_rows)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)


def test_alpha_with_missing_answers_is_krippendorffs() -> None:
    alpha = krippendorff_alpha(ratings_of(KRIPPENDORFF))
    assert alpha is not None and alpha.value == pytest.approx(0.743, abs=5e-4)
    assert alpha.low < alpha.value < alpha.high
    assert krippendorff_alpha(ratings_of(KRIPPENDORFF)) == alpha, "the interval is drawn with a fixed seed"


def test_kappa_is_that_of_statsmodels() -> None:
    peer = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is not installed")
    generator = random.Random(5)
    for _ in range(20):
        counts = [[generator.randint(0, 9) for _ in range(3)] for _ in range(3)]
        theirs = peer.cohens_kappa(counts)
        ours = agreement_of({(str(i), str(j)): n for i, row in enumerate(counts) for j, n in enumerate(row) if n}).kappa
        assert ours is not None and ours.value == pytest.approx(theirs.kappa)
        assert ours.high == pytest.approx(min(1.0, theirs.kappa_upp))


def test_alpha_is_that_of_the_package_krippendorff() -> None:
    peer = pytest.importorskip("krippendorff", reason="krippendorff is not installed")
    generator = random.Random(6)
    for _ in range(20):
        rows = [[generator.choice([0, 1, 1, None]) for _ in range(3)] for _ in range(30)]
        theirs = peer.alpha(
            [[math.nan if row[i] is None else row[i] for row in rows] for i in range(3)], level_of_measurement="nominal"
        )
        ours = krippendorff_alpha(Counter(tuple(None if v is None else str(v) for v in row) for row in rows))
        assert ours is not None and ours.value == pytest.approx(theirs)


def test_where_both_say_one_thing_kappa_is_undefined_and_says_so() -> None:
    entry = agreement_entry("judge", "all easy", agreement_of({("no", "no"): 40}))
    assert (entry.kappa, entry.low, entry.high, entry.agreement) == (None, None, None, 1.0)
    assert entry.agreement_low == pytest.approx(wilson(1.0, 40).low) and entry.agreement_high == 1.0
    assert "undefined" in entry.note


def test_where_one_answer_prevails_the_note_names_the_paradox() -> None:
    # 96 of 100 equal, and yet: chance .98 * .98 + .02 * .02 = .9608, so kappa = -.0008 / .0392.
    entry = agreement_entry("judge", "hardly any is hard", agreement_of(table(0, 2, 2, 96)))
    assert entry.kappa == pytest.approx(-0.0204, abs=5e-5)
    assert "prevails" in entry.note
    assert "prevails" not in agreement_entry("judge", "even", agreement_of(table(45, 5, 5, 45))).note


def test_perfect_agreement_warns_of_an_interval_without_width() -> None:
    entry = agreement_entry("judge", "x", agreement_of(table(2, 0, 0, 3)))
    assert (entry.kappa, entry.low, entry.high) == (1.0, 1.0, 1.0)
    assert "no width" in entry.note and entry.agreement_low is not None and entry.agreement_low < 0.6


def test_without_rows_there_is_no_figure() -> None:
    entry = agreement_entry("judge", "x", agreement_of({}))
    assert (entry.num_rows, entry.kappa, entry.agreement, entry.confusion) == (0, None, None, ())
    assert "Nothing" in entry.note


def test_an_entry_is_plain_json_with_its_confusion_table() -> None:
    record = agreement_entry("judge", "x", agreement_of(table(20, 5, 10, 15)), note="First this.").to_record()
    assert record["confusion"] == [
        {"judge": "yes", "person": "yes", "rows": 20},
        {"judge": "yes", "person": "no", "rows": 5},
        {"judge": "no", "person": "yes", "rows": 10},
        {"judge": "no", "person": "no", "rows": 15},
    ]
    assert record["note"] == "First this."


CELLS = st.dictionaries(
    st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), st.integers(1, 50), min_size=1
)


@given(CELLS, st.floats(0.1, 1000))
def test_one_stratum_has_no_weight_and_the_judges_may_change_places(
    cells: dict[tuple[str, str], int], weight: float
) -> None:
    plain = agreement_of(cells)
    assert plain.share is not None and plain.share.low <= plain.share.value <= plain.share.high
    mirrored = agreement_of({(other, one): number for (one, other), number in cells.items()})
    weighted = stratified_agreement([Stratum(cells, weight=weight), Stratum({}, weight=99.0)])
    for like in (mirrored, weighted):
        assert like.share is not None and like.share.value == pytest.approx(plain.share.value)
        assert (like.kappa is None) == (plain.kappa is None)
        if plain.kappa is not None and like.kappa is not None:
            assert -1.0 <= plain.kappa.low <= plain.kappa.value <= plain.kappa.high <= 1.0
            assert (like.kappa.value, like.kappa.low) == pytest.approx((plain.kappa.value, plain.kappa.low))


@given(CELLS, CELLS, st.integers(2, 5))
def test_a_stratum_of_weight_k_counts_as_k_such_strata(
    one: dict[tuple[str, str], int], other: dict[tuple[str, str], int], factor: int
) -> None:
    weighted = stratified_agreement([Stratum(one), Stratum(other, weight=factor)])
    repeated = agreement_of({c: one.get(c, 0) + factor * other.get(c, 0) for c in one.keys() | other.keys()})
    assert weighted.share is not None and repeated.share is not None
    assert weighted.share.value == pytest.approx(repeated.share.value)
    assert (weighted.kappa is None) == (repeated.kappa is None)
    if weighted.kappa is not None and repeated.kappa is not None:
        assert weighted.kappa.value == pytest.approx(repeated.kappa.value)


def test_strata_that_were_looked_at_whole_leave_no_doubt() -> None:
    whole = stratified_agreement([Stratum(table(5, 2, 1, 4), drawn_share=1.0), Stratum(table(1, 0, 0, 9), 2.0, 1.0)])
    assert whole.kappa is not None and whole.kappa.low == whole.kappa.value == whole.kappa.high


def test_an_oversampled_rare_stratum_is_weighted_back_and_the_interval_holds_the_truth() -> None:
    """Of 20,000 rows a tenth is hard, and the judges often differ on those. Half of each sample is drawn from them."""
    generator = random.Random(7)
    hard = generator.choices(list(table(1, 1, 1, 1)), [2, 4, 3, 1], k=2_000)
    easy = generator.choices(list(table(1, 1, 1, 1)), [15, 8, 9, 68], k=18_000)
    truth = agreement_of(Counter([*hard, *easy])).kappa
    assert truth is not None
    num_held = num_naive = 0
    for _ in range(300):
        drawn = [(generator.sample(rows, 100), len(rows)) for rows in (hard, easy)]
        sample = stratified_agreement([Stratum(Counter(rows), size / 100, 100 / size) for rows, size in drawn]).kappa
        naive = agreement_of(Counter([*drawn[0][0], *drawn[1][0]])).kappa
        assert sample is not None and naive is not None
        num_held += sample.low <= truth.value <= sample.high
        num_naive += naive.low <= truth.value <= naive.high
    assert num_held >= 0.9 * 300, num_held
    assert num_naive < num_held - 30, num_naive


def test_a_judge_who_always_says_yes_is_seen_alone_and_without_kappa() -> None:
    ratings: Ratings = Counter(
        {("yes", "yes", "yes"): 10, ("no", "no", "yes"): 28, ("yes", "no", "yes"): 2, ("no", None, "yes"): 5}
    )
    share = judge_share(ratings, 2)
    assert (share.num_by_answer, share.num_alone, share.num_missing) == ({"yes": 45}, {"yes": 28}, 0)
    assert judge_share(ratings, 1).num_missing == 5
    assert judge_share(ratings, 1).num_alone == {"no": 2}
    together, a_b, a_c, b_c = panel_entries(["A", "B", "C"], ratings, what="needs reasoning")
    assert "C: yes 100.0 % of 45; alone 28 times with yes." in together.note
    assert "B: no 75.0 %, yes 25.0 % of 40; 5 missing; alone 2 times with no." in together.note
    # A and B: 38 of 40 equal; chance: .3 * .25 + .7 * .75 = .6.
    assert (a_b.name, a_b.num_rows) == ("A and B", 40)
    assert a_b.kappa == pytest.approx((0.95 - 0.6) / 0.4)
    for entry in (a_c, b_c):
        assert entry.kappa == pytest.approx(0.0) and entry.num_rows in (45, 40)
    assert together.kappa is not None and a_b.kappa is not None and together.kappa < 0.2 < a_b.kappa


def test_a_row_that_one_judge_alone_answered_says_nothing_of_agreement() -> None:
    alone: Ratings = Counter({("yes", None): 9, (None, "no"): 4})
    assert krippendorff_alpha(alone) is None
    assert pair_cells(alone, 0, 1) == {}
    assert panel_entries(["A", "B"], alone, what="x")[0].num_rows == 0
    assert judge_share(alone, 0).num_alone == {}
