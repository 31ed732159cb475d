"""Shingles of word tables, compiled: the `size`-grams of a row's words as 64-bit hashes, and sets of them.

Both ends of a row are padded with `size - 1` empty words. (Without the padding the last word lies in one shingle only:
"the car that stands behind the bus" would pass for the same about a truck.) A shingle's hash is a polynomial over the
hashes of its words, so each word is read once however many shingles hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from filters.hashing import FOLD_BASE, fold64, folded64, folding_end64
from filters.word_table import EMPTY_WORD, WordTable, word_hash


class Scratch(NamedTuple):
    """Room to work in, for rows up to some length; made by `scratch_for`.

    padded, hashes: uint64 [longest row and its padding]. keys: uint64 [power of two], an open hash table. stamps:
    int64, which use of the table a key belongs to, so that emptying it costs nothing; stamps[-1] is the number of uses.
    marks: int64 [as many, 2], what is noted of a key.
    """

    padded: NDArray[np.uint64]
    hashes: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    stamps: NDArray[np.int64]
    marks: NDArray[np.int64]


def shingle_hash(shingle: bytes) -> int:
    """Returns the hash of a shingle, given as its words in UTF-8, joined by single spaces."""
    words = np.array([word_hash(word) for word in shingle.split(b" ")], np.uint64)
    return int(fold64(words))


def num_own_shingles(table: WordTable, size: int, context: WordTable) -> NDArray[np.int32]:
    """Returns how many distinct shingles each row has that its context lacks."""
    out = np.empty(len(table), np.int32)
    _count_own(table.hashes, table.offsets, context.hashes, context.offsets, size, out)
    return out


@numba.njit(cache=True, nogil=True)
def scratch_for(offsets, other_offsets, size):  # type: ignore[no-untyped-def]
    """Returns room for one row of either table at a time, or for two and their contexts in the hash table."""
    longest = max(_longest_row(offsets), _longest_row(other_offsets)) + 2 * size
    num_slots = 16
    while num_slots < 8 * longest:
        num_slots *= 2
    return Scratch(
        np.empty(longest, np.uint64),
        np.empty(longest, np.uint64),
        np.empty(num_slots, np.uint64),
        np.zeros(num_slots + 1, np.int64),
        np.empty((num_slots, 2), np.int64),
    )


@numba.njit(cache=True, nogil=True)
def _longest_row(offsets):  # type: ignore[no-untyped-def]
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    return longest


@numba.njit(cache=True, nogil=True)
def shingle_hashes(words, start, end, size, scratch):  # type: ignore[no-untyped-def]
    """Writes the hash of each shingle of words[start:end] to `scratch.hashes` and returns their number."""
    padded, hashes, num_words = scratch.padded, scratch.hashes, end - start
    padded[:size] = EMPTY_WORD
    padded[size : size + num_words] = words[start:end]
    padded[size + num_words : num_words + 2 * size] = EMPTY_WORD
    state, power = np.uint64(0), np.uint64(1)
    for _ in range(size):
        state, power = folded64(state, EMPTY_WORD), power * FOLD_BASE
    num_shingles = num_words + size - 1
    for place in range(np.uintp(num_shingles)):
        entering, leaving = padded[place + np.uintp(size)], padded[place]
        state = folded64(state, entering) - leaving * power
        hashes[place] = folding_end64(state, np.uint64(size))
    return num_shingles


@numba.njit(cache=True, nogil=True, inline="always")
def empty_table(scratch):  # type: ignore[no-untyped-def]
    """Empties the hash table of the scratch room."""
    scratch.stamps[-1] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def slot_of(keys, stamps, marks, use, key):  # type: ignore[no-untyped-def]
    """Returns the slot of a key in the hash table; a new key is put there, with marks of 0.

    The arrays of the scratch room come one by one: taken out of it here, each would be counted in and out.
    """
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while stamps[slot] == use and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    if stamps[slot] != use:
        stamps[slot], keys[slot] = use, key
        marks[slot, 0], marks[slot, 1] = 0, 0
    return slot


@numba.njit(cache=True, nogil=True)
def mark_shingles(words, start, end, size, scratch, mark, unless, other):  # type: ignore[no-untyped-def]
    """Sets the bit `mark` of a row's shingles that have none of the bits `unless`.

    Returns how many shingles got it, and how many of those have the bit `other`.
    """
    num = shingle_hashes(words, start, end, size, scratch)
    return _mark(scratch.hashes[:num], scratch.keys, scratch.stamps, scratch.marks, mark, unless, other)


@numba.njit(cache=True, nogil=True)
def _mark(hashes, keys, stamps, marks, mark, unless, other):  # type: ignore[no-untyped-def]
    num_marked, num_shared, use = 0, 0, stamps[-1]
    for key in hashes:
        slot = slot_of(keys, stamps, marks, use, key)
        held = marks[slot, 0]
        if not held & (mark | unless):
            num_shared += (held & other) != 0
            marks[slot, 0] = held | mark
            num_marked += 1
    return num_marked, num_shared


@numba.njit(cache=True, nogil=True)
def own_shingles(words, start, end, other, other_start, other_end, size, scratch):  # type: ignore[no-untyped-def]
    """Writes the distinct hashes of a row's shingles without its context's to `scratch.hashes`; returns the number."""
    empty_table(scratch)
    if other_end > other_start:
        mark_shingles(other, other_start, other_end, size, scratch, 1, 0, 0)
    num = shingle_hashes(words, start, end, size, scratch)
    return _keep_new(scratch.hashes[:num], scratch.keys, scratch.stamps, scratch.marks)


@numba.njit(cache=True, nogil=True)
def _keep_new(hashes, keys, stamps, marks):  # type: ignore[no-untyped-def]
    """Moves the hashes without a mark to the front, each once, and marks them; returns their number."""
    num_new, use = 0, stamps[-1]
    for key in hashes:
        slot = slot_of(keys, stamps, marks, use, key)
        if not marks[slot, 0]:
            marks[slot, 0] = 1
            hashes[num_new] = key
            num_new += 1
    return num_new


@numba.njit(cache=True, nogil=True)
def _count_own(words, offsets, other, other_offsets, size, out):  # type: ignore[no-untyped-def]
    scratch = scratch_for(offsets, other_offsets, size)
    for row in range(len(out)):
        out[row] = own_shingles(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size, scratch
        )
