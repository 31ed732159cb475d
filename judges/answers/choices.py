"""Multiple choice: which option a text means, for replies and for references.

A letter, "(B)", "B.", "option B", the option's text, a number or formula equal to an option's value. Labels are the
letters A, B, C, ... of the options' positions, as `schemas.question` shows them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from judges.answers.comparison import Matrix, Pending, judged, unclear, unparsed
from judges.answers.formulas import clean_formula, compact, formula_of, looks_like_formula
from judges.answers.numbers import Quantity, same_number, whole_quantity
from judges.answers.statements import Origin, Statement
from judges.answers.text import canonical_words, strip_markup, unify_characters
from schemas.question import OPTION_LETTERS
from schemas.verdicts import Verdict

_OPTION_NOUN = r"(?:option|choice|answer|letter|alternative|selection)"
_LABEL = re.compile(r"[\s\"'(\[{<.]*([A-Za-z])[\s)\]}>.,:;!\"']*")
_LABEL_AND_TEXT = re.compile(
    rf"(?:{_OPTION_NOUN}\s+)?(?:[(\[]\s?([A-Za-z])\s?[)\]]|([A-Z])\s?[.):]|([A-Z])\s-)[.:,]?\s*(\S.*)",
    re.DOTALL | re.IGNORECASE,
)
_BRACKETED = re.compile(r"(?<![\w)])[(\[]\s?([A-Z])\s?[)\]]|(?<![\w(])([A-Z])\)(?!\w)")
_NAMED = re.compile(rf"\b{_OPTION_NOUN}s?\s+(?:is\s+)?[(\[]?([A-Z])[)\]]?(?![\w'])", re.IGNORECASE)
_CONCLUDED = re.compile(
    r"\b(?:so|thus|therefore|hence|think|guess|say|is|be|choose|pick|leaves|yes)[,:]?\s+(?:it(?:'s|\s+is|\s+must\s+be)\s+)?[(\[]?([A-Z])[)\]]?[\s.!]*$"
)
_LONE = re.compile(r"(?<![\w'\\$({-])([A-Z])(?![\w'(-])")
_LEADING_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer|letter|figure|picture|image|diagram|graph|shape|alternative|number|position|point|group)\s+)*"
    r"[(\[\"']?([A-Z])[)\]\"']?(?P<after>\s*$|[.,:;!)\]](?!\w).*|\s+(?:because|since|as|is|which|with|for|so|then|and\s+not|not|in|from|-|due|based|only)\b.*)",
    re.DOTALL,
)
_NEGATION_BEFORE = re.compile(
    r"\b(?:not|neither|nor|never|except|eliminates?|eliminated|rules?\s+out|ruled\s+out|excludes?|excluded|isn't|cannot\s+be|can't\s+be)\b[^.;]{0,25}$",
    re.IGNORECASE,
)
_NEGATION_AFTER = re.compile(
    r"^\)?\W{0,3}(?:is|are|was|can|could|cannot|can't|isn't|does|doesn't)?\s*(?:not\b|n't|incorrect|wrong|false|eliminated|ruled\s+out|be\s+(?:eliminated|ruled|excluded))",
    re.IGNORECASE,
)
_ARTICLE_AFTER = re.compile(r"^\s+(?!(?:or|and|nor|but|is|as|because|since|with|not)\b)[a-z]")
_MAX_OPTION_CHARS = 1000
_LETTERS_ONLY = re.compile(r"\W*[A-Z]\W+[A-Z](?:\W+[A-Z])+\W*")


@dataclass(frozen=True, slots=True)
class _Reading:
    """The options that a statement names (positions). is_hedged: it names several on purpose."""

    options: frozenset[int]
    is_hedged: bool = False
    rejected: frozenset[int] = frozenset()


def normalise_choice_answer(answer: str, choices: Sequence[str]) -> str | None:
    """Returns the letter of a reference given as letter, "(B)", "B. text", the option's text, its value or an index.

    A letter that names a position comes first, then the text, then the value. An index counts only where a single
    reading is possible and the options are not numbers: "0" is the first of options counted from 0, the number of
    options is the last of options counted from 1; anything between could be either and gives None.
    None: the answer is outside the choices, or contradicts itself.
    """
    return _letter_of(answer, tuple(choices))


@lru_cache(maxsize=1024)
def _letter_of(answer: str, choices: tuple[str, ...]) -> str | None:
    choices = _without_labels(choices)
    text = strip_markup(unify_characters(answer)).strip()
    if not text or not choices:
        return None
    boxed = re.fullmatch(r"\\boxed\s*\{(.*)\}", text, re.DOTALL)
    text = boxed.group(1).strip() if boxed else text
    text = re.sub(
        rf"^(?:the\s+)?(?:correct\s+)?{_OPTION_NOUN}\s*(?:is|:)?\s+(?=[(\[]?[A-Za-z][)\].:]*\s*$)",
        "",
        text,
        flags=re.IGNORECASE,
    )
    prefixed = _prefixed(text, choices)
    if prefixed and prefixed.is_hedged:
        return None
    position = _labelled(text, choices)
    if position is None:
        position = _first(prefixed.options if prefixed else _equal_options(text, choices))
    if position is None:
        position = _by_value(text, choices)
    if position is None:
        position = _by_index(text, choices)
    return None if position is None else OPTION_LETTERS[position]


def _first(options: frozenset[int]) -> int | None:
    return min(options) if options else None


def _labelled(text: str, choices: Sequence[str]) -> int | None:
    match = _LABEL.fullmatch(text)
    if match is None:
        return None
    position = OPTION_LETTERS.find(match.group(1).upper())
    return position if 0 <= position < len(choices) else None


def _without_labels(choices: Sequence[str]) -> tuple[str, ...]:
    """Returns the options that have letters, without the labels that some data sets keep in them ("A. Berlin")."""
    return _bare_options(tuple(choices))


@lru_cache(maxsize=1024)
def _bare_options(choices: tuple[str, ...]) -> tuple[str, ...]:
    choices = tuple(choice[:_MAX_OPTION_CHARS] for choice in choices[: len(OPTION_LETTERS)])
    bare = [
        re.match(rf"\s*\(?{letter}[.):]\s*(\S.*)", choice, re.DOTALL)
        for letter, choice in zip(OPTION_LETTERS, choices, strict=False)
    ]
    return tuple(match.group(1) for match in bare if match) if bare and all(bare) else choices


def _prefixed(text: str, choices: Sequence[str]) -> _Reading | None:
    """Reads a label with a text; hedged if the text is another option's. None: no label, or the text has others."""
    match = _LABEL_AND_TEXT.fullmatch(text)
    if match is None or (match.group(2) or match.group(3) or "A").islower():
        return None
    position, rest = OPTION_LETTERS.find(next(filter(None, match.groups()[:3])).upper()), match.group(4)
    meant = _equal_options(rest, choices)
    if not 0 <= position < len(choices) or (not meant and _labels_in(rest, choices) - {position}):
        return None
    if not meant:
        return _Reading(_equal_options(text, choices) or frozenset({position}))
    return _Reading(frozenset({position}), is_hedged=position not in meant)


def _by_value(text: str, choices: Sequence[str]) -> int | None:
    quantity = whole_quantity(text)
    if quantity is None:
        return None
    equal = _options_of_value(quantity, choices)
    return min(equal) if len(equal) == 1 else None


def _by_index(text: str, choices: Sequence[str]) -> int | None:
    if not re.fullmatch(r"\d{1,3}", text) or any(whole_quantity(unify_characters(choice)) for choice in choices):
        return None
    index = int(text)
    return 0 if index == 0 else len(choices) - 1 if index == len(choices) else None


def _option_words(choice: str) -> str:
    return canonical_words(choice)


def _equal_options(text: str, choices: Sequence[str]) -> frozenset[int]:
    """Returns the options whose text is this one, by words or by the spelling of a formula."""
    text = text[:_MAX_OPTION_CHARS]
    words, formula = canonical_words(text), compact(clean_formula(text))
    squeezed = words.replace(" ", "")
    return frozenset(
        position
        for position, choice in enumerate(choices)
        if _distinguishes(choice, text)
        and (
            compact(clean_formula(choice)) == formula
            or (_is_prose(choice) and _option_words(choice).replace(" ", "") == squeezed)
        )
    )


@lru_cache(maxsize=4096)
def _is_prose(choice: str) -> bool:
    """Whether comparing words is safe: words would take f(x)+2 for f(x+2)."""
    return not re.search(
        r"[\^=<>]|\\[dt]?frac|\\sqrt|[\w)}]\s*[+*/]\s*[\w({\\]|[a-z]\s*-\s*\w|\d\s*-\s*[a-z]", choice
    ) or (re.search(r"[^\W\d]{3,}\s+[^\W\d]{2,}", strip_markup(choice)) is not None)


def _distinguishes(choice: str, text: str) -> bool:
    """Whether comparing words is safe: single letters differ by case ("a" the line, "A" the point)."""
    return bool(choice.strip()) and not (
        len(choice.strip()) == len(text.strip()) == 1 and choice.strip() != text.strip()
    )


@lru_cache(maxsize=4096)
def _value_of(choice: str) -> Quantity | None:
    return whole_quantity(strip_markup(unify_characters(choice)))


def _options_of_value(quantity: Quantity, choices: Sequence[str]) -> frozenset[int]:
    values = [_value_of(choice) for choice in choices]
    return frozenset(
        position
        for position, value in enumerate(values)
        if value is not None and same_number(value, quantity, relative_tolerance=1e-9)
    )


def check_choice(statement: Statement, reference: int, choices: Sequence[str]) -> Verdict | Pending | None:
    """Returns the verdict on a statement for a choice question; None if no option can be read from it.

    An answer that is plainly none of the options (a number, a formula) is wrong. Several options offered ("A or B")
    are wrong; several readings of one statement are wrong only if none is the reference.
    """
    choices = _without_labels(choices)
    reading = _read(statement, choices)
    extracted = statement.text[:200]
    if reading is None:
        return _by_formula(statement, reference, choices) or _outside(statement)
    same = _equal_options(choices[reference], choices) | {reference}
    if reading.is_hedged:
        return judged(False, extracted, "several options offered")
    if not reading.options:
        if reading.rejected:
            return judged(False, extracted, "options ruled out, none chosen") if reading.rejected & same else None
        return judged(False, extracted, "none of the options")
    if reading.options <= same:
        return judged(True, extracted)
    if len(reading.options) == 1:
        return judged(False, extracted)
    return unclear(bool(reading.options & same), extracted, "may mean several options")


def _outside(statement: Statement) -> Verdict | None:
    """Returns wrong for a box whose words are none of the options ("none of the above"), else None."""
    if statement.origin is Origin.BOXED and any(character.isalnum() for character in statement.text):
        return judged(False, statement.text[:200], "none of the options")
    return None


def _read(statement: Statement, choices: Sequence[str]) -> _Reading | None:
    text = statement.text.strip()
    whole = _read_whole(text, choices)
    if whole is not None:
        return whole
    quantity = whole_quantity(text)
    if quantity is not None and any(character.isdigit() for character in text):
        equal = _options_of_value(quantity, choices)
        has_formulas = any(looks_like_formula(clean_formula(choice)) and not _value_of(choice) for choice in choices)
        return None if not equal and has_formulas else _Reading(equal)
    formula = clean_formula(statement.raw)
    if looks_like_formula(formula) and not re.search(r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])", formula):
        return None
    return _read_mentions(statement, text, choices)


def _read_whole(text: str, choices: Sequence[str]) -> _Reading | None:
    """Reads a statement that is an answer and nothing else: a label, an option's text, or a label with its text."""
    if _LETTERS_ONLY.fullmatch(text) and not _equal_options(text, choices):
        return _Reading(frozenset(), is_hedged=True)
    equal = _equal_options(text, choices)
    label = _LABEL.fullmatch(text)
    if label:
        position = OPTION_LETTERS.find(label.group(1).upper())
        if position >= len(choices):
            return _Reading(equal)
        is_bare = re.fullmatch(r"[A-Za-z]\W?", text) is not None
        return _Reading(frozenset({position}) | (equal if is_bare else frozenset()))
    return _prefixed(text, choices) or (_Reading(equal) if equal else None)


def _labels_in(text: str, choices: Sequence[str]) -> set[int]:
    """Returns the options named in brackets or by "option"."""
    letters = [next(filter(None, match.groups())) for match in [*_BRACKETED.finditer(text), *_NAMED.finditer(text)]]
    return {position for letter in letters if (position := OPTION_LETTERS.find(letter.upper())) < len(choices)}


def _read_mentions(statement: Statement, text: str, choices: Sequence[str]) -> _Reading | None:
    """Reads a statement that says more than its answer: its first words, its labels, its options' texts."""
    if statement.origin.is_explicit:
        leading = _LEADING_LETTER.fullmatch(text)
        if leading and not _offers_another(text, leading.start(1)):
            position = OPTION_LETTERS.find(leading.group(1))
            if position < len(choices):
                return _Reading(frozenset({position}))
        start = _leading_text(text, choices)
        if start is not None:
            return _Reading(start)
    labels, rejected = _asserted(text, [*_BRACKETED.finditer(text), *_NAMED.finditer(text)], choices)
    if labels or rejected:
        return _several(text, labels, rejected)
    concluded = _CONCLUDED.search(text)
    if concluded and OPTION_LETTERS.find(concluded.group(1)) < len(choices):
        return _Reading(frozenset({OPTION_LETTERS.find(concluded.group(1))}))
    by_text = _texts_in(text, choices)
    if by_text:
        return _several(text, by_text, frozenset())
    if _are_labels(choices) or statement.origin is not Origin.LAST or len(text.split()) <= 6:
        lone = [m for m in _LONE.finditer(text) if not _is_word(m, text)]
        labels, rejected = _asserted(text, lone, choices)
        if labels or rejected:
            return _several(text, labels, rejected)
    return None


def _several(text: str, labels: frozenset[int], rejected: frozenset[int]) -> _Reading:
    is_hedged = len(labels) > 1 and (
        re.search(r"\b(?:or|either|both)\b|/", text, re.IGNORECASE) is not None or len(text.split()) <= len(labels) + 1
    )
    return _Reading(labels, is_hedged, rejected)


def _asserted(text: str, matches: list[re.Match[str]], choices: Sequence[str]) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the options that labels name, split into those asserted and those denied ("not B", "B is wrong")."""
    asserted: set[int] = set()
    rejected: set[int] = set()
    for match in matches[:60]:
        letter = next(filter(None, match.groups()))
        position = OPTION_LETTERS.find(letter.upper())
        if not letter.isupper() or position >= len(choices):
            continue
        denied = _NEGATION_BEFORE.search(text[max(0, match.start() - 45) : match.start()]) or _NEGATION_AFTER.match(
            text[match.end() : match.end() + 45]
        )
        (rejected if denied else asserted).add(position)
    return frozenset(asserted), frozenset(rejected - asserted)


def _is_word(match: re.Match[str], text: str) -> bool:
    """Whether a lone capital is a word of the sentence: the article "A" or the pronoun "I"."""
    letter, after = match.group(1), text[match.end() :]
    if letter == "I":
        return not re.fullmatch(r"\W*", after)
    return letter == "A" and _ARTICLE_AFTER.match(after) is not None


def _are_labels(choices: Sequence[str]) -> bool:
    """Whether the options are nothing but letters, as where they are drawn in the image."""
    plain = [re.sub(r"[\W_]", "", choice) for choice in choices]
    return sum(len(choice) == 1 for choice in plain) * 2 > len(plain) or all(re.match(r"<?image", c) for c in choices)


def _offers_another(text: str, start: int) -> bool:
    return re.match(r"[A-Z]\W*\s*(?:or|and|/|,)\s*\W?[A-Z](?!\w)", text[start:]) is not None


def _leading_text(text: str, choices: Sequence[str]) -> frozenset[int] | None:
    """Returns the options with the longest text that a statement begins with, unless it goes on with "or"."""
    words = canonical_words(text)
    found: dict[int, int] = {}
    for position, choice in enumerate(choices):
        expected = _option_words(choice)
        follows = words[len(expected) : len(expected) + 1]
        if (
            len(expected) > 1
            and words.startswith(expected)
            and not (follows and (follows.isalnum() or follows in "./+^*="))
        ):
            found[position] = len(expected)
    if not found:
        return None
    longest = max(found.values())
    if re.match(r"\s*(?:or|and)\b", words[longest:]) or re.match(r"\s*[-+*/^=]", words[longest:]):
        return None
    return frozenset(position for position, length in found.items() if length == longest)


def _texts_in(text: str, choices: Sequence[str]) -> frozenset[int]:
    """Returns the options whose text occurs in a statement and is not denied, without those inside a longer one."""
    words = canonical_words(text)
    spans: list[tuple[int, int, int]] = []
    for position, choice in enumerate(choices):
        expected = _option_words(choice)
        if len(expected) < 2 and not expected.isdigit():
            continue
        for match in list(re.finditer(rf"(?<![\w.^*/+=-]){re.escape(expected)}(?![\w^*/+=]|\.\d)", words))[:20]:
            if not _NEGATION_BEFORE.search(words[max(0, match.start() - 45) : match.start()]):
                spans.append((match.start(), match.end(), position))
    return frozenset(
        position
        for start, end, position in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    )


def _by_formula(statement: Statement, reference: int, choices: Sequence[str]) -> Verdict | Pending | None:
    """Compares a formula with the options; one that equals none of them is a wrong answer."""
    formula = formula_of(statement)
    if formula is None or not looks_like_formula(formula):
        return None
    equal = _equal_options(formula, choices)
    if equal:
        return check_positions(equal, reference, choices, formula)
    options = tuple(clean_formula(choice) for choice in choices)
    if not any(looks_like_formula(option) or whole_quantity(option) for option in options):
        return judged(False, formula, "none of the options")

    def conclude(matrix: Matrix) -> Verdict:
        found = frozenset(position for position, is_equal in enumerate(matrix[0]) if is_equal)
        if not found and matrix[0][reference] is None:
            return unparsed(formula, choices[reference], statement.origin)
        return check_positions(found, reference, choices, formula)

    return Pending((formula,), options, conclude)


def check_positions(found: frozenset[int], reference: int, choices: Sequence[str], extracted: str) -> Verdict:
    """Returns the verdict on an answer that means these options."""
    if not found:
        return judged(False, extracted, "none of the options")
    same = _equal_options(choices[reference], choices) | {reference}
    return (
        judged(True, extracted) if found <= same else unclear(bool(found & same), extracted, "may mean several options")
    )
