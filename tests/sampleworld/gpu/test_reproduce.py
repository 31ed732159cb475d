from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sampleworld import reproduce
from sampleworld.experiment import BPO_ARMS, SMOKE, annealing_arms
from sampleworld.findings import ALL_FAMILIES, write_findings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

BASE = Path(reproduce.__file__).parent / "base"
TINY = dataclasses.replace(
    SMOKE, annealing_steps=3, bpo_steps=2, bpo_prompts=16, curve_steps=1, num_test=2, num_curve=1
)


def test_the_experiment_runs_every_arm_and_repeats_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    figures = reproduce.Seed(TINY, 0, base=BASE, folder=tmp_path / "seed-0").run()
    assert set(figures["evaluations"]) == {*annealing_arms(TINY), *BPO_ARMS}
    assert all(
        set(by_family) == set(ALL_FAMILIES) for arm in figures["evaluations"].values() for by_family in arm.values()
    )
    assert [point["step"] for point in figures["curves"]["bpo"]] == [0, 1, 2]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an arm or an evaluation was repeated")

    trained = sorted((tmp_path / "seed-0").glob("*/model/model.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in trained]
    monkeypatch.setattr(reproduce, "evaluate_families", refuse)
    again = reproduce.Seed(TINY, 0, base=BASE, folder=tmp_path / "seed-0").run()
    assert again["evaluations"] == figures["evaluations"]
    assert [path.stat().st_mtime_ns for path in trained] == stamps
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "seed-0.json").write_text(json.dumps(figures))
    assert "one seed: open" in write_findings(tmp_path / "results")
