"""Plans: sums, laws, prices, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import crew
from flows.planning.assumptions import Assumptions, Range
from flows.planning.gpus import gpu_kind
from flows.planning.plan import Plan, best_settings, plan_run, plan_with_settings
from flows.planning.request import DEFAULT_CONFIG, MAX_TASKS, Machines, Request
from schemas.config import RunConfig, parse_config
from schemas.errors import ConfigError


def request(num_rows: int = 1_000_000, num_gpus: int = 8, **changes: Any) -> Request:
    changes.setdefault("assumptions", Assumptions().expected())
    return replace(Request(num_rows, num_gpus, gpu_kind("H100"), Machines.beside(num_gpus)), **changes)


def settings_of(**sections: object) -> RunConfig:
    source = {"name": "rows", "format": "jsonl", "path": "rows.jsonl", "columns": {"images": "image"}}
    return parse_config({"sources": [source], **sections})


def wall_hours(plan: Plan) -> float:
    return float(plan.wall_seconds[0]) / 3600


def test_the_number_of_tasks_is_that_of_the_crew() -> None:
    assert MAX_TASKS == crew.MAX_TASKS
    assert plan_run(request()).num_tasks == 8 * 64
    assert plan_run(request(machines=Machines(32, num_processes=16))).num_tasks == 12 * 64 < 1000


def test_totals_are_the_sums_of_the_stages() -> None:
    plan = plan_run(request(assumptions=Assumptions()))
    record = plan.to_record()
    for name in ("calls", "prompt_tokens", "completion_tokens"):
        stages = sum(stage[name]["expected"] for stage in record["stages"])
        assert record["total"][name]["expected"] == pytest.approx(stages)
    assert record["total"]["wall_hours"]["expected"] == pytest.approx(wall_hours(plan))
    storage = record["storage_bytes"]
    parts = sum(storage[name]["expected"] for name in ("images", "journals", "stages", "corpus"))
    assert storage["total"]["expected"] == pytest.approx(parts)
    for stage in record["stages"]:
        assert stage["gpu_hours"]["low"] <= stage["gpu_hours"]["expected"] <= stage["gpu_hours"]["high"]


def test_sixteen_million_rows_on_a_node_take_about_three_weeks() -> None:
    # By hand: 36.5 G prompt tokens, a quarter of them cached, at 5,000 a second and GPU: 1.5 k GPU hours; 20.5 G
    # completion tokens at 2,700 to 3,800: 1.8 k. Together 3.3 k, over 8 GPUs at 93 %: 440 hours.
    plan = plan_run(request(16_400_000))
    assert float(plan.gpu_seconds[0]) / 3600 == pytest.approx(3300, rel=0.15)
    assert wall_hours(plan) / 24 == pytest.approx(20, rel=0.15)
    assert {stage.name for stage in plan.stages if stage.bound_by == "GPUs"} >= {"performance", "reasoning"}


@given(st.integers(10_000, 10**9))
@settings(max_examples=15)
def test_with_the_same_settings_twice_the_rows_take_twice_the_time(num_rows: int) -> None:
    config = DEFAULT_CONFIG.model_copy(update={"shard_rows": 100})  # so many shards that rounding does not show
    once = plan_with_settings(request(num_rows, config=config), 8)
    twice = plan_with_settings(request(2 * num_rows, config=config), 8)
    assert wall_hours(twice) == pytest.approx(2 * wall_hours(once), rel=0.01)
    assert float(twice.storage.total[0]) == pytest.approx(2 * float(once.storage.total[0]), rel=0.01)


@given(st.integers(2, 64), st.integers(1, 8), st.sampled_from(["H100", "H200", "A100", "L40S"]))
@settings(max_examples=15)
def test_whole_hosts_more_are_never_slower(num_hosts: int, more: int, gpu: str) -> None:
    fewer, many = (
        plan_with_settings(
            replace(request(10**8, 8 * hosts), gpu=gpu_kind(gpu), machines=Machines(64)),
            32,
        )
        for hosts in (num_hosts, num_hosts + more)
    )
    assert wall_hours(many) <= wall_hours(fewer) * (1 + 1e-9)


def test_settings_are_chosen_so_that_gpus_do_not_wait_for_the_slowest_rows() -> None:
    default = plan_with_settings(request(16_400_000, 64), DEFAULT_CONFIG.parallel_shards)
    chosen = plan_run(request(16_400_000, 64))
    assert default.stages[5].bound_by == "slowest rows"
    assert wall_hours(chosen) < wall_hours(default) / 5
    assert best_settings(chosen.request).setup.parallel_per_process == chosen.setup.parallel_per_process


def test_shards_of_a_billion_rows_are_so_large_that_their_files_fit_into_folders() -> None:
    chosen = plan_run(request(10**9, 64))
    assert chosen.request.config.shard_rows >= 6000 and 3 * chosen.request.num_shards <= 500_000


def test_the_users_settings_are_taken_as_they_are() -> None:
    config = settings_of(shard_rows=700, parallel_shards=3)
    plan = plan_run(request(config=config, is_own=True))
    assert (plan.request.num_shards, plan.setup.num_parallel) == (1429, 3)


def test_few_rows_have_few_shards() -> None:
    plan = plan_run(request(1500, 64))
    assert plan.setup.num_parallel <= plan.request.num_shards <= 2 and plan.num_tasks <= 16


def test_a_run_of_nothing_is_refused() -> None:
    for rows, gpus in ((0, 8), (10, 0), (-1, 1)):
        with pytest.raises(ConfigError, match="both must be at least 1"):
            plan_run(request(rows, gpus))


def test_prices_are_of_tokens_and_of_the_gpus_while_they_are_held() -> None:
    prices = {"gpu_hour": 2.0, "prompt": 1.0, "cached_prompt": 0.0, "completion": 10.0}
    plan = plan_run(request(config=settings_of(prices=prices), is_own=True))
    assert plan.gpu_cost[0] == pytest.approx(wall_hours(plan) * 8 * 2.0)
    new = plan.total("new_text_tokens") + plan.total("new_image_tokens")
    assert plan.token_cost[0] == pytest.approx((new[0] + 10 * plan.total("completion_tokens")[0]) / 1e6)
    uncached = plan_run(request(config=settings_of(prices={"prompt": 1.0}), is_own=True))
    assert uncached.token_cost[0] == pytest.approx(uncached.total("prompt_tokens")[0] / 1e6)


def test_a_reasoner_that_is_asked_elsewhere_takes_no_gpu_here_but_its_tokens_cost() -> None:
    reasoner = {"model": "other/reasoner", "url": "http://127.0.0.1:9/v1"}
    prices = {"models": {"other/reasoner": {"completion": 3.0}}}
    config = settings_of(reasoner=reasoner, prices=prices)
    plan = plan_run(request(config=config, is_own=True, elsewhere=frozenset(["other/reasoner"])))
    stage = next(stage for stage in plan.stages if stage.name == "reasoning")
    trace, _ = stage.demand.asked
    assert plan.token_cost[0] == pytest.approx(3.0 * trace.completion_tokens[0] / 1e6)
    here = plan_run(request(config=settings_of(), is_own=True))
    assert 0 < stage.gpu_seconds[0] < 0.2 * next(s for s in here.stages if s.name == "reasoning").gpu_seconds[0]


def test_on_ray_the_words_of_traces_stay_out_of_the_drivers_memory() -> None:
    plain, ray = plan_run(request()), plan_run(request(machines=Machines(32, num_processes=16)))
    assert plain.storage.traces_memory[0] > 10**9 and ray.storage.traces_memory[0] == 0
    assert ray.storage.compared_memory[0] < plain.storage.compared_memory[0]


def test_memory_for_comparing_rows_is_what_was_measured() -> None:
    # README: 4.8 GiB at 16.4 million rows, of which 0.6 are there before.
    plan = plan_run(request(16_400_000))
    assert float(plan.storage.compared_memory[0]) / 2**30 == pytest.approx(4.2, rel=0.05)


def test_ranges_grow_with_what_is_uncertain() -> None:
    sure = Assumptions().known("the test", **{each.name: each.expected for each in Assumptions()})
    certain = plan_run(request(assumptions=sure))
    assert np.ptp(certain.wall_seconds) < 1e-6 * certain.wall_seconds[0]
    unsure = Range.of(plan_run(request(assumptions=Assumptions())).wall_seconds)
    assert unsure.low < float(certain.wall_seconds[0]) < unsure.high
