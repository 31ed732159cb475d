"""Collections are rare within a block, cycles are freed all the same, and the process is as before afterwards."""

import gc
import weakref
from contextlib import suppress

from flows.garbage import THRESHOLDS, collected_rarely


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_the_process_is_as_before_after_the_block_however_it_ends() -> None:
    before, num_frozen = gc.get_threshold(), gc.get_freeze_count()
    with suppress(ZeroDivisionError), collected_rarely():
        assert gc.get_threshold() == THRESHOLDS
        assert gc.get_freeze_count() > num_frozen
        raise ZeroDivisionError
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, num_frozen)


def test_of_overlapping_blocks_the_last_one_that_ends_sets_all_back() -> None:
    before, first, second = gc.get_threshold(), collected_rarely(), collected_rarely()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == THRESHOLDS
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_cycles_made_within_are_freed_within() -> None:
    with collected_rarely():
        made = [weakref.ref(Knot()) for _ in range(3 * THRESHOLDS[0])]
        num_alive = sum(knot() is not None for knot in made)
    assert num_alive < 2 * THRESHOLDS[0]
