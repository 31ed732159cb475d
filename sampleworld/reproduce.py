"""Runs the experiment of `sampleworld.experiment` and writes what it found: figures by seed, a table, two curves.

Every arm keeps its work in a folder of its own and is not repeated once it is done, so a run that was stopped goes on
where it was; `--seeds` runs some of the seeds, and each seed's figures are recorded as it ends.

    python -m sampleworld.reproduce                      # all seeds, about two hours each on two cores
    python -m sampleworld.reproduce --seeds 1            # one of them
    python -m sampleworld.reproduce --smoke              # the machinery, in minutes; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corpus.storage import write_text
from judges.answers import VerifierPool
from sampleworld import experiment, findings
from sampleworld.experiment import BPO_ARMS, FULL, SMOKE, Plan, annealing_arms
from schemas.config import VerificationConfig
from schemas.errors import BimodeError
from schemas.template import ThinkingMode
from training.annealing import AnnealingConfig, anneal
from training.answering import Generation, answer_questions
from training.benchmark_questions import Question
from training.bpo import BpoConfig, bpo
from training.checkpoints import load_checkpoint
from training.measures import judge_answers, measure_by

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 200


class Seed:
    """One seed of the experiment: its data, arms and evaluations, each made once and kept in `folder`."""

    def __init__(self, plan: Plan, seed: int, *, base: Path, folder: Path) -> None:
        self.plan, self.seed, self.base, self.folder = plan, seed, base, folder
        self.questions = experiment.test_questions(plan.num_test)
        self.curve_questions = self.questions[: plan.num_curve * len({q.sample.source for q in self.questions})]

    def run(self) -> dict[str, Any]:
        """Runs what is not done yet and returns the figures of the seed. Raises BimodeError."""
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._data("corpus.parquet", experiment.write_corpus)
        self._data("prompts.parquet", experiment.write_bpo_prompts)
        evaluations: dict[str, Any] = {}
        for name, arm in annealing_arms(self.plan).items():
            model = self._anneal(name, arm.strategy, round(arm.share_of_steps * self.plan.annealing_steps))
            evaluations[name] = {str(mode): self._evaluate(name, model, mode, self.questions) for mode in arm.modes}
        mixed = self.folder / "mixed"
        curves: dict[str, Any] = {}
        for name, changes in BPO_ARMS.items():
            model = self._bpo(name, mixed / "model", changes)
            evaluations[name] = {str(mode): self._evaluate(name, model, mode, self.questions) for mode in ThinkingMode}
            curves[name] = self._curve(name, mixed / "model")
        return {
            "seed": self.seed,
            "evaluations": evaluations,
            "curves": curves,
            "seconds": round(time.monotonic() - started),
        }

    def _data(self, name: str, write: Callable[[Path, Plan, int], None]) -> None:
        path = self.folder / name
        if not path.exists():
            write(path, self.plan, self.seed)

    def _anneal(self, name: str, strategy: str, num_steps: int) -> Path:
        self._say(f"annealing {name}, {num_steps} steps")
        anneal(
            AnnealingConfig(
                model=str(self.base),
                corpus=[str(self.folder / "corpus.parquet")],
                output=str(self.folder / name),
                strategy=strategy,
                max_steps=num_steps,
                seed=self.seed,
                **self.plan.annealing,
            )
        )
        return self.folder / name / "model"

    def _bpo(self, name: str, model: Path, changes: dict[str, Any]) -> Path:
        self._say(f"reinforcement {name}, {self.plan.bpo_steps} steps")
        bpo(
            BpoConfig(
                model=str(model),
                corpus=[str(self.folder / "prompts.parquet")],
                output=str(self.folder / name),
                max_steps=self.plan.bpo_steps,
                save_steps=self.plan.curve_steps,
                keep_checkpoints=1 + self.plan.bpo_steps // self.plan.curve_steps,
                seed=self.seed,
                **(self.plan.bpo | changes),
            )
        )
        return self.folder / name / "model"

    def _curve(self, name: str, start: Path) -> list[dict[str, Any]]:
        """Returns the auto mode's figures by step, from the annealed model on."""
        points = [(0, start)] + [
            (step, self.folder / name / f"checkpoint-{step}")
            for step in range(self.plan.curve_steps, self.plan.bpo_steps + 1, self.plan.curve_steps)
        ]
        return [
            {"step": step, "families": self._evaluate(f"{name}-{step}", path, ThinkingMode.AUTO, self.curve_questions)}
            for step, path in points
        ]

    def _evaluate(self, name: str, model: Path, mode: ThinkingMode, questions: Sequence[Question]) -> dict[str, Any]:
        """Returns the measures of a checkpoint in a mode, by family."""
        path = self.folder / "evaluations" / f"{name}.{mode}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        self._say(f"asking {name} in mode {mode}")
        found = evaluate_families(model, mode, questions)
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(found, indent=1))
        return found

    def _say(self, text: str) -> None:
        print(f"[seed {self.seed}] {text}", file=sys.stderr, flush=True)


def evaluate_families(model_folder: Path, mode: ThinkingMode, questions: Sequence[Question]) -> dict[str, Any]:
    """Returns the measures of a checkpoint by family of question, greedy, as plain values."""
    model, processor = load_checkpoint(str(model_folder), bf16=False)
    generation = Generation(MAX_NEW_TOKENS)
    answers = answer_questions(model, processor, questions, mode, generation=generation, batch_size=64)
    with VerifierPool(VerificationConfig()) as verifiers:
        judged = judge_answers(questions, answers, verifiers)
    pairs = ((question.sample.source, scored) for question, (scored, _) in zip(questions, judged, strict=True))
    return {family: measures.to_record() for family, measures in measure_by(pairs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="which seeds to run (default: those of the plan)")
    parser.add_argument("--smoke", action="store_true", help="a run of minutes that shows the machinery")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="checkpoint that all arms start from")
    parser.add_argument("--work", type=Path, help="folder of the work (default: .local/reproduce, or -smoke)")
    parser.add_argument("--results", type=Path, help="folder of the figures (default: sampleworld/results)")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    plan = SMOKE if arguments.smoke else FULL
    work = arguments.work or Path(".local/reproduce-smoke" if arguments.smoke else ".local/reproduce")
    results = arguments.results or (work / "results" if arguments.smoke else HERE / "results")
    try:
        for seed in arguments.seeds or plan.seeds:
            figures = Seed(plan, seed, base=arguments.base, folder=work / f"seed-{seed}").run()
            results.mkdir(parents=True, exist_ok=True)
            write_text(results / f"seed-{seed}.json", json.dumps(figures, indent=1) + "\n")
            print(findings.write_findings(results))
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
