"""Writes the bundled sample data: raw questions about scenes that the teacher has never seen.

Three sources in three formats, as a team would bring them: checkable questions in Parquet with image bytes, open-ended
ones in JSON Lines with image paths, and conversations in LLaVA's form. Like real data they hold duplicates, and a few
rows that are broken: an image cut in half, an empty question, an answer outside its options. A benchmark lies beside
them, on other scenes, in the form in which the paper's are published.

    python -m sampleworld.demo --out sampleworld/data
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sampleworld.world import GLANCE, OPEN, STEPS, Task, draw_scene, render_scene

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("image", pa.binary()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("topic", pa.string()),
    ]
)
NUM_PER_GLANCE_FAMILY = 32
NUM_PER_STEPS_FAMILY = 30
NUM_PER_OPEN_FAMILY = 18
NUM_CONVERSATIONS = 16
NUM_PER_BENCHMARK_FAMILY = 20


def checkable_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Returns the Parquet rows, duplicates and broken rows among them. Every second row names its topic."""
    rows = []
    families = [*GLANCE.items()] * NUM_PER_GLANCE_FAMILY + [*STEPS.items()] * NUM_PER_STEPS_FAMILY
    for number, (_name, ask) in enumerate(families):
        scene = draw_scene(rng)
        rows.append(_checkable(f"q{number:03d}", ask(scene, rng), render_scene(scene), has_topic=number % 2 == 0))
    rng.shuffle(rows)
    copies = [{**row, "id": f"copy-{row['id']}"} for row in rows[:8]]
    reworded = [
        {**row, "id": f"reworded-{row['id']}", "question": f"Please: {row['question'].lower()}"}
        for row in rows[8:]
        if len(row["question"].split()) > 20
    ][:6]
    broken = [
        {**rows[20], "id": "broken-image", "image": rows[20]["image"][: len(rows[20]["image"]) // 2]},
        {**rows[21], "id": "broken-question", "question": "   "},
        {**rows[22], "id": "broken-answer", "choices": ["3", "5", "7"], "answer": "9"},
    ]
    return [*rows, *copies, *reworded, *broken]


def _checkable(name: str, task: Task, image: bytes, *, has_topic: bool) -> dict[str, Any]:
    return {
        "id": name,
        "question": task.question,
        "image": image,
        "choices": list(task.choices),
        "answer": task.answer,
        "topic": str(task.topic) if has_topic else None,
    }


def write_open(folder: Path, rng: random.Random) -> int:
    """Writes open-ended questions as JSON Lines beside their images; every second one has a reference answer."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (_name, ask) in enumerate([*OPEN.items()] * NUM_PER_OPEN_FAMILY):
        scene = draw_scene(rng)
        task = ask(scene, rng)
        path = images / f"open-{number:03d}.png"
        path.write_bytes(render_scene(scene))
        has_answer = number % 4 == 0
        row = {"id": f"o{number:03d}", "question": task.question, "image": f"images/{path.name}"}
        lines.append(json.dumps({**row, "answer": task.answer} if has_answer else row))
    (folder / "open.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def write_conversations(folder: Path, rng: random.Random) -> int:
    """Writes single-turn conversations in LLaVA's form."""
    rows = []
    for number in range(NUM_CONVERSATIONS):
        scene = draw_scene(rng)
        families = STEPS if number % 2 else GLANCE
        task = families[rng.choice(list(families))](scene, rng)
        path = folder / "images" / f"talk-{number:03d}.png"
        path.write_bytes(render_scene(scene))
        turns = [
            {"from": "human", "value": f"<image>\n{task.question}"},
            {"from": "gpt", "value": task.answer},
        ]
        rows.append({"id": f"c{number:03d}", "image": f"images/{path.name}", "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return len(rows)


def write_benchmark(folder: Path, rng: random.Random) -> int:
    """Writes questions on scenes of their own as a benchmark in VLMEvalKit's form: a TSV file with base64 images."""
    with (folder / "benchmark.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer", "category"])
        families = {**GLANCE, **STEPS}
        for number, (family, ask) in enumerate([*families.items()] * NUM_PER_BENCHMARK_FAMILY):
            scene = draw_scene(rng)
            task = ask(scene, rng)
            image = base64.b64encode(render_scene(scene)).decode()
            writer.writerow([number, image, task.question, task.answer, family])
    return len(families) * NUM_PER_BENCHMARK_FAMILY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sample data")
    parser.add_argument("--seed", type=int, default=2026, help="seed; test scenes come from even streams")
    arguments = parser.parse_args()
    rng = random.Random(2 * arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = checkable_rows(rng)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), arguments.out / "checkable.parquet", compression="zstd")
    num_open, num_talks = write_open(arguments.out, rng), write_conversations(arguments.out, rng)
    num_benchmark = write_benchmark(arguments.out, random.Random(2 * (arguments.seed + 1)))
    print(
        f"{arguments.out}: {len(rows)} checkable rows, {num_open} open-ended ones, {num_talks} conversations, "
        f"{num_benchmark} benchmark questions"
    )


if __name__ == "__main__":
    main()
