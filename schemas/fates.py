"""What became of the rows that did not go on, and the conservation law that no row is ever lost.

A row leaves the pipeline in one of two ways. *Dropped*: a decision of the recipe (a duplicate, a trace that failed
its checks). *Quarantined*: an error (an unreadable image, a teacher that never answered). Every stage asserts
in = kept + dropped + quarantined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum

import pyarrow as pa


class Exit(StrEnum):
    DROPPED = "dropped"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Fate:
    """Why one row left the pipeline.

    origin: the row's unique place, `Sample.origin`. id: its `Sample.id`, or None if it never became a sample.
    reason: stable snake_case code. detail: one sentence for a person.
    resembles, similarity: for duplicates, the id of the row that was kept and how alike they are, in [0, 1].
    question: the start of the question, at most 500 characters, so that a report can show the row.
    images: sha256 of the row's images in the store.
    """

    origin: str
    id: str | None
    source: str
    stage: str
    exit: Exit
    reason: str
    detail: str
    resembles: str | None = None
    similarity: float | None = None
    question: str = ""
    images: tuple[str, ...] = ()


FATE_SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("exit", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("resembles", pa.string()),
        ("similarity", pa.float32()),
        ("question", pa.string()),
        ("images", pa.list_(pa.string())),
    ]
)


def fates_to_table(fates: Iterable[Fate]) -> pa.Table:
    """Returns the fates as an Arrow table with `FATE_SCHEMA`, in order."""
    records = [{**asdict(fate), "exit": str(fate.exit), "images": list(fate.images)} for fate in fates]
    return pa.Table.from_pylist(records, schema=FATE_SCHEMA)


@dataclass(slots=True)
class StageCount:
    """The conservation law of one stage: num_in = num_kept + dropped (by reason) + quarantined (by reason)."""

    num_in: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @property
    def num_dropped(self) -> int:
        return self.dropped.total()

    @property
    def num_quarantined(self) -> int:
        return self.quarantined.total()

    def check(self, stage: str) -> None:
        """Asserts the conservation law. A violation is a bug of ours, so it is an AssertionError, not a user error."""
        num_out = self.num_kept + self.num_dropped + self.num_quarantined
        assert self.num_in == num_out, (
            f"stage {stage} lost rows: {self.num_in} in, {self.num_kept} kept + {self.num_dropped} dropped "
            f"+ {self.num_quarantined} quarantined = {num_out} out"
        )

    def __add__(self, other: StageCount) -> StageCount:
        return StageCount(
            self.num_in + other.num_in,
            self.num_kept + other.num_kept,
            self.dropped + other.dropped,
            self.quarantined + other.quarantined,
        )

    def to_record(self) -> dict[str, object]:
        """Returns plain JSON-able values; `from_record` is the inverse."""
        return {
            "in": self.num_in,
            "kept": self.num_kept,
            "dropped": dict(sorted(self.dropped.items())),
            "quarantined": dict(sorted(self.quarantined.items())),
        }

    @classmethod
    def from_record(cls, record: dict[str, object]) -> StageCount:
        dropped, quarantined = record["dropped"], record["quarantined"]
        num_in, num_kept = record["in"], record["kept"]
        assert isinstance(dropped, dict) and isinstance(quarantined, dict)
        assert isinstance(num_in, int) and isinstance(num_kept, int)
        return cls(num_in, num_kept, Counter(dropped), Counter(quarantined))


def count_stage(num_in: int, num_kept: int, fates: Iterable[Fate]) -> StageCount:
    """Returns the count of a stage from what went in, what was kept and the fates of the rest."""
    return count_table(num_in, num_kept, fates_to_table(fates))


def count_table(num_in: int, num_kept: int, fates: pa.Table) -> StageCount:
    """Returns the count of a stage whose fates are a table with `FATE_SCHEMA`."""
    count = StageCount(num_in=num_in, num_kept=num_kept)
    grouped = fates.group_by(["exit", "reason"]).aggregate([([], "count_all")])
    for group in grouped.to_pylist():
        by_reason = count.dropped if group["exit"] == Exit.DROPPED else count.quarantined
        by_reason[group["reason"]] += group["count_all"]
    return count
