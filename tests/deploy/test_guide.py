"""The deployment guide says what the code computes, and names files and commands that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.roofline import CARDS, QWEN_32B, expect, model_lines, night_calls, table
from schemas.config import ServeConfig
from teacher.parallelism import Gpu, Parallelism, choose_parallelism
from teacher.weights import ModelFacts, model_facts
from tests.deploy.places import GUIDE, ROOT

TEXT = GUIDE.read_text("utf-8")
PROSE = " ".join(TEXT.split())
CONFIG = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
"""Of Qwen2.5-VL-32B-Instruct's published config.json."""


def between(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_tables_are_those_that_are_computed() -> None:
    assert between("model") == f"```\n{model_lines()}\n```"
    assert between("throughput") == table()


def test_the_shape_is_what_the_server_s_layout_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": QWEN_32B.weights_bytes}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_facts(tmp_path) == QWEN_32B.facts == ModelFacts(40, 8, 66_905_436_672, 256 * 1024)


def test_the_number_of_parameters_is_the_sum_over_the_layers() -> None:
    # q and o: 5120 x 5120 each; k and v: 5120 x 1024 each; three of 5120 x 27648; biases of q, k, v; two norms.
    layer = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648 + 5120 + 2 * 1024 + 2 * 5120
    assert QWEN_32B.parameters == 64 * layer + 5120 + 2 * 152064 * 5120 + 688_841_984 == 33_452_718_336


def test_what_is_said_of_a_single_gpu_holds() -> None:
    h100 = CARDS[1]
    usable = 0.92 * h100.mebibytes / 1024
    room = (usable - 3) * 2**30 - QWEN_32B.weights_bytes
    assert f"0.92 of the memory is {usable:.1f} GiB" in PROSE
    assert f"room for {room / QWEN_32B.token_bytes:,.0f}".rsplit(",", 1)[0] in PROSE  # in thousands
    one = expect(h100, 1, prompt=217, reply=185)
    assert f"{one.calls * (217 + 185):,.0f} tokens/s in and out" in PROSE
    assert choose_parallelism([Gpu("0", memory_bytes=h100.mebibytes * 2**20)] * 8, QWEN_32B.facts, ServeConfig()) == (
        Parallelism(tensor=2, data=4)
    )


def test_calls_a_night_are_half_of_what_is_computed() -> None:
    for num_gpus, shown in ((1, "28,000 (one H100)"), (8, "510,000 (8 H100)"), (32, "2,050,000 (32 H100)")):
        number = int(shown.partition(" ")[0].replace(",", ""))
        assert shown in TEXT and night_calls(CARDS[1], num_gpus) == pytest.approx(number, rel=0.02)
    calls = expect(CARDS[1], 32).calls
    assert round(calls, -1) == 140 and "answer some 140" in PROSE


def test_a_larger_batch_never_decodes_slower_and_never_beyond_the_peak() -> None:
    for card in CARDS:
        found = expect(card, 8)
        peak = 8 * card.flops / QWEN_32B.token_flops(0)
        assert found.decode < peak and found.prefill < peak
        assert found.calls < min(found.decode / 300, found.prefill / 1000)


def test_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"`((?:deploy|teacher|tests|docs|benchmarks)/[\w./-]+)`", TEXT))
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    for folder in re.findall(r"^\| `((?:components|overlays)/[\w-]+)` \|", TEXT, re.MULTILINE):
        assert (ROOT / "deploy" / "kubernetes" / folder / "kustomization.yaml").is_file()
