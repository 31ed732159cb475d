"""The deployment guide says what the code computes, and names files and commands that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.roofline import MODEL, SHAREGPT, TYPICAL, expect, model_lines, night_calls, table
from flows.planning.gpus import GPU_KINDS
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
PUBLISHED_BYTES = 66_905_436_672
"""Of its weights: 33,452,718,336 parameters in bfloat16."""


def between(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_tables_are_those_that_are_computed() -> None:
    assert between("model") == f"```\n{model_lines()}\n```"
    assert between("throughput") == table()


def test_the_shape_is_what_the_server_s_layout_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": PUBLISHED_BYTES}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = model_facts(tmp_path)
    assert facts == ModelFacts(MODEL.num_heads, MODEL.num_kv_heads, PUBLISHED_BYTES, MODEL.token_bytes)
    assert pytest.approx(PUBLISHED_BYTES, rel=1e-3) == MODEL.weights_bytes


def test_the_weights_are_the_sum_over_the_layers() -> None:
    # q and o: 5120 x 5120 each; k and v: 5120 x 1024 each; three of 5120 x 27648; biases of q, k, v; two norms.
    layer = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648 + 5120 + 2 * 1024 + 2 * 5120
    assert 2 * (64 * layer + 5120 + 2 * 152064 * 5120 + 688_841_984) == PUBLISHED_BYTES


def test_what_is_said_of_a_single_gpu_holds() -> None:
    h100 = GPU_KINDS["H100"]
    usable = 0.92 * h100.memory_bytes
    room = usable - 3 * 2**30 - MODEL.weights_bytes
    assert f"0.92 of the memory is {usable / 2**30:.1f} GiB" in PROSE
    assert f"room for {room / MODEL.token_bytes:,.0f}".rsplit(",", 1)[0] in PROSE  # in thousands
    one = expect(h100, 1, SHAREGPT)
    assert f"{one.calls * SHAREGPT.tokens:,.0f} tokens/s in and out" in PROSE
    facts = ModelFacts(MODEL.num_heads, MODEL.num_kv_heads, PUBLISHED_BYTES, MODEL.token_bytes)
    gpus = [Gpu("0", memory_bytes=h100.memory_bytes)] * 8
    assert choose_parallelism(gpus, facts, ServeConfig()) == Parallelism(tensor=2, data=4)


def test_calls_a_night_are_what_is_computed() -> None:
    h100 = GPU_KINDS["H100"]
    for num_gpus, shown in ((1, "33,000 (one H100)"), (8, "710,000 (8 H100)"), (32, "2,830,000 (32 H100)")):
        number = int(shown.partition(" ")[0].replace(",", ""))
        assert shown in TEXT and night_calls(h100, num_gpus) == pytest.approx(number, rel=0.02)
    calls = expect(h100, 32).calls
    assert round(calls, -1) == 100 and "answer some 100" in PROSE


def test_a_larger_batch_never_decodes_slower_and_never_beyond_the_peak() -> None:
    for kind in GPU_KINDS.values():
        found = expect(kind, 8)
        peak = 8 * kind.flops / (2 * MODEL.params)
        assert found.decode < peak and found.prefill < peak
        assert found.calls < min(found.decode / TYPICAL.reply, found.prefill / (TYPICAL.text + TYPICAL.image))


def test_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"`((?:deploy|teacher|tests|docs|benchmarks)/[\w./-]+)`", TEXT))
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    for folder in re.findall(r"^\| `((?:components|overlays)/[\w-]+)` \|", TEXT, re.MULTILINE):
        assert (ROOT / "deploy" / "kubernetes" / folder / "kustomization.yaml").is_file()
