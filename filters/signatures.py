"""MinHash signatures of token tables, compiled: what datasketch defines, for a million rows a second.

A row's shingles are the `size`-grams of its tokens, both ends padded with `size - 1` empty tokens, each hashed once to
64 bits. (Without the padding the last word lies in one shingle only: "the car that stands behind the bus" would pass
for the same about a truck.) The low 32 bits go through datasketch's "affine32" scheme: with `shingle_hash32` as its
hash function, `datasketch.MinHash` gives the same signature, bit for bit. All 64 bits stand for the shingle where sets
are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from filters.hashing import joined64, xxh64
from filters.token_table import TokenTable

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
    """Returns the hash by which datasketch gets the same signatures: the low 32 bits of XXH64 with seed 0."""
    return xxhash.xxh64_intdigest(shingle) & 0xFFFFFFFF


def sign(table: TokenTable, scheme: MinHashScheme, context: TokenTable | None = None) -> NDArray[np.uint32]:
    """Returns the signatures, uint32 [num_rows, num_permutations].

    context: texts by row whose shingles do not count, such as the question that a trace copies.
    """
    out = np.empty((len(table), scheme.num_permutations), np.uint32)
    other = context or _empty_like(table)
    _sign_rows(table.text, table.offsets, other.text, other.offsets, scheme.shingle_words, scheme.permutations(), out)
    return out


def band_keys(
    table: TokenTable,
    blocks: NDArray[np.uint64],
    scheme: MinHashScheme,
    shape: BandShape,
    context: TokenTable | None = None,
) -> NDArray[np.uint64]:
    """Returns the keys of the bands, uint64 [num_bands, num_rows]: rows are candidates if any of theirs agree.

    blocks: uint64 [num_rows]; rows of different blocks have different keys (but for one in 2**64).
    """
    out = np.empty((shape.num_bands, len(table)), np.uint64)
    other = context or _empty_like(table)
    used = np.ascontiguousarray(scheme.permutations()[:, : shape.num_bands * shape.num_rows])
    _band_rows(
        table.text, table.offsets, other.text, other.offsets, scheme.shingle_words, used, blocks, shape.num_rows, out
    )
    return out


def num_own_shingles(table: TokenTable, shingle_words: int, context: TokenTable) -> NDArray[np.int32]:
    """Returns how many distinct shingles each row has that its context lacks."""
    out = np.empty(len(table), np.int32)
    _count_own(table.text, table.offsets, context.text, context.offsets, shingle_words, out)
    return out


def _empty_like(table: TokenTable) -> TokenTable:
    return TokenTable(np.zeros(0, np.uint8), np.zeros(len(table) + 1, np.int64))


@numba.njit(cache=True, nogil=True)
def shingle_hashes(text, start, end, size, padded, starts, out):  # type: ignore[no-untyped-def]
    """Writes the hash of each shingle of text[start:end] to `out` and returns their number.

    padded: uint8 scratch of at least end - start + 2 * size bytes. starts: int64 scratch of as many entries. Shingle i
    runs from the start of token i to the end of token i + size - 1, padding included.
    """
    fill, num_starts = 0, 0
    if start == end:  # nothing but padding: size - 1 times the same
        padded[: size - 1] = 0x20
        out[: size - 1] = xxh64(padded, 0, size - 1, np.uint64(0))
        return size - 1
    for _ in range(size - 1):
        padded[fill] = 0x20
        starts[num_starts] = fill
        fill += 1
        num_starts += 1
    starts[num_starts] = fill
    num_starts += 1
    for place in range(start, end):
        padded[fill] = text[place]
        fill += 1
        if text[place] == 0x20:
            starts[num_starts] = fill
            num_starts += 1
    for _ in range(size - 1):
        padded[fill] = 0x20
        fill += 1
        starts[num_starts] = fill
        num_starts += 1
    starts[num_starts] = fill + 1
    num_shingles = num_starts - size + 1
    for place in range(num_shingles):
        out[place] = xxh64(padded, starts[place], starts[place + size] - 1, np.uint64(0))
    return num_shingles


@numba.njit(cache=True, nogil=True)
def own_shingles(text, start, end, other, other_start, other_end, size, padded, starts, out, copied):  # type: ignore[no-untyped-def]
    """Writes the sorted, distinct hashes of a row's shingles without those of its context; returns their number."""
    found = np.sort(out[: shingle_hashes(text, start, end, size, padded, starts, out)])
    num_copied = 0
    if other_end > other_start:
        num_copied = shingle_hashes(other, other_start, other_end, size, padded, starts, copied)
        copied[:num_copied] = np.sort(copied[:num_copied])
    kept, near = 0, 0
    for place in range(len(found)):
        if place and found[place] == found[place - 1]:
            continue
        while near < num_copied and copied[near] < found[place]:
            near += 1
        if near == num_copied or copied[near] != found[place]:
            out[kept] = found[place]
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def _count_own(text, offsets, other, other_offsets, size, out):  # type: ignore[no-untyped-def]
    longest = max(longest_row(offsets), longest_row(other_offsets)) + 2 * size + 4
    padded, starts = np.empty(longest, np.uint8), np.empty(longest, np.int64)
    hashes, copied = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    for row in range(len(out)):
        out[row] = own_shingles(
            text, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            padded, starts, hashes, copied,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def longest_row(offsets):  # type: ignore[no-untyped-def]
    """Returns the bytes of the longest row."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    return longest


@numba.njit(cache=True, nogil=True)
def _signature(  # type: ignore[no-untyped-def]
    text, start, end, other, other_start, other_end, size, factors, summands, padded, starts, hashes, copied, out
):
    """Writes the signature of a row to `out`, uint32 [num_permutations]."""
    if other_end > other_start:
        num = own_shingles(text, start, end, other, other_start, other_end, size, padded, starts, hashes, copied)
    else:
        num = shingle_hashes(text, start, end, size, padded, starts, hashes)
    out[:] = np.uint32(0xFFFFFFFF)
    for place in range(num):
        value = np.uint32(hashes[place] & np.uint64(0xFFFFFFFF))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        value = np.uint32(np.uint32(value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        value = np.uint32(value ^ (value >> np.uint32(16)))
        for k in range(len(out)):
            permuted = np.uint32(np.uint32(factors[k] * value) + summands[k])
            out[k] = min(out[k], permuted)


@numba.njit(cache=True, nogil=True)
def _sign_rows(text, offsets, other, other_offsets, size, permutations, out):  # type: ignore[no-untyped-def]
    longest = max(longest_row(offsets), longest_row(other_offsets)) + 2 * size + 4
    padded, starts = np.empty(longest, np.uint8), np.empty(longest, np.int64)
    hashes, copied = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    factors, summands = permutations[0], permutations[1]
    for row in range(len(offsets) - 1):
        _signature(
            text, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            factors, summands, padded, starts, hashes, copied, out[row],
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _band_rows(text, offsets, other, other_offsets, size, permutations, blocks, num_rows, out):  # type: ignore[no-untyped-def]
    longest = max(longest_row(offsets), longest_row(other_offsets)) + 2 * size + 4
    padded, starts = np.empty(longest, np.uint8), np.empty(longest, np.int64)
    hashes, copied = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    factors, summands = permutations[0], permutations[1]
    signature = np.empty(len(factors), np.uint32)
    for row in range(len(offsets) - 1):
        _signature(
            text, offsets[row], offsets[row + 1], other, other_offsets[row], other_offsets[row + 1], size,
            factors, summands, padded, starts, hashes, copied, signature,
        )  # fmt: skip
        for band in range(len(out)):
            key = joined64(blocks[row], np.uint64(band))
            for value in signature[band * num_rows : (band + 1) * num_rows]:
                key = joined64(key, np.uint64(value))
            out[band, row] = key
