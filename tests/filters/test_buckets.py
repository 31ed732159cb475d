"""Joins of keys against the plain way."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from filters.buckets import matching_pairs, rows_with_keys, shared_rows

keys = st.lists(st.sampled_from([0, 1, 2, 2**20, 2**40, 2**63, 2**64 - 1]), max_size=20)


@given(keys, keys, st.integers(1, 4))
def test_a_join_gives_the_first_equal_keys_in_their_order(new: list[int], old: list[int], max_matches: int) -> None:
    found = matching_pairs(np.array(new, np.uint64), np.array(old, np.uint64), max_matches).tolist()
    expected = Counter()
    for one, key in enumerate(new):
        expected.update((one, other) for other in [i for i, held in enumerate(old) if held == key][:max_matches])
    assert Counter(map(tuple, found)) == expected
    assert [other for _, other in found] == sorted(other for _, other in found)


@given(keys, keys)
def test_rows_with_wanted_keys_are_found(wanted: list[int], held: list[int]) -> None:
    found = rows_with_keys(np.array(wanted, np.uint64), np.array(held, np.uint64))
    assert found.tolist() == [row for row, key in enumerate(held) if key in wanted]


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 2**20, 2**40, 2**63, 2**64 - 1]), st.booleans()), max_size=20))
def test_active_rows_that_share_a_key_pass_and_inactive_ones_never(rows: list[tuple[int, bool]]) -> None:
    active = [place for place, (_, is_active) in enumerate(rows) if is_active]
    held = Counter(rows[place][0] for place in active)
    mask = np.array([is_active for _, is_active in rows], np.bool_)
    found = shared_rows(np.array([key for key, _ in rows], np.uint64), mask).tolist()
    assert {place for place in active if held[rows[place][0]] > 1} <= set(found) <= set(active)


def test_equal_keys_on_both_sides_cost_no_square() -> None:
    """Their square is 10**12 comparisons: the test would not end."""
    same = np.zeros(1_000_000, np.uint64)
    assert len(matching_pairs(same, same, 1)) == len(same)
