"""A folder on a local disk or at an fsspec address (s3://, gs://, memory://).

A file appears under its name only when it is whole. Locally it is written under a temporary name and renamed; an
object store shows an object when its upload has ended. Credentials come from the environment, as the store's own
library reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...); an address carries none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import StorageError, storage_failures

_TEMPORARY = ".writing-"
"""What the temporary name of a file begins with. Who writes a folder sees to it that nobody else does."""


def is_address(path: str | Path) -> bool:
    """Whether a path is an fsspec address and not a local path."""
    return "://" in str(path) or "::" in str(path)


class Place:
    """One folder. Names are relative to it, with "/" between their parts; every failure is a StorageError."""

    def __init__(self, path: str | Path) -> None:
        text = str(path)
        self.name = text.rstrip("/") if is_address(text) else str(Path(text).expanduser().absolute())
        with self._failures("use"):
            self._filesystem, self._root = fsspec.core.url_to_fs(self.name)
        self.is_local = isinstance(self._filesystem, LocalFileSystem)
        # Objects come and go behind a listing that was kept.
        self._filesystem.invalidate_cache()

    def __str__(self) -> str:
        return self.name

    def address(self, name: str = "") -> str:
        """Returns what a person or another program opens a file, or the folder itself, by."""
        return f"{self.name}/{name}" if name else self.name

    def names(self) -> list[str]:
        """Returns the names of what lies in the folder, in order; none if there is no such folder."""
        with self._failures("list"):
            self._filesystem.invalidate_cache()
            if self.is_local and Path(self._root).is_file():
                raise StorageError(f"{self.name} is a file, not a folder")
            try:
                entries = self._filesystem.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
            # A store may list the folder itself, as an object of no bytes.
            found = {PurePosixPath(str(entry)).name for entry in entries if str(entry).rstrip("/") != self._root}
        return sorted(found)

    def has_file(self, name: str) -> bool:
        with self._failures("look for", name):
            return bool(self._filesystem.isfile(self._path(name)))

    def read(self, name: str) -> bytes | None:
        """Returns a file's content; None if there is no such file."""
        with self._failures("read", name):
            try:
                content = self._filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Writes one file, whole or not at all."""
        self.write_all({name: content})

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Writes files, each whole or not at all: on an object store many at once."""
        if self.is_local:
            for name, content in files.items():
                with self.writing(name) as temporary:
                    temporary.write_bytes(content)
        elif files:
            with self._failures("write", next(iter(files))):
                self._filesystem.pipe({self._path(name): content for name, content in files.items()})

    def add_missing(self, files: Mapping[str, bytes]) -> None:
        """Writes those files that are not there. Their names must tell their content.

        An object store is not asked first: the question costs as much as writing the same again.
        """
        is_there = self.has_file if self.is_local else lambda name: False
        self.write_all({name: content for name, content in files.items() if not is_there(name)})

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a local path to write a file at; when the block succeeds, the file is put in its place."""
        if self.is_local:
            with self._writing_locally(name) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="bimode-") as folder:
            temporary = Path(folder) / PurePosixPath(name).name
            with self._failures("write", name, _disk_failures):
                yield temporary
            with self._failures("write", name):
                self._filesystem.put_file(str(temporary), self._path(name))

    @contextmanager
    def _writing_locally(self, name: str) -> Iterator[Path]:
        path = Path(self._path(name))
        temporary = path.with_name(f"{_TEMPORARY}{path.name}")
        try:
            with self._failures("write", name, _disk_failures):
                path.parent.mkdir(parents=True, exist_ok=True)
                yield temporary
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yields a local path of a file: its own, or that of a copy that lasts as long as the block."""
        if self.is_local:
            yield Path(self._path(name))
            return
        with tempfile.TemporaryDirectory(prefix="bimode-") as folder:
            copy = Path(folder) / PurePosixPath(name).name
            with self._failures("read", name):
                self._filesystem.get_file(self._path(name), str(copy))
            yield copy

    def copy(self, name: str, target: str) -> None:
        """Copies a file within the place; on an object store no byte passes through here."""
        with self._failures("copy", name):
            if self.is_local:
                Path(self._path(target)).parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.cp_file(self._path(name), self._path(target))

    def flush(self) -> None:
        """Has everything written so far reach the disk. An object store has done so before it answered."""
        if self.is_local:
            os.sync()

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; nothing if there is none."""
        with self._failures("remove", name):
            if self.is_local and Path(self._path(name)).is_dir() and not Path(self._path(name)).is_symlink():
                shutil.rmtree(self._path(name))
            elif self._filesystem.exists(self._path(name)):
                self._filesystem.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        assert parts and ".." not in parts and not PurePosixPath(name).is_absolute(), f"{name!r} leaves {self.name}"
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _failures(
        self, action: str, name: str = "", failures: Callable[[], tuple[type[Exception], ...]] | None = None
    ) -> Iterator[None]:
        """Turns what a disk or a store fails with into a StorageError: "cannot {action} {place}: reason".

        failures: which exceptions that are, asked when one is raised; by default whatever a file system raises.
        """
        failures = failures or storage_failures
        try:
            yield
        except failures() as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StorageError(f"cannot {action} {self.address(name)}: {reason}") from error


def _disk_failures() -> tuple[type[Exception], ...]:
    """Returns what is caught around the work of a caller, whose other errors are its own."""
    return (OSError,)
