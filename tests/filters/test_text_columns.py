"""The compiled reading of text columns against the functions of filters.normalise, which state the rules."""

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from filters.flat_texts import FlatTexts
from filters.hashing import folded64, folding_end64
from filters.normalise import decisive_tokens, normalise_text, tokens
from filters.text_columns import read_texts, read_tokens
from filters.word_table import word_hash

SIGNS = list(
    "aAbBxXzZ09 .,:;'\"!?-_+*/=()[]{}\\%$#@\t\n¿¡²½×−–’“”…éÉßﬁＡ٣三不中ก가\u1161\u0301\u200b\u200d\ufe0f👍👨İΣςǅªªⅣ″€"
)
WORDS = ["the", "What", "left", "NOT", "Three", "\\alpha", "\\Delta", "don't", "f'(x)", "5'3\"", "3:4", "1,000.5", ".5"]
texts = st.one_of(
    st.lists(st.sampled_from(SIGNS), max_size=30).map("".join),
    st.lists(st.sampled_from([*SIGNS, *WORDS, " "]), max_size=20).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


def digest_of(words: list[str]) -> int:
    """Returns the digest of words: a polynomial over their hashes, then XXH64's avalanche."""
    state = np.uint64(0)
    for word in words:
        state = np.uint64(folded64(state, np.uint64(word_hash(word))))
    return int(folding_end64(state, np.uint64(len(words))))


def assert_read_as_stated(rows: list[str]) -> None:
    found, read_words = read_texts(pa.array(rows, pa.string())), read_tokens(FlatTexts.of_strings(rows))
    for place, text in enumerate(rows):
        normal = normalise_text(text)
        content = normal.encode()
        row = tokens(normal)
        assert read_words.row(place) == row
        assert found.words.row(place) == [word_hash(word) for word in row]
        assert found.num_words[place] == len(row)
        assert found.lengths[place] == len(normal)
        assert found.exact[place, 0] == xxhash.xxh64_intdigest(content, 0)
        assert found.decisive[place] == digest_of(decisive_tokens(row))


@settings(deadline=None, max_examples=400)
@given(st.lists(texts, max_size=8))
@example(["WHAT IS THIS?", "CO", "n!", "5!!", "x''y", "a - b", "well-known", "x-y", "__ _", "¿", "?!.", "f''"])
def test_a_column_is_read_as_the_rules_state(rows: list[str]) -> None:
    assert_read_as_stated(rows)


ascii_pieces = st.sampled_from(
    [*"aZx9 .,'!-\\_\t\x7f", "  ", "word", "Don't", "SHOUT", "\\Delta", "1,000.5", "f'(x)", "a" * 62]
)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.lists(ascii_pieces, max_size=60).map("".join), max_size=4))
def test_long_texts_in_ascii_are_read_as_the_rules_state(rows: list[str]) -> None:
    assert_read_as_stated(rows)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 62, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("last", ["", "b", " ", "  b", "'", "'b", ".", "5", "\x00"])
def test_words_that_end_where_eight_or_64_bytes_do_are_whole(size: int, last: str) -> None:
    assert_read_as_stated(["a" * size + last, "A" + "a" * (size - 1) + last, "x " * (size // 2) + "y" + last])


def test_every_code_point_is_read_as_the_rules_state() -> None:
    codes = [code for code in range(0x11000) if not 0xD800 <= code < 0xE000]
    assert_read_as_stated([f"Ab{chr(code)}c {chr(code)}" for code in codes])
    assert_read_as_stated([chr(code) for code in codes])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_absent_texts_are_empty_and_slices_keep_their_rows(kind: pa.DataType) -> None:
    column = pa.chunked_array([pa.array(["one", None, ""], kind), pa.array(["two words", "three"], kind)]).slice(1, 3)
    found = read_texts(column)
    assert [read_tokens(FlatTexts.of(column)).row(place) for place in range(3)] == [[], [], ["two", "words"]]
    assert np.array_equal(found.exact[0], found.exact[1])
    assert found.num_words.tolist() == [0, 0, 2]


def test_a_column_without_rows_has_none() -> None:
    assert len(read_texts(pa.array([], pa.string())).words) == 0


def test_a_megabyte_of_one_word_is_one_token() -> None:
    found = read_texts(pa.array(["a" * 2**20, "b " * 2**19]))
    assert found.num_words.tolist() == [1, 2**19]
