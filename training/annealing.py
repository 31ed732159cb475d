"""Bi-mode annealing: supervised training of a vision-language model on the corpus, with TRL's SFTTrainer.

File contract: a configuration goes in; `checkpoint-*` folders and one line per log in `metrics.jsonl` come out while it
runs; at the end the trained model in `model/` and, last of all, `result.json`, whose presence means done. Started
again, it goes on from the newest whole checkpoint and ends with the weights of a run that was never interrupted; when
`result.json` is there it does nothing.

The loss is on completions only. The empty think block of direct rows is part of the completion and carries loss: it is
half of what annealing teaches. Rows come as `prompt`, `completion` and `images`, the columns of the corpus.

    python -m training.annealing --config annealing.yaml
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from corpus.storage import write_text
from schemas.errors import BimodeError, ConfigError, TrainingError
from schemas.template import CHAT_TEMPLATE, THINK_TOKENS

TRAINING_COLUMNS = ["prompt", "completion", "images"]


class AnnealingConfig(BaseModel):
    """Settings of one annealing run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Folder or hub name of the checkpoint to start from.")
    corpus: list[str] = Field(description="Parquet files or globs with prompt, completion and images.", min_length=1)
    output: str = Field(description="Folder of everything this run writes.")
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


def load_annealing_config(path: Path) -> AnnealingConfig:
    """Returns the configuration of a YAML file. Raises ConfigError naming each wrong setting."""
    try:
        return AnnealingConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to metrics.jsonl and ends the run when the loss is not finite."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        seconds = round(time.monotonic() - self.started, 3)
        line = {"step": state.global_step, "seconds": seconds, **(logs or {})}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        loss = line.get("loss")
        print(f"step {state.global_step}/{state.max_steps} loss {loss} {seconds:.0f} s", file=sys.stderr, flush=True)
        if isinstance(loss, float) and not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: lower learning_rate or check the corpus"
            )


class AnnealingTrainer(SFTTrainer):
    """SFTTrainer whose resumed run really has the weights of its checkpoint.

    transformers 5 saves weights under the names that models have on the hub (`visual.*`), and `from_pretrained`
    translates them; its Trainer resumes without translating (huggingface/transformers issue 43701). Of a Qwen2.5-VL
    checkpoint no name fits then, a warning is all that tells, and the run goes on with the weights it began with.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is not None:  # FSDP, whose checkpoints have names of their own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict(), strict=True)


def newest_checkpoint(output: Path) -> str | None:
    """Returns the newest whole checkpoint in a folder, or None. The trainer's state is the last file of each."""
    whole = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))) if whole else None


def load_rows(patterns: list[str]) -> Any:
    """Returns the corpus as a dataset of `prompt`, `completion` and `images` (decoded when a row is read).

    Raises TrainingError: no file matches, a column is missing, or there is no row.
    """
    try:
        rows = load_dataset("parquet", data_files=patterns, split="train")
    except FileNotFoundError as error:
        raise TrainingError(f"no corpus file matches {patterns}") from error
    missing = [column for column in TRAINING_COLUMNS if column not in rows.column_names]
    if missing:
        raise TrainingError(f"{patterns} lack the columns {missing}; they have {rows.column_names}")
    if len(rows) == 0:
        raise TrainingError(f"{patterns} hold no rows")
    return rows.select_columns(TRAINING_COLUMNS).with_transform(_decode_rows)


def _decode_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns rows with images as RGB pictures and messages without the empty fields that Arrow adds."""
    return {
        "prompt": [[_plain_message(message) for message in row] for row in batch["prompt"]],
        "completion": [[_plain_message(message) for message in row] for row in batch["completion"]],
        "images": [[_decode_image(image) for image in row] for row in batch["images"]],
    }


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _decode_image(image: Any) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))).convert("RGB")


def prepare_model(path: str, *, bf16: bool) -> tuple[Any, Any]:
    """Returns model and processor, with the bi-mode chat template and the think tokens as ordinary tokens.

    A model whose vocabulary lacks `<think>` and `</think>` (Qwen2.5-VL) gets them, and its embeddings grow if needed.
    """
    if not Path(path).exists() and Path(path).is_absolute():
        raise TrainingError(f"there is no checkpoint at {path}")
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32)
    except OSError as error:
        raise TrainingError(f"cannot load the checkpoint {path}: {error}") from error
    processor.tokenizer.add_tokens(list(THINK_TOKENS))
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer))
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    return model, processor


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


def anneal(config: AnnealingConfig) -> dict[str, Any]:
    """Trains as configured and returns the content of result.json. Resumes from the newest whole checkpoint.

    Raises TrainingError: missing checkpoint or corpus, or a loss that is not finite. StorageError: the disk fails.
    """
    output = Path(config.output)
    result_path = output / "result.json"
    if result_path.exists():
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        return result
    output.mkdir(parents=True, exist_ok=True)
    rows = load_rows(config.corpus)
    torch.manual_seed(config.seed)
    model, processor = prepare_model(config.model, bf16=config.bf16)
    trainer = AnnealingTrainer(
        model=model,
        args=sft_arguments(config),
        train_dataset=rows,
        processing_class=processor,
        callbacks=[MetricsFile(output / "metrics.jsonl")],
    )
    state = trainer.train(resume_from_checkpoint=newest_checkpoint(output))
    trainer.save_model(str(output / "model"))
    processor.save_pretrained(output / "model")
    result = {
        "program": "annealing",
        "steps": state.global_step,
        "loss": state.training_loss,
        "seconds": state.metrics.get("train_runtime"),
        "num_rows": len(rows),
        "model": "model",
        "config": config.model_dump(),
    }
    write_text(result_path, json.dumps(result, indent=2))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings of AnnealingConfig")
    arguments = parser.parse_args()
    try:
        result = anneal(load_annealing_config(arguments.config))
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
