"""The measured dry run: rows drawn, what they cost scaled to all, and nothing paid twice."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.estimate import estimate_run, render_estimate
from flows.run_config import load_run
from flows.sampling_estimate import MIN_SOURCE_ROWS, RowSampler, SamplePace, Scaled, Stratum, scaled, scaled_usages
from schemas.config import PricesConfig
from schemas.samples import Sample
from schemas.usage import Usage, UsageKey
from teacher.usage import row_costs
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher


def sampler_of(num_rows: int, **sizes: int) -> RowSampler:
    sampler = RowSampler(num_rows, seed=0)
    for source, size in sizes.items():
        for number in range(size):
            sampler.see("shard", Sample(f"{source}{number}", source, f"{source}:f#{number}", "?"))
    return sampler


def drawn(sampler: RowSampler) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for row in sampler.rows():
        ids.setdefault(row.sample.source, []).append(row.sample.id)
    return ids


def test_each_source_gives_its_share_and_at_least_a_few() -> None:
    numbers = {source: len(ids) for source, ids in drawn(sampler_of(50, large=1000, small=40, tiny=3)).items()}
    assert numbers == {"large": 48, "small": MIN_SOURCE_ROWS, "tiny": 3}


def test_a_larger_sample_holds_the_smaller_one() -> None:
    """So that asking about more rows later pays for the new ones alone."""
    smaller, larger = drawn(sampler_of(20, a=300, b=100)), drawn(sampler_of(60, b=100, a=300))
    assert all(set(smaller[source]) < set(larger[source]) for source in ("a", "b"))


def test_a_total_is_scaled_with_its_interval() -> None:
    # N = 100, n = 4, values 1 2 3 6: m = 3, s2 = 14/3; 100^2 * 0.96 * (14/3) / 4 = 11,200.
    estimate = scaled([(100, [1, 2, 3, 6])])
    reach = 1.96 * 11_200**0.5
    assert estimate.value == 300
    assert (estimate.low, estimate.high) == pytest.approx((300 - reach, 300 + reach))
    # A source whose rows are all drawn adds its sum and no doubt.
    both = scaled([(100, [1, 2, 3, 6]), (2, [10, 20])])
    assert (both.value, both.high) == pytest.approx((330, 330 + reach))


def test_an_interval_does_not_end_below_what_was_seen() -> None:
    estimate = scaled([(6, [0, 0, 0, 0, 90])])
    assert estimate.low == 90 and estimate.value == 108


@given(st.lists(st.integers(0, 50), min_size=2, max_size=60), st.integers(0, 500))
def test_equal_rows_leave_no_doubt_and_all_rows_give_the_sum(values: list[int], more: int) -> None:
    assert scaled([(len(values), values)]) == Scaled(sum(values), sum(values), sum(values))
    num_rows = len(values) + more
    same = scaled([(num_rows, [values[0]] * len(values))])
    assert (same.low, same.high) == pytest.approx((values[0] * num_rows, values[0] * num_rows))
    assert scaled([(num_rows, values)]).value == pytest.approx(num_rows * statistics.fmean(values))


def test_sources_sum_to_purposes_and_those_to_the_total() -> None:
    keys = {name: UsageKey("s", name, "", model) for name, model in (("routing", "cheap"), ("performance", "dear"))}
    one = {keys["routing"]: Usage(1, prompt_tokens=10), keys["performance"]: Usage(4, prompt_tokens=300)}
    two = {keys["performance"]: Usage(8, prompt_tokens=500)}
    strata = [Stratum("a", 10, [one, two]), Stratum("b", 4, [two, two])]
    prices = PricesConfig(prompt=1.0, models={"dear": PricesConfig(prompt=1000.0)})
    usages = {(usage.source, usage.purpose): usage for usage in scaled_usages(strata, prices)}
    assert list(usages) == [
        ("a", "routing"), ("a", "performance"), ("b", "performance"),
        ("", "routing"), ("", "performance"), ("", ""),
    ]  # fmt: skip
    assert usages["", ""].num_calls.value == 5 + 60 + 32
    for name in ("num_calls", "prompt_tokens", "cost"):
        total = getattr(usages["", ""], name).value
        for level in (bool, lambda source: not source):
            parts = [u for (source, purpose), u in usages.items() if level(source) and purpose]
            assert sum(getattr(usage, name).value for usage in parts) == pytest.approx(total)
    assert usages["", ""].cost.value == pytest.approx((10 * 5 * 1.0 + (10 * 400 + 4 * 500) * 1000.0) / 1e6)


def test_a_pace_needs_something_paid_for(tmp_path: Path) -> None:
    config = load_run(str(write_config(tmp_path, tmp_path, "http://127.0.0.1:9/v1", prices={"gpu_hour": 3.0})))
    tokens = Scaled(1000.0, 800.0, 1200.0)
    assert SamplePace.of(Usage(num_reused=9), tokens, config) is None
    pace = SamplePace.of(Usage(completion_tokens=100, wall_seconds=4.0), tokens, config)
    assert pace is not None and (pace.seconds, pace.gpu_seconds) == (Scaled(40.0, 32.0, 48.0), None)
    on_gpus = Usage(completion_tokens=100, wall_seconds=4.0, gpu_seconds=8.0, num_gpu_calls=1)
    pace = SamplePace.of(on_gpus, tokens, config)
    assert pace is not None and pace.gpu_cost is not None
    assert pace.gpu_cost.value == pytest.approx(1000 * 0.08 / 3600 * 3.0)


def test_a_sample_is_really_asked_and_its_replies_are_kept_for_the_run(tmp_path: Path) -> None:
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        questions = write_questions(tmp_path / "in", 60)
        config = load_run(str(write_config(tmp_path, questions, teacher.url, prices={"prompt": 1.0})))
        first = estimate_run(config, num_sampled=20).measured
        assert first is not None
        num_calls = len(teacher.calls)
        assert (first.num_rows, first.num_sampled) == ({"sums": 60}, {"sums": 20})
        assert first.paid.num_calls == num_calls > 20
        again = estimate_run(config, num_sampled=20)
        assert again.measured is not None and len(teacher.calls) == num_calls
        assert (again.measured.usages, again.measured.paid.num_calls, again.measured.pace) == (first.usages, 0, None)
        everything = estimate_run(config, num_sampled=60).measured
        assert everything is not None
        total = everything.usages[-1]
        # All rows drawn: the estimate is the count, and it is what the journals hold.
        costs = row_costs(Path(config.workdir) / "journals").sum().collect().to_dicts()[0]
        assert total.num_calls == Scaled(costs["num_calls"], costs["num_calls"], costs["num_calls"])
        assert total.completion_tokens.value == costs["completion_tokens"]
        assert len(teacher.calls) == total.num_calls.value
        true_tokens = {usage.purpose: usage.completion_tokens.value for usage in everything.usages}
        guessed = {usage.purpose: usage.completion_tokens for usage in first.usages}
        assert guessed[""].low <= true_tokens[""] <= guessed[""].high
    text = render_estimate(again)
    assert "Measured on 20 rows (20 of 60 of sums)" in text and "paid nothing" in text and "cost" in text
