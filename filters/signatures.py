"""MinHash signatures of word tables, compiled: what datasketch defines, for a million rows a second.

The low 32 bits of a shingle's hash (`filters.shingles`) go through datasketch's "affine32" scheme: with
`shingle_hash32` as its hash function, `datasketch.MinHash` gives the same signature, bit for bit. All 64 bits stand for
the shingle where sets are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from filters.hashing import folded64, folding_end64, joined64
from filters.shingles import own_shingles, scratch_for, shingle_hash, shingle_hashes
from filters.word_table import WordTable

_WEIGHTS = (0.02, 0.98)
"""Weights of false and missed candidates in datasketch's optimiser. A false candidate costs one exact comparison, a
missed one stays in the corpus. At 0.8 with 128 permutations: 17 bands of 7, by which pairs at the threshold become
candidates with probability 0.98, at 0.85 with 0.999. The default weighs both alike and takes 9 bands of 13: 0.40 and
0.69."""


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
    permutations = scheme.permutations()
    _sign_rows(table.hashes, table.offsets, other.hashes, other.offsets, scheme.shingle_words, permutations, out)
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
    used = np.ascontiguousarray(scheme.permutations()[:, : shape.num_bands * shape.num_rows])
    size, num_rows = scheme.shingle_words, shape.num_rows
    _band_rows(table.hashes, table.offsets, other.hashes, other.offsets, size, used, blocks, num_rows, out)
    return out


@numba.njit(cache=True, nogil=True)
def _sign_row(words, start, end, other, other_start, other_end, size, permutations, scratch, out):  # type: ignore[no-untyped-def]
    """Writes the signature of a row to `out`, uint32 [num_permutations]."""
    if other_end > other_start:
        num = own_shingles(words, start, end, other, other_start, other_end, size, scratch)
    else:
        num = shingle_hashes(words, start, end, size, scratch)
    factors, summands = permutations[0], permutations[1]
    out[:] = np.uint32(0xFFFFFFFF)
    for place in range(num):
        value = np.uint32(scratch.hashes[place] & np.uint64(0xFFFFFFFF))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        value = np.uint32(value ^ (value >> np.uint32(16)))
        for k in range(len(out)):
            permuted = np.uint32(np.uint32(factors[k] * value) + summands[k])
            out[k] = min(out[k], permuted)


@numba.njit(cache=True, nogil=True)
def _sign_rows(words, offsets, other, other_offsets, size, permutations, out):  # type: ignore[no-untyped-def]
    scratch = scratch_for(offsets, other_offsets, size)
    for row in range(len(out)):
        _sign_row(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            permutations, scratch, out[row],
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _band_rows(words, offsets, other, other_offsets, size, permutations, blocks, num_rows, out):  # type: ignore[no-untyped-def]
    scratch = scratch_for(offsets, other_offsets, size)
    signature = np.empty(permutations.shape[1], np.uint32)
    for row in range(out.shape[1]):
        _sign_row(
            words, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            permutations, scratch, signature,
        )  # fmt: skip
        for band in range(len(out)):
            key = joined64(blocks[row], np.uint64(band))
            for value in signature[band * num_rows : (band + 1) * num_rows]:
                key = folded64(key, np.uint64(value))
            out[band, row] = folding_end64(key, np.uint64(num_rows))
