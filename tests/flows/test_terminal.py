"""Texts from data on a terminal."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from flows.commands.terminal import columns, fields, shown_line, shown_text

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202egnp.exe \u2066 a\rb\u2028c\ud800"


@given(st.text() | st.text(alphabet=HOSTILE + "אب\n\t ", max_size=40), st.none() | st.integers(1, 50))
def test_nothing_that_acts_on_a_terminal_is_left(text: str, limit: int | None) -> None:
    for shown in (shown_text(text, limit), shown_line(text, limit)):
        left = shown.replace("\u2068", "").replace("\u2069", "")
        assert all(unicodedata.category(c) != "Cc" or c in "\n\t" for c in left)
        assert not any(c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u200e\u200f\u2028\u2029" for c in left)
        assert shown.count("\u2068") == shown.count("\u2069")
        shown.encode("utf-8")
    assert "\n" not in shown_line(text, limit)


@given(st.text(), st.integers(1, 50))
def test_a_line_is_as_long_as_it_may_be_and_one_sign_more(text: str, limit: int) -> None:
    line = shown_line(text, limit).replace("\u2068", "").replace("\u2069", "")
    assert len(line) <= limit + 1


def test_a_text_that_is_cut_says_so() -> None:
    assert shown_text("abcdef", 3) == "abc… [clipped after 3 of 6 characters]"
    assert shown_text("abcdef", None) == "abcdef"
    assert shown_line("one  two\nthree", 8) == "one two…"


def test_lines_from_right_to_left_are_isolated_each_by_itself() -> None:
    assert shown_text("dots\nنقاط") == "dots\n\u2068نقاط\u2069"
    assert shown_text("dots\n\u202eنقاط") == "dots\n\u2068نقاط\u2069"


def test_a_text_of_ten_megabytes_is_one_short_line() -> None:
    assert len(shown_line("dots " * 2_000_000)) <= 201


def test_names_and_values_are_aligned_also_over_several_lines() -> None:
    assert fields([("id", "a"), ("question", "b\nc")], indent=2) == ["  id        a", "  question  b", "            c"]
    assert columns(["by", "n"], [["math", "1"], ["ocr", "22"]]) == ["by     n", "math   1", "ocr   22"]
