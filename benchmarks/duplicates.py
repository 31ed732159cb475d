"""The stage `duplicates` of curation, timed whole: read, shingle, sign, band, verify, cluster, write.

Questions of about 46 made-up words, 20 % of them near duplicates (one word changed) of an earlier one, in shards of
10,000. The stage runs as `curate` runs it, on shards in a work folder, in a process of its own that has compiled its
kernels before. Peers get the same rows, the same bands and threshold, in the same run; their start is left out too. Of
100,000 rows each side's best of five runs counts: ours over fresh copies of the shards, datatrove's once.

    python -m benchmarks.duplicates                                             # 100,000 rows
    python -m benchmarks.duplicates --peers datasketch datatrove                # beside its peers
    python -m benchmarks.duplicates --rows 1000000 4000000 16400000
    python -m benchmarks.duplicates --published 10000000                        # new rows against published ones
    python -m benchmarks.duplicates --everything --datatrove-python PYTHON      # all of it, in one table
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasketch import MinHash, MinHashLSH

from filters.signatures import band_shape
from flows import removing, stages
from flows.garbage import collected_rarely
from flows.runtime import Runtime
from flows.shard_calls import RemoveRows
from flows.workspace import Marker
from schemas.config import RunConfig, SourceConfig
from schemas.fates import FATE_SCHEMA
from schemas.samples import SAMPLE_SCHEMA

SHARD_ROWS, BLOCK_ROWS = 10_000, 100_000
EVERY_SIZE = (100_000, 1_000_000, 4_000_000, 16_400_000)
NUM_WORDS, NUM_CHANGED, VOCABULARY = 46, 1, 50_000
DUPLICATE_SHARE = 0.2
NUM_RUNS = 5


def questions(num_rows: int, *, seed: int) -> pa.Array:
    """Returns `num_rows` questions; every fifth is an earlier one with one word changed."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"bcdfghjklmnpqrstvwxyz", np.uint8)
    lengths = np.random.default_rng(1).integers(2, 10, VOCABULARY)
    words = ["".join(map(chr, np.random.default_rng(1000 + i).choice(letters, size))) for i, size in enumerate(lengths)]
    vocabulary = pa.array(words)
    picked = rng.integers(0, VOCABULARY, (num_rows, NUM_WORDS), dtype=np.int32)
    num_copies = int(num_rows * DUPLICATE_SHARE)
    copies = picked[rng.integers(0, num_rows - num_copies, num_copies)]
    for _ in range(NUM_CHANGED):
        copies[np.arange(num_copies), rng.integers(0, NUM_WORDS, num_copies)] = rng.integers(0, VOCABULARY, num_copies)
    picked[num_rows - num_copies :] = copies
    picked = picked[rng.permutation(num_rows)]
    offsets = pa.array(np.arange(0, num_rows * NUM_WORDS + 1, NUM_WORDS), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, vocabulary.take(pa.array(picked.ravel())))
    return pa.compute.binary_join(lists, " ")


def samples(num_rows: int, *, seed: int) -> pa.Table:
    """Returns a table of text-only samples with such questions."""
    ids = np.random.default_rng(seed + 1).bytes(16 * num_rows).hex()
    offsets = pa.array(np.arange(0, 32 * num_rows + 1, 32), pa.int32())
    names = pa.StringArray.from_buffers(num_rows, offsets.buffers()[1], pa.py_buffer(ids.encode()))
    columns = {name: pa.nulls(num_rows, SAMPLE_SCHEMA.field(name).type) for name in SAMPLE_SCHEMA.names}
    numbers = pa.array(np.arange(num_rows)).cast(pa.string())
    empty = pa.array(np.zeros(num_rows + 1, np.int32))
    columns |= {
        "id": names,
        "source": pa.repeat("bench", num_rows),
        "origin": pa.compute.binary_join_element_wise(f"bench:{seed}#", numbers, ""),
        "question": questions(num_rows, seed=seed),
        "images": pa.ListArray.from_arrays(empty, pa.array([], SAMPLE_SCHEMA.field("images").type.value_type)),
        "choices": pa.ListArray.from_arrays(empty, pa.array([], pa.string())),
    }
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def make_shards(runtime: Runtime, num_rows: int, *, seed: int, prefix: str = "bench") -> list[Marker]:
    """Writes source shards of a work folder, as the stage before would; returns their markers.

    Rows resemble rows of other shards of their block.
    """
    markers: list[Marker] = []
    for start in range(0, num_rows, BLOCK_ROWS):
        block = samples(min(BLOCK_ROWS, num_rows - start), seed=seed + start // (BLOCK_ROWS // 10))
        for first in range(0, block.num_rows, SHARD_ROWS):
            table = block.slice(first, SHARD_ROWS)
            markers.append(
                runtime.workspace.finish_shard(
                    stages.SOURCES, f"{prefix}-{len(markers):05d}", digest="", num_in=table.num_rows, rows=table,
                    fates=FATE_SCHEMA.empty_table(),
                )
            )  # fmt: skip
    return markers


def run_stage(runtime: Runtime, markers: list[Marker], settled: Sequence[Marker] = ()) -> list[Marker]:
    """Runs the stage over all shards that are not settled; returns its markers."""
    plan = removing.plan_duplicates(runtime, markers, settled)
    progress = stages.Progress(0)
    with ThreadPoolExecutor(runtime.config.parallel_shards) as pool:
        calls = [RemoveRows(stages.DUPLICATES, marker, plan.get(marker.shard), "") for marker in markers]
        return list(pool.map(lambda call: call(runtime, progress), calls))


def measure(folder: Path, num_runs: int) -> dict[str, float]:
    """Runs the stage over the shards `new-*` of a work folder, against what is published there; returns its figures.

    num_runs: above 1, the best of so many runs, each over a copy of the folder, as features are kept beside the shards.
    """
    warm = Runtime(bench_config(folder / "warm"))
    run_stage(warm, make_shards(warm, 2 * SHARD_ROWS, seed=3))  # compiles or loads the kernels
    if num_runs == 1:
        return run_once(folder)
    runs = []
    for number in range(num_runs):
        copied = shutil.copytree(folder / "stages", folder / f"run-{number}" / "stages").parent
        runs.append(run_once(copied))
        shutil.rmtree(copied)
    return min(runs, key=lambda figures: figures["seconds"])


def run_once(folder: Path) -> dict[str, float]:
    """Runs the stage in a work folder and returns its figures."""
    runtime = Runtime(bench_config(folder))
    new, old = markers_in(runtime, "new"), markers_in(runtime, "old")
    settled = list(removing.settled_shards(runtime, old).values())
    assert len(settled) == len(old)
    started = time.monotonic()
    with collected_rarely():  # as a run does
        done = run_stage(runtime, new, settled)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "removed": sum(m.count.num_dropped for m in done), "peak_gib": peak_gib()}


def markers_in(runtime: Runtime, prefix: str) -> list[Marker]:
    """Returns the markers of the source shards with this prefix."""
    paths = sorted((runtime.workspace.root / "stages" / stages.SOURCES).glob(f"{prefix}-*.json"))
    found = [runtime.workspace.read_marker(stages.SOURCES, path.stem) for path in paths]
    return [marker for marker in found if marker is not None]


def measured(folder: Path, num_runs: int = 1) -> dict[str, float]:
    """Returns what `measure` finds, in a process of its own."""
    program = [sys.executable, "-m", "benchmarks.duplicates"]
    ran = subprocess.run(
        [*program, "--measure", str(folder), "--runs", str(num_runs)], check=True, stdout=subprocess.PIPE
    )
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def with_datasketch(table: pa.Table) -> int:
    """Returns how many rows `MinHash.bulk` and `MinHashLSH` find to share a band with an earlier one."""
    shape = band_shape(0.8, 128)
    shingled = []
    for question in table["question"].to_pylist():
        words = question.split()
        shingled.append([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
    lsh = MinHashLSH(num_perm=128, params=(shape.num_bands, shape.num_rows))
    num_found = 0
    for number, minhash in enumerate(MinHash.bulk(shingled, num_perm=128, seed=1)):
        num_found += bool(lsh.query(minhash))
        lsh.insert(number, minhash)
    return num_found


DATATROVE = """
import json, sys, time
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.hashing import HashConfig
rows, folder, bands, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = MinhashConfig(n_grams=3, num_buckets=bands, hashes_per_bucket=size, hash_config=HashConfig(precision=64))
def reader(): return ParquetReader(rows, text_key="question", id_key="id")
def run(pipeline, tasks):
    logs = folder / "logs" / str(len(pipeline)) / type(pipeline[-1]).__name__
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=2, logging_dir=str(logs)).run()
if __name__ == "__main__":
    started = time.monotonic()
    run([reader(), MinhashDedupSignature(output_folder=str(folder / "signatures"), config=config)], 2)
    run([MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)], bands)
    run([MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)], 1)
    run([reader(), MinhashDedupFilter(str(folder / "remove"), exclusion_writer=None),
         ParquetWriter(str(folder / "kept"))], 2)
    print(json.dumps({"seconds": time.monotonic() - started}))
"""


def with_datatrove(table: pa.Table, folder: Path, python: str) -> float:
    """Returns the seconds of datatrove's four steps, two workers, without the start of its process.

    python: of an environment that has datatrove; its pins do not go with ours.
    """
    rows = folder / "rows"
    rows.mkdir(parents=True)
    for number in range(2):
        half = table.slice(number * table.num_rows // 2, table.num_rows // 2).select(["id", "question"])
        pq.write_table(half, rows / f"{number}.parquet")
    shape = band_shape(0.8, 128)
    script = folder / "datatrove_steps.py"
    script.write_text(DATATROVE, encoding="utf-8")
    arguments = [python, str(script), str(rows), str(folder), str(shape.num_bands), str(shape.num_rows)]
    ran = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return float(json.loads(ran.stdout.strip().splitlines()[-1])["seconds"])


def peak_gib() -> float:
    """Returns the largest resident set of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_config(folder: Path) -> RunConfig:
    source = SourceConfig(name="bench", format="parquet", path="-")
    return RunConfig(workdir=str(folder), sources=[source], parallel_shards=os.cpu_count() or 1)


@dataclass(frozen=True)
class Line:
    """One line of the table. peers: seconds by name."""

    what: str
    num_rows: int
    figures: dict[str, float]
    peers: dict[str, float]

    def render(self) -> str:
        seconds = self.figures["seconds"]
        peers = [
            f"{self.peers[name]:.1f} s ({self.peers[name] / seconds:,.0f} times)" if name in self.peers else ""
            for name in ("datasketch", "datatrove")
        ]
        own = [f"{seconds:.2f} s", f"{self.num_rows / seconds:,.0f}", f"{self.figures['peak_gib']:.1f} GiB"]
        return "| " + " | ".join([self.what, *own, f"{self.figures['removed']:,}", *peers]) + " |"


HEAD = (
    "| rows | bimode | rows/s | peak memory | removed | datasketch bulk + LSH | datatrove, four steps |\n|" + "---|" * 7
)


def seconds_of(work: Callable[[pa.Table], object], table: pa.Table) -> float:
    started = time.monotonic()
    work(table)
    return time.monotonic() - started


def bench(num_rows: int, folder: Path, peers: Sequence[str], datatrove_python: str) -> Line:
    """Measures the stage, and its peers on the same rows."""
    runtime = Runtime(bench_config(folder))
    markers = make_shards(runtime, num_rows, seed=7, prefix="new")
    num_runs = NUM_RUNS if num_rows <= BLOCK_ROWS else 1
    figures, others = measured(folder, num_runs), {}
    if peers:
        table = pa.concat_tables([runtime.workspace.read_rows(stages.SOURCES, marker.shard) for marker in markers])
    if "datasketch" in peers:
        others["datasketch"] = min(seconds_of(with_datasketch, table) for _ in range(num_runs))
    if "datatrove" in peers:
        others["datatrove"] = with_datatrove(table, folder / "datatrove", datatrove_python)
    return Line(f"{num_rows:,}", num_rows, figures, others)


def bench_refresh(num_new: int, num_published: int, folder: Path) -> Line:
    """Measures new rows against published ones; a fifth of the new ones resemble each other only."""
    runtime = Runtime(bench_config(folder))
    before = make_shards(runtime, num_published, seed=7, prefix="old")
    removing.settle(runtime, before, run_stage(runtime, before))
    make_shards(runtime, num_new, seed=8, prefix="new")
    return Line(f"{num_new:,} new, {num_published:,} published", num_new, measured(folder), {})


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0].split(': ')[1]}, {os.cpu_count()} cores, {gib:.0f} GiB, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000], help="sizes to run, one after the other")
    parser.add_argument("--published", type=int, default=0, help="published rows that --rows are compared with")
    parser.add_argument("--peers", nargs="*", default=[], choices=["datasketch", "datatrove"], help="run these too")
    parser.add_argument("--everything", action="store_true", help="all sizes, both peers, and a refresh against 10 M")
    parser.add_argument("--datatrove-python", default=sys.executable, help="Python of an environment with datatrove")
    parser.add_argument("--work", type=Path, default=Path(".local/benchmark"), help="folder for the data")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.runs)))
        return
    shutil.rmtree(arguments.work, ignore_errors=True)
    sizes = EVERY_SIZE if arguments.everything else arguments.rows
    peers = ["datasketch", "datatrove"] if arguments.everything else arguments.peers
    print(f"{machine()}\n\n{HEAD}", flush=True)
    for num_rows in sizes:
        folder = arguments.work / str(num_rows)
        if arguments.published:
            line = bench_refresh(num_rows, arguments.published, folder)
        else:
            line = bench(num_rows, folder, peers if num_rows == sizes[0] else [], arguments.datatrove_python)
        print(line.render(), flush=True)
        shutil.rmtree(folder)
    if arguments.everything:
        print(bench_refresh(100_000, 10_000_000, arguments.work / "refresh").render(), flush=True)
        shutil.rmtree(arguments.work / "refresh")


if __name__ == "__main__":
    main()
