"""Shares of the clock, the pace of a stage, and what a shard costs and pays, asked of a real server with faults."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.accounting import (
    Accounts,
    AskedUsage,
    Load,
    Pace,
    SharedClock,
    duration,
    merged_costs,
    paid_line,
    progress_line,
)
from flows.run_config import load_run
from flows.runtime import Asker, Runtime
from schemas.requests import CallFailure, Message, Sampling, TeacherRequest
from schemas.usage import Cost, Usage, UsageKey, total_usage
from teacher.client import Teacher
from teacher.fault_server import Fault, FaultSchedule, FaultServer
from teacher.journal import Journal
from tests.flows.scripted_world import write_config


class Hands:
    """A clock whose hands are moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_calls_that_are_under_way_together_share_the_clock() -> None:
    hands = Hands()
    clock = SharedClock(hands)
    hands.now = 5.0
    with clock.shared(1) as long:
        hands.now = 7.0  # alone for 2 s
        with clock.shared(3) as short:
            hands.now = 11.0  # 4 s, of which a quarter and three quarters
        hands.now = 12.0  # alone again for 1 s
    assert (long.seconds, short.seconds) == (2 + 1 + 1, 3)
    hands.now = 100.0
    with clock.shared(1) as later:
        hands.now = 101.0
    assert later.seconds == 1.0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8), st.floats(0, 100)), max_size=30))
def test_shares_sum_to_the_time_with_anything_under_way(steps: list[tuple[bool, int, float]]) -> None:
    hands, busy, shares = Hands(), 0.0, []
    clock = SharedClock(hands)
    open_: list[ExitStack] = []
    for begins, num_sequences, seconds in steps:
        if begins:
            open_.append(ExitStack())
            shares.append(open_[-1].enter_context(clock.shared(num_sequences)))
        elif open_:
            open_.pop(num_sequences % len(open_)).close()
        hands.now += seconds
        busy += seconds if open_ else 0.0
    for stack in open_:
        stack.close()
    assert sum(share.seconds for share in shares) == pytest.approx(busy, abs=1e-6)


def test_the_pace_is_that_of_the_last_minute() -> None:
    pace = Pace(10_000, 0.0)
    for second in range(1, 601):
        rows = 2 * min(second, 500) + 10 * max(0, second - 500)
        pace.look(float(second), num_done=1000 + rows, num_skipped=1000, num_tokens=50 * second)
    # 2 rows/s for 500 s and then 10; the thousand rows found done are left out of the rate, not of what is done.
    assert pace.rows_per_second == 10.0
    assert pace.tokens_per_second == 50.0
    assert pace.seconds_left == (10_000 - 1000 - 2000) / 10.0


def test_a_stage_that_stands_still_has_no_time_left_to_tell() -> None:
    pace = Pace(10, 0.0)
    assert pace.seconds_left is None
    pace.look(1.0, num_done=5, num_skipped=0, num_tokens=0)
    assert pace.seconds_left == 1.0
    pace.look(100.0, num_done=5, num_skipped=0, num_tokens=0)
    pace.look(200.0, num_done=5, num_skipped=0, num_tokens=0)
    assert pace.seconds_left is None
    pace.look(201.0, num_done=10, num_skipped=0, num_tokens=0)
    assert pace.seconds_left == 0.0


def test_the_live_line_names_calls_only_where_some_are_made() -> None:
    pace = Pace(100, 0.0)
    pace.look(10.0, num_done=20, num_skipped=0, num_tokens=5000)
    assert progress_line(pace, 20, Load()) == "20 of 100 rows, 2.0 rows/s, 40 s left"
    load = Load(Usage(10, 30, num_reused=4, num_retries=2, num_failures=1), 12, 7)
    assert progress_line(pace, 20, load) == (
        "20 of 100 rows, 2.0 rows/s, 40 s left; 500 tokens/s, 12 in flight, 7 waiting; 30 replies, 4 reused, "
        "2 retries, 1 failures"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (425, "7 min 05 s"), (12_000, "3 h 20 min")]
)
def test_durations_are_told_in_two_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_rerun_says_that_it_paid_nothing() -> None:
    assert paid_line(Usage()) == "paid nothing: nothing was asked"
    assert paid_line(Usage(num_reused=60)) == "paid nothing: all 60 replies asked for were stored"
    line = paid_line(Usage(2, 16, 3, 1, 1, 500, 40, 10, wall_seconds=2.0), Cost(0.5, is_whole=False))
    assert line == (
        "paid 2 calls (1 retries, 1 failures) for 16 replies and reused 3: 500 prompt tokens (10 cached) and "
        "40 completion tokens in 2 s, which cost at least 0.5000"
    )


def test_what_was_paid_counts_also_where_the_work_failed() -> None:
    accounts, key = Accounts(), UsageKey("s", "p", "a", "m")
    with accounts.counted(lambda: {key: Usage(1)}):
        assert accounts.paid() == {key: Usage(1)}
    with pytest.raises(ValueError, match="broken"), accounts.counted(lambda: {key: Usage(2)}):
        raise ValueError("broken")
    assert accounts.paid() == {key: Usage(3)}


def test_gpu_time_is_known_of_the_replies_that_were_paid_now() -> None:
    stored = {("row", "p"): Usage(num_calls=5, num_replies=5)}
    asked = AskedUsage("m", stored, {"p": Usage(num_calls=4, num_failures=1, gpu_seconds=12.0, num_gpu_calls=4)})
    [usage] = merged_costs([asked], "s", "a").values()
    assert (usage.gpu_seconds, usage.num_gpu_calls, usage.is_gpu_time_whole) == (12.0, 3, False)
    without = replace(asked, paid={"p": Usage(num_calls=5)})
    assert merged_costs([without], "s", "a") == {UsageKey("s", "p", "a", "m"): Usage(num_calls=5, num_replies=5)}


QUESTION = TeacherRequest("row", "performance", (Message("user", "2 + 2?"),), Sampling(1.0), seed=7)
OTHER = TeacherRequest("other", "difficulty", (Message("user", "3 + 3?"),), Sampling(), seed=9)


class Shard:
    """A shard whose questions are asked of a server, again and again with the same journal."""

    def __init__(self, folder: Path, url: str) -> None:
        teacher = {"model": "teacher", "url": url, "max_retries": 3, "unreachable_seconds": 3}
        self._config = load_run(str(write_config(folder, folder / "none.jsonl", url, teacher=teacher)))
        self._journal = folder / "journal"

    def runtime(self, *, num_gpus: int | None = None) -> Runtime:
        runtime = Runtime(self._config)
        runtime.num_gpus = lambda endpoint: num_gpus  # type: ignore[method-assign]
        return runtime

    def ask(self, *waves: list[TeacherRequest], num_gpus: int | None = None) -> tuple[AskedUsage, list[Any]]:
        """Asks waves of samples, one after the other; returns what that cost and the outcomes."""
        runtime = self.runtime(num_gpus=num_gpus)
        try:
            return self.ask_of(runtime, waves)
        finally:
            runtime.close()

    def ask_of(self, runtime: Runtime, waves: Sequence[list[TeacherRequest]]) -> tuple[AskedUsage, list[Any]]:
        async def ask_all() -> tuple[AskedUsage, list[Any]]:
            outcomes: list[Any] = []
            with Journal(self._journal) as journal:
                group = runtime.group(self._config.teacher)
                teacher = Teacher(self._config.teacher, journal, runtime.images.resized_bytes, group=group)
                async with teacher:
                    asker = Asker(teacher, runtime)
                    for wave in waves:
                        outcomes += await asker.ask_samples(wave)
                    asker.count_stored()
                    return asker.usage, outcomes

        return runtime.run(ask_all())


def test_the_load_counts_sequences_in_flight(tmp_path: Path) -> None:
    may_answer = threading.Event()

    def answer(body: dict[str, Any], choice: int) -> str:
        may_answer.wait(60)
        return "4"

    with FaultServer(answer) as server, ThreadPoolExecutor() as threads:
        shard = Shard(tmp_path, server.url)
        runtime = shard.runtime()
        assert runtime.load("performance") == Load()
        asked = threads.submit(shard.ask_of, runtime, [samples(*range(8))])
        try:
            while (load := runtime.load("performance")).num_in_flight == 0:
                assert not asked.done(), asked.result()
        finally:
            may_answer.set()
        assert (load.num_in_flight, load.num_waiting) == (8, 0)
        asked.result()
        assert runtime.load("performance").num_in_flight == 0
        runtime.close()


def samples(*indices: int) -> list[TeacherRequest]:
    return [QUESTION.sample(index) for index in indices]


def test_eight_samples_of_one_call_are_one_call_and_eight_replies(tmp_path: Path) -> None:
    with FaultServer() as server:
        usage, _ = Shard(tmp_path, server.url).ask(samples(*range(8)), [OTHER], num_gpus=2)
    cost, paid = usage.costs["row", "performance"], usage.paid["performance"]
    assert (cost.num_calls, cost.num_replies, cost.prompt_tokens) == (1, 8, 3)
    assert (paid.num_calls, paid.num_replies, paid.num_gpu_calls) == (1, 8, 1)
    assert paid.gpu_seconds == pytest.approx(2 * paid.wall_seconds, rel=0.5)
    assert usage.costs["other", "difficulty"].num_replies == 1


def test_a_rerun_pays_nothing_and_costs_the_same(tmp_path: Path) -> None:
    with FaultServer() as server:
        shard = Shard(tmp_path, server.url)
        first, _ = shard.ask(samples(0, 1), samples(2, 3), [OTHER])
        again, _ = shard.ask(samples(0, 1), samples(2, 3), [OTHER])
        assert server.num_calls == 3
    assert again.costs == first.costs
    total = total_usage(again.paid.values())
    assert (total.num_calls, total.num_reused, total.prompt_tokens, total.num_gpu_calls) == (0, 5, 0, 0)


def test_samples_that_nobody_needs_any_more_still_count_as_cost(tmp_path: Path) -> None:
    """A killed run drew eight at once; the next one takes them one by one and stops at the first."""
    with FaultServer() as server:
        shard = Shard(tmp_path, server.url)
        killed, _ = shard.ask(samples(*range(8)))
        resumed, _ = shard.ask(samples(0))
    assert resumed.costs == killed.costs
    assert total_usage(resumed.paid.values()).num_reused == 1


def test_one_reply_asked_for_twice_counts_once(tmp_path: Path) -> None:
    twin = replace(QUESTION, sample_id="twin")
    with FaultServer() as server:
        usage, _ = Shard(tmp_path, server.url).ask([QUESTION], [twin], [QUESTION])
    assert total_usage(usage.costs.values()).num_replies == 1
    assert usage.paid["performance"].num_reused == 2


def test_retries_and_failures_are_counted(tmp_path: Path) -> None:
    """Every request fails twice; one of the two questions is refused for good."""
    faults = FaultSchedule(
        first=(Fault.SERVER_ERROR, Fault.CUT_JSON),
        persistent=lambda body: Fault.TOO_LARGE if "3 + 3" in str(body["messages"]) else None,
    )
    with FaultServer(faults=faults) as server:
        usage, outcomes = Shard(tmp_path, server.url).ask([QUESTION], [OTHER])
    assert [isinstance(outcome, CallFailure) for outcome in outcomes] == [False, True]
    assert usage.paid["performance"].num_retries == usage.costs["row", "performance"].num_retries == 2
    assert (usage.paid["difficulty"].num_calls, usage.paid["difficulty"].num_failures) == (1, 1)
    assert ("other", "difficulty") not in usage.costs
    assert math.isclose(usage.paid["difficulty"].seconds, 0.0)
