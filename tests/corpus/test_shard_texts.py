"""Texts by column: what the renderers of `schemas` make of each row by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.shard_texts import CONTROL_TOKENS, messages, render_texts
from schemas.errors import RowError
from schemas.question import OPTION_LETTERS, rendered_question
from schemas.rows import LABELLED_SCHEMA
from schemas.template import THINK_TOKENS, render_completion

_SPACES = ("", " ", "\n", "\u00a0", "\u2003", "\x1c", "\x85", "\x7f")
_OTHERS = ("a", "B", "\u3002", "\U0001f600", "<", "<|", "<think", *sorted(CONTROL_TOKENS), *THINK_TOKENS)
_TEXTS = st.lists(st.sampled_from(_SPACES + _OTHERS), max_size=4).map("".join)
_LETTERED = st.integers(0, 27).map(lambda number: [*OPTION_LETTERS, "?"][:number])
_ROWS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["think", "direct"]),
        "question": _TEXTS,
        "choices": st.one_of(st.lists(_TEXTS, max_size=3), _LETTERED),
        "answer": st.none() | _TEXTS,
        "reasoning": st.none() | _TEXTS,
        "final_answer": st.none() | _TEXTS,
    }
)


def labelled(rows: list[dict[str, Any]]) -> pa.Table:
    filled = [{name: row.get(name) for name in LABELLED_SCHEMA.names} for row in rows]
    return pa.Table.from_pylist(filled, schema=LABELLED_SCHEMA)


def rendered_alone(row: dict[str, Any]) -> tuple[str, str] | str:
    """Returns question and completion of a row, or the reason why it is no example: the definition, row by row."""
    reasoning, answer = ((row[name] or "").strip() for name in ("reasoning", "final_answer"))
    if (row["mode"] == "think") != bool(reasoning):
        return "reasoning_unexpected" if reasoning else "reasoning_empty"
    if len(row["choices"]) > len(OPTION_LETTERS):
        return "too_many_choices"
    question = rendered_question(row["question"], row["choices"])
    try:
        completion = render_completion(answer, reasoning)
    except RowError as error:
        return error.reason
    texts = [question, completion, *row["choices"], row["answer"] or ""]
    return (
        "control_token_in_text" if any(t in text for t in CONTROL_TOKENS for text in texts) else (question, completion)
    )


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(_ROWS, max_size=8), start=st.integers(0, 3))
@example(rows=[], start=0)
def test_the_texts_of_many_rows_are_those_that_each_has_alone(rows: list[dict[str, Any]], start: int) -> None:
    texts = render_texts(labelled(rows).slice(start))
    expected = rows[start:]
    for place, row in enumerate(expected):
        found: tuple[str, str] | str
        if place in texts.errors:
            found = texts.errors[place].reason
        else:
            found = texts.questions[place].as_py(), texts.completions[place].as_py()
        assert found == rendered_alone(row)
    assert texts.reasonings.to_pylist() == [(row["reasoning"] or "").strip() for row in expected]
    assert texts.answers.to_pylist() == [(row["final_answer"] or "").strip() for row in expected]


@pytest.mark.parametrize("space", [chr(code) for code in range(0x3001) if chr(code).isspace()])
def test_outer_white_space_of_any_kind_goes_from_reasoning_and_answer(space: str) -> None:
    row = {
        "mode": "think",
        "question": "q",
        "choices": [],
        "reasoning": f"{space}why{space}",
        "final_answer": f"7{space}",
    }
    texts = render_texts(labelled([row]))
    assert texts.completions.to_pylist() == ["<think>\nwhy\n</think>7"]


def test_an_unknown_mode_is_our_own_bug_and_raises() -> None:
    with pytest.raises(ValueError, match="'maybe' is not a valid Mode"):
        render_texts(labelled([{"mode": "maybe", "question": "q", "choices": [], "final_answer": "7"}]))


def test_a_message_holds_its_images_and_then_its_text() -> None:
    column = messages("user", pa.array(["none", "two"]), np.array([0, 2]))
    image, none, two = (
        {"type": kind, "text": text} for kind, text in (("image", None), ("text", "none"), ("text", "two"))
    )
    assert column.to_pylist() == [
        [{"role": "user", "content": [none]}],
        [{"role": "user", "content": [image, image, two]}],
    ]
