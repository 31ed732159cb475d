"""Runs in the GPU-side environment."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny, randomly initialised Qwen2.5-VL checkpoint."""
    import torch

    from training.scratch import ModelSize, build_model, build_processor, train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What number is in the red cell? 0 1 2 3\n", "Answer: 7"] * 20, 400)
    size = ModelSize(hidden=32, layers=1, intermediate=48, heads=2, kv_heads=1, vision_hidden=32, vision_layers=1)
    build_model(tokenizer, size).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder
