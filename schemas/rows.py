"""One row of the corpus: what a trainer reads (prompt, completion, images) and where it came from (all else)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from schemas.samples import SAMPLE_SCHEMA, Sample, sample_to_record
from schemas.verdicts import Decision


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A sample that went through every stage.

    reasoning: the chain of thought, "" for direct rows. answer: what follows the think block (for objective rows the
    reference, for open-ended ones the reply or the reference). teacher, reasoner: names of the models that labelled
    it and wrote its text ("" where none did).
    """

    sample: Sample
    decision: Decision
    reasoning: str
    answer: str
    teacher: str = ""
    reasoner: str = ""


DECISION_FIELDS = (
    pa.field("mode", pa.string()),
    pa.field("heuristic", pa.string()),
    pa.field("num_right", pa.int32()),
    pa.field("num_scored", pa.int32()),
    pa.field("num_sampled", pa.int32()),
    pa.field("probability", pa.float64()),
    pa.field("is_audit", pa.bool_()),
)
"""The fields of a `Decision`, in its order, as columns."""

LABELLED_SCHEMA = pa.schema(
    [
        *SAMPLE_SCHEMA,
        *DECISION_FIELDS,
        ("reasoning", pa.string()),
        ("final_answer", pa.string()),
        ("teacher", pa.string()),
        ("reasoner", pa.string()),
    ]
)
"""Columns of labelled samples in a table: what a corpus shard is written from. `answer` is the sample's reference."""


def labelled_table(rows: Iterable[LabelledSample]) -> pa.Table:
    """Returns labelled samples as a table with `LABELLED_SCHEMA`, in order."""
    records = [
        {
            **sample_to_record(row.sample),
            "mode": str(row.decision.mode),
            "heuristic": str(row.decision.heuristic),
            "num_right": row.decision.num_right,
            "num_scored": row.decision.num_scored,
            "num_sampled": row.decision.num_sampled,
            "probability": row.decision.probability,
            "is_audit": row.decision.is_audit,
            "reasoning": row.reasoning,
            "final_answer": row.answer,
            "teacher": row.teacher,
            "reasoner": row.reasoner,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=LABELLED_SCHEMA)


_MESSAGES = pa.list_(
    pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))])
)

CORPUS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("mode", pa.string()),
        ("prompt", _MESSAGES),
        ("completion", _MESSAGES),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("reasoning", pa.string()),
        ("topic", pa.string()),
        ("kind", pa.string()),
        ("answer_type", pa.string()),
        ("heuristic", pa.string()),
        ("num_right", pa.int32()),
        ("num_scored", pa.int32()),
        ("num_sampled", pa.int32()),
        ("probability", pa.float32()),
        ("is_audit", pa.bool_()),
        ("teacher", pa.string()),
        ("reasoner", pa.string()),
        ("recipe", pa.string()),
        ("source", pa.string()),
        ("source_id", pa.string()),
        ("origin", pa.string()),
        ("licence", pa.string()),
    ]
)
"""Columns of a corpus shard. prompt, completion and images are what TRL's SFTTrainer takes as they are."""
