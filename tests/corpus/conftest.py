"""Rows, images and small versions to test the corpus with."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from corpus.card import CardInputs, build_card, mode_sizes
from corpus.excerpts import pick_fates, pick_rows
from corpus.report import ReportInputs, build_report
from corpus.storage import write_text
from corpus.tally import tally_corpus
from corpus.versions import Base, Committed, begin_version, commit_version
from corpus.writer import ShardInfo, write_fates, write_shards
from schemas.fates import Exit, Fate, StageCount, count_stage
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.usage import Usage, UsageKey
from schemas.verdicts import Decision, Heuristic, Mode

RECIPE = "recipe-1"
USAGE_KEY = UsageKey("performance", "performance", "tests", "teacher")


def encoded_image(colour: str, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class World:
    """Makes rows and remembers their images."""

    store: dict[str, bytes] = field(default_factory=dict)

    def image(self, colour: str, size: tuple[int, int] = (6, 4)) -> ImageRef:
        content = encoded_image(colour, size)
        sha256 = hashlib.sha256(content).hexdigest()
        self.store[sha256] = content
        return ImageRef(sha256, *size)

    def row(
        self,
        number: int,
        *,
        reasoning: str = "",
        colours: Sequence[str] = ("red",),
        question: str | None = None,
        answer: str = "7",
        choices: tuple[str, ...] = (),
        topic: Topic | None = Topic.MATH,
        source: str = "tests",
        decision: Decision | None = None,
        licence: str | None = "MIT",
    ) -> LabelledSample:
        sample = Sample(
            id=hashlib.sha256(f"{source}{number}".encode()).hexdigest()[:32],
            source=source,
            origin=f"{source}:file#{number}",
            question=f"How many dots does picture {number} show?" if question is None else question,
            images=tuple(self.image(colour) for colour in colours),
            choices=choices,
            answer=answer,
            topic=topic,
            kind=Kind.OBJECTIVE,
            answer_type=AnswerType.COUNT,
            licence=licence,
        )
        if decision is None:
            mode = Mode.THINK if reasoning else Mode.DIRECT
            decision = Decision(
                mode, Heuristic.PERFORMANCE, num_right=0 if reasoning else 1, num_scored=8, num_sampled=8
            )
        return LabelledSample(sample, decision, reasoning, answer, "teacher", "reasoner" if reasoning else "")

    def rows(self, *, think: int, direct: int) -> list[LabelledSample]:
        thinking = [self.row(n, reasoning=f"Three and four make seven, says step {n}.") for n in range(think)]
        return [*thinking, *(self.row(1000 + n, colours=("blue", "lime")) for n in range(direct))]

    def read_image(self, sha256: str) -> bytes:
        return self.store[sha256]


def dropped(number: int, reason: str = "near_duplicate", **values: object) -> Fate:
    fields: dict[str, object] = {"question": "Which is it?", "detail": "like another one", **values}
    return Fate(f"tests:file#d{number}", f"{number:032x}", "tests", "duplicates", Exit.DROPPED, reason, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Built:
    """A version ready to be committed."""

    building: Path
    shards: list[ShardInfo]
    counts: Mapping[str, StageCount]
    html: str
    figures: dict[str, object]

    base: Base | None = None

    def commit(self, created: str = "2026-01-01T00:00:00Z", *, lineage: str = "") -> Committed:
        return commit_version(
            self.building,
            name="tests",
            created=created,
            recipe=RECIPE,
            inputs="inputs-1",
            shards=self.shards,
            counts=self.counts,
            lineage=lineage,
            base=self.base,
        )


def build(
    folder: Path,
    world: World,
    rows: Sequence[LabelledSample],
    fates: Sequence[Fate] = (),
    *,
    shard_rows: int = 3,
    is_whole: bool = False,
) -> Built:
    """Builds what a version holds; a whole one has its real card and report, else stand-ins save time."""
    building = begin_version(folder)
    shards = write_shards(
        [labelled_table(rows)], building, shard_rows=shard_rows, read_image=world.read_image, recipe=RECIPE
    )
    left = [*fates, *(fate for shard in shards for fate in shard.fates)]
    write_fates(left, building / "fates.parquet")
    num_read = len(rows) + len(fates)
    num_written = sum(shard.num_rows for shard in shards)
    counts = {
        "duplicates": count_stage(num_read, len(rows), fates),
        "corpus": count_stage(len(rows), num_written, [fate for shard in shards for fate in shard.fates]),
    }
    if is_whole:
        html, figures = write_companions(building, world, counts, shards)
    else:
        html, figures = "", {}
        for name in ("report.html", "report.json", "README.md"):
            write_text(building / name, "a stand-in")
    return Built(building, shards, counts, html, figures)


def write_companions(
    building: Path, world: World, counts: Mapping[str, StageCount], shards: Sequence[ShardInfo]
) -> tuple[str, dict[str, object]]:
    """Writes card and report as a curation does."""
    tally = tally_corpus(building)
    inputs = ReportInputs(
        name="tests",
        version="v0001",
        created="2026-01-01T00:00:00Z",
        recipe=RECIPE,
        inputs="inputs-1",
        teacher="teacher",
        reasoner="reasoner",
        stages=counts,
        tally=tally,
        costs={USAGE_KEY: Usage(48, 96, 0, 2, 0, 4800, 900, 1000, 14.5)},
        paid={USAGE_KEY: Usage(40, 80, 16, 2, 1, 4000, 800, 1000, 12.5, 3.0)},
        rows=pick_rows(building),
        fates=pick_fates(building / "fates.parquet", read_image=world.read_image),
    )
    html, figures = build_report(inputs)
    write_text(building / "report.html", html)
    write_text(building / "report.json", json.dumps(figures))
    sizes = mode_sizes(shards)
    card = CardInputs("tests", "v0001", inputs.created, "mit", RECIPE, "teacher", "reasoner", counts, tally, sizes)
    write_text(building / "README.md", build_card(card))
    return html, figures


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def build_version(tmp_path: Path, world: World) -> Callable[..., Built]:
    def build_in_folder(rows: Sequence[LabelledSample], fates: Sequence[Fate] = (), *, is_whole: bool = False) -> Built:
        return build(tmp_path / "corpus", world, rows, fates, is_whole=is_whole)

    return build_in_folder


@pytest.fixture
def dropped_fate() -> Callable[..., Fate]:
    return dropped
