"""The compiled comparison against the reference, which states the rule."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.likeness import likeness
from filters.word_table import word_table
from tests.filters.reference import compared, similarity

WORDS = ["the", "cat", "dog", "left", "of", "a", "sits", "on", "mat", "é"]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(sentences, min_size=2, max_size=5), st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_pairs_are_compared_as_the_rule_states(texts: list[str], size: int, threshold: float) -> None:
    pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts))]
    found = likeness(word_table(texts), np.array(pairs, np.int64), threshold, shingle_words=size)
    for (i, j), value in zip(pairs, found, strict=True):
        expected = similarity(compared(texts[i], size), compared(texts[j], size), threshold=threshold)
        assert value == (-1.0 if expected is None else expected)


def test_what_both_copy_from_their_questions_does_not_count() -> None:
    question = "how many red apples lie on the wooden table near the door"
    texts = word_table([f"{question} so I count three", f"{question} so we look again"])
    context = word_table([question, question])
    pair = np.array([[0, 1]], np.int64)
    assert likeness(texts, pair, 0.5, shingle_words=3)[0] > 0.5
    assert likeness(texts, pair, 0.5, shingle_words=3, context=context)[0] == -1.0
