"""Yes or no, and short texts compared by words or by edit distance (ANLS)."""

from __future__ import annotations

import re

from rapidfuzz.distance import Levenshtein

from judges.answers.comparison import judged, unclear
from judges.answers.statements import Origin, Statement
from judges.answers.text import canonical_words
from schemas.verdicts import Verdict

TEXT_MIN_SIMILARITY = 0.8
"""Least similarity of a short text that is no OCR. At ST-VQA's 0.5, "north" is "south" and "male" is "female"."""

_MAX_TEXT_CHARS = 400
_TRUE = {
    "yes",
    "true",
    "correct",
    "right",
    "y",
    "yeah",
    "yep",
    "sí",
    "si",
    "oui",
    "ja",
    "да",
    "是",
    "是的",
    "对",
    "正确",
    "はい",
    "예",
    "네",
    "نعم",
    "हाँ",
    "sim",
    "sì",
}
_FALSE = {
    "no",
    "false",
    "incorrect",
    "wrong",
    "n",
    "nope",
    "non",
    "nein",
    "нет",
    "否",
    "不",
    "不是",
    "错",
    "错误",
    "いいえ",
    "아니요",
    "아니오",
    "لا",
    "नहीं",
    "não",
}
_TRUTH = re.compile(
    r"(?<!\w)(?P<neg>(?:not|n't|never)\s+(?:\w+\s+)?)?(?P<word>yes|no|true|false|correct|incorrect|right|wrong)(?!\w)(?!\s+(?:one|way|angle|side|hand|triangle|of)\b)",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|never|neither|nor|no\s+longer|cannot|can't|isn't|aren't|wasn't|doesn't|don't|won't|instead\s+of|rather\s+than|unlike|except)\b|n't\b",
    re.IGNORECASE,
)
_TAIL_OF_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|says|say|reads|read|shows|named|called|titled|labell?ed|equals|means|as|wears|has|holds)\b|:(?=\s)|[=→]|'s\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'"([^"\n]{1,200})"|(?<!\w)\'([^\'\n]{1,200})\'(?!\w)')
_PREPOSITION = re.compile(r"^(?:on|in|at|by|from|to|near|inside|of|with|under|over|during)\s+", re.IGNORECASE)
_CLAUSE_END = re.compile(
    r",|;|\(|\s-\s|\.\s|\b(?:because|since|as|which|who|that|so|due\s+to|based\s+on|in\s+the\s+image)\b"
)


def truth_of(answer: str) -> bool | None:
    """Returns what a reference such as "Yes" or "false" says, None if it is neither."""
    word = canonical_words(answer[:40])
    return True if word in _TRUE else False if word in _FALSE else None


def check_boolean(statement: Statement, reference: bool) -> Verdict | None:
    """Returns the verdict on a statement for a yes-or-no question; None if it says neither.

    The first word decides ("No, the cat is on the right"); else all mentions must agree, and "not true" is false.
    """
    text = statement.text
    whole = truth_of(text) if len(text) <= 40 else None
    if whole is not None:
        return judged(whole == reference, text)
    mentions = [
        ((match.group("word").lower() in _TRUE) != bool(match.group("neg")), match) for match in _TRUTH.finditer(text)
    ]
    if not mentions:
        first = re.split(r"[\s,.!;:,。、]", text.strip(), maxsplit=1)[0]
        said = truth_of(first) if first and not first.isascii() else None
        return None if said is None else judged(said == reference, text[:200])
    value, first_match = mentions[0]
    if _offers_both(text):
        return judged(False, text[:200], "both yes and no")
    if first_match.start() <= 2 and re.match(
        r"\s*(?:[,.!:;-]|$|it\b|there\b|the\b|they\b|he\b|she\b)", text[first_match.end() :]
    ):
        return judged(value == reference, text[:200])
    values = {mention[0] for mention in mentions}
    if len(values) == 1:
        return judged(value == reference, text[:200])
    return unclear(True, text[:200], "says both yes and no")


def _offers_both(text: str) -> bool:
    return (
        re.search(
            r"\b(?:yes\s*(?:and|or|/)\s*no|true\s*(?:and|or|/)\s*false|no\s*(?:and|or|/)\s*yes)\b", text, re.IGNORECASE
        )
        is not None
    )


def anls(reference: str, candidate: str) -> float:
    """Returns the normalised Levenshtein similarity in [0, 1] of two canonical texts (ST-VQA, arXiv 1905.13648).

    Texts whose numbers differ have similarity 0: "30" is no misspelling of "3".
    """
    if re.findall(r"\d+", reference) != re.findall(r"\d+", candidate):
        return 0.0
    return float(Levenshtein.normalized_similarity(reference, candidate))


def same_text(reference: str, candidate: str, threshold: float) -> bool:
    """Whether two short texts are the same answer: equal words, or a similarity of at least the threshold."""
    expected, given = canonical_words(reference), canonical_words(candidate)
    if expected == given or (expected.replace(" ", "") == given.replace(" ", "") and expected.strip()):
        return True
    if not given or not expected or min(len(expected), len(given)) < 3:
        return False
    return anls(expected, given) >= threshold


def check_text(statement: Statement, reference: str, threshold: float) -> Verdict | None:
    """Returns the verdict on a statement for a short text; threshold: the least ANLS, 1 for exact words.

    A sentence is also read as what it says after its verb, in quotes, or before its first comma. A longer sentence
    that merely contains the reference decides nothing.
    """
    text = statement.text
    expected = canonical_words(reference)
    if not canonical_words(text[:_MAX_TEXT_CHARS]).strip():
        return None
    if statement.origin is Origin.LAST and len(text.split()) > max(60, 3 * len(expected.split())):
        return None
    for candidate in _candidates(text[: max(_MAX_TEXT_CHARS, 2 * len(reference))]):
        if same_text(reference, candidate, threshold):
            return judged(True, candidate)
    contained = re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", canonical_words(text)) if expected else None
    if contained is None or re.search(
        rf"\b(?:not|n't)\s+(?:the\s+|an?\s+)?{re.escape(reference.strip())}(?!\w)", text, re.IGNORECASE
    ):
        return judged(False, text[:200])
    if re.search(
        rf"(?:\bor\s+(?:the\s+|an?\s+)?{re.escape(expected)}|{re.escape(expected)}\s+or\b)", canonical_words(text)
    ):
        return judged(False, text[:200], "several answers offered")
    return unclear(True, text[:200], "the reference occurs in a statement that says more")


def _candidates(text: str) -> list[str]:
    """Returns the parts of a statement that may be its answer, without those that it denies."""
    found = [text]
    quotes = [next(filter(None, match.groups())) for match in _QUOTED.finditer(text)]
    if len(quotes) == 1:
        found.append(quotes[0])
    if _DENIAL.search(text):
        return [text]
    verbs = list(_TAIL_OF_COPULA.finditer(text))
    tails = [text, text[verbs[-1].end() :]] if verbs else [text]
    for tail in tails:
        found += [tail, _PREPOSITION.sub("", tail.strip())]
        head = _CLAUSE_END.split(tail, maxsplit=1)[0]
        if head.strip() and not re.search(r"\bor\b", tail, re.IGNORECASE):
            found.append(head)
    return [part.strip() for part in dict.fromkeys(found) if part.strip()]
