"""The flow `curate` over millions of rows: how long Prefect and our own code take where the teacher takes no time.

    python -m benchmarks.whole_flow [--rows 200000 2000000] [--record]
    python -m benchmarks.whole_flow --runner ray [--rows ...] [--record]
    python -m benchmarks.whole_flow --compare --rows 200000 [--record]

For each number of rows, a fresh process runs the flow on a Prefect server of its own (SQLite), from Parquet files to
the published corpus with its report. Questions have 46 words and a number. A fifth resemble another
one, but for the number, so all are compared and stay. Of twenty, nineteen are answered right at
once, one never, which gets a chain of thought. The teacher is a function in the process: no HTTP,
no server beside the run, so that both cores are ours. Everything else is real: journals are flushed, answers verified.

Printed are the seconds of each stage, the memory of the process and its children by stage, task runs, and the size of
Prefect's database; and from the two largest runs what 16.4 million and a billion rows would take.

`--runner ray` takes a Ray cluster of this machine (`ray: {address: local}`, a worker for each processor) in place of
threads, which share one processor where Python itself is the work. `--compare` runs both in turns in one run, all
stages anew from the stored replies.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from benchmarks.duplicates import questions
from flows import curate as curate_flow
from flows import events, runtime, telemetry
from judges import performance, reasoning
from schemas.config import RunConfig, parse_config
from schemas.requests import Reply, TeacherRequest
from teacher.group import Answer, EndpointGroup

RESULT = Path(__file__).parent / "results" / "whole_flow.json"
FILE_ROWS = 100_000
MODEL = "instant"
NEVER_RIGHT = 20
"""One question of so many is never answered right."""
SCALES = (16_400_000, 1_000_000_000)
RUNNERS: dict[str, dict[str, Any]] = {"threads": {}, "ray": {"parallel_shards": 1, "ray": {"address": "local"}}}
_POLL_SECONDS = 1.0
watched_stage = telemetry.stage


def write_rows(folder: Path, num_rows: int) -> None:
    """Writes the raw rows: checkable questions whose last word is a number, which is the answer."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, num_rows, FILE_ROWS)):
        size = min(FILE_ROWS, num_rows - start)
        texts = questions(size, seed=number)
        answers = pc.cast(pa.array([(start + place) // NEVER_RIGHT % 97 for place in range(size)]), pa.string())
        asked = pc.binary_join_element_wise(texts, answers, " ")
        pq.write_table(pa.table({"question": asked, "answer": answers}), folder / f"part-{number:05}.parquet")


def configuration(folder: Path, **settings: Any) -> RunConfig:
    source = {
        "name": "rows",
        "format": "parquet",
        "path": str(folder / "raw"),
        "columns": {"answer": "answer"},
        "topic": "math",
        "kind": "objective",
        "answer_type": "number",
    }
    return parse_config(
        {
            "name": "whole",
            "workdir": str(folder / "work"),
            "shard_rows": 2000,
            "sources": [source],
            "teacher": {"model": MODEL, "url": "http://127.0.0.1:9/v1"},
            "performance": {"audit_share": 0.0},
            **settings,
        }
    )


def answer(request: TeacherRequest) -> str:
    """Answers as the teacher of this benchmark does."""
    words = request.messages[-1].text.split("\n", 1)[0].split()
    said = next((word for word in reversed(request.messages[-1].text.split()) if word.isdigit()), "0")
    if request.purpose == performance.PURPOSE:
        is_right = int(request.sample_id[:8], 16) % NEVER_RIGHT
        return f"Answer: {said if is_right else 'zebra'}"
    if request.purpose == reasoning.PURPOSE:
        return f"<think>I look at {' '.join(words[:40])} one after the other.</think>Answer: {said}"
    raise LookupError(request.purpose)


class InstantGroup(EndpointGroup):
    """Answers without a server."""

    async def call(self, request: TeacherRequest, num_choices: int = 1) -> Answer:
        texts = [answer(request) for _ in range(num_choices)]
        replies = [
            Reply(text, "stop", MODEL, prompt_tokens=80, completion_tokens=4, choice=place)
            for place, text in enumerate(texts)
        ]
        return Answer(replies, 1)

    async def check(self) -> None:
        """There is nothing to be asked."""


def install_teacher() -> None:
    """Has the runtimes of this process ask a function instead of a server; the workers of Ray call it, too."""
    runtime.EndpointGroup = InstantGroup  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. seconds, cpu_seconds, peak_bytes: by stage, "corpus" being what follows the last.

    seconds has the start, too: what passes until the first shard is done, mostly the start of Ray and its workers.
    work_seconds: of a stage without the start and the end of its subflow, which take Prefect up to one and a half.

    Processor time is that of the flow's process, memory that of the process and its children without the server.
    """

    num_rows: int
    runner: str
    total_seconds: float
    seconds: dict[str, float]
    work_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    peak_bytes: dict[str, int]
    num_task_runs: int
    database_bytes: int
    num_published: int


class Watch:
    """Takes the time and the memory of a run by stage, told by the flow's own events."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.work_seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._began, self._cpu_began, self._ended = time.monotonic(), time.process_time(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def finish_stage(self, stage: str) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.seconds[stage], self._began = now - self._began, now
        self.cpu_seconds[stage], self._cpu_began = cpu - self._cpu_began, cpu
        self.peak_bytes[stage] = max(self.peak_bytes.pop("now", 0), resident_bytes())

    @contextmanager
    def stage(self, name: str, progress: Any = None) -> Iterator[telemetry.WatchedStage]:
        """Takes the time of a stage's work, in the place of `telemetry.stage`."""
        began = time.monotonic()
        with watched_stage(name, progress) as seen:
            yield seen
        self.work_seconds[name] = time.monotonic() - began

    def close(self) -> None:
        self.finish_stage("corpus")
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self.peak_bytes["now"] = max(self.peak_bytes.get("now", 0), resident_bytes())


def resident_bytes() -> int:
    """Returns the memory that this process and its descendants hold for themselves."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    wanted, total = [os.getpid()], 0
    while wanted:
        pid = wanted.pop()
        wanted += children.get(pid, [])
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        if "prefect server" in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


@contextmanager
def prefect_server() -> Iterator[Callable[[], int]]:
    """Starts a Prefect server of its own with SQLite; yields what tells the size of its database in bytes."""

    with temporary_settings({PREFECT_SERVER_ANALYTICS_ENABLED: False}), prefect_test_harness(300):
        database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).split("///", 1)[1])
        yield lambda: sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))


def run_flow(config: RunConfig, runner: str, num_rows: int) -> Measured:
    """Runs the flow once in this process, on a server of its own."""

    hook = {"worker_process_setup_hook": f"{__package__}.{Path(__file__).stem}.install_teacher"}
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # this package is not installed
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": hook})
    path = Path(config.workdir).parent / f"{runner}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    with prefect_server() as database_bytes:
        watch, emit = Watch(), events.emit

        def noted(event: str, corpus: str, payload: Mapping[str, Any]) -> None:
            if event == events.STAGE_FINISHED:
                watch.finish_stage(payload["stage"])
            emit(event, corpus, payload)

        events.emit, telemetry.stage = noted, watch.stage
        began, began_at = time.monotonic(), time.time()
        try:
            install_teacher()
            record = curate_flow.curate(str(path))
        finally:
            events.emit, telemetry.stage = emit, watched_stage
        watch.close()
        seconds = time.monotonic() - began
        first = min(path.stat().st_mtime for path in (Path(config.workdir) / "stages" / "sources").glob("*.json"))
        start = {"start": first - began_at}
        watch.seconds["sources"] -= start["start"]
        watch.work_seconds["sources"] = watch.seconds["sources"]  # its beginning is part of the start
        time.sleep(10)  # the server writes what it has been told, some seconds later
        with get_client(sync_client=True) as client:
            found = client._client.post("/task_runs/count", json={}).json()
        return Measured(
            num_rows,
            runner,
            seconds,
            start | watch.seconds,
            watch.work_seconds,
            watch.cpu_seconds,
            watch.peak_bytes,
            int(found),
            database_bytes(),
            record["rows"],
        )


def in_fresh_process(config: RunConfig, runner: str, num_rows: int) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_flow, (config, runner, num_rows))


def show(measured: Sequence[Measured]) -> None:
    stages = list(measured[-1].seconds)
    heads = [f"{one.num_rows:,} ({one.runner})" for one in measured]
    print("\nseconds (of the processor, in the flow's process) and memory at the peak")
    print(f"{'stage':14s}" + "".join(f"{head:>30s}" for head in heads))
    for stage in stages:
        cells = [
            f"{one.seconds.get(stage, 0):,.1f} s ({one.cpu_seconds.get(stage, 0):,.1f}) "
            f"{one.peak_bytes.get(stage, 0) / 2**20:,.0f} MiB"
            for one in measured
        ]
        print(f"{stage:14s}" + "".join(f"{cell:>30s}" for cell in cells))
    for title, cell in (
        ("whole", lambda one: f"{one.total_seconds:,.1f} s"),
        ("rows/s", lambda one: f"{one.num_rows / one.total_seconds:,.0f}"),
        ("task runs", lambda one: f"{one.num_task_runs:,}"),
        ("database", lambda one: f"{one.database_bytes / 2**20:,.1f} MiB"),
        ("published", lambda one: f"{one.num_published:,}"),
    ):
        print(f"{title:14s}" + "".join(f"{cell(one):>30s}" for one in measured))


def show_scales(small: Measured, large: Measured) -> dict[str, float]:
    """Prints what larger runs would take: what a row adds between two runs, stage by stage, from the larger one on."""
    hours = {}
    for num_rows in SCALES:
        seconds = sum(
            value
            + max(0.0, value - small.seconds[stage]) / (large.num_rows - small.num_rows) * (num_rows - large.num_rows)
            for stage, value in large.seconds.items()
        )
        hours[f"{num_rows}"] = seconds / 3600
        print(f"{num_rows:,} rows on this machine, as computed: {seconds / 3600:,.1f} h without the teacher")
    return hours


def compare_runners(folder: Path, num_rows: int, num_turns: int) -> list[Measured]:
    """Runs all stages from stored replies with threads and with Ray, in turns; returns the best run of each."""
    plain = configuration(folder)
    in_fresh_process(plain, "first", num_rows)
    spread = configuration(folder, **RUNNERS["ray"])
    measured: dict[str, list[Measured]] = {"threads": [], "ray": []}
    for _ in range(num_turns):
        for runner, config in (("threads", plain), ("ray", spread)):
            for name in ("stages", "corpus"):
                shutil.rmtree(folder / "work" / name)
            measured[runner].append(in_fresh_process(config, runner, num_rows))
    return [min(runs, key=lambda one: one.total_seconds) for runs in measured.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--runner", choices=list(RUNNERS), default="threads")
    parser.add_argument("--compare", action="store_true", help="compare the runners, at the first number of rows")
    parser.add_argument("--turns", type=int, default=2, help="with --compare: runs of each")
    parser.add_argument("--folder", type=Path, help="where the data is written (a temporary folder by default)")
    parser.add_argument("--record", action="store_true", help=f"write the figures to {RESULT.name}")
    options = parser.parse_args(arguments)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="whole-flow-") as name:
        if options.compare:
            folder = Path(name)
            write_rows(folder / "raw", options.rows[0])
            measured = compare_runners(folder, options.rows[0], options.turns)
            show(measured)
            plain, spread = (one.work_seconds for one in measured)
            ratios = {stage: spread[stage] / seconds for stage, seconds in plain.items()}
            for stage, ratio in ratios.items():
                print(
                    f"{stage:14s} threads {plain[stage]:6.1f} s, Ray {spread[stage]:6.1f} s, {ratio:.2f} times as long"
                )
            record["compared"] = {"runs": [asdict(one) for one in measured], "ratios": ratios}
        else:
            measured = []
            for num_rows in sorted(options.rows):
                folder = Path(name) / str(num_rows)
                write_rows(folder / "raw", num_rows)
                config = configuration(folder, **RUNNERS[options.runner])
                measured.append(in_fresh_process(config, options.runner, num_rows))
                show(measured[-1:])
                shutil.rmtree(folder)
            show(measured)
            record[options.runner] = {"runs": [asdict(one) for one in measured]}
            if len(measured) > 1:
                record[options.runner]["hours"] = show_scales(measured[-2], measured[-1])
    if options.record:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
