"""Imports run downward: schemas < sources, filters, judges, teacher, corpus < training < flows (DESIGN: The house)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    "schemas": 0,
    "sources": 1,
    "filters": 1,
    "judges": 1,
    "teacher": 1,
    "corpus": 1,
    "training": 2,
    "flows": 3,
    "sampleworld": 3,
}
FILES = [path for package in LEVELS for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_lower_layers(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for package in imported_packages(path) & set(LEVELS) - {own}:
        assert LEVELS[package] < LEVELS[own], f"{own} must not import {package}"


@pytest.mark.parametrize(
    ("library", "home"),
    [("prefect", {"flows"}), ("torch", {"training"}), ("trl", {"training"}), ("openai", {"teacher"}), ("vllm", set())],
)
def test_a_heavy_library_is_imported_in_one_place(library: str, home: set[str]) -> None:
    # teacher/cpu_site runs inside the vLLM server's process, never in ours.
    ours = [path for path in FILES if path.parent.name != "cpu_site"]
    importers = {path.relative_to(ROOT).parts[0] for path in ours if library in imported_packages(path)}
    assert importers <= home


def test_nothing_outside_the_sample_world_knows_it() -> None:
    importers = {path.relative_to(ROOT).parts[0] for path in FILES if "sampleworld" in imported_packages(path)}
    assert importers <= {"sampleworld"}
