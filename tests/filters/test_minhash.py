"""Shingles, signatures, bands and the exact check of candidates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.minhash import (
    BandIndex,
    BandShape,
    ComparedText,
    band_shape,
    bands,
    block_key,
    jaccard,
    shingles,
    signatures,
    similarity,
)


def compared(text: str, size: int = 3) -> ComparedText:
    return ComparedText(tuple(text.split()), shingles(text.split(), size))


def test_every_word_lies_in_as_many_shingles() -> None:
    found = shingles(["a", "b", "c"], 2)
    assert found == {" a", "a b", "b c", "c "}


def test_jaccard_is_the_shared_part_of_all() -> None:
    assert jaccard(frozenset("abcd"), frozenset("cdef")) == pytest.approx(2 / 6)
    assert jaccard(frozenset(), frozenset()) == 1.0
    assert jaccard(frozenset("a"), frozenset()) == 0.0


@pytest.mark.parametrize(
    ("threshold", "num_permutations", "expected"),
    [(0.8, 128, (21, 6)), (0.9, 128, (12, 10)), (1.0, 128, (1, 128)), (0.01, 128, (128, 1)), (0.5, 1, (1, 1))],
)
def test_band_shapes(threshold: float, num_permutations: int, expected: tuple[int, int]) -> None:
    """By hand for 0.8: 1 - (1 - 0.8**6)**21 = 0.998, while 18 bands of 7 rows reach 0.986."""
    assert band_shape(threshold, num_permutations) == expected


@pytest.mark.parametrize("seed", [-1, 0, 2**40])
def test_signatures_depend_on_the_set_and_the_seed_alone(seed: int) -> None:
    sets = [frozenset(map(str, range(20_000))), frozenset({"a", "\ud800"})]
    first, second = signatures(sets, num_permutations=16, seed=seed)
    again = next(iter(signatures([frozenset(map(str, reversed(range(20_000))))], num_permutations=16, seed=seed)))
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    other = next(iter(signatures(sets, num_permutations=16, seed=seed + 1)))
    assert not np.array_equal(first, other)


def test_a_signature_estimates_jaccard() -> None:
    sets = [frozenset(map(str, range(100))), frozenset(map(str, range(20, 120)))]
    first, second = signatures(sets, num_permutations=1024, seed=1)
    assert np.mean(first == second) == pytest.approx(80 / 120, abs=0.05)  # three standard errors are 0.044


def test_only_texts_of_one_block_with_a_common_band_are_candidates() -> None:
    shape = BandShape(2, 2)
    index = BandIndex()
    index.add(7, b"block", bands(np.array([1, 2, 3, 4], dtype=np.uint32), shape))
    index.add(3, b"block", bands(np.array([1, 2, 9, 9], dtype=np.uint32), shape))
    index.add(1, b"other", bands(np.array([1, 2, 3, 4], dtype=np.uint32), shape))
    assert index.candidates(b"block", bands(np.array([1, 2, 3, 4], dtype=np.uint32), shape)) == [3, 7]
    assert index.candidates(b"block", bands(np.array([3, 4, 1, 2], dtype=np.uint32), shape)) == []


def test_similarity_is_exact_and_the_threshold_belongs_to_it() -> None:
    first, second = compared("a b c d e f g h", 1), compared("a b c d e f g h i j", 1)
    assert similarity(first, second, threshold=0.8) == 0.8
    assert similarity(first, second, threshold=0.81) is None


def test_another_order_of_content_words_is_another_text() -> None:
    around = "in this picture of a living room with many things one can tell that {} which is seen from afar as usual"
    first, second = (around.format(x) for x in ("the cat sits near the dog", "the dog sits near the cat"))
    assert similarity(compared(first), compared(second), threshold=0.3) is None
    assert similarity(compared(first, 1), compared(second, 1), threshold=1.0) is None
    assert similarity(compared(first), compared(first), threshold=1.0) == 1.0


def test_an_inserted_word_does_not_disturb_the_order() -> None:
    words = [f"w{i}" for i in range(40)]
    longer = [*words[:10], "please", "w30", *words[10:]]
    assert similarity(compared(" ".join(words)), compared(" ".join(longer)), threshold=0.8) is not None


@given(st.lists(st.lists(st.text(max_size=3), max_size=3), max_size=3))
def test_block_keys_are_equal_for_equal_parts_alone(parts: list[list[str]]) -> None:
    assert block_key(*parts) == block_key(*parts)
    assert block_key(*parts) != block_key(*parts, [])
    assert block_key(["ab"]) != block_key(["a", "b"])
