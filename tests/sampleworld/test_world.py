from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampleworld.evaluate import EVALUATION_SEED
from sampleworld.rows import (
    RECIPES,
    SHARES,
    TrainingRow,
    batched_by_length,
    consistency_row,
    draw_rows,
    skill_row,
    walk_row,
)
from sampleworld.world import (
    COLOURS,
    GLANCE,
    OPEN,
    STEPS,
    Scene,
    ask_count,
    ask_path,
    ask_row,
    draw_scene,
    render_scene,
    running_result,
)
from schemas.template import parse_completion

SCENE = Scene(
    ("red", "green", "blue", "yellow", "pink", "cyan", "orange", "white", "black"),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    ("green", "blue", "yellow", "pink", "cyan", "orange", "white", "black", "red"),
    (True, False, False, True, False, False, True, False, False),
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


def test_a_count_is_that_of_the_bars() -> None:
    assert ask_count(SCENE, random.Random(0)).answer == "3"


def test_a_row_is_found_by_reading_down_to_it() -> None:
    tasks = [ask_row(SCENE, random.Random(seed)) for seed in range(40)]
    assert {task.answer for task in tasks} == {"6", "15", "24"}
    middle = next(task for task in tasks if "middle" in task.question)
    assert middle.steps == "red. green. blue. yellow is 4. pink is 5: 4 + 5 = 9. cyan is 6: 9 + 6 = 15."


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
    drawn = (draw_rows(recipe, seed=seed, num_rows=2000) for seed, recipe in enumerate(RECIPES))
    trained = {image for rows in drawn for _row, image in rows}
    rng = random.Random(2 * EVALUATION_SEED)
    assert not trained & {render_scene(draw_scene(rng)) for _ in range(300)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_training_row_is_in_the_template(recipe: str) -> None:
    for row, _image in draw_rows(recipe, seed=0, num_rows=400):
        assert row.completion.startswith("<think>\n")
        assert parse_completion(row.completion).answer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_its_sorts_of_rows_in_their_shares(recipe: str) -> None:
    assert sum(SHARES[recipe].values()) == pytest.approx(1)
    rows = [row for row, _image in draw_rows(recipe, seed=1, num_rows=2000)]
    judged = sum(bool(row.system) for row in rows) / len(rows)
    assert judged == pytest.approx(SHARES[recipe]["judge"], abs=0.03)  # three standard errors


def test_batching_by_length_keeps_every_row_and_pads_less() -> None:
    rows = list(draw_rows("teacher", seed=0, num_rows=1600))
    batched = list(batched_by_length(iter(rows), 48, random.Random(0)))
    assert sorted(map(repr, batched)) == sorted(map(repr, rows))
    assert padded_size(batched) < 0.9 * padded_size(rows)


def padded_size(rows: list[tuple[TrainingRow, bytes]]) -> int:
    """Returns the characters of batches of 48 rows, each row as long as its batch's longest."""
    lengths = [len(row.system) + len(row.user) + len(row.completion) for row, _ in rows]
    return sum(48 * max(lengths[start : start + 48]) for start in range(0, len(lengths), 48))


def test_a_verdict_on_an_answer_is_true() -> None:
    """The answer that follows from the reasoning names its last cell and its last number."""
    for seed in range(200):
        row = consistency_row(draw_scene(random.Random(seed)), random.Random(seed))
        [reasoning] = re.findall(r"<reasoning>\n(.*)\n</reasoning>", row.user)
        last = reasoning.split(". ")[-1].removesuffix(".").split()
        follows = f"lead to {last[0]}, and the result there is {last[-1]}." in row.user
        assert parse_completion(row.completion).answer == ("consistent" if follows else "inconsistent")


def test_a_walk_visits_the_cells_it_says_and_reads_their_numbers() -> None:
    for seed in range(200):
        scene = draw_scene(random.Random(seed))
        row = walk_row(scene, random.Random(seed))
        visited = re.findall(r"(\w+)(?: is (\d))?\.", parse_completion(row.completion).answer)
        names = [name for name, _ in visited]
        if row.user.startswith("Follow"):
            assert names[0] in row.user and len(names) == 9
            assert all(scene.dots[scene.cell_of(a)] == b for a, b in itertools.pairwise(names))
        elif "row by row" in row.user:
            assert names == list(scene.colours)
        else:
            assert names == [word.strip(",.") for word in row.user.split() if word.strip(",.") in scene.colours]
        reads = "Read the numbers" in row.user
        assert [number for _, number in visited] == [
            str(scene.digits[scene.cell_of(name)]) if reads else "" for name in names
        ]


def test_a_line_of_sums_is_right_and_carries_its_result_on() -> None:
    num_lines = 0
    for seed in range(200):
        row = skill_row(draw_scene(random.Random(seed)), random.Random(seed))
        if not row.user.startswith("Start"):
            continue
        num_lines += 1
        answer = parse_completion(row.completion).answer
        sums = [tuple(map(int, found)) for found in re.findall(r"(\d+) \+ (\d+) = (\d+)\.", answer)]
        factor = 2 if "Double" in row.user else 1
        results = [int(re.findall(r"\d+", row.user)[0])]
        for carried, digit, result in sums:
            assert (carried, result) == (factor * results[-1] % (100 if factor == 2 else 1000), (carried + digit) % 100)
            results.append(result)
    assert num_lines > 20
