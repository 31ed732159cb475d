"""The row between the stages: a sample with what has been decided about it so far, and its Arrow form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.fates import Exit, Fate
from schemas.rows import DECISION_FIELDS
from schemas.samples import SAMPLE_SCHEMA, AnswerType, ImageRef, Kind, Sample, Topic
from schemas.verdicts import Decision, Heuristic, Mode

FATE_QUESTION_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class WorkRow:
    """decision: None until a heuristic has run. reasoning, answer: None until they are written."""

    sample: Sample
    decision: Decision | None = None
    reasoning: str | None = None
    answer: str | None = None

    def dropped(self, stage: str, reason: str, detail: str) -> Fate:
        return sample_fate(self.sample, stage, Exit.DROPPED, reason, detail)

    def quarantined(self, stage: str, reason: str, detail: str) -> Fate:
        return sample_fate(self.sample, stage, Exit.QUARANTINED, reason, detail)


def sample_fate(
    sample: Sample,
    stage: str,
    exit_: Exit,
    reason: str,
    detail: str,
) -> Fate:
    """Returns the fate of a sample, with the start of its question so that a report can show it."""
    return Fate(
        sample.origin,
        sample.id,
        sample.source,
        stage,
        exit_,
        reason,
        detail,
        question=sample.question[:FATE_QUESTION_CHARACTERS],
        images=tuple(image.sha256 for image in sample.images),
    )


_DECIDED = tuple(field.name for field in DECISION_FIELDS)
WORK_SCHEMA = pa.schema(
    [
        *SAMPLE_SCHEMA,
        *DECISION_FIELDS,
        pa.field("reasoning", pa.string()),
        pa.field("final_answer", pa.string()),
    ]
)


def unlabelled_table(samples: pa.Table) -> pa.Table:
    """Returns a table of samples as one of work rows about which nothing is decided yet."""
    missing = [field for field in WORK_SCHEMA if field.name not in SAMPLE_SCHEMA.names]
    columns = [*samples.select(SAMPLE_SCHEMA.names).columns, *(pa.nulls(len(samples), field.type) for field in missing)]
    return pa.table(columns, schema=WORK_SCHEMA)


def labelled_table(before: pa.Table, places: NDArray[np.int64], rows: Sequence[WorkRow]) -> pa.Table:
    """Returns rows that were read from places of a table as a table like it, with what was decided about them.

    What no stage changes of a row is taken from the table, so that only columns of single values are made anew.
    before: with `WORK_SCHEMA`. places: ascending, of each row the place from which it was read.
    """
    table = before.take(pa.array(places))
    routed = [[None if value is None else str(value) for value in map(read, rows)] for read in _ROUTED.values()]
    for name, values in zip(_ROUTED, routed, strict=True):
        table = _with_column(table, name, values)
    for name in _DECIDED:
        read = attrgetter(name)
        values = [None if row.decision is None else read(row.decision) for row in rows]
        table = _with_column(table, name, [str(v) if isinstance(v, Mode | Heuristic) else v for v in values])
    table = _with_column(table, "reasoning", [row.reasoning for row in rows])
    return _with_column(table, "final_answer", [row.answer for row in rows])


_ROUTED = {name: attrgetter(f"sample.{name}") for name in ("topic", "kind", "answer_type")}
"""What a stage, routing, may change of a sample."""


def _with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))


Placed = tuple[NDArray[np.int64], pa.Table]
"""Rows, and the places in a table from which they came, ascending."""


def passed_on(table: pa.Table, concerned: NDArray[np.int64], *labelled: Placed) -> pa.Table:
    """Returns the rows that a stage passes on, in order: the labelled ones, and unchanged those it does not look at.

    table: what the stage reads. concerned: the places of the rows that it looks at, ascending.
    """
    parts = [part for part in labelled if len(part[0])]
    if len(concerned) < table.num_rows:
        others = np.setdiff1d(np.arange(table.num_rows), concerned, assume_unique=True)
        parts.append((others, table.take(pa.array(others))))
    rows = pa.concat_tables([WORK_SCHEMA.empty_table(), *(rows for _, rows in parts)])
    if len(parts) > 1:
        rows = rows.take(pa.array(np.argsort(np.concatenate([places for places, _ in parts]))))
    return rows.combine_chunks()


def work_rows(table: pa.Table) -> list[WorkRow]:
    """Returns the rows of a table with `WORK_SCHEMA`."""
    table = table.combine_chunks()
    lists = {name: table[name].to_pylist() for name in table.column_names if name not in ("images", "choices")}
    images, choices = _image_refs(_only_chunk(table["images"])), _choices(_only_chunk(table["choices"]))
    samples = map(
        Sample,
        *(lists[name] for name in ("id", "source", "origin", "question")),
        images,
        choices,
        *(lists[name] for name in ("answer", "source_id")),
        *(map(known.__getitem__, lists[name]) for name, known in _MEMBERS.items()),
        lists["licence"],
    )
    decided = zip(*(lists[name] for name in _DECIDED), strict=True)
    decisions = (None if mode is None else Decision(_MODES[mode], _HEURISTICS[h], *r) for mode, h, *r in decided)
    return list(map(WorkRow, samples, decisions, lists["reasoning"], lists["final_answer"]))


_MEMBERS: dict[str, dict[str | None, Any]] = {
    name: {None: None, **{str(member): member for member in members}}
    for name, members in (("topic", Topic), ("kind", Kind), ("answer_type", AnswerType))
}
_MODES = {str(mode): mode for mode in Mode}
_HEURISTICS = {str(heuristic): heuristic for heuristic in Heuristic}


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _image_refs(images: pa.ListArray) -> list[tuple[ImageRef, ...]]:
    """Returns the images of each row; structs become objects by column, which takes a fifth of the time."""
    flat = images.flatten()
    refs = list(map(ImageRef, *(flat.field(name).to_pylist() for name in ("sha256", "width", "height"))))
    return _split(refs, images)


def _choices(choices: pa.ListArray) -> list[tuple[str, ...]]:
    return _split(choices.flatten().to_pylist(), choices)


def _split(values: list[Any], lists: pa.ListArray) -> list[tuple[Any, ...]]:
    """Returns the values of all lists, which stand one after the other, by list."""
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy()).tolist()
    return [tuple(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
