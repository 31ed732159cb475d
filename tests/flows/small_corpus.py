"""Small corpus versions to train on, written and committed as a curation does it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image

from corpus.storage import write_text
from corpus.versions import Manifest, begin_version, commit_version, load_manifest
from corpus.writer import write_fates, write_shards
from schemas.fates import StageCount
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.verdicts import Decision, Heuristic, Mode


def encoded_image(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (shade, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def labelled_row(number: int) -> LabelledSample:
    """Returns a row about a picture; every third one thinks."""
    image = ImageRef(hashlib.sha256(encoded_image(number % 5)).hexdigest(), 28, 28)
    sample = Sample(
        id=hashlib.sha256(str(number).encode()).hexdigest()[:32],
        source="tests",
        origin=f"tests:file#{number}",
        question=f"What is {number} plus 3?",
        images=(image,),
        answer=str(number + 3),
        topic=Topic.MATH,
        kind=Kind.OBJECTIVE,
        answer_type=AnswerType.COUNT,
        licence="MIT",
    )
    thought = f"{number} and 3 make {number + 3}." if number % 3 == 0 else ""
    mode = Mode.THINK if thought else Mode.DIRECT
    decision = Decision(mode, Heuristic.PERFORMANCE, num_right=0 if thought else 1, num_scored=8, num_sampled=8)
    return LabelledSample(sample, decision, thought, str(number + 3), "teacher", "reasoner" if thought else "")


def write_version(
    folder: Path, num_rows: int, *, recipe: str = "recipe-1", name: str = "sampleworld"
) -> tuple[Path, Manifest]:
    """Publishes the next version of a corpus with so many rows, and returns its folder and manifest."""
    images = {hashlib.sha256(content).hexdigest(): content for content in map(encoded_image, range(5))}
    rows = [labelled_row(number) for number in range(num_rows)]
    building = begin_version(folder)
    shards = write_shards(
        [labelled_table(rows)], building, shard_rows=100, read_image=images.__getitem__, recipe=recipe
    )
    write_fates([], building / "fates.parquet")
    for companion in ("report.html", "report.json", "README.md"):
        write_text(building / companion, "a stand-in")
    counts = {"corpus": StageCount(num_in=num_rows, num_kept=num_rows)}
    committed = commit_version(
        building,
        name=name,
        created="2026-01-01T00:00:00Z",
        recipe=recipe,
        inputs="inputs",
        shards=shards,
        counts=counts,
    )
    return committed.folder, load_manifest(committed.folder)
