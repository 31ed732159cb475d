"""Models as programs load and resume them: with the bi-mode template, with `<think>` as a token, and truly resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from schemas.errors import TrainingError
from schemas.template import CHAT_TEMPLATE, THINK_TOKENS


def load_checkpoint(path: str, *, bf16: bool) -> tuple[Any, Any]:
    """Returns model and processor as they lie at `path`, a folder or a hub name. Raises TrainingError."""
    if not Path(path).exists() and Path(path).is_absolute():
        raise TrainingError(f"there is no checkpoint at {path}")
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot load the checkpoint {path}: {error}") from error
    return model, processor


def prepare_model(path: str, *, bf16: bool) -> tuple[Any, Any]:
    """Returns model and processor, with the bi-mode chat template and the think tokens as ordinary tokens.

    A model whose vocabulary lacks `<think>` and `</think>` (Qwen2.5-VL) gets them, and its embeddings grow if needed.

    Raises TrainingError: the checkpoint is missing or cannot be loaded.
    """
    model, processor = load_checkpoint(path, bf16=bf16)
    processor.tokenizer.add_tokens(list(THINK_TOKENS))
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer))
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    return model, processor


def load_policy(path: str) -> tuple[Any, Any]:
    """Returns an annealed model and its processor as GRPO trains them: in float32, prompts padded on the left.

    The trainer pads prompts on the left itself and asks the processor for the kind of each token, padded as the
    processor likes: both must agree, or image tokens are taken for others. Raises TrainingError.
    """
    model, processor = load_checkpoint(path, bf16=False)
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.tokenizer.padding_side = "left"
    return model, processor


def accept_no_images(model: Any) -> None:
    """Makes a model take an empty batch of images for none.

    A batch that mixes rows with and without images is cut into parts by TRL; a part of text alone is handed the empty
    rest of the pixels, on which the vision tower fails.
    """

    def drop_empty(
        _module: Any, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels = named.get("pixel_values")
        if pixels is not None and pixels.numel() == 0:
            named = {name: value for name, value in named.items() if name not in ("pixel_values", "image_grid_thw")}
        return positional, named

    model.register_forward_pre_hook(drop_empty, with_kwargs=True)


class TrueResume:
    """Mixed into a Trainer, makes a resumed run really have the weights of its checkpoint.

    transformers 5 saves weights under the names that models have on the hub (`visual.*`), and `from_pretrained`
    translates them; its Trainer resumes without translating (huggingface/transformers issue 43701). Of a Qwen2.5-VL
    checkpoint no name fits then, a warning is all that tells, and the run goes on with the weights it began with.
    """

    model: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is not None:  # FSDP, whose checkpoints have names of their own
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict(), strict=True)
