"""Reads replies that should be one of a few words, and the probability the model gave to each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from schemas.requests import Reply
from schemas.template import parse_completion


def read_word(reply: Reply, words: Sequence[str]) -> str | None:
    """Returns the one of the words that the reply says, or None if it says none or several.

    A constrained reply is the word itself. An endpoint without constraints may wrap it ("**Yes.**", "Verdict: no");
    then the word must be the only one of its kind in the text.
    """
    text = parse_completion(reply.text).answer.lower()
    if text.strip(" \t\r\n.*_`'\"!") in words:
        return text.strip(" \t\r\n.*_`'\"!")
    found = {word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)}
    return found.pop() if len(found) == 1 else None


def word_probability(reply: Reply, word: str, words: Sequence[str]) -> float | None:
    """Returns the probability of one word among the words, from the first token's logprobs; None if they say nothing.

    Tokens count for a word they begin (" ye", "Yes"); a token that begins several counts for none. The result is
    normalised over the words, so mass that the model gave to other tokens does not matter.
    """
    mass = dict.fromkeys(words, 0.0)
    for token, logprob in reply.top_logprobs:
        start = token.strip().lower()
        begun = [candidate for candidate in words if start and candidate.startswith(start)]
        if len(begun) == 1:
            mass[begun[0]] += math.exp(logprob)
    total = sum(mass.values())
    return mass[word] / total if total > 0 else None
