from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.performance import performance_decision
from judges.sampling_plan import (
    FIRST_ROWS,
    REASONING_SHARE,
    CallCosts,
    LearnedPlan,
    SamplingPlans,
    best_waves,
    expected_cost,
    prior_survival,
)
from schemas.config import PerformanceConfig
from schemas.requests import CallFailure, Reply
from schemas.verdicts import Decision, Failure, Verdict, correct, unscored, wrong

CONFIG = PerformanceConfig()
CUT = unscored(Failure.TRUNCATED)
ALL_RIGHT = (1.0, *[0.0] * 8)
ALL_WRONG = (1.0,) * 9


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to split so many samples into waves."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield (first, *rest)


def followed(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the waves of a row whose answers are all wrong, given the best size after each number of answers."""
    waves: list[int] = []
    while sum(waves) < len(sizes):
        waves.append(sizes[sum(waves)])
    return tuple(waves)


def reply(*, prompt: int = 500, cached: int = 0, completion: int = 500, choice: int = 0) -> Reply:
    return Reply(
        "x", "stop", "m", prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, choice=choice
    )


@st.composite
def survivals(draw: st.DrawFn) -> tuple[float, ...]:
    shares = [1.0]
    for kept in draw(st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8)):
        shares.append(shares[-1] * kept)
    return tuple(shares)


costs = st.builds(CallCosts, *[st.floats(0.0, 1000.0)] * 3)


def test_there_are_128_ways_to_split_eight_samples() -> None:
    assert len(set(compositions(8))) == 128


@given(survivals(), costs)
def test_no_way_to_split_the_samples_is_cheaper_than_the_plan(survival: tuple[float, ...], costs: CallCosts) -> None:
    planned = expected_cost(followed(best_waves(survival, costs)), survival, costs)
    cheapest = min(expected_cost(waves, survival, costs) for waves in compositions(8))
    assert planned == pytest.approx(cheapest, rel=1e-9)


def test_the_expected_cost_of_waves_is_what_a_hand_computes() -> None:
    # Half the rows are right at once, a quarter of all at the second sample: 100 + 10 for all, 20 + 30 for a half.
    survival = (1.0, 0.5, 0.25, 0.25, 0.25)
    assert expected_cost((1, 3), survival, CallCosts(100.0, 20.0, 10.0)) == pytest.approx(110 + 0.5 * 50)


def test_where_all_answers_are_right_one_is_asked_for() -> None:
    assert best_waves(ALL_RIGHT, CallCosts(125.0, 50.0, 500.0))[0] == 1


def test_where_all_answers_are_wrong_all_samples_are_asked_for_at_once() -> None:
    assert best_waves(ALL_WRONG, CallCosts(125.0, 50.0, 500.0)) == (8, 7, 6, 5, 4, 3, 2, 1)


def test_where_prompts_cost_nothing_samples_are_asked_for_one_by_one() -> None:
    survival = tuple(0.9**k for k in range(9))
    assert followed(best_waves(survival, CallCosts(0.0, 0.0, 500.0))) == (1,) * 8


def test_a_dearer_prompt_never_makes_more_calls() -> None:
    survival = tuple(prior_survival(k) for k in range(9))
    plans = [followed(best_waves(survival, CallCosts(price, price, 500.0))) for price in (0, 50, 100, 200, 500, 5000)]
    lengths = [len(waves) for waves in plans]
    assert lengths == sorted(lengths, reverse=True)
    assert plans[0] == (1,) * 8 and plans[-1] == (8,)


def test_a_prompt_that_is_cached_after_the_first_call_makes_more_calls() -> None:
    survival = tuple(prior_survival(k) for k in range(9))
    again = followed(best_waves(survival, CallCosts(500.0, 500.0, 500.0)))
    cached = followed(best_waves(survival, CallCosts(500.0, 20.0, 500.0)))
    assert len(cached) > len(again)


def test_of_equally_good_plans_the_one_with_the_fewest_calls_is_taken() -> None:
    assert best_waves(ALL_WRONG, CallCosts(0.0, 0.0, 1.0))[0] == 8


def test_the_prior_ends_at_the_papers_share_of_reasoning_rows() -> None:
    assert prior_survival(0) == 1.0
    assert prior_survival(8) == pytest.approx(REASONING_SHARE)
    assert LearnedPlan(CONFIG).survival == pytest.approx([prior_survival(k) for k in range(9)])


def test_half_a_thousand_tokens_are_expected_before_the_first_reply() -> None:
    assert LearnedPlan(CONFIG).costs == CallCosts(500 * 0.25, 500 * 0.1, 500.0)


def rows_of(pass_rates: Sequence[float], num_rows: int) -> Iterator[list[Verdict]]:
    """Yields eight verdicts of each of some rows, whose pass rates are drawn from a list."""
    rng = random.Random(3)
    for _ in range(num_rows):
        rate = rng.choice(pass_rates)
        yield [correct() if rng.random() < rate else wrong() for _ in range(8)]


@pytest.mark.parametrize("pass_rates", [[0.0], [1.0], [0.5], [0.0, 0.0, 0.9], [0.02]])
def test_a_plan_learns_how_often_a_source_fails(pass_rates: list[float]) -> None:
    plan = LearnedPlan(CONFIG)
    for verdicts in rows_of(pass_rates, 2000):
        plan.observe_verdicts(verdicts, 0)
    truth = [sum((1 - rate) ** k for rate in pass_rates) / len(pass_rates) for k in range(9)]
    assert plan.survival == pytest.approx(truth, abs=0.03)


def test_rows_that_are_still_being_sampled_do_not_bias_what_is_learned() -> None:
    # Each row got one answer; the wrong ones, half of all, are sampled no further yet.
    plan = LearnedPlan(CONFIG)
    for number in range(4000):
        plan.observe_verdicts([correct() if number % 2 else wrong()], 0)
    assert plan.survival[1] == pytest.approx(0.5, abs=0.01)
    # What follows the second failure is still the prior, not "all are right in the end".
    assert plan.survival[8] / plan.survival[1] == pytest.approx(prior_survival(8) / prior_survival(1), abs=0.01)


@given(
    st.lists(st.sampled_from([correct(), wrong(), CUT]), min_size=16, max_size=16),
    st.lists(st.integers(1, 16), min_size=1, max_size=16),
)
def test_what_is_learned_from_a_row_does_not_depend_on_its_waves(answers: list[Verdict], sizes: list[int]) -> None:
    by_waves, at_once = LearnedPlan(CONFIG), LearnedPlan(CONFIG)
    num_known = 0
    for size in [*sizes, 16]:
        by_waves.observe_verdicts(answers[: num_known + size], num_known)
        num_known = min(16, num_known + size)
    at_once.observe_verdicts(answers, 0)
    assert by_waves.survival == at_once.survival


def test_an_unscored_answer_teaches_nothing() -> None:
    plan = LearnedPlan(CONFIG)
    before = plan.survival
    plan.observe_verdicts([CUT, CUT], 0)
    assert plan.survival == before


def test_costs_are_learned_from_the_replies() -> None:
    plan = LearnedPlan(CONFIG)
    for _ in range(999):
        plan.observe_reply(reply(prompt=1000, completion=40), 0)
        plan.observe_reply(reply(prompt=1000, cached=1000, completion=60), 1)
        plan.observe_reply(reply(prompt=1000, cached=1000, completion=50, choice=1), 2)
    costs = plan.costs
    assert costs.first_prompt == pytest.approx(250.0, rel=0.01)
    assert costs.later_prompt == pytest.approx(100.0, rel=0.01)
    assert costs.sample == pytest.approx(50.0, rel=0.01)


def test_a_later_prompt_is_taken_to_be_cached_until_it_is_seen_not_to_be() -> None:
    plan = LearnedPlan(CONFIG)
    for _ in range(99):
        plan.observe_reply(reply(prompt=1000), 0)
    assert plan.costs.later_prompt == pytest.approx(100.0, rel=0.01)
    for _ in range(99):
        plan.observe_reply(reply(prompt=1000), 1)
    assert plan.costs.later_prompt == pytest.approx(250.0, rel=0.02)


def test_a_server_that_counts_no_tokens_gets_a_plan_too() -> None:
    plan = LearnedPlan(CONFIG)
    for index in range(10**4):
        plan.observe_reply(reply(prompt=0, completion=0), index)
    assert 1 <= plan.next_wave(0) <= 8


def test_the_choices_of_one_call_pay_for_one_prompt() -> None:
    one, eight = LearnedPlan(CONFIG), LearnedPlan(CONFIG)
    one.observe_reply(reply(prompt=900), 0)
    for choice in range(8):
        eight.observe_reply(reply(prompt=900, choice=choice), choice)
    assert eight.costs.first_prompt == one.costs.first_prompt


def first_waves(plans: SamplingPlans, source: str) -> list[int]:
    """Returns the sizes of the waves of a row whose answers are all wrong."""
    verdicts: list[Verdict] = []
    sizes = []
    while indices := plans.next_indices(source, verdicts, is_audit=False):
        assert indices.start == len(verdicts)
        sizes.append(len(indices))
        verdicts += [wrong()] * len(indices)
    return sizes


def test_each_source_has_a_plan_of_its_own() -> None:
    plans = SamplingPlans(CONFIG)
    for _ in range(2000):
        plans.observe("easy", [correct()], [reply()])
        plans.observe("hard", [wrong()] * 8, [reply(choice=choice) for choice in range(8)])
    assert first_waves(plans, "easy")[0] == 1
    assert first_waves(plans, "hard") == [8]
    assert first_waves(plans, "new") == first_waves(SamplingPlans(CONFIG), "new")


def test_audited_rows_and_exhaustive_sampling_ask_for_all_samples_at_once() -> None:
    assert SamplingPlans(CONFIG).next_indices("s", [], is_audit=True) == range(8)
    exhaustive = SamplingPlans(PerformanceConfig(exhaustive=True))
    assert exhaustive.next_indices("s", [], is_audit=False) == range(8)
    assert exhaustive.next_indices("s", [CUT, *[wrong()] * 7], is_audit=False) == range(8, 9)


def test_a_list_of_waves_is_followed() -> None:
    assert first_waves(SamplingPlans(PerformanceConfig(waves=[1, 1, 2, 4])), "s") == [1, 1, 2, 4]
    assert first_waves(SamplingPlans(PerformanceConfig(waves=[3, 100])), "s") == [3, 5]


def test_after_the_listed_waves_unscored_answers_are_replaced_at_once() -> None:
    for waves in ([4, 4], [5, 5], [100]):
        plans = SamplingPlans(PerformanceConfig(waves=waves))
        assert plans.next_indices("s", [*[CUT] * 4, *[wrong()] * 4], is_audit=False) == range(8, 12)


def test_failures_teach_no_costs() -> None:
    plans = SamplingPlans(CONFIG)
    before = plans.of("s").costs
    failure = CallFailure("teacher_timeout", "no answer")
    plans.observe("s", [unscored(Failure.NO_REPLY)], [failure])
    assert plans.of("s").costs == before


async def begun_by_round(plan: LearnedPlan, num_rows: int, *, is_first: bool = True) -> list[int]:
    """Returns how many of some rows have begun after each round in which all waves under way come back."""
    num_begun = 0
    back = asyncio.Event()

    async def row() -> None:
        nonlocal num_begun
        async with plan.turn(is_first=is_first):
            num_begun += 1
            await back.wait()

    tasks = [asyncio.create_task(row()) for _ in range(num_rows)]
    rounds = []
    while num_begun < num_rows:
        for _ in range(10):
            await asyncio.sleep(0)
        rounds.append(num_begun)
        back.set()
        back = asyncio.Event()
    await asyncio.gather(*tasks)
    return rounds


async def test_few_rows_begin_before_anything_is_learned_and_twice_as_many_each_round() -> None:
    assert FIRST_ROWS == 32
    assert await begun_by_round(LearnedPlan(CONFIG), 500) == [32, 64, 128, 256, 500]


async def test_the_further_waves_of_a_row_never_wait() -> None:
    assert await begun_by_round(LearnedPlan(CONFIG), 500, is_first=False) == [500]


async def test_a_wave_that_fails_or_is_cancelled_gives_its_turn_back() -> None:
    plan = LearnedPlan(CONFIG)
    for _ in range(2 * FIRST_ROWS):
        with pytest.raises(ConnectionError):
            async with plan.turn(is_first=True):
                raise ConnectionError
    hanging = [asyncio.create_task(_hang(plan)) for _ in range(2 * FIRST_ROWS)]
    await asyncio.sleep(0)
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    assert await begun_by_round(plan, 64) == [32, 64]


async def _hang(plan: LearnedPlan) -> None:
    async with plan.turn(is_first=True):
        await asyncio.Event().wait()


@given(st.permutations(range(24)), st.integers(0, 2**16))
def test_the_order_of_the_rows_changes_no_decision(order: list[int], seed: int) -> None:
    rng = random.Random(seed)
    outcomes = [correct(), wrong(), wrong(), CUT]
    rows = [[rng.choice(outcomes) for _ in range(16)] for _ in range(24)]

    def decisions(order: Sequence[int]) -> dict[int, Decision | None]:
        plans = SamplingPlans(CONFIG)
        decided: dict[int, Decision | None] = {}
        for number in order:
            verdicts: list[Verdict] = []
            while indices := plans.next_indices("s", verdicts, is_audit=False):
                verdicts += [rows[number][index] for index in indices]
                plans.observe("s", verdicts, [reply(choice=choice) for choice in range(len(indices))])
            decided[number] = performance_decision(verdicts, CONFIG, is_audit=False)
        return decided

    assert decisions(order) == decisions(range(24))
