"""Rows spread over temporary files by a hash of their id: what concerns one id lies in one file.

Joins and searches for repeated ids then work on one file after the other, so that memory is that of a file whatever the
number of rows. The files lie in the system's temporary folder (`TMPDIR`) and are gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import polars as pl
import pyarrow as pa

from corpus.storage import storage_errors

PARTITION_ROWS = 250_000
MAX_PARTITIONS = 256
"""Files open at once. Beyond 64 million rows of a kind, files grow instead."""

_ID_HASH_SEED = 7


class Partitions:
    """Frames by kind, each spread over the same partitions. Every frame has the column `id`, and all of a kind have one
    schema. To be used as a context; raises StorageError where the temporary folder cannot be used.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_partitions = min(MAX_PARTITIONS, max(1, -(-num_rows // PARTITION_ROWS)))
        self._folder = tempfile.TemporaryDirectory(prefix="bimode-")
        self._writers: dict[tuple[str, int], pa.RecordBatchStreamWriter] = {}

    def __enter__(self) -> Partitions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        self._folder.cleanup()

    def add(self, kind: str, frame: pl.DataFrame) -> None:
        """Puts each row of a frame into the partition of its id. Rows of one id keep their order."""
        number = (pl.col("id").hash(seed=_ID_HASH_SEED) % self.num_partitions).alias("_partition")
        with storage_errors(Path(self._folder.name), "write temporary files in"):
            for (partition,), part in (
                frame.with_columns(number)
                .partition_by("_partition", as_dict=True, include_key=False, maintain_order=True)
                .items()
            ):
                table = part.to_arrow()
                key = (kind, int(partition))
                if key not in self._writers:
                    self._writers[key] = pa.ipc.new_stream(self._path(*key), table.schema)
                self._writers[key].write_table(table)

    def read(self, kind: str, empty: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Yields the rows of a kind, a partition at a time. empty: a frame of the schema, for partitions without rows.

        Nothing can be added to that kind afterwards.
        """
        for partition in range(self.num_partitions):
            writer = self._writers.pop((kind, partition), None)
            if writer is None:
                yield empty
                continue
            writer.close()
            path = self._path(kind, partition)
            with storage_errors(path, "read"):
                frame = pl.DataFrame(pl.read_ipc_stream(path))
                path.unlink()
            yield frame

    def _path(self, kind: str, partition: int) -> Path:
        return Path(self._folder.name) / f"{kind}-{partition:03d}.arrow"
