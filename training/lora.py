"""LoRA: small trained matrices beside the frozen weights of the language model, merged into it at the end.

Checkpoints on the way hold the adapter alone; `model/` holds a whole merged model, which vLLM and transformers load as
they load any other. The rows of `<think>` and `</think>` in the embeddings are trained as they are: where a model gets
these tokens new, nothing else could give them a meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import TrainingError
from schemas.template import THINK_TOKENS


class LoraSettings(BaseModel):
    """Settings of LoRA training (Hu et al., arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rank of the trained matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale of their product: alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on their input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Names of the modules they stand beside; all-linear: every linear layer of the language model.",
    )


def lora_config(settings: LoraSettings, model: Any, processor: Any) -> LoraConfig:
    """Returns peft's configuration for a model from transformers that has its think tokens.

    Raises TrainingError: no module of the model has one of the names given.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if settings.target_modules == "all-linear":
        targets = [names[id(m)] for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    else:
        targets = settings.target_modules
        unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names.values())]
        if unknown:
            raise TrainingError(f"lora.target_modules: {type(model).__name__} has no modules named {unknown}")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    think_ids = processor.tokenizer.convert_tokens_to_ids(list(THINK_TOKENS))
    trained_rows = {names[id(embeddings)]: think_ids}
    if head is not None and head.weight is not embeddings.weight:  # peft itself keeps tied weights in step
        trained_rows[names[id(head)]] = think_ids
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        trainable_token_indices=trained_rows,
    )


def show_head_bias(model: Any) -> None:
    """Gives the output layer of a model wrapped by peft the attribute `bias`.

    TRL's trainers read the weight and the bias of that layer to compute losses. peft's wrapper, which the layer gets
    because the embeddings of single tokens are trained, shows the weight alone.
    """
    head = model.get_base_model().get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = getattr(head.original_module, "bias", None)


def save_merged(model: Any, processor: Any, folder: Path) -> None:
    """Merges the adapter into the model, for good, and writes model and processor as an ordinary checkpoint."""
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
