"""The rows of a corpus version as exports take them, wherever the version lies, with little in memory.

The rows of both modes come mixed in proportion, in an order that depends on nothing but the version: what reads an
export from its beginning, or shuffles only what it has in a buffer, sees both modes all along.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpus.places import Place, is_address
from corpus.storage import file_sha256
from corpus.versions import MANIFEST, Manifest, find_version, load_manifest
from corpus.writer import ShardInfo
from schemas.errors import ConfigError, CorpusError
from schemas.verdicts import Mode

_COLUMNS = ["id", "mode", "prompt", "completion", "images", "source", "licence"]
_BATCH_ROWS = 32
"""Rows decoded at once: images make rows large."""

_BUFFER_BYTES = 2**20
_VERSION_NAME = re.compile(r"v(\d{4,})")


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One row of a corpus.

    prompt: its parts in order; None stands for the next image. completion: the assistant's text. images: encoded.
    """

    id: str
    mode: str
    prompt: tuple[str | None, ...]
    completion: str
    images: tuple[bytes, ...]
    source: str
    licence: str

    @property
    def num_marks(self) -> int:
        return sum(part is None for part in self.prompt)


@dataclass(frozen=True, slots=True)
class CorpusVersion:
    """A finished version, on a disk or on an object store."""

    place: Place
    manifest: Manifest

    def shards(self, mode: Mode) -> list[ShardInfo]:
        return [shard for shard in self.manifest.shards if shard.path.startswith(f"data/{mode}/") and shard.num_rows]

    def num_rows(self, modes: Sequence[Mode]) -> int:
        return sum(shard.num_rows for mode in modes for shard in self.shards(mode))


def open_version(corpus: str | Path) -> CorpusVersion:
    """Returns the version that a folder or an address is, or the newest finished one in it.

    Raises ConfigError: there is none. CorpusError: its manifest is damaged. StorageError: it cannot be read.
    """
    if not is_address(corpus):
        folder = find_version(corpus)
        return CorpusVersion(Place(folder), load_manifest(folder))
    place = Place(corpus)
    if not place.has_file(MANIFEST):
        numbered = sorted((int(match[1]), match[0]) for match in map(_VERSION_NAME.fullmatch, place.names()) if match)
        versions = [Place(place.address(name)) for _, name in reversed(numbered)]
        found = next((version for version in versions if version.has_file(MANIFEST)), None)
        if found is None:
            raise ConfigError(f"there is no finished corpus version at {place}")
        place = found
    content = place.read(MANIFEST)
    assert content is not None, f"{place} lost its manifest while it was read"
    with tempfile.TemporaryDirectory(prefix="bimode-export-") as folder_name:
        (Path(folder_name) / MANIFEST).write_bytes(content)
        try:
            return CorpusVersion(place, load_manifest(folder_name))
        except CorpusError as error:
            raise CorpusError(str(error).replace(folder_name, str(place))) from error


def read_rows(version: CorpusVersion, modes: Sequence[Mode]) -> Generator[ExportRow, None, None]:
    """Yields the rows of the modes, mixed in proportion to their numbers; within a mode in the order of its shards.

    Each shard is compared with its checksum before its rows are used. Raises CorpusError: a shard is missing, altered
    or unreadable. StorageError.
    """
    totals = {mode: version.num_rows([mode]) for mode in modes}
    streams = {mode: _mode_rows(version, mode) for mode in modes if totals[mode]}
    num_read = dict.fromkeys(streams, 0)
    with contextlib.ExitStack() as stack:
        for stream in streams.values():
            stack.enter_context(contextlib.closing(stream))
        while streams:
            # The mode that is furthest behind its share; of two that are equally far, always the same one.
            mode = min(streams, key=lambda mode: ((2 * num_read[mode] + 1) / totals[mode], mode))
            yield next(streams[mode])
            num_read[mode] += 1
            if num_read[mode] == totals[mode]:
                del streams[mode]


def _mode_rows(version: CorpusVersion, mode: Mode) -> Generator[ExportRow, None, None]:
    for shard in version.shards(mode):
        yield from _shard_rows(version, shard)


def _shard_rows(version: CorpusVersion, shard: ShardInfo) -> Generator[ExportRow, None, None]:
    name = version.place.address(shard.path)
    if not version.place.has_file(shard.path):
        raise CorpusError(f"corpus version {version.place} is damaged: {shard.path} is missing")
    num_rows = 0
    with version.place.fetched(shard.path) as path:
        if file_sha256(path) != shard.sha256:
            raise CorpusError(f"corpus version {version.place} is damaged: {shard.path} was altered")
        try:
            with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=_COLUMNS, use_threads=False):
                    for record in batch.to_pylist():
                        yield _export_row(record)
                        num_rows += 1
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise CorpusError(f"{name} cannot be read as a corpus shard: {error}") from error
    if num_rows != shard.num_rows:
        raise CorpusError(f"{name} holds {num_rows} rows, its manifest says {shard.num_rows}")


def _export_row(record: dict[str, Any]) -> ExportRow:
    parts = [part for message in record["prompt"] for part in message["content"]]
    return ExportRow(
        id=record["id"],
        mode=record["mode"],
        prompt=tuple(None if part["type"] == "image" else part["text"] for part in parts),
        completion="".join(part["text"] for message in record["completion"] for part in message["content"]),
        images=tuple(image["bytes"] for image in record["images"]),
        source=record["source"] or "",
        licence=record["licence"] or "",
    )
