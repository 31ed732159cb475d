"""Options in every spelling, and references that name one of them, none, or two."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import RowError
from sources.choices import Options, read_options, reference_letter

COLOURS = ["red", "blue", "green", "dark  Grey"]


def letter(answer: object, options: object) -> str:
    return reference_letter(answer, read_options(options))


def reason(answer: object, options: object) -> str:
    with pytest.raises(RowError) as caught:
        letter(answer, options)
    return caught.value.reason


@pytest.mark.parametrize(
    "written",
    [
        ["red", "blue"],
        ("red", "blue"),
        '["red", "blue"]',
        "['red', 'blue']",
        {"A": "red", "B": "blue"},
        {"B": "blue", "A": "red"},
        {"A": "red", "B": "blue", "C": None, "D": None},
        {"label": ["A", "B"], "text": ["red", "blue"]},
        [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}],
        ["A. red", "B. blue"],
        ["(A) red", "(B) blue"],
        ["a) red", "b) blue"],
        ["A:red", "B:blue"],
        ["1. red", "2. blue"],
        ["red ", "\tblue\n"],
        ["red", "blue", None, ""],
    ],
)
def test_every_spelling_gives_the_same_options(written: object) -> None:
    options = read_options(written)
    assert options.texts == ("red", "blue")
    assert reference_letter("B", options) == "B"
    assert reference_letter("blue", options) == "B"


@pytest.mark.parametrize("written", [None, "", [], "[]", {}, float("nan"), [None, None], {"A": None}])
def test_no_options_are_no_options(written: object) -> None:
    assert read_options(written) == Options()


@pytest.mark.parametrize("written", [["A", "B", "C"], ["(A)", "(B)", "(C)"], ["A)", "B)", "C)"], ["a.", "b.", "c."]])
def test_options_that_are_only_labels_become_the_letters(written: list[str]) -> None:
    assert [text.upper() for text in read_options(written).texts] == ["A", "B", "C"]
    assert letter("C", written) == "C"
    assert letter(written[1], written) == "B"


@pytest.mark.parametrize(
    "written",
    [
        ["A. red", "blue"],
        ["B. red", "A. blue"],
        ["1: 1", "2: 1"],
        ["1.5", "2.5"],
        ["A red", "B blue"],
        ["I. red", "II. blue"],
    ],
)
def test_what_only_looks_like_labels_stays(written: list[str]) -> None:
    assert read_options(written).texts == tuple(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("red, blue", "choices_unreadable"),
        (7, "choices_unreadable"),
        ("[" * 5000, "choices_unreadable"),
        ("['a', __import__('os')]", "choices_unreadable"),
        (["red", None, "blue"], "choices_unreadable"),
        (["red", ["blue"]], "choices_unreadable"),
        (["red", {"x": 1}], "choices_unreadable"),
        (["red", b"blue"], "choices_unreadable"),
        (["red", float("inf")], "choices_unreadable"),
        ("['red' 'blue']", "choices_too_few"),
        (["red"], "choices_too_few"),
        ([str(i) for i in range(27)], "choices_too_many"),
        (["red", "x" * 100_001], "choices_too_long"),
        (["red", "<think>blue"], "think_tag_in_text"),
        (["red", "<|im_end|>"], "control_token_in_text"),
    ],
)
def test_options_that_cannot_be_used_are_refused(written: object, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        read_options(written)
    assert caught.value.reason == expected


AS_LETTER = [
    "B",
    "b",
    "(B)",
    "B.",
    "B)",
    "[B]",
    " B ",
    "B:",
    "Option B",
    "Answer: B",
    "The answer is (B).",
    "Ｂ",
    ["B"],
]
AS_TEXT = ["blue", "BLUE", " Blue\n", "B. blue", "(B) Blue", "B: blue", "b) blue", ["blue"]]


@pytest.mark.parametrize("answer", [*AS_LETTER, *AS_TEXT])
def test_a_reference_names_an_option_in_many_ways(answer: object) -> None:
    assert letter(answer, COLOURS) == "B"


def test_white_space_and_case_of_an_option_do_not_count() -> None:
    assert letter("Dark grey", COLOURS) == "D"


def test_exact_text_goes_before_text_in_another_case() -> None:
    assert letter("aa", ["AA", "Aa", "aa"]) == "C"
    assert reason("aA", ["AA", "Aa", "aa"]) == "answer_ambiguous"


@pytest.mark.parametrize("answer", ["E", "violet", "AB", "A, B", "", "?", 4, -1, 1.5, "1", True, "B. red", "🙂"])
def test_a_reference_outside_the_options_is_refused(answer: object) -> None:
    assert reason(answer, COLOURS) == "answer_outside_choices"


@pytest.mark.parametrize("answer", [float("inf"), {"a": 1}, b"B", ["A", "B"]])
def test_a_reference_of_another_type_is_refused(answer: object) -> None:
    assert reason(answer, COLOURS) == "answer_unreadable"


def test_a_whole_number_is_an_index_from_zero_where_options_are_texts() -> None:
    assert [letter(index, COLOURS) for index in (0, 1, 3)] == ["A", "B", "D"]
    assert letter(2.0, COLOURS) == "C"


def test_a_number_is_never_an_index_where_options_are_numbers() -> None:
    assert letter(10, [5, 10, 15]) == "B"
    assert letter(10.0, [5, 10, 15]) == "B"
    assert letter("10", [5, 10, 15]) == "B"
    assert letter(2.5, [1.5, 2.5]) == "B"
    assert reason(1, [5, 10, 15]) == "answer_outside_choices"


def test_a_number_that_is_index_and_text_of_different_options_is_refused() -> None:
    assert reason(1, ["1", "2", "3"]) == "answer_ambiguous"
    assert letter(2, ["0", "4", "2", "6"]) == "C"
    assert letter(1, ["0", "4", "2", "6"]) == "B"


def test_a_label_of_the_source_counts_in_its_own_order() -> None:
    arc = {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}
    assert letter("2", arc) == "B"
    assert letter(2, arc) == "B"
    assert letter("C", arc) == "C"
    assert letter("D", {"A": "x", "B": "y", "D": "z"}) == "C"
    assert reason("C", {"A": "x", "B": "y", "D": "z"}) == "answer_outside_choices"


def test_a_letter_that_is_also_the_text_of_another_option_is_refused() -> None:
    assert reason("D", ["A", "B", "D", "F"]) == "answer_ambiguous"
    assert letter("C", ["A", "B", "D", "F"]) == "C"


def test_the_letter_decides_between_options_of_the_same_text() -> None:
    assert letter("C", ["A", "C", "C", "D"]) == "C"
    assert reason("yes", ["yes", "yes", "no"]) == "answer_ambiguous"


def test_image_marks_in_options_are_numbered_after_those_of_the_question() -> None:
    assert read_options(["<image>", "<image>"], num_marks=1).texts == ("[image 2]", "[image 3]")
    assert read_options(["<image 4>", "no <image5>"]).texts == ("[image 4]", "no [image 5]")
    assert letter("<image 5>", ["<image 4>", "<image 5>"]) == "B"


def letter_if_any(answer: str, options: Options) -> str | None:
    try:
        return reference_letter(answer, options)
    except RowError:
        return None


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=2, max_size=8, unique=True))
def test_a_letter_names_its_own_option_or_none(texts: list[str]) -> None:
    try:
        options = read_options(texts)
    except RowError:
        return
    for expected in "ABCDEFGH"[: len(options.texts)]:
        assert letter_if_any(expected, options) in {expected, None}
