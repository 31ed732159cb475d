"""The words of many texts as two flat arrays, the form in which texts are compared by the million.

Row i is hashes[offsets[i]:offsets[i + 1]]: `word_hash` of each of its tokens (`filters.normalise`), in order. Hashes
stand for the words: of two texts of a hundred words, some two agree by chance with a probability of about 5e-16.
`EMPTY_WORD`, the hash of no bytes, pads the ends of a text where its shingles are made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from filters.hashing import word_hash64
from filters.kernels import inlined
from filters.normalise import normalise_text, tokens

EMPTY_WORD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class WordTable:
    """hashes: uint64 [num_words]. offsets: int64 [num_rows + 1], from 0 to num_words."""

    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]

    @classmethod
    def of_empty_rows(cls, num_rows: int) -> WordTable:
        return cls(np.zeros(0, np.uint64), np.zeros(num_rows + 1, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __add__(self, other: WordTable) -> WordTable:
        """Returns the rows of both tables, one table after the other."""
        start, end = self.offsets[-1], other.offsets[0]
        hashes = np.concatenate([self.hashes[:start], other.hashes[end : other.offsets[-1]]])
        return WordTable(hashes, np.concatenate([self.offsets, other.offsets[1:] - end + start]))

    @property
    def longest(self) -> int:
        """The words of the longest row."""
        return int(np.diff(self.offsets).max(initial=0))

    def row(self, place: int) -> list[int]:
        """Returns the hashes of one row."""
        hashes: list[int] = self.hashes[self.offsets[place] : self.offsets[place + 1]].tolist()
        return hashes


def word_hash(word: str | bytes) -> int:
    """Returns the hash of a word: `filters.hashing.word64` of its UTF-8, or `EMPTY_WORD`."""
    content = word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word
    if not content:
        return int(EMPTY_WORD)
    return int(word_hash64(np.frombuffer(content + bytes(8), np.uint8), len(content)))


def word_table(texts: Sequence[str]) -> WordTable:
    """Returns the table of raw texts, one row each, by the functions of `filters.normalise`: slow, for few texts."""
    rows = [[word_hash(token) for token in tokens(normalise_text(text))] for text in texts]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return WordTable(np.array([word for row in rows for word in row], np.uint64), offsets)


def word_set(words: Collection[str]) -> NDArray[np.uint64]:
    """Returns the hashes of words as an open hash table for `is_in_set`, at most an eighth full; 0 is an empty slot."""
    slots = np.zeros(1 << (8 * len(words) - 1).bit_length(), np.uint64)
    for word in sorted(words):
        slot = word_hash(word) % len(slots)
        while slots[slot]:
            slot = (slot + 1) % len(slots)
        slots[slot] = word_hash(word)
    return slots


@inlined
def is_in_set(slots, word):  # type: ignore[no-untyped-def]
    """Says whether the hash of a word is one of a set made by `word_set`."""
    mask = np.uint64(len(slots) - 1)
    slot = word & mask
    while slots[slot] and slots[slot] != word:
        slot = (slot + np.uint64(1)) & mask
    return slots[slot] != np.uint64(0)
