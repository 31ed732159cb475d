"""Relabelling many rows from stored replies, with one threshold or one setting of the verifier changed.

    python -m benchmarks.relabel [--rows 1000000] [--scenarios threshold verifier] [--processes 2] [--folder FOLDER]

A work folder is made as a curation leaves it: the rows, every reply in compacted journals under its real key, and what
the stages had decided. Six of ten rows are checkable (half with options, half with numbers) and hold one to eight
samples of about 45 words; the others are open and hold a difficulty verdict with its probability. A third of all rows
think, with a trace of about 90 words, a tenth of them at the second try; open ones were judged consistent. Half of the
rows show one of 24 small images. Making this is not timed. That the replies mean what the stages had decided is checked
on one shard.

Then, each in a process of its own and on a copy of the folder, `difficulty.threshold` goes from 0.5 to 0.6 and
`verification.relative_tolerance` from 0.0001 to 0.02, by the code of `bimode relabel`, to the published version. The
teacher's address is one where nobody listens. Printed are seconds, by phase, rows per second, and the peak of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.cards import table_lines
from flows.relabelling import relabel
from flows.removing import settle
from flows.replaying import replay_stage
from flows.runtime import Runtime
from flows.setting_changes import changed_config
from flows.stages import DUPLICATES, SOURCES, stage_digest
from flows.work_rows import WorkRow, labelled_table, unlabelled_table
from flows.workspace import Marker, Workspace
from judges import difficulty, performance, reasoning
from judges.answers import VerifierPool
from schemas.config import RunConfig, parse_config
from schemas.fates import FATE_SCHEMA
from schemas.requests import TeacherRequest
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, content_id, samples_to_table
from schemas.template import parse_completion
from schemas.verdicts import Decision, Heuristic, Mode
from sources import ImageStore
from teacher.attempts import create_attempt, remove_covered
from teacher.client import reply_key
from teacher.compacted import SCHEMA, write_compacted_tables

SHARD_ROWS = 1000
NUM_PICTURES = 24
SCENARIOS: dict[str, dict[str, Any]] = {
    "threshold": {"difficulty.threshold": 0.6},
    "verifier": {"verification.relative_tolerance": 0.02},
}
_NOWHERE = "http://127.0.0.1:9/v1"
_MODEL = "stored"
_TEXT = (
    "the a of in left right figure count each red blue box number side is then so that see total gives value length "
    "width angle adding together line measure picture shows small large next row column between upper lower point "
    "triangle circle square half twice first second third last shape colour area price table bar year"
)
_WORDS = tuple(_TEXT.split())
_TOPICS = tuple(Topic)


@dataclass(slots=True)
class Replies:
    """Stored replies of one journal, by column."""

    config: RunConfig
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SCHEMA.names})

    def add(
        self, request: TeacherRequest, text: str, *, num_words: int, logprobs: Sequence[tuple[str, float]] = ()
    ) -> None:
        """Stores a reply under the request's real key."""
        messages = [{"role": m.role, "text": m.text, "images": m.images} for m in request.messages]
        sampling = request.sampling
        row = {
            "key": reply_key(request, self.config.teacher),
            "sample_id": request.sample_id,
            "purpose": request.purpose,
            "index": request.index,
            "seed": request.seed,
            "messages": json.dumps(messages, ensure_ascii=False, separators=(",", ":")),
            "images": [sha256 for message in request.messages for sha256 in message.images],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "choices": request.choices,
            "text": text,
            "finish_reason": "stop",
            "model": _MODEL,
            "reasoning": None,
            "top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in logprobs],
            "prompt_tokens": 400,
            "completion_tokens": num_words * 4 // 3,
            "cached_tokens": 0,
            "seconds": 1.5,
            "choice": 0,
            "num_attempts": 1,
            "stored_at": 1_800_000_000_000,
            "exact_record": None,
        }
        for name, value in row.items():
            self.columns[name].append(value)

    def write(self, folder: Path) -> None:
        table = pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in self.columns.items()})
        order = [(name, "ascending") for name in ("sample_id", "purpose", "index", "key")]
        number, file = create_attempt(folder)
        os.close(file)
        write_compacted_tables(folder, number, [table.cast(SCHEMA).sort_by(order)])
        remove_covered(folder, number)


class RowMaker:
    """Makes rows with their replies and what had been decided of them."""

    def __init__(self, config: RunConfig, shard: int, pictures: Sequence[ImageRef]) -> None:
        self._config, self._pictures = config, pictures
        self._drawn = random.Random(shard)
        self.replies = {stage: Replies(config) for stage in ("difficulty", "performance", "reasoning", "answers")}
        self.samples: list[Sample] = []
        self.decided: dict[str, list[WorkRow]] = {"difficulty": [], "performance": [], "reasoning": []}

    def text(self, num_words: int) -> str:
        words = self._drawn.choices(_WORDS, k=num_words)
        return " ".join(word + "." if place % 12 == 11 else word for place, word in enumerate(words))

    def make(self, number: int) -> None:
        drawn = self._drawn
        kind = number % 10
        has_choices, is_open = kind < 3, kind >= 6
        images = (self._pictures[number % NUM_PICTURES],) if number // 10 % 2 else ()
        choices = tuple(f"{value} cm" for value in drawn.sample(range(10, 99), 4)) if has_choices else ()
        reference = self.text(45) if is_open else drawn.choice("ABCD") if has_choices else f"{drawn.randint(1, 999)}.5"
        answer = None if kind == 9 else reference
        question = f"Row {number}: {self.text(drawn.randint(20, 40))}?"
        hashes = [image.sha256 for image in images]
        sample = Sample(
            content_id("rows", question, hashes, choices, answer, str(number)),
            "rows",
            f"rows:rows.jsonl#{number}",
            question,
            images,
            choices,
            answer,
            str(number),
            _TOPICS[number % 9],
            Kind.SUBJECTIVE if is_open else Kind.OBJECTIVE,
            AnswerType.OPEN if is_open else AnswerType.CHOICE if has_choices else AnswerType.NUMBER,
        )
        self.samples.append(sample)
        row = WorkRow(sample)
        row = self._judge(row) if is_open else row
        self.decided["difficulty"].append(row)
        row = row if is_open else self._sample(row)
        self.decided["performance"].append(row)
        self.decided["reasoning"].append(self._think(row))

    def _judge(self, row: WorkRow) -> WorkRow:
        """A row without a reference is far from the changed threshold: its other answer would not be stored."""
        yes = self._drawn.random()
        if row.sample.answer is None and 0.45 < yes < 0.65:
            yes = 0.7
        # As the judge reads it.
        logprobs = (("yes", math.log(yes)), ("no", math.log(1 - yes)))
        masses = [math.exp(logprob) for _, logprob in logprobs]
        request = difficulty.difficulty_request(row.sample)
        self.replies["difficulty"].add(request, "yes" if yes > 0.5 else "no", num_words=1, logprobs=logprobs)
        probability = masses[0] / sum(masses)
        mode = Mode.THINK if probability >= self._config.difficulty.threshold else Mode.DIRECT
        if mode is Mode.DIRECT and row.sample.answer is None:
            direct = reasoning.direct_request(row.sample, self._config.direct, seed=self._config.seed)
            self.replies["answers"].add(direct, self.text(30), num_words=30)
        return WorkRow(row.sample, Decision(mode, Heuristic.DIFFICULTY, probability=probability))

    def _sample(self, row: WorkRow) -> WorkRow:
        """The first right sample: at once for most rows, at the second to eighth for some, never for a quarter."""
        settings, sample = self._config.performance, row.sample
        luck = self._drawn.random()
        first_right = 0 if luck < 0.55 else self._drawn.randint(1, 7) if luck < 0.75 else None
        is_audit = performance.is_audited(sample, settings, seed=self._config.seed)
        settled = 8 if first_right is None or is_audit else first_right + 1
        request = performance.performance_request(sample, 0, settings, seed=self._config.seed)
        num_right = 0
        for index in range(settled):
            is_right = first_right is not None and (index == first_right or (index > first_right and index % 2 == 0))
            num_right += is_right
            text = f"{self.text(40)}\nAnswer: {self._said(sample, is_right=is_right)}"
            self.replies["performance"].add(request.sample(index), text, num_words=45)
        mode = Mode.DIRECT if num_right else Mode.THINK
        return WorkRow(sample, Decision(mode, Heuristic.PERFORMANCE, num_right, settled, settled, is_audit=is_audit))

    def _said(self, sample: Sample, *, is_right: bool) -> str:
        reference = sample.answer or ""
        if is_right:
            return reference
        if sample.choices:
            return "BCDA"["ABCD".index(reference)]
        # One wrong number in ten is within the changed tolerance.
        return f"{float(reference) * (1.01 if self._drawn.random() < 0.1 else 1.5):.3f}"

    def _think(self, row: WorkRow) -> WorkRow:
        sample, settings = row.sample, self._config.reasoning
        assert row.decision is not None, "every row is decided before it thinks"
        if row.decision.mode is Mode.DIRECT:
            return row
        is_open = sample.kind is Kind.SUBJECTIVE
        answer = self.text(12) if is_open else f"Answer: {sample.answer}"
        is_second = self._drawn.random() < 0.1
        texts = [*(["<think>Too short.</think>7"] if is_second else []), f"<think>{self.text(90)}</think>{answer}"]
        for index, text in enumerate(texts):
            request = reasoning.reasoning_request(sample, index, settings, seed=self._config.seed)
            self.replies["reasoning"].add(request, text, num_words=100)
        trace = parse_completion(texts[-1])
        if is_open:
            self.replies["reasoning"].add(
                reasoning.consistency_request(sample, trace), "consistent", num_words=1, logprobs=[("consistent", -0.1)]
            )
        return WorkRow(sample, row.decision, trace.reasoning, trace.answer if is_open else sample.answer)


def configuration(workdir: Path) -> RunConfig:
    return parse_config(
        {
            "name": "stored",
            "workdir": str(workdir),
            "shard_rows": SHARD_ROWS,
            "sources": [{"name": "rows", "format": "jsonl", "path": str(workdir / "rows.jsonl")}],
            "teacher": {"model": _MODEL, "url": _NOWHERE},
        }
    )


def make_shard(config: RunConfig, pictures: Sequence[ImageRef], num_rows: int, index: int) -> list[Marker]:
    """Writes one shard as a curation leaves it, and returns the markers of `sources` and `duplicates`."""
    maker = RowMaker(config, index, pictures)
    start = index * SHARD_ROWS
    for number in range(start, min(start + SHARD_ROWS, num_rows)):
        maker.make(number)
    workspace, shard = Workspace(config.workdir), f"rows-{index:05d}"
    for stage, replies in maker.replies.items():
        replies.write(workspace.journal_path(stage, shard))
    table = samples_to_table(maker.samples)
    read = _finish(workspace, SOURCES, shard, "written", table)
    before = unique = _finish(workspace, DUPLICATES, shard, "written", unlabelled_table(table))
    places, rows = np.arange(len(table)), workspace.read_rows(DUPLICATES, shard)
    for stage in ("routing", "difficulty", "performance", "reasoning"):
        if stage in maker.decided:
            rows = labelled_table(rows, places, maker.decided[stage])
        before = _finish(workspace, stage, shard, stage_digest(stage, config, before.output), rows.combine_chunks())
    return [read, unique]


def _finish(workspace: Workspace, stage: str, shard: str, digest: str, rows: pa.Table) -> Marker:
    return workspace.finish_shard(
        stage, shard, digest=digest, num_in=rows.num_rows, rows=rows, fates=FATE_SCHEMA.empty_table()
    )


def make_world(config: RunConfig, num_rows: int, num_processes: int) -> None:
    """Writes the work folder of a published corpus."""
    runtime = Runtime(config)
    pictures = [_picture(runtime.images, number) for number in range(NUM_PICTURES)]
    make = partial(make_shard, config, pictures, num_rows)
    with ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_trust_memory) as processes:
        markers = list(processes.map(make, range(-(-num_rows // SHARD_ROWS))))
    settle(runtime, [read for read, _ in markers], [unique for _, unique in markers])
    runtime.close()


def _not_flushed(fd: Any) -> None:
    return


def _trust_memory() -> None:
    """What is made here need not survive a crash; flushing it file by file would take longer than making it."""
    os.fsync = _not_flushed


def _picture(images: ImageStore, number: int) -> ImageRef:
    stream = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).resize((64, 48)).save(stream, format="PNG")
    return images.put(stream.getvalue())


def check_shard(config: RunConfig) -> None:
    """Replays the first shard under the settings it was made with. Raises AssertionError: it was made wrongly."""
    workspace, shard = Workspace(config.workdir), "rows-00000"
    with asyncio.Runner() as runner, VerifierPool(config.verification) as verifier:
        for before, stage in (("routing", "difficulty"), ("difficulty", "performance"), ("performance", "reasoning")):
            folder, table = workspace.journal_path(stage, shard), workspace.read_rows(before, shard)
            found = replay_stage(stage, config, table, folder, verifier=verifier, runner=runner)
            assert found.missing == () and found.fates.num_rows == 0, f"{stage}: {found.missing} {found.fates}"
            assert found.rows.equals(workspace.read_rows(stage, shard)), f"the replies of {stage} say something else"


def measure(config: RunConfig, scenario: str, num_processes: int) -> dict[str, Any]:
    """Relabels, and returns what was seen. The peak of memory is that of this process and of its largest child."""
    began = time.monotonic()
    phases: dict[str, float] = {"labels": began}
    own_seconds: dict[str, float] = {"labels": time.process_time()}

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)
        if line in ("comparing traces", "writing the corpus"):
            phases[line], own_seconds[line] = time.monotonic(), time.process_time()

    changed = changed_config(config, SCENARIOS[scenario])
    found = relabel(config, changed, num_processes=num_processes, say=say)
    ended = time.monotonic()
    assert found.published is not None and not found.missing, "the scenario needs no new reply"
    assert found.published.paid.num_calls == 0, "no call is made"
    starts = [*phases.values(), ended]
    own_seconds["end"] = time.process_time()
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "rows": found.num_rows,
        "rows changed": found.num_changed,
        "seconds": ended - began,
        "rows/s": found.num_rows / (ended - began),
        **{f"seconds, {name}": stop - start for name, start, stop in zip(phases, starts[:-1], starts[1:], strict=True)},
        "processor seconds, writing the corpus": own_seconds["end"] - own_seconds["writing the corpus"],
        "processor seconds, all": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak of the process, MiB": own.ru_maxrss / 1024,
        "peak of a worker, MiB": children.ru_maxrss / 1024,
    }


def run_scenario(world: Path, scenario: str, num_processes: int) -> dict[str, Any]:
    """Measures a scenario in a fresh process, on a copy of the world that shares its files."""
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        copy = Path(folder, "work")
        shutil.copytree(world, copy, copy_function=os.link)
        command = [sys.executable, "-m", "benchmarks.relabel", "--measure", scenario, "--folder", str(copy)]
        output = subprocess.run(
            [*command, "--processes", str(num_processes)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    measured: dict[str, Any] = json.loads(output)
    return measured


def _lines(measured: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in measured.items():
        yield name, round(value, 1) if isinstance(value, float) and value < 1000 else round(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the work folder is made, or found; a temporary one by default"
    )
    parser.add_argument("--measure", choices=list(SCENARIOS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        config = configuration(arguments.folder)
        print(json.dumps(measure(config, arguments.measure, arguments.processes)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        world = (arguments.folder or Path(temporary)) / "work"
        config = configuration(world)
        if not world.exists():
            began = time.monotonic()
            make_world(config, arguments.rows, arguments.processes)
            print(f"{arguments.rows:,} rows were made in {time.monotonic() - began:.0f} s", file=sys.stderr)
        check_shard(config)
        for scenario in arguments.scenarios:
            print(f"{scenario}: {SCENARIOS[scenario]}, {arguments.processes} processes")
            print("\n".join(table_lines(list(_lines(run_scenario(world, scenario, arguments.processes))))), flush=True)


if __name__ == "__main__":
    main()
