"""What to expect of Qwen2.5-VL-32B-Instruct on a node of GPUs, as `bimode plan` counts with it.

`python -m benchmarks.roofline` prints the tables of docs/deployment.md; a test holds the guide to them. Nothing here is
measured: `flows.planning.gpus` is the calculation, `flows.planning.assumptions` has its utilisations with their
sources, and the layout is what a server of ours would choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flows.planning.assumptions import Assumptions, Values
from flows.planning.gpus import GPU_KINDS, KNOWN_MODELS, GpuKind, Layout, lay_out, speed
from schemas.config import ServeConfig

MODEL = KNOWN_MODELS["Qwen/Qwen2.5-VL-32B-Instruct"]
NIGHT_HOURS = 8.0


@dataclass(frozen=True, slots=True)
class Call:
    """Tokens of one call. text, image: of its prompt."""

    text: int
    image: int
    reply: int

    @property
    def tokens(self) -> int:
        return self.text + self.image + self.reply


TYPICAL = Call(text=200, image=800, reply=300)
"""The call that the tables are about: a picture with its question, and a worked answer."""
SHAREGPT = Call(text=217, image=0, reply=185)
"""ShareGPT's mean lengths, with which engines are compared."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a node does. sequences: calls that one copy holds at once. decode, prefill: tokens per second of all copies,
    doing nothing else. calls: per second, doing both."""

    layout: Layout
    sequences: int
    decode: float
    prefill: float
    calls: float


def expect(kind: GpuKind, num_gpus: int, call: Call = TYPICAL) -> Expectation:
    """Returns what a node of such GPUs does with such calls."""
    layout, assumed = lay_out(MODEL, kind, num_gpus, ServeConfig()), Assumptions()
    one = speed(
        layout,
        layout.max_sequences(_values(call.tokens)),
        _values(call.tokens - call.reply / 2),
        prefill=_values(assumed.prefill_utilisation.expected),
        decode=_values(assumed.decode_utilisation.expected),
    )
    prompt_seconds = float((call.text * one.prompt_token + call.image * one.image_token)[0])
    reply_seconds = float((call.reply * one.completion_token)[0])
    return Expectation(
        layout,
        int(one.sequences[0]),
        decode=layout.num_copies * call.reply / reply_seconds,
        prefill=layout.num_copies * (call.text + call.image) / prompt_seconds,
        calls=layout.num_copies / (prompt_seconds + reply_seconds),
    )


def _values(value: float) -> Values:
    return np.array([float(value)])


def table() -> str:
    """Returns the guide's table for nodes of eight GPUs."""
    lines = [
        "| 8 GPUs | copies x GPUs each | cache of a copy | calls in it at once | decoding | prompts | calls | a day |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in GPU_KINDS.values():
        found = expect(kind, 8)
        lines.append(
            f"| {kind.source.partition(':')[0]} | {found.layout.num_copies} x {found.layout.tensor} "
            f"| {found.layout.cache_tokens:,.0f} tokens | {found.sequences} | {found.decode:,.0f} tokens/s "
            f"| {found.prefill:,.0f} tokens/s | {found.calls:.1f}/s | {found.calls * 86_400 / 1e6:.2f} million |"
        )
    return "\n".join(lines)


def night_calls(kind: GpuKind, num_gpus: int) -> float:
    """Returns the calls of a night."""
    return expect(kind, num_gpus).calls * 3600 * NIGHT_HOURS


def model_lines() -> str:
    """Returns the guide's sizes of the model."""
    return "\n".join(
        [
            f"parameters      {MODEL.weights_bytes / 2 / 1e9:.2f} billion",
            f"weights         {MODEL.weights_bytes / 1e9:.1f} GB = {MODEL.weights_bytes / 2**30:.1f} GiB",
            f"cache, a token  {MODEL.token_bytes:,} bytes = {MODEL.token_bytes // 1024} KiB",
            f"arithmetic      {2 * MODEL.params / 1e9:.1f} billion operations a token",
        ]
    )


if __name__ == "__main__":
    print(f"{model_lines()}\n\n{table()}")
    h100 = GPU_KINDS["H100"]
    known = expect(h100, 1, SHAREGPT).calls * SHAREGPT.tokens
    print(f"\none H100, ShareGPT's lengths (217 in, 185 out): {known:,.0f} tokens/s in and out")
    for num_gpus in (1, 8, 32):
        print(f"{num_gpus} H100: {night_calls(h100, num_gpus):,.0f} calls a night")
