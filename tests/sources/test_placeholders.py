"""Image marks: removed at the edges, numbered inside, refused without an image."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import RowError
from sources.placeholders import number_marks, resolve_marks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is it?", "What is it?"),
        ("<image>\nWhat is it?", "What is it?"),
        ("<image> what is it?", "what is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("What is it? <image1>", "What is it?"),
        ("<image>\n<image>\nWhat differs?", "What differs?"),
        ("<|image|>What is it?", "What is it?"),
        ("<|image_1|>\nWhat is it?", "What is it?"),
        ("<|vision_start|><|image_pad|><|vision_end|>What is it?", "What is it?"),
        ("<ImageHere>What is it?", "What is it?"),
        ("<image 1>\nLook at <image 2>. What is it?", "Look at [image 2]. What is it?"),
        ("Look at <image>, then at <image>: same?", "Look at [image 1], then at [image 2]: same?"),
        ("<image 1> and <image 2> differ how?", "[image 1] and [image 2] differ how?"),
        ("Compare <image 1> and <image 2>", "Compare [image 1] and [image 2]"),
        ("What is seen in <image 1>", "What is seen in [image 1]"),
        ("<image 1> shows a cat. Which breed?", "[image 1] shows a cat. Which breed?"),
        ("From <image_0> to <image_1>, what moved?", "From [image 1] to [image 2], what moved?"),
        ("A <image3>\nB <image1>\nC", "A [image 3]\nB [image 1]\nC"),
        ("<image>", ""),
        ("<image><image>\n", ""),
        ("see <imagery> and <img>", "see <imagery> and <img>"),
    ],
)
def test_marks_become_what_the_sentence_needs(text: str, expected: str) -> None:
    assert resolve_marks(text, num_images=2).text == expected


def test_a_mark_without_any_image_is_refused() -> None:
    with pytest.raises(RowError, match="image_missing"):
        resolve_marks("<image>\nWhat is it?", num_images=0)


def test_more_marks_than_images_are_let_through_if_there_is_an_image() -> None:
    assert resolve_marks("a <image1> b <image2> c", num_images=1).text == "a [image 1] b [image 2] c"


def test_numbering_goes_on_where_earlier_texts_left_off() -> None:
    assert number_marks("<image>", num_before=3).text == "[image 4]"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<image>", "<image 2>", "in", " ", "\n", "cat.", "x<image>"]), max_size=12))
def test_no_mark_survives_and_all_words_do(pieces: list[str]) -> None:
    text = "".join(pieces)
    resolved = resolve_marks(text, num_images=1).text
    assert "<image" not in resolved
    assert resolved.count("cat.") == text.count("cat.")
