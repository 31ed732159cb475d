"""Picks a few rows of many: random to the eye, the same every time, and spread so that rare kinds of rows are seen.

Rows are ranked by a hash of their key. The rows of each stratum take turns: first the best of every stratum, then the
second of every stratum, and so on, in order of rank within a turn. What is picked depends on the rows alone, not on
their order or on how they are sharded. Memory holds one batch and the rows picked so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import polars as pl

RANK = "rank"
_TURN = "turn"


def pick_spread(
    batches: Iterable[pl.DataFrame], *, key: str, strata: Sequence[str], num_rows: int
) -> pl.DataFrame | None:
    """Returns up to `num_rows` rows of all batches in the order of their turns, None if there is no batch.

    key: the column that is hashed; no value is null. strata: the columns whose values tell the strata apart. The
    result has the columns of the batches and `rank`.
    """
    picked: pl.DataFrame | None = None
    for batch in batches:
        ranks = pl.Series(RANK, [_rank(value) for value in batch[key].to_list()], dtype=pl.String)
        ranked = batch.with_columns(ranks)
        # A row that is not among the first so far never will be: later rows only push it back. And its stratum has
        # kept rows of lower rank, so those that come later are counted as if it were still there.
        picked = _first(ranked if picked is None else pl.concat([picked, ranked]), strata, num_rows)
    return picked


def _rank(value: str) -> str:
    # Hashed anew: the audit slice is chosen by id as well, and must not fill the sample.
    return hashlib.sha256(f"report:{value}".encode("utf-8", "replace")).hexdigest()


def _first(ranked: pl.DataFrame, strata: Sequence[str], num_rows: int) -> pl.DataFrame:
    turns = ranked.sort(RANK).with_columns(pl.int_range(pl.len()).over(strata).alias(_TURN))
    return turns.sort(_TURN, RANK).head(num_rows).drop(_TURN)
