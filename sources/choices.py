"""The options of a choice question, and the letter of its reference answer.

Data sets write both in many ways. Options are read from a list, an object of label to text, ARC's object of two lists,
or a string that holds one of these (JSON, or a Python list as in MMMU). Options that all carry their own labels
("A. red", "(B) blue") lose them. The reference becomes the letter of our order, A first. Where two readings of a
reference name different options, the row is refused: a wrong reference would turn right replies into wrong ones.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from schemas.errors import RowError
from schemas.question import OPTION_LETTERS
from sources.placeholders import number_marks
from sources.text import check_tokens, clean_text, describe, is_missing, number_text, scalar_text

MAX_LITERAL_CHARS = 100_000
"""Longest string parsed as a list of options; Python's literal parser is not made for hostile megabytes."""

_LABELLED = re.compile(
    r"(?:[(\[]?(?P<letter>[A-Za-z])[)\].:、．：]+\s*|[(\[]?(?P<number>\d{1,2})[)\].、．]+(?:\s+|$))(?P<text>.*)",
    re.DOTALL,
)
"""An option or answer that begins with a label. A number needs white space after it ("1.5"), and no colon ("1: 2")."""
_BARE = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?[(\[]?(?P<label>[a-z]|\d{1,2})[)\]]?[.:]?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one question, in order.

    texts: what is shown, without labels. labels: the source's own names of the options ("A", "1"), or empty.
    written: the texts as the source wrote them. are_numbers: the source stored numbers, not text.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    are_numbers: bool = False


def read_options(value: Any, *, num_marks: int = 0) -> Options:
    """Returns the options in a raw value; none for null, "" or an empty list.

    num_marks: image marks in the question, so that unnumbered ones in the options go on counting.

    Raises RowError: `choices_unreadable` (not a list of texts, an empty option), `choices_too_few` (one option),
    `choices_too_many` (more than 26), `choices_too_long`, or what `check_tokens` raises.
    """
    labels, items = _labels_and_items(_parsed(value))
    while items and is_missing(items[-1]):
        labels, items = labels[: len(items) - 1], items[:-1]
    if not items:
        return Options()
    if len(items) == 1:
        raise RowError("choices_too_few", f"there is only one option: {describe(items[0])}")
    if len(items) > len(OPTION_LETTERS):
        raise RowError("choices_too_many", f"there are {len(items)} options, more than {len(OPTION_LETTERS)}")
    written = tuple(_option_text(item) for item in items)
    own_labels, texts = _without_labels(written)
    shown = []
    for text in texts:
        marked = number_marks(text, num_before=num_marks)
        num_marks += marked.num_marks
        shown.append(marked.text)
    are_numbers = all(isinstance(item, int | float | Decimal) and not isinstance(item, bool) for item in items)
    return Options(tuple(shown), tuple(labels) or own_labels, written, are_numbers)


def reference_letter(value: Any, options: Options) -> str:
    """Returns the letter of the option that a raw, non-missing reference names.

    Read as: a letter ("B", "(b)", "B.", "Answer: B", "B. red"), a label of the source, the text of an option (exact,
    then ignoring case and white space), and, only if the reference is a whole number in the raw data and the options
    are texts, the 0-based index of the option.

    Raises RowError: `answer_outside_choices` if no reading names an option, `answer_ambiguous` if several readings
    name different ones.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    text = scalar_text(value, what="answer") or ""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        readings = _readings_of_number(value, options)
    else:
        readings = _readings_of_text(text, options)
    shown = " / ".join(options.texts)[:200]
    if not readings:
        raise RowError("answer_outside_choices", f"the answer is {describe(value)}, the options are {shown!r}")
    if len(readings) > 1:
        letters = " or ".join(OPTION_LETTERS[index] for index in sorted(readings))
        raise RowError(
            "answer_ambiguous", f"the answer {describe(value)} may mean option {letters}, the options are {shown!r}"
        )
    return OPTION_LETTERS[readings.pop()]


def _readings_of_text(answer: str, options: Options) -> set[int]:
    """Returns the indices of the options that a reference in words may mean."""
    by_text = _indices_of_text(answer, options)
    bare = _BARE.fullmatch(_folded(answer))
    by_label = _index_of_label(bare["label"], options) if bare else None
    if by_label is not None:
        # Options may repeat ("A", "C", "C"): then the letter says which one is meant.
        return {by_label} if by_label in by_text else by_text | {by_label}
    if by_text:
        return by_text
    labelled = _LABELLED.fullmatch(answer)
    if labelled and labelled["text"]:
        index = _index_of_label(_label_of(labelled), options)
        if index is not None and index in _indices_of_text(labelled["text"], options):
            return {index}
    return set()


def _readings_of_number(answer: int | float | Decimal, options: Options) -> set[int]:
    """Returns the indices of the options that a number in the raw data may mean: a text, a label, or an index."""
    text = number_text(answer)
    readings = _indices_of_text(text, options)
    if options.are_numbers:
        return readings
    by_label = _index_of_label(text, options)
    if by_label is not None:
        return readings | {by_label}
    has_number_labels = any(label.isdigit() for label in options.labels)
    if answer == int(answer) and 0 <= answer < len(options.texts) and not has_number_labels:
        readings = readings | {int(answer)}
    return readings


def _indices_of_text(answer: str, options: Options) -> set[int]:
    """Returns the options whose text is the answer: exactly if any is, else ignoring case, width and white space."""
    for normal in (_squeezed, _folded):
        wanted = normal(answer)
        found = {
            index
            for index, texts in enumerate(zip(options.texts, options.written, strict=True))
            if wanted in map(normal, texts)
        }
        if found:
            return found
    return set()


def _index_of_label(label: str, options: Options) -> int | None:
    """Returns the option of a label: the source's own if it has such, else our letters (if the source's are not)."""
    letters = tuple(OPTION_LETTERS[: len(options.texts)])
    for labels in (options.labels, () if any(map(str.isalpha, options.labels)) else letters):
        folded = [own.casefold() for own in labels]
        if folded.count(label.casefold()) == 1:
            return folded.index(label.casefold())
    return None


def _label_of(match: re.Match[str]) -> str:
    return match["letter"] or match["number"]


def _parsed(value: Any) -> Any:
    """Returns the list or object of options, also out of a string that holds one."""
    if is_missing(value):
        return []
    if isinstance(value, list | tuple | dict):
        return value
    if isinstance(value, str) and len(value) <= MAX_LITERAL_CHARS and value.strip()[0] in "[{(":
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(parsed, list | tuple | dict):
                return parsed
    raise RowError("choices_unreadable", f"the choices are {describe(value)}, not a list of options")


def _labels_and_items(value: Any) -> tuple[list[str], list[Any]]:
    """Returns the labels (or none) and the options of a list, of an object, or of ARC's {"label": [], "text": []}."""
    if not isinstance(value, dict):
        items = list(value)
        if items and all(isinstance(item, dict) and {"label", "text"} <= item.keys() for item in items):
            return [_stripped_label(item["label"]) for item in items], [item["text"] for item in items]
        return [], items
    labels, texts = value.get("label"), value.get("text")
    if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
        return [_stripped_label(label) for label in labels], texts
    # Arrow gives every row all fields of a struct, so an absent option is a null.
    pairs = [(_stripped_label(label), item) for label, item in value.items() if not is_missing(item)]
    if all(len(label) == 1 for label, _ in pairs):
        pairs.sort(key=lambda pair: pair[0])
    return [label for label, _ in pairs], [item for _, item in pairs]


def _stripped_label(label: Any) -> str:
    return str(label).strip(" ()[].:")


def _option_text(item: Any) -> str:
    text = scalar_text(item, what="choices")
    if text is None:
        raise RowError("choices_unreadable", "an option in the middle of the list is empty")
    check_tokens(text, what="choices")
    return text


def _without_labels(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns labels and texts of options that all carry their labels in order; else no labels and the same texts.

    Options that are nothing but their labels ("(A)", "B.") become the letters: they are drawn in the image.
    """
    found = [match for match in map(_LABELLED.fullmatch, texts) if match]
    bodies = [match["text"].strip() for match in found]
    count = len(texts)
    if len(found) < count or (any(bodies) and not all(bodies)):
        return (), tuple(texts)
    labels = tuple(map(_label_of, found))
    letters = tuple(OPTION_LETTERS[:count])
    if labels not in (letters, tuple("".join(letters).lower()), tuple(str(i + 1) for i in range(count))):
        return (), tuple(texts)
    return labels, tuple(bodies) if all(bodies) else (labels if labels[0].isdigit() else letters)


def _squeezed(text: str) -> str:
    return " ".join(clean_text(text).split())


def _folded(text: str) -> str:
    return _squeezed(unicodedata.normalize("NFKC", text)).casefold()
