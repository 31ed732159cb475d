"""Memory of the labelling stages over more and more rows: it must be flat.

    python -m benchmarks.memory [--rows 10000 100000 1000000] [--trace]

For each number of rows a fresh process labels as many cards that the teacher knows, each with an image of its own, so
each row costs one call with an image: all labelling stages, in shards, by the code of the flow. The teacher is a server
without latency in another process. Printed are rows per second of the stage that asks, the resident memory of the
process after each tenth of it and at the peak of all stages, and what a row adds: between the second and the last tenth
(before, caches fill), and from the peak of each run to that of the next larger one. `--trace` shows instead which lines
hold more at nine tenths than at three; it is slow.

Left out: sources, duplicates and traces, which keep a few features of every row by design (`benchmarks.duplicates`),
and Prefect, which sees shards. Images are bytes made from their names, for a million files would measure the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.cards import MODEL, card, configuration, teacher_answer
from flows.garbage import collected_rarely
from flows.runtime import Runtime
from flows.stages import DUPLICATES, LABELLING, Progress, label_shard
from flows.work_rows import unlabelled_table
from flows.workspace import Marker
from judges.performance import PURPOSE
from schemas.config import RunConfig
from schemas.fates import FATE_SCHEMA
from schemas.samples import ImageRef, Sample, Topic, content_id, samples_to_table
from sources import ImageStore
from teacher.fault_server import FaultServer

SHARD_ROWS = 1000
IMAGE_BYTES = 16 * 2**10
"""So large that the cache of images is full before the first ten thousand rows are done."""
MAX_GROWTH_BYTES = 100
"""What a row may add within the largest run, from its second tenth on: less than its question is long."""
MAX_PEAK_RATIO = 1.25
"""Peak of the largest run in that of the smallest. The heap spreads a little until all caches have been turned over."""
_NUM_TENTHS = 10
_NUM_TRACED_LINES = 15
_PAGE_BYTES = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. seconds: of the stage that asks. resident: bytes after each tenth of it; peak: the most at any time.

    num_kept: rows that all stages labelled.
    """

    num_rows: int
    num_kept: int
    seconds: float
    resident: tuple[int, ...]
    peak: int

    @property
    def growth(self) -> float:
        """Bytes per row between the second and the last tenth."""
        return (self.resident[-1] - self.resident[1]) / (self.num_rows * (_NUM_TENTHS - 2) / _NUM_TENTHS)


class NamedImages(ImageStore):
    """Images whose bytes are made from their names."""

    def resized_bytes(self, sha256: str, max_pixels: int) -> tuple[bytes, str]:
        return bytes.fromhex(sha256) * (IMAGE_BYTES // 32), "image/png"


class MeasuredRuntime(Runtime):
    """A runtime without files of images."""

    @cached_property
    def images(self) -> ImageStore:
        return NamedImages(self.workspace.images, self.config.images)


def known_sample(place: int) -> Sample:
    """Returns a card that the teacher always knows, with an image that no other row has."""
    number = 10 * (place // 2) + place % 2
    shown = card(number)
    image = ImageRef(hashlib.sha256(str(place).encode()).hexdigest(), 30, 30)
    return Sample(
        content_id("cards", shown.question, [image.sha256], [], shown.reference, str(place)),
        "cards",
        f"cards:cards.jsonl#{place}",
        shown.question,
        (image,),
        answer=shown.reference,
        source_id=str(place),
        topic=Topic.MATH,
    )


def write_shards(runtime: Runtime, num_rows: int) -> list[Marker]:
    """Writes the rows as the stage before labelling leaves them, and returns its markers."""
    markers = []
    for index, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        samples = [known_sample(place) for place in range(start, min(start + SHARD_ROWS, num_rows))]
        markers.append(
            runtime.workspace.finish_shard(
                DUPLICATES,
                f"cards-{index:05d}",
                digest="written",
                num_in=len(samples),
                rows=unlabelled_table(samples_to_table(samples)),
                fates=FATE_SCHEMA.empty_table(),
            )
        )
    return markers


class Tenths:
    """Looks at the memory of this process after each tenth of a stage; with `is_traced` also at what holds it."""

    def __init__(self, num_shards: int, *, is_traced: bool) -> None:
        self._num_shards = num_shards
        self._num_done = 0
        self._is_traced = is_traced
        self._earlier: tracemalloc.Snapshot | None = None
        self.resident: list[int] = []
        self.growth: list[str] = []

    def advance(self) -> None:
        """A shard is done."""
        self._num_done += 1
        while self._num_done * _NUM_TENTHS // self._num_shards > len(self.resident):
            self.resident.append(resident_bytes())
            if self._is_traced:
                self._trace(len(self.resident))

    def _trace(self, num_tenths: int) -> None:
        if num_tenths == 3:
            self._earlier = tracemalloc.take_snapshot()
        if num_tenths == 9 and self._earlier is not None:
            differences = tracemalloc.take_snapshot().compare_to(self._earlier, "lineno")
            self.growth = [str(difference) for difference in differences[:_NUM_TRACED_LINES]]


def label_all(runtime: Runtime, markers: list[Marker], tenths: Tenths) -> tuple[list[Marker], float]:
    """Labels the shards in all stages, as many at a time as the configuration says, as the flow does.

    Returns the markers of the last stage and the seconds of the one that asks.
    """
    seconds = 0.0
    for stage in LABELLING:
        progress = Progress(sum(marker.count.num_kept for marker in markers))
        began = time.monotonic()
        done = []
        with ThreadPoolExecutor(runtime.config.parallel_shards) as shards:
            for marker in shards.map(partial(_label, runtime, stage, progress), markers):
                done.append(marker)
                if stage == PURPOSE:
                    tenths.advance()
        if stage == PURPOSE:
            seconds = time.monotonic() - began
        markers = done
    return markers, seconds


def _label(runtime: Runtime, stage: str, progress: Progress, before: Marker) -> Marker:
    return label_shard(runtime, stage, before, progress)


def measure(config: RunConfig, num_rows: int, told: Connection, is_traced: bool) -> None:
    """Labels so many rows and sends what was measured; the body of a process of its own."""
    runtime = MeasuredRuntime(config)
    try:
        with runtime.workspace.locked(), collected_rarely():
            markers = write_shards(runtime, num_rows)
            tenths = Tenths(len(markers), is_traced=is_traced)
            if is_traced:
                tracemalloc.start()
            markers, seconds = label_all(runtime, markers, tenths)
    finally:
        runtime.close()
    if is_traced:
        print("\n".join(tenths.growth))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_kept = sum(marker.count.num_kept for marker in markers)
    told.send(Measured(num_rows, num_kept, seconds, tuple(tenths.resident), peak))


def resident_bytes() -> int:
    """Returns the memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE_BYTES


def serve(told: Connection) -> None:
    """Answers until the other end is closed; the body of the teacher's process."""
    with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
        told.send(server.url)
        with suppress(EOFError):
            told.recv()


def measure_runs(sizes: Sequence[int], *, is_traced: bool = False) -> Iterator[Measured]:
    """Yields what a run of each size measures, each in a process of its own."""
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    server = processes.Process(target=serve, args=(there,))
    server.start()
    there.close()
    url = here.recv()
    try:
        for num_rows in sizes:
            with tempfile.TemporaryDirectory(prefix="bimode-memory-") as folder:
                config = configuration(Path(folder, "cards.jsonl"), Path(folder, "work"), url, shard_rows=SHARD_ROWS)
                heard, told = processes.Pipe(duplex=False)
                run = processes.Process(target=measure, args=(config, num_rows, told, is_traced))
                run.start()
                told.close()
                yield heard.recv()
                run.join()
    finally:
        here.close()
        server.join()


def render(runs: Sequence[Measured]) -> str:
    """Returns the measurements as text for a terminal; memory in MiB."""
    tenths = " ".join(f"{f'{tenth}/10':>6}" for tenth in range(1, _NUM_TENTHS + 1))
    lines = [f"{'rows':>10} {'rows/s':>7}  {tenths} {'peak':>6}  bytes a row: within, to the next"]
    for place, run in enumerate(runs):
        resident = " ".join(f"{size / 2**20:>6,.0f}" for size in run.resident)
        onwards = ""
        if place + 1 < len(runs):
            onwards = f"{(runs[place + 1].peak - run.peak) / (runs[place + 1].num_rows - run.num_rows):,.0f}"
        lines.append(
            f"{run.num_rows:>10,} {run.num_rows / run.seconds:>7,.0f}  {resident} {run.peak / 2**20:>6,.0f}  "
            f"{run.growth:,.0f}, {onwards or '-'}"
        )
    return "\n".join(lines)


def main() -> int:
    """Returns 1 if memory grows with the rows: see `MAX_GROWTH_BYTES` and `MAX_PEAK_RATIO`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--trace", action="store_true", help="show which lines hold more and more memory")
    options = parser.parse_args()
    runs = sorted(measure_runs(options.rows, is_traced=options.trace), key=lambda run: run.num_rows)
    print(render(runs))
    if options.trace:
        return 0
    ratio = runs[-1].peak / runs[0].peak
    print(f"{runs[-1].num_rows / runs[0].num_rows:,.0f} times the rows, {ratio:.2f} times the memory")
    return 1 if ratio > MAX_PEAK_RATIO or runs[-1].growth > MAX_GROWTH_BYTES else 0


if __name__ == "__main__":
    raise SystemExit(main())
