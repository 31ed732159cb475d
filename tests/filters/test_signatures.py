"""Signatures against datasketch, which defines them, and the shape of the bands."""

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.shingles import num_own_shingles
from filters.signatures import MinHashScheme, band_keys, band_shape, shingle_hash32, sign
from filters.word_table import word_table
from tests.filters.reference import compared

texts = st.lists(st.sampled_from(["cat", "Dog", "left", "3", "+", "é", "不", "a", "don't"]), max_size=30).map(" ".join)


@settings(deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=5), st.integers(-3, 2**40), st.integers(1, 5), st.sampled_from([1, 16, 128])
)
def test_signatures_equal_those_of_datasketch(rows: list[str], seed: int, size: int, num_permutations: int) -> None:
    signed = sign(word_table(rows), MinHashScheme(num_permutations, size, seed))
    for text, signature in zip(rows, signed, strict=True):
        expected = MinHash(num_perm=num_permutations, seed=seed % 2**32, scheme="affine32", hashfunc=shingle_hash32)
        expected.update_batch([shingle.encode() for shingle in compared(text, size).shingles])
        assert np.array_equal(signature, expected.hashvalues)


def test_the_share_of_equal_values_estimates_jaccard() -> None:
    words = [f"w{letter}{other}" for letter in "abcdefghij" for other in "klmnopqrst"]
    signed = sign(word_table([" ".join(words), " ".join(words[20:])]), MinHashScheme(1024, 1))
    assert np.mean(signed[0] == signed[1]) == pytest.approx(80 / 100, abs=0.04)  # three standard errors


@pytest.mark.parametrize(
    ("threshold", "num_permutations", "expected"),
    [(0.8, 128, (17, 7)), (0.9, 128, (10, 12)), (0.5, 128, (34, 3)), (1.0, 128, (2, 64)), (0.5, 2, (2, 1))],
)
def test_bands_are_those_of_datasketchs_optimiser(
    threshold: float, num_permutations: int, expected: tuple[int, int]
) -> None:
    shape = band_shape(threshold, num_permutations)
    assert (shape.num_bands, shape.num_rows) == expected
    if threshold < 1:
        lsh = MinHashLSH(threshold=threshold, num_perm=num_permutations, weights=(0.02, 0.98))
        assert (lsh.b, lsh.r) == expected


def test_a_pair_is_a_candidate_as_often_as_the_theory_says() -> None:
    """By hand: 1 - (1 - 0.8**7)**17 = 1 - 0.7903**17 = 0.9817."""
    shape = band_shape(0.8, 128)
    assert shape.candidate_probability(0.8) == pytest.approx(0.9817, abs=1e-4)
    assert shape.candidate_probability(0.85) > 0.99


@pytest.mark.parametrize(("threshold", "num_permutations"), [(0.0, 128), (1.5, 128), (0.8, 1)])
def test_bands_that_cannot_be_are_refused(threshold: float, num_permutations: int) -> None:
    with pytest.raises(ValueError, match="give no bands"):
        band_shape(threshold, num_permutations)


def test_rows_of_other_blocks_share_no_band() -> None:
    table = word_table(["one two three four"] * 3)
    keys = band_keys(table, np.array([1, 1, 2], np.uint64), MinHashScheme(), band_shape(0.8, 128))
    assert np.array_equal(keys[:, 0], keys[:, 1])
    assert not np.any(keys[:, 0] == keys[:, 2])


def test_bands_cover_the_signature_in_pieces_of_their_rows() -> None:
    table = word_table(["one two three four", "one two three five"])
    scheme, shape = MinHashScheme(), band_shape(0.8, 128)
    pieces = sign(table, scheme)[:, : shape.num_bands * shape.num_rows].reshape(2, shape.num_bands, shape.num_rows)
    keys = band_keys(table, np.zeros(2, np.uint64), scheme, shape)
    assert np.array_equal(np.all(pieces[0] == pieces[1], axis=1), keys[:, 0] == keys[:, 1])


def test_own_shingles_are_those_that_the_context_lacks() -> None:
    table, context = word_table(["a b c d", "x y"]), word_table(["b c", ""])
    assert num_own_shingles(table, 2, context).tolist() == [4, 3]  # " a", "a b", "c d", "d "; " x", "x y", "y "
