"""Which rows of many are picked."""

from __future__ import annotations

from collections import Counter

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from corpus.sampling import pick_spread

rows = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("aaaabbc")), unique_by=lambda row: row[0], max_size=80)


def frame(chosen: list[tuple[int, str]]) -> pl.DataFrame:
    return pl.DataFrame(
        {"key": [str(number) for number, _ in chosen], "kind": [kind for _, kind in chosen]},
        schema={"key": pl.String, "kind": pl.String},
    )


def picked(batches: list[pl.DataFrame], num_rows: int) -> list[tuple[str, str]]:
    found = pick_spread(batches, key="key", strata=["kind"], num_rows=num_rows)
    return [] if found is None else list(found.select("key", "kind").iter_rows())


@given(rows, st.integers(1, 20), st.randoms(use_true_random=False), st.integers(1, 9))
def test_the_pick_depends_neither_on_the_order_nor_on_the_batches(
    chosen: list[tuple[int, str]], num_rows: int, random: object, batch_rows: int
) -> None:
    whole = picked([frame(chosen)], num_rows)
    random.shuffle(chosen)  # type: ignore[attr-defined]
    parts = [frame(chosen[start : start + batch_rows]) for start in range(0, len(chosen), batch_rows)]
    assert picked(parts, num_rows) == (whole if parts else [])


@given(rows, st.integers(1, 20))
def test_strata_take_turns_so_that_none_has_two_rows_more_than_one_that_has_rows_left(
    chosen: list[tuple[int, str]], num_rows: int
) -> None:
    there = Counter(kind for _, kind in chosen)
    taken = Counter(kind for _, kind in picked([frame(chosen)], num_rows))
    assert taken.total() == min(num_rows, len(chosen))
    unfinished = [kind for kind in there if taken[kind] < there[kind]]
    assert all(taken[kind] >= max(taken.values()) - 1 for kind in unfinished)


def test_a_rare_kind_is_picked_among_a_hundred_thousand() -> None:
    common = [(number, "common") for number in range(100_000)]
    halves = [frame([*common[:50_000], (-1, "rare")]), frame(common[50_000:])]
    assert ("-1", "rare") in picked(halves, 2)


def test_texts_that_are_no_unicode_have_a_rank_too() -> None:
    assert picked([frame([(1, "a")])], 5) == [("1", "a")]
    assert pick_spread([], key="key", strata=["kind"], num_rows=3) is None
