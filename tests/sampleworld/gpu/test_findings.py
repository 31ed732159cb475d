from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sampleworld.experiment import BPO_ARMS, FULL, annealing_arms
from sampleworld.findings import ALL_FAMILIES, GLANCE_FAMILIES, Estimate, judge_criteria, write_findings

pytestmark = pytest.mark.filterwarnings("default")


def rate(share: float) -> dict[str, Any]:
    return {"num": round(100 * share), "of": 100, "share": share, "low": share, "high": share}


def families(accuracy: float, thinking: float, *, glance_thinking: float = 0.0) -> dict[str, Any]:
    return {
        family: {
            "accuracy": rate(accuracy),
            "thinking_rate": rate(glance_thinking if family in GLANCE_FAMILIES else thinking),
            "mean_output_tokens": 10.0,
        }
        for family in ALL_FAMILIES
    }


def seed_figures(seed: int, *, mixed: float = 0.9, auto_thinking: float = 0.95) -> dict[str, Any]:
    """Returns figures in which every criterion holds; arguments break one."""
    wobble = 0.001 * seed
    evaluations = {
        name: {str(mode): families(0.5, 0.0) for mode in arm.modes} for name, arm in annealing_arms(FULL).items()
    }
    evaluations["mixed"] = {
        "long": families(mixed + wobble, 1.0),
        "short": families(0.4, 0.0),
        "auto": families(0.42, 0.05),
    }
    for name in BPO_ARMS:
        thinking = auto_thinking if name == "bpo" else 0.1 + wobble
        evaluations[name] = {
            "long": families(0.9, 1.0),
            "short": families(0.4, 0.0),
            "auto": families(0.89, thinking),
        }
    points = [{"step": step, "families": families(0.5 + step / 100, step / 50)} for step in (0, 20, 40)]
    return {"seed": seed, "evaluations": evaluations, "curves": dict.fromkeys(BPO_ARMS, points), "seconds": 1}


def test_an_interval_over_seeds_is_students() -> None:
    # Mean 0.2, deviation 0.1: 4.303 * 0.1 / sqrt(3).
    found = Estimate((0.1, 0.2, 0.3))
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert str(found) == "20.0 ± 24.8"
    assert str(Estimate((0.5,))) == "50.0"


def test_every_criterion_can_hold() -> None:
    assert all(criterion.holds is True for criterion in judge_criteria([seed_figures(seed) for seed in range(3)]))


def test_one_seed_leaves_every_criterion_open() -> None:
    assert all(criterion.holds is None for criterion in judge_criteria([seed_figures(0)]))


def test_a_win_that_its_interval_does_not_bear_out_does_not_hold() -> None:
    figures = [seed_figures(seed, mixed=mixed) for seed, mixed in enumerate((0.9, 0.4, 0.6))]
    assert [criterion.holds for criterion in judge_criteria(figures)[:4]] == [False] * 4


def test_too_little_thinking_after_bpo_does_not_hold() -> None:
    failed = [c.text for c in judge_criteria([seed_figures(s, auto_thinking=0.7) for s in range(3)]) if not c.holds]
    assert failed == ["and thinks on over 80% of the step questions", "and thinks on over 80% of the unseen `row`"]


def test_the_page_names_each_seed_and_draws_both_curves(tmp_path: Path) -> None:
    for seed in (0, 2):
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(seed_figures(seed)))
    page = write_findings(tmp_path)
    assert "seed 0, 2" in page
    assert (tmp_path / "README.md").read_text() == page
    for name in ("thinking_rate", "auto_accuracy"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.svg").exists()
