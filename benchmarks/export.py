"""How fast exports are: rows and megabytes a second of each format, beside reading the same rows alone, and memory.
On a machine with other work, seconds of the processor say more than seconds of the clock.

    python -m benchmarks.export --rows 20000 --image-bytes 30000

The corpus is made up: images of random bytes, a third of the rows thinking, every fourth image used twice. Each format
runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from corpus.exports import FORMATS, export_corpus, open_version
from corpus.exports.rows import read_rows
from corpus.storage import write_text
from corpus.versions import begin_version, commit_version
from corpus.writer import write_fates, write_shards
from schemas.fates import StageCount
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import ImageRef, Sample
from schemas.verdicts import Decision, Heuristic, Mode

RESULTS = Path(__file__).parent / "results" / "export.json"
_SHARD_ROWS = 2_000
_PNG = b"\x89PNG\r\n\x1a\n"


class MadeUp:
    """Rows and images that depend on their number alone."""

    def __init__(self, num_rows: int, image_bytes: int) -> None:
        self._num_rows, self._image_bytes = num_rows, image_bytes
        self._numbers: dict[str, int] = {}

    def image(self, number: int) -> bytes:
        return _PNG + random.Random(number).randbytes(self._image_bytes)

    def read_image(self, sha256: str) -> bytes:
        return self.image(self._numbers[sha256])

    def tables(self) -> Iterator[pa.Table]:
        for start in range(0, self._num_rows, _SHARD_ROWS):
            yield labelled_table(self._rows(range(start, min(start + _SHARD_ROWS, self._num_rows))))

    def _rows(self, numbers: range) -> Iterator[LabelledSample]:
        for number in numbers:
            picture = number - 1 if number % 4 == 3 else number
            sha256 = hashlib.sha256(self.image(picture)).hexdigest()
            self._numbers[sha256] = picture
            reasoning = "Three and four make seven. " * 40 if number % 3 == 0 else ""
            mode = Mode.THINK if reasoning else Mode.DIRECT
            sample = Sample(
                id=hashlib.sha256(str(number).encode()).hexdigest()[:32],
                source="made-up",
                origin=f"made-up:rows#{number}",
                question=f"How many dots does picture {number} show? " * 4,
                images=(ImageRef(sha256, 84, 84),),
                answer="7",
                licence="CC0-1.0",
            )
            yield LabelledSample(sample, Decision(mode, Heuristic.PERFORMANCE, 1, 8, 8), reasoning, "7", "teacher")


def make_corpus(folder: Path, num_rows: int, image_bytes: int) -> Path:
    """Returns the folder of a version with that many rows."""
    made_up = MadeUp(num_rows, image_bytes)
    building = begin_version(folder)
    shards = write_shards(
        made_up.tables(), building, shard_rows=_SHARD_ROWS, read_image=made_up.read_image, recipe="benchmark"
    )
    write_fates([], building / "fates.parquet")
    for name in ("README.md", "report.html", "report.json"):
        write_text(building / name, "a stand-in")
    counts = {"corpus": StageCount(num_rows, num_rows)}
    committed = commit_version(
        building, name="made-up", created="2026-01-01", recipe="r", inputs="i", shards=shards, counts=counts
    )
    return committed.folder


def measure(kind: str, corpus: Path, output: Path, results: Any) -> None:
    """Puts seconds, bytes and peak memory of one export, or of reading alone, into `results`."""
    version = open_version(corpus)
    started, started_cpu = time.perf_counter(), time.process_time()
    if kind == "reading":
        num_rows = sum(1 for _ in read_rows(version, tuple(Mode)))
    else:
        num_rows = export_corpus(version, FORMATS[kind], output).num_rows
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    num_bytes = sum(shard.num_bytes for shard in version.manifest.shards)
    # Not getrusage: a process that was spawned begins with the peak of the one that spawned it.
    status = Path("/proc/self/status").read_text()
    peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    results.put(
        {
            "rows": num_rows,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "rows_per_second": round(num_rows / seconds),
            "corpus_megabytes_per_second": round(num_bytes / seconds / 1e6, 1),
            "peak_mib": round(peak_mib),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000], help="sizes of the corpus")
    parser.add_argument("--image-bytes", type=int, default=30_000)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    record: dict[str, Any] = {"image_bytes": arguments.image_bytes}
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="bimode-export-benchmark-") as folder:
            corpus = make_corpus(Path(folder) / "corpus", num_rows, arguments.image_bytes)
            for kind in ("reading", *FORMATS):
                results = spawn.Queue()
                process = spawn.Process(target=measure, args=(kind, corpus, Path(folder) / kind, results))
                process.start()
                found = results.get()
                process.join()
                record[f"{kind} of {num_rows} rows"] = found
                print(f"{num_rows:>9,} rows  {kind:14} {json.dumps(found)}", flush=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
