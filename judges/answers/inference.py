"""Which type an answer has, by rule, and whether a reference can be compared with replies at all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from judges.answers.boxes import find_boxes
from judges.answers.choices import normalise_choice_answer
from judges.answers.formulas import is_too_complex, looks_like_formula
from judges.answers.lists import split_items
from judges.answers.numeric import reference_quantity
from judges.answers.short_texts import truth_of
from judges.answers.text import canonical_words, strip_markup, unify_characters
from schemas.samples import AnswerType, Sample

MAX_TEXT_WORDS = 5
_MAX_TEXT_CHARS = 80
_MAX_REFERENCE_CHARS = 4000

_ASKS_COUNT = re.compile(
    r"\bhow\s+many\b|\bnumber\s+of\b|\bcount\b|\bcombien\s+de\b|\bwie\s?viele?\b|\bcu[aá]nt[oa]s\b|\bquant[ie]\b|多少个|几个|いくつ|сколько",
    re.IGNORECASE,
)
_ASKS_PLACE = re.compile(
    r"\b(?:box|bbox|bounding|locat\w+|where|region|detect\w*|ground\w*|coordinates?|position|area\s+of\s+the\s+image)\b",
    re.IGNORECASE,
)
_ASKS_LIST = re.compile(
    r"\b(?:list|sort|order|sequence|numbers|digits|values|solutions|roots|terms|all|which\s+\w+s\s+are|name\s+(?:the|two|three|four|all))\b",
    re.IGNORECASE,
)
_NO_FORMULA = re.compile(
    r"^\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}$|^\d{1,2}:\d{2}(?::\d{2})?\s*(?:[ap]\.?m\.?)?$|^[A-Za-z]{1,3}[-/&+#*]{1,2}[A-Za-z]{0,3}$|://|@|^[A-Z]\d{1,4}$|^\d{1,4}[A-Z]$"
    r"|^\d+(?:\.\d+)?\s?-\s?\d+(?:\.\d+)?$|^[A-Za-z]{2,}(?:[-/][A-Za-z]+)+$|^\+?[\d\s()-]{7,}$|^#",
    re.IGNORECASE,
)


def infer_answer_type(answer: str | None, choices: Sequence[str], question: str) -> AnswerType | None:
    """Returns how a reply to a question would be compared with its answer; None where rules cannot tell.

    None means free text: longer than `MAX_TEXT_WORDS` words, or no answer at all. OCR and CHART follow from a topic,
    never from an answer alone.
    """
    if choices:
        return AnswerType.CHOICE
    if answer is None or not answer.strip() or len(answer) > _MAX_REFERENCE_CHARS:
        return None
    text = strip_markup(unify_characters(answer)).strip()
    if truth_of(text) is not None and canonical_words(text) not in ("right", "n", "y", "correct"):
        return AnswerType.BOOLEAN
    if _is_box(answer, question):
        return AnswerType.BOX
    quantity = reference_quantity(text)
    if quantity is not None and "=" not in text and _is_number(text, question):
        is_count = _ASKS_COUNT.search(question) and quantity.value.denominator == 1 and not quantity.is_percent
        return AnswerType.COUNT if is_count and not quantity.unit else AnswerType.NUMBER
    if _is_list(answer, text, question):
        return AnswerType.LIST
    if not _NO_FORMULA.search(text) and looks_like_formula(text):
        return AnswerType.EXPRESSION
    return AnswerType.TEXT if _is_short(text) and canonical_words(answer) else None


def _is_box(answer: str, question: str) -> bool:
    """Whether an answer is a box and not a list of four numbers: corners in order, and no list asked for."""
    boxes = find_boxes(answer)
    if not boxes or not re.search(r"[\[({<]", answer):
        return False
    rest = re.sub(
        r"[\d.,\s\[\](){}<>|/:;\"'+-]|bbox_2d|bbox|box(?:_start|_end)?|label|x_?(?:min|max|[12])|y_?(?:min|max|[12])",
        "",
        answer,
    )
    if re.search(r"box", answer):
        return True
    return (
        len(rest) <= 20
        and all(box.area > 0 for box in boxes)
        and (_ASKS_PLACE.search(question) is not None or _ASKS_LIST.search(question) is None)
    )


def _is_number(text: str, question: str) -> bool:
    """Whether a text that begins with a number is one, and not a name such as "3 Musketeers" or a date."""
    if _NO_FORMULA.search(text) and not re.fullmatch(r"#?\d+", text):
        return False
    words = re.findall(r"[^\W\d_]+", text)
    if re.fullmatch(r"[-+]?[$€£¥₹]?\s?[\d.,/\s'{}\\a-z^°%()×·*+-]*\S*", text) and len(words) <= 1:
        return True
    return len(words) <= 4 and (not words[-1][:1].isupper() or _ASKS_COUNT.search(question) is not None)


def _is_list(answer: str, text: str, question: str) -> bool:
    items = split_items(answer)
    if len(items) < 2:
        return False
    if re.fullmatch(r"\s*\[.*\]\s*", answer, re.DOTALL):
        return True
    if any(len(item.split()) > 4 for item in items) or len(items) * 30 < len(text) / 3:
        return False
    if re.fullmatch(r"[(].*[)\]]|[\[].*[)]|\\?\{.*\}", text, re.DOTALL):
        return False  # tuples, intervals and sets are expressions
    are_numbers = all(reference_quantity(item) for item in items)
    if ";" in text or "\n" in text or are_numbers:
        return True
    if re.search(r"\d\s?[-+*/^=]|\\", text) and looks_like_formula(text):
        return False
    return len(items) >= 3 or _ASKS_LIST.search(question) is not None


def _is_short(text: str) -> bool:
    if "\n" in text.strip() or len(text) > _MAX_TEXT_CHARS:
        return False
    is_spaced = text.isascii() or " " in text
    return len(text.split()) <= MAX_TEXT_WORDS and (is_spaced or len(text) <= 20)


def reference_problem(sample: Sample) -> str | None:
    """Returns why a sample's reference cannot be compared with replies, or None if it can.

    Formulas are only bounded here, not parsed: that would need a process of its own.
    """
    answer = sample.answer
    if answer is None or not answer.strip():
        return "there is no reference answer"
    answer_type = sample.answer_type or infer_answer_type(answer, sample.choices, sample.question)
    if answer_type is None:
        return "the reference is free text that no rule compares"
    if len(answer) > _MAX_REFERENCE_CHARS:
        return f"the reference is too long ({len(answer)} characters)"
    return _PROBLEMS[answer_type](sample, answer)


def _choice_problem(sample: Sample, answer: str) -> str | None:
    if not sample.choices:
        return "a choice without options"
    if normalise_choice_answer(answer, sample.choices) is None:
        return f"the answer {answer[:60]!r} is outside the {len(sample.choices)} choices"
    return None


def _number_problem(sample: Sample, answer: str) -> str | None:
    return None if reference_quantity(answer) else f"the reference {answer[:60]!r} is not a number"


def _count_problem(sample: Sample, answer: str) -> str | None:
    quantity = reference_quantity(answer)
    is_count = quantity is not None and quantity.value.denominator == 1 and quantity.value >= 0
    return None if is_count else f"the reference {answer[:60]!r} is not a count"


def _boolean_problem(sample: Sample, answer: str) -> str | None:
    return None if truth_of(answer) is not None else f"the reference {answer[:60]!r} is neither yes nor no"


def _box_problem(sample: Sample, answer: str) -> str | None:
    boxes = find_boxes(unify_characters(answer))
    if boxes and all(box.area > 0 for box in boxes):
        return None
    return f"the reference {answer[:60]!r} is not a box [x1, y1, x2, y2] with an area"


def _list_problem(sample: Sample, answer: str) -> str | None:
    return None if split_items(answer) else f"the reference {answer[:60]!r} is an empty list"


def _expression_problem(sample: Sample, answer: str) -> str | None:
    return "the reference expression is too long or too deeply nested" if is_too_complex(answer) else None


def _text_problem(sample: Sample, answer: str) -> str | None:
    return None if canonical_words(answer) else "the reference has no words"


def _open_problem(sample: Sample, answer: str) -> str | None:
    return "an open-ended answer is not compared by rule"


_PROBLEMS = {
    AnswerType.CHOICE: _choice_problem,
    AnswerType.NUMBER: _number_problem,
    AnswerType.COUNT: _count_problem,
    AnswerType.BOOLEAN: _boolean_problem,
    AnswerType.BOX: _box_problem,
    AnswerType.LIST: _list_problem,
    AnswerType.EXPRESSION: _expression_problem,
    AnswerType.TEXT: _text_problem,
    AnswerType.OCR: _text_problem,
    AnswerType.CHART: _text_problem,
    AnswerType.OPEN: _open_problem,
}
