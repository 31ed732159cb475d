"""Rows that share a key, as candidate pairs: the banding step of MinHash LSH over flat arrays, one band at a time.

A key's rows are its bucket. In small buckets every two rows are a pair. In a bucket of more than `_SMALL` rows only
its best rows are paired with all others, so that a million rows of one bucket cost a million pairs and not their
square; the caller asks again with the rows that remain, until no bucket is large.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from filters.row_order import RowOrder, is_better

_SMALL = 48
"""Rows of a bucket up to which all pairs are compared: at most 24 pairs a row."""

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]


class Pairs(NamedTuple):
    """pairs: int64 [num_pairs, 2], the smaller row first. crowded: rows of buckets too large for all their pairs."""

    pairs: Rows
    crowded: Rows


def shared_rows(keys: Keys) -> Rows:
    """Returns the places of all keys that occur more than once, and of some others: a filter before sorting.

    Each key sets one of eight times as many bits; a place passes if its bit was set twice.
    """
    num_bits = 1 << max(10, int(8 * max(len(keys), 1) - 1).bit_length())
    once, twice = np.zeros(num_bits // 8, np.uint8), np.zeros(num_bits // 8, np.uint8)
    passes = np.empty(len(keys), np.bool_)
    _mark_shared(keys, np.uint64(num_bits - 1), once, twice, passes)
    return np.flatnonzero(passes)


def bucket_pairs(keys: Keys, rows: Rows, blocks: Keys, answers: Keys, order: RowOrder, num_leaders: int) -> Pairs:
    """Returns the pairs of rows that share a key, lie in one block and do not contradict each other's answers.

    keys: uint64 [num_active], of `rows`, int64 [num_active] in ascending order. blocks, answers, order: of all rows.
    num_leaders: best rows of a large bucket, per answer, that are paired with its others.
    """
    places = shared_rows(keys)
    places = places[np.argsort(keys[places], kind="stable")]
    sorted_keys, sorted_rows = keys[places], rows[places]
    num_pairs, num_crowded = _pair_buckets(
        sorted_keys, sorted_rows, blocks, answers, order, num_leaders, np.empty((0, 2), np.int64), np.empty(0, np.int64)
    )
    pairs, crowded = np.empty((num_pairs, 2), np.int64), np.empty(num_crowded, np.int64)
    _pair_buckets(sorted_keys, sorted_rows, blocks, answers, order, num_leaders, pairs, crowded)
    return Pairs(pairs, crowded)


def matching_pairs(new: Keys, old: Keys, max_matches: int = 64) -> Rows:
    """Returns pairs (place in new, place in old) of equal keys, int64 [num_pairs, 2]: a join, linear in both.

    A new key is joined with its first `max_matches` equal old ones only.
    """
    size = 1 << max(4, int(2 * max(len(new), 1)).bit_length())
    heads, following = np.full(size, -1, np.int64), np.full(len(new), -1, np.int64)
    once = np.zeros(1 << max(7, int(16 * max(len(new), 1)).bit_length() - 3), np.uint8)
    _fill_table(new, heads, following, once)
    matched = np.zeros(len(new), np.int32)
    num = _probe_table(new, old, heads, following, once, matched, max_matches, np.empty((0, 2), np.int64))
    pairs = np.empty((num, 2), np.int64)
    matched[:] = 0
    _probe_table(new, old, heads, following, once, matched, max_matches, pairs)
    return pairs


@numba.njit(cache=True, nogil=True)
def _mark_shared(keys, mask, once, twice, passes):  # type: ignore[no-untyped-def]
    for key in keys:
        place = key & mask
        bit = np.uint8(1) << np.uint8(place & np.uint64(7))
        byte = place >> np.uint64(3)
        twice[byte] |= once[byte] & bit
        once[byte] |= bit
    for row in range(len(keys)):
        place = keys[row] & mask
        passes[row] = (twice[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7))) & 1


@numba.njit(cache=True, nogil=True, inline="always")
def _may_agree(one, other, blocks, answers):  # type: ignore[no-untyped-def]
    is_consistent = answers[one] == answers[other] or answers[one] == 0 or answers[other] == 0
    return blocks[one] == blocks[other] and is_consistent


@numba.njit(cache=True, nogil=True)
def _pair_buckets(keys, rows, blocks, answers, order, num_leaders, pairs, crowded):  # type: ignore[no-untyped-def]
    """Writes pairs and crowded rows where there is room for them; returns how many there are of either."""
    num_pairs, num_crowded, start = 0, 0, 0
    while start < len(keys):
        end = start + 1
        while end < len(keys) and keys[end] == keys[start]:
            end += 1
        if end - start <= _SMALL:
            for one in range(start, end - 1):
                for other in range(one + 1, end):
                    if _may_agree(rows[one], rows[other], blocks, answers):
                        num_pairs = _add_pair(pairs, num_pairs, rows[one], rows[other])
        else:
            num_pairs = _pair_leaders(rows[start:end], blocks, answers, order, num_leaders, pairs, num_pairs)
            for place in range(start, end):
                if num_crowded < len(crowded):
                    crowded[num_crowded] = rows[place]
                num_crowded += 1
        start = end
    return num_pairs, num_crowded


@numba.njit(cache=True, nogil=True)
def _add_pair(pairs, num_pairs, one, other):  # type: ignore[no-untyped-def]
    if num_pairs < len(pairs):
        pairs[num_pairs, 0] = min(one, other)
        pairs[num_pairs, 1] = max(one, other)
    return num_pairs + 1


@numba.njit(cache=True, nogil=True)
def _pair_leaders(rows, blocks, answers, order, num_leaders, pairs, num_pairs):  # type: ignore[no-untyped-def]
    """Pairs the best rows of each answer with the rows of that answer, and the best of all with those without one."""
    by_answer = rows[np.argsort(answers[rows], kind="mergesort")]
    start = 0
    while start < len(by_answer):
        end = start + 1
        while end < len(by_answer) and answers[by_answer[end]] == answers[by_answer[start]]:
            end += 1
        group = by_answer[start:end]
        for leader in _best(group, order, num_leaders):
            for row in group:
                if row != leader and blocks[row] == blocks[leader]:
                    num_pairs = _add_pair(pairs, num_pairs, row, leader)
        if answers[group[0]] == 0 and end - start < len(by_answer):
            for leader in _best(by_answer[end:], order, num_leaders):
                for row in group:
                    if blocks[row] == blocks[leader]:
                        num_pairs = _add_pair(pairs, num_pairs, row, leader)
        start = end
    return num_pairs


@numba.njit(cache=True, nogil=True)
def _best(rows, order, number):  # type: ignore[no-untyped-def]
    """Returns the best rows, best first."""
    best = np.empty(min(number, len(rows)), np.int64)
    num = 0
    for row in rows:
        if num == len(best) and not is_better(row, best[num - 1], order):
            continue
        place = min(num, len(best) - 1)
        while place and is_better(row, best[place - 1], order):
            best[place] = best[place - 1]
            place -= 1
        best[place] = row
        num = min(num + 1, len(best))
    return best


def rows_with_keys(wanted: Keys, keys: Keys) -> Rows:
    """Returns the places of the keys that are among the wanted ones, in order."""
    size = 1 << max(4, int(2 * max(len(wanted), 1)).bit_length())
    heads, following = np.full(size, -1, np.int64), np.full(len(wanted), -1, np.int64)
    once = np.zeros(1 << max(7, int(16 * max(len(wanted), 1)).bit_length() - 3), np.uint8)
    _fill_table(wanted, heads, following, once)
    found = np.zeros(len(keys), np.bool_)
    _mark_members(wanted, keys, heads, following, found)
    return np.flatnonzero(found)


@numba.njit(cache=True, nogil=True)
def _mark_members(wanted, keys, heads, following, found):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(heads) - 1)
    for place in range(len(keys)):
        row = heads[keys[place] & mask]
        while row >= 0 and wanted[row] != keys[place]:
            row = following[row]
        found[place] = row >= 0


@numba.njit(cache=True, nogil=True)
def _fill_table(new, heads, following, once):  # type: ignore[no-untyped-def]
    mask, bit_mask = np.uint64(len(heads) - 1), np.uint64(8 * len(once) - 1)
    for row in range(len(new) - 1, -1, -1):
        slot = new[row] & mask
        following[row] = heads[slot]
        heads[slot] = row
        place = (new[row] >> np.uint64(20)) & bit_mask
        once[place >> np.uint64(3)] |= np.uint8(1) << np.uint8(place & np.uint64(7))


@numba.njit(cache=True, nogil=True)
def _probe_table(new, old, heads, following, once, matched, max_matches, pairs):  # type: ignore[no-untyped-def]
    mask, bit_mask, num = np.uint64(len(heads) - 1), np.uint64(8 * len(once) - 1), 0
    for place in range(len(old)):
        bit = (old[place] >> np.uint64(20)) & bit_mask
        if not (once[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & 1:
            continue
        row = heads[old[place] & mask]
        while row >= 0:
            if new[row] == old[place] and matched[row] < max_matches:
                matched[row] += 1
                if num < len(pairs):
                    pairs[num, 0] = row
                    pairs[num, 1] = place
                num += 1
            row = following[row]
    return num
