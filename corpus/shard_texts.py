"""What a trainer reads of labelled rows: questions with their options, completions, chat messages, as columns.

The texts of a thousand rows are made at once, by column. The renderers of `schemas` stay the one definition: their
fixed parts are taken from what they render, and every row that is out of the ordinary (a null, a tag, a text that may
hold a control token, a mode that its reasoning contradicts) is rendered and checked by them, one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import RowError
from schemas.question import OPTION_LETTERS, rendered_question
from schemas.rows import CORPUS_SCHEMA
from schemas.template import CHAT_TEMPLATE, THINK_TOKENS, render_completion
from schemas.verdicts import Mode

CONTROL_TOKENS = frozenset(re.findall(r"<\|\w+\|>", CHAT_TEMPLATE)) | {"<|endoftext|>", "<|video_pad|>"}
"""Text that a tokenizer reads as structure. In a question it would open turns or announce images that are not there."""

_TOKEN_START = r"<(?:\||/?think>)"  # noqa: S105 - no password
"""How every token and tag begins. A regular expression, as Arrow looks for one ten times as fast as for a substring."""
assert all(re.match(_TOKEN_START, token) for token in CONTROL_TOKENS.union(THINK_TOKENS))

_THOUGHT_START, _THOUGHT_END, _ANSWER_END = re.split("[RA]", render_completion("A", "R"))
"""What a completion has before its reasoning, between it and the answer, and behind that."""

_OPTION_STARTS = pa.array([f"\n{line}" for line in rendered_question("", [""] * len(OPTION_LETTERS)).split("\n")[1:]])
"""What a question has before each of its options."""
_LETTERS = pa.array(list(OPTION_LETTERS))


@dataclass(frozen=True, slots=True)
class Texts:
    """What a trainer reads of some rows, in order, and the errors (by place) of those that cannot be written.

    The texts of a row with an error are empty or as far as they came.
    """

    questions: pa.StringArray
    reasonings: pa.StringArray
    answers: pa.StringArray
    completions: pa.StringArray
    errors: dict[int, RowError]


def render_texts(table: pa.Table) -> Texts:
    """Returns the texts of rows as a trainer reads them. table: with the columns of `LABELLED_SCHEMA`."""
    reasonings, answers = _stripped(_column(table, "reasoning")), _stripped(_column(table, "final_answer"))
    questions, is_rendered = _questions(table)
    completions = pc.binary_join_element_wise(_THOUGHT_START, reasonings, _THOUGHT_END, answers, _ANSWER_END, "")
    is_suspect = _is_suspect(table, reasonings, answers) | ~is_rendered
    suspects = np.flatnonzero(is_suspect)
    if not len(suspects):
        return Texts(questions, reasonings, answers, completions, {})
    rendered, completed, errors = _rendered_one_by_one(
        table.take(suspects), reasonings.take(pa.array(suspects)), answers.take(pa.array(suspects))
    )
    return Texts(
        pc.replace_with_mask(questions, is_suspect, pa.array(rendered, pa.string())),
        reasonings,
        answers,
        pc.replace_with_mask(completions, is_suspect, pa.array(completed, pa.string())),
        {int(suspects[place]): error for place, error in errors.items()},
    )


def messages(role: str, texts: pa.StringArray, num_images: NDArray[np.int64]) -> pa.ListArray:
    """Returns one chat message a row: so many images, then a text."""
    kind = CORPUS_SCHEMA.field("prompt").type
    message = kind.value_type
    parts = message.field("content").type
    ends = np.cumsum(num_images + 1)
    is_text = np.zeros(ends[-1], np.bool_)
    is_text[ends - 1] = True
    place_of_text = np.where(is_text, np.cumsum(is_text) - 1, 0)
    types = pa.array(["image", "text"]).take(pa.array(is_text.astype(np.int8)))
    held = texts if is_text.all() else texts.take(pa.array(place_of_text, mask=~is_text))
    content = pa.StructArray.from_arrays([types, held], fields=list(parts.value_type))
    contents = pa.ListArray.from_arrays(list_offsets(num_images + 1), content, type=parts)
    roles = pa.repeat(pa.scalar(role), len(texts))
    turns = pa.StructArray.from_arrays([roles, contents], fields=list(message))
    return pa.ListArray.from_arrays(list_offsets(np.ones_like(num_images)), turns, type=kind)


def list_offsets(lengths: NDArray[np.int64]) -> pa.Array:
    """Returns where lists of these lengths begin, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def _column(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _stripped(column: pa.StringArray) -> pa.StringArray:
    """Returns texts as `str.strip` leaves them, nulls as "". One that begins and ends in plain ASCII stays as it is."""
    texts = pc.fill_null(column, "")
    offsets = np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, 4 * texts.offset)
    is_held = np.flatnonzero(np.diff(offsets))
    if not len(is_held):
        return texts
    content = np.frombuffer(texts.buffers()[2], np.uint8)
    edges = np.stack([content[offsets[is_held]], content[offsets[is_held + 1] - 1]])
    is_doubtful = np.zeros(len(texts), np.bool_)
    is_doubtful[is_held] = ((edges <= ord(" ")) | (edges > ord("~"))).any(axis=0)
    if not is_doubtful.any():
        return texts
    doubtful = texts.filter(pa.array(is_doubtful)).to_pylist()
    return pc.replace_with_mask(texts, is_doubtful, pa.array([text.strip() for text in doubtful], pa.string()))


def _questions(table: pa.Table) -> tuple[pa.StringArray, NDArray[np.bool_]]:
    """Returns questions with their options, and which of them are rendered: not those with nulls or many options."""
    question, choices = _column(table, "question"), _column(table, "choices")
    num_choices = pc.fill_null(pc.list_value_length(choices), 0).to_numpy(zero_copy_only=False)
    options = choices.flatten()
    starts = np.cumsum(num_choices) - num_choices
    number = np.arange(len(options)) - np.repeat(starts, num_choices)
    lines = _OPTION_STARTS.take(pa.array(np.minimum(number, len(OPTION_LETTERS) - 1)))
    lists = pa.ListArray.from_arrays(list_offsets(num_choices), pc.binary_join_element_wise(lines, options, ""))
    is_letter = pc.equal(options, _LETTERS.take(pa.array(np.minimum(number, len(OPTION_LETTERS) - 1))))
    row = np.repeat(np.arange(len(choices)), num_choices)
    is_named = np.bincount(row, ~_flags(is_letter), len(choices)) > 0
    rendered = pc.binary_join_element_wise(question, pc.binary_join(lists, ""), "")
    is_known = _flags(pc.is_valid(rendered)) & _flags(pc.is_valid(choices)) & (num_choices <= len(OPTION_LETTERS))
    return pc.if_else(pa.array(is_named), rendered, question), is_known


def _is_suspect(table: pa.Table, reasonings: pa.StringArray, answers: pa.StringArray) -> NDArray[np.bool_]:
    """Returns which rows may be unfit: whose mode and reasoning differ, that lack an answer, that may hold a token."""
    thinks = pc.equal(_column(table, "mode"), str(Mode.THINK))
    is_direct = pc.equal(_column(table, "mode"), str(Mode.DIRECT))
    is_thought = pc.not_equal(reasonings, "")
    is_sound = pc.or_(pc.and_(thinks, is_thought), pc.and_not(is_direct, is_thought))
    is_sound = pc.and_(is_sound, pc.not_equal(answers, ""))
    found = ~_flags(is_sound)
    for texts in (reasonings, answers, _column(table, "question"), _column(table, "answer")):
        found |= _flags(pc.match_substring_regex(texts, _TOKEN_START))
    choices = _column(table, "choices")
    held = pc.match_substring_regex(choices.flatten(), _TOKEN_START)
    found[pc.list_parent_indices(choices).filter(pc.fill_null(held, False)).to_numpy()] = True
    return found


def _flags(values: pa.BooleanArray) -> NDArray[np.bool_]:
    """Returns truth values, nulls as false."""
    flags: NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return flags


def _rendered_one_by_one(
    table: pa.Table, reasonings: pa.StringArray, answers: pa.StringArray
) -> tuple[list[str], list[str], dict[int, RowError]]:
    """Returns questions, completions and errors of rows, each rendered and checked by itself."""
    columns = (table[name].to_pylist() for name in ("mode", "question", "choices", "answer"))
    questions, completions, errors = [], [], {}
    rows = zip(*columns, reasonings.to_pylist(), answers.to_pylist(), strict=True)
    for place, (mode, question, choices, reference, reasoning, answer) in enumerate(rows):
        rendered = completion = ""
        try:
            _check_mode(Mode(mode), reasoning)
            if len(choices) > len(OPTION_LETTERS):
                detail = f"{len(choices)} options, at most {len(OPTION_LETTERS)} have a letter"
                raise RowError("too_many_choices", detail)
            rendered = rendered_question(question, choices)
            completion = render_completion(answer, reasoning)
            _check_text([rendered, completion, *choices, reference or ""])
        except RowError as error:
            errors[place] = error
        questions.append(rendered)
        completions.append(completion)
    return questions, completions, errors


def _check_mode(mode: Mode, reasoning: str) -> None:
    if mode is Mode.THINK and not reasoning:
        raise RowError("reasoning_empty", "a thinking row has no reasoning")
    if mode is Mode.DIRECT and reasoning:
        raise RowError("reasoning_unexpected", f"a direct row has reasoning: {reasoning[:80]!r}")


def _check_text(texts: Sequence[str]) -> None:
    for text in texts:
        found = sorted(token for token in CONTROL_TOKENS if token in text)
        if found:
            raise RowError("control_token_in_text", f"the text holds {found[0]}, which a tokenizer reads as structure")
