"""What the tests of deployment files share: where the files are, and how they are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
KUBERNETES = ROOT / "deploy" / "kubernetes"
GUIDE = ROOT / "docs" / "deployment.md"
BY_DIGEST = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")


def documents(path: Path) -> list[dict[str, Any]]:
    """Returns the YAML documents of a file; aliases and merge keys are resolved."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document is not None]


def flags(words: list[str]) -> list[str]:
    """Returns the names of the flags among the words of a command."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]
