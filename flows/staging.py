"""Stages that are done again beside those of the last run, and take their place all at once, or never.

A work folder holds one result of each stage and shard. Were it written over shard by shard, a run that stops half-way
(because replies are missing, or killed) would leave neither the old labels nor the new.

Staged files are not flushed to the disk one by one, which takes longer than labelling from stored replies does: all of
them are, before the first takes its place. What a crash of the machine leaves of them until then is told by its digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from corpus.storage import file_sha256, replacing, storage_errors, sync
from flows.workspace import Marker, Workspace
from schemas.usage import Ledger

STAGING = "relabelling"


class _Staged(Workspace):
    """A staging folder: files as in any work folder, but nothing is flushed, and so nothing is believed unread."""

    def find_marker(self, stage: str, shard: str, digest: str) -> Marker | None:
        found = super().find_marker(stage, shard, digest)
        if found is None:
            return None
        paths = (self.rows_path(stage, shard), self.fates_path(stage, shard))
        output = hashlib.sha256(b"".join(bytes.fromhex(file_sha256(path)) for path in paths))
        return found if output.hexdigest() == found.output else None

    def _write(self, path: Path, content: bytes | memoryview) -> None:
        with replacing(path, is_flushed=False) as temporary:
            temporary.write_bytes(content)


class StagedWorkspace(Workspace):
    """A work folder whose stages are read from a staging folder where that has them, and written only there.

    key: of what shapes the new labels; what another key staged is removed by `begin`.
    """

    def __init__(self, root: str | Path, key: str) -> None:
        super().__init__(root)
        self.last_run = Workspace(root)
        self.staged = _Staged(self.root / STAGING / key)

    def rows_path(self, stage: str, shard: str) -> Path:
        return self._holder(stage, shard).rows_path(stage, shard)

    def fates_path(self, stage: str, shard: str) -> Path:
        return self._holder(stage, shard).fates_path(stage, shard)

    def marker_path(self, stage: str, shard: str) -> Path:
        return self._holder(stage, shard).marker_path(stage, shard)

    def _holder(self, stage: str, shard: str) -> Workspace:
        return self.staged if self.staged.marker_path(stage, shard).exists() else self.last_run

    def find_marker(self, stage: str, shard: str, digest: str) -> Marker | None:
        """Returns the marker of a shard that is done under this digest in either folder, else None."""
        found = self.staged.find_marker(stage, shard, digest)
        if found is None:
            # Of other labels that were begun: it must not hide what the last run has.
            self.staged.marker_path(stage, shard).unlink(missing_ok=True)
            found = self.last_run.find_marker(stage, shard, digest)
        return found

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
        """Writes a shard into the staging folder. Raises StorageError."""
        return self.staged.finish_shard(stage, shard, digest=digest, num_in=num_in, rows=rows, fates=fates, usage=usage)

    def begin(self) -> None:
        """Removes what was staged for other labels. Raises StorageError."""
        with storage_errors(self.root / STAGING, "clean up"):
            for other in (self.root / STAGING).glob("*"):
                if other != self.staged.root:
                    shutil.rmtree(other)

    def promote(self, markers: Iterable[Marker]) -> None:
        """Puts staged shards in the place of those of the last run. Raises StorageError.

        Old markers go first and new ones come last: rows never stand under a marker that is not theirs.
        """
        staged = [m for m in markers if self.staged.marker_path(m.stage, m.shard).exists()]
        old, new = self.last_run, self.staged
        with storage_errors(self.root, "replace stages in"):
            os.sync()
            for marker in staged:
                path = old.marker_path(marker.stage, marker.shard)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
            self._sync(staged)
            for marker in staged:
                names = (marker.stage, marker.shard)
                os.replace(new.rows_path(*names), old.rows_path(*names))
                os.replace(new.fates_path(*names), old.fates_path(*names))
            self._sync(staged)
            for marker in staged:
                names = (marker.stage, marker.shard)
                os.replace(new.marker_path(*names), old.marker_path(*names))
            self._sync(staged)

    def _sync(self, markers: Iterable[Marker]) -> None:
        for folder in sorted({self.last_run.marker_path(marker.stage, marker.shard).parent for marker in markers}):
            sync(folder)

    def discard(self) -> None:
        """Removes what is staged. Raises StorageError."""
        with storage_errors(self.root / STAGING, "remove"):
            if (self.root / STAGING).exists():
                shutil.rmtree(self.root / STAGING)
