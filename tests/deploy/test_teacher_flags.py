"""vLLM is started in four places with one meaning: by us, by compose, on Kubernetes, and in the guide."""

from __future__ import annotations

import os
import re
import shlex

import pytest

from schemas.config import EndpointConfig, ServeConfig
from teacher.parallelism import Parallelism
from teacher.vllm_command import VllmBuild, find_build, server_command
from tests.deploy.places import COMPOSE, GUIDE, KUBERNETES, ROOT, documents, flags

OURS_ALONE = {"--allowed-local-media-path", "--aggregate-engine-logging", "--no-enable-log-requests"}
"""Images by name need our files; the other two only make it quieter."""


def in_compose() -> list[str]:
    (file,) = documents(COMPOSE)
    command: list[str] = file["services"]["teacher"]["command"]
    return command


def on_kubernetes() -> list[str]:
    path = KUBERNETES / "components" / "teacher" / "teacher.yaml"
    found = next(document for document in documents(path) if document["kind"] == "StatefulSet")
    arguments: list[str] = found["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments


def in_the_guide() -> list[str]:
    command = re.search(r"^(vllm serve (?:.*\\\n)+.*)$", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    joined: list[str] = []
    for word in words:  # "--flag value" as "--flag=value"
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def build() -> VllmBuild:
    """Returns the GPU build with the flags of the version that is installed here, which is the CPU build."""
    python = os.environ.get("BIMODE_GPU_PYTHON") or str(ROOT / ".venv-gpu" / "bin" / "python")
    found = find_build(python)
    assert found.flags, "the flags of the installed vLLM could not be read"
    return VllmBuild("vllm", found.version, found.flags, found.finds_length)


def settled(words: list[str]) -> dict[str, str]:
    """Returns the flags with their values, without those that differ by place."""
    pairs = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    return {name: value for name, value in pairs.items() if name not in {"--host", "--port", "--served-model-name"}}


@pytest.mark.parametrize("place", [in_compose, on_kubernetes, in_the_guide])
def test_the_installed_vllm_knows_every_flag(place: object) -> None:
    assert callable(place)
    known = build()
    assert [flag for flag in flags(place()) if not known.knows(flag)] == []


@pytest.mark.parametrize("place", [in_compose, on_kubernetes, in_the_guide])
def test_the_flags_are_those_that_we_start_it_with(place: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(place)
    monkeypatch.setattr("teacher.vllm_command.host_memory_bytes", lambda: 0)  # the smallest cache of images
    command = server_command(
        EndpointConfig(),
        ServeConfig(max_model_len=16384),
        python="python",
        build=build(),
        parallelism=Parallelism(tensor=2, data=4),
    )
    ours: list[str] = []
    for word in command:
        if ours and ours[-1].startswith("--") and not word.startswith("--"):
            ours[-1] += f"={word}"
        else:
            ours.append(word)
    wanted, found = settled(ours), settled(place())
    assert wanted.keys() - OURS_ALONE == found.keys()
    fixed = {name: value for name, value in found.items() if "$" not in value}
    assert fixed == {name: wanted[name] for name in fixed}
