"""What breaks first, and at which number."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.planning.assumptions import Assumptions
from flows.planning.gpus import gpu_kind
from flows.planning.limits import Limit, limits
from flows.planning.plan import Plan, plan_run, plan_with_settings
from flows.planning.request import DEFAULT_CONFIG, Machines, Request


def planned(num_rows: int, num_gpus: int, *, per_process: int = 32, processes: int = 1, model: str = "") -> Plan:
    """Returns a plan with shards of 5,000 rows, so many of them at once."""
    teacher = DEFAULT_CONFIG.teacher.model_copy(update={"model": model or DEFAULT_CONFIG.teacher.model})
    config = DEFAULT_CONFIG.model_copy(update={"shard_rows": 5000, "teacher": teacher})
    machines = replace(Machines.beside(num_gpus), num_processes=processes)
    request = Request(num_rows, num_gpus, gpu_kind("H100"), machines, config, assumptions=Assumptions().expected())
    return plan_with_settings(request, per_process)


def named(plan: Plan) -> dict[str, Limit]:
    return {limit.name: limit for limit in limits(plan)}


def test_the_tightest_comes_first() -> None:
    loads = [limit.load for limit in limits(planned(16_400_000, 8))]
    assert loads == sorted(loads, reverse=True)


@given(st.integers(10**6, 10**9))
@settings(max_examples=20)
def test_at_the_rows_that_a_limit_names_it_is_reached(num_rows: int) -> None:
    for name, limit in named(planned(num_rows, 8)).items():
        if limit.grows_with == "rows":
            assert named(planned(round(limit.at), 8))[name].load == pytest.approx(1.0, rel=0.01)


@given(st.integers(1, 8))
@settings(max_examples=8)
def test_rates_grow_in_step_with_the_gpus_as_long_as_these_set_the_pace(num_hosts: int) -> None:
    one, many = named(planned(10**8, 8)), named(planned(10**8, 8 * num_hosts, per_process=64))
    for name in ("client process", "network of the client"):
        assert many[name].load == pytest.approx(num_hosts * one[name].load, rel=0.1)
        assert many[name].at == pytest.approx(one[name].at, rel=0.1)


def test_at_sixteen_million_rows_nothing_breaks_and_at_a_billion_the_drivers_memory_does() -> None:
    assert all(limit.load < 1 for limit in limits(plan_run(planned(16_400_000, 8).request)))
    found = named(planned(10**9, 64))
    assert found["memory for comparing traces"].load > 5
    assert "`ray` section" in found["memory for comparing traces"].then
    assert "memory for comparing traces" not in named(planned(10**9, 64, per_process=2, processes=64))


def test_shards_under_way_that_are_too_few_are_named_with_the_settings_that_help() -> None:
    plan = planned(16_400_000, 64, per_process=2)
    own = replace(plan.request, is_own=True)
    found = named(plan_with_settings(own, 2))["rows under way"]
    assert found.load > 1 and found.at < 64
    assert "shard_rows: " in found.then and found.then.split(", ")[1] != "parallel_shards: 2"


def test_smaller_models_meet_the_preparation_of_images_first() -> None:
    large, small = planned(10**7, 8), planned(10**7, 8, model="Qwen/Qwen2.5-VL-3B-Instruct")
    name = "vLLM's image preparation"
    assert named(small)[name].load > 3 * named(large)[name].load
    assert named(large)[name].at == pytest.approx(1 / named(large)[name].load)


def test_a_plan_that_asks_nobody_here_has_no_rates() -> None:
    plan = planned(10**6, 8)
    request = replace(plan.request, elsewhere=frozenset([DEFAULT_CONFIG.teacher.model]))
    assert all(limit.grows_with == "rows" for limit in limits(plan_with_settings(request, 8)))
