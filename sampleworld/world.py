"""Scenes and questions of the sample world, each with its truth and worked steps.

A scene is a 3 x 3 grid. The nine cells carry the nine colours once each, a digit from 0 to 9, and a dot whose colour
names another cell; the dots form one cycle through all nine cells. Three sorts of questions are asked about a scene:

- *glance*: answered by looking (the digit of a cell, the colour of its dot, how many cells have a bar).
- *steps*: follow the dots from cell to cell and keep a running result: the sum of the numbers (`total`), or "double,
  add the cell's number, keep the last two digits" (`path`), where a guess is right once in a hundred. Each cell is
  known only when the one before it has been looked at, so the answer cannot be had at a glance. Or add up the numbers
  of cells named by their colours (`sum`) or of a row (`row`).
- *open*: describe the scene (a glance), or explain how a running result comes about (steps).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from schemas.samples import AnswerType, Kind, Topic

CELL_PIXELS = 28
GRID_CELLS = 3
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 150, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
    "cyan": (0, 255, 255),
    "orange": (255, 128, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
PLACES = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
_SEGMENT_BOXES = {
    "a": (1, 2, 12, 5),
    "b": (9, 2, 12, 14),
    "c": (9, 12, 12, 25),
    "d": (1, 22, 12, 25),
    "e": (1, 12, 4, 25),
    "f": (1, 2, 4, 14),
    "g": (1, 12, 12, 15),
}
_PAPER, _INK = (255, 255, 255), (0, 0, 0)
_PLATE = (0, 0, 13, 27)
_DOT = (17, 9, 25, 18)
_BAR, _STRIPE = (15, 21, 27, 27), (15, 23, 27, 25)


@dataclass(frozen=True, slots=True)
class Scene:
    """colours[i], digits[i], dots[i], bars[i]: what cell i shows, cells counted row by row from the top left."""

    colours: tuple[str, ...]
    digits: tuple[int, ...]
    dots: tuple[str, ...]
    bars: tuple[bool, ...]

    def cell_of(self, colour: str) -> int:
        return self.colours.index(colour)


@dataclass(frozen=True, slots=True)
class Task:
    """One question about a scene with its truth.

    family: which generator made it. steps: the worked steps, "" where a glance is enough. answer: the reference; for
    a choice the letter. needs_steps: what a perfect difficulty judge would say.
    """

    family: str
    question: str
    answer: str
    kind: Kind
    answer_type: AnswerType
    topic: Topic
    steps: str = ""
    choices: tuple[str, ...] = ()

    @property
    def needs_steps(self) -> bool:
        return bool(self.steps)


def draw_scene(rng: random.Random) -> Scene:
    """Returns a random scene; the dots form one cycle through the nine cells."""
    colours = list(COLOURS)
    rng.shuffle(colours)
    cycle = list(colours)
    rng.shuffle(cycle)
    following = {colour: cycle[(i + 1) % len(cycle)] for i, colour in enumerate(cycle)}
    digits = tuple(rng.randrange(10) for _ in colours)
    num_bars = rng.randint(0, len(colours))
    bars = [place < num_bars for place in range(len(colours))]
    rng.shuffle(bars)
    return Scene(tuple(colours), digits, tuple(following[c] for c in colours), tuple(bars))


def render_scene(scene: Scene) -> bytes:
    """Returns the scene as PNG bytes, 84 x 84 pixels.

    A cell of 28 x 28 pixels holds a white plate with the digit in seven thick black segments, the dot beside it, and
    below the dot a striped bar in some cells.
    """
    side = CELL_PIXELS * GRID_CELLS
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for cell, (colour, digit, dot) in enumerate(zip(scene.colours, scene.digits, scene.dots, strict=True)):
        x, y = cell % GRID_CELLS * CELL_PIXELS, cell // GRID_CELLS * CELL_PIXELS
        draw.rectangle((x, y, x + CELL_PIXELS - 1, y + CELL_PIXELS - 1), fill=COLOURS[colour])
        draw.rectangle(_moved(_PLATE, x, y), fill=_PAPER)
        for segment in _SEGMENTS[digit]:
            draw.rectangle(_moved(_SEGMENT_BOXES[segment], x, y), fill=_INK)
        draw.rectangle(_moved(_DOT, x, y), fill=COLOURS[dot])
        if scene.bars[cell]:
            draw.rectangle(_moved(_BAR, x, y), fill=_PAPER)
            draw.rectangle(_moved(_STRIPE, x, y), fill=_INK)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _moved(box: tuple[int, int, int, int], x: int, y: int) -> tuple[int, int, int, int]:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def running_result(digits: list[int], *, doubles: bool) -> list[int]:
    """Returns the results after each cell: the first digit, then the result (or its double) plus the digit, mod 100."""
    results = [digits[0]]
    for digit in digits[1:]:
        results.append(((2 if doubles else 1) * results[-1] + digit) % 100)
    return results


def _worked(names: list[str], digits: list[int], *, doubles: bool) -> str:
    results = running_result(digits, doubles=doubles)
    lines = [f"{names[0]} is {digits[0]}."]
    for name, digit, before, after in zip(names[1:], digits[1:], results, results[1:], strict=False):
        carried = 2 * before % 100 if doubles else before
        lines.append(f"{name} is {digit}: {carried} + {digit} = {after}.")
    return " ".join(lines)


def ask_digit(scene: Scene, rng: random.Random) -> Task:
    cell = rng.randrange(9)
    name = scene.colours[cell]
    question = rng.choice(
        [
            f"What number is in the {name} cell?",
            f"Which digit does the {name} cell show?",
            f"Read the number in the {name} cell.",
            f"The {name} cell shows which number?",
        ]
    )
    return Task("digit", question, str(scene.digits[cell]), Kind.OBJECTIVE, AnswerType.NUMBER, Topic.OCR)


def ask_dot(scene: Scene, rng: random.Random) -> Task:
    cell = rng.randrange(9)
    name = scene.colours[cell]
    question = rng.choice(
        [
            f"What colour is the dot in the {name} cell?",
            f"Which colour is the dot of the {name} cell?",
            f"Name the colour of the dot in the {name} cell.",
        ]
    )
    return Task("dot", question, scene.dots[cell], Kind.OBJECTIVE, AnswerType.TEXT, Topic.GENERAL)


def ask_count(scene: Scene, rng: random.Random) -> Task:
    question = rng.choice(
        [
            "How many cells have a bar?",
            "How many bars are in the picture?",
            "Count the cells with a bar.",
        ]
    )
    return Task("count", question, str(sum(scene.bars)), Kind.OBJECTIVE, AnswerType.COUNT, Topic.GENERAL)


_RULE = (
    "double the result and add the number, keeping the last two digits",
    "double what you have and add the cell's number, keeping two digits",
    "take twice the result plus the number and keep the last two digits",
)


def _walk(scene: Scene, rng: random.Random) -> tuple[list[str], list[int]]:
    name = rng.choice(list(COLOURS))
    names = [name]
    for _ in range(rng.choice([2, 3])):
        name = scene.dots[scene.cell_of(name)]
        names.append(name)
    return names, [scene.digits[scene.cell_of(name)] for name in names]


def ask_path(scene: Scene, rng: random.Random) -> Task:
    names, digits = _walk(scene, rng)
    rule = rng.choice(_RULE)
    question = rng.choice(
        [
            f"Start at the {names[0]} cell and follow the dots for {len(names) - 1} steps. At each, {rule}. "
            "What is the result?",
            f"From the {names[0]} cell, go where the dot points, {len(names) - 1} times. Each time, {rule}. "
            "What do you get?",
        ]
    )
    return _steps_task("path", question, names, digits, doubles=True)


def ask_total(scene: Scene, rng: random.Random) -> Task:
    names, digits = _walk(scene, rng)
    question = rng.choice(
        [
            f"Start at the {names[0]} cell and follow the dots for {len(names) - 1} steps. "
            "Add up all numbers on the way.",
            f"From the {names[0]} cell, go where the dot points, {len(names) - 1} times. "
            "What is the sum of the numbers?",
        ]
    )
    return _steps_task("total", question, names, digits, doubles=False)


def ask_sum(scene: Scene, rng: random.Random) -> Task:
    names = rng.sample(list(COLOURS), rng.choice([3, 4]))
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    question = rng.choice(
        [
            f"Add up the numbers in the {listed} cells.",
            f"What is the sum of the {listed} numbers?",
            f"What do the {listed} cells add up to?",
        ]
    )
    return _steps_task("sum", question, names, [scene.digits[scene.cell_of(name)] for name in names], doubles=False)


def ask_row(scene: Scene, rng: random.Random) -> Task:
    """The steps name the cells of the rows above one by one, as a reader finds a row by reading down to it."""
    row = rng.randrange(GRID_CELLS)
    name = ("top", "middle", "bottom")[row]
    question = rng.choice(
        [
            f"Add up the numbers in the {name} row.",
            f"What is the sum of the {name} row?",
            f"What do the numbers of the {name} row add up to?",
        ]
    )
    first = row * GRID_CELLS
    names = list(scene.colours[first : first + GRID_CELLS])
    digits = list(scene.digits[first : first + GRID_CELLS])
    steps = " ".join([f"{colour}." for colour in scene.colours[:first]] + [_worked(names, digits, doubles=False)])
    return Task("row", question, str(sum(digits)), Kind.OBJECTIVE, AnswerType.NUMBER, Topic.MATH, steps)


def _steps_task(family: str, question: str, names: list[str], digits: list[int], *, doubles: bool) -> Task:
    steps = _worked(names, digits, doubles=doubles)
    result = str(running_result(digits, doubles=doubles)[-1])
    return Task(family, question, result, Kind.OBJECTIVE, AnswerType.NUMBER, Topic.MATH, steps)


def ask_describe(scene: Scene, rng: random.Random) -> Task:
    question = rng.choice(
        [
            "Describe the picture.",
            "What does the picture show?",
            "Describe every cell of the image.",
            "Caption this image.",
        ]
    )
    cells = zip(PLACES, scene.colours, scene.digits, scene.dots, strict=True)
    answer = "\n".join(f"{place}: {colour}, {digit}, {dot} dot." for place, colour, digit, dot in cells)
    return Task("describe", question, answer, Kind.SUBJECTIVE, AnswerType.OPEN, Topic.CAPTION)


def ask_explain(scene: Scene, rng: random.Random) -> Task:
    names, digits = _walk(scene, rng)
    rule = rng.choice(_RULE)
    question = rng.choice(
        [
            f"Explain what happens if you follow the dots {len(names) - 1} times from the {names[0]} cell and "
            f"each time {rule}.",
            f"From the {names[0]} cell you follow the dots {len(names) - 1} times and each time {rule}. "
            "Explain where this leads and why.",
        ]
    )
    result = running_result(digits, doubles=True)[-1]
    answer = f"The dots lead to {names[-1]}, and the result there is {result}."
    steps = _worked(names, digits, doubles=True)
    return Task("explain", question, answer, Kind.SUBJECTIVE, AnswerType.OPEN, Topic.GENERAL, steps)


Asker = Callable[[Scene, random.Random], Task]
GLANCE: dict[str, Asker] = {
    "digit": ask_digit,
    "dot": ask_dot,
    "count": ask_count,
}
STEPS: dict[str, Asker] = {"path": ask_path, "total": ask_total, "sum": ask_sum, "row": ask_row}
OPEN: dict[str, Asker] = {"describe": ask_describe, "explain": ask_explain}
