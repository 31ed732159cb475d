"""What to expect of Qwen2.5-VL-32B-Instruct on a node of GPUs, from the model's shape and the GPU's data sheet.

`python -m benchmarks.roofline` prints the tables of docs/deployment.md; a test holds the guide to them. Nothing here is
measured: the layout is what `teacher.parallelism` chooses, and a time is the longer of what its arithmetic and
its memory traffic take, each at the share of the data sheet's peak named below. `bimode plan` has measured rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.config import ServeConfig
from teacher import parallelism
from teacher.parallelism import Gpu, Parallelism, choose_parallelism
from teacher.weights import ModelFacts

GIB = 2**30
VALUE_BYTES = 2
"""bfloat16: weights and key-value cache alike."""
COMPUTE_SHARE = 0.5
"""Of the peak arithmetic, reached by large matrix products with all that lies between them."""
BANDWIDTH_SHARE = 0.7
"""Of the peak memory bandwidth, reached while weights and cache are read."""
EXCHANGE_SECONDS = 10e-6
"""What a sum over the GPUs of a copy takes before its first byte; there are two in each layer."""
PROMPT_TOKENS, REPLY_TOKENS = 1000, 300
"""The call that the tables are about: a picture of 800 tokens with its question, and a worked answer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as its config.json tells. vision_parameters: of the image encoder and its merger."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    vision_parameters: int

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        biases = self.head_size * (self.heads + 2 * self.kv_heads)
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All of them: input and output embeddings are two matrices."""
        language = self.layers * self.layer_parameters + self.hidden + 2 * self.vocabulary * self.hidden
        return language + self.vision_parameters

    @property
    def weights_bytes(self) -> int:
        return VALUE_BYTES * self.parameters

    @property
    def token_bytes(self) -> int:
        """What a token takes in the cache: a key and a value for each layer and key-value head."""
        return 2 * self.layers * self.kv_heads * self.head_size * VALUE_BYTES

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(self.heads, self.kv_heads, self.weights_bytes, self.token_bytes)

    def token_flops(self, context: float) -> float:
        """Returns the operations of one token behind `context` others: two for each weight, and attention to them."""
        weights = self.layers * self.layer_parameters + self.vocabulary * self.hidden
        return 2 * weights + 4 * self.layers * self.heads * self.head_size * context


QWEN_32B = Shape(64, 5120, 40, 8, 128, 27648, 152064, vision_parameters=688_841_984)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's data sheet. flops: dense bfloat16 operations per second. bandwidth: of its memory, in bytes per second.
    link: to its neighbours, one way, in bytes per second. mebibytes: as nvidia-smi shows its memory."""

    name: str
    flops: float
    bandwidth: float
    link: float
    mebibytes: int


CARDS = (
    Card("H200 141 GB", 989e12, 4.80e12, 450e9, 143_771),
    Card("H100 SXM 80 GB", 989e12, 3.35e12, 450e9, 81_559),
    Card("A100 SXM 80 GB", 312e12, 2.04e12, 300e9, 81_920),
    Card("L40S 48 GB", 362e12, 0.864e12, 25e9, 46_068),
)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a node does. cache_tokens: of one copy. sequences: of the call above that one copy holds at once.
    decode, prefill: tokens per second of all copies, doing nothing else. calls: per second, doing both."""

    layout: Parallelism
    cache_tokens: int
    sequences: int
    decode: float
    prefill: float
    calls: float


def expect(card: Card, num_gpus: int, *, prompt: int = PROMPT_TOKENS, reply: int = REPLY_TOKENS) -> Expectation:
    """Returns what a node of such GPUs does with calls of so many tokens."""
    serve, shape = ServeConfig(), QWEN_32B
    gpus = [Gpu(str(index), memory_bytes=card.mebibytes * 2**20) for index in range(num_gpus)]
    layout = choose_parallelism(gpus, shape.facts, serve)
    usable = layout.tensor * (serve.gpu_memory_utilization * card.mebibytes * 2**20 - parallelism._WORK_BYTES)
    cache_tokens = int((usable - shape.weights_bytes) / shape.token_bytes)
    sequences = cache_tokens // (prompt + reply)
    step = step_seconds(card, layout, sequences, prompt + reply / 2)
    decode = layout.data * sequences / step
    image_flops = 2 * 4 * shape.vision_parameters  # four patches make a token
    flops = shape.token_flops(prompt / 2) + image_flops
    prefill = layout.data / (flops / layout.tensor / (COMPUTE_SHARE * card.flops) + _exchange_seconds(card, layout, 1))
    return Expectation(layout, cache_tokens, sequences, decode, prefill, calls=1 / (prompt / prefill + reply / decode))


def step_seconds(card: Card, layout: Parallelism, sequences: int, context: float) -> float:
    """Returns the time of one decoding step of a copy: every weight is read once, and the cache of every sequence."""
    shape = QWEN_32B
    num_bytes = shape.weights_bytes - VALUE_BYTES * (shape.vision_parameters + shape.vocabulary * shape.hidden)
    num_bytes += int(sequences * context * shape.token_bytes)
    reading = num_bytes / layout.tensor / (BANDWIDTH_SHARE * card.bandwidth)
    computing = sequences * shape.token_flops(context) / layout.tensor / (COMPUTE_SHARE * card.flops)
    waiting = 2 * shape.layers * EXCHANGE_SECONDS if layout.tensor > 1 else 0.0
    return max(reading, computing) + waiting + _exchange_seconds(card, layout, sequences)


def _exchange_seconds(card: Card, layout: Parallelism, num_tokens: int) -> float:
    """Returns the time in which the GPUs of a copy exchange the partial sums of so many tokens, around a ring."""
    num_bytes = 2 * QWEN_32B.layers * num_tokens * QWEN_32B.hidden * VALUE_BYTES
    return 2 * (layout.tensor - 1) / layout.tensor * num_bytes / card.link


def table() -> str:
    """Returns the guide's table for nodes of eight GPUs."""
    lines = [
        "| 8 GPUs | copies x GPUs each | cache of a copy | calls in it at once | decoding | prompts | calls | a day |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        found = expect(card, 8)
        lines.append(
            f"| {card.name} | {found.layout.data} x {found.layout.tensor} | {found.cache_tokens:,} tokens "
            f"| {found.sequences} | {found.decode:,.0f} tokens/s | {found.prefill:,.0f} tokens/s "
            f"| {found.calls:.1f}/s | {found.calls * 86_400 / 1e6:.2f} million |"
        )
    return "\n".join(lines)


def night_calls(card: Card, num_gpus: int, *, hours: float = 8.0) -> float:
    """Returns the calls of a night, at half of what is computed (docs/deployment.md says why)."""
    return 0.5 * expect(card, num_gpus).calls * 3600 * hours


def model_lines() -> str:
    """Returns the guide's sizes of the model."""
    shape = QWEN_32B
    return "\n".join(
        [
            f"parameters      {shape.parameters:,}",
            f"weights         {shape.weights_bytes:,} bytes = {shape.weights_bytes / GIB:.1f} GiB",
            f"cache, a token  {shape.token_bytes:,} bytes = {shape.token_bytes // 1024} KiB",
            f"arithmetic      {shape.token_flops(0) / 1e9:.1f} billion operations a token",
        ]
    )


if __name__ == "__main__":
    print(f"{model_lines()}\n\n{table()}")
    known = expect(CARDS[1], 1, prompt=217, reply=185)
    print(f"\none H100, ShareGPT's lengths (217 in, 185 out): {known.calls * (217 + 185):,.0f} tokens/s in and out")
    for num_gpus in (1, 8, 32):
        print(f"{num_gpus} H100: {night_calls(CARDS[1], num_gpus):,.0f} calls a night")
