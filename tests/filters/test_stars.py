"""Stars against the definition: rows from best to worst, each goes if it is alike to a row that was kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.row_order import RowOrder
from filters.stars import Edges, kept_rows, representatives


def order_of(goodness: list[int]) -> RowOrder:
    nothing = np.zeros(len(goodness), np.uint64)
    return RowOrder(np.array(goodness, np.uint64), nothing, np.arange(len(goodness), dtype=np.uint64))


def kept_by_definition(pairs: list[tuple[int, int]], goodness: list[int]) -> list[bool]:
    kept = [False] * len(goodness)
    for row in sorted(range(len(goodness)), key=lambda row: (goodness[row], row)):
        alike = {a + b - row for a, b in pairs if row in (a, b)}
        kept[row] = not any(kept[other] for other in alike)
    return kept


def edges_of(pairs: list[tuple[int, int]], order: RowOrder) -> Edges:
    return Edges.of_pairs(np.array(pairs, np.int64).reshape(-1, 2), np.full(len(pairs), 0.9), order)


@settings(max_examples=200)
@given(st.integers(2, 12), st.data())
def test_the_kept_rows_are_those_of_the_definition(num_rows: int, data: st.DataObject) -> None:
    row = st.integers(0, num_rows - 1)
    pairs = data.draw(st.lists(st.tuples(row, row).filter(lambda pair: pair[0] != pair[1]), max_size=30))
    goodness = data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows))
    order = order_of(goodness)
    edges = edges_of(pairs, order)
    kept = kept_rows(edges, num_rows, order)
    assert kept.tolist() == kept_by_definition(pairs, goodness)
    found, likeness = representatives(edges, kept, order)
    for place in range(num_rows):
        if kept[place]:
            assert found[place] == -1
        else:
            assert kept[found[place]]
            assert likeness[place] == 0.9


@pytest.mark.parametrize("num_rows", [50, 63, 64, 65, 66, 1000])
def test_a_chain_keeps_every_second_row_however_long(num_rows: int) -> None:
    """Sweeps decide one or two rows of a chain each; beyond their limit the rows are sorted and visited."""
    order = order_of(list(range(num_rows)))
    edges = edges_of([(row, row + 1) for row in reversed(range(num_rows - 1))], order)
    assert kept_rows(edges, num_rows, order).tolist() == [row % 2 == 0 for row in range(num_rows)]
