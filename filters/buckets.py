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

from filters.kernels import inlined, kernel
from filters.row_order import RowOrder, is_better

_SMALL = 48
"""Rows of a bucket up to which all pairs are compared: at most 24 pairs a row."""

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]


class Pairs(NamedTuple):
    """pairs: int64 [num_pairs, 2], the smaller row first. crowded: rows of buckets too large for all their pairs."""

    pairs: Rows
    crowded: Rows


def shared_rows(keys: Keys, active: NDArray[np.bool_] | None = None) -> Rows:
    """Returns the (active) rows whose key another has too, and some others: a filter before sorting.

    Each key sets one of eight times as many bits; a row passes if its bit was set twice.
    """
    num_bits = 1 << max(10, int(8 * max(len(keys), 1) - 1).bit_length())
    once, twice = np.zeros(num_bits // 8, np.uint8), np.zeros(num_bits // 8, np.uint8)
    passes = np.ones(len(keys), np.bool_) if active is None else active.copy()
    _mark_shared(keys, np.uint64(num_bits - 1), once, twice, passes)
    return np.flatnonzero(passes)


def bucket_pairs(keys: Keys, rows: Rows, blocks: Keys, answers: Keys, order: RowOrder, num_leaders: int) -> Pairs:
    """Returns the pairs of rows that share a key, lie in one block and do not contradict each other's answers.

    keys: uint64 [num_active], of `rows`, int64 [num_active]. blocks, answers, order: of all rows. num_leaders: best
    rows of a large bucket, per answer, that are paired with its others.
    """
    by_key = np.argsort(keys)  # in any order within a bucket
    keys, rows = keys[by_key], rows[by_key]
    num_pairs, num_crowded = _pair_buckets(
        keys, rows, blocks, answers, order, num_leaders, np.empty((0, 2), np.int64), np.empty(0, np.int64)
    )
    pairs, crowded = np.empty((num_pairs, 2), np.int64), np.empty(num_crowded, np.int64)
    _pair_buckets(keys, rows, blocks, answers, order, num_leaders, pairs, crowded)
    return Pairs(pairs, crowded)


def matching_pairs(new: Keys, old: Keys, max_matches: int = 64) -> Rows:
    """Returns pairs (place in new, place in old) of equal keys, int64 [num_pairs, 2]: a join, linear in both.

    A new key is joined with its first `max_matches` equal old ones only. Pairs are in the order of the old places.
    """
    by_key = np.argsort(new, kind="stable")
    different, starts = np.unique(new[by_key], return_index=True)
    table = _key_table(different)
    num_matches = np.zeros(len(different), np.int32)
    num = _join(different, old, table, max_matches, num_matches, np.empty((0, 2), np.int64))
    joined = np.empty((num, 2), np.int64)
    num_matches[:] = 0
    _join(different, old, table, max_matches, num_matches, joined)
    sizes = np.diff(np.append(starts, len(new)))[joined[:, 0]]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.stack([by_key[np.repeat(starts[joined[:, 0]], sizes) + within], np.repeat(joined[:, 1], sizes)], axis=1)


def has_key(wanted: Keys, keys: Keys) -> NDArray[np.bool_]:
    """Returns for each key whether it is among the wanted ones."""
    different = np.unique(wanted)
    found = np.empty(len(keys), np.bool_)
    _mark_members(different, keys, _key_table(different), found)
    return found


def rows_with_keys(wanted: Keys, keys: Keys) -> Rows:
    """Returns the places of the keys that are among the wanted ones, in order."""
    return np.flatnonzero(has_key(wanted, keys))


class _KeyTable(NamedTuple):
    """Different keys by open addressing, and a filter that most other keys do not pass.

    slots: int64 [power of two], the place of a key or -1. bits: uint8, a bit for each of some sixteen times as many
    values of other bits of the keys than those that choose the slot.
    """

    slots: NDArray[np.int64]
    bits: NDArray[np.uint8]


def _key_table(different: Keys) -> _KeyTable:
    num_slots = 1 << max(4, int(2 * max(len(different), 1)).bit_length())
    table = _KeyTable(np.full(num_slots, -1, np.int64), np.zeros(max(16, num_slots), np.uint8))
    _fill_table(different, table)
    return table


@kernel
def _mark_shared(keys, mask, once, twice, passes):  # type: ignore[no-untyped-def]
    """Clears `passes` where the bit of a key was set once only, by the rows that have it set."""
    for row in range(len(keys)):
        place = keys[row] & mask
        bit = np.uint8(passes[row]) << np.uint8(place & np.uint64(7))
        byte = place >> np.uint64(3)
        twice[byte] |= once[byte] & bit
        once[byte] |= bit
    for row in range(len(keys)):
        place = keys[row] & mask
        passes[row] &= (twice[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7))) & 1


@inlined
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


@kernel
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


@inlined
def _filter_bit(key, bits):  # type: ignore[no-untyped-def]
    """Returns the byte of the filter, and the bit in it, that stand for a key."""
    place = (key >> np.uint64(20)) & np.uint64(8 * len(bits) - 1)
    return place >> np.uint64(3), np.uint8(1) << np.uint8(place & np.uint64(7))


@kernel
def _fill_table(different, table):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table.slots) - 1)
    for place in range(len(different)):
        slot = different[place] & mask
        while table.slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        table.slots[slot] = place
        byte, bit = _filter_bit(different[place], table.bits)
        table.bits[byte] |= bit


@inlined
def _find_key(different, key, slots, bits):  # type: ignore[no-untyped-def]
    """Returns the place of a key among the different ones, or -1."""
    byte, bit = _filter_bit(key, bits)
    if not bits[byte] & bit:
        return -1
    mask = np.uint64(len(slots) - 1)
    slot = key & mask
    while slots[slot] >= 0 and different[slots[slot]] != key:
        slot = (slot + np.uint64(1)) & mask
    return slots[slot]


@kernel
def _mark_members(different, keys, table, found):  # type: ignore[no-untyped-def]
    for place in range(len(keys)):
        found[place] = _find_key(different, keys[place], table.slots, table.bits) >= 0


@kernel
def _join(different, old, table, max_matches, num_matches, pairs):  # type: ignore[no-untyped-def]
    """Writes pairs (place among the different keys, place in old) where there is room; returns how many there are."""
    num = 0
    for place in range(len(old)):
        key = _find_key(different, old[place], table.slots, table.bits)
        if key >= 0 and num_matches[key] < max_matches:
            num_matches[key] += 1
            if num < len(pairs):
                pairs[num, 0], pairs[num, 1] = key, place
            num += 1
    return num
