"""How far the latencies of calls spread around their mean, as recorded from real ones.

Two spreads multiply: how long replies are (answers that real models gave to MATH-Vision's problems), and how long equal
replies take (calls of the demo to a real vLLM). `python -m benchmarks.planning --record` makes the file anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

FILE = "recorded_latencies.json"


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles at even steps from 0 to 1, as multiples of the mean. lengths: of replies. calls: of equal ones."""

    lengths: NDArray[np.float64]
    calls: NDArray[np.float64]

    def slowest(self, random: np.random.Generator, number: int, num_rows: float) -> NDArray[np.float64]:
        """Returns draws [number] of how many times the mean the slowest of so many rows takes.

        The largest of n draws lies at the quantile u^(1/n), u being even: no row is drawn one by one.
        """
        longest = _at(random.random(number) ** (1 / max(1.0, num_rows)), self.lengths)
        return longest * _at(random.random(number), self.calls)

    def typical_slowest(self, num_rows: float) -> float:
        """Returns the median of `slowest`, but for what equal replies differ by."""
        return float(_at(np.array([0.5]) ** (1 / max(1.0, num_rows)), self.lengths)[0])


def _at(shares: NDArray[np.float64], quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.interp(shares, np.linspace(0.0, 1.0, len(quantiles)), quantiles))


@cache
def recorded_spread() -> Spread:
    """Returns the recorded spreads."""
    record = json.loads(files("flows.planning").joinpath(FILE).read_text(encoding="utf-8"))
    return Spread(np.array(record["lengths"]["quantiles"]), np.array(record["calls"]["quantiles"]))
