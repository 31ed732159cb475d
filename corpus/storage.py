"""Files that are either whole or absent: written under a temporary name, flushed to the disk, renamed.

Every failure of the disk becomes a `StorageError` that names the file and, for a full disk, says so.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from schemas.errors import CorpusError, StorageError

_CHUNK_BYTES = 1 << 20
_FOLLOWED_BYTES = 1 << 18
"""Read at once of a file that grows: fits the processor's cache beside what is being written."""


@contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError: "cannot {action} {path}: reason"."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = " (the disk is full: free some space and run again)" if is_full else ""
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}{hint}") from error


@contextmanager
def replacing(path: Path, *, is_flushed: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside `path`; when the block succeeds, the file written there takes the final name.

    Its bytes reach the disk before the rename, so a crash leaves the old file or the new one, never half a file.
    is_flushed: off for files that are flushed later, all at once, and not believed before.
    The temporary name starts with a dot and ends in .tmp, so no pattern for shards matches it.

    Raises StorageError: when the disk fails. The temporary file is removed whatever fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if is_flushed:
                sync(temporary)
            os.replace(temporary, path)
            if is_flushed:
                sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def empty_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder that was emptied or made, and removes it unless it was moved away. Raises StorageError."""
    with storage_errors(folder, "prepare"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def corpus_file_errors(path: Path) -> Iterator[None]:
    """Turns what a damaged or foreign Parquet file fails with into a CorpusError, an OSError into a StorageError."""
    try:
        with storage_errors(path, "read"):
            yield
    except (pa.ArrowException, KeyError) as error:
        raise CorpusError(f"{path} is not a file of a corpus: {error}") from error


@contextmanager
def locked_folder(folder: Path, *, what: str, on_held: Callable[[BlockingIOError], None]) -> Iterator[None]:
    """Holds a folder for this process, by a lock that goes with the process, however that ends. Makes it if need be.

    what: the folder is, for errors. on_held: called if another process holds it; if it returns, that one is waited for.

    Raises StorageError: the folder cannot be used.
    """
    with storage_errors(folder, f"use the {what}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with storage_errors(folder, f"use the {what}"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                on_held(error)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all. Raises StorageError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes a file, whole or not at all. Raises StorageError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, None if there is no such file. Raises StorageError: it cannot be read."""
    if not path.exists():
        return None
    with storage_errors(path, "read"):
        return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line to a JSON Lines file, which is made if need be, its folder too. Raises StorageError."""
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class GrowingDigest:
    """The sha256 of a file that another writer appends to: what is new is read back while it is still in the cache.

    For files that only grow, as Parquet files do; reading a finished one again would take its time at the end. A
    context manager; the file must exist. Methods raise OSError.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._chunk = memoryview(bytearray(_FOLLOWED_BYTES))
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def follow(self) -> None:
        """Takes in what was appended since the last call."""
        while length := self._file.readinto(self._chunk):
            self._digest.update(self._chunk[:length])
            self.num_bytes += length

    def hexdigest(self) -> str:
        """Returns the sha256 (hex) of all that was taken in."""
        return self._digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 (hex) of a file's bytes. Raises StorageError when it cannot be read."""
    digest = hashlib.sha256()
    with storage_errors(path, "read"), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
