"""The report of a large corpus: seconds and resident memory of counting, drawing, picking rows and writing the page.

    .venv/bin/python -m benchmarks.report [--rows 1000000] [--asked 20000] [--folder FOLDER]

A synthetic corpus of so many rows is written by the project's own writer, with small images, nine topics, five sources,
traces on a third of the rows, and a fifth as many rows again that left. It is not timed, and is kept where a folder
is named. Then a fresh process makes the report from it, as `bimode curate` does at the end of a run, with the stored
replies to the first `--asked` rows. Printed are the seconds of each part, the peak of resident memory, and the size of
the page. The targets are 60 s and 2 GiB for a million rows.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from corpus.tally import tally_corpus
from corpus.versions import FATES, REPORT
from corpus.writer import write_fates, write_shards
from flows.reporting import ReportFacts, write_report
from flows.runtime import Runtime
from flows.stages import DUPLICATES
from flows.work_rows import WorkRow, work_table
from flows.workspace import Workspace
from judges.performance import performance_request
from schemas.config import RunConfig, parse_config
from schemas.fates import FATE_SCHEMA, Exit, Fate, StageCount, count_table
from schemas.requests import Reply, TeacherRequest
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.usage import Usage, UsageKey
from schemas.verdicts import Decision, Heuristic, Mode
from teacher.client import reply_key
from teacher.journal import Journal

SOURCES = ("charts", "textbooks", "photographs", "talks", "forms")
SHARD = "charts-00000"
NUM_IMAGES = 200
WORDS = np.array(
    ["the", "sum", "of", "two", "bars", "is", "larger", "than", "what", "one", "half", "shows", "so", "count", "dots"]
)
SHARD_ROWS = 5000
TARGET_SECONDS, TARGET_GIB = 60.0, 2.0
_ROWS_PER_LEAVER = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process needed. tally_seconds: of the count alone, which is part of all_seconds. peak: resident bytes."""

    tally_seconds: float
    all_seconds: float
    peak_bytes: int
    page_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the corpus")
    parser.add_argument("--asked", type=int, default=20_000, help="rows whose replies are stored")
    parser.add_argument("--folder", type=Path, help="keep the corpus here, and take one that is there")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "version" / FATES).exists():
            make_corpus(folder, arguments.rows, min(arguments.asked, arguments.rows))
        measured = measure(folder, arguments.rows)
    gib = measured.peak_bytes / 2**30
    print(f"{arguments.rows:,} rows, replies stored for {min(arguments.asked, arguments.rows):,}")
    print(f"count the shards           {measured.tally_seconds:8.1f} s")
    print(f"report, the count included {measured.all_seconds:8.1f} s, target {TARGET_SECONDS:g} s")
    print(f"peak of resident memory    {gib:8.2f} GiB, target {TARGET_GIB:g} GiB")
    print(f"page                       {measured.page_bytes / 1e6:8.2f} MB")


def configuration(folder: Path) -> RunConfig:
    source = {"name": SOURCES[0], "format": "jsonl", "path": str(folder / "none.jsonl")}
    return parse_config({"workdir": str(folder / "work"), "sources": [source], "teacher": {"model": "teacher"}})


def make_corpus(folder: Path, num_rows: int, num_asked: int) -> None:
    """Writes shards and fates of a version, and the work rows and stored replies of its first rows."""
    images = dict(encoded_images())
    refs = [ImageRef(sha256, 32, 24) for sha256 in images]
    write_shards(
        (
            labelled_table(labelled_row(number, refs) for number in range(start, min(start + SHARD_ROWS, num_rows)))
            for start in range(0, num_rows, SHARD_ROWS)
        ),
        folder / "version",
        shard_rows=SHARD_ROWS,
        read_image=images.__getitem__,
        recipe="recipe",
    )
    store_replies(folder, [labelled_row(number, refs).sample for number in range(num_asked)])
    write_fates(fates(num_rows, refs), folder / "version" / FATES)


def encoded_images() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    for _ in range(NUM_IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((32, 24), Image.Resampling.NEAREST).save(
            buffer, "PNG"
        )
        yield hashlib.sha256(buffer.getvalue()).hexdigest(), buffer.getvalue()


def words(number: int, num_words: int) -> str:
    """Returns a text that depends on the number alone."""
    return " ".join(WORDS[np.random.default_rng(number).integers(0, len(WORDS), num_words)])


def labelled_row(number: int, refs: list[ImageRef]) -> LabelledSample:
    """Returns a row: a third thinks, one in ten is open-ended, one in fifty is audited."""
    topic, source = list(Topic)[number * number % 9], SOURCES[number % 7 % 5]
    is_open, thinks = number % 10 == 9, number % 3 == 0
    sample = Sample(
        id=row_id(number),
        source=source,
        origin=f"{source}:rows.jsonl#{number}",
        question=f"{number}: {words(number, 12)}?",
        images=() if topic is Topic.TEXT else (refs[number % len(refs)],),
        choices=("red", "blue", "green") if number % 4 == 0 else (),
        answer=None if is_open else "B" if number % 4 == 0 else str(number % 97),
        topic=topic,
        kind=Kind.SUBJECTIVE if is_open else Kind.OBJECTIVE,
        answer_type=AnswerType.OPEN if is_open else AnswerType.CHOICE if number % 4 == 0 else AnswerType.COUNT,
        licence="CC-BY-4.0" if source == "charts" else None,
    )
    mode = Mode.THINK if thinks else Mode.DIRECT
    if is_open:
        decision = Decision(mode, Heuristic.DIFFICULTY, probability=(0.5 if thinks else 0.0) + number % 50 / 101)
    else:
        num_sampled = 8 if thinks or number % 50 == 0 else 1
        decision = Decision(
            mode,
            Heuristic.PERFORMANCE,
            0 if thinks else 1 + number % num_sampled,
            num_sampled,
            num_sampled,
            is_audit=number % 50 == 0,
        )
    trace = words(number, 20 + number % 150) if thinks else ""
    return LabelledSample(sample, decision, trace, sample.answer or "a picture", "teacher", "teacher" if thinks else "")


def row_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def fates(num_rows: int, refs: list[ImageRef]) -> Iterator[Fate]:
    """Yields a row that left for every five in the corpus: mostly duplicates of those."""
    for number in range(num_rows // _ROWS_PER_LEAVER):
        source, question = SOURCES[number % 5], f"{number}: {words(number, 12)}?"
        origin, images = f"{source}:rows.jsonl#-{number}", (refs[number % len(refs)].sha256,)
        if number % 100 == 0:
            detail = "the image is cut short"
            yield Fate(
                origin, None, source, "sources", Exit.QUARANTINED, "image_unreadable", detail, None, None, question
            )
        elif number % 10 == 0:
            detail = "4 tries failed: trace_answer_wrong: it ends in '7'"
            yield Fate(
                origin,
                f"{number:032x}",
                source,
                "reasoning",
                Exit.DROPPED,
                "trace_answer_wrong",
                detail,
                None,
                None,
                question,
                images,
            )
        else:
            yield Fate(
                origin,
                f"{number:032x}",
                source,
                "duplicates",
                Exit.DROPPED,
                "duplicate_near",
                "like another",
                row_id(number),
                0.8 + number % 20 / 100,
                question,
                images,
            )


def store_replies(folder: Path, samples: Sequence[Sample]) -> None:
    """Writes the rows as they were before labelling, and one stored reply to each checkable one."""
    workspace, config = Workspace(folder / "work"), configuration(folder)
    workspace.finish_shard(
        DUPLICATES,
        SHARD,
        digest="written",
        num_in=len(samples),
        rows=work_table(WorkRow(sample) for sample in samples),
        fates=FATE_SCHEMA.empty_table(),
    )
    records: list[tuple[str, TeacherRequest, Reply]] = []
    for sample in samples:
        if sample.kind is Kind.OBJECTIVE:
            request = performance_request(sample, 0, config.performance, seed=config.seed)
            reply = Reply(f"{words(len(records), 30)}\nAnswer: 7", "stop", "teacher", completion_tokens=40)
            records.append((reply_key(request, config.teacher), request, reply))
    with Journal(workspace.journal_path("performance", SHARD)) as journal:
        asyncio.run(journal.append_many_durably(records))
        journal.compact()


def measure(folder: Path, num_rows: int) -> Measured:
    """Makes the report in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(folder, num_rows, sender))
    process.start()
    sender.close()
    measured: Measured = receiver.recv()
    process.join()
    return measured


def _measure(folder: Path, num_rows: int, sender: Connection) -> None:
    version, runtime = folder / "version", Runtime(configuration(folder))
    counts = stage_counts(num_rows, version)
    usage = {UsageKey("performance", "performance", name, "teacher"): Usage(9, 9, 0, 0, 0, 900, 90) for name in SOURCES}
    facts = ReportFacts(
        version="v0001", created="2026-01-01T00:00:00Z", recipe="r", inputs="i", counts=counts, costs=usage, paid=usage
    )
    began = time.monotonic()
    tally = tally_corpus(version)
    counted = time.monotonic()
    try:
        write_report(runtime, version, facts, tally=tally)
    finally:
        runtime.close()
    ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(Measured(counted - began, ended - began, peak, (version / REPORT).stat().st_size))


def stage_counts(num_rows: int, version: Path) -> dict[str, StageCount]:
    """Returns counts that fit the rows and fates written."""
    left = pq.read_table(version / FATES, columns=["stage", "exit", "reason"])
    counts, num_in = {}, num_rows + left.num_rows
    for stage in ("sources", "duplicates", "performance", "reasoning"):
        gone = left.filter(pc.field("stage") == stage)
        counts[stage] = count_table(num_in, num_in - gone.num_rows, gone)
        num_in = counts[stage].num_kept
    return counts


if __name__ == "__main__":
    main()
