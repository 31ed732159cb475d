"""Whether a reply that was durable is ever asked for again, on whichever host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from benchmarks.killing import Asked, SampleNames
from flows.workspace import Workspace
from schemas.config import RunConfig
from teacher.journal import JournalRecord, read_journal
from tests.cluster.cluster import Cluster


class PaidReplies:
    """What of a run was durable when, beside what the teachers were asked: both name a sample alike.

    Nothing is stopped for it: the journals are read as any run reads them, and what is believed at a moment must not
    be asked for by a call that began after it.
    """

    def __init__(self, cluster: Cluster, config: RunConfig) -> None:
        self._cluster, self._config = cluster, config
        self._names = SampleNames(config)
        self._since: dict[Asked, float] = {}
        self._num_before = sum(1 for _ in cluster.calls())

    @property
    def num_durable(self) -> int:
        return len(self._since)

    def note(self) -> int:
        """Notes what is durable now, and returns how much that is; to be called around every failure."""
        believed = self._names.of(self._records())
        now = time.time()
        for name in believed:
            self._since.setdefault(name, now)
        return len(self._since)

    def asked_again(self) -> list[str]:
        """Returns the calls for replies that had been durable: what must not be."""
        return [
            f"{call['purpose']}, sample {call['index'] + choice}, {call['began'] - self._since[name]:.1f} s afterwards"
            for call in list(self._cluster.calls())[self._num_before :]
            for choice in range(call["n"])
            if (name := (call["question"], call["seed"] + choice)) in self._since and call["began"] > self._since[name]
        ]

    def longest_pause_seconds(self) -> float:
        """Returns the longest time between two calls of the run."""
        began = sorted(call["began"] for call in list(self._cluster.calls())[self._num_before :])
        return max((later - earlier for earlier, later in pairwise(began)), default=0.0)

    def _records(self) -> Iterator[JournalRecord]:
        folder = Workspace(Path(self._config.workdir)).root / "journals"
        for journal in sorted(folder.glob("*/*")):
            yield from read_journal(journal)
