"""Checks of one chain of thought, and duplicates among chains of thought. Pure functions; nobody is asked anything.

They are the rule-based part of the paper's quality checks (section 2.1: keyword filtering, duplicate detection) plus
what a generator gets wrong: truncation, loops, leftover markup. Whether the answer is right is judged elsewhere.

The keyword lists are built to spare honest traces: a false alarm costs a retry and in the end a row. So "the given
answer choices", "the ground truth curve", a chemist's "the given solution" and "I cannot see a pattern" pass, and a
phrase that the question itself uses is no betrayal when the trace repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pyarrow as pa

from filters.duplicates import scheme_of, shape_of
from filters.features import UNPUBLISHED, Features, hex_ids
from filters.normalise import num_unspaced, plain_text, spaced_words
from filters.shingles import num_own_shingles
from filters.signatures import band_keys
from filters.text_columns import read_texts
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
_SHINGLE_WORDS = 5
_MIN_COMPARED_WORDS = 20
"""Shorter traces are never duplicates: "The image shows a red ball, so the answer is red." is what many rows rightly
say. It is also the least number of shingles that are not copied from the question."""

_IMAGE = r"(?:image|picture|photo(?:graph)?|figure|diagram|chart|graph|attachment)s?"
_CANNOT = (
    r"(?:can ?not|can't|could ?n[o']t|do(?: not|n't) have (?:the ability|access) to|(?:am|was) (?:not able|unable) to)"
)
_ANSWER = r"(?:answer|solution)"

_PERSONA = {
    "speaks as a language model": (
        r"\bas an? (?:(?:ai|artificial intelligence)(?: language)?(?: model| assistant)?|(?:large )?language model)\b"
        r"(?=[ ,.;:])(?! (?:engineer|researcher|expert|company|student|developer))"
        r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large |text-based )?language model)\b"
        r"|\bas a text-based (?:ai|model|assistant|platform)|\bthis is a text-based (?:platform|format|model)"
        r"|作为(?:一个|一名|一款)?(?:ai|人工智能|语言模型|大模型)"
    ),
    "refuses": (
        r"\bi(?:'m| am) sorry,? but i (?:can ?not|can't|am (?:unable|not able))\b"
        r"|\bi (?:can ?not|can't|am unable to) (?:assist|help) (?:you )?with (?:this|that|your)\b"
    ),
    "says that it cannot see the image": (
        rf"\bi {_CANNOT} (?:\w+ ){{0,2}}?(?:see|view|access|open|display|load|look at|analy[sz]e) "
        rf"(?:\w+ )?(?:the|this|that|any|your|an|attached|provided|actual)(?: \w+)? ?{_IMAGE}\b(?!')"
        rf"|\bno {_IMAGE} (?:\w+ )?(?:provided|attached|given|uploaded|included)\b"
        rf"|\bthe {_IMAGE} (?:is|was|has)(?: not|n't) (?:been )?(?:provided|attached|uploaded|included|loaded)\b"
        rf"|\bplease (?:provide|upload|share|attach) [^.?!]{{0,60}}\b{_IMAGE}\b[^.?!]{{0,60}} so (?:that )?(?:i|we) can"
        r"|我(?:无法|不能|没法|看不到|看不见)(?:直接)?(?:查看|看到|访问|看见)?(?:这张|该|您的|你的|任何)?(?:图片|图像|照片)"
    ),
}
"""Phrases that neither trace nor answer may contain, matched in plain text, case ignored."""

_LEAKS = {
    "leans on a reference answer": (
        r"\b(?:reference|model|official) answers?\b"
        r"|\bthe (?:given|provided|expected|standard|known) answer (?:is|was|says|states|must|should|of|being|here)\b"
        r"|\b(?:according to|based on|given|match(?:es|ing)?|per|consistent with|agrees? with) the "
        r"(?:(?:provided|reference|expected|official|model) (?:answer|solution)|(?:given|standard|known) answer)\b"
        r"(?!'| (?:choice|option|has|with|contain|of|in|at))"
        r"|\bthe (?:provided|reference|official|given) (?:answer|solution) (?:says|states|claims|confirms|indicates)\b"
        r"|\baccording to the answer key\b|\bthe answer key (?:says|states|gives|confirms)\b"
        r"|\b(?:i|we) (?:was|were|am|are|have been|had been) (?:given|told|provided with) the "
        r"(?:correct |final |right |expected )?answer\b"
        r"|\b(?:i|we) (?:already )?know (?:that )?the (?:correct |final |right |expected )?answer "
        r"(?:is supposed to|should be|must be|in advance|already)\b"
        r"|参考答案|标准答案"
    ),
    "mentions the ground truth": (
        r"\bground[- ]truth\b(?! (?:lines?|curves?|bars?|box(?:es)?|bounding|masks?|labels?|images?|segmentation|"
        r"points?|data|maps?|columns?|rows?|series|plots?|values?|depth|annotations?|trajector\w+|distribution|"
        r"(?:is|are) (?:shown|plotted|drawn|marked|represented|displayed|indicated|in|"
        r"the (?:top|bottom|left|right|first|last|red|green|blue|black|white|gr[ae]y|orange|solid|dashed|dotted)))\b)"
    ),
    "quotes its instructions": (
        r"\bthe system prompt\b|\bthe prompt (?:instructs|tells|asks|requires) (?:me|us)\b"
        r"|\bmy (?:system )?instructions\b|\byou are an? helpful (?:ai )?assistant\b"
    ),
}
"""Phrases that betray what the reasoner was given beside the question; allowed where the question itself uses them."""

_LEFTOVER_MARKUP = (
    r"<[|｜](?:im_start|im_end|im_sep|endoftext|eot_id|eom_id|end|user|assistant|system|tool|pad|image|video|audio|"
    r"[\w▁]{1,40}[_▁][\w▁]{1,40})[|｜]>"
    r"|</?(?:image|video)(?:[ _-]?\d{1,3}|here)?>"
    r"|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>|</s>\s*\Z|\A\s*<s>"
    r"|^#{2,4} ?(?:instruction|response|human|assistant|user|system)s?:"
    r"|</?(?:answer|reasoning|thought|thinking|scratchpad|reflection|tool_call|tool_response)>"
)
_DAMAGED_CHARACTER = (
    "\ufffd|[\ud800-\udfff]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[\ufffe\uffff]"
    "|[ÃÂ][\u00a0-\u00bf]|Ã—(?=\\s?\\d)|â€[™œžŸ˜“”¦¢š›†‡‰]|ï»¿"
)
"""What no text of a corpus may contain, matched as it stands: control tokens break training or serving, and a damaged
character (replacement, lone surrogate, control character such as the form feed of an unescaped "\\frac", UTF-8 read as
Latin-1) would be learned."""

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
    if not plain_text(reasoning):
        return TraceProblem(MISSING, "the reply has no reasoning before its answer")
    if not plain_text(answer):
        return TraceProblem(ANSWER_MISSING, "nothing follows the reasoning")
    for part, text in (("reasoning", reasoning), ("answer", answer)):
        if tag := next((tag for tag in THINK_TOKENS if tag in text.lower()), None):
            return TraceProblem(TAGGED, f"the {part} contains {tag}")
    if problem := _forbidden(reasoning, answer, question, config):
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
    words = [word.casefold() for word in spaced_words(text)]
    size = _GRAM_CHARACTERS if 2 * num_unspaced(words) > len(words) else _GRAM_WORDS
    return max(_gram_share(words, size), _word_run_share(words), _character_run_share(text))


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


def _forbidden(reasoning: str, answer: str, question: str, config: ReasoningConfig) -> TraceProblem | None:
    for part, text in (("reasoning", reasoning), ("answer", answer)):
        for what, pattern in _compiled_damage():
            if match := pattern.search(text):
                return TraceProblem(FORBIDDEN, f"the {part} {what}: {match[0]!a:.80}")
        plain = plain_text(text)
        for what, pattern in _compiled_persona():
            if match := pattern.search(plain):
                return TraceProblem(FORBIDDEN, f"the {part} {what}: {match[0]!r:.80}")
    plain, plain_question = plain_text(reasoning), plain_text(question).casefold()
    for what, pattern in _compiled_leaks():
        for match in pattern.finditer(plain):
            if match[0].casefold() not in plain_question:
                return TraceProblem(FORBIDDEN, f"the reasoning {what}: {match[0]!r:.80}")
    for pattern in _compiled_forbidden(tuple(config.forbidden)):
        if match := pattern.search(reasoning):
            return TraceProblem(FORBIDDEN, f"the reasoning contains {match[0]!r:.80} (forbidden: {pattern.pattern})")
    return None


def _shape_problem(reasoning: str, config: ReasoningConfig) -> TraceProblem | None:
    share = repeated_share(reasoning)
    if share > config.max_repeated_share:
        limit = f"more than {config.max_repeated_share:.0%}"
        return TraceProblem(REPETITIVE, f"{share:.0%} of the reasoning repeats itself, {limit}")
    num_words = len(spaced_words(reasoning))
    if num_words < config.min_words:
        return TraceProblem(TOO_SHORT, f"{num_words} words, fewer than {config.min_words}")
    if num_words > config.max_words:
        return TraceProblem(TOO_LONG, f"{num_words} words, more than {config.max_words}")
    return None


def _gram_share(words: Sequence[str], size: int) -> float:
    seen: set[tuple[str, ...]] = set()
    num_covered = covered_until = 0
    for start in range(len(words) - size + 1):
        gram = tuple(words[start : start + size])
        if gram in seen:
            num_covered += start + size - max(covered_until, start)
            covered_until = start + size
        seen.add(gram)
    return num_covered / len(words) if words else 0.0


def _word_run_share(words: Sequence[str]) -> float:
    num_in_runs = start = 0
    for end in range(1, len(words) + 1):
        if end == len(words) or words[end] != words[start]:
            is_spelled = len(words[start]) > 1 and any(map(str.isalpha, words[start]))
            if end - start >= _MIN_RUN_WORDS and is_spelled:
                num_in_runs += end - start
            start = end
    return num_in_runs / len(words) if words else 0.0


def _character_run_share(text: str) -> float:
    packed = "".join(text.split())
    runs = (match[0] for match in _CHARACTER_RUN.finditer(packed))
    num_in_runs = sum(len(run) for run in runs if len(run) > _MAX_RULE or not _RULE_CHARACTERS.issuperset(run))
    return num_in_runs / len(packed) if packed else 0.0


_CHARACTER_RUN = re.compile(r"(.{1,8}?)\1{7,}", re.DOTALL)
"""A unit that stands eight times or more in a row. Linear: a failed start looks at 8 x 8 x 8 characters at most."""


@cache
def _compiled_persona() -> list[tuple[str, re.Pattern[str]]]:
    return [(what, re.compile(pattern, re.IGNORECASE)) for what, pattern in _PERSONA.items()]


@cache
def _compiled_leaks() -> list[tuple[str, re.Pattern[str]]]:
    return [(what, re.compile(pattern, re.IGNORECASE)) for what, pattern in _LEAKS.items()]


@cache
def _compiled_damage() -> list[tuple[str, re.Pattern[str]]]:
    return [
        ("contains a leftover template token", re.compile(_LEFTOVER_MARKUP, re.IGNORECASE | re.MULTILINE)),
        ("contains a damaged character", re.compile(_DAMAGED_CHARACTER)),
    ]


@lru_cache(16)
def _compiled_forbidden(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.IGNORECASE))
        except re.error as error:
            raise ConfigError(f"reasoning.forbidden: {pattern!r} is not a regular expression: {error}") from error
    return compiled
