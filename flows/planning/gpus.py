"""How fast a model answers on a kind of GPU: a roofline, with the utilisation that engines reach of it.

Prompts are computed in large batches, so their speed is that of arithmetic: 2 FLOP per parameter and token of the
language model, and for an image's tokens those of its encoder besides. Replies come token by token: a step reads all
weights, and the cached keys and values of every sequence in it, from the GPU's memory, and takes as long as that, or as
its arithmetic if that is longer. With B sequences in a step of t seconds, a copy of the model makes B / t tokens a
second; B is what memory holds beside the weights.

    seconds of a copy = new prompt tokens * FLOP per token / FLOP/s + completion tokens * t(B) / B

Left out: attention's arithmetic (2 % at a thousand tokens of context), the exchange between the GPUs of a copy, kernel
starts. The utilisations stand for them. Prompts and replies share steps in a real engine, which hides some of either
behind the other; the sum is the careful side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flows.planning.assumptions import Values
from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ConfigError, ServingError
from teacher.parallelism import Gpu, Parallelism, choose_parallelism
from teacher.weights import ModelFacts, cached_folder, model_folder

GPUS_PER_HOST = 8
"""GPUs that a copy of the model may share: those of one machine."""
MAX_SEQUENCES = 1024
"""Sequences in one step of one copy at most: vLLM's own bound in its throughput mode, with room to be doubled."""
_MIN_SEQUENCES = 8
"""A memory that holds fewer sequences beside the weights serves nobody."""
_BYTES = 2
"""Of a weight and of a value of the cache: bfloat16."""
_WORK_BYTES = 3 * 2**30
"""Of each GPU for what is neither weights nor cache, as in `teacher.parallelism`."""
PATCHES_PER_TOKEN = 4
"""Qwen2.5-VL: the encoder sees four patches for each token that the language model sees."""


@dataclass(frozen=True, slots=True)
class GpuKind:
    """A kind of GPU. flops: dense bfloat16, per second. bandwidth: of its memory, bytes per second."""

    name: str
    flops: float
    bandwidth: float
    memory_bytes: int
    source: str


_SHEET = "NVIDIA's data sheet, dense (half of the figure with sparsity)"
GPU_KINDS = {
    kind.name: kind
    for kind in (
        GpuKind("H100", 989.4e12, 3.35e12, 81_559 * 2**20, f"H100 SXM, 80 GB: {_SHEET}"),
        GpuKind("H200", 989.4e12, 4.8e12, 143_771 * 2**20, f"H200 SXM, 141 GB: {_SHEET}"),
        GpuKind("A100", 312e12, 2.039e12, 81_920 * 2**20, f"A100 SXM, 80 GB: {_SHEET}"),
        GpuKind("L40S", 362e12, 0.864e12, 46_068 * 2**20, f"L40S, 48 GB: {_SHEET}"),
    )
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a vision-language model that decide its speed.

    params: of the language model, with its output head and without its table of words, which is looked up.
    vision_params: of the image encoder. weights_bytes: of everything.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    params: float
    vision_params: float
    weights_bytes: float

    @classmethod
    def of_config(cls, name: str, config: dict[str, Any]) -> ModelShape:
        """Returns the shape of a transformers configuration. Raises KeyError, TypeError: a size is missing."""
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        hidden, heads, layers = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
        kv_heads = text.get("num_key_value_heads") or heads
        head_size = text.get("head_dim") or hidden // heads
        attention = 2 * hidden * head_size * (heads + kv_heads)
        block = attention + 3 * hidden * text["intermediate_size"]
        head = hidden * text["vocab_size"]
        is_tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        params = layers * block + head
        vision_params = _vision_params(vision, hidden) if vision else 0.0
        all_params = params + vision_params + (0 if is_tied else head)
        return cls(name, layers, heads, kv_heads, head_size, params, vision_params, _BYTES * all_params)

    @property
    def token_bytes(self) -> int:
        """Of one token in the cache: a key and a value in each layer and key-value head."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * _BYTES


def _vision_params(vision: dict[str, Any], text_hidden: int) -> float:
    """Returns the parameters of Qwen2.5-VL's encoder: gated blocks, and the merger of four patches into one token."""
    hidden = vision["hidden_size"]
    block = 4 * hidden * hidden + 3 * hidden * vision["intermediate_size"]
    merged = PATCHES_PER_TOKEN * hidden
    return float(vision["depth"] * block + merged * (merged + text_hidden))


def _qwen(name: str, sizes: tuple[int, int, int, int, int], *, vocab: int, vision: int, tied: bool) -> ModelShape:
    hidden, intermediate, layers, heads, kv_heads = sizes
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": vision},
    }
    return ModelShape.of_config(name, config)


KNOWN_MODELS = {
    shape.name: shape
    for shape in (
        _qwen("Qwen/Qwen2.5-VL-3B-Instruct", (2048, 11008, 36, 16, 2), vocab=151_936, vision=3420, tied=True),
        _qwen("Qwen/Qwen2.5-VL-7B-Instruct", (3584, 18944, 28, 28, 4), vocab=152_064, vision=3420, tied=False),
        _qwen("Qwen/Qwen2.5-VL-32B-Instruct", (5120, 27648, 64, 40, 8), vocab=152_064, vision=3456, tied=False),
        _qwen("Qwen/Qwen2.5-VL-72B-Instruct", (8192, 29568, 80, 64, 8), vocab=152_064, vision=3456, tied=False),
    )
}
"""Sizes from the models' own config.json on the hub."""


def model_shape(model: str) -> ModelShape:
    """Returns the shape of a known model, or of one whose folder is here (a path, or in the hub's cache).

    Raises ConfigError: nothing is known of the model.
    """
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model]
    known = ", ".join(KNOWN_MODELS)
    try:
        folder = model_folder(model) or cached_folder(model)
        if folder is None:
            raise ConfigError(f"nothing is known of the model {model!r}: name one of {known}, or a folder of weights")
        return ModelShape.of_config(model, json.loads(Path(folder, "config.json").read_text("utf-8")))
    except ServingError as error:
        raise ConfigError(f"{error} (known without a folder: {known})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the config.json of {model!r} does not tell its sizes ({error!r})") from error


def gpu_kind(name: str) -> GpuKind:
    """Returns a kind of GPU by its name, in any case. Raises ConfigError: it is unknown."""
    kind = GPU_KINDS.get(name.upper())
    if kind is None:
        raise ConfigError(f"unknown kind of GPU {name!r}: known are {', '.join(GPU_KINDS)}")
    return kind


@dataclass(frozen=True, slots=True)
class Layout:
    """A model on GPUs: copies of it, each on `tensor` GPUs. num_idle: GPUs that are left over."""

    model: ModelShape
    gpu: GpuKind
    num_gpus: int
    tensor: int
    num_copies: int
    memory_share: float

    @property
    def num_idle(self) -> int:
        return self.num_gpus - self.tensor * self.num_copies

    @property
    def cache_tokens(self) -> float:
        """Tokens that the cache of one copy holds. Beyond its key-value heads, each GPU holds a copy of another's."""
        usable = self.memory_share * self.gpu.memory_bytes - _WORK_BYTES - self.model.weights_bytes / self.tensor
        return usable * min(self.tensor, self.model.num_kv_heads) / self.model.token_bytes

    def max_sequences(self, context_tokens: Values) -> Values:
        """Returns how many sequences of a mean length a step of one copy holds."""
        return np.minimum(MAX_SEQUENCES, self.cache_tokens / context_tokens)


def lay_out(model: ModelShape, gpu: GpuKind, num_gpus: int, serve: ServeConfig) -> Layout:
    """Returns how the model lies on the GPUs, by the rule by which servers are started; hosts have eight GPUs each.

    Raises ConfigError: it does not fit, or the settings ask for more GPUs than there are.
    """
    facts = ModelFacts(model.num_heads, model.num_kv_heads, round(model.weights_bytes), model.token_bytes)
    per_host = min(num_gpus, GPUS_PER_HOST)
    try:
        chosen = choose_parallelism([Gpu(str(n), memory_bytes=gpu.memory_bytes) for n in range(per_host)], facts, serve)
    except ServingError as error:
        raise ConfigError(str(error)) from error
    rest = _copies_on(num_gpus % per_host, chosen)
    layout = Layout(
        model,
        gpu,
        num_gpus,
        chosen.tensor,
        num_gpus // per_host * chosen.data + rest,
        serve.gpu_memory_utilization,
    )
    if layout.cache_tokens < _MIN_SEQUENCES * 1024:
        needed = model.weights_bytes / 1e9
        raise ConfigError(
            f"{model.name} ({needed:.0f} GB of weights) does not fit on {chosen.tensor} x {gpu.name} with a cache for "
            f"{_MIN_SEQUENCES} sequences: take more GPUs (--gpus), larger ones (--gpu) or a smaller model (--model)"
        )
    return layout


def _copies_on(num_gpus: int, chosen: Parallelism) -> int:
    """Returns how many copies the GPUs of the last, smaller host hold."""
    return min(num_gpus // chosen.tensor, chosen.data)


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of one copy, in seconds of it. prompt_token, image_token: for each new one. completion_token: with so
    many sequences in a step as `sequences` says."""

    prompt_token: Values
    image_token: Values
    completion_token: Values
    sequences: Values

    @property
    def step_seconds(self) -> Values:
        """Seconds between two tokens of one sequence."""
        return self.completion_token * self.sequences


def speed(layout: Layout, sequences: Values, context_tokens: Values, *, prefill: Values, decode: Values) -> Speed:
    """Returns the speed of one copy.

    sequences: in a step. context_tokens: mean length of a sequence in it. prefill, decode: utilisations of peak FLOP/s
    and bandwidth.
    """
    model, gpu = layout.model, layout.gpu
    flops, bandwidth = layout.tensor * gpu.flops * prefill, layout.tensor * gpu.bandwidth * decode
    sequences = np.minimum(sequences, layout.max_sequences(context_tokens))
    read_seconds = (model.weights_bytes + sequences * context_tokens * model.token_bytes) / bandwidth
    compute_seconds = sequences * 2 * model.params / flops
    return Speed(
        2 * model.params / flops,
        (2 * model.params + 2 * PATCHES_PER_TOKEN * model.vision_params) / flops,
        np.maximum(read_seconds, compute_seconds) / sequences,
        sequences,
    )


def serve_settings(serve: ServeConfig | None) -> ServeConfig:
    return serve or ServeConfig()


def served_model(endpoint: EndpointConfig, serve: ServeConfig | None) -> str:
    """Returns the name or folder of the weights that answer for an endpoint."""
    return (serve.model_path if serve else None) or endpoint.model
