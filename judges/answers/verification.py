"""The verdict on a reply: which statement is its final answer, and whether that is the reference.

Three values. *Correct* and *wrong* need a complete reply. A reply that was cut off, is empty or never ends its thought
is unscored; so is one whose final answer may or may not be the reference (several readings, an unparsable formula, a
reference that occurs in prose without being given as the answer).

A complete reply that commits to nothing ("I cannot see the image", "please provide the picture") is *wrong*, with
"gives no answer" as its detail: it was read without doubt, it does not answer the question, and benchmarks
(MATH-Vision) mark it so. It is unscored only if the reference occurs in it, or if there is nothing in it to read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from judges.answers.boxes import check_boxes, find_boxes
from judges.answers.choices import check_choice, normalise_choice_answer
from judges.answers.comparison import Matrix, Pending, judged, unparsed
from judges.answers.formulas import clean_formula, compact, formula_of, is_too_complex, looks_like_formula, without_name
from judges.answers.inference import infer_answer_type, reference_problem
from judges.answers.lists import asks_for_order, check_list, split_items
from judges.answers.numbers import find_quantities, same_number, whole_quantity
from judges.answers.numeric import check_number, reference_quantity
from judges.answers.refusals import declines
from judges.answers.short_texts import TEXT_MIN_SIMILARITY, check_boolean, check_text, truth_of
from judges.answers.statements import Origin, Statement, Statements, find_statements
from judges.answers.text import canonical_words, strip_markup, unify_characters
from schemas.config import VerificationConfig
from schemas.question import OPTION_LETTERS
from schemas.samples import AnswerType, Sample
from schemas.template import CLOSE_THINK, OPEN_THINK, parse_completion
from schemas.verdicts import Failure, Verdict, unscored, wrong

_RATIO = re.compile(r"(?<=\d)\s*to\s*(?=\d)")

NO_ANSWER = "gives no answer"
"""Detail of the verdict on a complete reply that commits to nothing."""

SETTINGS_READ: Mapping[AnswerType, frozenset[str]] = {
    AnswerType.CHOICE: frozenset({"timeout_seconds"}),
    AnswerType.NUMBER: frozenset({"relative_tolerance", "timeout_seconds"}),
    AnswerType.COUNT: frozenset({"timeout_seconds"}),
    AnswerType.CHART: frozenset({"relative_tolerance", "chart_tolerance", "anls_threshold", "timeout_seconds"}),
    AnswerType.EXPRESSION: frozenset({"relative_tolerance", "timeout_seconds"}),
    AnswerType.LIST: frozenset({"relative_tolerance", "anls_threshold", "timeout_seconds"}),
    AnswerType.TEXT: frozenset({"anls_threshold"}),
    AnswerType.OCR: frozenset({"anls_threshold"}),
    AnswerType.BOX: frozenset({"iou_threshold"}),
    AnswerType.BOOLEAN: frozenset(),
    AnswerType.OPEN: frozenset(),
}
"""Which settings shape the verdict on a reply, by the type of the answer. The time limit counts where a formula may be
parsed; how many processes do that never counts."""

Check = Callable[[Statement], Verdict | Pending | None]


def types_judged_alike(before: VerificationConfig, after: VerificationConfig) -> frozenset[AnswerType]:
    """Returns the answer types on which both settings give the same verdict, whatever is replied."""
    return frozenset(
        answer_type
        for answer_type, names in SETTINGS_READ.items()
        if all(getattr(before, name) == getattr(after, name) for name in names)
    )


def verify(reply_text: str, sample: Sample, config: VerificationConfig, *, is_truncated: bool = False) -> Verdict:
    """Returns the verdict on a reply, deciding everything in this process.

    Pure. Hostile formulas may take for ever: `VerifierPool` decides the same in processes that it can kill.
    """
    decided = decide(reply_text, sample, config, is_truncated=is_truncated)
    if isinstance(decided, Verdict):
        return decided
    from judges.answers.parser import equality_matrix  # noqa: PLC0415  (only where a formula has to be parsed)

    return decided.conclude(equality_matrix(decided.candidates, decided.references))


def decide(
    reply_text: str, sample: Sample, config: VerificationConfig, *, is_truncated: bool = False
) -> Verdict | Pending:
    """Returns the verdict, or the comparison of formulas that it waits for. Linear in the length of the reply."""
    problem = reference_problem(sample)
    if problem is not None:
        return unscored(Failure.NO_REFERENCE, problem)
    if is_truncated:
        return unscored(Failure.TRUNCATED, "the reply was cut off")
    answer = parse_completion(reply_text).answer
    if not answer:
        never_ends = OPEN_THINK in reply_text and CLOSE_THINK not in reply_text
        return unscored(Failure.EMPTY, "the thought never ends" if never_ends else "the reply is empty")
    statements = find_statements(answer)
    if statements.is_cut:
        return unscored(Failure.UNREADABLE, "the last \\boxed{ never closes")
    return _judge(statements, sample, config)


def _judge(statements: Statements, sample: Sample, config: VerificationConfig) -> Verdict | Pending:
    """Returns what the most binding readable statement says."""
    if sample.answer_type is None:
        sample = replace(sample, answer_type=infer_answer_type(sample.answer, sample.choices, sample.question))
    check = _check_for(sample, config)
    for statement in statements.items:
        if statement.origin is Origin.LAST and declines(statement.text) and not _is_about_refusing(sample):
            return wrong(None, NO_ANSWER)
        found = check(statement)
        if found is not None:
            return found
    return _without_answer(statements, sample)


def _check_for(sample: Sample, config: VerificationConfig) -> Check:
    """Returns the reader of statements for a sample whose reference is known to be usable."""
    answer, answer_type = sample.answer or "", sample.answer_type
    if answer_type is AnswerType.CHOICE:
        position = OPTION_LETTERS.index(normalise_choice_answer(answer, sample.choices) or "A")
        return lambda statement: check_choice(statement, position, sample.choices)
    if answer_type is AnswerType.BOOLEAN:
        return lambda statement: check_boolean(statement, truth_of(answer) is True)
    if answer_type is AnswerType.BOX:
        boxes = find_boxes(unify_characters(answer))
        return lambda statement: check_boxes(statement, boxes, sample, config.iou_threshold)
    if answer_type is AnswerType.LIST:
        items, is_ordered = split_items(answer), asks_for_order(sample.question)
        return lambda statement: check_list(statement, items, is_ordered=is_ordered, config=config)
    if answer_type is AnswerType.EXPRESSION:
        return lambda statement: _check_expression(statement, answer, config)
    quantity = reference_quantity(answer)
    if answer_type in (AnswerType.NUMBER, AnswerType.COUNT, AnswerType.CHART) and quantity is not None:
        return lambda statement: check_number(statement, quantity, sample, config)
    if answer_type is AnswerType.CHART and truth_of(answer) is not None:
        return lambda statement: check_boolean(statement, truth_of(answer) is True)
    threshold = {
        AnswerType.OCR: config.anls_threshold,
        AnswerType.CHART: 1.0,
    }.get(answer_type or AnswerType.TEXT, max(config.anls_threshold, TEXT_MIN_SIMILARITY))
    return lambda statement: check_text(statement, answer, threshold)


def _check_expression(statement: Statement, reference: str, config: VerificationConfig) -> Verdict | Pending | None:
    """Returns the verdict on a formula: by its spelling, as plain numbers, or by the parser."""
    if ":" in reference:
        statement = replace(statement, raw=_RATIO.sub(":", statement.raw), text=_RATIO.sub(":", statement.text))
    formula = formula_of(statement)
    if formula is None or not formula.strip():
        return None
    reference = clean_formula(reference)
    if compact(without_name(formula)) == compact(without_name(reference)):
        return judged(True, formula)
    number, expected = whole_quantity(strip_markup(formula)), whole_quantity(strip_markup(reference))
    if number and expected and not re.search(r"[\[({]", formula + reference):
        return judged(same_number(expected, number, relative_tolerance=config.relative_tolerance), formula)
    if is_too_complex(formula):
        return unscored(Failure.UNREADABLE, "the expression is too long or too deeply nested", formula[:200])
    words = strip_markup(formula)
    if not looks_like_formula(formula) and not re.fullmatch(r"[-+]?[\d.,/]+|[A-Za-z]|.*\\[a-z]+.*", formula):
        return _check_words(words, reference) if statement.origin.is_explicit else None

    def conclude(matrix: Matrix) -> Verdict:
        if matrix[0][0] is None:
            return unparsed(formula, reference, statement.origin)
        return judged(matrix[0][0], formula)

    return Pending((formula,), (reference,), conclude)


def _check_words(words: str, reference: str) -> Verdict | None:
    """Returns the verdict on words where a formula was asked for ("no solution"); None if there are none."""
    if not canonical_words(words) or not any(character.isalnum() for character in words):
        return None
    return judged(canonical_words(words) == canonical_words(reference), words[:200])


def _is_about_refusing(sample: Sample) -> bool:
    """Whether the reference or an option itself says that something cannot be told or is missing."""
    return any(declines(text) for text in (sample.answer or "", *sample.choices))


def _without_answer(statements: Statements, sample: Sample) -> Verdict:
    """Returns the verdict on a complete reply from which no answer could be read."""
    if not any(character.isalnum() for character in strip_markup(statements.text)):
        return unscored(Failure.UNREADABLE, "nothing to read")
    if sample.answer_type is AnswerType.BOX or _mentions_reference(statements.text, sample):
        return unscored(Failure.UNREADABLE, "no final answer found")
    return wrong(None, NO_ANSWER)


def _mentions_reference(text: str, sample: Sample) -> bool:
    """Whether the reference occurs near the end of a reply, so that it may have been meant as the answer.

    Letters, which occur everywhere, are looked for in the last two lines only.
    """
    answer = sample.answer or ""
    tail = strip_markup(text[-1500:])
    if sample.answer_type is AnswerType.CHOICE:
        letter = normalise_choice_answer(answer, sample.choices) or "A"
        meant = canonical_words(sample.choices[OPTION_LETTERS.index(letter)])
        last_lines = "\n".join(tail.splitlines()[-2:])
        pattern = rf"\(\s?{letter}\s?\)" if letter in "AI" else rf"(?<![\w']){letter}(?![\w'])"
        named = re.search(pattern, last_lines)
        return named is not None or (len(meant) > 1 and f" {meant} " in f" {canonical_words(tail)} ")
    quantity = reference_quantity(answer)
    if quantity is not None:
        return any(same_number(quantity, q, relative_tolerance=1e-4) for q in find_quantities(tail))
    if sample.answer_type is AnswerType.EXPRESSION:
        return compact(answer) in compact(tail)
    return f" {canonical_words(answer)} " in f" {canonical_words(tail)} "


__all__ = ["NO_ANSWER", "SETTINGS_READ", "Origin", "decide", "types_judged_alike", "verify"]
