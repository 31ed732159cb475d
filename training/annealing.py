"""Bi-mode annealing: supervised training of a vision-language model on the corpus, with TRL's SFTTrainer.

The file contract is that of `training.programs`. A resumed run ends with the weights of one never interrupted.

The loss is on completions only. The empty think block of direct rows is part of the completion and carries loss: it is
half of what annealing teaches. Of `<think>\\n\\n</think>7<|im_end|>\\n` all but the first token carries loss: `<think>`
is the forced prefix of every mode and belongs to the prompt. The newline after `<|im_end|>` is part of the turn that
the template renders; it is the same in every row and never sampled, as generation ends before it.

Rows come as `prompt`, `completion` and `images`, the columns of the corpus; rows without images may stand among them.
No row is cut: one longer than allowed is skipped and counted (`training.rows.Skip`). What is trained on is arranged by
a strategy (`training.strategies`).

Left out on purpose: packing several rows into one sequence. TRL packs no rows with images, as it makes their pixels
when a batch is put together; `row_order: grouped` saves most of the padding instead.

    python -m training.annealing --config annealing.yaml
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from trl import SFTConfig, SFTTrainer

from schemas.errors import TrainingError
from training.checkpoints import TrueResume, prepare_model
from training.lora import LoraSettings, lora_config, save_merged, show_head_bias
from training.parts import Part, cosine_share, freeze, parameter_groups
from training.programs import ProgramConfig, Result, RunFolder, run_program, train_to_end
from training.rows import RowMeasures, load_rows, measure_rows, without_thoughts
from training.strategies import RowOrder, Stage, StagedSampler, Strategy, arrange_rows, stage_steps


class AnnealingConfig(ProgramConfig):
    """Settings of one annealing run."""

    model: str = Field(description="Folder or hub name of the checkpoint to start from.")
    corpus: list[str] = Field(description="Parquet files or globs with prompt, completion and images.", min_length=1)
    strategy: Strategy = Field(
        Strategy.MIXED,
        description="mixed: both modes together; reasoning_only: thinking rows; direct_only: every row without its "
        "thought; two_stage: direct rows, then thinking rows.",
    )
    reasoning_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of thinking rows among those trained on, reached by leaving out rows of the other mode or "
        "of this one; None takes the corpus as it is. For mixed and two_stage.",
    )
    max_steps: int = Field(-1, description="Optimiser steps; -1 trains num_epochs.")
    num_epochs: float = Field(1.0, gt=0, description="Passes over the corpus when max_steps is -1.")
    batch_size: int = Field(8, ge=1, description="Rows per device and step.")
    gradient_accumulation: int = Field(1, ge=1, description="Steps whose gradients are added up.")
    learning_rate: float = Field(4e-5, ge=0, description="Peak learning rate (the paper's 4e-5).")
    projector_learning_rate: float | None = Field(
        None, ge=0, description="That of the projector (the paper's 4e-6); 0 freezes it; None: learning_rate."
    )
    vision_learning_rate: float | None = Field(
        None, ge=0, description="That of the vision tower (the paper's 4e-6); 0 freezes it; None: learning_rate."
    )
    min_learning_rate_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Final rate over peak rate (the paper's 0.1). A part whose own rate is below this final rate "
        "keeps it throughout.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    schedule: str = Field("cosine", pattern="^(cosine|constant)$", description="Course of the learning rate.")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Second moment decay of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    lora: LoraSettings | None = Field(
        None, description="Train small matrices (rank, alpha, dropout, target_modules) instead of all weights."
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="Most tokens of a row, images included; longer rows are skipped. None: the model's context.",
    )
    bf16: bool = Field(
        False,
        description="Compute in bfloat16. Trained weights stay in float32 (with LoRA: the adapter), as updates of the "
        "size of these learning rates vanish when bfloat16 weights are rounded; model/ is saved in bfloat16.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, about a third more time."
    )
    row_order: RowOrder = Field(
        RowOrder.RANDOM,
        description="Order of the rows; `sequential` is that of the files, e.g. if rows of like length lie together; "
        "`grouped` is random with rows of like length in a batch.",
    )
    loader_processes: int = Field(0, ge=0, description="Processes that decode images and tokenise; 0: the trainer's.")
    log_steps: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    save_steps: int = Field(500, ge=1, description="Steps between checkpoints.")
    seed: int = Field(0, ge=0, description="Seed of the order and choice of the rows, of dropout and of adapters.")

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.reasoning_share is not None and self.strategy not in (Strategy.MIXED, Strategy.TWO_STAGE):
            raise ValueError(f"reasoning_share has no meaning for the strategy {self.strategy}")
        if self.lora is not None and self.rates is not None:
            raise ValueError("lora trains the language model alone: leave out the rates of projector and vision tower")
        if not any((self.rates or {Part.LANGUAGE_MODEL: self.learning_rate}).values()):
            raise ValueError("every learning rate is 0: nothing would be trained")
        return self

    @property
    def rates(self) -> dict[Part, float] | None:
        """The peak learning rate of each part of the model, None if all have the same."""
        rate, projector, vision = self.learning_rate, self.projector_learning_rate, self.vision_learning_rate
        if projector is None and vision is None:
            return None
        return {
            Part.LANGUAGE_MODEL: rate,
            Part.PROJECTOR: rate if projector is None else projector,
            Part.VISION_TOWER: rate if vision is None else vision,
        }


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """The rows of a run as they are trained on.

    dataset: stage after stage. sampler: None where the trainer's own gives the order. num_thinking: of its rows.
    num_skipped: rows of the corpus that cannot be trained on, by reason.
    """

    dataset: Any
    sampler: StagedSampler | None
    num_thinking: int
    num_skipped: dict[str, int]

    @property
    def stage_steps(self) -> list[int] | None:
        """Steps of each stage, known where the sampler is ours."""
        return [stage.num_steps for stage in self.sampler.stages] if self.sampler else None


class AnnealingTrainer(SFTTrainer):
    """SFTTrainer with the arrangement's order of rows, and with a learning rate for each part of the model."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *, sampler: StagedSampler | None, rates: Mapping[Part, float] | None, min_rate: float, **settings: Any
    ) -> None:
        self.staged_sampler = sampler
        self.rates = rates
        self.min_rate = min_rate
        super().__init__(**settings)
        # The Qwen-VL models say that their own loss takes no count of tokens, and the trainer then counts none: each
        # device and accumulated step would weigh the same, a few direct rows as much as long thoughts. TRL's loss is
        # not the model's and divides by the count it is given.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.staged_sampler or super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.rates is not None and self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                self.rates,
                decayed=set(self.get_decay_parameter_names(model)),
                weight_decay=self.args.weight_decay,
            )
            optimizer_type, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_type(groups, **arguments)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Under `cosine`, all parts fall to one final rate; a part that begins below it stays where it is."""
        if self.rates is not None and self.lr_scheduler is None and self.args.lr_scheduler_type == "cosine_with_min_lr":
            optimizer = self.optimizer if optimizer is None else optimizer
            courses = [
                functools.partial(
                    cosine_share,
                    warmup_steps=self.args.get_warmup_steps(num_training_steps),
                    num_steps=num_training_steps,
                    floor=min(1.0, self.min_rate / group["lr"]),
                )
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, courses)
        return super().create_scheduler(num_training_steps, optimizer)


class FullTrainer(TrueResume, AnnealingTrainer):
    """Trains all weights. What is saved at the end is in bfloat16 if that was computed with."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call and self.args.bf16:  # training is over: a checkpoint on the way is an internal call
            self.model.to(torch.bfloat16)
        super().save_model(output_dir, _internal_call)


class LoraTrainer(AnnealingTrainer):
    """Trains an adapter. Checkpoints hold the adapter, what is saved at the end is the whole merged model."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        show_head_bias(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            save_merged(self.model, self.processing_class, Path(output_dir or self.args.output_dir))


def sft_arguments(config: AnnealingConfig) -> SFTConfig:
    schedule = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}[config.schedule]
    return SFTConfig(
        output_dir=config.output,
        max_steps=config.max_steps,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_share} if config.schedule == "cosine" else {},
        warmup_steps=config.warmup_steps,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_length=None,  # TRL would cut rows, through image tokens and answers; ours are skipped before
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # else a loss that is not finite is logged as if it were
        save_steps=config.save_steps,
        save_total_limit=2,
        train_sampling_strategy="sequential" if config.row_order is RowOrder.SEQUENTIAL else "random",
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        gradient_checkpointing=config.gradient_checkpointing,
        completion_only_loss=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        average_tokens_across_devices=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=config.loader_processes,
    )


def longest_row(model: Any, max_length: int | None) -> int:
    """Returns how many tokens a row may have: at most the positions of the model's language model."""
    context: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return min(max_length or context, context)


def training_rows(
    rows: Any, measures: RowMeasures, config: AnnealingConfig, *, max_length: int, batch_rows: int
) -> TrainingRows:
    """Returns the corpus as the strategy arranges it. batch_rows: rows of one optimiser step, over all devices.

    Raises TrainingError: no row can be trained on, or the strategy needs rows that the corpus does not have.
    """
    usable, num_skipped = measures.usable(max_length), measures.num_skipped(max_length)
    if not usable.any():
        raise TrainingError(f"no row of {config.corpus} can be trained on: of {len(rows)} rows, skipped {num_skipped}")
    stages = arrange_rows(
        measures.thinks, usable, strategy=config.strategy, reasoning_share=config.reasoning_share, seed=config.seed
    )
    strips = config.strategy is Strategy.DIRECT_ONLY
    chosen = without_thoughts(rows) if strips else rows
    numbers = np.concatenate(stages)
    if not np.array_equal(numbers, np.arange(len(rows))):
        chosen = chosen.select(numbers)
    sampler = None
    if len(stages) > 1 or config.row_order is RowOrder.GROUPED:
        steps = stage_steps(
            [len(stage) for stage in stages],
            batch_rows=batch_rows,
            max_steps=config.max_steps,
            num_epochs=config.num_epochs,
        )
        sampler = StagedSampler(
            [Stage(measures.num_tokens[stage], number) for stage, number in zip(stages, steps, strict=True)],
            row_order=config.row_order,
            batch_rows=batch_rows,
            seed=config.seed,
        )
    num_thinking = 0 if strips else int(measures.thinks[numbers].sum())
    return TrainingRows(chosen, sampler, num_thinking, num_skipped)


def build_trainer(
    config: AnnealingConfig, arguments: SFTConfig, model: Any, processor: Any, rows: TrainingRows
) -> AnnealingTrainer:
    """Returns the trainer of all weights or of an adapter. Raises TrainingError: a part or a module is not found."""
    if config.rates is not None:
        freeze(model, config.rates)
    return (LoraTrainer if config.lora else FullTrainer)(
        model=model,
        args=arguments,
        train_dataset=rows.dataset,
        processing_class=processor,
        peft_config=lora_config(config.lora, model, processor) if config.lora else None,
        sampler=rows.sampler,
        rates=config.rates,
        min_rate=config.min_learning_rate_share * config.learning_rate,
    )


def anneal(config: AnnealingConfig) -> Result:
    """Trains as configured and returns the content of result.json. Resumes from the newest whole checkpoint.

    Raises TrainingError: missing checkpoint or corpus, no row left to train on, or a loss that is not finite.
    StorageError: the disk fails. Interrupted: a signal asked to stop.
    """
    folder = RunFolder(config.output)
    if (finished := folder.begin(config)) is not None:
        return finished
    corpus = load_rows(config.corpus)
    torch.manual_seed(config.seed)
    model, processor = prepare_model(config.model, bf16=config.bf16 and config.lora is not None)
    arguments = sft_arguments(config)
    with arguments.main_process_first(desc="measuring rows"):
        strips = config.strategy is Strategy.DIRECT_ONLY
        measures = measure_rows(corpus, processor, folder.path, strip_thoughts=strips)
    rows = training_rows(
        corpus,
        measures,
        config,
        max_length=longest_row(model, config.max_length),
        batch_rows=config.batch_size * config.gradient_accumulation * arguments.world_size,
    )
    print(f"{len(rows.dataset)} rows to train on, skipped {rows.num_skipped}", file=sys.stderr, flush=True)
    if rows.stage_steps is not None:
        arguments.max_steps = sum(rows.stage_steps)
    trainer = build_trainer(config, arguments, model, processor, rows)
    state = train_to_end(trainer, folder)
    return folder.finish(
        {
            "program": "annealing",
            "steps": state.global_step,
            "loss": state.training_loss,
            "seconds": state.metrics.get("train_runtime"),
            "num_rows": len(rows.dataset),
            "num_thinking": rows.num_thinking,
            "num_skipped": rows.num_skipped,
            "stage_steps": rows.stage_steps,
            "model": "model",
            "config": config.model_dump(mode="json"),
        }
    )


def main() -> None:
    run_program(__doc__, AnnealingConfig, anneal)


if __name__ == "__main__":
    main()
