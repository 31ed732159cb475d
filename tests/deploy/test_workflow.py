"""The workflow on GitHub: valid, without rights it does not need, and made of pinned actions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.places import ROOT, documents

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_it_is_what_github_understands() -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*map(str, command), str(WORKFLOW)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_actions_are_pinned_and_its_rights_are_few() -> None:
    (workflow,) = documents(WORKFLOW)
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] for job in workflow["jobs"].values())


def test_it_runs_what_everybody_can_run() -> None:
    commands = " ".join(re.findall(r"run: (.*)", WORKFLOW.read_text("utf-8")))
    assert "bash .ci/run" in commands and "make audit" in commands
