"""How a question with its options is put into words, the same for teacher, corpus, training and evaluation."""

from __future__ import annotations

from schemas.samples import Sample

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def render_question(sample: Sample) -> str:
    """Returns the question, followed by one line per option ("A. red") where there are options.

    Options that are nothing but their own letters ("A", "B", ... as in questions whose options are drawn in the
    image) are not repeated.
    """
    if not sample.choices or list(sample.choices) == list(OPTION_LETTERS[: len(sample.choices)]):
        return sample.question
    options = (f"{OPTION_LETTERS[i]}. {choice}" for i, choice in enumerate(sample.choices))
    return "\n".join([sample.question, *options])
