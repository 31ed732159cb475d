"""The row between the stages: a sample with what has been decided about it so far, and its Arrow form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from schemas.fates import Exit, Fate
from schemas.samples import SAMPLE_SCHEMA, Sample, sample_from_record, sample_to_record
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


_DECISION_FIELDS = [
    ("mode", pa.string()),
    ("heuristic", pa.string()),
    ("num_right", pa.int32()),
    ("num_scored", pa.int32()),
    ("num_sampled", pa.int32()),
    ("probability", pa.float64()),
    ("is_audit", pa.bool_()),
]
WORK_SCHEMA = pa.schema(
    [
        *SAMPLE_SCHEMA,
        *(pa.field(name, kind) for name, kind in _DECISION_FIELDS),
        pa.field("reasoning", pa.string()),
        pa.field("final_answer", pa.string()),
    ]
)


def work_table(rows: Iterable[WorkRow]) -> pa.Table:
    """Returns the rows as an Arrow table with `WORK_SCHEMA`, in order."""
    records = []
    for row in rows:
        decision = row.decision
        record = {**sample_to_record(row.sample), "reasoning": row.reasoning, "final_answer": row.answer}
        for name, _kind in _DECISION_FIELDS:
            value = getattr(decision, name) if decision else None
            record[name] = str(value) if isinstance(value, Mode | Heuristic) else value
        records.append(record)
    return pa.Table.from_pylist(records, schema=WORK_SCHEMA)


def unlabelled_table(samples: pa.Table) -> pa.Table:
    """Returns a table of samples as one of work rows about which nothing is decided yet."""
    missing = [field for field in WORK_SCHEMA if field.name not in SAMPLE_SCHEMA.names]
    columns = [*samples.select(SAMPLE_SCHEMA.names).columns, *(pa.nulls(len(samples), field.type) for field in missing)]
    return pa.table(columns, schema=WORK_SCHEMA)


def work_rows(table: pa.Table) -> list[WorkRow]:
    """Returns the rows of a table with `WORK_SCHEMA`. Inverse of `work_table`."""
    rows = []
    for record in table.to_pylist():
        decision = None
        if record["mode"] is not None:
            decision = Decision(
                Mode(record["mode"]),
                Heuristic(record["heuristic"]),
                record["num_right"],
                record["num_scored"],
                record["num_sampled"],
                record["probability"],
                record["is_audit"],
            )
        rows.append(WorkRow(sample_from_record(record), decision, record["reasoning"], record["final_answer"]))
    return rows
