"""Joins of keys against the plain way."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from filters.buckets import matching_pairs, rows_with_keys

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


def test_equal_keys_on_both_sides_cost_no_square() -> None:
    """Their square is 10**12 comparisons: the test would not end."""
    same = np.zeros(1_000_000, np.uint64)
    assert len(matching_pairs(same, same, 1)) == len(same)
