"""Small versions that are right in every respect, to be looked up, compared, validated, and damaged."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from corpus import versions
from corpus.card import CardInputs, build_card, mode_sizes
from corpus.lineage import MARK_SCHEMA, write_marks
from corpus.storage import file_sha256, write_text
from corpus.tally import tally_corpus
from corpus.versions import MARKS, begin_version, commit_version, load_manifest
from corpus.writer import ShardInfo, write_fates, write_shards
from schemas.fates import Fate, StageCount, count_stage
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, content_id
from schemas.verdicts import Decision, Heuristic, Mode

RECIPE = "ab" * 32


def encoded_image(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {hashlib.sha256(content).hexdigest(): content for content in map(encoded_image, range(4))}


def a_row(number: int, *, thinks: bool = False, question: str | None = None, **sample: Any) -> LabelledSample:
    """Returns a row with an image and the id of its content. sample: fields in place of the usual ones."""
    image = ImageRef(sorted(IMAGES)[number % len(IMAGES)], 6, 4)
    content = Sample(
        id="",
        source="tests",
        origin=f"tests:file#{number}",
        question=f"How many dots does picture {number} show?" if question is None else question,
        images=(image,),
        answer="7",
        source_id=f"q{number}",
        topic=Topic.MATH,
        kind=Kind.OBJECTIVE,
        answer_type=AnswerType.COUNT,
        licence="MIT",
    )
    content = replace(content, **sample)
    names = [shown.sha256 for shown in content.images]
    id_ = content_id(content.source, content.question, names, content.choices, content.answer, content.source_id)
    decision = Decision(
        Mode.THINK if thinks else Mode.DIRECT, Heuristic.PERFORMANCE, 0 if thinks else 1, 8 if thinks else 1, 8
    )
    if content.kind is Kind.SUBJECTIVE:
        decision = Decision(decision.mode, Heuristic.DIFFICULTY, probability=0.9 if thinks else 0.2)
    thought = f"Three and four make seven, says step {number}." if thinks else ""
    return LabelledSample(replace(content, id=id_), decision, thought, "7", "teacher", "reasoner" if thinks else "")


def some_rows(*, think: int = 4, direct: int = 5) -> list[LabelledSample]:
    return [*(a_row(n, thinks=True) for n in range(think)), *(a_row(100 + n) for n in range(direct))]


def write_version(
    folder: Path,
    rows: Sequence[LabelledSample],
    fates: Sequence[Fate] = (),
    *,
    recipe: str = RECIPE,
    marks: Sequence[tuple[str, str, str]] = (),
    shard_rows: int = 3,
    has_card: bool = True,
) -> Path:
    """Publishes the next version of a corpus, and returns its folder.

    marks: (id, mark, since) of rows that the run did not have. has_card: its real card, else a stand-in to save time.
    """
    building = begin_version(folder)
    tables, read_image = [labelled_table(rows)], IMAGES.__getitem__
    shards = write_shards(tables, building, shard_rows=shard_rows, read_image=read_image, recipe=recipe)
    write_fates(fates, building / "fates.parquet")
    marked = [dict(zip(MARK_SCHEMA.names, mark, strict=True)) for mark in marks]
    write_marks(pa.Table.from_pylist(marked, MARK_SCHEMA), building / MARKS)
    num_read = len(rows) - len(marks)
    counts = {
        "duplicates": count_stage(num_read + len(fates), num_read, fates),
        "corpus": count_stage(num_read, num_read, []),
    }
    write_text(building / "README.md", _card(building, shards, counts, recipe) if has_card else "a stand-in")
    for name in ("report.html", "report.json"):
        write_text(building / name, "{}")
    created = "2026-01-01T00:00:00Z"
    committed = commit_version(
        building, name="tests", created=created, recipe=recipe, inputs="in", shards=shards, counts=counts
    )
    return committed.folder


def _card(building: Path, shards: Sequence[ShardInfo], counts: Mapping[str, StageCount], recipe: str) -> str:
    sizes = mode_sizes(shards)
    return build_card(
        CardInputs("tests", "v0001", "now", "mit", recipe, "teacher", "", counts, tally_corpus(building), sizes)
    )


def rewrite_manifest(version: Path, change: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
    """Makes the manifest of a version fit its files again, checksums and all, as someone would who hides a change."""
    path = version / "manifest.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for file in (*record["shards"], *record["files"]):
        file["sha256"], file["num_bytes"] = file_sha256(version / file["path"]), (version / file["path"]).stat().st_size
    change(record)
    lines = [f"{shard['sha256']}  {shard['path']}\n" for shard in record["shards"]]
    record["digest"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    record["checksum"] = versions.manifest_checksum(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    if record["format"] == 2:
        load_manifest(version)


def rewrite_shard(
    version: Path, change: Callable[[list[dict[str, Any]]], object], *, path: str = "data/think/00000.parquet"
) -> str:
    """Changes the rows of a shard in a valid Parquet file with a manifest that fits, and returns its path."""
    file = version / path
    table = pq.read_table(file, partitioning=None)
    records = table.to_pylist()
    change(records)
    file.unlink()  # It may be read-only.
    pq.write_table(pa.Table.from_pylist(records, table.schema), file)

    def fit(record: dict[str, Any]) -> None:
        shard = next(shard for shard in record["shards"] if shard["path"] == path)
        for mode in ("think", "direct"):
            shard[f"num_{mode}"] = len(records) if f"/{mode}/" in path else 0

    rewrite_manifest(version, fit)
    return path
