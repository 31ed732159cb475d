"""Writing corpus shards beside what pyarrow alone reaches for the same bytes.

    python -m benchmarks.writing
    python -m benchmarks.writing --rows 4000 --image-kilobytes 300

Ours begins with labelled rows and an image store, as the flow does: it reads and checks every image, renders and checks
every text, writes, flushes to the disk, and computes each shard's sha256. pyarrow begins with our finished shards in
memory and writes them with the same settings, flushed as well: one after the other, which is its way, and for the sake
of comparison two at a time, which is ours. Turns alternate. Compared are medians, and best turns, for machines that
have other work. Processor seconds are shown beside them: ours are spent on two cores at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus import writer
from schemas.config import ImageLimits
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic
from schemas.verdicts import Decision, Heuristic, Mode
from sources.images import ImageStore

BIMODE = "bimode"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--shard-rows", type=int, default=5_000)
    parser.add_argument("--image-kilobytes", type=int, default=40, help="size of an image; a photograph of 1 MP is 100")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bimode-writing-") as folder:
        root = Path(folder)
        store = ImageStore(root / "images", ImageLimits())
        rows = make_rows(arguments.rows, arguments.image_kilobytes * 1000, store)

        def ours() -> list[Path]:
            shards = writer.write_shards(
                [rows], root / "ours", shard_rows=arguments.shard_rows, read_image=store.read, recipe="0" * 64
            )
            return [Path(shard.path) for shard in shards]

        paths = ours()
        num_bytes = sum(path.stat().st_size for path in paths)
        held = [pq.read_table(path, partitioning=None) for path in paths]

        def plain(num_threads: int) -> None:
            (root / "plain").mkdir(exist_ok=True)
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(lambda part: write_plainly(part[1], root / "plain" / f"{part[0]}"), enumerate(held)))

        sides: dict[str, Callable[[], object]] = {
            BIMODE: ours,
            "pyarrow alone": partial(plain, 1),
            "pyarrow, two at a time": partial(plain, 2),
        }
        report(num_bytes, arguments.rows, sides, arguments.turns)


@dataclass(slots=True)
class Turns:
    """What each turn of a side took: seconds on the clock, and of the processor."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def take(self, write: Callable[[], object]) -> None:
        began, used = time.perf_counter(), time.process_time()
        write()
        self.clock.append(time.perf_counter() - began)
        self.processor.append(time.process_time() - used)


def report(num_bytes: int, num_rows: int, sides: Mapping[str, Callable[[], object]], num_turns: int) -> None:
    taken = {name: Turns() for name in sides}
    for _ in range(num_turns):
        for name, write in sides.items():
            taken[name].take(write)
    print(f"{num_rows:,} rows, {num_bytes / 1e6:,.0f} MB, {num_turns} turns")
    print(f"{'':24} {'median s':>9} {'best s':>7} {'processor s':>12} {'MB/s':>7} {'rows/s':>9}  bimode reaches (best)")
    ours = taken[BIMODE]
    for name, turns in taken.items():
        median, best, used = statistics.median(turns.clock), min(turns.clock), min(turns.processor)
        reached = f"{median / statistics.median(ours.clock):.0%} ({best / min(ours.clock):.0%})"
        rates = f"{num_bytes / 1e6 / median:7,.0f} {num_rows / median:9,.0f}"
        print(f"{name:24} {median:9.2f} {best:7.2f} {used:12.2f} {rates}  {reached}")


def write_plainly(table: pa.Table, path: Path) -> None:
    """Writes a table as our writer configures pyarrow, and flushes it."""
    with writer._parquet_writer(
        path, table.schema, coded=writer._CODED_COLUMNS, counted=writer._COUNTED_COLUMNS
    ) as out:
        out.write_table(table, row_group_size=writer.ROW_GROUP_ROWS)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_rows(num_rows: int, image_bytes: int, store: ImageStore) -> pa.Table:
    """Returns labelled rows, every second one with an image of its own that does not compress, as JPEG does not."""
    generator = np.random.default_rng(7)
    words = np.array([f"word{n}" for n in range(5_000)])
    rows = []
    for number in range(num_rows):
        images: tuple[ImageRef, ...] = ()
        if number % 2 and image_bytes:
            content = generator.bytes(image_bytes)
            images = (ImageRef(put(store, content), 640, 480),)
        thinks = number % 3 == 0
        text = " ".join(generator.choice(words, 46))
        sample = Sample(
            id=f"{number:032x}",
            source="synthetic",
            origin=f"synthetic:rows.jsonl#{number}",
            question=text,
            images=images,
            choices=tuple(generator.choice(words, 4)) if number % 4 == 0 else (),
            answer="B",
            topic=Topic.MATH,
            kind=Kind.OBJECTIVE,
            answer_type=AnswerType.CHOICE,
            licence="CC-BY-4.0",
        )
        decision = Decision(Mode.THINK if thinks else Mode.DIRECT, Heuristic.PERFORMANCE, 0 if thinks else 1, 8, 8)
        reasoning = " ".join(generator.choice(words, 150)) if thinks else ""
        rows.append(LabelledSample(sample, decision, reasoning, "B", "teacher", "teacher" if thinks else ""))
    return labelled_table(rows)


def put(store: ImageStore, content: bytes) -> str:
    """Stores bytes that are no image, as reading them back does not decode."""
    sha256 = hashlib.sha256(content).hexdigest()
    path = store.path(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return sha256


if __name__ == "__main__":
    main()
