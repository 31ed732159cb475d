"""What forcing both modes costs: a BPO step beside a step of TRL's own GRPO with 2g generations.

Same model, prompts, number and length of completions (each side generates a fixed number of tokens), reward and
settings; the two take turns in one process, a few steps each, and the medians of their steps are compared.

    .venv-gpu/bin/python -m benchmarks.bpo_step --corpus 'runs/demo/corpus/latest/data/*/*.parquet'
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from training.bpo import BpoConfig, build_trainer, grpo_arguments
from training.checkpoints import load_policy
from training.questions import load_questions

PREFIX_TOKENS = 3
"""Of a direct completion, the longest forced prefix."""


class StepSeconds(TrainerCallback):
    """Collects the seconds of every step but the first, in which caches fill."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._began)


def every_second(completions: list[Any], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within each group."""
    return [float(number % 2) for number in range(len(completions))]


def run_steps(settings: BpoConfig, num_tokens: int, *, forced: bool) -> list[float]:
    """Returns the seconds of the steps of one side. num_tokens: length of every completion, prefix included."""
    model, processor = load_policy(settings.model)
    arguments = grpo_arguments(settings, 1)
    generated = num_tokens - PREFIX_TOKENS if forced else num_tokens
    arguments.max_completion_length = generated
    arguments.generation_kwargs = {"min_new_tokens": generated}
    arguments.mask_truncated_completions = False
    if not forced:
        arguments.chat_template_kwargs = {}
    rows = load_questions(
        settings.corpus, processor, Path(settings.output), max_prompt_tokens=settings.max_prompt_tokens
    ).rows
    if forced:
        trainer: Any = build_trainer(settings, arguments, model, processor, rows, every_second)
    else:
        trainer = GRPOTrainer(
            model=model, reward_funcs=every_second, args=arguments, train_dataset=rows, processing_class=processor
        )
    timer = StepSeconds()
    trainer.add_callback(timer)
    trainer.train()
    return timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sampleworld/teacher")
    parser.add_argument("--corpus", nargs="+", default=["runs/demo/corpus/latest/data/*/*.parquet"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--half-group", type=int, default=4, help="g; a group has 2g completions")
    parser.add_argument("--tokens", type=int, default=64, help="length of every completion")
    parser.add_argument("--steps", type=int, default=8, help="steps of each turn, the first not counted")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parsed = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    sides: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(parsed.turns):
            for forced in (True, False) if turn % 2 else (False, True):
                settings = BpoConfig(
                    model=parsed.model,
                    corpus=parsed.corpus,
                    output=str(Path(folder, f"{turn}-{forced}")),
                    prompts_per_step=parsed.prompts,
                    half_group=parsed.half_group,
                    batch_size=2 * parsed.half_group * parsed.prompts,
                    max_steps=parsed.steps,
                    save_steps=10**6,
                    log_steps=10**6,
                    bf16=parsed.bf16,
                )
                sides[forced] += run_steps(settings, parsed.tokens, forced=forced)
    bpo, grpo = (statistics.median(sides[forced]) for forced in (True, False))
    print(f"a step of {parsed.prompts} prompts x {2 * parsed.half_group} completions of {parsed.tokens} tokens")
    print(f"BPO  {bpo:.3f} s (median of {len(sides[True])}, fastest {min(sides[True]):.3f})")
    print(f"GRPO {grpo:.3f} s (median of {len(sides[False])}, fastest {min(sides[False]):.3f})")
    print(f"ratio {bpo / grpo:.3f} of medians, {min(sides[True]) / min(sides[False]):.3f} of the fastest")


if __name__ == "__main__":
    main()
