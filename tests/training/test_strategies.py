from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import TrainingError
from training.strategies import (
    RowOrder,
    Stage,
    StagedSampler,
    Strategy,
    arrange_rows,
    endless_passes,
    stage_steps,
    take_share,
)

THINKS = np.array([True, False, True, False, False, True])
USABLE = np.array([True, True, True, False, True, False])


def rows_of(strategy: Strategy, share: float | None = None) -> list[list[int]]:
    return [stage.tolist() for stage in arrange_rows(THINKS, USABLE, strategy=strategy, reasoning_share=share)]


@pytest.mark.parametrize(
    ("strategy", "stages"),
    [
        (Strategy.MIXED, [[0, 1, 2, 4]]),
        (Strategy.REASONING_ONLY, [[0, 2]]),
        (Strategy.DIRECT_ONLY, [[0, 1, 2, 4]]),
        (Strategy.TWO_STAGE, [[1, 4], [0, 2]]),
    ],
)
def test_a_strategy_takes_the_usable_rows_that_the_paper_gives_it(strategy: Strategy, stages: list[list[int]]) -> None:
    assert rows_of(strategy) == stages


@pytest.mark.parametrize("strategy", [Strategy.REASONING_ONLY, Strategy.TWO_STAGE])
def test_a_strategy_that_needs_reasoning_rows_says_when_there_are_none(strategy: Strategy) -> None:
    with pytest.raises(TrainingError, match=rf"{strategy} .* 0 usable rows with reasoning and 4 without"):
        arrange_rows(np.zeros(4, bool), np.ones(4, bool), strategy=strategy)


def test_two_stages_say_when_there_are_no_direct_rows() -> None:
    with pytest.raises(TrainingError, match="3 usable rows with reasoning and 0 without"):
        arrange_rows(np.ones(3, bool), np.ones(3, bool), strategy=Strategy.TWO_STAGE)


@pytest.mark.parametrize("strategy", [Strategy.MIXED, Strategy.DIRECT_ONLY])
def test_a_corpus_without_reasoning_rows_can_be_trained_on_where_none_are_needed(strategy: Strategy) -> None:
    (rows,) = arrange_rows(np.zeros(3, bool), np.ones(3, bool), strategy=strategy)
    assert rows.tolist() == [0, 1, 2]


def test_a_share_keeps_all_rows_of_the_scarcer_mode() -> None:
    thinking, direct = take_share(np.arange(0, 30), np.arange(30, 40), 0.5, seed=0)
    assert len(thinking) == 10 and direct.tolist() == list(range(30, 40))
    thinking, direct = take_share(np.arange(0, 3), np.arange(3, 40), 0.75, seed=0)
    assert thinking.tolist() == [0, 1, 2] and len(direct) == 1


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0, 1), st.integers(0, 9))
def test_a_share_is_met_as_nearly_as_whole_rows_allow(
    num_thinking: int, num_direct: int, share: float, seed: int
) -> None:
    before = np.arange(num_thinking), np.arange(num_thinking, num_thinking + num_direct)
    thinking, direct = take_share(*before, share, seed=seed)
    assert len(thinking) == num_thinking or len(direct) == num_direct
    for kept, all_rows in zip((thinking, direct), before, strict=True):
        assert set(kept.tolist()) <= set(all_rows.tolist())
        assert kept.tolist() == sorted(set(kept.tolist()))
    # The mode that was thinned is half a row at most from where the share would be exact.
    exact = share * (len(thinking) + len(direct))
    assert abs(len(thinking) - exact) <= 0.5 * max(share, 1 - share) + 1e-9


@given(st.integers(0, 5))
def test_the_rows_of_a_share_are_drawn_by_the_seed(seed: int) -> None:
    many = np.arange(1000)
    first, again = (take_share(many, many[:10], 0.5, seed=seed)[0] for _ in range(2))
    other = take_share(many, many[:10], 0.5, seed=seed + 1)[0]
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(("num_thinking", "num_direct", "share"), [(0, 5, 0.1), (5, 0, 0.9), (0, 5, 1.0), (5, 0, 0.0)])
def test_a_share_of_rows_that_are_not_there_is_refused(num_thinking: int, num_direct: int, share: float) -> None:
    with pytest.raises(TrainingError, match=f"{share} cannot be reached: .* {num_thinking} .* {num_direct} "):
        take_share(np.arange(num_thinking), np.arange(num_direct), share, seed=0)


def test_the_stages_of_the_paper_take_steps_by_their_rows() -> None:
    assert stage_steps([10_871_558, 5_495_209], batch_rows=1024, max_steps=-1, num_epochs=1) == (10_617, 5_367)
    assert stage_steps([10_871_558, 5_495_209], batch_rows=1024, max_steps=300, num_epochs=1) == (199, 101)


def test_passes_over_the_rows_are_made_by_each_stage() -> None:
    assert stage_steps([10, 3], batch_rows=4, max_steps=-1, num_epochs=2) == (5, 2)
    assert stage_steps([10], batch_rows=4, max_steps=-1, num_epochs=0.5) == (2,)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=4), st.integers(4, 1000))
def test_steps_are_shared_out_whole_and_every_stage_gets_some(num_rows: list[int], max_steps: int) -> None:
    steps = stage_steps(num_rows, batch_rows=8, max_steps=max_steps, num_epochs=1)
    assert sum(steps) == max_steps
    assert all(stage >= 1 for stage in steps)


def test_fewer_steps_than_stages_are_refused() -> None:
    with pytest.raises(TrainingError, match="max_steps 1 "):
        stage_steps([5, 5], batch_rows=1, max_steps=1, num_epochs=1)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 9),
    st.sampled_from(RowOrder),
    st.integers(0, 3),
)
def test_every_pass_has_each_row_once(lengths: list[int], batch_rows: int, order: RowOrder, seed: int) -> None:
    drawn = endless_passes(np.array(lengths, np.int32), row_order=order, batch_rows=batch_rows, seed=[seed])
    for _ in range(3):
        assert sorted(itertools.islice(drawn, len(lengths))) == list(range(len(lengths)))


def batches_of(lengths: np.ndarray, order: RowOrder, batch_rows: int, num_batches: int) -> np.ndarray:
    """Returns the lengths of the rows drawn, [num_batches, batch_rows]."""
    drawn = endless_passes(lengths, row_order=order, batch_rows=batch_rows, seed=[0])
    return lengths[list(itertools.islice(drawn, num_batches * batch_rows))].reshape(num_batches, batch_rows)


def padding_share(batches: np.ndarray) -> float:
    return float(1 - batches.sum() / (batches.max(axis=1) * batches.shape[1]).sum())


def test_grouped_batches_hold_little_padding_in_every_pass() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 3003).astype(np.int32)  # 3003 rows fill no whole batches
    for pass_batches in np.split(batches_of(lengths, RowOrder.GROUPED, 8, 1125), 3):
        assert padding_share(pass_batches) < 0.05
    assert padding_share(batches_of(lengths, RowOrder.RANDOM, 8, 375)) > 0.3


def test_the_longest_rows_come_first_and_long_and_short_batches_are_then_mixed() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 3200).astype(np.int32)
    longest = batches_of(lengths, RowOrder.GROUPED, 8, 400).max(axis=1)
    assert longest[0] == lengths.max()
    assert 0.4 < (np.diff(longest) > 0).mean() < 0.6


def staged(order: RowOrder, seed: int = 0) -> StagedSampler:
    stages = [Stage(np.arange(1, 11, dtype=np.int32), 4), Stage(np.arange(1, 6, dtype=np.int32), 3)]
    return StagedSampler(stages, row_order=order, batch_rows=4, seed=seed)


@pytest.mark.parametrize("order", RowOrder)
def test_stages_follow_each_other_and_share_no_batch(order: RowOrder) -> None:
    drawn = list(staged(order))
    assert len(drawn) == len(staged(order)) == 28
    assert set(drawn[:16]) == set(range(10))
    assert set(drawn[16:]) == set(range(10, 15))


@pytest.mark.parametrize("order", [RowOrder.RANDOM, RowOrder.GROUPED])
def test_the_order_is_that_of_the_seed_however_often_it_is_asked(order: RowOrder) -> None:
    sampler = staged(order)
    assert list(sampler) == list(sampler) == list(staged(order)) != list(staged(order, seed=1))


def test_another_pass_has_another_order() -> None:
    drawn = list(staged(RowOrder.RANDOM))
    assert drawn[16:21] != drawn[21:26]
