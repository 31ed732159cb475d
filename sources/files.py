"""Finding and opening the files of a source, on local disks and at fsspec addresses (s3://, gs://, memory://)."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.config import SourceConfig
from schemas.errors import SourceError, storage_failures

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
_GLOB_CHARACTERS = frozenset("*?[")
_READ_AHEAD_BYTES = 8 * 2**20
"""What is asked of an object store at once where a file is read from its beginning."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file.

    path: what opens it. name: relative to the folder of the source, or to the fixed part of its glob.
    """

    path: str
    name: str


def is_address(path: str) -> bool:
    """Whether a path is an fsspec address and not a local path."""
    return "://" in path or "::" in path


def find_files(source: SourceConfig, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Returns the files of a source in the order of their names. In a folder, those with a suffix, at any depth.

    Hidden files and folders are left out: those that begin with "." and, in a folder, with "_".

    Raises SourceError: if the path does not exist, or names no file.
    """
    with reading(source.name, source.path):
        filesystem, root = fsspec.core.url_to_fs(
            str(Path(source.path).expanduser()) if not is_address(source.path) else source.path
        )
        if filesystem.isfile(root):
            return [SourceFile(_address(filesystem, root), PurePosixPath(root).name)]
        if filesystem.isdir(root):
            expected = f"the folder holds no file that ends in {', '.join(suffixes)}"
            found = [file for file in filesystem.find(root) if file.lower().endswith(suffixes)]
            found = [file for file in found if not _is_hidden(PurePosixPath(file).relative_to(root))]
        elif _GLOB_CHARACTERS & set(root):
            expected = "the pattern matches no file"
            pattern, root = root, _fixed_part(root)
            found = [file for file in filesystem.glob(pattern) if filesystem.isfile(file)]
            found = [file for file in found if not _is_hidden(PurePosixPath(file).relative_to(root), marks=(".",))]
        else:
            raise SourceError(f"source {source.name}: {source.path} does not exist; correct its `path`")
    if not found:
        raise SourceError(f"source {source.name}: {source.path}: {expected}; correct its `path` or `format`")
    names = {PurePosixPath(file).relative_to(root).as_posix(): file for file in found}
    return [SourceFile(_address(filesystem, file), name) for name, file in sorted(names.items())]


def _address(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """Returns what opens the file again: the plain path on a local disk, else the full address."""
    return path if _is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def _is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def _fixed_part(pattern: str) -> str:
    parts = PurePosixPath(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if _GLOB_CHARACTERS & set(part))
    return str(PurePosixPath(*parts[:fixed]))


def _is_hidden(path: PurePosixPath, *, marks: tuple[str, ...] = (".", "_")) -> bool:
    return any(part.startswith(marks) for part in path.parts)


def file_version(path: str) -> str:
    """Returns size and time of the last change (or the object store's tag) as text."""
    filesystem, root = fsspec.core.url_to_fs(path)
    info: dict[str, Any] = filesystem.info(root)
    changed = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), "")
    return f"{info.get('size')}:{changed}"


def local_folder(path: str) -> Path | None:
    """Returns the folder of a local file; None for a file elsewhere."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return Path(root).parent if _is_local(filesystem) else None


def is_folder(path: str) -> bool:
    """Whether a path or an address is a folder that is there."""
    filesystem, root = fsspec.core.url_to_fs(path if is_address(path) else str(Path(path).expanduser()))
    return bool(filesystem.isdir(root))


def folder_address(path: str) -> str:
    """Returns the address of the folder that a file elsewhere lies in."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return str(filesystem.unstrip_protocol(root.rpartition("/")[0]))


@contextlib.contextmanager
def open_raw(path: str, *, jumps: bool = False) -> Iterator[IO[bytes]]:
    """Opens a file for reading, wherever it is.

    jumps: whether it is read here and there, in steps that the reader chooses. An object store is then asked for those
    alone; reading ahead would fetch a Parquet file many times over, as its columns are read in turns.
    """
    filesystem, root = fsspec.core.url_to_fs(path)
    if _is_local(filesystem):
        with open(root, "rb") as stream:  # fsspec's own wrapper of local files reads lines several times slower.
            yield stream
        return
    cache = {"cache_type": "none"} if jumps else {"block_size": _READ_AHEAD_BYTES}
    # fsspec's streams read lines of any length; the buffered reader knows how to stop.
    with filesystem.open(root, "rb", **cache) as stream, io.BufferedReader(stream) as buffered:
        yield buffered


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading, unpacking gzip, which is told by its first two bytes."""
    with open_raw(path) as packed:
        is_gzip = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        if not is_gzip:
            yield packed
            return
        with gzip.GzipFile(fileobj=packed) as unpacked:
            yield io.BufferedReader(unpacked)


@contextlib.contextmanager
def reading(source: str, path: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a SourceError that names source and file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"source {source}: {path} is a damaged or truncated gzip file: {error}") from error
    except storage_failures() as error:  # looked up when something is raised: s3fs is loaded by then
        detail = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"source {source}: cannot read {path}: {detail}") from error
