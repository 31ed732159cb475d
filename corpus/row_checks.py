"""What must hold of every row of a corpus, whoever wrote it: one record of `CORPUS_SCHEMA` in, its problems out.

What a trainer reads must be exactly the template of the row's parts, its images those that the prompt announces, its
evidence must lead to its mode, and its id must be the digest of its content. Nothing of the writer is used but the list
of control tokens, so that a mistake of the writer is found as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from corpus.shard_texts import CONTROL_TOKENS
from schemas.errors import RowError
from schemas.question import OPTION_LETTERS, rendered_question
from schemas.rows import CORPUS_SCHEMA
from schemas.samples import AnswerType, Kind, Topic, content_id
from schemas.template import render_completion
from schemas.verdicts import Decision, Heuristic, Mode

_MAY_BE_MISSING = frozenset(["reference", "topic", "probability", "source_id", "licence"])
_NEVER_MISSING = [name for name in CORPUS_SCHEMA.names if name not in _MAY_BE_MISSING]
_VALUE_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Something wrong with a row. code: stable snake_case name. detail: a sentence with the value seen."""

    code: str
    detail: str


def row_problems(record: Mapping[str, Any], *, recipe: str) -> list[RowProblem]:
    """Returns what is wrong with a row, nothing if it is as the pipeline writes it.

    recipe: digest of the version's recipe, under which all its rows were made.
    """
    missing = [name for name in _NEVER_MISSING if record[name] is None]
    if missing:
        return [RowProblem("value_missing", f"{', '.join(missing)} must not be null")]
    if None in record["choices"] or len(record["choices"]) > len(OPTION_LETTERS):
        detail = f"{len(record['choices'])} options, at most {len(OPTION_LETTERS)} and none of them null"
        return [RowProblem("choices_impossible", detail)]
    problems = list(_image_problems(record))
    if problems:
        return problems
    try:
        kind, decision = _labels(record)
    except ValueError as error:
        return [RowProblem("value_unknown", f"{error}")]
    return [
        *_text_problems(record, decision.mode),
        *_message_problems(record),
        *_id_problems(record),
        *_evidence_problems(kind, decision),
        *_recipe_problems(record, recipe),
    ]


def _image_problems(record: Mapping[str, Any]) -> Iterator[RowProblem]:
    for number, image in enumerate(record["images"]):
        if image is None or not image["bytes"] or not image["path"]:
            yield RowProblem("image_missing", f"image {number} has no bytes or no name")
        elif (sha256 := hashlib.sha256(image["bytes"]).hexdigest()) != image["path"]:
            yield RowProblem(
                "image_altered", f"image {number} is called {_shown(image['path'])}, its sha256 is {sha256}"
            )


def _labels(record: Mapping[str, Any]) -> tuple[Kind, Decision]:
    """Returns the labels of a row. Raises ValueError: one is none of ours."""
    AnswerType(record["answer_type"])
    if record["topic"] is not None:
        Topic(record["topic"])
    counts = (record["num_right"], record["num_scored"], record["num_sampled"])
    heuristic = Heuristic(record["heuristic"])
    decision = Decision(Mode(record["mode"]), heuristic, *counts, record["probability"], record["is_audit"])
    return Kind(record["kind"]), decision


def _text_problems(record: Mapping[str, Any], mode: Mode) -> Iterator[RowProblem]:
    reasoning = record["reasoning"]
    if mode is Mode.THINK and not reasoning.strip():
        yield RowProblem("reasoning_empty", "a thinking row has no reasoning")
    if mode is Mode.DIRECT and reasoning:
        yield RowProblem("reasoning_unexpected", f"a direct row has reasoning: {_shown(reasoning)}")
    for name in ("answer", "reasoning"):
        if record[name] != record[name].strip():
            yield RowProblem("text_not_stripped", f"the {name} begins or ends with white space: {_shown(record[name])}")
    texts = (record["question"], record["answer"], reasoning, record["reference"] or "", *record["choices"])
    for text in texts:
        if "<|" in text and (tokens := sorted(token for token in CONTROL_TOKENS if token in text)):
            yield RowProblem(
                "control_token_in_text", f"the text holds {tokens[0]}, which a tokenizer reads as structure"
            )


def _message_problems(record: Mapping[str, Any]) -> Iterator[RowProblem]:
    """Yields what differs between the messages and the template of the row's parts."""
    image_parts = [{"type": "image", "text": None}] * len(record["images"])
    text_part = {"type": "text", "text": rendered_question(record["question"], record["choices"])}
    if record["prompt"] != [{"role": "user", "content": [*image_parts, text_part]}]:
        yield RowProblem(
            "prompt_differs", f"it is not {len(image_parts)} images and the question: {_shown(record['prompt'])}"
        )
    try:
        completion = render_completion(record["answer"], record["reasoning"])
    except RowError as error:
        yield RowProblem(error.reason, error.detail)
        return
    if record["completion"] != [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]:
        detail = f"it is not the template of answer and reasoning: {_shown(record['completion'])}"
        yield RowProblem("completion_differs", detail)


def _id_problems(record: Mapping[str, Any]) -> Iterator[RowProblem]:
    images = [image["path"] for image in record["images"]]
    content = (record["source"], record["question"], images, record["choices"], record["reference"])
    expected = content_id(*content, record["source_id"])
    if record["id"] != expected:
        yield RowProblem("id_differs", f"the id is {_shown(record['id'])}, that of its content is {expected}")


def _evidence_problems(kind: Kind, decision: Decision) -> Iterator[RowProblem]:
    """Yields contradictions between the mode of a row and the evidence for it (see `judges.performance`)."""
    counts = f"{decision.num_right} right of {decision.num_scored} scored of {decision.num_sampled} drawn"
    if decision.heuristic is Heuristic.PERFORMANCE:
        if kind is not Kind.OBJECTIVE:
            yield RowProblem("heuristic_differs", f"a {kind} row cannot be labelled by the performance heuristic")
        if not 0 <= decision.num_right <= decision.num_scored <= decision.num_sampled or not decision.num_scored:
            yield RowProblem("evidence_impossible", counts)
        elif (decision.num_right == 0) is not (decision.mode is Mode.THINK):
            yield RowProblem("mode_differs", f"the mode is {decision.mode}, with {counts}")
        if decision.probability is not None:
            yield RowProblem("evidence_impossible", "a row of the performance heuristic has a probability")
        return
    if kind is not Kind.SUBJECTIVE:
        yield RowProblem("heuristic_differs", f"an {kind} row cannot be labelled by the difficulty heuristic")
    if decision.num_sampled or decision.num_scored or decision.num_right or decision.is_audit:
        yield RowProblem("evidence_impossible", f"a row of the difficulty heuristic has samples: {counts}")
    if decision.probability is not None and not 0 <= decision.probability <= 1:
        yield RowProblem("evidence_impossible", f"the probability is {decision.probability}")


def _recipe_problems(record: Mapping[str, Any], recipe: str) -> Iterator[RowProblem]:
    if record["recipe"] != recipe:
        yield RowProblem("recipe_differs", f"it was made by recipe {_shown(record['recipe'])}, the version by {recipe}")


def _shown(value: Any) -> str:
    text = repr(value[: _VALUE_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}…"
