from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import ModelPrices, PricesConfig
from schemas.requests import Reply
from schemas.usage import Usage, UsageKey, cost_of, merged_ledgers, split_ledger, total_usage

names = st.sampled_from(["a", "b", "c"])
keys = st.builds(UsageKey, names, names, names, names)
# Quarters of seconds, so that sums are exact in any order.
numbers = st.integers(0, 10**6)
seconds = numbers.map(lambda number: number / 4)
usages = st.builds(
    Usage, **{field.name: seconds if field.name.endswith("seconds") else numbers for field in fields(Usage)}
)
ledgers = st.dictionaries(keys, usages, max_size=12)


@given(ledgers)
def test_every_split_of_a_ledger_sums_to_its_total(ledger: dict[UsageKey, Usage]) -> None:
    total = total_usage(ledger.values())
    for names in (("stage",), ("purpose",), ("source",), ("model",), ("stage", "purpose"), ()):
        parts = split_ledger(ledger, *names)
        assert total_usage(total_usage(part.values()) for part in parts.values()) == total
        assert merged_ledgers(parts.values()) == ledger


@given(ledgers, ledgers)
def test_merged_ledgers_lose_nothing(one: dict[UsageKey, Usage], two: dict[UsageKey, Usage]) -> None:
    merged = merged_ledgers([one, two])
    assert total_usage(merged.values()) == total_usage([*one.values(), *two.values()])
    assert set(merged) == set(one) | set(two)


@given(usages)
def test_a_usage_is_the_same_after_a_record(usage: Usage) -> None:
    assert Usage.from_record({**usage.to_record(), "stage": 1}) == usage


def test_a_call_with_eight_choices_is_one_call_and_eight_replies() -> None:
    replies = [
        Reply("x", "stop", "m", prompt_tokens=100, completion_tokens=5, cached_tokens=60, seconds=2.0, choice=choice)
        for choice in range(8)
    ]
    assert total_usage(map(Usage.of_stored, replies)) == Usage(
        num_calls=1, num_replies=8, prompt_tokens=100, completion_tokens=40, cached_tokens=60, seconds=2.0
    )


def test_the_attempts_of_a_call_are_retries_but_for_the_last() -> None:
    first = Reply("x", "stop", "m", num_attempts=3)
    second = Reply("y", "stop", "m", num_attempts=3, choice=1)
    assert total_usage(map(Usage.of_stored, [first, second])) == Usage(num_calls=1, num_replies=2, num_retries=2)


def test_each_model_has_its_own_prices() -> None:
    prices = PricesConfig(
        prompt=1.0, completion=2.0, models={"dear": ModelPrices(prompt=10.0, cached_prompt=4.0, completion=30.0)}
    )
    usage = Usage(prompt_tokens=1_000_000, cached_tokens=250_000, completion_tokens=500_000)
    cheap = {UsageKey("s", "p", "a", "cheap"): usage}
    dear = {UsageKey("s", "p", "a", "dear"): usage}
    # Without a price of their own, cached tokens cost what others cost.
    assert cost_of(cheap, prices).amount == pytest.approx(1.0 + 0.5 * 2.0)
    assert cost_of(dear, prices).amount == pytest.approx(0.75 * 10.0 + 0.25 * 4.0 + 0.5 * 30.0)
    assert cost_of({**cheap, **dear}, prices).amount == pytest.approx(2.0 + 23.5)


def test_more_cached_tokens_than_there_were_are_not_paid_back() -> None:
    usage = Usage(prompt_tokens=10, cached_tokens=1_000_000)
    assert cost_of({UsageKey("s", "p", "a", "m"): usage}, PricesConfig(prompt=1e6, cached_prompt=0.0)).amount == 0.0


def test_gpu_time_that_is_unknown_makes_a_cost_a_lower_bound() -> None:
    key, prices = UsageKey("s", "p", "a", "m"), PricesConfig(gpu_hour=2.0)
    known = cost_of({key: Usage(num_calls=3, num_gpu_calls=3, gpu_seconds=5400.0)}, prices)
    partly = cost_of({key: Usage(num_calls=4, num_gpu_calls=3, gpu_seconds=5400.0)}, prices)
    assert (known.amount, known.is_whole) == (3.0, True)
    assert (partly.amount, partly.is_whole) == (3.0, False)
    # Where an hour has no price, nothing is missing.
    assert cost_of({key: Usage(num_calls=4)}, PricesConfig(prompt=1.0)).is_whole


def test_prices_of_zero_are_none_at_all() -> None:
    assert not PricesConfig(models={"m": ModelPrices()}).has_any
    assert PricesConfig(models={"m": ModelPrices(gpu_hour=1.0)}).has_any
