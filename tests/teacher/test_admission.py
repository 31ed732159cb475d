"""The window of an endpoint, against engines of arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.admission import FIRST_WINDOW, MIN_QUEUE, OVERLOAD_SECONDS, Window
from teacher.engine_load import EngineLoad, parse_load

MOST = 4096


def followed(window: Window, capacity: int, num_looks: int, *, demand: int = 10**6) -> list[EngineLoad]:
    """Returns what an engine of so many places says while the window follows it."""
    loads = []
    for _ in range(num_looks):
        in_flight = min(window.limit, demand)
        load = EngineLoad(min(in_flight, capacity), max(0, in_flight - capacity))
        window.on_load(load, in_flight)
        loads.append(load)
    return loads


@pytest.mark.parametrize("capacity", [1, 8, 50, 256, 1000])
def test_an_engine_that_tells_its_load_gets_a_small_queue_and_is_never_idle_again(capacity: int) -> None:
    window = Window(MOST)
    settled = followed(window, capacity, 200)[20:]
    wanted = max(MIN_QUEUE, -(-capacity // 10))
    assert all(load.num_running == capacity for load in settled)
    assert all(1 <= load.num_waiting <= 2 * wanted for load in settled)


def test_an_engine_of_a_thousand_places_is_full_after_eight_looks() -> None:
    loads = followed(Window(MOST), 1000, 9)
    assert [load.num_running for load in loads[:3]] == [16, 32, 64] and loads[-1].num_running == 1000


def test_a_window_that_is_not_used_does_not_grow() -> None:
    window = Window(MOST)
    followed(window, 1000, 50, demand=10)
    assert window.limit == FIRST_WINDOW


def test_a_preemption_shrinks_the_window_by_a_fifth() -> None:
    window = Window(MOST, size=100)
    window.on_load(EngineLoad(100, 0, num_preemptions=7), 100)
    before = window.limit
    window.on_load(EngineLoad(before, 0, num_preemptions=8), before)
    assert window.limit == int(0.8 * before) and not window.is_doubling


def test_a_full_cache_stops_growth() -> None:
    window = Window(MOST, size=100)
    window.on_load(EngineLoad(100, 0, cache_usage=0.96), 100)
    assert window.limit == 100 and not window.is_doubling


def test_what_the_server_has_not_passed_on_to_its_engine_waits_as_well() -> None:
    window = Window(MOST, size=200)
    window.on_load(EngineLoad(20, 0), 200)
    assert window.limit == 200


def test_refusals_that_come_together_halve_the_window_once() -> None:
    window = Window(MOST, size=64)
    for _ in range(10):
        window.on_overload(now=5.0)
    assert window.limit == 32
    window.on_overload(now=5.0 + OVERLOAD_SECONDS)
    assert window.limit == 16


def test_a_restarted_endpoint_begins_small() -> None:
    window = Window(MOST, size=1000, is_doubling=False)
    window.on_restart()
    assert window.limit == FIRST_WINDOW and window.is_doubling


def finished(window: Window, most_per_second: float, num_seconds: int, *, latency: float = 0.2) -> float:
    """Lets a silent engine work: each second it ends what the window allows, at most so many; returns the last rate."""
    now, rate = 0.0, 0.0
    for _ in range(num_seconds):
        rate = min(window.limit / latency, most_per_second)
        for part in range(10):
            window.on_finished(round(rate / 10), now + part / 10, is_full=True)
        now += 1.0
    return rate


@pytest.mark.parametrize("most_per_second", [100.0, 1000.0, 5000.0])
def test_an_endpoint_that_tells_nothing_is_driven_to_its_best_rate_and_not_far_beyond(most_per_second: float) -> None:
    window = Window(MOST)
    assert finished(window, most_per_second, 300) >= 0.9 * most_per_second
    assert window.limit <= max(2 * FIRST_WINDOW, 4 * most_per_second * 0.2)


def test_without_demand_a_rate_says_nothing() -> None:
    window = Window(MOST)
    for second in range(100):
        window.on_finished(20, float(second), is_full=False)
    assert window.limit == FIRST_WINDOW


LOADS = st.builds(
    EngineLoad,
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.floats(0, 1),
    st.integers(0, 50),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("load"), LOADS, st.integers(0, 5000)),
        st.tuples(st.just("overload"), st.floats(0, 10), st.none()),
        st.tuples(st.just("finished"), st.integers(0, 5000), st.booleans()),
        st.tuples(st.just("restart"), st.none(), st.none()),
    ),
    max_size=60,
)


@given(st.integers(1, MOST), EVENTS)
def test_whatever_happens_one_call_is_let_through_and_never_more_than_the_most(most: int, events: list[tuple]) -> None:  # type: ignore[type-arg]
    window, now = Window(most), 0.0
    for kind, first, second in events:
        before, now = window.limit, now + 0.5
        if kind == "load":
            window.on_load(first, second)
        elif kind == "overload":
            window.on_overload(now + first)
            assert window.limit <= before
        elif kind == "finished":
            window.on_finished(first, now, is_full=second)
        else:
            window.on_restart()
            assert window.limit <= max(before, FIRST_WINDOW)
        assert 1 <= window.limit <= most


VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
process_start_time_seconds 1.7e+09
"""


def test_the_load_of_all_engines_of_a_server_is_added() -> None:
    assert parse_load(VLLM) == EngineLoad(15, 2, 0.5, 4, 1.7e9, num_engines=2)


@pytest.mark.parametrize("text", [b"", b"<html>", b"up 1\n", b"vllm:num_requests_running{} 1\n", b"\xff\x00" * 9])
def test_other_metrics_are_no_load(text: bytes) -> None:
    assert parse_load(text) is None


@given(st.binary(max_size=200))
def test_no_text_breaks_the_reading_of_a_load(noise: bytes) -> None:
    parse_load(noise)
    parse_load(VLLM.replace(b"12.0", noise.replace(b"\n", b"")))


def test_numbers_that_are_none_count_nothing() -> None:
    load = parse_load(VLLM.replace(b"12.0", b"NaN").replace(b" 2.0", b" +Inf").replace(b" 4.0", b" -1"))
    assert load is not None and (load.num_running, load.num_waiting, load.num_preemptions) == (3, 0, 0)
