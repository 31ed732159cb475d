"""Which differences between two texts are spelling, and which are meaning."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.normalise import (
    content_tokens,
    decisive_tokens,
    normalise_text,
    num_unspaced,
    plain_text,
    spaced_words,
    tokens,
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is this?", "  what is\n\tthis "),
        ("WHAT IS THIS?", "What is this"),
        ("What\u00a0is\u3000this", "What is this"),
        ("Ｗｈａｔ ｉｓ ｔｈｉｓ？", "What is this?"),
        ("caf\u00e9", "cafe\u0301"),
        ("3 \u2212 4", "3 - 4"),
        ("3 \u2013 4", "3 - 4"),
        ("“now”, it’s", '"now", it\'s'),
        ("the \ufb01rst o\ufb03ce", "the first office"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("\u202bمرحبا\u202c", "مرحبا"),
        ("\ufee3\ufeae\ufea3\ufe92\ufe8e", "مرحبا"),
        ("❤\ufe0f", "❤"),
        ("¿Qué es esto?", "qué es esto"),
        ("nul\x00byte", "nul byte"),
        ("What is it?!", "What is it"),
    ],
)
def test_spellings_of_one_text_are_equal(first: str, second: str) -> None:
    assert normalise_text(first) == normalise_text(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cat left of dog", "dog left of cat"),
        ("3 - 4", "3 + 4"),
        ("-3", "3"),
        (".5", "5"),
        ("5%", "5"),
        ("5!", "5"),
        ("n!", "n"),
        ("(n+1)!", "(n+1)"),
        ("solve for x", "solve for X"),
        ("x²", "x2"),
        ("2½", "21/2"),
        ("𝐱", "x"),
        ("\\Delta", "\\delta"),
        ("CO", "Co"),
        ("5 mW", "5 MW"),
        ("AB", "ab"),
        ("?", "."),
        ("👨\u200d👩", "👨👩"),
        ("👍🏻", "👍🏿"),
        ("resume", "résumé"),
        ("f'(x)", "f(x)"),
    ],
)
def test_differences_that_can_change_an_answer_stay(first: str, second: str) -> None:
    assert normalise_text(first) != normalise_text(second)


@given(st.text(st.characters(exclude_categories=[]), max_size=60))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once
    assert plain_text(plain_text(text)) == plain_text(text)


@given(st.text(st.characters(exclude_categories=[]), max_size=60))
def test_tokens_hold_no_white_space_and_stand_in_the_text_in_order(text: str) -> None:
    normalised = normalise_text(text)
    place = 0
    for token in tokens(normalised):
        assert token and token == "".join(token.split())
        place = normalised.index(token, place) + len(token)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what is 3+4, then?", ["what", "is", "3", "+", "4", "then"]),
        ("a well-known x-1 word", ["a", "well", "known", "x", "-", "1", "word"]),
        ("1,000.5 and .5", ["1,000.5", "and", ".5"]),
        ("3:4 at noon: now", ["3", ":", "4", "at", "noon", "now"]),
        ("don't 'stop'", ["don't", "stop"]),
        ("f'(x)", ["f", "'", "(", "x", ")"]),
        ("5! but hi!", ["5", "!", "but", "hi"]),
        ("\\frac{1}{2}", ["\\frac", "{", "1", "}", "{", "2", "}"]),
        ("x² ½", ["x", "²", "½"]),
        ("is _____ it", ["is", "_", "it"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("三角形abc", ["三", "角", "形", "abc"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("👍🏻 ok", ["👍🏻", "ok"]),
        ("", []),
        ("?!...", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


def test_numbers_signs_names_and_decisive_words_are_decisive() -> None:
    found = decisive_tokens(tokens("is a cat left of point B not x̄ + 3 or twelve red ½ 三 🙂 dogs (or a pair)"))
    assert found == ["left", "B", "not", "x̄", "+", "3", "twelve", "red", "½", "三", "🙂", "(", "pair", ")"]


def test_articles_are_not_content() -> None:
    assert content_tokens(["what", "is", "the", "cat"]) == ["what", "cat"]


def test_words_of_unspaced_scripts_are_counted_by_character() -> None:
    assert spaced_words("3+4=7, 所以 ok") == ["3+4=7,", "所", "以", "ok"]
    assert num_unspaced(spaced_words("3+4=7, 所以 ok")) == 2
    assert spaced_words("plain  words\n") == ["plain", "words"]


@pytest.mark.parametrize(
    "unit", ["a\u0301\u0316", "\u0301\u0316", "?!", "a'", "1.", "_", "三", "\ud800", "WHAT ", "\\"]
)
def test_a_huge_text_takes_linear_time(unit: str) -> None:
    def seconds(times: int) -> float:
        start = time.process_time()
        tokens(normalise_text(unit * times))
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 20 * max(seconds(2_000), 0.01)


def test_a_run_of_marks_is_cut() -> None:
    assert normalise_text("q" + "\u0316" * 1000) == "q" + "\u0316" * 30
