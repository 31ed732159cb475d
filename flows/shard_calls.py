"""What is to be done with each shard of a stage, as data: to be run by any process or machine that has a `Runtime`.

A call is made where the stage is planned and says everything that its shard depends on, beside the files of the work
folder and what a `Runtime` makes of the configuration. Calls are small: rows travel by files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from flows import stages
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.runtime import Runtime
from flows.stages import Progress
from flows.workspace import Marker
from sources import Unit

_Made_co = TypeVar("_Made_co", covariant=True)
_Result = TypeVar("_Result")


class Call(Protocol[_Made_co]):
    """One shard's part of some work; can be pickled."""

    def __call__(self, runtime: Runtime, progress: Progress) -> _Made_co: ...


Work = dict[str, Call[Marker]]
"""What a stage has to do: by shard, the call that does it and returns its marker."""


class Spread(Protocol):
    """Does calls wherever the run has its workers, and returns their results by the same names.

    what: a word for the eye. Raises what the first failed call raised.
    """

    def __call__(self, what: str, calls: Mapping[str, Call[_Result]]) -> dict[str, _Result]: ...


@dataclass(frozen=True, slots=True)
class ReadSource:
    """Reads one unit of a source. Raises SourceError."""

    unit: Unit

    def __call__(self, runtime: Runtime, progress: Progress) -> Marker:
        return stages.read_source_shard(runtime, self.unit, progress)


@dataclass(frozen=True, slots=True)
class ProcessRows:
    """Runs a stage over one shard in which no row depends on another. before: of the stage before.

    Raises as `stages.label_shard` and `stages.remove_leaks` do.
    """

    stage: str
    before: Marker

    def __call__(self, runtime: Runtime, progress: Progress) -> Marker:
        if self.stage == DECONTAMINATION:
            return stages.remove_leaks(runtime, runtime.shared(Benchmarks), self.before, progress)
        return stages.label_shard(runtime, self.stage, self.before, progress)


@dataclass(frozen=True, slots=True)
class RemoveRows:
    """Removes planned rows from one shard. removals: see `flows.removals.REMOVAL_SCHEMA`; None: no row goes."""

    stage: str
    before: Marker
    removals: pa.Table | None
    digest: str

    def __call__(self, runtime: Runtime, progress: Progress) -> Marker:
        return stages.remove_planned(runtime, self.stage, self.before, self.removals, self.digest, progress)


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard that was found done. marker: of this stage."""

    marker: Marker

    def __call__(self, runtime: Runtime, progress: Progress) -> Marker:
        progress.skip(self.marker.count.num_in)
        return self.marker
