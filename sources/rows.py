"""One raw row -> a Sample, by the mapping of columns in the configuration.

Values are looked up by the mapping, cleaned, and validated here, once; everything downstream trusts a Sample. Any
defect of the row is a RowError with a stable reason, which the reader turns into a quarantined fate.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeVar

from schemas.config import SourceConfig
from schemas.errors import RowError
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, content_id
from schemas.template import THINK_TOKENS, parse_completion
from sources.choices import Options, read_options, reference_letter
from sources.columns import Row, is_conversation, look_up
from sources.conversations import CONVERSATION_COLUMNS, IMAGE_COLUMNS, Exchange, first_exchange
from sources.image_values import ImageRoots, encoded_images
from sources.images import ImageStore
from sources.placeholders import number_marks, resolve_marks
from sources.text import check_length, check_tokens, clean_text, describe, is_blank, is_missing, scalar_text

MAX_SOURCE_ID_CHARS = 1000

Name = TypeVar("Name", bound=StrEnum)


@dataclass(slots=True)
class Draft:
    """What is known of a row while it is read, so that the fate of a bad one can show it."""

    question: str = ""
    images: list[ImageRef] = field(default_factory=list)


def build_sample(
    row: Row, draft: Draft, *, source: SourceConfig, origin: str, store: ImageStore, roots: ImageRoots
) -> Sample:
    """Returns the sample of a raw row and stores its images. `draft` is filled on the way.

    Raises RowError: for whatever is wrong with the row. Raises StorageError: if an image cannot be stored.
    """
    columns = source.columns
    exchange = _exchange(row, source)
    draft.question = exchange.question
    source_id = _source_id(look_up(row, columns.id))
    check_length(exchange.question, what="question")
    if is_blank(exchange.question):
        raise RowError("question_empty", f"the question {exchange.question[:60]!r} has no words")
    for value in (_image_value(row, source), exchange.images):
        for encoded in encoded_images(value, roots=roots, max_bytes=store.limits.max_bytes):
            draft.images.append(store.put(encoded))
    marked = resolve_marks(clean_text(exchange.question), num_images=len(draft.images))
    question = clean_text(marked.text)
    if is_blank(question):
        raise RowError("question_empty", f"the question {exchange.question[:60]!r} has no words")
    check_tokens(question, what="question")
    options = read_options(look_up(row, columns.choices), num_marks=marked.num_marks)
    answer_type = _named(AnswerType, look_up(row, columns.answer_type), source.answer_type, what="answer_type")
    raw_answer = exchange.reply if columns.answer is None else look_up(row, columns.answer)
    answer = _answer(raw_answer, options, answer_type, source.answer_pattern)
    images = tuple(draft.images)
    digests = [image.sha256 for image in images]
    return Sample(
        id=content_id(source.name, question, digests, options.texts, answer, source_id),
        source=source.name,
        origin=origin,
        question=question,
        images=images,
        choices=options.texts,
        answer=answer,
        source_id=source_id,
        topic=_named(Topic, look_up(row, columns.topic), source.topic, what="topic"),
        kind=_named(Kind, look_up(row, columns.kind), source.kind, what="kind"),
        answer_type=answer_type,
        licence=scalar_text(look_up(row, columns.licence), what="licence") or source.licence,
    )


def _exchange(row: Row, source: SourceConfig) -> Exchange:
    """Returns question and reply of the row: of its conversation, or its question column (and no reply)."""
    if is_conversation(source):
        names = (source.columns.conversations,) if source.columns.conversations else CONVERSATION_COLUMNS
        turns = next((value for name in names if (value := look_up(row, name)) is not None), None)
        if turns is None:
            raise RowError("conversation_missing", f"the row has none of the columns {', '.join(names)}")
        return first_exchange(turns)
    question = look_up(row, source.columns.question)
    if question is None:
        raise RowError("question_missing", f"the column {source.columns.question!r} is absent or null")
    if not isinstance(question, str):
        raise RowError("question_not_text", f"the question is {describe(question)}, not text")
    return Exchange(question, None)


def _image_value(row: Row, source: SourceConfig) -> Any:
    if source.columns.images is not None or not is_conversation(source):
        return look_up(row, source.columns.images)
    return next((value for name in IMAGE_COLUMNS if (value := look_up(row, name)) is not None), None)


def _source_id(value: Any) -> str | None:
    if isinstance(value, bool):
        raise RowError("id_unreadable", f"the id is {describe(value)}, not text or a number")
    source_id = scalar_text(value, what="id")
    if source_id is not None and len(source_id) > MAX_SOURCE_ID_CHARS:
        raise RowError("id_too_long", f"the id has {len(source_id):,} characters, more than {MAX_SOURCE_ID_CHARS:,}")
    return source_id


def _named(names: type[Name], value: Any, default: Name | None, *, what: str) -> Name | None:
    """Returns the member of an enumeration that a row names, or the default. Raises RowError: `<what>_unknown`."""
    text = scalar_text(value, what=what)
    if text is None:
        return default
    try:
        return names(text.lower())
    except ValueError as error:
        known = ", ".join(names)
        raise RowError(f"{what}_unknown", f"the {what} is {text[:60]!r}, not one of {known}") from error


def _answer(value: Any, options: Options, answer_type: AnswerType | None, pattern: str | None) -> str | None:
    """Returns the reference answer: None if the source has none, the letter for a choice, else clean text.

    A list is an answer only where the answer type says list or box (it becomes JSON), or if it has a single element:
    the answers of several annotators would else be taken for one answer that must name them all. Of an answer that
    shows its reasoning in think tags, what follows them counts.
    """
    if isinstance(value, list | tuple) and len(value) == 1 and answer_type not in {AnswerType.LIST, AnswerType.BOX}:
        value = value[0]
    if is_missing(value) or value in ([], ()):
        return None
    if isinstance(value, list | tuple):
        value = _list_answer(value, answer_type)
    if isinstance(value, str):
        check_length(value, what="answer")
        value = _final_part(value, pattern)
    elif pattern is not None:
        value = _final_part(scalar_text(value, what="answer") or "", pattern)
    if is_missing(value):
        raise RowError("answer_empty", "the answer has nothing behind its think tags")
    if options.texts:
        return reference_letter(value, options)
    text = scalar_text(value, what="answer")
    assert text is not None, "a missing value has no text, and this one is not missing"
    check_tokens(text, what="answer")
    return number_marks(text).text


def _final_part(text: str, pattern: str | None) -> str:
    """Returns the answer without its reasoning: behind the think tags, and group 1 of the source's pattern."""
    text = clean_text(text)
    if any(tag in text for tag in THINK_TOKENS):
        text = parse_completion(text).answer
    if pattern is not None:
        found = _compiled(pattern).search(text)
        if not found or is_missing(found[1]):
            raise RowError("answer_pattern_not_found", f"{pattern!r} finds nothing in the answer {text[-80:]!r}")
        text = found[1].strip()
    return text


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _list_answer(values: list[Any] | tuple[Any, ...], answer_type: AnswerType | None) -> str:
    if answer_type not in {AnswerType.LIST, AnswerType.BOX}:
        detail = f"the answer is {describe(values)}; set answer_type to list or box, or map a column with one answer"
        raise RowError("answer_is_a_list", detail)
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(
            "answer_unreadable", f"the answer is {describe(values)} that JSON cannot hold: {error}"
        ) from error
