"""The images: what the Dockerfile promises, as far as it can be seen without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.places import BY_DIGEST, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
ENTRYPOINT = ROOT / "deploy" / "image" / "entrypoint"
INSTRUCTIONS = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M), re.M)


def values(instruction: str) -> list[str]:
    return [text.replace("\\\n", " ") for name, text in INSTRUCTIONS if name == instruction]


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "info", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_built_upon_is_pinned() -> None:
    arguments = dict(text.split("=", 1) for text in values("ARG"))
    assert BY_DIGEST.fullmatch(arguments["PYTHON_IMAGE"])
    assert values("FROM") == ["${PYTHON_IMAGE} AS pipeline", "pipeline AS gpu"]
    installed = re.findall(r"apt-get install -y --no-install-recommends ((?:\S+ )+)", " ".join(values("RUN")))
    assert installed and all("=" in package for packages in installed for package in packages.split("&&")[0].split())


def test_what_is_copied_exists_and_is_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    sources = [source for text in values("COPY") for source in text.split()[:-1] if not source.startswith("--")]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [s for s in sources if s != "." and not any(Path(s).is_relative_to(a) for a in allowed)] == []
    assert "deploy/image" in allowed and "prefect.yaml" in allowed
    # The places where secrets lie are not let through, wherever they are.
    assert not any(Path("deploy/compose/secrets").is_relative_to(a) for a in allowed)
    assert {"**/.env", "**/*.key", "**/*.pem"} <= set(ignored)


def test_no_stage_ends_as_root_and_no_secret_is_set() -> None:
    assert values("USER") == ["10001", "0", "10001"]
    assert not re.search(r"^(?:ENV|ARG)\b.*(?:PASSWORD|SECRET|TOKEN|API_KEY)", DOCKERFILE, re.MULTILINE)


def test_each_command_names_a_program_with_these_flags() -> None:
    for text in values("CMD"):
        command = json.loads(text)
        assert command[0] == "prefect"
        told = subprocess.run(
            [sys.executable, "-m", *command[:3], "--help"], capture_output=True, text=True, check=True, timeout=300
        ).stdout
        assert [word for word in command if word.startswith("--") and word not in told] == []


def enter(tmp_path: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ENTRYPOINT, *command],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_secret_comes_from_a_file_as_it_is(tmp_path: Path) -> None:
    secret = "a b$(touch x)'\"\\`*"
    (tmp_path / "key").write_text(secret + "\n")
    show = "import os; print(os.environ['BIMODE_API_KEY'], 'BIMODE_API_KEY_FILE' in os.environ)"
    done = enter(tmp_path, {"BIMODE_API_KEY_FILE": str(tmp_path / "key")}, sys.executable, "-c", show)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{secret} False\n", "")
    assert not (tmp_path / "x").exists()


def test_without_files_the_environment_stays_as_it_is_and_the_command_takes_over(tmp_path: Path) -> None:
    done = enter(tmp_path, {"HF_TOKEN": "given"}, "sh", "-c", 'echo "$HF_TOKEN $1"; exit 7', "sh", "two words")
    assert (done.returncode, done.stdout) == (7, "given two words\n")


@pytest.mark.parametrize("content", [None, ""])
def test_a_secret_that_is_missing_or_empty_ends_the_container(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    done = enter(tmp_path, {"HF_TOKEN_FILE": str(tmp_path / "key")}, "echo", "started")
    assert done.returncode == 2 and "started" not in done.stdout and "HF_TOKEN_FILE names" in done.stderr


def test_a_secret_that_is_given_twice_ends_the_container_unseen(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("one")
    done = enter(tmp_path, {"HF_TOKEN_FILE": str(tmp_path / "key"), "HF_TOKEN": "other"}, "echo", "started")
    assert done.returncode == 2 and "other" not in done.stderr and "one of them" in done.stderr
