"""Answer types by rule, references that cannot be used, and choice references as letters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.answers import infer_answer_type, normalise_choice_answer, reference_problem
from schemas.samples import AnswerType, Sample


@pytest.mark.parametrize(
    ("answer", "question", "expected"),
    [
        ("42", "What is it?", AnswerType.NUMBER),
        ("-2", "What is b?", AnswerType.NUMBER),
        ("1,234", "What is it?", AnswerType.NUMBER),
        ("3.5 cm", "How long is it?", AnswerType.NUMBER),
        ("$12.50", "How much?", AnswerType.NUMBER),
        ("50%", "What share?", AnswerType.NUMBER),
        ("1/2", "What part?", AnswerType.NUMBER),
        ("\\frac{1}{2}", "What part?", AnswerType.NUMBER),
        ("4", "How many birds are there?", AnswerType.COUNT),
        ("four", "How many birds are there?", AnswerType.COUNT),
        ("2.5", "How many million are sold?", AnswerType.NUMBER),
        ("Yes", "Is it?", AnswerType.BOOLEAN),
        ("false", "Is it?", AnswerType.BOOLEAN),
        ("no.", "Is it?", AnswerType.BOOLEAN),
        ("2x+1", "Simplify.", AnswerType.EXPRESSION),
        ("x=3", "Solve.", AnswerType.EXPRESSION),
        ("$\\sqrt{2}$", "How long?", AnswerType.EXPRESSION),
        ("5\\pi", "What is the area?", AnswerType.EXPRESSION),
        ("(3,-4)", "What are the coordinates of its image?", AnswerType.EXPRESSION),
        ("3:2", "What is the ratio?", AnswerType.EXPRESSION),
        ("[0,1)", "What is the domain?", AnswerType.EXPRESSION),
        ("[10, 20, 110, 220]", "Where is the cat?", AnswerType.BOX),
        ("<box>(1,2),(3,4)</box>", "Find the dog.", AnswerType.BOX),
        ('{"bbox_2d": [1, 2, 3, 4]}', "Find the dog.", AnswerType.BOX),
        ("[1, 2, 3, 4]", "List the numbers in order.", AnswerType.LIST),
        ("red, green, blue", "Which colours?", AnswerType.LIST),
        ("1, 2, 3", "Which numbers?", AnswerType.LIST),
        ('["a", "b"]', "Which?", AnswerType.LIST),
        ("Paris", "Which city?", AnswerType.TEXT),
        ("Paris, France", "Which city?", AnswerType.TEXT),
        ("the Eiffel Tower", "What is it?", AnswerType.TEXT),
        ("10:30", "What time is it?", AnswerType.TEXT),
        ("12/05/2020", "Which day?", AnswerType.TEXT),
        ("50-60", "Which range?", AnswerType.TEXT),
        ("C++", "Which language?", AnswerType.TEXT),
        ("TCP/IP", "Which protocol?", AnswerType.TEXT),
        ("C", "Which side?", AnswerType.TEXT),
        ("right", "Which way?", AnswerType.TEXT),
        ("北京", "哪个城市？", AnswerType.TEXT),
        ("A cat sits on a red mat and looks at the moon.", "Describe it.", None),
        ("", "What is it?", None),
        (None, "What is it?", None),
        ("x" * 100_000, "What is it?", None),
    ],
)
def test_the_answer_type_follows_from_answer_and_question(
    answer: str | None, question: str, expected: AnswerType | None
) -> None:
    assert infer_answer_type(answer, (), question) is expected


def test_options_make_a_choice() -> None:
    assert infer_answer_type("42", ("41", "42"), "Which?") is AnswerType.CHOICE
    assert infer_answer_type(None, ("41", "42"), "Which?") is AnswerType.CHOICE


CITIES = ("Berlin", "Paris", "Rome")


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("B", CITIES, "B"),
        ("b", CITIES, "B"),
        ("(B)", CITIES, "B"),
        ("B.", CITIES, "B"),
        ("B)", CITIES, "B"),
        ("Option B", CITIES, "B"),
        ("Answer: B", CITIES, "B"),
        ("\\boxed{B}", CITIES, "B"),
        ("$B$", CITIES, "B"),
        ("B. Paris", CITIES, "B"),
        ("(B) Paris", CITIES, "B"),
        ("B: Paris", CITIES, "B"),
        ("paris", CITIES, "B"),
        ("Paris.", CITIES, "B"),
        ("D", CITIES, None),
        ("London", CITIES, None),
        ("B. Rome", CITIES, None),
        ("A. Paris", CITIES, None),
        ("dog", ("A. cat", "B. dog"), "B"),
        ("B. dog", ("A. cat", "B. dog"), "B"),
        ("", CITIES, None),
        ("B", (), None),
        ("0", CITIES, "A"),
        ("3", CITIES, "C"),
        ("1", CITIES, None),
        ("4", CITIES, None),
        ("3", ("1", "2", "3", "4"), "C"),
        ("0.5", ("$\\frac{1}{4}$", "$\\frac{1}{2}$"), "B"),
        ("$\\frac12$", ("$\\frac{1}{4}$", "$\\frac{1}{2}$"), "B"),
        ("G", ("A", "B", "D", "F", "G"), "E"),
        ("D", ("A", "B", "D", "F", "G"), "D"),
        ("f(x+2)", ("f(x)+2", "f(x+2)"), "B"),
        ("🐶", ("🐱", "🐶"), "B"),
        ("no", ("yes", "no"), "B"),
    ],
)
def test_a_choice_reference_becomes_its_letter(answer: str, choices: tuple[str, ...], expected: str | None) -> None:
    assert normalise_choice_answer(answer, choices) == expected


@given(st.text(max_size=60), st.lists(st.text(max_size=20), max_size=30))
@settings(max_examples=150, deadline=None)
def test_normalising_gives_a_letter_of_the_choices_or_none(answer: str, choices: list[str]) -> None:
    letter = normalise_choice_answer(answer, choices)
    assert letter is None or letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]


@given(st.text(max_size=200), st.text(max_size=50))
@settings(max_examples=200, deadline=None)
def test_inference_never_raises_and_its_type_can_be_used(answer: str, question: str) -> None:
    answer_type = infer_answer_type(answer, (), question)
    if answer_type is not None:
        of = Sample(id="0", source="s", origin="s:0", question=question, answer=answer, answer_type=answer_type)
        assert reference_problem(of) is None


@pytest.mark.parametrize(
    ("answer", "answer_type", "choices", "expected"),
    [
        (None, AnswerType.NUMBER, (), "no reference"),
        (" ", AnswerType.TEXT, (), "no reference"),
        ("D", AnswerType.CHOICE, CITIES, "outside the 3 choices"),
        ("A", AnswerType.CHOICE, (), "without options"),
        ("many", AnswerType.NUMBER, (), "not a number"),
        ("2.5", AnswerType.COUNT, (), "not a count"),
        ("-1", AnswerType.COUNT, (), "not a count"),
        ("maybe", AnswerType.BOOLEAN, (), "neither yes nor no"),
        ("[1, 2, 3]", AnswerType.BOX, (), "not a box"),
        ("[1, 2, 1, 2]", AnswerType.BOX, (), "not a box"),
        ("[]", AnswerType.LIST, (), "empty list"),
        ("(" * 100 + ")" * 100, AnswerType.EXPRESSION, (), "too deeply nested"),
        ("a poem", AnswerType.OPEN, (), "open-ended"),
        ("x" * 5000, AnswerType.TEXT, (), "too long"),
        ("B", AnswerType.CHOICE, CITIES, None),
        ("12 cm", AnswerType.NUMBER, (), None),
        ("[1, 2, 3, 4]", AnswerType.BOX, (), None),
    ],
)
def test_a_reference_that_cannot_be_compared_says_why(
    answer: str | None, answer_type: AnswerType, choices: tuple[str, ...], expected: str | None
) -> None:
    of = Sample(id="0", source="s", origin="s:0", question="?", choices=choices, answer=answer, answer_type=answer_type)
    problem = reference_problem(of)
    assert problem is None if expected is None else problem is not None and expected in problem
