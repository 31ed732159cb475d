"""The work folder of a run: where every stage keeps its shards, and how a stage knows that a shard is done.

    {workdir}/images/               content-addressed image store
    {workdir}/stages/{stage}/       per shard: rows (.parquet), fates (.fates.parquet), marker (.json)
    {workdir}/journals/{stage}/     per shard: every teacher reply (a folder, see `teacher.journal`)
    {workdir}/corpus/               the versions

A shard of a stage is done when its marker exists, names the digest of everything that shaped it (recipe and input),
and its files are there. Markers are written last, by renaming, so a run killed at any moment starts again where it
was; a changed setting changes the digest and redoes exactly the stages that depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpus.storage import locked_folder, storage_errors, write_bytes
from schemas.errors import StorageError
from schemas.fates import StageCount, count_table
from schemas.usage import Ledger, Usage, UsageKey

_LABEL_COLUMNS = frozenset(
    ["source", "topic", "kind", "answer_type", "licence", "mode", "heuristic", "stage", "exit", "reason"]
)
"""Columns of few different values. All others are written as they are, and lz4 spares time, as shards are passed on."""


def digest_of(*parts: object) -> str:
    """Returns the sha256 (hex) of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Marker:
    """The record that a shard of a stage is done.

    digest: what shaped it. output: sha256 of its rows and fates. usage: what the teacher's replies behind it cost,
    whoever paid; no part of any digest.
    """

    stage: str
    shard: str
    digest: str
    output: str
    count: StageCount
    usage: Ledger

    def to_record(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "shard": self.shard,
            "digest": self.digest,
            "output": self.output,
            "count": self.count.to_record(),
            "usage": [{**asdict(key), **usage.to_record()} for key, usage in sorted(self.usage.items())],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Marker:
        usage = {
            UsageKey(entry["stage"], entry["purpose"], entry["source"], entry["model"]): Usage.from_record(entry)
            for entry in record["usage"]
        }
        count = StageCount.from_record(record["count"])
        return cls(record["stage"], record["shard"], record["digest"], record["output"], count, usage)


class Workspace:
    """The files of one work folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def images(self) -> Path:
        return self.root / "images"

    def rows_path(self, stage: str, shard: str) -> Path:
        return self.root / "stages" / stage / f"{shard}.parquet"

    def fates_path(self, stage: str, shard: str) -> Path:
        return self.root / "stages" / stage / f"{shard}.fates.parquet"

    def marker_path(self, stage: str, shard: str) -> Path:
        return self.root / "stages" / stage / f"{shard}.json"

    def journal_path(self, stage: str, shard: str) -> Path:
        return self.root / "journals" / stage / shard

    def find_marker(self, stage: str, shard: str, digest: str) -> Marker | None:
        """Returns the marker of a shard that is done under this digest, else None."""
        marker = self.read_marker(stage, shard)
        if marker is None or marker.digest != digest:
            return None
        files = (self.rows_path(stage, shard), self.fates_path(stage, shard))
        return marker if all(path.exists() for path in files) else None

    def read_marker(self, stage: str, shard: str) -> Marker | None:
        """Returns the marker of a shard whatever its digest, or None.

        A damaged marker counts as none, and so does one of an earlier version: its shard is made again from the
        journal, at no cost.
        """
        try:
            return Marker.from_record(json.loads(self.marker_path(stage, shard).read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None

    def read_rows(self, stage: str, shard: str) -> pa.Table:
        return self._read(self.rows_path(stage, shard))

    def read_columns(self, stage: str, shard: str, columns: Sequence[str]) -> pa.Table:
        """Returns some columns of a shard's rows."""
        return self._read(self.rows_path(stage, shard), columns)

    def read_fates(self, stage: str, shard: str) -> pa.Table:
        return self._read(self.fates_path(stage, shard))

    def _read(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            with pq.ParquetFile(path) as file:
                return file.read(None if columns is None else list(columns), use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error

    def finish_shard(
        self,
        stage: str,
        shard: str,
        *,
        digest: str,
        num_in: int,
        rows: pa.Table,
        fates: pa.Table,
        usage: Ledger | None = None,
    ) -> Marker:
        """Writes rows, fates and, last, the marker of a shard, and asserts that no row was lost.

        An old marker goes first: a run of the settings that it names must not take the new rows for its own.

        Raises StorageError: the files could not be written; nothing counts as done then.
        """
        count = count_table(num_in, rows.num_rows, fates)
        count.check(f"{stage}/{shard}")
        output = hashlib.sha256()
        with storage_errors(self.marker_path(stage, shard), "remove"):
            self.marker_path(stage, shard).unlink(missing_ok=True)
        for path, table in (
            (self.rows_path(stage, shard), rows),
            (self.fates_path(stage, shard), fates),
        ):
            content = _parquet(table)
            self._write(path, content)
            output.update(hashlib.sha256(content).digest())
        marker = Marker(stage, shard, digest, output.hexdigest(), count, dict(usage or {}))
        self._write(self.marker_path(stage, shard), json.dumps(marker.to_record(), sort_keys=True).encode())
        return marker

    def _write(self, path: Path, content: bytes | memoryview) -> None:
        """Writes a file, whole or not at all, and flushes it to the disk. Raises StorageError."""
        write_bytes(path, content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the work folder for this process, so that two runs never write it at once.

        Raises StorageError: another run holds it, or the folder cannot be made.
        """

        def refuse(error: BlockingIOError) -> None:
            raise StorageError(f"another run is at work in {self.root}; wait for it or choose another") from error

        with locked_folder(self.root, what="work folder", on_held=refuse):
            yield


def _parquet(table: pa.Table) -> memoryview:
    """Returns a table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    labels = [name for name in table.column_names if name in _LABEL_COLUMNS]
    pq.write_table(table, sink, compression="lz4", use_dictionary=labels)
    return memoryview(sink.getvalue())
