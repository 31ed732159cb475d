"""Calls per second of the teacher's client on one core, beside its peers: the same rows and server, in one run.

The server is `python -m teacher.fault_server`, which answers at once, on one core; each client runs in a process of its
own on another. A row is a question of 46 words with a JPEG of its own (112 x 112). Its image goes by name in one
column of the table (file://) and as bytes in the other (a data URL). Ours reads the images from an image store and says
where they are, or encodes them, within the time that counts, and stores every reply with an fsync before giving it out;
the others get the addresses made beforehand. Not counted: starting, and a few hundred rows to warm up. The clients take
turns, and of several runs the best counts: calls per second on the clock, and processor time per call, which other work
on the machine disturbs less. n = 8 is one call for eight replies, of which each is stored.

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers/requirements.txt
    .venv/bin/python -m benchmarks.teacher_client                  # 5,000 rows; peers by .venv-peers/bin/python
    .venv/bin/python -m benchmarks.teacher_client --rows 1000 --clients ours curator --columns file_url
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
import openai
from PIL import Image

from benchmarks.peers.stopwatch import Stopwatch, client_parser, read_rows
from schemas.config import EndpointConfig, ImageLimits
from schemas.requests import Message, Reply, Sampling, TeacherRequest
from sources.images import ImageStore
from teacher.client import Teacher
from teacher.images import SentImage
from teacher.journal import Journal
from teacher.wire import render_body

HERE = Path(__file__).parent
NUM_WARM_UP = 300
NUM_WORDS, VOCABULARY = 46, 5_000
IMAGE_SIDE = 112
NUM_SAMPLES = 8
SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_tokens=512)
PROMISED_PER_SECOND, PROMISED_RATIO = 1_500, 3
PEERS_ENVIRONMENT = {
    "TELEMETRY_ENABLED": "false",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "DISTILABEL_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
_Asked = TypeVar("_Asked")
COLUMNS = {"file_url": "image by name", "data_url": "image as bytes"}


@dataclass(frozen=True, slots=True)
class Client:
    """One line of the table. program: its command, without the arguments that all take; None for those in this file."""

    title: str
    keeps: str
    program: tuple[str, ...] | None = None
    is_peer: bool = False


CLIENTS = {
    "ours": Client("bimode, `Teacher.ask`", "journal, synced"),
    "ours-8": Client(f"bimode, `ask_samples`, n = {NUM_SAMPLES}", "journal, synced"),
    "aiohttp": Client("aiohttp alone, bodies made before (upper bound)", "nothing"),
    "openai-httpx": Client("openai, its default transport", "nothing"),
    "openai-aiohttp": Client("openai, its aiohttp transport", "nothing"),
    "curator": Client("bespokelabs-curator", "JSON Lines", ("curator_client.py",), is_peer=True),
    "distilabel-llm": Client(
        "distilabel, `OpenAILLM` alone", "nothing", ("distilabel_client.py", "--way", "llm"), is_peer=True
    ),
    "distilabel": Client(
        "distilabel, pipeline of one step", "at the end", ("distilabel_client.py", "--way", "pipeline"), is_peer=True
    ),
}


# What is asked


def make_rows(folder: Path, num_rows: int) -> Path:
    """Writes rows and the store of their images; returns the file of rows (JSON Lines)."""
    store = ImageStore(folder / "images", ImageLimits())
    rng = np.random.default_rng(0)
    words = [f"{number:x}" for number in rng.integers(16**3, 16**6, VOCABULARY)]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(num_rows):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=90)
            sha256 = store.put(encoded.getvalue()).sha256
            row = {
                "question": " ".join(words[number] for number in rng.integers(0, VOCABULARY, NUM_WORDS)),
                "image": sha256,
                "file_url": store.path(sha256).absolute().as_uri(),
                "data_url": f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}",
            }
            lines.write(json.dumps(row) + "\n")
    return path


def requests_of(rows: Sequence[dict[str, Any]]) -> list[TeacherRequest]:
    return [
        TeacherRequest(
            f"s{number}", "performance", (Message("user", row["question"], (row["image"],)),), SAMPLING, seed=number
        )
        for number, row in enumerate(rows)
    ]


# The clients that run under our own Python


async def time_ours(options: argparse.Namespace, *, num_samples: int) -> Stopwatch:
    """Times the client as a label stage uses it: some rows in work at once, each asking for one or several samples."""
    store = ImageStore(options.rows.parent / "images", ImageLimits())
    endpoint = EndpointConfig(model="teacher", url=options.url, images_as=options.column)
    requests = requests_of(read_rows(options.rows))
    stopwatch = Stopwatch("bimode")
    for number in range(options.runs):
        with Journal(options.work / f"{number}.journal") as journal:
            async with Teacher(endpoint, journal, store.resized_bytes, store.resized_path) as teacher:
                await teacher.check()

                async def ask(request: TeacherRequest, teacher: Teacher = teacher) -> None:
                    samples = [request, *(request.sample(index) for index in range(1, num_samples))]
                    replies = await teacher.ask_samples(samples) if num_samples > 1 else [await teacher.ask(request)]
                    assert all(isinstance(reply, Reply) for reply in replies), replies

                await time_run(ask, requests, options, stopwatch)
    return stopwatch


async def time_aiohttp(options: argparse.Namespace) -> Stopwatch:
    """Times what no client on aiohttp can exceed: bodies are made before, answers are read and not looked at."""
    bodies = [json.dumps(body).encode() for body in bodies_of(options)]
    stopwatch = Stopwatch(f"aiohttp {version('aiohttp')}")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar()) as http:

        async def ask(body: bytes) -> None:
            async with http.post(f"{options.url}/chat/completions", data=body) as response:
                await response.read()
                assert response.status == 200, response.status

        for _ in range(options.runs):
            await time_run(ask, bodies, options, stopwatch)
    return stopwatch


async def time_openai(options: argparse.Namespace, *, on_aiohttp: bool) -> Stopwatch:
    """Times the openai package with its default transport, or with the one on aiohttp that it offers."""
    bodies = bodies_of(options)
    stopwatch = Stopwatch(f"openai {version('openai')}")
    transport = openai.DefaultAioHttpClient() if on_aiohttp else None
    async with openai.AsyncOpenAI(base_url=options.url, api_key="none", max_retries=0, http_client=transport) as client:

        async def ask(body: dict[str, Any]) -> None:
            completion = await client.chat.completions.create(**body)
            assert completion.choices[0].message.content

        for _ in range(options.runs):
            await time_run(ask, bodies, options, stopwatch)
    return stopwatch


def bodies_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the bodies that our client sends for the rows."""
    rows = read_rows(options.rows)
    return [
        render_body(
            request,
            model="teacher",
            images={row["image"]: SentImage(row[options.column], row["image"])},
            extra_body={},
        )
        for row, request in zip(rows, requests_of(rows), strict=True)
    ]


async def time_run(
    ask: Callable[[_Asked], Awaitable[None]],
    asked: Sequence[_Asked],
    options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> None:
    """Asks for all rows, so many at once; those for warming up come before the time that counts."""
    await ask_all(ask, asked[: options.warm_up], options.concurrency)
    gc.collect()
    with stopwatch.run(len(asked) - options.warm_up):
        await ask_all(ask, asked[options.warm_up :], options.concurrency)


async def ask_all(ask: Callable[[_Asked], Awaitable[None]], asked: Sequence[_Asked], concurrency: int) -> None:
    left = iter(asked)

    async def work() -> None:
        for each in left:
            await ask(each)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())


OWN: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, Stopwatch]]] = {
    "ours": partial(time_ours, num_samples=1),
    "ours-8": partial(time_ours, num_samples=NUM_SAMPLES),
    "aiohttp": time_aiohttp,
    "openai-httpx": partial(time_openai, on_aiohttp=False),
    "openai-aiohttp": partial(time_openai, on_aiohttp=True),
}


def run_own_client(arguments: Sequence[str]) -> None:
    """Runs one of them in this process and saves its figures."""
    parser = client_parser()
    parser.add_argument("--measure", choices=list(OWN), required=True)
    options = parser.parse_args(arguments)
    asyncio.run(OWN[options.measure](options)).save(options.result)


# The table


@dataclass(frozen=True, slots=True)
class Speed:
    """The best run of a client: calls per second on the clock, seconds of processor time per call.

    worst_per_second: calls per second of the slowest run, to see how noisy the machine is.
    """

    client: str
    per_second: float
    cpu_seconds: float
    worst_per_second: float

    @classmethod
    def of_runs(cls, result: dict[str, Any]) -> Speed:
        runs = result["runs"]
        rates = [run["num_calls"] / run["seconds"] for run in runs]
        return cls(result["client"], max(rates), min(run["cpu_seconds"] / run["num_calls"] for run in runs), min(rates))

    def render(self) -> str:
        worst = "" if self.worst_per_second == self.per_second else f" ({self.worst_per_second:,.0f})"
        return f"{self.per_second:,.0f}{worst} | {1e6 * self.cpu_seconds:,.0f} µs"


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Runs the block, and what it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def served(core: int) -> Iterator[str]:
    """Yields the address of a server that takes no time, in a process of its own on one core."""
    with on_core(core):
        server = subprocess.Popen([sys.executable, "-m", "teacher.fault_server"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None, "it is a pipe"
    try:
        yield str(json.loads(server.stdout.readline())["url"])
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def measured(name: str, column: str, rows: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one client once against a server of its own; returns what its stopwatch saved.

    Raises CalledProcessError: it failed; output.txt in its folder says why.
    """
    client = CLIENTS[name]
    work.mkdir()
    if client.program is None:
        command = [sys.executable, "-m", "benchmarks.teacher_client", "--measure", name]
    else:
        script, *more = client.program
        command = [str(options.peers_python), str(HERE / "peers" / script), *more]
    cores = sorted(os.sched_getaffinity(0))
    with served(cores[0]) as url, on_core(cores[-1]), (work / "output.txt").open("w") as output:
        command += ["--url", url, "--rows", str(rows), "--column", column, "--warm-up", str(NUM_WARM_UP)]
        command += ["--runs", "1", "--concurrency", str(options.concurrency)]
        command += ["--work", str(work), "--result", str(work / "result.json")]
        folders = dict.fromkeys(("HOME", "HF_HOME", "CURATOR_CACHE_DIR"), str(work))
        environment = os.environ | PEERS_ENVIRONMENT | folders
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=environment)
    saved: dict[str, Any] = json.loads((work / "result.json").read_text("utf-8"))
    shutil.rmtree(work)
    return saved


def take_turns(rows: Path, options: argparse.Namespace) -> dict[tuple[str, str], Speed]:
    """Runs every client in turn, as often as wanted; returns their speeds by name and column."""
    turns = [(name, column) for name in options.clients for column in options.columns]
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for number in range(options.runs):
        for name, column in turns:
            saved = measured(name, column, rows, rows.parent / f"{name}-{column}", options)
            known = results.setdefault((name, column), {**saved, "runs": []})
            known["runs"] += saved["runs"]
            shown = Speed.of_runs(saved).render().replace("|", "calls/s,")
            print(
                f"run {number + 1} of {options.runs}: {name}, {COLUMNS[column]}: {shown}", file=sys.stderr, flush=True
            )
    return {turn: Speed.of_runs(result) for turn, result in results.items()}


def table(speeds: dict[tuple[str, str], Speed], options: argparse.Namespace) -> Iterator[str]:
    """Yields the lines of the table in Markdown."""
    heads = [head for column in options.columns for head in (f"{COLUMNS[column]}: calls/s", "processor time per call")]
    yield "| " + " | ".join(["client", "keeps replies", *heads]) + " |"
    yield "|---|---|" + "---:|---:|" * len(options.columns)
    for name in options.clients:
        cells = [speeds[name, column].render() for column in options.columns]
        yield "| " + " | ".join([CLIENTS[name].title, CLIENTS[name].keeps, *cells]) + " |"


def report(speeds: dict[tuple[str, str], Speed], columns: Sequence[str]) -> Iterator[str]:
    """Yields how ours compares with the faster peer, by column, and whether what was promised holds."""
    for column in columns:
        of_column = {name: speed for (name, spoken), speed in speeds.items() if spoken == column}
        ours = of_column.get("ours")
        peers = [speed for name, speed in of_column.items() if CLIENTS[name].is_peer]
        if ours is None:
            continue
        holds = "holds" if ours.per_second >= PROMISED_PER_SECOND else "DOES NOT HOLD"
        yield f"{COLUMNS[column]}: {ours.per_second:,.0f} calls/s; at least {PROMISED_PER_SECOND:,} {holds}"
        if peers:
            fastest = max(peers, key=lambda speed: speed.per_second)
            leanest = min(peers, key=lambda speed: speed.cpu_seconds)
            on_clock = ours.per_second / fastest.per_second
            holds = "holds" if on_clock >= PROMISED_RATIO else "DOES NOT HOLD"
            yield (
                f"{COLUMNS[column]}: {on_clock:.1f} times the fastest peer ({fastest.client}) on the clock, "
                f"{leanest.cpu_seconds / ours.cpu_seconds:.1f} times in processor time; "
                f"at least {PROMISED_RATIO} times {holds}"
            )


def main() -> None:
    if "--measure" in sys.argv:
        run_own_client(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000, help="rows that count, besides those to warm up")
    parser.add_argument("--runs", type=int, default=3, help="of each client, of which the best counts")
    parser.add_argument("--concurrency", type=int, default=256, help="rows in work at once")
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--work", type=Path, default=Path(".local/teacher-client"), help="folder for the data")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("server and client need a core each")
    if any(CLIENTS[name].is_peer for name in options.clients) and not options.peers_python.exists():
        parser.error(f"{options.peers_python} is missing; see benchmarks/peers/requirements.txt, or leave peers out")
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    rows = make_rows(options.work.absolute(), options.rows + NUM_WARM_UP)
    speeds = take_turns(rows, options)
    print(f"{machine()}; {options.rows:,} rows, {options.concurrency} in work, best (worst) of {options.runs}\n")
    print("\n".join([*table(speeds, options), "", *report(speeds, options.columns)]))


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(': ')[1]}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
