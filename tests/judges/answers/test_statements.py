"""Statements are looked for from the end of a reply, and found as from its beginning."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from judges.answers.statements import _CUE, _cues_backwards

WORDS = "the|final answer|Answer|:|is|=|\n|.|...|i|choose|answer to the question|ans|####| |-| - |**|B|42"
OTHER_LANGUAGES = "la respuesta|es|é|réponse|lautet|ответ|答案|答え|は"
PARTS = st.sampled_from(f"{WORDS}|{OTHER_LANGUAGES}".split("|"))


@given(st.lists(PARTS, max_size=30).map("".join))
def test_the_cues_of_a_text_are_the_same_from_either_end(text: str) -> None:
    assert [cue.span() for cue in _cues_backwards(text)] == [cue.span() for cue in _CUE.finditer(text)][::-1]
