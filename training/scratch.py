"""Builds a small, randomly initialised Qwen2.5-VL with its own tokenizer and processor: a model to train from nothing.

The result is an ordinary checkpoint folder: transformers and TRL train it, vLLM serves it. The tokenizer is byte-level
BPE with Qwen2's pre-tokenisation (digits one by one, runs of newlines together), trained on the given texts, with
`<think>` and `</think>` as ordinary added tokens. Sizes are for images of few 28-pixel cells on a CPU.

    python -m training.scratch --texts texts.txt --out model
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from schemas.template import CHAT_TEMPLATE, THINK_TOKENS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

QWEN2_PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation, from the `tokenizer.json` of Qwen/Qwen2.5-VL-3B-Instruct."""

PIXELS_PER_TOKEN = 28 * 28
MAX_VOCABULARY = 1536


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of the small model. hidden, vision_hidden: widths; heads of 32 dimensions in both towers."""

    hidden: int = 128
    layers: int = 4
    intermediate: int = 384
    heads: int = 4
    kv_heads: int = 2
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_intermediate: int = 256
    max_positions: int = 2048


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of at most `vocabulary` entries, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The blank line that opens an empty thought must be one token, however rare it is in the texts.
    tokenizer.train_from_iterator(itertools.chain(texts, itertools.repeat("\n\n", 10_000)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",  # noqa: S106 - a token of the vocabulary
        eos_token="<|im_end|>",  # noqa: S106
        extra_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, max_pixels: int = 16 * PIXELS_PER_TOKEN) -> Qwen2_5_VLProcessor:
    """Returns the Qwen2.5-VL processor: one token for 28 x 28 pixels, images kept between 1 and 16 tokens."""
    pixels = {"shortest_edge": PIXELS_PER_TOKEN, "longest_edge": max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize) -> Qwen2_5_VLForConditionalGeneration:
    """Returns the randomly initialised model; its weights follow torch's global seed."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head = size.hidden // size.heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": size.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * (head * 3 // 16), head * 3 // 16, head * 3 // 16],
            },
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": 4,
            "out_hidden_size": size.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [size.vision_layers - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="text file the tokenizer is trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.texts.read_text(encoding="utf-8").splitlines(keepends=True), MAX_VOCABULARY)
    size = ModelSize()
    model = build_model(tokenizer, size)
    model.save_pretrained(arguments.out)
    build_processor(tokenizer).save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
