"""The version before beside this one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from corpus.comparison import compared_figures
from corpus.figures import report_figures
from corpus.report_inputs import ReportInputs, VersionBefore
from corpus.tally import CorpusTally, ModeCount
from schemas.config import PricesConfig
from schemas.fates import StageCount
from schemas.usage import Usage, UsageKey


def figures(*, near: int, think: int, num_calls: int = 10) -> dict[str, Any]:
    names = dict.fromkeys(("name", "version", "created", "inputs", "teacher", "reasoner"), "x")
    tally = CorpusTally(rows=ModeCount(think, 4), by_topic={"math": ModeCount(think, 4)})
    num_rows = think + 4
    stages = {"duplicates": StageCount(num_rows + near, num_rows, Counter(duplicate_near=near))}
    costs = {UsageKey("performance", "performance", "s", "T"): Usage(num_calls, num_calls, prompt_tokens=1_000_000)}
    return report_figures(
        ReportInputs(**names, recipe="r", stages=stages, tally=tally, costs=costs, prices=PricesConfig(prompt=2.0))
    )


def before(old: Any, **changes: Any) -> VersionBefore:
    counts = {"duplicates": StageCount(9, 6, Counter(duplicate_near=1, duplicate_exact=2))}
    values: dict[str, Any] = {"recipe": "r", "rows": ModeCount(2, 4), "counts": counts, "figures": old}
    return VersionBefore(**{"version": "v0001", "created": "2025", **values, **changes})


def test_rows_shares_reasons_topics_and_costs_stand_side_by_side() -> None:
    compared = compared_figures(figures(near=5, think=6), before(figures(near=1, think=2, num_calls=4)))
    assert compared["rows"]["total"] == {"before": 6, "now": 10}
    assert compared["share_think"] == {"before": pytest.approx(1 / 3), "now": 0.6}
    assert [(row["reason"], row["before"], row["now"]) for row in compared["reasons"]] == [
        ("duplicate_near", 1, 5),
        ("duplicate_exact", 2, 0),
    ]
    math = compared["topics"][0]
    assert (math["topic"], math["rows"]) == ("math", {"before": 6, "now": 10})
    assert compared["costs"]["num_calls"] == {"before": 4, "now": 10}
    assert compared["costs"]["cost"] == {"before": 2.0, "now": 2.0}
    assert compared["is_same_recipe"]


def test_another_recipe_is_named_as_such() -> None:
    assert not compared_figures(figures(near=0, think=1), before(None, recipe="other"))["is_same_recipe"]


@pytest.mark.parametrize(
    "old",
    [
        None,
        {},
        {"topics": 7, "accounting": []},
        {"topics": [None, {"topic": 3}, {"topic": "math", "total": "many"}], "accounting": {"costs": {"total": 5}}},
        {"accounting": {"has_prices": True, "costs": {"total": {"num_calls": "four", "cost": None}}}},
    ],
)
def test_a_damaged_report_of_the_version_before_leaves_what_its_manifest_tells(old: Any) -> None:
    compared = compared_figures(figures(near=0, think=6), before(old))
    assert compared["rows"]["think"] == {"before": 2, "now": 6}
    assert compared["costs"]["num_calls"] == {"before": None, "now": 10}
    assert all(row["rows"]["before"] == 0 for row in compared["topics"])
    assert compared["has_figures"] == (old is not None)


def test_costs_without_prices_are_not_compared() -> None:
    old = figures(near=0, think=1)
    old["accounting"]["has_prices"] = False
    assert compared_figures(figures(near=0, think=1), before(old))["costs"]["cost"] == {"before": None, "now": 2.0}
