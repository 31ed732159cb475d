"""How a model is laid out on GPUs: known models on known machines, and laws that hold for all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import ServeConfig
from schemas.errors import ServingError
from teacher.parallelism import Gpu, Parallelism, choose_parallelism, find_gpus, tensor_sizes
from teacher.weights import ModelFacts

GIB = 2**30
SERVE = ServeConfig()
QWEN_3B = ModelFacts(num_heads=16, num_kv_heads=2, weights_bytes=7 * GIB, token_bytes=36 * 1024)
QWEN_7B = ModelFacts(num_heads=28, num_kv_heads=4, weights_bytes=int(15.5 * GIB), token_bytes=56 * 1024)
QWEN_32B = ModelFacts(num_heads=40, num_kv_heads=8, weights_bytes=62 * GIB, token_bytes=256 * 1024)
QWEN_72B = ModelFacts(num_heads=64, num_kv_heads=8, weights_bytes=137 * GIB, token_bytes=320 * 1024)


def gpus(*gibibytes: int | None) -> list[Gpu]:
    return [Gpu(str(index), memory_bytes=size and size * GIB) for index, size in enumerate(gibibytes)]


@pytest.mark.parametrize(
    ("facts", "memory", "expected"),
    [
        (QWEN_3B, [24], Parallelism(1, 1)),
        (QWEN_7B, [24] * 4, Parallelism(1, 4)),
        (QWEN_7B, [16] * 4, Parallelism(2, 2)),
        # 62 GiB of 73.6 would leave room for 35,000 tokens: no batch, so two GPUs share a copy.
        (QWEN_32B, [80] * 8, Parallelism(2, 4)),
        (QWEN_32B, [141] * 8, Parallelism(1, 8)),
        (QWEN_32B, [80], Parallelism(1, 1)),  # it may still start
        (QWEN_72B, [80] * 8, Parallelism(4, 2)),
        (QWEN_7B, [24, 24, 16, 24], Parallelism(2, 2)),  # the smallest counts
        (QWEN_7B, [24] * 5, Parallelism(1, 5)),
        (QWEN_32B, [80] * 7, Parallelism(2, 3)),
        # 28 heads can be shared by four GPUs, not by eight.
        (QWEN_7B, [None] * 8, Parallelism(4, 2)),
        (ModelFacts(), [80] * 8, Parallelism(8, 1)),
        (ModelFacts(weights_bytes=50 * GIB), [80] * 2, Parallelism(1, 2)),
        (ModelFacts(weights_bytes=60 * GIB), [80] * 2, Parallelism(2, 1)),
        (QWEN_32B, [], Parallelism(1, 1)),
    ],
)
def test_a_copy_takes_the_fewest_gpus_that_hold_it_with_a_batch(
    facts: ModelFacts, memory: list[int | None], expected: Parallelism
) -> None:
    assert choose_parallelism(gpus(*memory), facts, SERVE) == expected


@pytest.mark.parametrize(
    ("tensor", "data", "expected"),
    [
        (4, None, Parallelism(4, 2)),
        (None, 2, Parallelism(2, 2)),  # as small as fits, though four would be left for each
        (8, 1, Parallelism(8, 1)),
        (3, None, Parallelism(3, 2)),
    ],
)
def test_the_settings_override_the_rule(tensor: int | None, data: int | None, expected: Parallelism) -> None:
    serve = ServeConfig(tensor_parallel_size=tensor, data_parallel_size=data)
    assert choose_parallelism(gpus(*[80] * 8), QWEN_32B, serve) == expected


def test_more_gpus_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ServingError, match=r"tensor_parallel_size = 2 times .* = 3 needs more GPUs than the 4"):
        choose_parallelism(gpus(*[80] * 4), QWEN_7B, ServeConfig(tensor_parallel_size=2, data_parallel_size=3))
    # Where none are known to us there may be others.
    given_sizes = ServeConfig(tensor_parallel_size=2, data_parallel_size=3)
    assert choose_parallelism([], QWEN_7B, given_sizes) == Parallelism(2, 3)


def test_gpus_that_stay_idle_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    choose_parallelism(gpus(*[80] * 8), QWEN_32B, SERVE)
    assert caplog.text == ""
    choose_parallelism(gpus(*[80] * 7), QWEN_32B, SERVE)
    assert "1 GPUs stay idle" in caplog.text


@pytest.mark.parametrize(
    ("num_gpus", "num_heads", "num_kv_heads", "sizes"),
    [
        (1, 40, 8, [1]),
        (3, 40, 8, [1, 2]),
        (8, 40, 8, [1, 2, 4, 8]),
        (8, 28, 4, [1, 2, 4]),
        (16, 40, 8, [1, 2, 4, 8]),
        (8, 64, 2, [1, 2, 4, 8]),
        (8, 12, 3, [1]),
        (8, 5, None, [1]),
        (8, None, None, [1, 2, 4, 8]),
    ],
)
def test_copies_are_shared_by_powers_of_two_that_divide_the_heads(
    num_gpus: int, num_heads: int | None, num_kv_heads: int | None, sizes: list[int]
) -> None:
    assert tensor_sizes(num_gpus, ModelFacts(num_heads, num_kv_heads)) == sizes


@given(
    memory=st.lists(st.sampled_from([None, 16, 24, 80, 141]), min_size=1, max_size=16),
    facts=st.sampled_from([QWEN_3B, QWEN_7B, QWEN_32B, QWEN_72B, ModelFacts()]),
)
def test_the_layout_fits_the_gpus_and_wastes_no_whole_copy(memory: list[int | None], facts: ModelFacts) -> None:
    chosen = choose_parallelism(gpus(*memory), facts, SERVE)
    assert 0 <= len(memory) - chosen.tensor * chosen.data < chosen.tensor
    more = choose_parallelism(gpus(*[size and 10 * size for size in memory]), facts, SERVE)
    assert more.tensor <= chosen.tensor


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi of four GPUs, of which one shares the machine's memory."""
    program = tmp_path / "nvidia-smi"
    lines = [
        "0, GPU-aa11, 81559, NVIDIA H100 80GB HBM3",
        "1, GPU-ab22, 24564, NVIDIA GeForce RTX 4090",
        "2, GPU-cc33, [N/A], NVIDIA GB10",
        "3, GPU-cd44, 81559, NVIDIA H100, of a kind",
    ]
    program.write_text('#!/bin/sh\necho "$@" > $0.asked\ncat <<END\n' + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return program


def test_gpus_are_read_off_the_driver_s_program(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = find_gpus()
    assert found[0] == Gpu("0", "GPU-aa11", 81559 * 2**20, "NVIDIA H100 80GB HBM3")
    assert [gpu.memory_bytes for gpu in found[1:]] == [24564 * 2**20, None, 81559 * 2**20]
    assert found[3].name == "NVIDIA H100, of a kind"
    assert "memory.total" in driver.with_name("nvidia-smi.asked").read_text()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        ("-1", []),
        ("3,0", ["3", "0"]),
        (" 1 , 2", ["1", "2"]),
        ("GPU-cd,GPU-aa11", ["3", "0"]),
        ("GPU-a", []),  # two begin so
        ("0,7,1", ["0"]),
        ("MIG-12,MIG-13", ["MIG-12"]),
    ],
)
def test_only_visible_gpus_count(
    driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in find_gpus()] == expected


def test_without_the_driver_s_program_visible_names_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus() == []
    for visible, count in (("", 0), ("0", 1), ("2,3", 2), ("-1", 0), ("GPU-ab, GPU-cd", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(find_gpus()) == count
