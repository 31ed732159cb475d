"""Which texts are nearly the same: shingles, MinHash signatures, bands, and the exact check of every candidate.

The four steps are separate, so that each can be replaced by a faster one:
1. `shingles`: the set of word n-grams of a text.
2. `signatures`: MinHash over the shingles, by datasketch.
3. `BandIndex`: candidates, texts that share a band of their signatures within one block.
4. `similarity`: exact Jaccard of the shingles, and the order of what both texts say.

Whether two texts are a candidate pair depends on the two alone, not on what else is compared. So dropping duplicates
twice drops nothing more, and no order of the rows changes the result.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from filters.normalise import content_tokens

_RECALL = 0.99
"""Least probability that two texts exactly at the threshold become candidates. datasketch's own optimiser weighs false
candidates like missed ones: at 0.8 with 128 permutations it takes 9 bands of 13, which miss 60 % of such pairs. Here
every candidate is verified, so a false one costs time alone, and a missed one stays in the corpus."""

_BATCH_SHINGLES = 8192
"""Shingles hashed at once: datasketch allocates (shingles x permutations) numbers, half a GiB for a million words."""


class BandShape(NamedTuple):
    """How a signature is cut: num_bands pieces of num_rows values each."""

    num_bands: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class ComparedText:
    """A text ready for comparison: its tokens in order and the set of their shingles."""

    tokens: tuple[str, ...]
    shingles: frozenset[str]


def shingles(tokens: Sequence[str], size: int) -> frozenset[str]:
    """Returns the set of `size`-grams of the tokens, both ends padded with `size - 1` empty tokens.

    Without the padding the first and the last word lie in one shingle and all others in `size`: "What colour is the car
    that stands behind the bus?" would pass for the same question about a truck.
    """
    padded = [""] * (size - 1) + list(tokens) + [""] * (size - 1)
    return frozenset(" ".join(padded[start : start + size]) for start in range(len(padded) - size + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Returns the size of the intersection over the size of the union, in [0, 1]; 1 for two empty sets."""
    num_shared = len(first & second)
    num_all = len(first) + len(second) - num_shared
    return num_shared / num_all if num_all else 1.0


def band_shape(threshold: float, num_permutations: int) -> BandShape:
    """Returns the longest bands by which pairs at the threshold still become candidates with probability `_RECALL`.

    The probability is 1 - (1 - t^r)^b for b bands of r rows (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets,
    section 3.4.2). Where no shape reaches it (few permutations, low threshold), bands have one row.
    """
    for num_rows in range(num_permutations, 1, -1):
        num_bands = num_permutations // num_rows
        if 1 - (1 - threshold**num_rows) ** num_bands >= _RECALL:
            return BandShape(num_bands, num_rows)
    return BandShape(num_permutations, 1)


def signatures(
    shingle_sets: Iterable[frozenset[str]], *, num_permutations: int, seed: int
) -> Iterable[NDArray[np.uint32]]:
    """Yields the MinHash signature `[num_permutations]` of each set, in order.

    What `MinHash.bulk` does (one set of permutations, copied), with a bound on memory for huge texts. seed: any
    integer; it is taken modulo 2**32, the range of the generator.
    """
    start = MinHash(num_perm=num_permutations, seed=seed % 2**32, scheme="affine32")
    for shingle_set in shingle_sets:
        minhash = start.copy()
        hashed = [shingle.encode("utf-8", "surrogatepass") for shingle in shingle_set]
        for place in range(0, len(hashed), _BATCH_SHINGLES):
            minhash.update_batch(hashed[place : place + _BATCH_SHINGLES])
        yield minhash.hashvalues


def bands(signature: NDArray[np.uint32], shape: BandShape) -> list[bytes]:
    """Returns the bands of a signature, each led by its own number so that no two bands can be confused."""
    rows = signature[: shape.num_bands * shape.num_rows].reshape(shape)
    return [number.to_bytes(4, "big") + band.tobytes() for number, band in enumerate(rows)]


class BandIndex:
    """The kept texts by block and band. A text is named by its rank, smaller for better."""

    def __init__(self) -> None:
        self._ranks: defaultdict[bytes, list[int]] = defaultdict(list)

    def add(self, rank: int, block: bytes, text_bands: Iterable[bytes]) -> None:
        for band in text_bands:
            self._ranks[block + band].append(rank)

    def candidates(self, block: bytes, text_bands: Iterable[bytes]) -> list[int]:
        """Returns the ranks of the texts of the block that share a band, best first."""
        found: set[int] = set()
        for band in text_bands:
            found.update(self._ranks.get(block + band, ()))
        return sorted(found)


def similarity(first: ComparedText, second: ComparedText, *, threshold: float) -> float | None:
    """Returns the Jaccard similarity of two texts that say the same in the same order, or None.

    None if it lies below the threshold, or if the content words that occur equally often in both come in another order:
    "the cat is left of the dog" is not "the dog is left of the cat", however long the sentence around it. Words that
    occur more often in one text than in the other (inserted ones) do not disturb the order of the rest.
    """
    fewer, more = sorted((len(first.shingles), len(second.shingles)))
    if fewer / max(more, 1) < threshold:  # no intersection can be larger; a quotient, as 0.7 * 10 is more than 7
        return None
    likeness = jaccard(first.shingles, second.shingles)
    if likeness < threshold or not _is_same_order(first.tokens, second.tokens):
        return None
    return likeness


def block_key(*parts: Iterable[str]) -> bytes:
    """Returns 16 bytes that stand for the parts: texts of different blocks are never compared."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        items = [item.encode("utf-8", "surrogatepass") for item in part]
        digest.update(len(items).to_bytes(8, "big"))
        for item in items:
            digest.update(len(item).to_bytes(8, "big") + item)
    return digest.digest()


def _is_same_order(first: Sequence[str], second: Sequence[str]) -> bool:
    if first == second:
        return True
    content = content_tokens(first), content_tokens(second)
    counts = Counter(content[0]), Counter(content[1])
    shared = {token for token, count in counts[0].items() if counts[1][token] == count}
    return [token for token in content[0] if token in shared] == [token for token in content[1] if token in shared]
