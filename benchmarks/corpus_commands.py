"""`bimode show`, `diff` and `validate` on a large corpus: seconds and peak memory of each, as whole commands.

    python -m benchmarks.corpus_commands [--rows 1000000] [--folder FOLDER]

Made first, and kept if a folder is named: a work folder whose first stage holds all rows, in shards of 1,000 (of the
later stages, the shard that is looked at), and two versions with a picture in every row, in shards of 5,000. The second
version was made by another recipe, so that no shard is the same: every 20th row changed its mode, every 50th is gone,
and a hundredth is new. Every command runs in a process of its own, imports included.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import yaml
from PIL import Image

from benchmarks.cards import table_lines
from corpus.card import CardInputs, build_card, mode_sizes
from corpus.storage import write_text
from corpus.tally import tally_corpus
from corpus.versions import CARD, FATES, FIGURES, REPORT, begin_version, commit_version
from corpus.writer import write_fates, write_shards
from flows.stages import SOURCES, STAGES
from flows.work_rows import WorkRow, unlabelled_table, work_table
from flows.workspace import Workspace
from schemas.fates import FATE_SCHEMA, StageCount, count_stage
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, content_id, samples_to_table
from schemas.verdicts import Decision, Heuristic, Mode

SHARD_ROWS, CORPUS_SHARD_ROWS = 1000, 5000
NUM_PICTURES = 16
_COMMAND = """
import atexit, re, sys, typer
from pathlib import Path
from flows.commands.{name} import {name}
peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
atexit.register(lambda: print(peak(), file=sys.stderr))
typer.run({name})
"""


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (28, 28), (number * 15, 90, 200)).save(stream, format="PNG")
    return stream.getvalue()


PICTURES = {hashlib.sha256(content).hexdigest(): content for content in map(picture, range(NUM_PICTURES))}
_NAMES = sorted(PICTURES)


def sample(number: int) -> Sample:
    question = f"Which number do the red and the blue cell of picture {number} show together, and how is that found?"
    name, answer = _NAMES[number % NUM_PICTURES], str(number % 90)
    return Sample(
        id=content_id("bench", question, [name], (), answer, str(number)),
        source="bench",
        origin=f"bench:questions.jsonl#{number}",
        question=question,
        images=(ImageRef(name, 28, 28),),
        answer=answer,
        source_id=str(number),
        topic=list(Topic)[number % 9],
        kind=Kind.OBJECTIVE,
        answer_type=AnswerType.NUMBER,
        licence="MIT",
    )


def labelled(number: int, *, is_second: bool) -> LabelledSample:
    """Returns a row as one of the two versions has it; a third of the rows think."""
    thinks = (number % 3 == 0) is not (is_second and number % 20 == 0)
    mode = Mode.THINK if thinks else Mode.DIRECT
    decision = Decision(mode, Heuristic.PERFORMANCE, 0 if thinks else 1, 8 if thinks else 1, 8)
    row = sample(number)
    thought = f"The red cell shows {number % 7}, the blue one the rest, so that both make {row.answer}. " * 4
    return LabelledSample(row, decision, thought if thinks else "", str(row.answer), "teacher", "teacher")


def write_version(corpus: Path, num_rows: int, *, is_second: bool) -> None:
    """Publishes a version as a curation does, with a stand-in for its report."""
    numbers = range(num_rows + num_rows // 100 if is_second else num_rows)
    kept = [number for number in numbers if not (is_second and number % 50 == 1)]
    parts = (kept[start : start + SHARD_ROWS] for start in range(0, len(kept), SHARD_ROWS))
    tables = (labelled_table(labelled(number, is_second=is_second) for number in part) for part in parts)
    building = begin_version(corpus)
    recipe = ("cd" if is_second else "ab") * 32
    shards = write_shards(
        tables, building, shard_rows=CORPUS_SHARD_ROWS, read_image=PICTURES.__getitem__, recipe=recipe
    )
    write_fates([], building / FATES)
    num_written = sum(shard.num_rows for shard in shards)
    counts: dict[str, StageCount] = {"corpus": count_stage(num_written, num_written, [])}
    tally, sizes = tally_corpus(building), mode_sizes(shards)
    write_text(building / CARD, build_card(CardInputs("b", "v", "", "mit", recipe, "t", "", counts, tally, sizes)))
    for name in (REPORT, FIGURES):
        write_text(building / name, "{}")
    commit_version(building, name="bench", created="", recipe=recipe, inputs="", shards=shards, counts=counts)


def write_run(folder: Path, num_rows: int) -> Path:
    """Writes the work folder of a run and its configuration, whose path is returned."""
    workspace = Workspace(folder)
    fates = FATE_SCHEMA.empty_table()
    for start in range(0, num_rows, SHARD_ROWS):
        samples = [sample(number) for number in range(start, min(start + SHARD_ROWS, num_rows))]
        shard, rows = f"bench-{start // SHARD_ROWS:05d}", samples_to_table(samples)
        workspace.finish_shard(SOURCES, shard, digest="", num_in=rows.num_rows, rows=rows, fates=fates)
        if start <= num_rows // 2 < start + SHARD_ROWS:
            for stage, table in _later_stages(samples, rows):
                workspace.finish_shard(stage, shard, digest="", num_in=table.num_rows, rows=table, fates=fates)
    source = {"name": "bench", "format": "jsonl", "path": "none.jsonl"}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({"workdir": str(folder), "sources": [source]}), encoding="utf-8")
    return config


def _later_stages(samples: list[Sample], rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    labels = [labelled(int(str(row.source_id)), is_second=False) for row in samples]
    decided = work_table(WorkRow(row.sample, row.decision, row.reasoning, row.answer) for row in labels)
    for stage in STAGES[2:]:
        yield stage, unlabelled_table(rows) if stage in ("duplicates", "routing", "difficulty") else decided


def measure(name: str, *arguments: str) -> str:
    """Returns what one command took. Raises CalledProcessError: it failed."""
    before, began = os.times(), time.monotonic()
    program = [sys.executable, "-c", _COMMAND.format(name=name), *arguments]
    done = subprocess.run(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, after = time.monotonic() - began, os.times()
    computed = after.children_user + after.children_system - before.children_user - before.children_system
    # Not the peak that the parent is told of: that counts what the parent itself held when the process began.
    peak = int(done.stderr.split()[-1]) / 2**20
    return f"{seconds:.1f} s ({computed:.1f} s of processor time), {peak:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        config, corpus = folder / "run.yaml", folder / "corpus"
        if not config.exists():
            began = time.monotonic()
            for is_second in (False, True):
                write_version(corpus, arguments.rows, is_second=is_second)
            write_run(folder, arguments.rows)
            print(f"made in {time.monotonic() - began:.0f} s")
        shown = sample(arguments.rows // 2)
        commands = [
            ["show", shown.id, "--config", str(config)],
            ["show", shown.origin, "--config", str(config)],
            ["show", shown.id, "--corpus", str(corpus)],
            ["diff", "v0001", "v0002", "--corpus", str(corpus), "--ids", str(folder / "ids.parquet")],
            ["diff", "v0001", "v0001", "--corpus", str(corpus)],
            ["validate", "v0001", "--corpus", str(corpus)],
        ]
        print("\n".join(table_lines([(" ".join(command[:4]), measure(*command)) for command in commands])))


if __name__ == "__main__":
    main()
