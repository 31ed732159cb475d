"""Statements are looked for from the end of a reply, and found as from its beginning."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from judges.answers.statements import _CUE, _cues_backwards

PARTS = st.sampled_from(
    ["the", "final answer", "Answer", ":", "is", "=", "\n", ".", "...", "i", "choose", "answer to the question", "ans"]
    + ["####", " ", "-", " - ", "**", "la respuesta", "es", "é", "réponse", "lautet", "ответ", "答案", "答え", "は", "B", "42"]
)


@given(st.lists(PARTS, max_size=30).map("".join))
def test_the_cues_of_a_text_are_the_same_from_either_end(text: str) -> None:
    assert [cue.span() for cue in _cues_backwards(text)] == [cue.span() for cue in _CUE.finditer(text)][::-1]
