"""How much of a vLLM server's speed the label stage gets, beside a bare load generator at its best concurrency.

Both ask the same server (the bundled teacher) the questions of the performance heuristic, eight samples a row in one
call, about rows of the sample world that nobody asked about before, so that no cache favours who comes second. The
generator sends finished bodies and looks at nothing; its concurrency is chosen among several on rows of its own. Ours
is the stage as a curation runs it: rows read, requests rendered, admission by what the engine says, replies journalled
and verified, the shard written. They take turns; tokens are the server's own count.

    python -m benchmarks.teacher_vllm                          # starts vLLM (BIMODE_GPU_PYTHON) and stops it again
    python -m benchmarks.teacher_vllm --url http://127.0.0.1:8000/v1 --model bimode-sampleworld
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import aiohttp

from flows.runtime import Runtime
from flows.stages import Progress, label_shard
from flows.work_rows import unlabelled_table
from judges import performance
from sampleworld.evaluate import sample_of
from sampleworld.world import GLANCE, STEPS, draw_scene, render_scene
from schemas.config import RunConfig, ServeConfig, parse_config
from schemas.fates import fates_to_table
from schemas.samples import Sample, samples_to_table
from teacher.images import SentImages
from teacher.wire import render_body

HERE = Path(__file__).parent
TEACHER = HERE.parent / "sampleworld" / "teacher"
CONCURRENCIES = (2, 4, 8, 16, 32, 64)
"""Calls of eight samples at once that the generator tries."""


@dataclass(frozen=True, slots=True)
class Speed:
    """tokens: that the engine generated. seconds: on the clock."""

    tokens: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


def draw_samples(runtime: Runtime, num_rows: int, seed: int) -> list[Sample]:
    """Returns checkable rows about new scenes, their images in the store of the run."""
    rng = random.Random(seed)
    families = {**GLANCE, **STEPS}
    samples = []
    for _ in range(num_rows):
        scene = draw_scene(rng)
        task = rng.choice(list(families.values()))(scene, rng)
        samples.append(sample_of(task, runtime.images.put(render_scene(scene))))
    return samples


def run_stage(runtime: Runtime, samples: list[Sample], name: str) -> Speed:
    """Labels the rows by the stage as a curation runs it, and returns its speed."""
    table = unlabelled_table(samples_to_table(samples))
    before = runtime.workspace.finish_shard(
        "difficulty", name, digest=name, num_in=len(samples), rows=table, fates=fates_to_table([])
    )
    return _measured(runtime, lambda: label_shard(runtime, "performance", before, Progress(0)))


def run_generator(runtime: Runtime, samples: list[Sample], concurrency: int) -> Speed:
    """Sends the same questions about these rows, so many calls at once, and returns the speed."""
    bodies = runtime.run(_bodies(runtime, samples))
    return _measured(runtime, lambda: runtime.run(_send(runtime.config.teacher.url, bodies, concurrency)))


async def _bodies(runtime: Runtime, samples: list[Sample]) -> list[bytes]:
    config = runtime.config
    images = SentImages(
        runtime.group(config.teacher).endpoint, runtime.images.resized_bytes, runtime.images.resized_path
    )
    bodies = []
    for sample in samples:
        request = performance.performance_request(sample, 0, config.performance, seed=config.seed)
        body = render_body(
            request,
            model=config.teacher.model,
            images=await images.of_request(request),
            extra_body=config.teacher.extra_body,
            num_choices=config.performance.num_samples,
        )
        bodies.append(json.dumps(body).encode())
    return bodies


async def _send(url: str, bodies: list[bytes], concurrency: int) -> None:
    left = iter(bodies)

    async def work(session: aiohttp.ClientSession) -> None:
        for body in left:
            async with session.post(f"{url}/chat/completions", data=body) as response:
                response.raise_for_status()
                await response.read()

    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(None)) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))


def _measured(runtime: Runtime, work: Callable[[], object]) -> Speed:
    before, began = _generated_tokens(runtime.config.teacher.url), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return Speed(_generated_tokens(runtime.config.teacher.url) - before, seconds)


def _generated_tokens(url: str) -> int:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return round(
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
    )


def configuration(workdir: Path, url: str, model: str, serve: ServeConfig | None) -> RunConfig:
    return parse_config(
        {
            "workdir": str(workdir),
            "sources": [{"name": "evaluation", "format": "jsonl", "path": "none.jsonl"}],
            "teacher": {
                "model": model,
                "url": url,
                "extra_body": {"chat_template_kwargs": {"thinking_mode": "short"}},
                "max_image_pixels": 12544,
            },
            "performance": {"max_tokens": 64, "exhaustive": True, "waves": [8]},
            **({"serve": serve.model_dump()} if serve else {}),
        }
    )


@contextmanager
def opened(config: RunConfig) -> Iterator[Runtime]:
    """Yields the runtime, its server running and its first rows asked: start-up is nobody's speed."""
    runtime = Runtime(config)
    try:
        runtime.run(runtime.open(config.teacher))
        run_stage(runtime, draw_samples(runtime, 40, seed=1), "warm-up")
        yield runtime
    finally:
        runtime.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="rows of each turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="turns of each side (default: %(default)s)")
    parser.add_argument("--url", help="ask this vLLM server instead of starting one")
    parser.add_argument("--model", default="bimode-sampleworld", help="name of the served model")
    parser.add_argument("--port", type=int, default=8137, help="port of the server that is started")
    arguments = parser.parse_args()
    serve = None if arguments.url else ServeConfig(model_path=str(TEACHER), port=arguments.port, max_model_len=1024)
    url = arguments.url or f"http://127.0.0.1:{arguments.port}/v1"
    with (
        tempfile.TemporaryDirectory() as folder,
        opened(configuration(Path(folder), url, arguments.model, serve)) as runtime,
    ):
        measure(runtime, arguments.rows, arguments.turns)


def measure(runtime: Runtime, num_rows: int, num_turns: int) -> None:
    """Chooses the generator's concurrency, lets both sides take turns and prints the speeds and their ratio."""
    seeds = itertools.count(2)
    tried = {
        calls: run_generator(runtime, draw_samples(runtime, num_rows // 2, next(seeds)), calls).per_second
        for calls in CONCURRENCIES
    }
    best = max(tried, key=tried.__getitem__)
    print("bare generator, tokens/s by calls at once: " + ", ".join(f"{c}: {s:,.0f}" for c, s in tried.items()))
    ours: list[Speed] = []
    bare: list[Speed] = []
    for turn in range(num_turns):
        sides = [("ours", ours), ("bare", bare)]
        for name, speeds in sides if turn % 2 else reversed(sides):
            samples = draw_samples(runtime, num_rows, next(seeds))
            if name == "ours":
                speeds.append(run_stage(runtime, samples, f"turn-{turn}"))
            else:
                speeds.append(run_generator(runtime, samples, best))
            print(
                f"turn {turn}, {name}: {speeds[-1].per_second:,.0f} tokens/s ({speeds[-1].seconds:.1f} s)", flush=True
            )
    both = [sum(s.tokens for s in speeds) / sum(s.seconds for s in speeds) for speeds in (ours, bare)]
    ratios = [o.per_second / b.per_second for o, b in zip(ours, bare, strict=True)]
    print(f"\nlabel stage: {both[0]:,.0f} tokens/s; generator with {best} calls at once: {both[1]:,.0f} tokens/s")
    print(f"ratio {both[0] / both[1]:.3f} (asked: at least 0.95); median of the turns {median(ratios):.3f}")


if __name__ == "__main__":
    main()
