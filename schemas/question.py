"""How a question with its options is put into words, the same for teacher, corpus, training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.samples import Sample

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def render_question(sample: Sample) -> str:
    """Returns the question, followed by one line per option ("A. red") where there are options.

    Options that are nothing but their own letters ("A", "B", ... as in questions whose options are drawn in the
    image) are not repeated.
    """
    return rendered_question(sample.question, sample.choices)


def rendered_question(question: str, choices: Sequence[str]) -> str:
    """Does what `render_question` does, from the parts of a sample."""
    if not choices or list(choices) == list(OPTION_LETTERS[: len(choices)]):
        return question
    options = (f"{OPTION_LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
    return "\n".join([question, *options])
