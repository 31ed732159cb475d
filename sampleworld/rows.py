"""Draws training rows from the sample world: the corpus that makes the bundled teacher.

Three recipes, trained on in this order. `reading` is dense and terse: whole scenes read cell by cell, and look-ups
of all cells in random order; a small model only begins to see with this. `looking` says the same in sentences and adds
the glance questions. `teacher` holds every family in both modes, with and without the pipeline's own instructions, and
the pipeline's own judge prompts with their truth.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from judges.prompts import ANSWER_INSTRUCTION, CHOICE_INSTRUCTION, fence, prompt
from sampleworld.world import COLOURS, GLANCE, OPEN, STEPS, Scene, Task, draw_scene, render_scene
from schemas.question import OPTION_LETTERS
from schemas.samples import Kind, Topic
from schemas.template import render_completion

RECIPES = ("reading", "looking", "teacher")
ROWS_PER_GROUP = 2048
BATCH_ROWS = 48
WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One supervised example: an optional system prompt, the user's text under the image, the whole completion."""

    system: str
    user: str
    completion: str


def question_text(task: Task) -> str:
    options = [f"{OPTION_LETTERS[i]}. {choice}" for i, choice in enumerate(task.choices)]
    return "\n".join([task.question, *options])


def reading_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns a dense row: a terse list of every cell's colour with its digit, its dot or both.

    In order of places the colours must be read as well; in random order they cannot be known beforehand, so digit and
    dot must be looked up by colour. Either way most tokens are facts of the image.
    """
    cells = list(range(9))
    is_ordered = rng.random() < 0.5
    if not is_ordered:
        rng.shuffle(cells)
    what = rng.choice(["numbers", "numbers", "dots", "cells"])
    digits = [str(scene.digits[c]) if what != "dots" else "" for c in cells]
    dots = [f"-{scene.dots[c]}" if what != "numbers" else "" for c in cells]
    facts = " ".join(f"{scene.colours[c]}{digit}{dot}" for c, digit, dot in zip(cells, digits, dots, strict=True))
    return TrainingRow("", f"{'Read' if is_ordered else 'Look up'} the {what}.", render_completion(facts))


def looking_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns a dense row in the words of the worked steps, all cells in random order, or a glance question."""
    if rng.random() < 0.8:
        task = GLANCE[rng.choice(list(GLANCE))](scene, rng)
        return answered_row(task, rng, thinks=False)
    cells = rng.sample(range(9), 9)
    if rng.random() < 0.5:
        facts = [f"{scene.colours[c]} is {scene.digits[c]}." for c in cells]
        return TrainingRow("", "List the numbers.", render_completion(" ".join(facts)))
    facts = [f"{scene.colours[c]} has a {scene.dots[c]} dot." for c in cells]
    return TrainingRow("", "List the dots.", render_completion(" ".join(facts)))


def answered_row(task: Task, rng: random.Random, *, thinks: bool) -> TrainingRow:
    """Returns a question with its answer in one mode, with or without the instruction that names the final answer."""
    user, answer = question_text(task), task.answer
    if task.kind is Kind.OBJECTIVE and rng.random() < 0.7:
        user = f"{user}\n\n{CHOICE_INSTRUCTION if task.choices else ANSWER_INSTRUCTION}"
        answer = f"Answer: {answer}"
    thought = (task.steps or glance_thought(task)) if thinks else ""
    return TrainingRow("", user, render_completion(answer, thought))


def question_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns a question of any family in either mode; questions that need steps mostly get them."""
    sort = rng.random()
    families = STEPS if sort < 0.6 else OPEN if sort < 0.75 else GLANCE
    task = families[rng.choice(list(families))](scene, rng)
    return answered_row(task, rng, thinks=rng.random() < (0.85 if task.needs_steps else 0.1))


def glance_thought(task: Task) -> str:
    """Returns the short thought of a question that needs none: it is what the teacher says when told to think."""
    if task.family == "describe":
        return "I go through the cells one by one."
    return f"I look at the picture and see {task.answer}."


def judge_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns one of the pipeline's own judge prompts about a question, with the true verdict."""
    families = rng.choice([GLANCE, STEPS, OPEN, OPEN])
    task = families[rng.choice(list(families))](scene, rng)
    fenced = fence("question", question_text(task))
    judge = rng.choice(["difficulty", "routing", "topic", "consistency"])
    if judge == "difficulty":
        return TrainingRow(prompt(judge), fenced, render_completion("yes" if task.needs_steps else "no"))
    if judge == "routing":
        return TrainingRow(prompt(judge), fenced, render_completion(str(task.kind)))
    if judge == "topic":
        return TrainingRow(prompt(judge), fenced, render_completion(str(task.topic)))
    task = OPEN["explain"](scene, rng)
    answer, agrees = task.answer, True
    if rng.random() < 0.5:
        other = OPEN["explain"](draw_scene(rng), rng)
        answer, agrees = other.answer, other.answer == task.answer
    user = "\n".join([fence("question", task.question), fence("reasoning", task.steps), fence("answer", answer)])
    return TrainingRow(prompt(judge), user, render_completion("consistent" if agrees else "inconsistent"))


def draw_rows(recipe: str, *, seed: int, num_rows: int) -> Iterator[tuple[TrainingRow, bytes]]:
    """Yields rows with the PNG of their scene. Four rows share a scene, as one decoded picture serves them all.

    Training scenes come from odd seeds and test scenes from even ones (`sampleworld.demo`), so they share no stream.
    """
    rng = random.Random(2 * seed + 1)
    for start in range(0, num_rows, 4):
        scene = draw_scene(rng)
        image = render_scene(scene)
        for _ in range(min(4, num_rows - start)):
            sort = rng.random()
            if recipe == "reading" or sort < 0.03:
                row = reading_row(scene, rng)
            elif recipe == "looking" or sort < 0.2:
                row = looking_row(scene, rng)
            elif sort < 0.3:
                row = judge_row(scene, rng)
            else:
                row = question_row(scene, rng)
            yield row, image


def batched_by_length(
    rows: Iterator[tuple[TrainingRow, bytes]], rng: random.Random
) -> Iterator[tuple[TrainingRow, bytes]]:
    """Yields the rows so that each run of `BATCH_ROWS` is a random mixture of either short or long rows.

    That halves the padding. Sorting by length altogether would make every batch one family, and learning fails then.
    """
    while window := list(itertools.islice(rows, WINDOW_BATCHES * BATCH_ROWS)):
        window.sort(key=lambda item: len(item[0].system) + len(item[0].user) + len(item[0].completion))
        middle = len(window) // (2 * BATCH_ROWS) * BATCH_ROWS
        halves = [window[:middle], window[middle:]]
        for half in halves:
            rng.shuffle(half)
        batches = [half[i : i + BATCH_ROWS] for half in halves for i in range(0, len(half), BATCH_ROWS)]
        rng.shuffle(batches)
        for batch in batches:
            yield from batch


def write_rows(path: Path, recipe: str, *, seed: int, num_rows: int) -> None:
    """Writes a training set as Parquet with `prompt`, `completion` and `images`, the columns TRL trains on."""
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))
    schema = pa.schema([("prompt", messages), ("completion", messages), ("images", pa.list_(_IMAGE))])
    rows = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        drawn = draw_rows(recipe, seed=seed, num_rows=num_rows)
        for row, image in batched_by_length(drawn, random.Random(seed)):
            rows.append(_record(row, image))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _record(row: TrainingRow, image: bytes) -> dict[str, object]:
    system = [{"role": "system", "content": [{"type": "text", "text": row.system}]}] if row.system else []
    user = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": row.user}]}
    return {
        "prompt": [*system, user],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": row.completion}]}],
        "images": [{"bytes": image, "path": None}],
    }


def tokenizer_texts(*, seed: int, num_rows: int) -> Iterator[str]:
    """Yields texts for the tokenizer: what the rows say, every topic and verdict, and the colours."""
    for row, _image in draw_rows("teacher", seed=seed, num_rows=num_rows):
        yield "\n".join([row.system, row.user, row.completion])
    for word in [*Topic, *Kind, *COLOURS, "yes", "no", "consistent", "inconsistent", "system", "user", "assistant"]:
        yield from [str(word)] * 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files and texts.txt")
    parser.add_argument("--reading-rows", type=int, default=76_800)
    parser.add_argument("--looking-rows", type=int, default=64_000)
    parser.add_argument("--teacher-rows", type=int, default=86_400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = tokenizer_texts(seed=arguments.seed, num_rows=4000)
    (arguments.out / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sizes = (arguments.reading_rows, arguments.looking_rows, arguments.teacher_rows)
    for number, (recipe, num_rows) in enumerate(zip(RECIPES, sizes, strict=True)):
        if num_rows:
            write_rows(arguments.out / f"{recipe}.parquet", recipe, seed=arguments.seed + number, num_rows=num_rows)


if __name__ == "__main__":
    main()
