from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampleworld.evaluate import EVALUATION_SEED
from sampleworld.rows import batched_by_length, draw_rows
from sampleworld.world import (
    COLOURS,
    GLANCE,
    OPEN,
    STEPS,
    Scene,
    ask_path,
    draw_scene,
    render_scene,
    running_result,
)
from schemas.template import parse_completion

SCENE = Scene(
    ("red", "green", "blue", "yellow", "pink", "cyan", "orange", "white", "black"),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    ("green", "blue", "yellow", "pink", "cyan", "orange", "white", "black", "red"),
)


def test_a_running_result_doubles_adds_and_keeps_two_digits() -> None:
    assert running_result([9, 9, 9, 9], doubles=True) == [9, 27, 63, 35]


def test_a_total_adds() -> None:
    assert running_result([9, 9, 9, 9], doubles=False) == [9, 18, 27, 36]


@given(st.integers())
def test_a_scene_has_every_colour_once_and_one_cycle_of_dots(seed: int) -> None:
    scene = draw_scene(random.Random(seed))
    assert sorted(scene.colours) == sorted(COLOURS)
    colour, seen = scene.colours[0], set()
    while colour not in seen:
        seen.add(colour)
        colour = scene.dots[scene.cell_of(colour)]
    assert len(seen) == 9


def test_a_path_follows_the_dots() -> None:
    task = ask_path(SCENE, random.Random(1))
    names = [step.split(" is ")[0] for step in task.steps.removesuffix(".").split(". ")]
    assert all(SCENE.dots[SCENE.cell_of(one)] == other for one, other in itertools.pairwise(names))
    assert task.answer == task.steps.removesuffix(".").split(" = ")[-1]


@pytest.mark.parametrize("family", [*STEPS])
@given(seed=st.integers())
def test_the_worked_steps_end_in_the_answer(family: str, seed: int) -> None:
    rng = random.Random(seed)
    task = STEPS[family](draw_scene(rng), rng)
    assert task.steps.endswith(f"= {task.answer}.")


@pytest.mark.parametrize("family", [*GLANCE, *STEPS, *OPEN])
def test_questions_of_a_family_vary_in_wording(family: str) -> None:
    asker = {**GLANCE, **STEPS, **OPEN}[family]
    openings = {" ".join(asker(SCENE, random.Random(seed)).question.split()[:2]) for seed in range(60)}
    assert len(openings) > 1


def test_a_scene_is_drawn_the_same_every_time() -> None:
    assert render_scene(SCENE) == render_scene(SCENE)


def test_training_and_evaluation_share_no_image() -> None:
    trained = {image for seed in range(3) for _row, image in draw_rows("teacher", seed=seed, num_rows=2000)}
    rng = random.Random(2 * EVALUATION_SEED)
    assert not trained & {render_scene(draw_scene(rng)) for _ in range(300)}


def test_every_training_row_is_in_the_template() -> None:
    for row, _image in draw_rows("teacher", seed=0, num_rows=400):
        assert row.completion.startswith("<think>\n")
        assert parse_completion(row.completion).answer


def test_batching_by_length_keeps_every_row() -> None:
    rows = list(draw_rows("teacher", seed=0, num_rows=1000))
    batched = list(batched_by_length(iter(rows), random.Random(0)))
    assert sorted(map(repr, batched)) == sorted(map(repr, rows))
