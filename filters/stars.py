"""Which rows stay when alike rows are known: stars around the best representatives.

Rows are visited from best to worst, and a row goes exactly if it is alike to a row that was *kept*. In a chain A ~ B ~
C, B goes for resembling A, and C stays unless it resembles A itself. Only the pairs and the order of the rows decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from filters.buckets import Rows
from filters.kernels import kernel
from filters.row_order import RowOrder, is_better

_MAX_SWEEPS = 64
_UNDECIDED, _KEPT, _GONE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Edges:
    """Alike rows. better, worse: int64 [num_edges], by the order of the rows. likeness: float64 [num_edges]."""

    better: Rows
    worse: Rows
    likeness: NDArray[np.float64]

    @classmethod
    def of_pairs(cls, pairs: Rows, likeness: NDArray[np.float64], order: RowOrder) -> Edges:
        """Returns pairs int64 [num_pairs, 2] with the better row first."""
        better, worse = pairs[:, 0].copy(), pairs[:, 1].copy()
        _put_better_first(better, worse, order)
        return cls(better, worse, likeness)

    def __add__(self, other: Edges) -> Edges:
        return Edges(
            np.concatenate([self.better, other.better]),
            np.concatenate([self.worse, other.worse]),
            np.concatenate([self.likeness, other.likeness]),
        )


def no_edges() -> Edges:
    return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))


def kept_rows(edges: Edges, num_rows: int, order: RowOrder) -> NDArray[np.bool_]:
    """Returns which rows stay, bool [num_rows]. Linear in the edges; long chains cost one sort."""
    state = np.full(num_rows, _KEPT, np.uint8)
    state[edges.worse] = _UNDECIDED
    has_kept, waits = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
    rows = np.flatnonzero(state == _UNDECIDED)
    for _ in range(_MAX_SWEEPS):
        if not _sweep(edges.better, edges.worse, rows, state, has_kept, waits):
            return np.asarray(state == _KEPT)
    ranks = np.lexsort((order.id_low[rows], order.id_high[rows], order.goodness[rows]))
    place = np.empty(num_rows, np.int64)
    place[rows[ranks]] = np.arange(len(rows))
    by_worse = np.argsort(place[edges.worse], kind="stable")
    _visit(edges.better[by_worse], edges.worse[by_worse], state)
    return np.asarray(state == _KEPT)


def representatives(edges: Edges, kept: NDArray[np.bool_], order: RowOrder) -> tuple[Rows, NDArray[np.float64]]:
    """Returns for each row the best kept row it is alike to, -1 for kept rows, and how alike they are."""
    found, values = np.full(len(kept), -1, np.int64), np.zeros(len(kept), np.float64)
    _find_best(edges.better, edges.worse, edges.likeness, kept, order, found, values)
    return found, values


@kernel
def _put_better_first(better, worse, order):  # type: ignore[no-untyped-def]
    for edge in range(len(better)):
        if is_better(worse[edge], better[edge], order):
            better[edge], worse[edge] = worse[edge], better[edge]


@kernel
def _sweep(better, worse, rows, state, has_kept, waits):  # type: ignore[no-untyped-def]
    """Decides every row whose better neighbours are decided; says whether rows are left undecided."""
    for row in rows:
        has_kept[row] = False
        waits[row] = False
    for edge in range(len(better)):
        has_kept[worse[edge]] |= state[better[edge]] == _KEPT
        waits[worse[edge]] |= state[better[edge]] == _UNDECIDED
    is_left = False
    for row in rows:
        if state[row] == _UNDECIDED:
            if has_kept[row]:
                state[row] = _GONE
            elif not waits[row]:
                state[row] = _KEPT
            else:
                is_left = True
    return is_left


@kernel
def _visit(better, worse, state):  # type: ignore[no-untyped-def]
    """Decides rows one by one; edges are sorted by their worse row, best first."""
    start = 0
    while start < len(worse):
        end, is_gone = start, False
        while end < len(worse) and worse[end] == worse[start]:
            is_gone |= state[better[end]] == _KEPT
            end += 1
        state[worse[start]] = _GONE if is_gone else _KEPT
        start = end


@kernel
def _find_best(better, worse, likeness, kept, order, found, values):  # type: ignore[no-untyped-def]
    for edge in range(len(better)):
        row, other = worse[edge], better[edge]
        if kept[row] or not kept[other]:
            continue
        if found[row] < 0 or is_better(other, found[row], order):
            found[row] = other
            values[row] = likeness[edge]
