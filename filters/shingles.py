"""Shingles of word tables, compiled: the `size`-grams of a row's words as 64-bit hashes, and sets of them.

Both ends of a row are padded with `size - 1` empty words. (Without the padding the last word lies in one shingle only:
"the car that stands behind the bus" would pass for the same about a truck.) A shingle's hash is a polynomial over the
hashes of its words, so each word is read once however many shingles hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.hashing import fold64, folded64, folding_end64
from filters.kernels import inlined, kernel
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
    scratch = scratch_for(table, context, size)
    _count_own(table.hashes, table.offsets, context.hashes, context.offsets, size, scratch, out)
    return out


def scratch_for(table: WordTable, context: WordTable, size: int) -> Scratch:
    """Returns room for one row of either table at a time, or for two and their contexts in the hash table."""
    longest = max(table.longest, context.longest) + 2 * size
    num_slots = max(16, 1 << (8 * longest - 1).bit_length())
    return Scratch(
        np.empty(longest, np.uint64),
        np.empty(longest, np.uint64),
        np.empty(num_slots, np.uint64),
        np.zeros(num_slots + 1, np.int64),
        np.empty((num_slots, 2), np.int64),
    )


@kernel
def shingle_hashes(words, start, end, size, scratch):  # type: ignore[no-untyped-def]
    """Writes the hash of each shingle of words[start:end] to `scratch.hashes` and returns their number.

    One pass over the row for each word of a shingle: no step waits for the one before, so they run side by side.
    """
    padded, hashes, num_words = scratch.padded, scratch.hashes, end - start
    num_padding = size - 1
    num_shingles = num_words + num_padding
    padded[:num_padding] = EMPTY_WORD
    for place in range(np.uintp(num_words)):
        padded[np.uintp(num_padding) + place] = words[np.uintp(start) + place]
    padded[num_shingles : num_shingles + num_padding] = EMPTY_WORD
    for place in range(np.uintp(num_shingles)):
        hashes[place] = padded[place]
    for word in range(np.uintp(1), np.uintp(size)):
        for place in range(np.uintp(num_shingles)):
            hashes[place] = folded64(hashes[place], padded[place + word])
    for place in range(np.uintp(num_shingles)):
        hashes[place] = folding_end64(hashes[place], np.uint64(size))
    return num_shingles


@inlined
def empty_table(scratch):  # type: ignore[no-untyped-def]
    """Empties the hash table of the scratch room."""
    scratch.stamps[-1] += 1


@inlined
def slot_of(keys, stamps, marks, use, key):  # type: ignore[no-untyped-def]
    """Returns the slot of a key in the hash table; a new key is put there, with marks of 0."""
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while stamps[slot] == use and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    if stamps[slot] != use:
        stamps[slot], keys[slot] = use, key
        marks[slot, 0], marks[slot, 1] = 0, 0
    return slot


@kernel
def mark_shingles(words, start, end, size, scratch, mark, unless, other):  # type: ignore[no-untyped-def]
    """Sets the bit `mark` of a row's shingles that have none of the bits `unless`.

    Returns how many shingles got it, and how many of those have the bit `other`.
    """
    num = shingle_hashes(words, start, end, size, scratch)
    return _mark(scratch.hashes[:num], scratch.keys, scratch.stamps, scratch.marks, mark, unless, other)


@kernel
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


@kernel
def own_shingles(words, start, end, other, other_start, other_end, size, scratch):  # type: ignore[no-untyped-def]
    """Writes the distinct hashes of a row's shingles without its context's to `scratch.hashes`; returns the number."""
    empty_table(scratch)
    if other_end > other_start:
        mark_shingles(other, other_start, other_end, size, scratch, 1, 0, 0)
    num = shingle_hashes(words, start, end, size, scratch)
    return _keep_new(scratch.hashes[:num], scratch.keys, scratch.stamps, scratch.marks)


@kernel
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


@kernel
def _count_own(words, offsets, other, other_offsets, size, scratch, out):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        out[row] = own_shingles(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size, scratch
        )
