from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.accounting import GROUPINGS, accounting_figures, amount, gpu_time, ledgers_of, money
from schemas.config import ModelPrices, PricesConfig
from schemas.usage import Usage, UsageKey

PRICES = PricesConfig(prompt=1.0, completion=4.0, gpu_hour=2.0, models={"b": ModelPrices(prompt=8.0)})
names = st.sampled_from(["a", "b", "c"])
ledgers = st.dictionaries(
    st.builds(UsageKey, names, names, names, names),
    st.builds(
        Usage,
        num_calls=st.integers(1, 99),
        prompt_tokens=st.integers(0, 10**9),
        completion_tokens=st.integers(0, 10**9),
        gpu_seconds=st.floats(0, 1e6),
        num_gpu_calls=st.integers(0, 99),
    ),
    max_size=9,
)


@given(ledgers)
def test_every_table_sums_to_the_total(ledger: dict[UsageKey, Usage]) -> None:
    figures = accounting_figures(ledger, {}, PRICES)["costs"]
    for table in GROUPINGS:
        for name in ("num_calls", "prompt_tokens", "completion_tokens"):
            assert sum(row[name] for row in figures[table]) == figures["total"][name]
        assert sum(row["cost"] for row in figures[table]) == pytest.approx(figures["total"]["cost"])
    assert figures["total"]["is_cost_whole"] == all(row["is_cost_whole"] for row in figures["entries"])


@given(ledgers, ledgers)
def test_the_ledgers_can_be_read_back_from_their_figures(
    costs: dict[UsageKey, Usage], paid: dict[UsageKey, Usage]
) -> None:
    # GPU time without a call of which it is known is not shown, and does not occur.
    costs, paid = (
        {key: usage if usage.num_gpu_calls else replace(usage, gpu_seconds=0.0) for key, usage in ledger.items()}
        for ledger in (costs, paid)
    )
    figures = json.loads(json.dumps(accounting_figures(costs, paid, PRICES)))
    assert ledgers_of(figures) == (costs, paid)


def test_costs_and_what_the_run_paid_stand_apart() -> None:
    key = UsageKey("performance", "performance", "charts", "m")
    costs = {key: Usage(num_calls=10, num_replies=80)}
    paid = {key: Usage(num_calls=2, num_replies=16, num_reused=64, num_retries=1, num_failures=1)}
    figures = accounting_figures(costs, paid, PricesConfig())
    assert json.loads(json.dumps(figures)) == figures
    assert figures["costs"]["total"]["num_replies"] == 80
    assert (
        figures["paid"]["by_purpose"][0] | {"stage": "performance", "num_reused": 64, "num_failures": 1}
        == (figures["paid"]["by_purpose"][0])
    )
    assert not figures["has_prices"]


def row(**usage: Any) -> dict[str, Any]:
    """Returns the figures of a ledger of one entry."""
    ledger = {UsageKey("s", "p", "a", "m"): Usage(**usage)}
    total: dict[str, Any] = accounting_figures(ledger, {}, PRICES)["costs"]["total"]
    return total


def test_unknown_gpu_time_is_never_shown_as_none() -> None:
    assert (gpu_time(row(num_calls=2)), money(row(num_calls=2))) == ("–", "–")
    some = row(num_calls=2, num_gpu_calls=1, gpu_seconds=7200.0)
    assert (gpu_time(some), money(some)) == ("≥ 7,200", "≥ 4.00")
    known = row(num_calls=2, num_gpu_calls=2, gpu_seconds=7200.0)
    assert (gpu_time(known), money(known)) == ("7,200", "4.00")


@pytest.mark.parametrize(
    ("cost", "shown"), [(0.0, "0.00"), (0.01234, "0.0123"), (1.0, "1.00"), (12345.678, "12,345.68")]
)
def test_small_amounts_keep_their_digits(cost: float, shown: str) -> None:
    assert amount(cost) == shown
