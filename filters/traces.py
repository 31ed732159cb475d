"""Checks of one chain of thought, and duplicates among chains of thought. Pure functions; nobody is asked anything.

They are the rule-based part of the paper's quality checks (section 2.1: keyword filtering, duplicate detection) plus
what a generator gets wrong: truncation, loops, leftover markup. Whether the answer is right is judged elsewhere.

The keyword lists are built to spare honest traces: a false alarm costs a retry and in the end a row. So "the given
answer choices", "the ground truth curve", a chemist's "the given solution" and "I cannot see a pattern" pass, and a
phrase that the question itself uses is no betrayal when the trace repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import eq

import numpy as np
import pyarrow as pa

from filters.duplicates import scheme_of, shape_of
from filters.features import UNPUBLISHED, Features, hex_ids
from filters.kernels import kernel
from filters.normalise import num_unspaced, plain_text, spaced_words
from filters.shingles import num_own_shingles
from filters.signatures import band_keys
from filters.text_columns import read_texts
from filters.trace_phrases import (
    Phrase,
    damaged_character,
    leak_phrases,
    leftover_markup,
    persona_phrases,
    small_letters,
)
from schemas.config import DuplicatesConfig, ReasoningConfig
from schemas.errors import ConfigError
from schemas.template import THINK_TOKENS

MISSING = "trace_missing"
TRUNCATED = "trace_truncated"
ANSWER_MISSING = "answer_missing"
TAGGED = "trace_tagged"
FORBIDDEN = "trace_forbidden"
REPETITIVE = "trace_repetitive"
TOO_SHORT = "trace_too_short"
TOO_LONG = "trace_too_long"
DUPLICATE = "trace_duplicate"

_GRAM_WORDS = 8
_GRAM_CHARACTERS = 16
"""The same length for scripts without spaces, where each character counts as a word and a word has about two."""

_MIN_RUN_WORDS = 4
_MAX_UNIT = 8
_MIN_UNITS = 8
_SHINGLE_WORDS = 5
_MIN_COMPARED_WORDS = 20
"""Shorter traces are never duplicates: "The image shows a red ball, so the answer is red." is what many rows rightly
say. It is also the least number of shingles that are not copied from the question."""

_RULE_CHARACTERS = frozenset("-=_|+~*#.:")
_MAX_RULE = 200
"""Rules of tables and dotted lines up to this many characters are layout, not loops."""


@dataclass(frozen=True, slots=True)
class TraceProblem:
    """Why a trace cannot be used. reason: stable code. detail: one sentence for a person, with the value seen."""

    reason: str
    detail: str


def trace_problem(
    reasoning: str, answer: str, *, is_truncated: bool, config: ReasoningConfig, question: str = ""
) -> TraceProblem | None:
    """Returns the first problem of a chain of thought and its answer, or None if it is fit for the corpus.

    Causes come before their symptoms: a truncated reply has no answer, a loop is too long, "aaaa" is one word.
    question: the row's question; leaking phrases that it contains itself are allowed. Linear in the length of the
    texts, except for what `config.forbidden` costs.

    Raises ConfigError: if one of `config.forbidden` is not a regular expression.
    """
    if is_truncated:
        return TraceProblem(TRUNCATED, "the reply was cut off at the token limit")
    texts = {"reasoning": reasoning, "answer": answer}
    plain = {part: plain_text(text) for part, text in texts.items()}
    if not plain["reasoning"]:
        return TraceProblem(MISSING, "the reply has no reasoning before its answer")
    if not plain["answer"]:
        return TraceProblem(ANSWER_MISSING, "nothing follows the reasoning")
    for part, text in texts.items():
        if tag := next((tag for tag in THINK_TOKENS if tag in text.lower()), None):
            return TraceProblem(TAGGED, f"the {part} contains {tag}")
    if problem := _forbidden(texts, plain, question, config):
        return problem
    return _shape_problem(reasoning, config)


def repeated_share(text: str) -> float:
    """Returns the share of a text that repeats itself, in [0, 1]: the largest of three, each found in linear time.

    - Words inside a word 8-gram that stood earlier in the text (the repetition measure of Gopher, arXiv 2112.11446,
      table A1, with one length). A passage written twice counts once, so the share is one half. For scripts without
      spaces: character 16-grams.
    - Words in runs of four or more times the same word of letters ("wait wait wait wait"); rows of equal digits are
      what a grid of numbers looks like.
    - Characters, without white space, in runs of a unit of one to eight characters that stands eight times or more
      ("aaaaaaaa", "hahahaha..."), except the short rules of tables.
    """
    return _repeated_share(text, spaced_words(text))


def trace_settings(threshold: float) -> DuplicatesConfig:
    """Returns how traces are compared, as a setting of `filters.duplicates.find_duplicates`."""
    return DuplicatesConfig(threshold=threshold, shingle_words=_SHINGLE_WORDS)


def trace_features(traces: pa.Table, threshold: float) -> Features:
    """Returns what traces are compared by. traces: columns id (32 hex digits), question and reasoning.

    Two traces are duplicates if their normalised texts are equal, or if numbers, signs and decisive words agree in
    order ("3 + 4 = 7" is not "2 + 5 = 7"), shared words come in the same order, and the Jaccard similarity of their
    word 5-grams reaches the threshold. 5-grams that a trace copies from its own question are left out: two rows that
    both restate one long question have not thought the same. Traces of fewer than 20 words, and rows without a trace,
    are never compared. A published trace stays (`Features.published`), else that with the smallest id.
    """
    settings = trace_settings(threshold)
    text, question = read_texts(traces["reasoning"]), read_texts(traces["question"])
    own = num_own_shingles(text.words, _SHINGLE_WORDS, question.words)
    is_long = text.num_words >= _MIN_COMPARED_WORDS
    ids = hex_ids(traces["id"])
    nothing = np.zeros(traces.num_rows, np.uint64)
    block = text.decisive
    return Features(
        exact=np.where(is_long, text.exact[:, 0], ids[:, 0]),
        exact_more=np.where(is_long, text.exact[:, 1], ids[:, 1]),
        block=block,
        answer=nothing,
        named=nothing,
        goodness=np.full(traces.num_rows, UNPUBLISHED),
        id_high=ids[:, 0],
        id_low=ids[:, 1],
        num_compared=np.where(is_long & (own >= _MIN_COMPARED_WORDS), own, 0).astype(np.int32),
        bands=band_keys(text.words, block, scheme_of(settings), shape_of(settings), question.words),
        words=text.words,
        context=question.words,
    )


def _forbidden(
    texts: Mapping[str, str], plain: Mapping[str, str], question: str, config: ReasoningConfig
) -> TraceProblem | None:
    """texts: reasoning and answer. plain: the same as `plain_text`."""
    markup = leftover_markup()
    for part, text in texts.items():
        if markup.is_heralded(text) and (match := markup.pattern.search(text)):
            return TraceProblem(FORBIDDEN, f"the {part} {markup.what}: {match[0]!a:.80}")
        if found := damaged_character(text):
            return TraceProblem(FORBIDDEN, f"the {part} contains a damaged character: {found!a:.80}")
        for phrase, match in _heralded(persona_phrases(), plain[part]):
            return TraceProblem(FORBIDDEN, f"the {part} {phrase.what}: {match[0]!r:.80}")
    for phrase, match in _heralded(leak_phrases(), plain["reasoning"]):
        if match[0].casefold() not in plain_text(question).casefold():
            return TraceProblem(FORBIDDEN, f"the reasoning {phrase.what}: {match[0]!r:.80}")
    for pattern in _compiled_forbidden(tuple(config.forbidden)):
        if match := pattern.search(texts["reasoning"]):
            return TraceProblem(FORBIDDEN, f"the reasoning contains {match[0]!r:.80} (forbidden: {pattern.pattern})")
    return None


def _heralded(phrases: Sequence[Phrase], plain: str) -> Iterator[tuple[Phrase, re.Match[str]]]:
    """Yields where a text holds phrases, in their order."""
    small = small_letters(plain)
    for phrase in phrases:
        if phrase.is_heralded(small):
            for match in phrase.pattern.finditer(plain):
                yield phrase, match


def _shape_problem(reasoning: str, config: ReasoningConfig) -> TraceProblem | None:
    words = spaced_words(reasoning)
    share = _repeated_share(reasoning, words)
    if share > config.max_repeated_share:
        limit = f"more than {config.max_repeated_share:.0%}"
        return TraceProblem(REPETITIVE, f"{share:.0%} of the reasoning repeats itself, {limit}")
    if len(words) < config.min_words:
        return TraceProblem(TOO_SHORT, f"{len(words)} words, fewer than {config.min_words}")
    if len(words) > config.max_words:
        return TraceProblem(TOO_LONG, f"{len(words)} words, more than {config.max_words}")
    return None


def _repeated_share(text: str, spaced: Sequence[str]) -> float:
    words = [word.casefold() for word in spaced]
    is_unspaced = not text.isascii() and 2 * num_unspaced(words) > len(words)
    size = _GRAM_CHARACTERS if is_unspaced else _GRAM_WORDS
    return max(_gram_share(words, size), _word_run_share(words), _character_run_share(text))


def _gram_share(words: Sequence[str], size: int) -> float:
    num_grams = len(words) - size + 1
    if len(set(zip(*(words[start:] for start in range(size)), strict=False))) >= num_grams:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    num_covered = covered_until = 0
    for start in range(num_grams):
        gram = tuple(words[start : start + size])
        if gram in seen:
            num_covered += start + size - max(covered_until, start)
            covered_until = start + size
        seen.add(gram)
    return num_covered / len(words)


def _word_run_share(words: Sequence[str]) -> float:
    if not any(map(eq, words, words[1:])):
        return 0.0
    num_in_runs = start = 0
    for end in range(1, len(words) + 1):
        if end == len(words) or words[end] != words[start]:
            is_spelled = len(words[start]) > 1 and any(map(str.isalpha, words[start]))
            if end - start >= _MIN_RUN_WORDS and is_spelled:
                num_in_runs += end - start
            start = end
    return num_in_runs / len(words)


def _character_run_share(text: str) -> float:
    packed = "".join(text.split())
    if not _has_character_run(np.frombuffer(packed.encode("utf-32-le", "surrogatepass"), np.uint32)):
        return 0.0
    runs = (match[0] for match in _CHARACTER_RUN.finditer(packed))
    num_in_runs = sum(len(run) for run in runs if len(run) > _MAX_RULE or not _RULE_CHARACTERS.issuperset(run))
    return num_in_runs / len(packed)


@kernel
def _has_character_run(codes):  # type: ignore[no-untyped-def]
    """Returns whether `_CHARACTER_RUN` stands in a text: so many characters equal the one a unit before them.

    codes: uint32 [characters].
    """
    for unit in range(1, _MAX_UNIT + 1):
        num_equal = 0
        for place in range(unit, len(codes)):
            num_equal = num_equal + 1 if codes[place] == codes[place - unit] else 0
            if num_equal == (_MIN_UNITS - 1) * unit:
                return True
    return False


_CHARACTER_RUN = re.compile(rf"(.{{1,{_MAX_UNIT}}}?)\1{{{_MIN_UNITS - 1},}}", re.DOTALL)
"""A unit that stands eight times or more in a row. Linear: a failed start looks at 8 x 8 x 8 characters at most."""


@lru_cache(16)
def _compiled_forbidden(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.IGNORECASE))
        except re.error as error:
            raise ConfigError(f"reasoning.forbidden: {pattern!r} is not a regular expression: {error}") from error
    return compiled
