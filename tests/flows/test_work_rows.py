"""Rows between the stages: objects and tables are one, however a table is cut and however its rows were labelled."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.labelling import Desk
from flows.stages import LABELLING, concerned_places, kept_rows
from flows.work_rows import WORK_SCHEMA, WorkRow, labelled_table, passed_on, work_rows
from judges.answers import VerifierPool
from judges.sampling_plan import SamplingPlans
from schemas.config import RunConfig, parse_config
from schemas.fates import Fate
from schemas.rows import DECISION_FIELDS
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, sample_to_record
from schemas.verdicts import Decision, Heuristic, Mode

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COUNTS = st.integers(0, 16)
IMAGES = st.lists(st.builds(ImageRef, TEXTS, COUNTS, COUNTS), max_size=3).map(tuple)
SAMPLES = st.builds(
    Sample,
    id=TEXTS,
    source=TEXTS,
    origin=TEXTS,
    question=TEXTS,
    images=IMAGES,
    choices=st.lists(TEXTS, max_size=3).map(tuple),
    answer=st.none() | TEXTS,
    source_id=st.none() | TEXTS,
    topic=st.none() | st.sampled_from(Topic),
    kind=st.none() | st.sampled_from(Kind),
    answer_type=st.none() | st.sampled_from(AnswerType),
    licence=st.none() | TEXTS,
)
DECISIONS = st.builds(
    Decision,
    st.sampled_from(Mode),
    st.sampled_from(Heuristic),
    COUNTS,
    COUNTS,
    COUNTS,
    st.none() | st.floats(0, 1),
    st.booleans(),
)
ROWS = st.builds(WorkRow, SAMPLES, st.none() | DECISIONS, st.none() | TEXTS, st.none() | TEXTS)


def work_table(rows: Iterable[WorkRow]) -> pa.Table:
    """Returns the rows as an Arrow table with `WORK_SCHEMA`, in order, one record after the other: the reference."""
    records = []
    for row in rows:
        decision = row.decision
        record = {**sample_to_record(row.sample), "reasoning": row.reasoning, "final_answer": row.answer}
        for name in (field.name for field in DECISION_FIELDS):
            value = getattr(decision, name) if decision else None
            record[name] = str(value) if isinstance(value, Mode | Heuristic) else value
        records.append(record)
    return pa.Table.from_pylist(records, schema=WORK_SCHEMA)


def parquet_bytes(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="lz4")
    return stream.getvalue()


@given(st.lists(ROWS, max_size=6), st.integers(0, 6), st.integers(0, 6))
def test_rows_come_back_from_a_table_also_from_a_part_of_it_in_pieces(
    rows: list[WorkRow], start: int, middle: int
) -> None:
    table = work_table(rows)
    assert work_rows(table) == rows
    middle = max(start, middle)
    pieces = pa.concat_tables([table.slice(start, middle - start), table.slice(middle)])
    assert work_rows(pieces) == rows[start:]


def test_a_value_that_is_no_member_is_an_error() -> None:
    table = work_table([WorkRow(Sample("a", "s", "s:f#0", "?"))])
    strange = table.set_column(
        table.schema.get_field_index("kind"), WORK_SCHEMA.field("kind"), pa.array(["rhetorical"])
    )
    with pytest.raises(KeyError, match="rhetorical"):
        work_rows(strange)


@given(st.data(), st.lists(ROWS, max_size=6))
def test_a_table_of_labelled_rows_is_byte_for_byte_the_one_made_of_them(
    data: st.DataObject, rows: list[WorkRow]
) -> None:
    places = [place for place in range(len(rows)) if data.draw(st.booleans())]
    labelled = [_labelled(rows[place], data.draw(ROWS)) for place in places]
    made = labelled_table(work_table(rows), np.array(places, np.int64), labelled)
    assert made.equals(work_table(labelled))
    assert parquet_bytes(made.combine_chunks()) == parquet_bytes(work_table(labelled))


def _labelled(row: WorkRow, other: WorkRow) -> WorkRow:
    """Returns a row with all that a stage may change taken from another."""
    sample = replace(row.sample, **{name: getattr(other.sample, name) for name in ("topic", "kind", "answer_type")})
    return replace(other, sample=sample)


@given(st.data(), st.lists(ROWS, max_size=6))
def test_what_is_passed_on_is_what_is_kept_in_the_order_of_the_rows(data: st.DataObject, rows: list[WorkRow]) -> None:
    concerned = [place for place in range(len(rows)) if data.draw(st.booleans())]
    results = [rows[place] if data.draw(st.booleans()) else None for place in concerned]
    split = data.draw(st.integers(0, len(concerned)))
    table, places = work_table(rows), np.array(concerned, np.int64)
    parts = (kept_rows(table, places[:split], results[:split]), kept_rows(table, places[split:], results[split:]))
    gone = {place for place, result in zip(concerned, results, strict=True) if result is None}
    expected = work_table(row for place, row in enumerate(rows) if place not in gone)
    assert parquet_bytes(passed_on(table, places, *reversed(parts))) == parquet_bytes(expected)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse_config({"sources": [{"name": "sums", "format": "jsonl", "path": "sums.jsonl"}]})


@pytest.mark.parametrize("stage", LABELLING)
@settings(max_examples=50)
@given(rows=st.lists(ROWS, max_size=6))
def test_rows_that_a_stage_does_not_look_at_are_those_that_its_function_returns_unchanged(
    stage: str, config: RunConfig, rows: list[WorkRow]
) -> None:
    looked_at = set(concerned_places(stage, work_table(rows)).tolist())
    with VerifierPool(config.verification) as verifiers:
        desk = Desk(config, _never, _never, _never, _never, verifiers, SamplingPlans(config.performance))
        for place, row in enumerate(rows):
            if place not in looked_at:
                assert asyncio.run(_result(stage, row, desk)) is row


async def _result(stage: str, row: WorkRow, desk: Desk) -> WorkRow | Fate:
    return await LABELLING[stage](row, desk)


def _never(*_: object) -> NoReturn:
    raise AssertionError("nobody is asked about a row that a stage does not look at")
