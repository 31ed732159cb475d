"""MinHash signatures of word tables, compiled: what datasketch defines, for a million rows a second.

The low 32 bits of a shingle's hash (`filters.shingles`) go through datasketch's "affine32" scheme: with
`shingle_hash32` as its hash function, `datasketch.MinHash` gives the same signature, bit for bit. All 64 bits stand for
the shingle where sets are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from filters.hashing import folded64, folding_end64, joined64
from filters.kernels import inlined, kernel
from filters.shingles import Scratch, own_shingles, scratch_for, shingle_hash, shingle_hashes
from filters.word_table import WordTable

_WEIGHTS = (0.02, 0.98)
"""Weights of false and missed candidates in datasketch's optimiser. A false candidate costs one exact comparison, a
missed one stays in the corpus. At 0.8 with 128 permutations: 17 bands of 7, by which pairs at the threshold become
candidates with probability 0.98, at 0.85 with 0.999. The default weighs both alike and takes 9 bands of 13: 0.40 and
0.69."""

_AT_ONCE = 4
"""Shingles that are permuted in one pass over a signature, which is read and written as many times less often."""


@dataclass(frozen=True, slots=True)
class MinHashScheme:
    """How texts are signed. shingle_words: tokens in a shingle. seed: taken modulo 2**32, the generator's range."""

    num_permutations: int = 128
    shingle_words: int = 3
    seed: int = 1

    def permutations(self) -> NDArray[np.uint32]:
        """Returns factors and summands of the permutations, uint32 [2, num_permutations], as datasketch draws them."""
        start = MinHash(num_perm=self.num_permutations, seed=self.seed % 2**32, scheme="affine32")
        return np.ascontiguousarray(np.array(start.permutations, np.uint32))


@dataclass(frozen=True, slots=True)
class BandShape:
    """How a signature is cut: num_bands pieces of num_rows values each; values left over are not used."""

    num_bands: int
    num_rows: int

    def candidate_probability(self, similarity: float) -> float:
        """Returns 1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4.2)."""
        return float(1 - (1 - similarity**self.num_rows) ** self.num_bands)


@lru_cache(16)
def band_shape(threshold: float, num_permutations: int) -> BandShape:
    """Returns the bands that datasketch's own optimiser takes for the threshold, with weights that spare missed pairs.

    Raises ValueError: the threshold lies outside (0, 1], or there are fewer than two permutations.
    """
    if not 0 < threshold <= 1 or num_permutations < 2:
        raise ValueError(f"threshold = {threshold} and num_permutations = {num_permutations} give no bands")
    try:
        chosen = MinHashLSH(threshold=threshold, num_perm=num_permutations, weights=_WEIGHTS)
    except ValueError:  # it takes one band at thresholds near one, and then refuses a single band
        return BandShape(2, num_permutations // 2)
    return BandShape(chosen.b, chosen.r)


def shingle_hash32(shingle: bytes) -> int:
    """Returns the hash by which datasketch gets the same signatures: the low 32 bits of `shingle_hash`."""
    return shingle_hash(shingle) & 0xFFFFFFFF


def sign(table: WordTable, scheme: MinHashScheme, context: WordTable | None = None) -> NDArray[np.uint32]:
    """Returns the signatures, uint32 [num_rows, num_permutations].

    context: texts by row whose shingles do not count, such as the question that a trace copies.
    """
    out = np.empty((len(table), scheme.num_permutations), np.uint32)
    other = context or WordTable.of_empty_rows(len(table))
    room = _Room.of(table, other, scheme)
    size, permutations = scheme.shingle_words, scheme.permutations()
    _sign_rows(table.hashes, table.offsets, other.hashes, other.offsets, size, permutations, room, out)
    return out


def band_keys(
    table: WordTable,
    blocks: NDArray[np.uint64],
    scheme: MinHashScheme,
    shape: BandShape,
    context: WordTable | None = None,
) -> NDArray[np.uint64]:
    """Returns the keys of the bands, uint64 [num_bands, num_rows]: rows are candidates if any of theirs agree.

    blocks: uint64 [num_rows]; rows of different blocks have different keys (but for one in 2**64).
    """
    out = np.empty((shape.num_bands, len(table)), np.uint64)
    other = context or WordTable.of_empty_rows(len(table))
    room = _Room.of(table, other, scheme)
    size, permutations, num_rows = scheme.shingle_words, scheme.permutations(), shape.num_rows
    _band_rows(
        table.hashes, table.offsets, other.hashes, other.offsets, size, permutations, room, blocks, num_rows, out
    )
    return out


class _Room(NamedTuple):
    """Room to work in. values: uint32, what is permuted of each shingle. signature: uint32 [num_permutations]."""

    scratch: Scratch
    values: NDArray[np.uint32]
    signature: NDArray[np.uint32]

    @classmethod
    def of(cls, table: WordTable, context: WordTable, scheme: MinHashScheme) -> _Room:
        scratch = scratch_for(table, context, scheme.shingle_words)
        values = np.empty(len(scratch.hashes) + _AT_ONCE, np.uint32)
        return cls(scratch, values, np.empty(scheme.num_permutations, np.uint32))


@kernel
def _sign_row(words, start, end, other, other_start, other_end, size, permutations, room, out):  # type: ignore[no-untyped-def]
    """Writes the signature of a row to `out`, uint32 [num_permutations]."""
    if other_end > other_start:
        num = own_shingles(words, start, end, other, other_start, other_end, size, room.scratch)
    else:
        num = shingle_hashes(words, start, end, size, room.scratch)
    hashes, values = room.scratch.hashes, room.values
    factors, summands = permutations[0], permutations[1]
    for place in range(np.uintp(num)):
        value = np.uint32(hashes[place] & np.uint64(0xFFFFFFFF))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        values[place] = np.uint32(value ^ (value >> np.uint32(16)))
    out[:] = np.uint32(0xFFFFFFFF)
    for place in range(num, num + (-num) % _AT_ONCE if num else 0):
        values[place] = values[0]  # the minimum is the same however often a value takes part
    for place in range(np.uintp(0), np.uintp(num), np.uintp(_AT_ONCE)):
        one, two, three, four = values[place], values[place + 1], values[place + 2], values[place + 3]
        for k in range(len(out)):
            factor, summand = factors[k], summands[k]
            first = min(_permuted(one, factor, summand), _permuted(two, factor, summand))
            second = min(_permuted(three, factor, summand), _permuted(four, factor, summand))
            out[k] = min(out[k], first, second)


@inlined
def _permuted(value, factor, summand):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(factor * value) + summand)


@kernel
def _sign_rows(words, offsets, other, other_offsets, size, permutations, room, out):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        _sign_row(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            permutations, room, out[row],
        )  # fmt: skip


@kernel
def _band_rows(words, offsets, other, other_offsets, size, permutations, room, blocks, num_rows, out):  # type: ignore[no-untyped-def]
    signature = room.signature
    for row in range(out.shape[1]):
        _sign_row(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            permutations, room, signature,
        )  # fmt: skip
        for band in range(np.uintp(len(out))):
            key = joined64(blocks[row], np.uint64(band))
            for place in range(band * np.uintp(num_rows), (band + np.uintp(1)) * np.uintp(num_rows)):
                key = folded64(key, np.uint64(signature[place]))
            out[band, row] = folding_end64(key, np.uint64(num_rows))
