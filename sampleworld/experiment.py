"""The experiment that reproduces R-4B's findings small: its arms, sizes and criteria, fixed before it is run.

Questions come from the sample world. A glance answers three families; four need steps, and answered at once they are
right as often as a guess. The corpus draws the mode of each row at random *within* its family, so annealing cannot
learn from it which questions need thought: what a model knows of that after BPO, it has from rewards. A third of the
rows think, as in the paper's Table 1 (5.5 of 16.4 million).

All arms start from one base (`sampleworld/base`) that reads scenes and adds numbers and has never seen a thought, as
the paper's start from a pre-trained model. Settings of training were chosen on seed 100, which is not reported: with a
weak pull to the annealed model (beta 0.01) thinking spreads to glance questions, where nothing but that pull holds it
back, and with a learning rate of 2e-4 skills that BPO does not ask are lost.

Criteria, over the seeds of `FULL` (a difference "holds" if the 95 % t-interval of its mean over seeds excludes 0):

a. Mixed-R in thinking mode beats Only-R (one pass, and as many steps), Non-R at once, and Non-R then R, in the mean
   accuracy over all families.
b. After annealing, auto mode thinks on under 30 % of the step questions although thinking gains over 30 points there.
c. After BPO, auto mode's accuracy on step questions is within 3 points of always thinking, with a thinking rate over
   80 % there and under 20 % on glance questions; and so it is for the step family that BPO has never seen.
d. Contrasts: with the choice token out of the loss, and with plain GRPO in auto mode, fewer step questions are thought
   about than after BPO, at the same number of steps.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from corpus.storage import replacing
from sampleworld.rows import (
    TrainingRow,
    batched_by_length,
    glance_thought,
    question_text,
    training_record,
    write_records,
)
from sampleworld.world import GLANCE, STEPS, Scene, Task, draw_scene, render_scene
from schemas.rows import CORPUS_SCHEMA
from schemas.samples import Sample, content_id
from schemas.template import ThinkingMode, render_completion
from training.benchmark_questions import Question

UNSEEN_FAMILY = "row"
"""The step family that BPO never asks."""
MAX_AUTO_THINKING_AFTER_ANNEALING = 0.30
MIN_GAIN_OF_THINKING = 0.30
MAX_GAP_TO_THINKING = 0.03
MIN_THINKING_ON_STEPS = 0.80
MAX_THINKING_ON_GLANCE = 0.20

_FIRST_STREAM = 9_000_000
_GLANCE_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the experiment.

    annealing_steps: of an arm that sees every row once; the corpus has as many batches. bpo_prompts: distinct ones.
    num_test: test questions per family; num_curve: of them, those asked at every point of a curve.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    reasoning_share: float = 1 / 3
    annealing_steps: int = 600
    annealing: dict[str, Any] = field(
        default_factory=lambda: {
            "batch_size": 64,
            "learning_rate": 1e-3,
            "min_learning_rate_share": 0.05,
            "warmup_steps": 20,
            "adam_beta2": 0.95,
            "row_order": "sequential",
            "log_steps": 25,
            "save_steps": 150,
        }
    )
    bpo_steps: int = 120
    bpo_prompts: int = 2000
    bpo: dict[str, Any] = field(
        default_factory=lambda: {
            "half_group": 4,
            "prompts_per_step": 16,
            "batch_size": 64,
            "max_new_tokens": 160,
            "learning_rate": 1e-4,
            "beta": 0.3,
        }
    )
    curve_steps: int = 20
    num_test: int = 120
    num_curve: int = 40


FULL = Plan()
SMOKE = Plan(seeds=(0,), annealing_steps=24, bpo_steps=4, bpo_prompts=64, curve_steps=2, num_test=8, num_curve=4)


@dataclass(frozen=True, slots=True)
class AnnealingArm:
    """strategy: of `training.annealing`. share_of_steps: of `annealing_steps`. modes: in which it is evaluated."""

    strategy: str
    share_of_steps: float
    modes: tuple[ThinkingMode, ...]


def annealing_arms(plan: Plan) -> dict[str, AnnealingArm]:
    """Returns the annealing arms by name. One of fewer rows is run for one pass, and for as many steps as all."""
    long, short = (ThinkingMode.LONG,), (ThinkingMode.SHORT,)
    return {
        "mixed": AnnealingArm("mixed", 1.0, tuple(ThinkingMode)),
        "direct_only": AnnealingArm("direct_only", 1.0, short),
        "reasoning_only": AnnealingArm("reasoning_only", plan.reasoning_share, long),
        "reasoning_only_all_steps": AnnealingArm("reasoning_only", 1.0, long),
        "two_stage": AnnealingArm("two_stage", 1.0, long),
    }


BPO_ARMS: dict[str, dict[str, Any]] = {
    "bpo": {},
    "choice_masked": {"choice_token_loss": False},
    "plain_grpo": {"rollouts": "auto"},
}
"""What the reinforcement arms change of BPO's settings. All start from `mixed`."""


@dataclass(frozen=True, slots=True)
class ExperimentRow(TrainingRow):
    """A training row that knows its task."""

    task: Task


def draw_tasks(rng: random.Random, families: dict[str, float]) -> Iterator[tuple[Scene, Task]]:
    """Yields tasks without end, four to a scene. families: their shares, by name."""
    names, shares = list(families), list(families.values())
    askers = {**GLANCE, **STEPS}
    while True:
        scene = draw_scene(rng)
        for name in rng.choices(names, shares, k=4):
            yield scene, askers[name](scene, rng)


def family_shares(*, without: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns the share of each family in training, glance and step questions apart."""
    steps = [name for name in STEPS if name not in without]
    glance = {name: _GLANCE_SHARE / len(GLANCE) for name in GLANCE}
    return glance | {name: (1 - _GLANCE_SHARE) / len(steps) for name in steps}


def corpus_rows(plan: Plan, seed: int) -> Iterator[tuple[ExperimentRow, bytes]]:
    """Yields the annealing corpus: every family, the mode of a row drawn apart from its question."""
    rng = random.Random(2 * (_FIRST_STREAM + seed) + 1)
    num_rows = plan.annealing_steps * int(plan.annealing["batch_size"])
    last, image = None, b""
    for scene, task in itertools.islice(draw_tasks(rng, family_shares()), num_rows):
        if scene is not last:
            last, image = scene, render_scene(scene)
        thinks = rng.random() < plan.reasoning_share
        yield experiment_row(task, thinks=thinks), image


def experiment_row(task: Task, *, thinks: bool) -> ExperimentRow:
    """Returns a question with its answer in one mode."""
    thought = (task.steps or glance_thought(task)) if thinks else ""
    return ExperimentRow("", question_text(task), render_completion(task.answer, thought), task)


def write_corpus(path: Path, plan: Plan, seed: int) -> None:
    """Writes the annealing corpus. Raises StorageError."""
    batch_rows = int(plan.annealing["batch_size"])
    rng = random.Random(seed)
    _write(path, batched_by_length(corpus_rows(plan, seed), batch_rows, rng))


def write_bpo_prompts(path: Path, plan: Plan, seed: int) -> None:
    """Writes the questions of BPO: every family but the unseen one. Raises StorageError."""
    rng = random.Random(2 * (_FIRST_STREAM + 1000 + seed) + 1)
    tasks = itertools.islice(draw_tasks(rng, family_shares(without=(UNSEEN_FAMILY,))), plan.bpo_prompts)
    _write(path, ((experiment_row(task, thinks=False), render_scene(scene)) for scene, task in tasks))


def _write(path: Path, rows: Iterator[Any]) -> None:
    records = (_record(row, image, number) for number, (row, image) in enumerate(rows))
    with replacing(path) as temporary:
        write_records(temporary, CORPUS_SCHEMA, records)


def _record(row: ExperimentRow, image: bytes, number: int) -> dict[str, Any]:
    task = row.task
    return {
        **training_record(row, image),
        "id": f"{number:032x}",
        "question": task.question,
        "choices": list(task.choices),
        "reference": task.answer,
        "topic": str(task.topic),
        "kind": str(task.kind),
        "answer_type": str(task.answer_type),
        "source": task.family,
        "origin": f"{task.family}#{number}",
    }


def test_questions(num_per_family: int) -> list[Question]:
    """Returns questions of every family about scenes of their own, the same for all arms and seeds."""
    rng = random.Random(2 * _FIRST_STREAM)
    questions = []
    for number in range(num_per_family):
        for family, ask in {**GLANCE, **STEPS}.items():
            scene = draw_scene(rng)
            questions.append(_test_question(ask(scene, rng), render_scene(scene), f"{family}#{number}"))
    return questions


def _test_question(task: Task, image: bytes, origin: str) -> Question:
    sample = Sample(
        id=content_id(task.family, task.question, [origin], task.choices, task.answer, None),
        source=task.family,
        origin=origin,
        question=task.question,
        choices=task.choices,
        answer=task.answer,
        topic=task.topic,
        kind=task.kind,
        answer_type=task.answer_type,
    )
    return Question(sample, lambda: [Image.open(io.BytesIO(image)).convert("RGB")])
