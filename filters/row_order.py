"""The order of rows, best first, which alone decides which of several duplicates stays.

Better is: published already, has a reference answer, more pixels, a longer question, a smaller id. The first four are
packed into one number (`filters.features`). Ids are functions of the content, so rows that tie are copies of one row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.kernels import inlined


class RowOrder(NamedTuple):
    """All uint64 [num_rows]: smaller is better, compared in this order."""

    goodness: NDArray[np.uint64]
    id_high: NDArray[np.uint64]
    id_low: NDArray[np.uint64]


@inlined
def is_better(one, other, order):  # type: ignore[no-untyped-def]
    """Says whether row `one` comes before row `other`."""
    if order.goodness[one] != order.goodness[other]:
        return order.goodness[one] < order.goodness[other]
    if order.id_high[one] != order.id_high[other]:
        return order.id_high[one] < order.id_high[other]
    return order.id_low[one] < order.id_low[other]
