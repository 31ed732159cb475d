"""Phrases of traces: a pattern is tried only where it is heralded, and that misses nothing."""

from __future__ import annotations

import re
import string
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from filters.trace_phrases import (
    Phrase,
    damaged_character,
    leak_phrases,
    leftover_markup,
    persona_phrases,
    small_letters,
)

PHRASES = [*persona_phrases(), *leak_phrases(), leftover_markup()]
ODDLY_CASED = {"i": "I\u0130\u0131", "s": "S\u017f", "k": "K\u212a"}


def respelled(text: str, choices: st.DataObject) -> str:
    """Returns the text with some of its letters spelled as a pattern that ignores case takes them, too."""
    letters = [choices.draw(st.sampled_from(character + ODDLY_CASED.get(character, ""))) for character in text]
    return "".join(letters)


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.what)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.data())
def test_every_match_is_heralded(phrase: Phrase, choices: st.DataObject) -> None:
    text = respelled(choices.draw(st.from_regex(phrase.pattern, fullmatch=True)), choices)
    for match in phrase.pattern.finditer(text):
        assert phrase.is_heralded(small_letters(match[0])), match[0]


def test_a_small_letter_is_one_for_every_character_that_a_pattern_takes_for_it() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    for letter in string.ascii_lowercase:
        taken = re.findall(letter, everything, re.IGNORECASE)
        assert {small_letters(character) for character in taken} == {letter}


@given(
    text=st.text(st.one_of(st.characters(max_codepoint=0x20), st.sampled_from("a\x7f\x9f\ufffdÃ\u00a0×")), max_size=4)
)
def test_a_damaged_character_is_found_wherever_it_stands(text: str) -> None:
    damaged = re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|Ã\u00a0", text)
    assert damaged_character(text) == (damaged and damaged[0])
