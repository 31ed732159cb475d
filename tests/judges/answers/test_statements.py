"""Statements are looked for from the end of a reply, and found as from its beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.answers.statements import _CUE, _cues_backwards

WORDS = "the|final answer|Answer|:|is|=|\n|.|...|i|choose|answer to the question|ans|####| |-| - |**|B|42"
OTHER_LANGUAGES = "la respuesta|es|é|réponse|lautet|ответ|答案|答え|は"
PARTS = st.sampled_from(f"{WORDS}|{OTHER_LANGUAGES}".split("|"))


@given(st.lists(PARTS, max_size=30).map("".join))
def test_the_cues_of_a_text_are_the_same_from_either_end(text: str) -> None:
    assert [cue.span() for cue in _cues_backwards(text)] == [cue.span() for cue in _CUE.finditer(text)][::-1]


SPACED = (
    *("The final answer is", "my best option is", "ans.", "I would choose", "La respuesta correcta es"),
    *("la bonne réponse est", "Die richtige Antwort lautet", "La risposta è", "Правильный ответ:"),
)
UNSPACED = (
    "正确答案是",
    "故选",
    "最終的な答えは",
    "최종 정답은",
    "الجواب النهائي هو",
    "सही उत्तर है",
    "应选",
    "回答は",
    "답:",
)


@pytest.mark.parametrize("cue", SPACED)
def test_a_cue_begins_a_word(cue: str) -> None:
    for before in ("", "so, ", "\n", "("):
        assert [found[0].strip() for found in _CUE.finditer(f"{before}{cue} 7")] == [cue]
    # Within a word none begins; a later word of it may be one ("x" + "The final answer is").
    assert all(found.start() > 1 for found in _CUE.finditer(f"x{cue} 7"))


@pytest.mark.parametrize("cue", UNSPACED)
def test_a_cue_of_a_script_without_spaces_begins_anywhere(cue: str) -> None:
    for before in ("", "x", "因此", "so "):
        assert [found[0].strip() for found in _CUE.finditer(f"{before}{cue} 7")] == [cue]


@pytest.mark.parametrize(("text", "is_cue"), [("\n  #### 7", True), ("x #### 7", False), ("##### 7", False)])
def test_four_number_signs_are_a_cue_where_they_open_a_line(text: str, is_cue: bool) -> None:
    assert (_CUE.search(text) is not None) == is_cue
