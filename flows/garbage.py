"""How often Python looks for garbage in a process that goes through millions of rows.

A row is some dozens of short-lived objects, which reference counting frees. Every few hundred of them Python looks for
cycles among them, and now and then among everything that is alive, the imported modules included: a third of a run's
processor time. Here the modules are left out, and the search comes when so many objects are alive as a shard has.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (100_000, 20, 50)
"""Of the three generations, see `gc.set_threshold`. A shard of 2,000 rows holds some hundred thousand objects; measured
by `benchmarks.whole_flow`, larger ones save no more than two percent."""


def collect_rarely() -> None:
    """Has this process collect rarely from now on: for workers that do nothing else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Has this process collect rarely for the block. Blocks may overlap: the last one that ends sets all back."""
    _blocks.append(gc.get_threshold())
    collect_rarely()
    try:
        yield
    finally:
        before = _blocks.pop()
        if not _blocks:
            gc.unfreeze()
            gc.set_threshold(*before)


_blocks: list[tuple[int, int, int]] = []
"""The thresholds that each block found; the first block's are the process's own."""
