"""The stage `duplicates` of curation, timed whole: read, shingle, sign, band, verify, cluster, write.

Questions of about 46 made-up words, 20 % of them near duplicates (one word changed) of an earlier one. The stage runs
as `curate` runs it, on shards in a work folder. Peers get the same rows, the same bands and threshold, in the same run.

    python -m benchmarks.duplicates --rows 100000 --peers datasketch datatrove
    python -m benchmarks.duplicates --rows 1000000 4000000 16400000
    python -m benchmarks.duplicates --rows 100000 --published 10000000
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
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasketch import MinHash, MinHashLSH

from filters.signatures import band_shape
from flows import removing, stages
from flows.runtime import Runtime
from flows.workspace import Marker
from schemas.config import RunConfig, SourceConfig
from schemas.fates import FATE_SCHEMA
from schemas.samples import SAMPLE_SCHEMA

SHARD_ROWS = 100_000
NUM_WORDS, NUM_CHANGED, VOCABULARY = 46, 1, 50_000
DUPLICATE_SHARE = 0.2
T = TypeVar("T")


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
    """Writes source shards of a work folder, as the stage before would; returns their markers."""
    markers = []
    for number, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        table = samples(min(SHARD_ROWS, num_rows - start), seed=seed + 10 * number)
        markers.append(
            runtime.workspace.finish_shard(
                stages.SOURCES, f"{prefix}-{number:05d}", digest="", num_in=table.num_rows, rows=table,
                fates=FATE_SCHEMA.empty_table(),
            )
        )  # fmt: skip
    return markers


def run_stage(runtime: Runtime, markers: list[Marker], settled: Sequence[Marker] = ()) -> list[Marker]:
    """Runs the stage over all shards that are not settled; returns its markers."""
    plan = removing.plan_duplicates(runtime, markers, settled)
    progress = stages.Progress(0)
    with ThreadPoolExecutor(runtime.config.parallel_shards) as pool:
        return list(pool.map(lambda marker: stages.remove_duplicates(runtime, marker, plan, "", progress), markers))


def bench_refresh(num_new: int, num_published: int, folder: Path) -> None:
    """Prints a line for new rows against published ones; a fifth of the new ones resemble each other only."""
    runtime = Runtime(bench_config(folder))
    before = make_shards(runtime, num_published, seed=7)
    removing.settle(runtime, before, run_stage(runtime, before))
    new = make_shards(runtime, num_new, seed=8, prefix="new")
    settled = list(removing.settled_shards(runtime, before).values())
    seconds, done = timed(lambda: run_stage(runtime, new, settled))
    print(f"{num_new:>12,} rows  refresh     {seconds:8.2f} s  against {num_published:,} published ones, "
          f"{num_dropped(done):,} removed, peak {peak_gib():.2f} GiB", flush=True)  # fmt: skip


def num_dropped(markers: Sequence[Marker]) -> int:
    return sum(marker.count.num_dropped for marker in markers)


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


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.monotonic()
    found = work()
    return time.monotonic() - started, found


def peak_gib() -> float:
    """Returns the largest resident set of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_config(folder: Path) -> RunConfig:
    source = SourceConfig(name="bench", format="parquet", path="-")
    return RunConfig(workdir=str(folder), sources=[source], parallel_shards=os.cpu_count() or 1)


def bench(num_rows: int, folder: Path, peers: list[str], datatrove_python: str) -> None:
    """Prints a line for the stage, and one for each peer with the ratio."""
    runtime = Runtime(bench_config(folder))
    markers = make_shards(runtime, num_rows, seed=7)
    seconds, done = timed(lambda: run_stage(runtime, markers))
    print(f"{num_rows:>12,} rows  bimode      {seconds:8.2f} s  {num_rows / seconds:>11,.0f} rows/s  "
          f"{num_dropped(done):,} removed, peak {peak_gib():.2f} GiB", flush=True)  # fmt: skip
    if not peers:
        return
    table = pa.concat_tables([runtime.workspace.read_rows(stages.SOURCES, marker.shard) for marker in markers])
    for peer in peers:
        if peer == "datasketch":
            other, found = timed(lambda: with_datasketch(table))
            note = f"{found:,} candidates"
        else:
            other, note = with_datatrove(table, folder / "datatrove", datatrove_python), "its four steps"
        print(f"{num_rows:>12,} rows  {peer:<10}  {other:8.2f} s  {num_rows / other:>11,.0f} rows/s  {note}; "
              f"bimode is {other / seconds:,.0f} times as fast", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000], help="sizes to run, one after the other")
    parser.add_argument(
        "--published", type=int, default=0, help="published rows that --rows new ones are compared with"
    )
    parser.add_argument("--peers", nargs="*", default=[], choices=["datasketch", "datatrove"], help="run these too")
    parser.add_argument("--datatrove-python", default=sys.executable, help="Python of an environment with datatrove")
    parser.add_argument("--work", type=Path, default=Path(".local/benchmark"), help="folder for the data")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    warm = arguments.work / "warm"
    shutil.rmtree(arguments.work, ignore_errors=True)
    runtime = Runtime(bench_config(warm))
    run_stage(runtime, make_shards(runtime, 2000, seed=3))  # compiles the kernels
    for num_rows in arguments.rows:
        folder = arguments.work / str(num_rows)
        if arguments.published:
            bench_refresh(num_rows, arguments.published, folder)
        else:
            bench(num_rows, folder, arguments.peers, arguments.datatrove_python)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
