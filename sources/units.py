"""A unit of work: one shard of rows of one file, small enough to hold in memory and to be done by one task."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of one file or split of a source.

    source: its name in the configuration. index: place among the units of the source, from 0.
    path: address to open. file: name relative to the source, as in `Sample.origin`; the split for `datasets`.
    offset: for JSON, where row `start` begins, in bytes of the uncompressed file; else 0.
    digest: sha256 (hex) of what identifies the rows: of their content for JSON, of size, time and footer for Parquet,
    of the fingerprint for `datasets`, each with the range. Rows appended to a JSON Lines file leave it unchanged.
    """

    source: str
    index: int
    path: str
    file: str
    start: int
    stop: int
    offset: int
    digest: str

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values; `from_record` is the inverse."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Unit:
        return cls(**record)


@dataclass(frozen=True, slots=True)
class RowRange:
    """A unit before it knows its source: rows [start, stop) of a file, with offset and digest as in `Unit`."""

    start: int
    stop: int
    offset: int
    digest: str


def row_ranges(num_rows: int, *, shard_rows: int, identity: str) -> list[RowRange]:
    """Returns the ranges of a container whose rows are counted, each with a digest of the identity and the range."""
    return [
        RowRange(start, stop := min(start + shard_rows, num_rows), 0, range_digest(identity, start, stop))
        for start in range(0, num_rows, shard_rows)
    ]


def range_digest(identity: str, start: int, stop: int) -> str:
    """Returns the digest of rows [start, stop) of what the identity names."""
    return hashlib.sha256(f"{identity}\x1f{start}\x1f{stop}".encode()).hexdigest()
