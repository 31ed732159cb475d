"""The unit of the pipeline: one question, with or without images, before and after it has been labelled.

`Sample` is what sources produce and every stage reads. Its Arrow schema is the file format between stages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa


class Topic(StrEnum):
    """The nine topics of the paper's Table 1."""

    GENERAL = "general"
    MATH = "math"
    CODE = "code"
    CHART = "chart"
    OCR = "ocr"
    GROUNDING = "grounding"
    CAPTION = "caption"
    KNOWLEDGE = "knowledge"
    TEXT = "text"


class Kind(StrEnum):
    """Objective: a reply can be checked against the reference. Subjective: it cannot."""

    OBJECTIVE = "objective"
    SUBJECTIVE = "subjective"


class AnswerType(StrEnum):
    """How a reply to the sample is compared with its reference answer."""

    CHOICE = "choice"
    NUMBER = "number"
    COUNT = "count"
    EXPRESSION = "expression"
    BOOLEAN = "boolean"
    TEXT = "text"
    OCR = "ocr"
    CHART = "chart"
    LIST = "list"
    BOX = "box"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image in the content-addressed store: sha256 (hex) of its stored bytes, width and height in pixels."""

    sha256: str
    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Sample:
    """One question as every stage sees it.

    id: 32 hex characters, a function of the content alone (see `content_id`): stable over runs, machines and order.
    origin: where the row was read, "source:file#row", unique in a run even when two rows share their content.
    source_id: the row's own name in its source, if it has one.
    answer: the reference answer; None when the source has none. For a choice it is the letter.
    topic, kind, answer_type: None until routing has filled them.
    """

    id: str
    source: str
    origin: str
    question: str
    images: tuple[ImageRef, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str | None = None
    source_id: str | None = None
    topic: Topic | None = None
    kind: Kind | None = None
    answer_type: AnswerType | None = None
    licence: str | None = None


def content_id(
    source: str, question: str, images: Sequence[str], choices: Sequence[str], answer: str | None, source_id: str | None
) -> str:
    """Returns the stable id of a row: 128 bits of sha256 over its content, as 32 hex characters.

    images: sha256 of each stored image, in order.
    """
    content = json.dumps([source, question, list(images), list(choices), answer, source_id], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("question", pa.string()),
        ("images", pa.list_(pa.struct([("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32())]))),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("source_id", pa.string()),
        ("topic", pa.string()),
        ("kind", pa.string()),
        ("answer_type", pa.string()),
        ("licence", pa.string()),
    ]
)


def samples_to_table(samples: Iterable[Sample]) -> pa.Table:
    """Returns the samples as an Arrow table with `SAMPLE_SCHEMA`, in order."""
    return pa.Table.from_pylist([sample_to_record(sample) for sample in samples], schema=SAMPLE_SCHEMA)


def sample_to_record(sample: Sample) -> dict[str, Any]:
    """Returns the sample as plain JSON-able values, one key per column of `SAMPLE_SCHEMA`."""
    return {
        "id": sample.id,
        "source": sample.source,
        "origin": sample.origin,
        "question": sample.question,
        "images": [{"sha256": i.sha256, "width": i.width, "height": i.height} for i in sample.images],
        "choices": list(sample.choices),
        "answer": sample.answer,
        "source_id": sample.source_id,
        "topic": sample.topic and str(sample.topic),
        "kind": sample.kind and str(sample.kind),
        "answer_type": sample.answer_type and str(sample.answer_type),
        "licence": sample.licence,
    }


def sample_from_record(record: dict[str, Any]) -> Sample:
    """Returns the sample of one row of a `SAMPLE_SCHEMA` table. Inverse of `sample_to_record`."""
    return Sample(
        id=record["id"],
        source=record["source"],
        origin=record["origin"],
        question=record["question"],
        images=tuple(ImageRef(**image) for image in record["images"]),
        choices=tuple(record["choices"]),
        answer=record["answer"],
        source_id=record["source_id"],
        topic=Topic(record["topic"]) if record["topic"] else None,
        kind=Kind(record["kind"]) if record["kind"] else None,
        answer_type=AnswerType(record["answer_type"]) if record["answer_type"] else None,
        licence=record["licence"],
    )


def table_to_samples(table: pa.Table) -> list[Sample]:
    """Returns the samples of a table that has the columns of `SAMPLE_SCHEMA` (further columns are ignored)."""
    return [sample_from_record(record) for record in table.select(SAMPLE_SCHEMA.names).to_pylist()]
