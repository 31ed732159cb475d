"""The exact check of candidate pairs, compiled: Jaccard similarity of their shingles, and the order of what they say.

Two texts are alike if the Jaccard similarity of their shingle sets reaches the threshold and the content words that
occur equally often in both come in the same order. Shingles and words are compared by 64-bit hashes, so two unlike
texts pass for alike with a probability of about 1e-15.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
import xxhash
from numpy.typing import NDArray

from filters import normalise
from filters.hashing import xxh64
from filters.signatures import longest_row, own_shingles
from filters.token_table import TokenTable


def likeness(
    table: TokenTable,
    pairs: NDArray[np.int64],
    threshold: float,
    *,
    shingle_words: int,
    context: TokenTable | None = None,
) -> NDArray[np.float64]:
    """Returns the Jaccard similarity of each pair of rows that are alike, and -1 for every other pair.

    pairs: int64 [num_pairs, 2], rows of the table; sorted by the first, its shingles are made once. context: texts by
    row whose shingles do not count. Releases the interpreter lock while it works.
    """
    other = context or TokenTable(np.zeros(0, np.uint8), np.zeros(len(table) + 1, np.int64))
    out = np.empty(len(pairs), np.float64)
    _compare_pairs(
        table.text, table.offsets, other.text, other.offsets, pairs, threshold, shingle_words, _filler_hashes(), out
    )
    return out


@cache
def _filler_hashes() -> NDArray[np.uint64]:
    return np.sort(np.array([xxhash.xxh64_intdigest(word.encode()) for word in normalise._FILLERS], np.uint64))


@numba.njit(cache=True, nogil=True)
def _compare_pairs(text, offsets, other, other_offsets, pairs, threshold, size, fillers, out):  # type: ignore[no-untyped-def]
    longest = max(longest_row(offsets), longest_row(other_offsets)) + 2 * size + 4
    padded, starts = np.empty(longest, np.uint8), np.empty(longest, np.int64)
    copied = np.empty(longest, np.uint64)
    sets = np.empty((2, longest), np.uint64)
    words = np.empty((2, longest), np.uint64)
    sizes, num_words = np.zeros(2, np.int64), np.zeros(2, np.int64)
    held = -1
    for place in range(len(pairs)):
        for side in range(2):
            row = pairs[place, side]
            if side == 0 and row == held:
                continue
            sizes[side] = own_shingles(
                text, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
                padded, starts, sets[side], copied,
            )  # fmt: skip
            num_words[side] = _content_words(text, offsets[row], offsets[row + 1], fillers, words[side])
        held = pairs[place, 0]
        found = _jaccard(sets[0, : sizes[0]], sets[1, : sizes[1]], threshold)
        is_alike = found >= threshold and _is_same_order(words[0, : num_words[0]], words[1, : num_words[1]])
        out[place] = found if is_alike else -1.0


@numba.njit(cache=True, nogil=True)
def _jaccard(first, second, threshold):  # type: ignore[no-untyped-def]
    """Returns the Jaccard similarity of two sorted sets, or -1 where their sizes alone keep it below the threshold."""
    fewer, more = min(len(first), len(second)), max(len(first), len(second))
    if fewer < threshold * more - 1e-9:
        return -1.0
    shared, one, two = 0, 0, 0
    while one < len(first) and two < len(second):
        if first[one] == second[two]:
            shared += 1
            one += 1
            two += 1
        elif first[one] < second[two]:
            one += 1
        else:
            two += 1
    num_all = len(first) + len(second) - shared
    return shared / num_all if num_all else 1.0


@numba.njit(cache=True, nogil=True)
def _content_words(text, start, end, fillers, out):  # type: ignore[no-untyped-def]
    """Writes the hashes of the tokens that are no fillers, in order; returns their number."""
    num, place = 0, start
    while place < end:
        stop = place
        while stop < end and text[stop] != 0x20:
            stop += 1
        digest = xxh64(text, place, stop, np.uint64(0))
        where = np.searchsorted(fillers, digest)
        if where == len(fillers) or fillers[where] != digest:
            out[num] = digest
            num += 1
        place = stop + 1
    return num


@numba.njit(cache=True, nogil=True)
def _is_same_order(first, second):  # type: ignore[no-untyped-def]
    """Says whether the words that occur equally often in both come in the same order."""
    if len(first) == len(second) and np.all(first == second):
        return True
    ordered_first, ordered_second = np.sort(first), np.sort(second)
    one, two = 0, 0
    while True:
        while one < len(first) and not _is_shared(first[one], ordered_first, ordered_second):
            one += 1
        while two < len(second) and not _is_shared(second[two], ordered_first, ordered_second):
            two += 1
        if one == len(first) or two == len(second):
            return one == len(first) and two == len(second)
        if first[one] != second[two]:
            return False
        one += 1
        two += 1


@numba.njit(cache=True, nogil=True)
def _is_shared(word, ordered_first, ordered_second):  # type: ignore[no-untyped-def]
    return _count(ordered_first, word) == _count(ordered_second, word)


@numba.njit(cache=True, nogil=True)
def _count(ordered, word):  # type: ignore[no-untyped-def]
    return np.searchsorted(ordered, word, side="right") - np.searchsorted(ordered, word)
