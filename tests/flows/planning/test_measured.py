"""A finished run, planned anew from what it says: the manifest and figures of the demo's own version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.assumptions import Assumptions
from flows.planning.gpus import gpu_kind
from flows.planning.measured import MeasuredRun, measured_run, success_share
from flows.planning.plan import plan_run
from flows.planning.request import DEFAULT_CONFIG, Machines, Request
from schemas.errors import ConfigError

VERSION = Path(__file__).parent / "finished_run" / "v0002"
NUM_READ = 285


def read(folder: Path = VERSION) -> MeasuredRun:
    return measured_run(folder, DEFAULT_CONFIG, Assumptions())


def test_a_plan_of_as_many_rows_asks_what_the_run_has_asked() -> None:
    found = read()
    machines = Machines.beside(8)
    request = Request(NUM_READ, 8, gpu_kind("H100"), machines, assumptions=found.assumptions, sampling=found.sampling)
    planned = {
        asked.purpose: asked for stage in plan_run(request).stages for asked in stage.demand.asked if asked.calls[0]
    }
    record = json.loads((VERSION / "report.json").read_text("utf-8"))
    spent: dict[str, dict[str, float]] = {}
    for entry in record["accounting"]["costs"]["entries"]:
        totals = spent.setdefault(entry["purpose"], {})
        for name in ("num_calls", "num_replies", "completion_tokens"):
            totals[name] = totals.get(name, 0) + entry[name]
    assert planned.keys() == spent.keys()
    for purpose, totals in spent.items():
        # Two rows were dropped after they were labelled, so that shares of the corpus are a little off.
        assert float(planned[purpose].calls[0]) == pytest.approx(totals["num_calls"], rel=0.1)
        assert float(planned[purpose].samples[0]) == pytest.approx(totals["num_replies"], rel=0.1)
        assert float(planned[purpose].completion_tokens[0]) == pytest.approx(totals["completion_tokens"], rel=0.1)


def test_what_was_measured_says_so_and_the_rest_stays_assumed() -> None:
    found = read()
    assert found.source == "measured: sampleworld v0002, 266 rows"
    assert found.assumptions.duplicate_share.expected == pytest.approx(14 / 282)
    assert found.assumptions.duplicate_share.low == found.assumptions.duplicate_share.high
    assert found.assumptions.duplicate_share.source == found.source
    assert found.assumptions.decode_utilisation == Assumptions().decode_utilisation


def test_the_newest_version_of_a_work_folder_is_read(tmp_path: Path) -> None:
    shutil.copytree(VERSION, tmp_path / "corpus" / "v0002")
    assert read(tmp_path) == read(tmp_path / "corpus") == read()


def test_a_version_without_figures_is_refused(tmp_path: Path) -> None:
    shutil.copytree(VERSION, tmp_path / "v0002")
    for text in ("a stand-in", "{}", '{"accounting": 3}'):
        (tmp_path / "v0002" / "report.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"holds no figures to plan from.*bimode report"):
            read(tmp_path)


def test_too_few_rows_tell_nothing(tmp_path: Path) -> None:
    shutil.copytree(VERSION, tmp_path / "v0002")
    path = tmp_path / "v0002" / "report.json"
    record = json.loads(path.read_text("utf-8"))
    record["summary"]["rows_out"] = 29
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match="has 29 rows; shares measured on fewer than 30 are chance"):
        read(tmp_path)


def test_a_folder_without_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path)


@given(st.floats(0.01, 1.0), st.integers(1, 8))
def test_the_share_of_right_tries_is_found_from_their_mean_number(share: float, most: int) -> None:
    tries = (1 - (1 - share) ** most) / share
    if most > 1:
        assert success_share(tries, most) == pytest.approx(share, rel=1e-6)
