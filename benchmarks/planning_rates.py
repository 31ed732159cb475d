"""What plans rest on, measured: see `benchmarks.planning`."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cards import PlainCuration, card, configuration
from flows.runtime import Runtime
from flows.shard_calls import Spread, Work
from schemas.config import RunConfig
from sources import plan_units
from teacher.replies import scan_replies

NUM_QUANTILES = 101
Measured: TypeAlias = Mapping[str, Mapping[str, float]]
"""By stage, by name of the figure."""
_IMAGE_SIZE = (800, 600)
_SETTLED_LOOKS = 3
"""Equal ones, five seconds apart."""
_SERVER = """
import sys
from benchmarks.cards import MODEL, teacher_answer
from teacher.fault_server import FaultServer
with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
_TASKS = """
import sys
from prefect import flow, task
@task(task_run_name="{stage}/{shard}", persist_result=False)
def work(stage, shard):
    return None
@flow(persist_result=False)
def run(number):
    for future in [work.submit("stage", f"source-{place:05d}") for place in range(number)]:
        future.result()
import time
run(10)
began = time.monotonic()
run(int(sys.argv[1]))
print(time.monotonic() - began)
"""


def record_spread(journals: Path, answers: Path) -> dict[str, Any]:
    """Returns quantiles of the lengths of recorded answers, and of the seconds that equal replies took.

    Lengths: answers of models that were asked to think ("CoT"), each as a multiple of its model's mean. Seconds: calls
    of one purpose and number of tokens, as multiples of their mean; the first calls of a server, which compile, and
    groups of fewer than ten are left out.
    """
    lengths: dict[str, list[float]] = defaultdict(list)
    for line in answers.read_text(encoding="utf-8").splitlines():
        for answer in json.loads(line)["responses"]:
            if "CoT" in answer["source"] and "InternLM" not in answer["source"]:
                lengths[answer["source"]].append(len(answer["response"]))
    ratios = [np.array(each) / np.mean(each) for each in lengths.values()]
    calls = (
        scan_replies(str(journals))
        .filter(pl.col("choice") == 0, ~pl.col("purpose").is_in(["topic", "routing"]))
        .select("purpose", "completion_tokens", "seconds")
        .collect()
    )
    seconds = [
        group["seconds"].to_numpy() / float(group["seconds"].to_numpy().mean())
        for _, group in calls.group_by("purpose", "completion_tokens")
        if len(group) >= 10
    ]
    return {
        "lengths": {
            "source": "MATH-Vision, testmini: recorded answers of " + ", ".join(sorted(lengths)),
            "number": sum(map(len, ratios)),
            "quantiles": _quantiles(np.concatenate(ratios)),
        },
        "calls": {
            "source": "the demo: calls to vLLM (CPU build) with the bundled teacher, equal in purpose and tokens",
            "number": sum(map(len, seconds)),
            "quantiles": _quantiles(np.concatenate(seconds)),
        },
    }


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(values, np.linspace(0, 1, NUM_QUANTILES))]


class MeasuredCuration(PlainCuration):
    """Counts the processors' seconds of each stage, and its rows and bytes."""

    measured: dict[str, dict[str, float]]

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Spread], Work]) -> None:
        measured: dict[str, float] = {}
        with_seconds(measured, lambda: super(MeasuredCuration, self)._stage(stage, num_rows, plan))
        workspace, markers = self.runtime.workspace, self.markers[stage]
        usage = [usage for marker in markers for usage in marker.usage.values()]
        self.measured[stage] = {
            "rows": num_rows,
            **measured,
            "calls": sum(each.num_calls for each in usage),
            "replies": sum(each.num_replies for each in usage),
            "stage_bytes": _bytes(workspace.root / "stages" / stage),
            "journal_bytes": _bytes(workspace.root / "journals" / stage),
        }


def with_seconds(measured: dict[str, float], work: Callable[[], object]) -> None:
    """Does work and notes its seconds: on the clock, and of the processors, those of child processes included."""
    clock, processor = time.perf_counter(), _processor_seconds()
    work()
    measured["seconds"] = round(time.perf_counter() - clock, 3)
    measured["processor_seconds"] = round(_processor_seconds() - processor, 3)


def _processor_seconds() -> float:
    """Returns the processor time of this process and of the children that it has, as the kernel counts it."""
    total = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ticks = os.sysconf("SC_CLK_TCK")
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text("ascii").split():
            fields = Path(f"/proc/{child}/stat").read_text("ascii").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_stages(sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Curates cards with photographs of their own, few and many, and returns what a row more takes in each stage.

    The difference of two runs leaves out what a stage costs once: connections, compiling, the report.
    """
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdin is not None
    try:
        url = server.stdout.readline().strip()
        few, many = (_curate_cards(num_rows, url) for num_rows in sizes)
    finally:
        server.stdin.close()
        server.wait()
    return {
        stage: {name: round(many[stage][name] - few[stage][name], 3) for name in many[stage]} | _each(few, many, stage)
        for stage in many
    }


def _each(few: Measured, many: Measured, stage: str) -> dict[str, float]:
    """Returns what a row more, a call more and a reply more take in a stage."""
    more = {name: many[stage][name] - few[stage][name] for name in many[stage]}
    rows, processor = more["rows"], more["processor_seconds"]
    found = {"ms_a_row": round(1e3 * processor / rows, 3)}
    if more.get("stage_bytes"):
        found["stage_bytes_a_row"] = round(more["stage_bytes"] / rows, 1)
    if more.get("calls"):
        found |= {
            "ms_a_call": round(1e3 * processor / more["calls"], 3),
            "journal_bytes_a_reply": round(more["journal_bytes"] / more["replies"], 1),
        }
    return found


def _curate_cards(num_rows: int, url: str) -> Measured:
    with tempfile.TemporaryDirectory(prefix="bimode-planning-") as folder:
        rows = _write_rows(Path(folder) / "rows", num_rows)
        config = configuration(
            rows, Path(folder) / "work", url, shard_rows=250, parallel_shards=2, teacher={"max_image_pixels": 10**6}
        )
        return _curate(config)


def _curate(config: RunConfig) -> Measured:
    runtime = Runtime(config)
    try:
        with runtime.workspace.locked():
            curation = MeasuredCuration(runtime, plan_units(config))
            curation.measured = {}
            whole: dict[str, float] = {}
            with_seconds(whole, curation.run)
            staged = sum(stage["processor_seconds"] for stage in curation.measured.values())
            kept = sum(marker.count.num_kept for marker in curation.markers["answers"])
            corpus = {"rows": kept, "processor_seconds": round(whole["processor_seconds"] - staged, 3)}
            return {**curation.measured, "corpus": corpus}
    finally:
        runtime.close()


def _write_rows(folder: Path, num_rows: int) -> Path:
    """Writes cards, each with a photograph-like JPEG of its own; returns the JSON Lines file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    base = np.asarray(_noise(rng, (4, 16, 64, 256)), np.float32)
    lines = []
    for number in range(num_rows):
        shown = card(number)
        pixels = base * 0.7 + np.asarray(_noise(rng, (8,)), np.float32) * 0.3
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=85)
        (folder / f"{number}.jpg").write_bytes(stream.getvalue())
        row = {"id": str(number), "question": shown.question, "image": f"{number}.jpg"}
        if shown.reference is not None:
            row["answer"] = shown.reference
        lines.append(json.dumps({**row, **({"choices": shown.choices} if shown.choices else {})}) + "\n")
    path = folder / "cards.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _noise(rng: np.random.Generator, cells: Sequence[int]) -> Image.Image:
    """Returns noise of some scales."""
    total = np.zeros((_IMAGE_SIZE[1], _IMAGE_SIZE[0], 3), np.float32)
    for number in cells:
        noise = Image.fromarray(rng.integers(0, 256, (number, number, 3), np.uint8))
        total += np.asarray(noise.resize(_IMAGE_SIZE, Image.Resampling.BICUBIC), np.float32) / number**0.45
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def measure_prefect(num_tasks: int = 400) -> dict[str, float]:
    """Returns the seconds and the bytes of the database that a task run costs a server of its own on SQLite."""
    with tempfile.TemporaryDirectory(prefix="bimode-prefect-") as home:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "PREFECT_HOME": home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _await_health(environment["PREFECT_API_URL"])
            database = Path(home) / "prefect.db"
            _run_tasks(environment, 10)
            before = _settled_bytes(database)
            seconds = _run_tasks(environment, num_tasks)
            after = _settled_bytes(database)
        finally:
            server.terminate()
            server.wait()
    return {
        "task_seconds": round(seconds / num_tasks, 5),
        "task_bytes": round((after - before) / num_tasks),
        "empty_bytes": before,
    }


def _run_tasks(environment: Mapping[str, str], number: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _TASKS, str(number)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _await_health(api_url: str) -> None:
    for _ in range(240):
        with suppress(OSError), urllib.request.urlopen(f"{api_url}/health", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no Prefect server at {api_url}")


def _settled_bytes(path: Path) -> int:
    """Returns the size of the database once the events of the last run have reached it."""
    sizes = [_database_bytes(path)]
    while len(sizes) < _SETTLED_LOOKS or len(set(sizes[-_SETTLED_LOOKS:])) > 1:
        time.sleep(5)
        sizes.append(_database_bytes(path))
    return sizes[-1]


def _database_bytes(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        (pages,), (size,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    return int(pages * size)
