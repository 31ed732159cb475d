"""A server that jobs share equally, held to closed forms of queueing theory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.shared_server import SharedServer

Jobs = Sequence[tuple[float, float]]
"""Each with the time at which it comes, and its work."""


def served(jobs: Jobs, *, capacity: float, cap: float) -> tuple[list[float], SharedServer]:
    """Returns when each job has ended."""
    env = simpy.Environment()
    server = SharedServer(env, capacity, cap)
    ends = [0.0] * len(jobs)

    def job(place: int, comes: float, work: float):  # type: ignore[no-untyped-def]
        yield env.timeout(comes)
        yield server.serve(work)
        ends[place] = env.now

    for place, (comes, work) in enumerate(jobs):
        env.process(job(place, comes, work))
    env.run()
    server.settle()
    return ends, server


def test_one_job_has_no_more_than_its_cap() -> None:
    assert served([(0, 6)], capacity=10, cap=2)[0] == [3]
    assert served([(0, 6)], capacity=1, cap=2)[0] == [6]


def test_jobs_share_equally_and_who_stays_gets_more() -> None:
    # Two share 2: the first ends at 2 with its 2; the other has had 2 of 6 and then does 2 a second, not 1.
    assert served([(0, 2), (0, 6)], capacity=2, cap=2)[0] == pytest.approx([2, 4])


def test_a_job_that_comes_later_slows_those_at_work() -> None:
    # Alone for 1 s it has 1 of its 3; then both run at a half.
    assert served([(0, 3), (1, 1)], capacity=1, cap=1)[0] == pytest.approx([4, 3])


def test_nothing_to_do_is_done_at_once() -> None:
    ends, server = served([(2, 0.0)], capacity=1, cap=1)
    assert ends == [2] and server.work_done == 0


def test_a_server_that_loses_its_capacity_stands_still_until_it_has_some_again() -> None:
    env = simpy.Environment()
    server = SharedServer(env, 1.0, 1.0)
    done = server.serve(3.0)

    def outage():  # type: ignore[no-untyped-def]
        yield env.timeout(1)
        server.change_capacity(-1.0)
        yield env.timeout(10)
        server.change_capacity(1.0)

    env.process(outage())
    env.run(until=done)
    server.settle()
    assert env.now == pytest.approx(13) and server.work_done == pytest.approx(3)
    assert server.offered == pytest.approx(3)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 50)), min_size=1, max_size=30),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
)
def test_no_work_is_lost_and_none_done_faster_than_can_be(jobs: Jobs, capacity: float, cap: float) -> None:
    ends, server = served(jobs, capacity=capacity, cap=cap)
    total = sum(work for _, work in jobs)
    assert server.work_done == pytest.approx(total, rel=1e-6)
    assert server.work_done <= server.offered * (1 + 1e-9)
    fastest = min(cap, capacity)
    for (comes, work), end in zip(jobs, ends, strict=True):
        assert end >= comes + work / fastest - 1e-6
    # Never idle while there is work: it ends before all of it would one after the other.
    assert max(ends) <= max(comes for comes, _ in jobs) + total / fastest + 1e-6


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=30), st.floats(0.1, 10))
def test_of_jobs_that_come_together_the_smaller_ends_first(works: list[float], capacity: float) -> None:
    ends, _ = served([(0.0, work) for work in works], capacity=capacity, cap=capacity)
    ordered = sorted(zip(works, ends, strict=True))
    assert all(first[1] <= second[1] + 1e-6 for first, second in pairwise(ordered))
    assert max(ends) == pytest.approx(sum(works) / capacity, rel=1e-6)


@pytest.mark.parametrize("load", [0.3, 0.6])
@pytest.mark.parametrize("spread", ["constant", "exponential"])
def test_mean_time_is_that_of_processor_sharing_whatever_the_spread_of_work(load: float, spread: str) -> None:
    # M/G/1-PS: E[S] / (1 - rho), insensitive to the distribution of work (Kleinrock, Queueing Systems II, 4.4).
    rng = np.random.default_rng(7)
    number = 10_000
    comes = np.cumsum(rng.exponential(1 / load, number))
    works = np.ones(number) if spread == "constant" else rng.exponential(1.0, number)
    ends, _ = served(list(zip(comes.tolist(), works.tolist(), strict=True)), capacity=1.0, cap=1.0)
    assert float(np.mean(np.array(ends) - comes)) == pytest.approx(1 / (1 - load), rel=0.08)
