"""Bi-mode annealing: supervised training of a vision-language model on the corpus, with TRL's SFTTrainer.

The file contract is that of `training.programs`. A resumed run ends with the weights of one never interrupted.

The loss is on completions only. The empty think block of direct rows is part of the completion and carries loss: it is
half of what annealing teaches. Rows come as `prompt`, `completion` and `images`, the columns of the corpus.

    python -m training.annealing --config annealing.yaml
"""

from __future__ import annotations

import torch
from pydantic import Field
from trl import SFTConfig, SFTTrainer

from training.checkpoints import TrueResume, prepare_model
from training.programs import ProgramConfig, Result, RunFolder, run_program, train_to_end
from training.rows import load_rows


class AnnealingConfig(ProgramConfig):
    """Settings of one annealing run."""

    model: str = Field(description="Folder or hub name of the checkpoint to start from.")
    corpus: list[str] = Field(description="Parquet files or globs with prompt, completion and images.", min_length=1)
    max_steps: int = Field(-1, description="Optimiser steps; -1 trains num_epochs.")
    num_epochs: float = Field(1.0, gt=0, description="Passes over the corpus when max_steps is -1.")
    batch_size: int = Field(8, ge=1, description="Rows per device and step.")
    gradient_accumulation: int = Field(1, ge=1, description="Steps whose gradients are added up.")
    learning_rate: float = Field(4e-5, gt=0, description="Peak learning rate (the paper's 4e-5).")
    min_learning_rate_share: float = Field(0.1, ge=0, le=1, description="Final rate over peak rate (the paper's 0.1).")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    schedule: str = Field("cosine", pattern="^(cosine|constant)$", description="Course of the learning rate.")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Second moment decay of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_length: int | None = Field(None, description="Longest row in tokens; None keeps every row whole.")
    bf16: bool = Field(False, description="Train in bfloat16 where the device can.")
    row_order: str = Field(
        "random",
        pattern="^(random|sequential)$",
        description="Order of the rows; `sequential` is that of the files, e.g. if rows of like length lie together.",
    )
    log_steps: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    save_steps: int = Field(500, ge=1, description="Steps between checkpoints.")
    seed: int = Field(0, description="Seed of the order of the rows and of dropout.")


class AnnealingTrainer(TrueResume, SFTTrainer):
    """SFTTrainer that resumes with the weights of its checkpoint."""


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
        max_length=config.max_length,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # else a loss that is not finite is logged as if it were
        save_steps=config.save_steps,
        save_total_limit=2,
        train_sampling_strategy=config.row_order,
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        gradient_checkpointing=False,
        completion_only_loss=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        average_tokens_across_devices=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def anneal(config: AnnealingConfig) -> Result:
    """Trains as configured and returns the content of result.json. Resumes from the newest whole checkpoint.

    Raises TrainingError: missing checkpoint or corpus, or a loss that is not finite. StorageError: the disk fails.
    Interrupted: a signal asked to stop.
    """
    folder = RunFolder(config.output)
    if (finished := folder.result()) is not None:
        return finished
    folder.path.mkdir(parents=True, exist_ok=True)
    rows = load_rows(config.corpus)
    torch.manual_seed(config.seed)
    model, processor = prepare_model(config.model, bf16=config.bf16)
    trainer = AnnealingTrainer(model=model, args=sft_arguments(config), train_dataset=rows, processing_class=processor)
    state = train_to_end(trainer, folder)
    return folder.finish(
        {
            "program": "annealing",
            "steps": state.global_step,
            "loss": state.training_loss,
            "seconds": state.metrics.get("train_runtime"),
            "num_rows": len(rows),
            "model": "model",
            "config": config.model_dump(),
        }
    )


def main() -> None:
    run_program(__doc__, AnnealingConfig, anneal)


if __name__ == "__main__":
    main()
