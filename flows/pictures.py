"""Which images of a run are one picture: fingerprints by shard, clusters over all of them. Without Prefect.

A shard's fingerprints are made once and lie beside its features (`{shard}.pictures`). Clusters are formed over the
images of all shards in work and the representatives of all published ones (`pictures.published`), which stay
representatives: so the names that published rows are compared by never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpus.storage import replacing
from filters.feature_files import stored_digest, write_arrow
from filters.features import PictureNames, image_names
from filters.images import FingerprintTable, fingerprints, looked_at_clusters
from flows.runtime import Runtime
from flows.workspace import Marker, digest_of
from schemas.errors import StorageError

PUBLISHED = "pictures.published"
FINGERPRINTS_VERSION = 1
"""Raised when fingerprints are made in another way, so that stored ones are made again."""


class Pictures:
    """The images of some shards, clustered. names: by which rows are compared."""

    def __init__(self, runtime: Runtime, folder: Path, markers: Sequence[Marker]) -> None:
        """Reads the images of shards that are not in `folder` yet. Raises StorageError: the disk fails."""
        self._path = folder / PUBLISHED
        self._published = _read(self._path) or FingerprintTable.empty([])
        num_workers = runtime.config.parallel_shards
        with ThreadPoolExecutor(num_workers) as pool:
            tables = list(pool.map(lambda marker: shard_fingerprints(runtime, folder, marker), markers))
        self._table, num_published = _joined([self._published, *tables])
        is_published = np.arange(len(self._table)) < num_published
        self._representative = looked_at_clusters(
            self._table, runtime.images.read, published=is_published, num_workers=num_workers
        )
        self.names = PictureNames.of(self._table, self._representative)

    def settle(self) -> None:
        """Keeps the representatives for later runs. Raises StorageError."""
        places = np.unique(self._representative)
        if len(places) > len(self._published):
            with replacing(self._path) as temporary:
                write_arrow(temporary, self._table.take(places).to_table())


def shard_fingerprints(runtime: Runtime, folder: Path, marker: Marker) -> FingerprintTable:
    """Returns the fingerprints of a shard's images, read and stored first if they are not there.

    folder: of the stage. Raises StorageError: the disk fails.
    """
    path, digest = folder / f"{marker.shard}.pictures", digest_of(FINGERPRINTS_VERSION, marker.output)
    held = None
    with suppress(StorageError):  # a damaged file is made again
        held = _read(path) if stored_digest(path) == digest else None
    if held is None:
        images = runtime.workspace.read_columns(marker.stage, marker.shard, ["images"])["images"]
        names = pc.unique(image_names(images)).to_pylist()
        held = fingerprints(runtime.images.read, sorted(names), num_workers=runtime.config.parallel_shards)
        with replacing(path) as temporary:
            write_arrow(temporary, held.to_table(), digest)
    return held


def _joined(tables: Sequence[FingerprintTable]) -> tuple[FingerprintTable, int]:
    """Returns the images of all tables, each once at its first place; and how many the first table has."""
    whole = FingerprintTable.concatenated(tables)
    _, places = np.unique(whole.sha256s, return_index=True)
    return whole.take(np.sort(places)), len(tables[0])


def _read(path: Path) -> FingerprintTable | None:
    """Returns stored fingerprints; None if there are none. Raises StorageError: they are damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return FingerprintTable.from_table(pa.ipc.open_file(source).read_all())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
        raise StorageError(f"cannot read {path}: {error}; delete it and run again") from error
