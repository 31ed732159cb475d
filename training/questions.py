"""The questions that BPO asks: the checkable rows of a corpus, as prompts with images and a reference to judge by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import TrainingError
from schemas.samples import Kind, Sample, Topic, sample_from_record
from training.rows import decode_rows, load_rows, measure_prompts

COLUMNS = (
    "id",
    "prompt",
    "images",
    "question",
    "choices",
    "reference",
    "topic",
    "kind",
    "answer_type",
    "source",
    "origin",
)


@dataclass(frozen=True, slots=True)
class Questions:
    """rows: a dataset of `prompt`, `images` and `sample`. num_skipped: the rows that are not asked, by reason."""

    rows: Any
    num_skipped: dict[str, int]


def load_questions(
    patterns: list[str], processor: Any, folder: Path, *, topics: Sequence[Topic] = (), max_prompt_tokens: int
) -> Questions:
    """Returns the rows whose answers can be checked by rule; the others are counted by reason, never silently gone.

    folder: of the run, which keeps what was measured. topics: only these, if any. max_prompt_tokens: of a prompt with
    its images; longer ones are skipped, never cut.

    Raises TrainingError: no file, a missing column, or no row left. StorageError: the folder cannot be written.
    """
    loaded = load_rows(patterns, COLUMNS)
    labels = loaded.with_format(None).select_columns(["kind", "reference", "topic"])
    wanted = {str(topic) for topic in topics}
    measures = measure_prompts(loaded, processor, folder)
    usable = measures.usable(max_prompt_tokens)
    reasons: Counter[str] = Counter()
    kept = []
    for index, row in enumerate(labels):
        reason = skip_reason(row, wanted) or ("" if usable[index] else measures.reason(index))
        if reason:
            reasons[reason] += 1
        else:
            kept.append(index)
    if not kept:
        raise TrainingError(f"{patterns} hold no question that can be checked by rule: {dict(reasons)} were skipped")
    return Questions(loaded.select(kept).with_transform(question_rows), dict(reasons))


def skip_reason(row: dict[str, Any], topics: set[str]) -> str:
    """Returns why a row cannot be asked, or "". topics: only these may, if any."""
    if row["kind"] != Kind.OBJECTIVE:
        return "not_objective"
    if not row["reference"]:
        return "no_reference"
    if topics and row["topic"] not in topics:
        return "other_topic"
    return ""


def question_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns corpus rows as the trainer's: `prompt`, `images`, and the `sample` that the reward judges by."""
    decoded = decode_rows(batch)
    records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return {
        "prompt": decoded["prompt"],
        "images": decoded["images"],
        "sample": [_sample(record) for record in records],
    }


def _sample(record: dict[str, Any]) -> Sample:
    """Returns the question of a corpus row as verification needs it, without its images."""
    left_out: dict[str, Any] = {"images": [], "source_id": None, "licence": None}
    return sample_from_record({**record, **left_out, "answer": record["reference"]})
