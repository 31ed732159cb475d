"""Verdicts by answer type: what is read as the final answer, and what counts as the same answer."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.answers import reference_problem, verify
from judges.answers.comparison import Pending
from judges.answers.numbers import parse_plain
from judges.answers.verification import NO_ANSWER, SETTINGS_READ, decide, types_judged_alike
from schemas.config import VerificationConfig
from schemas.samples import AnswerType, ImageRef, Sample
from schemas.verdicts import Failure, Outcome

CONFIG = VerificationConfig()
RIGHT, WRONG, UNSCORED = Outcome.CORRECT, Outcome.WRONG, Outcome.UNSCORED


def sample(
    answer: str | None,
    answer_type: AnswerType | None,
    *,
    question: str = "What is it?",
    choices: tuple[str, ...] = (),
    images: tuple[ImageRef, ...] = (),
) -> Sample:
    return Sample(
        id="0" * 32,
        source="test",
        origin="test:0",
        question=question,
        images=images,
        choices=choices,
        answer=answer,
        answer_type=answer_type,
    )


def outcome(reply: str, of: Sample, *, is_truncated: bool = False) -> Outcome:
    return verify(reply, of, CONFIG, is_truncated=is_truncated).outcome


# --- what is read -----------------------------------------------------------------------------------------------------


def test_only_the_text_after_the_last_closing_tag_counts() -> None:
    number = sample("7", AnswerType.NUMBER)
    assert outcome("<think>\nis it 3?\n</think>7", number) is RIGHT
    assert outcome("<think>the answer is 7</think>3", number) is WRONG
    assert outcome("</think>7</think>3", number) is WRONG


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("", Failure.EMPTY),
        ("   \n\t", Failure.EMPTY),
        ("<think>7", Failure.EMPTY),
        ("<think>\n\n</think>", Failure.EMPTY),
        ("\\boxed{7", Failure.UNREADABLE),
        ("\\boxed{?}", Failure.UNREADABLE),
        ("...", Failure.UNREADABLE),
        ("\u200b\u200e", Failure.UNREADABLE),
        ("🤷", Failure.UNREADABLE),
    ],
)
def test_a_reply_without_anything_to_read_is_unscored(reply: str, failure: Failure) -> None:
    verdict = verify(reply, sample("7", AnswerType.NUMBER), CONFIG)
    assert (verdict.outcome, verdict.failure) == (UNSCORED, failure)


def test_a_truncated_reply_is_unscored_even_if_it_looks_right() -> None:
    verdict = verify("\\boxed{7}", sample("7", AnswerType.NUMBER), CONFIG, is_truncated=True)
    assert verdict.failure is Failure.TRUNCATED


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_sample_without_a_reference_is_unscored(answer: str | None) -> None:
    assert verify("7", sample(answer, AnswerType.NUMBER), CONFIG).failure is Failure.NO_REFERENCE


def test_an_unusable_reference_is_unscored_with_its_problem() -> None:
    verdict = verify("[1, 2, 3, 4]", sample("somewhere left", AnswerType.BOX), CONFIG)
    assert verdict.failure is Failure.NO_REFERENCE
    assert "not a box" in verdict.detail


def test_a_complete_refusal_is_wrong_and_says_that_it_gives_no_answer() -> None:
    reply = "I'm sorry, but there is no image provided with the 4 x 4 table. Please provide it."
    for of in (sample("4", AnswerType.NUMBER), sample("B", AnswerType.CHOICE, choices=("1", "2"))):
        verdict = verify(reply, of, CONFIG)
        assert (verdict.outcome, verdict.detail) == (WRONG, NO_ANSWER)


@pytest.mark.parametrize(
    ("reply", "answer", "answer_type"),
    [
        ("6 bricks are missing.", "6", AnswerType.COUNT),
        ("Ralph was not able to hit 60 + 50 = 110 balls.", "110", AnswerType.NUMBER),
        ("There are no pictures on the wall.", "0", AnswerType.COUNT),
        ("There are no chairs at the table.", "0", AnswerType.COUNT),
        ("Unfortunately, only 3 of them survived.", "3", AnswerType.NUMBER),
        ("The picture is dark, but there seem to be 4 birds.", "4", AnswerType.COUNT),
    ],
)
def test_an_answer_that_sounds_like_a_refusal_is_read(reply: str, answer: str, answer_type: AnswerType) -> None:
    assert outcome(reply, sample(answer, answer_type)) is RIGHT


def test_a_refusal_is_the_answer_where_the_reference_is_one() -> None:
    of = sample("C", AnswerType.CHOICE, choices=("yes", "no", "Cannot be determined"))
    assert outcome("It cannot be determined.", of) is RIGHT


def test_prose_that_mentions_the_reference_without_giving_it_is_unscored() -> None:
    verdict = verify("Of the 12 birds, 5 sat near 7 others.", sample("5", AnswerType.NUMBER), CONFIG)
    assert verdict.failure is Failure.UNREADABLE


def test_prose_whose_every_reading_differs_from_the_reference_is_wrong() -> None:
    assert outcome("Of the 12 birds, 5 sat near 7 others.", sample("9", AnswerType.NUMBER)) is WRONG


@pytest.mark.parametrize(
    "reply",
    [
        "7",
        "7.",
        "**7**",
        "$7$",
        "\\(7\\)",
        "\\boxed{7}",
        "The result is $\\boxed{7}$.",
        "\\[\\boxed{\\text{7}}\\]",
        "\\boxed{\\boxed{7}}",
        "\\boxed 7",
        "<answer>7</answer>",
        "<answer> \\boxed{7} </answer>",
        "Answer: 7",
        "**Answer:** 7",
        "**Answer**: 7",
        "Answer:\n\n7",
        "The answer is\n$$\n7\n$$",
        "The final answer is 7.",
        "3 + 4 = 7, so the answer is 7 because 3 and 4 make 7.",
        "ANSWER: seven",
        "#### 7",
        "Step 1: 3.\nStep 2: 4.\nTherefore, the answer is **7**.",
        "3 + 4 = 7",
        "So we have 3 + 4 = 7 apples.",
        "There are 3 red and 4 blue ones.\n\n**7**",
        "The total is 7 out of 9.",
        "7\n\nI hope this helps! Let me know if you have 2 more questions.",
        "Die Antwort ist 7.",
        "La réponse est 7.",
        "La respuesta es 7.",
        "答案是7。",
        "答えは7です",
        "정답은 7",
        "Ответ: 7",
        "الإجابة هي ٧",
        "\u200f7\u200f",
        "７",
        "Wait, the answer is 5. No: the answer is 7.",
        "\\boxed{5} is wrong, so it is \\boxed{7}",
        "## Answer\n7",
        "> 7",
        "* 7",
    ],
)
def test_the_final_answer_is_found_wherever_it_stands(reply: str) -> None:
    assert outcome(reply, sample("7", AnswerType.NUMBER)) is RIGHT


@pytest.mark.parametrize(
    "reply",
    [
        "7 or 8",
        "The answer is either 7 or 8.",
        "\\boxed{7} or \\boxed{8}",
        "7-8",
        "7 to 8",
        "Answer: 7/8",
        "more than 7",
    ],
)
def test_a_hedged_number_is_wrong(reply: str) -> None:
    assert outcome(reply, sample("7", AnswerType.NUMBER)) is WRONG


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("1234", "1,234"),
        ("1,234", "1234"),
        ("1234567", "1,234,567"),
        ("1234567", "1.234.567"),
        ("1234567", "1 234 567"),
        ("1234.5", "1.234,5"),
        ("1234.5", "$1{,}234.5$"),
        ("0.5", ".5"),
        ("0.5", "0,5"),
        ("0.5", "1/2"),
        ("0.5", "\\frac{1}{2}"),
        ("0.5", "$\\dfrac12$"),
        ("0.5", "½"),
        ("0.5", "one half"),
        ("0.5", "50%"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("50%", "50 percent"),
        ("50 %", "\\boxed{50\\%}"),
        ("3.5", "3 1/2"),
        ("3.5", "3½"),
        ("3.5", "3\\frac{1}{2}"),
        ("-2", "−2"),
        ("-2", "–2"),
        ("-2", "minus two"),
        ("-5", "The temperature is -5 degrees."),
        ("5", "Betty needs 100 - 50 - 45 = $5 more."),
        ("9", "This leaves 24 fish – 15 fish = <<24-15=9>>9 fish."),
        ("7", "It might be around 6 or 7; let me compute: it is 7."),
        ("-2", "$-2$"),
        ("12", "12 cm"),
        ("12", "12 cm^2"),
        ("12 cm^2", "12 cm²"),
        ("12 cm²", "12 square centimeters"),
        ("12 cm^2", "12"),
        ("1.5 m", "150 cm"),
        ("2 h", "120 minutes"),
        ("90°", "90 degrees"),
        ("90", "90^\\circ"),
        ("$45", "45 dollars"),
        ("45", "\\$45"),
        ("45.00", "€45"),
        ("100000", "1e5"),
        ("100000", "10^5"),
        ("120000", "1.2 × 10^5"),
        ("120000", "1.2 \\times 10^{5}"),
        ("120000", "1.2·10⁵"),
        ("0.00012", "1.2e-4"),
        ("21", "twenty-one"),
        ("105", "one hundred and five"),
        ("2000000", "2 million"),
        ("0.75", "three quarters"),
        ("12", "a dozen"),
        ("3", "x = 3"),
        ("x = 3", "3"),
        ("7", "3+4"),
        ("2", "\\sqrt{4}"),
        ("42", "The total is 42 apples, thus 42."),
        ("1864", "１８６４"),
        ("5", "+5"),
        ("72", "Natalia sold 48+24 = <<48+24=72>>72 clips altogether."),
    ],
)
def test_a_number_is_right_in_any_spelling(reference: str, reply: str) -> None:
    assert outcome(reply, sample(reference, AnswerType.NUMBER)) is RIGHT


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("3", "30"),
        ("30", "3"),
        ("3", "-3"),
        ("3", "3.1"),
        ("10000", "10001"),
        ("0.5", "0.5%"),
        ("50", "0.5"),
        ("12 cm", "12 m"),
        ("12 cm", "12 cm^2"),
        ("1234", "1.234"),
        ("2", "x^2"),
        ("2", "12 cm^2"),
        ("2", "\\frac{1}{2}"),
        ("5", "H5N1"),
        ("3", "3:2"),
        ("2", "2\\sqrt{3}"),
        ("2", "2^{10}"),
        ("7", "The kitchen"),
        ("7", "\\boxed{\\text{none}}"),
    ],
)
def test_another_number_is_wrong(reference: str, reply: str) -> None:
    assert outcome(reply, sample(reference, AnswerType.NUMBER)) is WRONG


def test_a_percent_sign_may_be_added_where_the_question_asks_for_a_percentage() -> None:
    question = "What percent of her class chose candy E?"
    assert outcome("20%", sample("20", AnswerType.NUMBER, question=question)) is RIGHT
    assert outcome("20%", sample("20", AnswerType.NUMBER)) is WRONG


def test_a_scale_in_the_question_may_be_repeated_in_the_answer() -> None:
    of = sample("2.5", AnswerType.NUMBER, question="How many million hamburgers are sold?")
    assert outcome("2.5 million", of) is RIGHT
    assert outcome("2.5", of) is RIGHT
    assert outcome("2.5 thousand", of) is WRONG


def test_decimals_enjoy_the_configured_relative_tolerance() -> None:
    number = sample("3.14159", AnswerType.NUMBER)
    assert verify("3.1416", number, CONFIG).is_correct
    assert not verify("3.15", number, CONFIG).is_correct
    assert verify("3.15", number, VerificationConfig(relative_tolerance=0.01)).is_correct


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("4", RIGHT),
        ("four", RIGHT),
        ("There are four birds.", RIGHT),
        ("There are 4 birds in the image.", RIGHT),
        ("4.0", RIGHT),
        ("4.1", WRONG),
        ("40", WRONG),
        ("forty", WRONG),
        ("none", WRONG),
        ("There are no birds.", WRONG),
        ("more than 4", WRONG),
        ("4%", WRONG),
    ],
)
def test_a_count_is_an_exact_whole_number(reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample("4", AnswerType.COUNT, question="How many birds are there?")) is expected


def test_none_is_the_count_zero() -> None:
    assert outcome("There are no birds.", sample("0", AnswerType.COUNT)) is RIGHT
    assert outcome("None", sample("0", AnswerType.COUNT)) is RIGHT


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reply", "question", "expected"),
    [
        ("100", "105", "What is the value?", RIGHT),
        ("100", "95", "What is the value?", RIGHT),
        ("100", "105.1", "What is the value?", WRONG),
        ("100", "94.9", "What is the value?", WRONG),
        ("0", "0.01", "What is the value?", WRONG),
        ("-10", "-10.4", "What is the value?", RIGHT),
        ("25%", "26%", "What is the share?", RIGHT),
        ("25%", "0.26", "What is the share?", RIGHT),
        ("2010", "2011", "In which year was the peak?", WRONG),
        ("2010", "2010", "In which year was the peak?", RIGHT),
        ("2010", "2011", "How many were sold?", RIGHT),
        ("Germany", "germany.", "Which country?", RIGHT),
        ("Germany", "Germeny", "Which country?", WRONG),
        ("Yes", "Yes, it is.", "Is it higher?", RIGHT),
    ],
)
def test_a_chart_value_is_relaxed_and_a_chart_text_exact(
    reference: str, reply: str, question: str, expected: Outcome
) -> None:
    assert outcome(reply, sample(reference, AnswerType.CHART, question=question)) is expected


# --- choices ----------------------------------------------------------------------------------------------------------

CITIES = ("Berlin", "Paris", "Rome", "Madrid")


@pytest.mark.parametrize(
    "reply",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "B.",
        "B)",
        "[B]",
        "**B**",
        "**(B)**",
        "`B`",
        "\\boxed{B}",
        "\\boxed{\\text{(B)}}",
        "$\\textbf{(B)}$",
        "The answer is B",
        "The answer is (B).",
        "The correct option is B.",
        "Answer: B. Paris",
        "Option B",
        "option b: Paris",
        "B: Paris",
        "B. Paris",
        "(B) Paris",
        "Paris",
        "paris.",
        "It is Paris.",
        "The capital of France is Paris, so B.",
        "B is correct.",
        "Option B is the correct answer.",
        "I would choose B.",
        "The answer is B because A is in Germany.",
        "(A) is in Germany and not correct. The answer is (B).",
        "Berlin is the capital of Germany.\nParis is the capital of France.\n\n**Answer: B**",
        "Ｂ",
        "La respuesta correcta es B",
        "答案：B",
        "正确答案是 B。",
        "故选B",
        "Only (B) fits.",
        "<answer>B</answer>",
        "The answer is Paris, the capital of France.",
        "It's neither A nor C, so B.",
        "I am not sure, but I think B.",
    ],
)
def test_the_right_option_is_read_in_any_spelling(reply: str) -> None:
    assert outcome(reply, sample("B", AnswerType.CHOICE, choices=CITIES)) is RIGHT


@pytest.mark.parametrize(
    "reply",
    [
        "A",
        "(C)",
        "A or B",
        "B or C",
        "Either (A) or (B).",
        "\\boxed{A} or \\boxed{B}",
        "\\boxed{A, B}",
        "Paris or Rome",
        "A, B, C, D",
        "(A) (B) (C) (D)",
        "E",
        "London",
        "42",
        "The answer is not B.",
        "Not B",
        "A. Paris",
        "\\boxed{\\text{none of the above}}",
        "The answer is A because B is in France.",
        "A beautiful city",
        "I think that it is a big town.",
    ],
)
def test_another_option_a_hedge_or_something_else_is_wrong(reply: str) -> None:
    assert outcome(reply, sample("B", AnswerType.CHOICE, choices=CITIES)) is WRONG


def test_the_article_a_and_the_pronoun_i_are_no_options() -> None:
    letters = tuple("ABCDEFGHI")
    assert outcome("A bird is sitting on the wire.", sample("A", AnswerType.CHOICE, choices=letters)) is not RIGHT
    assert outcome("I see a bird.", sample("I", AnswerType.CHOICE, choices=letters)) is not RIGHT
    assert outcome("The bird sits on wire A.", sample("A", AnswerType.CHOICE, choices=letters)) is RIGHT


@pytest.mark.parametrize(
    ("choices", "answer", "reply", "expected"),
    [
        (("$\\frac{1}{4}$", "$\\frac{1}{2}$"), "B", "0.5", RIGHT),
        (("$\\frac{1}{4}$", "$\\frac{1}{2}$"), "B", "\\dfrac{1}{2}", RIGHT),
        (("$\\frac{1}{4}$", "$\\frac{1}{2}$"), "B", "1/4", WRONG),
        (("1:2", "1:4"), "B", "\\frac{1}{4}", RIGHT),
        (("$540 \\mathrm{~g}$", "$600 \\mathrm{~g}$"), "B", "600 g", RIGHT),
        (("$540 \\mathrm{~g}$", "$600 \\mathrm{~g}$"), "B", "600", RIGHT),
        (("$60^{\\circ}$", "$120^{\\circ}$"), "B", "120°", RIGHT),
        (("$6 \\pi$", "$8 \\pi$"), "A", "6π", RIGHT),
        (("$8+2 \\sqrt{2}$", "$11$"), "A", "8 + 2 sqrt(2)", RIGHT),
        (("$a+b$", "$a-b$"), "A", "$b+a$", RIGHT),
        (("f(x)+2", "f(x+2)"), "B", "f(x)+2", WRONG),
        (("f(x)+2", "f(x+2)"), "B", "(A)", WRONG),
        (("3", "30"), "A", "30", WRONG),
        (("3", "30"), "B", "The value is 30.", RIGHT),
        (("A", "C", "C", "D"), "C", "B", RIGHT),
        (("A", "B", "C", "D", "C or D"), "E", "C or D", RIGHT),
        (("A", "B", "C", "D", "C or D"), "E", "(E) C or D", RIGHT),
        (("I", "II", "III", "IV"), "A", "I", RIGHT),
        (("I", "II", "III", "IV"), "B", "I", WRONG),
        (("red", "red and blue"), "B", "red and blue", RIGHT),
        (("red", "red and blue"), "A", "red and blue", WRONG),
        (("yes", "no"), "B", "No, it is not.", RIGHT),
        (("True", "False"), "A", "The statement is true.", RIGHT),
        (("<image1>", "<image2>"), "B", "<image2>", RIGHT),
        (("$a$", "$b$"), "B", "b", RIGHT),
        (("جواب", "سؤال"), "B", "سؤال", RIGHT),
        (("猫", "狗"), "B", "狗", RIGHT),
        (("A. cat", "B. dog"), "B", "dog", RIGHT),
        (("A. cat", "B. dog"), "B", "B. dog", RIGHT),
        (("(A) 3", "(B) 30"), "B", "30", RIGHT),
        (("🐱", "🐶"), "B", "🐶", RIGHT),
    ],
)
def test_options_are_compared_by_meaning(choices: tuple[str, ...], answer: str, reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample(answer, AnswerType.CHOICE, choices=choices)) is expected


def test_a_letter_that_is_label_and_text_of_different_options_is_unscored_unless_both_are_wrong() -> None:
    choices = ("A", "B", "D", "F", "G")
    assert outcome("D", sample("D", AnswerType.CHOICE, choices=choices)) is UNSCORED
    assert outcome("(D)", sample("D", AnswerType.CHOICE, choices=choices)) is RIGHT
    assert outcome("D", sample("E", AnswerType.CHOICE, choices=choices)) is WRONG
    assert outcome("G", sample("E", AnswerType.CHOICE, choices=choices)) is RIGHT


# --- expressions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("2x+1", "1+2x"),
        ("2x+1", "$1+2x$"),
        ("2x+1", "The answer is $2x + 1$."),
        ("2x+1", "The answer is 2x + 1."),
        ("x=3", "3"),
        ("3", "x=3"),
        ("x = 3", "$x=3$"),
        ("\\sqrt{2}", "sqrt(2)"),
        ("sqrt(2)", "$\\sqrt2$"),
        ("\\sqrt{2}", "√2"),
        ("2\\pi", "2π"),
        ("2*pi", "$2\\pi$"),
        ("\\frac{\\pi}{2}", "pi/2"),
        ("x^2", "x²"),
        ("x^2", "x**2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\{1,2\\}", "\\{2, 1\\}"),
        ("[0,1)", "$[0, 1)$"),
        ("(3,-4)", "(3, -4)"),
        ("(3,-4)", "The coordinates are $(3,-4)$."),
        ("\\frac{1}{2}", "0.5"),
        ("5\\sqrt{2}", "$5\\sqrt{2}$ cm"),
        ("1:4", "\\frac{1}{4}"),
        ("3:2", "The ratio is 3 to 2."),
        ("\\frac{3}{2}b+\\frac{3}{4}a", "$\\frac{3a}{4}+\\frac{3b}{2}$"),
        ("x>3", "$x > 3$"),
        ("e^{x}", "\\boxed{e^x}"),
        ("\\text{no solution}", "\\boxed{\\text{No solution}}"),
        ("x=1 or x=-1", "x=-1 or x=1"),
    ],
)
def test_an_equal_expression_is_right(reference: str, reply: str) -> None:
    assert outcome(reply, sample(reference, AnswerType.EXPRESSION)) is RIGHT


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("2x+1", "2x-1"),
        ("x=3", "x=4"),
        ("x=3", "30"),
        ("(3,-4)", "(-4,3)"),
        ("(3,-4)", "(3,4)"),
        ("\\sqrt{2}", "\\sqrt{3}"),
        ("x=1 or x=-1", "x=1"),
        ("x=1", "x=1 or x=-1"),
        ("\\{1,2\\}", "\\{1,2,3\\}"),
        ("2\\pi", "2"),
        ("2x+1", "\\boxed{\\text{no solution}}"),
    ],
)
def test_a_different_expression_is_wrong(reference: str, reply: str) -> None:
    assert outcome(reply, sample(reference, AnswerType.EXPRESSION)) is WRONG


def test_an_expression_that_cannot_be_parsed_is_unscored() -> None:
    verdict = verify("\\boxed{\\frac{1}{}{x}{{}", sample("x^2", AnswerType.EXPRESSION), CONFIG)
    assert verdict.failure is Failure.UNREADABLE


# --- booleans, texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reply", "expected"),
    [
        ("Yes", "yes", RIGHT),
        ("Yes", "True", RIGHT),
        ("No", "No, there is nobody in the picture.", RIGHT),
        ("No", "Yes, there is no cat.", WRONG),
        ("no", "The statement is not true.", RIGHT),
        ("false", "The claim is false.", RIGHT),
        ("true", "The claim is incorrect.", WRONG),
        ("yes", "yes or no", WRONG),
        ("yes", "**Yes**", RIGHT),
        ("yes", "\\boxed{\\text{Yes}}", RIGHT),
        ("yes", "Answer: yes", RIGHT),
        ("yes", "はい", RIGHT),
        ("no", "不是", RIGHT),
        ("yes", "maybe", WRONG),
    ],
)
def test_yes_or_no_is_read_from_words(reference: str, reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample(reference, AnswerType.BOOLEAN)) is expected


@pytest.mark.parametrize(
    ("reference", "reply", "expected"),
    [
        ("Eiffel Tower", "the Eiffel tower.", RIGHT),
        ("Eiffel Tower", "Eifel Tower", RIGHT),
        ("Eiffel Tower", "This is the Eiffel Tower.", RIGHT),
        ("Eiffel Tower", "The landmark is called the Eiffel Tower, in Paris.", RIGHT),
        ("Eiffel Tower", "Big Ben", WRONG),
        ("north", "south", WRONG),
        ("male", "female", WRONG),
        ("red", "It is not red.", WRONG),
        ("red", "red or blue", WRONG),
        ("red", "The car is red.", RIGHT),
        ("red", "**Red**", RIGHT),
        ("Thursday", "On Thursday.", RIGHT),
        ("10:30", "The clock shows 10:30.", RIGHT),
        ("cat", "cats", WRONG),
        ("C++", "C", WRONG),
        ("10:30", "10:30", RIGHT),
        ("10:30", "10:35", WRONG),
        ("Müller", "MÜLLER", RIGHT),
        ("北京", "北京。", RIGHT),
        ("🐱", "🐱", RIGHT),
        ("T-shirt", "t shirt", RIGHT),
    ],
)
def test_a_short_text_is_compared_by_words(reference: str, reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample(reference, AnswerType.TEXT)) is expected


@pytest.mark.parametrize(
    ("reference", "reply", "expected"),
    [
        ("STOP", "stop", RIGHT),
        ("COFFEE SHOP", "COFEE SHOP", RIGHT),
        ("COFFEE SHOP", "BAKERY", WRONG),
        ("COFFEE SHOP", 'The sign reads "Coffee Shop".', RIGHT),
        ("Route 66", "Route 67", WRONG),
        ("3", "30", WRONG),
        ("£4.50", "4.50", RIGHT),
    ],
)
def test_ocr_is_compared_by_edit_distance_with_equal_numbers(reference: str, reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample(reference, AnswerType.OCR)) is expected


def test_the_anls_threshold_is_configurable() -> None:
    of = sample("abcdefgh", AnswerType.OCR)
    assert verify("abcdxxxx", of, VerificationConfig(anls_threshold=0.5)).is_correct
    assert not verify("abcdxxxx", of, VerificationConfig(anls_threshold=0.6)).is_correct


# --- lists and boxes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reply", "expected"),
    [
        ("red, green, blue", "blue, red and green", RIGHT),
        ("red, green, blue", "- blue\n- red\n- green", RIGHT),
        ("red, green, blue", "1. Blue\n2. Red\n3. Green", RIGHT),
        ("red, green, blue", "The colours are red, green and blue.", RIGHT),
        ("red, green, blue", '["blue", "green", "red"]', RIGHT),
        ("red, green, blue", "red, green", WRONG),
        ("red, green, blue", "red, green, blue, black", WRONG),
        ("red, green, blue", "red, red, blue", WRONG),
        ('["a", "b"]', "b; a", RIGHT),
        ("1, 2, 3", "[3, 2, 1]", RIGHT),
        ("1, 2, 3", "3, 2, 1.0", RIGHT),
        ("1, 2, 3", "\\boxed{1, 2, 3}", RIGHT),
        ("1, 2", "\\boxed{1} and \\boxed{2}", RIGHT),
        ("1,234", "1, 234", RIGHT),
        ("1,234; 5", "5; 1234", RIGHT),
        ("1/2, sqrt(2)", "$\\sqrt{2}$, 0.5", RIGHT),
    ],
)
def test_a_list_has_the_same_items_in_any_order(reference: str, reply: str, expected: Outcome) -> None:
    assert outcome(reply, sample(reference, AnswerType.LIST, question="Which ones?")) is expected


def test_a_list_is_ordered_where_the_question_asks_for_an_order() -> None:
    of = sample("1, 2, 3", AnswerType.LIST, question="Sort the numbers from smallest to largest.")
    assert outcome("1, 2, 3", of) is RIGHT
    assert outcome("3, 2, 1", of) is WRONG


@pytest.mark.parametrize(
    "reply",
    [
        "[10, 10, 110, 110]",
        "(10,10),(110,110)",
        "<box>(10,10),(110,110)</box>",
        "<|box_start|>(10,10),(110,110)<|box_end|>",
        '{"bbox_2d": [10, 10, 110, 110], "label": "cat"}',
        '```json\n[\n\t{"bbox_2d": [10, 10, 110, 110], "label": "cat"}\n]\n```',
        "[[10, 10], [110, 110]]",
        "The cat is at [12, 9, 108.5, 111].",
        "x1=10, y1=10, x2=110, y2=110",
        "10, 10, 110, 110",
        "[110, 110, 10, 10]",
        "\\boxed{[10, 10, 110, 110]}",
        "[0.05, 0.1, 0.55, 1.0]",
    ],
)
def test_a_box_is_read_in_every_format(reply: str) -> None:
    of = sample("[10, 10, 110, 110]", AnswerType.BOX, images=(ImageRef("0" * 64, 200, 110),))
    assert outcome(reply, of) is RIGHT


def test_a_box_needs_the_configured_overlap() -> None:
    # [0,0,10,10] and [0,0,10,5] share 50 of 100: an IoU of exactly 0.5
    of = sample("[0, 0, 10, 10]", AnswerType.BOX)
    assert outcome("[0, 0, 10, 5]", of) is RIGHT
    assert outcome("[0, 0, 10, 4.9]", of) is WRONG
    assert outcome("[5, 5, 5, 5]", of) is WRONG
    assert not verify("[0, 0, 10, 5]", of, VerificationConfig(iou_threshold=0.6)).is_correct


def test_several_boxes_for_one_are_wrong_and_a_box_in_words_is_unscored() -> None:
    of = sample("[0, 0, 10, 10]", AnswerType.BOX)
    assert outcome("[0, 0, 10, 10] or [50, 50, 60, 60]", of) is WRONG
    assert outcome("It is on the left.", of) is UNSCORED


# --- laws -------------------------------------------------------------------------------------------------------------

_WRAPPINGS = (
    "{}",
    "**{}**",
    "The answer is {}.",
    "Answer: {}",
    "Let me think step by step.\n\nFirst things first.\n\n**Answer:** {}",
    "\\boxed{{{}}}",
    "<think>\nhmm, maybe 99 or (D)?\n</think>{}",
    "<answer>{}</answer>",
    "  {}\n\nI hope this helps!",
)
_numbers = st.integers(-(10**9), 10**9).map(str) | st.decimals(-1000, 1000, places=3, allow_nan=False).map(str)
_words = st.lists(
    st.text(st.characters(whitelist_categories=("Ll",), max_codepoint=0x24F), min_size=3, max_size=9),
    min_size=1,
    max_size=3,
).map(" ".join)
_references = st.one_of(
    st.tuples(_numbers, st.just(AnswerType.NUMBER), st.just(())),
    st.tuples(st.integers(0, 10**6).map(str), st.just(AnswerType.COUNT), st.just(())),
    st.tuples(_numbers, st.just(AnswerType.CHART), st.just(())),
    st.tuples(st.sampled_from(["yes", "no", "True", "False"]), st.just(AnswerType.BOOLEAN), st.just(())),
    st.tuples(st.sampled_from("ABCD"), st.just(AnswerType.CHOICE), st.just(("1 cm", "2 cm", "red", "$x^2$"))),
    st.tuples(st.sampled_from("ABCD"), st.just(AnswerType.CHOICE), st.just(tuple("ABCD"))),
    st.tuples(
        st.lists(st.integers(0, 99), min_size=2, max_size=6).map(str),
        st.just(AnswerType.LIST),
        st.just(()),
    ),
    st.tuples(
        st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(51, 99), st.integers(51, 99)).map(
            lambda corners: str(list(corners))
        ),
        st.just(AnswerType.BOX),
        st.just(()),
    ),
    st.tuples(
        st.sampled_from(["2x+1", "\\frac{1}{2}", "(3,-4)", "\\sqrt{2}", "x=3", "x^2+y^2=1"]),
        st.just(AnswerType.EXPRESSION),
        st.just(()),
    ),
)


@given(_references, st.sampled_from(_WRAPPINGS))
@settings(max_examples=150, deadline=None)
def test_the_reference_itself_is_right_in_any_wrapping(
    reference: tuple[str, AnswerType, tuple[str, ...]], wrapping: str
) -> None:
    answer, answer_type, choices = reference
    verdict = verify(wrapping.format(answer), sample(answer, answer_type, choices=choices), CONFIG)
    assert verdict.outcome is RIGHT, verdict


@given(
    _words, st.sampled_from([AnswerType.TEXT, AnswerType.OCR]), st.sampled_from(("{}", "**{}**", "Answer: {}", "{}."))
)
@settings(max_examples=100, deadline=None)
def test_a_text_is_right_as_itself(words: str, answer_type: AnswerType, wrapping: str) -> None:
    assert outcome(wrapping.format(words), sample(words, answer_type)) is RIGHT


@given(
    st.text(max_size=300) | st.text("AB()[]{}\\$*_.,:;=+-/^0123456789 orxyz\nboxed<>think", max_size=200),
    st.sampled_from(list(AnswerType)),
    st.sampled_from(["B", "7", "yes", "[1, 2, 3, 4]", "2x+1", "a, b, c", ""]),
)
@settings(max_examples=200, deadline=None)
def test_no_text_makes_deciding_raise(text: str, answer_type: AnswerType, answer: str) -> None:
    choices = ("3", "$x^2$", text[:50]) if answer_type is AnswerType.CHOICE else ()
    decide(text, sample(answer, answer_type, choices=choices), CONFIG)
    decide("7", sample(text, answer_type, choices=choices), CONFIG)
    reference_problem(sample(text, None, choices=choices))


@given(st.text("0123456789+-*/^()xy=\\{}frac sqrt,", max_size=25))
@settings(max_examples=60, deadline=None)
def test_no_formula_makes_verifying_raise(formula: str) -> None:
    if "^" not in formula and "*" not in formula:  # powers of powers may take for ever: the pool's tests have them
        verify(f"\\boxed{{{formula}}}", sample("2x+1", AnswerType.EXPRESSION), CONFIG)


_REPEATED = (
    "7 ",
    "(",
    "\\boxed{",
    "$",
    "**",
    "the answer is ",
    "A or B ",
    "<b",
    "1,",
    "\\frac{",
    "[1,",
    "½",
    "\n",
    "'",
)


@pytest.mark.parametrize("answer_type", [kind for kind in AnswerType if kind is not AnswerType.OPEN])
def test_ten_megabytes_are_read_in_no_time(answer_type: AnswerType) -> None:
    answer = {
        AnswerType.CHOICE: "B",
        AnswerType.BOX: "[1, 2, 3, 4]",
        AnswerType.BOOLEAN: "yes",
    }.get(answer_type, "7")
    of = sample(answer, answer_type, choices=("1", "2") if answer_type is AnswerType.CHOICE else ())
    replies = [unit * (100_000 // len(unit)) for unit in _REPEATED] + ["a" * 49 + " " + "7 " * 5_000_000]
    start = time.process_time()
    for reply in replies:
        decide(reply, of, CONFIG)
    assert time.process_time() - start < 4.0  # it takes 0.5 s; quadratic reading would take hours


@given(whole=st.integers(0, 10**30), part=st.from_regex(r"[0-9]{0,12}", fullmatch=True), has_point=st.booleans())
def test_digits_with_at_most_one_point_are_the_number_that_they_spell(whole: int, part: str, has_point: bool) -> None:
    text = f"{whole}.{part}" if part else f"{whole}." if has_point else str(whole)
    assert parse_plain(text) == Fraction(text.rstrip("."))


# --- which settings count ---------------------------------------------------------------------------------------------


class ReadSettings:
    """Settings that remember which of them were read."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(CONFIG, name)


ANSWERS = (
    "7",
    "7.5",
    "12%",
    "1999",
    "B",
    "yes",
    "[1, 2, 30, 40]",
    "1, 2, 3",
    "red, blue",
    "x^2 + 1",
    "Paris",
    "no solution",
)
REPLIES = (
    *(f"Answer: {answer}" for answer in ANSWERS),
    *(
        r"\boxed{\frac{15}{2}}",
        r"\boxed{2(x + 1)}",
        "It is 7.6 or 8.",
        "Answer: 7,500",
        "(B) 7.6",
        "Answer: Pariss",
        "I cannot see.",
    ),
)


@settings(max_examples=600, deadline=None)
@given(
    answer_type=st.sampled_from(AnswerType),
    answer=st.sampled_from(ANSWERS),
    reply=st.sampled_from(REPLIES),
    question=st.sampled_from(["How many are there?", "In which year?", "What percentage?", "List them."]),
    choices=st.sampled_from([(), ("7", "7.5"), ("Paris", "red, blue", "x^2 + 1")]),
)
def test_a_verdict_reads_no_setting_but_those_named_for_its_type(
    answer_type: AnswerType, answer: str, reply: str, question: str, choices: tuple[str, ...]
) -> None:
    of = sample(answer, answer_type, question=question, choices=choices)
    read = ReadSettings()
    decided = decide(reply, of, cast(VerificationConfig, read))
    if isinstance(decided, Pending):
        read.names.add("timeout_seconds")
        decided.conclude(((True,) * len(decided.references),) * len(decided.candidates))
    assert read.names <= SETTINGS_READ[answer_type]


def test_types_are_judged_alike_unless_a_setting_differs_that_their_verdicts_read() -> None:
    assert types_judged_alike(CONFIG, CONFIG.model_copy(update={"num_workers": 7})) == frozenset(AnswerType)
    by_number = {AnswerType.NUMBER, AnswerType.CHART, AnswerType.EXPRESSION, AnswerType.LIST}
    tolerant = CONFIG.model_copy(update={"relative_tolerance": 0.02})
    assert types_judged_alike(CONFIG, tolerant) == frozenset(AnswerType) - by_number
    strict = CONFIG.model_copy(update={"iou_threshold": 0.9, "anls_threshold": 0.9})
    by_text = {AnswerType.BOX, AnswerType.CHART, AnswerType.LIST, AnswerType.TEXT, AnswerType.OCR}
    assert types_judged_alike(CONFIG, strict) == frozenset(AnswerType) - by_text
