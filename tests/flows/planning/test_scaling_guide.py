"""The recorded plans of two scales, and the page that tells of them, are those that the code makes today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.planning.gpus import gpu_kind
from flows.planning.plan import plan_run
from flows.planning.request import Machines, Request

ROOT = Path(__file__).parents[3]
RECORDS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / "planning.json").read_text("utf-8"))
CHOSEN = [record for record in RECORDS if not record["is_default"]]


@pytest.mark.parametrize(
    "record", CHOSEN, ids=lambda record: f"{record['rows']}-{record['gpus']}-{record['processes']}"
)
def test_recorded_plans_are_todays(record: dict[str, Any]) -> None:
    """If this fails, an assumption or a rule has changed: run `python -m benchmarks.planning` and correct the page."""
    machines = replace(Machines.beside(record["gpus"]), num_processes=record["processes"])
    plan = plan_run(Request(record["rows"], record["gpus"], gpu_kind(record["gpu"]), machines))
    today = plan.to_record()
    for name, total in record["total"].items():
        assert today["total"][name] == pytest.approx(total, rel=1e-6), name
    assert (today["shard_rows"], today["parallel_shards"]) == (record["shard_rows"], record["parallel_shards"])


def test_the_page_tells_what_is_recorded() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for record in CHOSEN:
        if (record["rows"] > 10**8) == (record["processes"] > 1):  # a billion rows on Ray, 16 million without
            days, simulated = record["total"]["wall_hours"]["expected"] / 24, record["simulation"]["hours"] / 24
            assert f"{_digits(days)} ({_digits(simulated)})" in page
    (node,) = (each for each in CHOSEN if (each["rows"], each["gpus"], each["processes"]) == (16_400_000, 8, 1))
    hours = node["total"]["gpu_hours"]
    assert "{:,.0f} ({:,.0f} to {:,.0f})".format(*(_rounded(hours[k]) for k in ("expected", "low", "high"))) in page
    for name, unit in (("images", 1e12), ("corpus", 1e12)):
        assert f"{node['storage_bytes'][name]['expected'] / unit:.1f}" in page


def _rounded(value: float) -> float:
    """Returns a number of hours to the next ten."""
    return round(value, -1)


def _digits(days: float) -> str:
    return f"{_rounded(days):,.0f}" if days > 1000 else f"{days:.0f}" if days >= 100 else f"{days:.1f}"
