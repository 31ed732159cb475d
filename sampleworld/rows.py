"""Draws training rows from the sample world: what makes the bundled teacher, and the base that experiments start from.

Recipes are trained on one after the other (`MODELS`), each a mixture of sorts of rows. *Reading* rows are dense and
terse: whole scenes cell by cell, in order or at random; a small model only begins to see with them, and only if they
are all there is. *Looking* rows say the same in sentences and ask the glance questions. *Question* rows hold every
family in both modes, with and without the pipeline's own instructions; *judge* rows are the pipeline's own judge
prompts with their truth. The teacher's second recipe has some of each sort: a run that begins with texts never seen
before unlearns what the one before it taught. *Skill* and *walk* rows are for the base: sentences, sums and visits to
cells, never a question.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from corpus.storage import replacing, write_text
from judges.prompts import ANSWER_INSTRUCTION, CHOICE_INSTRUCTION, fence, prompt
from sampleworld.world import (
    COLOURS,
    GLANCE,
    OPEN,
    STEPS,
    Scene,
    Task,
    draw_scene,
    render_scene,
    running_result,
)
from schemas.question import OPTION_LETTERS
from schemas.samples import Kind, Topic
from schemas.template import render_completion

RECIPES = ("reading", "looking", "teacher", "skills", "walks", "base")
"""A recipe's place gives the seed of its rows: append new ones."""
MODELS = {"teacher": ("reading", "looking", "teacher"), "base": ("reading", "skills", "walks", "base")}
"""By model, the recipes it is trained with, one after the other."""

SHARES = {
    "reading": {"reading": 1.0, "looking": 0.0, "question": 0.0, "judge": 0.0, "skill": 0.0, "walk": 0.0},
    "looking": {"reading": 0.20, "looking": 0.50, "question": 0.20, "judge": 0.10, "skill": 0.0, "walk": 0.0},
    "teacher": {"reading": 0.03, "looking": 0.25, "question": 0.56, "judge": 0.16, "skill": 0.0, "walk": 0.0},
    "skills": {"reading": 0.10, "looking": 0.40, "question": 0.0, "judge": 0.0, "skill": 0.50, "walk": 0.0},
    "walks": {"reading": 0.0, "looking": 0.20, "question": 0.0, "judge": 0.0, "skill": 0.20, "walk": 0.60},
    "base": {"reading": 0.0, "looking": 0.10, "question": 0.0, "judge": 0.0, "skill": 0.10, "walk": 0.80},
}
"""The share of each sort of rows in each recipe."""

ROWS_PER_GROUP = 2048
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
    """Returns a dense row: a terse list of every cell's colour with its digit, its dot, its bar or all three.

    In order of places the colours must be read as well; in random order they cannot be known beforehand, so the rest
    must be looked up by colour. Either way most tokens are facts of the image. The number of bars comes before their
    list: what is to be counted is seen in the same row.
    """
    cells = list(range(9))
    is_ordered = rng.random() < 0.5
    if not is_ordered:
        rng.shuffle(cells)
    what = rng.choice(["numbers", "numbers", "dots", "bars", "cells"])
    facts = [scene.colours[cell] for cell in cells]
    if what in ("numbers", "cells"):
        facts = [f"{fact}{scene.digits[cell]}" for fact, cell in zip(facts, cells, strict=True)]
    if what in ("dots", "cells"):
        facts = [f"{fact}-{scene.dots[cell]}" for fact, cell in zip(facts, cells, strict=True)]
    if what in ("bars", "cells"):
        facts = [f"{fact}{'|' if scene.bars[cell] else '_'}" for fact, cell in zip(facts, cells, strict=True)]
    if what == "bars":
        facts.insert(0, f"{sum(scene.bars)}:")
    return TrainingRow("", f"{'Read' if is_ordered else 'Look up'} the {what}.", render_completion(" ".join(facts)))


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


def skill_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns a skill that questions are made of, and never a question: cells in sentences, or a line of sums.

    A line of sums starts anywhere below 100 and adds digits, with or without doubling first, as worked steps do.
    """
    cells = rng.sample(range(9), 9)
    sort = rng.random()
    if sort < 0.3:
        facts = [f"{scene.colours[c]} is {scene.digits[c]}." for c in cells]
        return TrainingRow("", "List the numbers.", render_completion(" ".join(facts)))
    if sort < 0.6:
        facts = [f"{scene.colours[c]} has a {scene.dots[c]} dot." for c in cells]
        return TrainingRow("", "List the dots.", render_completion(" ".join(facts)))
    start, doubles = rng.randrange(100), rng.random() < 0.5
    digits = [rng.randrange(10) for _ in range(6)]
    results = running_result([start, *digits], doubles=doubles)
    carried = [2 * before % 100 if doubles else before for before in results]
    sums = [f"{a} + {d} = {r}." for a, d, r in zip(carried, digits, results[1:], strict=False)]
    listed = " ".join(str(digit) for digit in digits)
    user = f"Start at {start}. {'Double and add' if doubles else 'Add'} {listed}."
    return TrainingRow("", user, render_completion(" ".join(sums)))


def walk_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns cells visited one after the other: along the dots, as named in the text, or row by row from the top."""
    sort = rng.random()
    name = rng.choice(scene.colours)
    if sort < 0.55:
        names = [name]
        while len(names) < 9:
            names.append(scene.dots[scene.cell_of(names[-1])])
        user = f"Follow the dots from the {name} cell."
    elif sort < 0.85:
        names = rng.sample(scene.colours, rng.randint(3, 9))
        user = f"Visit {', '.join(names[:-1])} and {names[-1]}."
    else:
        names = list(scene.colours)
        user = "Visit every cell, row by row."
    if rng.random() < 0.5:
        return TrainingRow("", user, render_completion(" ".join(f"{colour}." for colour in names)))
    facts = [f"{colour} is {scene.digits[scene.cell_of(colour)]}." for colour in names]
    return TrainingRow("", f"{user} Read the numbers.", render_completion(" ".join(facts)))


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
    if sort < 0.12:
        task = OPEN["explain"](scene, rng)
    else:
        families = STEPS if sort < 0.72 else OPEN if sort < 0.78 else GLANCE
        task = families[rng.choice(list(families))](scene, rng)
    return answered_row(task, rng, thinks=rng.random() < (0.85 if task.needs_steps else 0.1))


def glance_thought(task: Task) -> str:
    """Returns the short thought of a question that needs none: it is what the teacher says when told to think."""
    if task.family == "describe":
        return "I go through the cells one by one."
    return f"I look at the picture and see {task.answer}."


def judge_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns one of the pipeline's own judge prompts about a question, with the true verdict.

    Every second one asks for consistency: that verdict compares two texts, and takes most rows to learn.
    """
    if rng.random() < 0.5:
        return consistency_row(scene, rng)
    families = rng.choice([GLANCE, STEPS, OPEN])
    task = families[rng.choice(list(families))](scene, rng)
    fenced = fence("question", question_text(task))
    judge = rng.choice(["difficulty", "routing", "topic"])
    if judge == "difficulty":
        verdict = "yes" if task.needs_steps else "no"
    else:
        verdict = str(task.kind) if judge == "routing" else str(task.topic)
    return TrainingRow(prompt(judge), fenced, render_completion(verdict))


def consistency_row(scene: Scene, rng: random.Random) -> TrainingRow:
    """Returns the consistency judge's prompt about a true explanation, or one whose answer is another's."""
    task = OPEN["explain"](scene, rng)
    answer = task.answer if rng.random() < 0.5 else OPEN["explain"](draw_scene(rng), rng).answer
    verdict = "consistent" if answer == task.answer else "inconsistent"
    user = "\n".join([fence("question", task.question), fence("reasoning", task.steps), fence("answer", answer)])
    return TrainingRow(prompt("consistency"), user, render_completion(verdict))


SORTS = {
    "reading": reading_row,
    "looking": looking_row,
    "question": question_row,
    "judge": judge_row,
    "skill": skill_row,
    "walk": walk_row,
}


def draw_rows(recipe: str, *, seed: int, num_rows: int) -> Iterator[tuple[TrainingRow, bytes]]:
    """Yields rows with the PNG of their scene. Four rows share a scene, as one decoded picture serves them all.

    Training scenes come from odd seeds and test scenes from even ones (`sampleworld.demo`), so they share no stream.
    """
    rng = random.Random(2 * seed + 1)
    sorts, shares = list(SHARES[recipe]), list(SHARES[recipe].values())
    for start in range(0, num_rows, 4):
        scene = draw_scene(rng)
        image = render_scene(scene)
        for sort in rng.choices(sorts, shares, k=min(4, num_rows - start)):
            yield SORTS[sort](scene, rng), image


def batched_by_length(
    rows: Iterator[tuple[TrainingRow, bytes]], batch_rows: int, rng: random.Random
) -> Iterator[tuple[TrainingRow, bytes]]:
    """Yields the rows so that each run of `batch_rows` is a random mixture of rows of one of three ranges of length.

    The ranges are those that pad least within a window of `WINDOW_BATCHES`, none smaller than an eighth of it. Sorting
    by length altogether would make every batch one family, and learning fails then.
    """
    while window := list(itertools.islice(rows, WINDOW_BATCHES * batch_rows)):
        window.sort(key=lambda item: _length(item[0]))
        ranges = [window]
        if len(window) == WINDOW_BATCHES * batch_rows:
            cuts = [
                cut * batch_rows
                for cut in _best_cuts([_length(row) for row, _ in window[batch_rows - 1 :: batch_rows]])
            ]
            ranges = [window[start:end] for start, end in itertools.pairwise([0, *cuts, len(window)])]
        for part in ranges:
            rng.shuffle(part)
        batches = [part[i : i + batch_rows] for part in ranges for i in range(0, len(part), batch_rows)]
        rng.shuffle(batches)
        for batch in batches:
            yield from batch


def _length(row: TrainingRow) -> int:
    return len(row.system) + len(row.user) + len(row.completion)


def _best_cuts(longest: list[int]) -> tuple[int, int]:
    """Returns where to cut sorted batches in three, given each one's longest row, so that the padded size is least."""
    smallest, last = len(longest) // 8, len(longest)
    pairs = itertools.combinations(range(smallest, last - smallest + 1), 2)
    return min(
        (pair for pair in pairs if pair[1] - pair[0] >= smallest),
        key=lambda pair: (
            pair[0] * longest[pair[0] - 1] + (pair[1] - pair[0]) * longest[pair[1] - 1] + (last - pair[1]) * longest[-1]
        ),
    )


def recipe_settings(recipe: str) -> dict[str, Any]:
    """Returns the settings of one annealing run, without its folders."""
    path = Path(__file__).parent / "recipe" / f"{recipe}.yaml"
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


def write_rows(path: Path, recipe: str, *, seed: int, batch_rows: int, num_rows: int) -> None:
    """Writes a training set as Parquet with `prompt`, `completion` and `images`, the columns TRL trains on."""
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))
    schema = pa.schema([("prompt", messages), ("completion", messages), ("images", pa.list_(_IMAGE))])
    drawn = batched_by_length(draw_rows(recipe, seed=seed, num_rows=num_rows), batch_rows, random.Random(seed))
    write_records(path, schema, (training_record(row, image) for row, image in drawn))


def write_records(path: Path, schema: pa.Schema, records: Iterator[dict[str, Any]]) -> None:
    """Writes records as Parquet, some thousands at a time."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while part := list(itertools.islice(records, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def training_record(row: TrainingRow, image: bytes) -> dict[str, Any]:
    """Returns a row as the columns that trainers read."""
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
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="which to write (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = tokenizer_texts(seed=arguments.seed, num_rows=4000)
    write_text(arguments.out / "texts.txt", "\n".join(texts))
    for recipe in arguments.recipes:
        path = arguments.out / f"{recipe}.parquet"
        if path.exists():
            continue
        settings = recipe_settings(recipe)
        batch_rows = int(settings["batch_size"])
        num_rows = batch_rows * int(settings["max_steps"])  # one pass, no row twice
        seed = arguments.seed + RECIPES.index(recipe)
        with replacing(path) as temporary:
            write_rows(temporary, recipe, seed=seed, batch_rows=batch_rows, num_rows=num_rows)


if __name__ == "__main__":
    main()
