"""The exact check of candidate pairs, compiled: Jaccard similarity of their shingles, and the order of what they say.

Two texts are alike if the Jaccard similarity of their shingle sets reaches the threshold and the content words that
occur equally often in both come in the same order. Shingles and words are compared by 64-bit hashes, so two unlike
texts pass for alike with a probability of about 1e-15. A pair costs time linear in its words.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from filters import normalise
from filters.kernels import kernel
from filters.shingles import empty_table, mark_shingles, scratch_for, slot_of
from filters.word_table import WordTable, is_in_set, word_set

_FIRST, _SECOND, _FIRST_CONTEXT, _SECOND_CONTEXT = 1, 2, 4, 8


def likeness(
    table: WordTable,
    pairs: NDArray[np.int64],
    threshold: float,
    *,
    shingle_words: int,
    context: WordTable | None = None,
) -> NDArray[np.float64]:
    """Returns the Jaccard similarity of each pair of rows that are alike, and -1 for every other pair.

    pairs: int64 [num_pairs, 2], rows of the table. context: texts by row whose shingles do not count. Releases the
    interpreter lock while it works.
    """
    other = context or WordTable.of_empty_rows(len(table))
    out, scratch = np.empty(len(pairs), np.float64), scratch_for(table, other, shingle_words)
    _compare_pairs(
        table.hashes, table.offsets, other.hashes, other.offsets, pairs, threshold, shingle_words, _fillers(), scratch,
        np.empty((2, table.longest), np.int64), out,
    )  # fmt: skip
    return out


@cache
def _fillers() -> NDArray[np.uint64]:
    return word_set(normalise._FILLERS)


@kernel
def _compare_pairs(words, offsets, other, other_offsets, pairs, threshold, size, fillers, scratch, places, out):  # type: ignore[no-untyped-def]
    for place in range(len(pairs)):
        one, two = pairs[place, 0], pairs[place, 1]
        found = _jaccard(words, offsets, other, other_offsets, one, two, size, scratch)
        if found < threshold:
            out[place] = -1.0
            continue
        empty_table(scratch)
        first, second = words[offsets[one] : offsets[one + 1]], words[offsets[two] : offsets[two + 1]]
        num = _count_words(first, fillers, scratch.keys, scratch.stamps, scratch.marks, 0, places[0])
        num_other = _count_words(second, fillers, scratch.keys, scratch.stamps, scratch.marks, 1, places[1])
        out[place] = found if _is_same_order(places[0, :num], places[1, :num_other], scratch.marks) else -1.0


@kernel
def _jaccard(words, offsets, other, other_offsets, one, two, size, scratch):  # type: ignore[no-untyped-def]
    """Returns the Jaccard similarity of two rows' shingles without those of their contexts; of nothing, 1."""
    empty_table(scratch)
    if other_offsets[one + 1] > other_offsets[one]:
        mark_shingles(other, other_offsets[one], other_offsets[one + 1], size, scratch, _FIRST_CONTEXT, 0, 0)
    if other_offsets[two + 1] > other_offsets[two]:
        mark_shingles(other, other_offsets[two], other_offsets[two + 1], size, scratch, _SECOND_CONTEXT, 0, 0)
    first, last = offsets[one], offsets[one + 1]
    num_first, _ = mark_shingles(words, first, last, size, scratch, _FIRST, _FIRST_CONTEXT, 0)
    first, last = offsets[two], offsets[two + 1]
    num_second, num_shared = mark_shingles(words, first, last, size, scratch, _SECOND, _SECOND_CONTEXT, _FIRST)
    num_all = num_first + num_second - num_shared
    return num_shared / num_all if num_all else 1.0


@kernel
def _count_words(words, fillers, keys, stamps, marks, side, places):  # type: ignore[no-untyped-def]
    """Counts in marks[:, side] the words that are no fillers, writes their slots in order; returns their number."""
    num, use = 0, stamps[-1]
    for word in words:
        if not is_in_set(fillers, word):
            slot = slot_of(keys, stamps, marks, use, word)
            marks[slot, side] += 1
            places[num] = slot
            num += 1
    return num


@kernel
def _is_same_order(first, second, counts):  # type: ignore[no-untyped-def]
    """Says whether the words that occur equally often in both come in the same order. first, second: their slots."""
    one, two = 0, 0
    while True:
        while one < len(first) and counts[first[one], 0] != counts[first[one], 1]:
            one += 1
        while two < len(second) and counts[second[two], 0] != counts[second[two], 1]:
            two += 1
        if one == len(first) or two == len(second):
            return one == len(first) and two == len(second)
        if first[one] != second[two]:
            return False
        one += 1
        two += 1
