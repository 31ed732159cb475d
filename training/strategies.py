"""Which rows annealing trains on, and in which order: the strategies of R-4B's table 3 as pure arrangements of rows.

| strategy | stages | the paper's name |
|---|---|---|
| `mixed` | all rows, both modes shuffled together | Mixed-R |
| `reasoning_only` | the thinking rows | Only-R |
| `direct_only` | all rows, their thoughts removed | Non-R |
| `two_stage` | the direct rows, then the thinking rows | Non-R then R |

`two_stage` is one run: the same rows as `mixed`, as many passes over each, under one course of the learning rate, so
the order is all that tells the two apart (the paper does not say how its schedule ran). For a schedule per stage, run
the program twice: `mixed` with `reasoning_share: 0`, then `reasoning_only` on its model.

Everything here is a function of its arguments and the seed: a resumed run draws the same rows in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from schemas.errors import TrainingError

RowNumbers = npt.NDArray[np.int64]


class Strategy(StrEnum):
    """How the two modes of a corpus are trained on."""

    MIXED = "mixed"
    REASONING_ONLY = "reasoning_only"
    DIRECT_ONLY = "direct_only"
    TWO_STAGE = "two_stage"


class RowOrder(StrEnum):
    """Order of the rows within a pass: shuffled, that of the files, or shuffled into batches of like length."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    GROUPED = "grouped"


def arrange_rows(
    thinks: npt.NDArray[np.bool_],
    usable: npt.NDArray[np.bool_],
    *,
    strategy: Strategy,
    reasoning_share: float | None = None,
    seed: int = 0,
) -> tuple[RowNumbers, ...]:
    """Returns the numbers of the rows of each stage, ascending.

    thinks, usable [num_rows]: whether a row has a thought, and whether it can be trained on at all. reasoning_share:
    the share of thinking rows among those returned, reached by leaving out rows of the mode that has too many; None
    keeps all. For `direct_only` thoughts must still be removed from the rows.

    Raises TrainingError: the strategy or the share needs rows of a mode that the corpus does not have.
    """
    thinking, direct = np.flatnonzero(usable & thinks), np.flatnonzero(usable & ~thinks)
    if reasoning_share is not None:
        thinking, direct = take_share(thinking, direct, reasoning_share, seed=seed)
    together = np.sort(np.concatenate([thinking, direct]))
    if strategy is Strategy.REASONING_ONLY:
        stages: tuple[RowNumbers, ...] = (thinking,)
    elif strategy is Strategy.TWO_STAGE:
        stages = (direct, thinking)
    else:
        stages = (together,)
    if any(len(stage) == 0 for stage in stages):
        raise TrainingError(
            f"the strategy {strategy} has a stage without rows: the corpus holds {len(thinking)} usable rows with "
            f"reasoning and {len(direct)} without"
        )
    return stages


def take_share(thinking: RowNumbers, direct: RowNumbers, share: float, *, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Returns the rows of both modes, thinned so that thinking ones are this share of all, as near as whole rows allow.

    Only the mode that has too many loses rows, drawn at random; the order is kept.

    Raises TrainingError: one mode has no rows, and the share asks for some.
    """
    if (share > 0 and len(thinking) == 0) or (share < 1 and len(direct) == 0):
        raise TrainingError(
            f"reasoning_share {share} cannot be reached: the corpus holds {len(thinking)} usable rows with reasoning "
            f"and {len(direct)} without"
        )
    rng = np.random.default_rng(seed)
    if len(thinking) > share * (len(thinking) + len(direct)):
        wanted = round(len(direct) * share / (1 - share))
        return np.sort(rng.choice(thinking, wanted, replace=False)), direct
    wanted = round(len(thinking) * (1 - share) / share) if share else len(direct)
    return thinking, np.sort(rng.choice(direct, wanted, replace=False))


def stage_steps(num_rows: Sequence[int], *, batch_rows: int, max_steps: int, num_epochs: float) -> tuple[int, ...]:
    """Returns how many optimiser steps each stage takes.

    num_rows: rows of each stage. batch_rows: rows of one step over all devices. max_steps: all steps together, shared
    out by rows with at least one for each stage; if negative, each stage makes num_epochs passes over its rows.

    Raises TrainingError: fewer steps than stages.
    """
    if max_steps < 0:
        return tuple(math.ceil(num_epochs * rows / batch_rows) for rows in num_rows)
    if max_steps < len(num_rows):
        raise TrainingError(f"max_steps {max_steps} leaves a stage without a step; there are {len(num_rows)} stages")
    ends = [0]
    for stage, rows_so_far in enumerate(itertools.accumulate(num_rows), start=1):
        end = round(max_steps * rows_so_far / sum(num_rows))
        ends.append(min(max(end, ends[-1] + 1), max_steps - (len(num_rows) - stage)))
    return tuple(end - start for start, end in itertools.pairwise(ends))


@dataclass(frozen=True, slots=True)
class Stage:
    """Rows that lie together in the training set and are trained on together for a number of steps.

    lengths [num_rows]: tokens of each row, in the order in which the rows lie.
    """

    lengths: npt.NDArray[np.int32]
    num_steps: int


class StagedSampler(Sampler[int]):
    """The positions of the rows of a whole run, stage after stage and pass after pass.

    One iteration is the run: a pass ends in the middle of a batch where it must, and no batch holds rows of two
    stages. It has no state, so a run that goes on from a checkpoint skips what it has seen, in whichever stage.
    """

    def __init__(self, stages: Sequence[Stage], *, row_order: RowOrder, batch_rows: int, seed: int) -> None:
        self.stages = tuple(stages)
        self.row_order = row_order
        self.batch_rows = batch_rows
        self.seed = seed

    def __len__(self) -> int:
        return self.batch_rows * sum(stage.num_steps for stage in self.stages)

    def __iter__(self) -> Iterator[int]:
        first = 0
        for number, stage in enumerate(self.stages):
            passes = endless_passes(
                stage.lengths, row_order=self.row_order, batch_rows=self.batch_rows, seed=(self.seed, number)
            )
            for position in itertools.islice(passes, stage.num_steps * self.batch_rows):
                yield first + position
            first += len(stage.lengths)


def endless_passes(
    lengths: npt.NDArray[np.int32], *, row_order: RowOrder, batch_rows: int, seed: Sequence[int]
) -> Iterator[int]:
    """Yields positions of rows for ever; every `len(lengths)` of them are one pass, in which each row comes once.

    The batches of a grouped pass are those of transformers' `group_by_length`, which leaves them sorted from long to
    short, fifty at a time. Long rows are thinking rows, so a run would end on direct rows alone: here the batches are
    shuffled, except the first, which shows at once whether the longest rows fit into memory. Rows left over at the end
    of a pass open the next, in a batch filled up with rows of any length.
    """
    left: list[int] = []
    for pass_number in itertools.count():
        if row_order is RowOrder.SEQUENTIAL:
            yield from range(len(lengths))
            continue
        pass_seed = int(np.random.SeedSequence([*seed, pass_number]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(pass_seed)
        order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
        if row_order is RowOrder.RANDOM:
            yield from order
            continue
        num_fill = -len(left) % batch_rows
        yield from [*left, *order[:num_fill]]
        batches, left = _batches_of_like_length(order[num_fill:], lengths, batch_rows, generator)
        yield from itertools.chain.from_iterable(batches)


def _batches_of_like_length(
    rows: list[int], lengths: npt.NDArray[np.int32], batch_rows: int, generator: torch.Generator
) -> tuple[list[list[int]], list[int]]:
    """Returns whole batches of the rows, the one with the longest row first, and the rows that fill no batch."""
    num_batches = len(rows) // batch_rows
    if num_batches == 0:
        return [], rows
    grouped = get_length_grouped_indices(lengths[rows].tolist(), batch_rows, generator=generator)
    batches = [[rows[i] for i in grouped[k * batch_rows : (k + 1) * batch_rows]] for k in range(num_batches)]
    order = [0, *(1 + k for k in torch.randperm(num_batches - 1, generator=generator).tolist())]
    return [batches[k] for k in order], [rows[i] for i in grouped[num_batches * batch_rows :]]
