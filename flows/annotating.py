"""The human check: rows and stored replies of a corpus go out to people, their marks come back, and every later report
says how far the judges agree with them.

Marks are about questions and replies, not about verdicts: the judge they are held against is that of the version at
hand, so a changed threshold, teacher or verifier is checked against the same marks without asking anyone again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import polars as pl

from corpus.agreement import AgreementEntry, Ratings, Stratum, agreement_entry, panel_entries, stratified_agreement
from corpus.annotation import (
    ASKED,
    AnnotationItem,
    Check,
    Drawn,
    Mark,
    draw_rows,
    item_id,
    read_drawn,
)
from corpus.annotation_csv import TABLE, read_table, write_table
from corpus.label_studio import CONFIG, TASKS, read_export, write_project
from corpus.marks import Annotations, KeyEntry, Problems, StoredMark, settle_marks
from corpus.storage import storage_errors, write_text
from corpus.tally import corpus_shards
from flows.panel_votes import panel_agreement
from flows.runtime import Runtime
from flows.stages import RECIPE_VERSION, stage_digest
from flows.workspace import digest_of
from judges import difficulty, performance
from schemas.config import RunConfig
from schemas.errors import ConfigError, CorpusError
from schemas.question import render_question
from schemas.requests import Reply
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.verdicts import Heuristic, Mode, Verdict
from teacher.client import reply_key
from teacher.replies import scan_replies


class FileFormat(StrEnum):
    """What people mark the sample in."""

    CSV = "csv"
    LABEL_STUDIO = "label-studio"


INSTRUCTIONS = "README.txt"
_JUDGES: Mapping[Check, str] = {Check.DIFFICULTY: "difficulty judge", Check.VERIFIER: "answer verifier"}
_REPLIES_AT_ONCE = 500
_COLUMNS = ["id", "mode", "heuristic", "question", "choices", "reference", "topic", "kind", "answer_type", "source"]

_HELP = f"""Each line or task asks one thing of one question. Please answer yes, no or can't tell.

"{ASKED[Check.DIFFICULTY]}"
  yes: one has to think in several steps: compute, compare, deduce, plan, weigh up.
  no: a look at the image, or what one knows, is enough.

"{ASKED[Check.VERIFIER]}"
  yes: the final answer of the reply means the same as the reference, however it is written.
  no: it does not, or there is no final answer.
  The reference counts as right, also where you doubt it; say so in the comment.

Please do not look up what others said. Leave out what you do not want to answer.
"""
_HELP_CSV = f"""
{TABLE}: write into the column `mark`, and your name into `annotator` (or say it when the file is read). Images
lie in the folder `images` under the names in the table. Send the table back as CSV; its columns may be moved. An
apostrophe before =, +, - or @ is ours: it keeps your spreadsheet from computing the text.
"""
_HELP_LABEL_STUDIO = f"""
Label Studio: make a project, paste {CONFIG} as the labeling interface (Settings, Labeling Interface, Code), and
import {TASKS}. When it is marked, export as JSON.
"""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written for people. num_items: by check. num_missing: replies drawn that are not stored any more, or
    that the verifier now judges otherwise."""

    folder: Path
    key: Path
    num_items: Mapping[Check, int]
    num_missing: int

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        items = {str(check): number for check, number in self.num_items.items()}
        return {"folder": str(self.folder), "key": str(self.key), "items": items, "missing": self.num_missing}


def export_annotations(
    runtime: Runtime,
    version_folder: Path,
    output: Path,
    *,
    num_rows: int,
    checks: Sequence[Check],
    file_format: FileFormat,
    near: float = 0.0,
) -> Exported:
    """Writes a sample of a version for people to mark, and its key into the work folder.

    Raises ConfigError: the output folder is not empty, or nothing can be marked. CorpusError, StorageError.
    """
    config = runtime.config
    with storage_errors(output, "use"):
        if output.exists() and any(output.iterdir()):
            raise ConfigError(f"{output} is not empty: marks in it would be lost; name another folder")
    drawn = draw_rows(
        version_folder,
        num_rows=num_rows,
        checks=checks,
        seed=config.seed,
        threshold=config.difficulty.threshold,
        near=near,
    )
    asked: dict[str, tuple[AnnotationItem, KeyEntry]] = {}
    for item, entry in _asked_items(runtime, drawn):
        num_before = asked[item.id][1].num_equal if item.id in asked else 0
        asked[item.id] = (item, replace(entry, num_equal=num_before + 1))
    if not asked:
        raise ConfigError(f"{version_folder} holds nothing to be marked: {', '.join(checks)} judged none of its rows")
    # The order tells nothing, and questions of one kind stay together.
    pairs = sorted(asked.values(), key=lambda pair: (pair[0].check, pair[0].id))
    items = [item for item, _ in pairs]
    write, how = (write_table, _HELP_CSV) if file_format is FileFormat.CSV else (write_project, _HELP_LABEL_STUDIO)
    write(items, output)
    write_text(output / INSTRUCTIONS, _HELP + how)
    key = annotations_of(runtime).write_key((entry for _, entry in pairs), time=_now())
    numbers = Counter(item.check for item in items)
    return Exported(output, key, dict(numbers), len(drawn) - sum(entry.num_equal for _, entry in pairs))


def annotations_of(runtime: Runtime) -> Annotations:
    return Annotations(runtime.workspace.root / "annotation")


def read_annotations(
    runtime: Runtime, files: Iterable[Path], *, annotator: str | None = None
) -> tuple[list[StoredMark], Problems]:
    """Stores the marks in files that people sent back; returns the new ones, and what is none.

    annotator: who marked tables that do not say so themselves; the name of the file by default.

    Raises ConfigError: nothing was exported from this work folder. SourceError: a file is no export. StorageError.
    """
    annotations, problems = annotations_of(runtime), Problems()
    keys = annotations.read_keys()
    if not keys:
        raise ConfigError(f"nothing was exported from {runtime.workspace.root}: run `bimode annotate` first")
    new: list[StoredMark] = []
    for path in files:
        is_json = path.suffix.lower() == ".json"
        given, unread = read_export(path) if is_json else read_table(path, annotator=annotator or path.stem)
        marks, unsettled = settle_marks(given, keys, annotations.read_marks(), time=(time := _now()))
        problems.add(unread)
        problems.add(unsettled)
        if marks:
            annotations.store_marks(marks, time=time)
        new += marks
    return new, problems


def agreement_figures(runtime: Runtime, version_folder: Path, shards: Iterable[str]) -> dict[str, Any]:
    """Returns the report's figures of agreement as plain values: {"entries": [...]}; no entries if nobody was asked.

    version_folder: a version, finished or being built. shards: those whose difficulty verdicts count for the panel.
    Raises CorpusError, StorageError.
    """
    entries = [*human_agreement(runtime, version_folder), *panel_agreement(runtime, shards)]
    return {"entries": [entry.to_record() for entry in entries]}


def human_agreement(runtime: Runtime, version_folder: Path) -> list[AgreementEntry]:
    """Returns how far each judge agrees with the people, each single person, and they with each other.

    Raises CorpusError, StorageError.
    """
    annotations = annotations_of(runtime)
    marks = annotations.read_marks()
    if not marks:
        return []
    keys = annotations.read_keys()
    rows = _rows_of(version_folder, {mark.row_id for mark in marks.values()})
    entries = []
    for check in Check:
        by_item: dict[str, dict[str, Mark]] = {}
        for (annotator, item), mark in marks.items():
            if mark.check is check and item in keys:
                by_item.setdefault(item, {})[annotator] = mark.mark
        if by_item:
            verdicts = _verdicts(runtime, [keys[item] for item in by_item], rows)
            entries += _entries_of(check, by_item, verdicts, keys)
    return entries


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _judge_digest(check: Check, config: RunConfig) -> str:
    if check is Check.DIFFICULTY:
        return stage_digest(difficulty.PURPOSE, config, "")
    return digest_of(RECIPE_VERSION, config.verification.model_dump(exclude={"num_workers"}))


def _asked_items(runtime: Runtime, drawn: Sequence[Drawn]) -> Iterator[tuple[AnnotationItem, KeyEntry]]:
    """Yields what people are asked and the key to it; replies that are not found are left out."""
    for check in Check:
        rows = [row for row in drawn if row.check is check]
        for start in range(0, len(rows), _REPLIES_AT_ONCE):
            some = rows[start : start + _REPLIES_AT_ONCE]
            is_verifier = check is Check.VERIFIER
            stored = _stored_replies(runtime, {row.row_id for row in some}) if is_verifier else {}
            for row, record in read_drawn(some):
                reply = _reply_drawn(runtime, row, record, stored) if is_verifier else ""
                if reply is not None:
                    yield _item(row, record, reply), _key(row, record, reply, runtime.config)


def _item(row: Drawn, record: Mapping[str, Any], reply: str) -> AnnotationItem:
    reference = (record["reference"] or "") if row.check is Check.VERIFIER else ""
    images = tuple(image["bytes"] for image in record["images"])
    question = render_question(_sample(record))
    return AnnotationItem(item_id(row.check, row.row_id, reply), row.check, question, reference, reply, images)


def _key(row: Drawn, record: Mapping[str, Any], reply: str, config: RunConfig) -> KeyEntry:
    return KeyEntry(
        item_id(row.check, row.row_id, reply),
        row.check,
        row.row_id,
        record["source"],
        reply,
        row.verdict,
        _judge_digest(row.check, config),
        row.stratum,
        row.num_in_stratum,
        row.num_drawn,
    )


def _sample(record: Mapping[str, Any]) -> Sample:
    """Returns the sample of a corpus record, as far as judges look at it."""
    images = (hashlib.sha256(image["bytes"]).hexdigest() for image in record.get("images", ()))
    return Sample(
        record["id"],
        record["source"],
        "",
        record["question"],
        tuple(ImageRef(sha256, 0, 0) for sha256 in images),
        tuple(record["choices"]),
        record["reference"],
        topic=Topic(record["topic"]) if record["topic"] else None,
        kind=Kind(record["kind"]) if record["kind"] else None,
        answer_type=AnswerType(record["answer_type"]) if record["answer_type"] else None,
    )


def _stored_replies(runtime: Runtime, row_ids: set[str]) -> dict[str, Reply]:
    """Returns the stored answers to some rows by their key; none if no answer was ever drawn."""
    folder = runtime.workspace.root / "journals" / performance.PURPOSE
    if not folder.is_dir():
        return {}
    wanted = scan_replies(folder, check=False).filter(
        pl.col("sample_id").is_in(sorted(row_ids)) & (pl.col("purpose") == performance.PURPOSE)
    )
    found = wanted.select("key", "text", "finish_reason", "model").collect(engine="streaming")
    return {key: Reply(text, reason, model) for key, text, reason, model in found.iter_rows()}


def _reply_drawn(runtime: Runtime, row: Drawn, record: Mapping[str, Any], stored: Mapping[str, Reply]) -> str | None:
    """Returns the text of the reply that is meant: the one of its turn among those with its verdict; else None."""
    config, sample = runtime.config, _sample(record)
    first = performance.performance_request(sample, 0, config.performance, seed=config.seed)
    replies = []
    for index in range(record["num_sampled"]):
        reply = stored.get(reply_key(first.sample(index), config.teacher))
        if reply is None:
            break
        replies.append(reply)
    verdicts = runtime.verifiers.verify_many([(reply.text, sample, reply.is_truncated) for reply in replies])
    alike = [reply.text for reply, verdict in zip(replies, verdicts, strict=True) if _as_mark(verdict) is row.verdict]
    return alike[row.turn] if row.turn < len(alike) else None


def _as_mark(verdict: Verdict) -> Mark | None:
    """Returns a verdict as a person would mark it; an unscored one is none."""
    return (Mark.YES if verdict.is_correct else Mark.NO) if verdict.is_scored else None


def _rows_of(version_folder: Path, row_ids: set[str]) -> dict[str, dict[str, Any]]:
    """Returns some rows of a version by their id, without images."""
    shards = corpus_shards(version_folder)
    if not shards:
        return {}
    try:
        with storage_errors(version_folder, "read the rows of"):
            scan = pl.scan_parquet(shards).filter(pl.col("id").is_in(sorted(row_ids))).select(_COLUMNS)
            return {row["id"]: row for row in scan.collect(engine="streaming").iter_rows(named=True)}
    except pl.exceptions.PolarsError as error:
        raise CorpusError(f"the rows of {version_folder} cannot be read: {error}") from error


def _verdicts(runtime: Runtime, keys: Sequence[KeyEntry], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mark]:
    """Returns what the judges now say of items; those that they do not judge any more are left out."""
    verdicts: dict[str, Mark] = {}
    to_verify: list[tuple[str, tuple[str, Sample, bool]]] = []
    for key in keys:
        row = rows.get(key.row_id)
        if row is None:
            continue
        if key.check is Check.DIFFICULTY:
            if row["heuristic"] == Heuristic.DIFFICULTY:
                verdicts[key.item] = Mark.YES if row["mode"] == Mode.THINK else Mark.NO
        elif key.judge == _judge_digest(key.check, runtime.config):
            verdicts[key.item] = key.verdict
        else:
            to_verify.append((key.item, (key.reply, _sample(row), False)))
    judged = runtime.verifiers.verify_many([item for _, item in to_verify]) if to_verify else []
    for (item, _), verdict in zip(to_verify, judged, strict=True):
        mark = _as_mark(verdict)
        if mark is not None:
            verdicts[item] = mark
    return verdicts


def _entries_of(
    check: Check,
    by_item: Mapping[str, Mapping[str, Mark]],
    verdicts: Mapping[str, Mark],
    keys: Mapping[str, KeyEntry],
) -> list[AgreementEntry]:
    """by_item: the marks of all annotators for each item of a check."""
    annotators = sorted({annotator for marks in by_item.values() for annotator in marks})
    agreed = {item: consensus(list(marks.values())) for item, marks in by_item.items()}
    who = f"{len(annotators)} people" if len(annotators) > 1 else annotators[0]
    entries = [_entry(f"{_JUDGES[check]} and {who}", check, agreed, verdicts, keys)]
    if len(annotators) > 1:
        for annotator in annotators:
            own = {item: marks[annotator] for item, marks in by_item.items() if annotator in marks}
            entries.append(_entry(f"{_JUDGES[check]} and {annotator}", check, own, verdicts, keys))
        ratings: Ratings = Counter(
            tuple(_answer(marks.get(annotator)) for annotator in annotators) for marks in by_item.values()
        )
        entries += panel_entries(annotators, ratings, what=f"people among themselves: {ASKED[check]}")
    return entries


def consensus(marks: Sequence[Mark]) -> Mark | None:
    """Returns what most people who could tell say of an item: "can't tell" if none could, None if they are divided."""
    num_yes, num_no = marks.count(Mark.YES), marks.count(Mark.NO)
    if num_yes == num_no:
        return None if num_yes else Mark.CANT_TELL
    return Mark.YES if num_yes > num_no else Mark.NO


def _answer(mark: Mark | None) -> str | None:
    return str(mark) if mark in (Mark.YES, Mark.NO) else None


def _entry(
    name: str,
    check: Check,
    marks: Mapping[str, Mark | None],
    verdicts: Mapping[str, Mark],
    keys: Mapping[str, KeyEntry],
) -> AgreementEntry:
    """Returns how far a judge agrees with one mark for each item, weighted back to the rows of the corpus."""
    cells: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for item, mark in marks.items():
        if item in verdicts and mark in (Mark.YES, Mark.NO):
            key = keys[item]
            cells.setdefault((key.export, key.stratum), Counter())[verdicts[item], str(mark)] += key.num_equal
    sizes = {(key.export, key.stratum): key.num_in_stratum for key in keys.values()}
    strata = weighted_strata(cells, sizes)
    left_out = {
        "could not be told": sum(mark is Mark.CANT_TELL for mark in marks.values()),
        "are divided": sum(mark is None for mark in marks.values()),
        "are not judged any more": sum(item not in verdicts for item in marks),
    }
    note = "".join(f"{number:,} {reason}. " for reason, number in left_out.items() if number)
    return agreement_entry(name, ASKED[check], stratified_agreement(strata), note=note.strip())


def weighted_strata(
    cells: Mapping[tuple[str, str], Mapping[tuple[str, str], int]], sizes: Mapping[tuple[str, str], int]
) -> list[Stratum]:
    """Returns the strata of all exports. cells, sizes: by (export, stratum).

    Within an export a marked row stands for its stratum's rows over its marks, whoever left some out. Each export
    estimates the same by itself, so that they count by their number of marks.
    """
    num_marks: Counter[str] = Counter()
    num_rows: Counter[str] = Counter()
    for (export, stratum), table in cells.items():
        num_marks[export] += sum(table.values())
        num_rows[export] += sizes[export, stratum]
    strata = []
    for (export, stratum), table in cells.items():
        size, number = sizes[export, stratum], sum(table.values())
        weight = size / number * num_marks[export] / num_rows[export]
        strata.append(Stratum(table, weight, min(1.0, number / size)))
    return strata
