"""Writes a random Qwen2.5-VL of 0.6 million parameters with tokenizer, processor and the bi-mode chat template.

Run by the GPU-side python: `build_tiny_teacher.py FOLDER REPOSITORY`. Its replies are noise; what the tests look at is
whether the serving stack takes images, constraints, logprobs and template arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

SENTENCES = [
    "What is in the image? Answer yes or no.",
    "The red cell holds the digit 3 and the blue cell holds 7.",
    "Does this question need reasoning? Reply with one word: yes, no, think, direct.",
    "0 1 2 3 4 5 6 7 8 9 + - = ( ) A B C D",
]


def main(folder: Path, repository: Path) -> None:
    sys.path[:0] = [str(repository), str(repository / "teacher" / "cpu_site")]
    import sitecustomize  # noqa: F401  (makes torchvision importable beside a CPU torch)
    import torch

    from training.scratch import PIXELS_PER_TOKEN, ModelSize, build_model, build_processor, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES * 4, vocabulary=400)
    size = ModelSize(layers=2, intermediate=256, vision_hidden=64, vision_intermediate=128)
    build_model(tokenizer, size).save_pretrained(folder)
    build_processor(tokenizer, max_pixels=64 * PIXELS_PER_TOKEN).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
