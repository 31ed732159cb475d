"""A raw image value -> encoded bytes. Nothing is fetched from an address that data names, and no path leaves the root.

The root may itself be an address, if the configuration names one, or the source lies at one: paths are then relative
to it. A value is a path, bytes, a data URL, base64 text, {"bytes": ..., "path": ...} (the Image feature of `datasets`),
or a list of these, also written as a JSON list inside a string.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote_to_bytes

import fsspec

from schemas.errors import RowError, SourceError, storage_failures
from sources.files import local_folder
from sources.text import describe, is_missing

MAX_IMAGES = 64
"""Most images of one row; more than engines accept, and a bound on hostile rows."""

_MAX_PATH_CHARS = 4096
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""First bytes of JPEG, PNG, GIF, WebP, BMP and TIFF. They tell base64 from a path: JPEG's looks like "/9j/4AAQ...."."""


@dataclass(frozen=True, slots=True)
class ImageRoots:
    """Where image paths may lead.

    base: what relative paths start from; None if it is no local folder. allowed: resolved folders that no path may
    leave. address: where `base` is None, the fsspec address of the folder that takes its place, "" if there is none.
    """

    base: Path | None
    allowed: tuple[Path, ...]
    address: str = ""

    @classmethod
    def at(cls, base: Path, *further: Path) -> ImageRoots:
        return cls(base, tuple(Path(os.path.realpath(folder)) for folder in (base, *further)))

    @classmethod
    def at_address(cls, address: str) -> ImageRoots:
        """Returns the roots of a folder at an fsspec address; one that leads to a local disk is a local folder."""
        folder = local_folder(f"{address.rstrip('/')}/image")
        return cls(None, (), address.rstrip("/")) if folder is None else cls.at(folder)


def encoded_images(value: Any, *, roots: ImageRoots, max_bytes: int) -> Iterator[bytes]:
    """Yields the encoded bytes of each image in a raw value, in order. Nulls and empty strings are no image.

    max_bytes: checked before anything is read or decoded.

    Raises RowError: `image_address_not_fetched`, `image_outside_root`, `image_missing`, `image_too_large_bytes`,
    `image_unreadable`, `too_many_images`. Raises SourceError: the object store that holds the images fails.
    """
    values = list(_flattened(value))
    if len(values) > MAX_IMAGES:
        raise RowError("too_many_images", f"the row has {len(values)} images, more than {MAX_IMAGES}")
    for item in values:
        yield _encoded(item, roots, max_bytes)


def _flattened(value: Any) -> Iterator[Any]:
    if is_missing(value):
        return
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        if isinstance(parsed, list):
            value = parsed
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, list | tuple):
                raise RowError("image_unreadable", "the images are a list of lists")
            yield from _flattened(item)
    elif isinstance(value, dict) and value.get("bytes") is None and is_missing(_path_of(value)):
        if not {"bytes", "path", "url"} & value.keys():
            raise RowError("image_unreadable", f"the image is {describe(value)}, without bytes or path")
    else:
        yield value


def _path_of(value: dict[Any, Any]) -> Any:
    return value.get("path") if value.get("path") is not None else value.get("url")


def _encoded(value: Any, roots: ImageRoots, max_bytes: int) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else _path_of(value)
    if isinstance(value, bytes | bytearray | memoryview):
        _check_size(len(value), max_bytes)
        return bytes(value)
    if not isinstance(value, str):
        raise RowError("image_unreadable", f"the image is {describe(value)}, not a path, bytes or a data URL")
    text = value.strip()
    if text[:5].lower() == "data:":
        return _from_data_url(text, max_bytes)
    if _ADDRESS.match(text):
        raise RowError("image_address_not_fetched", f"the image is the address {text[:200]!r}; download it beforehand")
    if _is_base64(text):
        return _from_base64(text, max_bytes)
    return _read_at_address(text, roots, max_bytes) if roots.address else _read_below_roots(text, roots, max_bytes)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise RowError("image_too_large_bytes", f"the image has {num_bytes:,} bytes, more than {max_bytes:,}")


def _from_data_url(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise RowError("image_unreadable", f"the data URL {url[:60]!r} has no comma")
    if header.lower().endswith(";base64"):
        return _from_base64(payload, max_bytes)
    _check_size(len(payload) // 3, max_bytes)
    return unquote_to_bytes(payload)


def _is_base64(text: str) -> bool:
    if len(text) > _MAX_PATH_CHARS:
        return True
    if len(text) < 48 or not _BASE64.fullmatch(text):
        return False
    try:
        head = base64.b64decode(text[:16].translate(_STANDARD), validate=True)
    except binascii.Error:
        return False
    return head.startswith(_MAGIC)


_STANDARD = str.maketrans("-_", "+/")


def _from_base64(text: str, max_bytes: int) -> bytes:
    _check_size(len(text) * 3 // 4 - 2, max_bytes)
    packed = "".join(unquote_to_bytes(text).decode("latin-1").split() if "%" in text else text.split())
    packed = packed.translate(_STANDARD).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("image_unreadable", f"the base64 text {text[:40]!r} cannot be decoded: {error}") from error


def _read_at_address(name: str, roots: ImageRoots, max_bytes: int) -> bytes:
    """Reads an object below the address; one question to the store, and no more than `max_bytes` + 1 bytes.

    An object store knows no links, but some servers resolve "..", so a path with one is not asked for. That an image
    is missing is a matter of its row; that the store fails concerns all of them.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise RowError("image_outside_root", f"the image path {name[:200]!r} leaves {roots.address}")
    try:
        # Only the configured address is read as one: "::" in a path of data would name another file system.
        filesystem, root = fsspec.core.url_to_fs(roots.address)
        encoded = bytes(filesystem.cat_file(f"{root}/{path}", start=0, end=max_bytes + 1))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RowError("image_missing", f"the image {name[:200]!r} is not at {roots.address}") from error
    except storage_failures() as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # an empty object has no first byte to begin with
            return b""
        raise SourceError(f"cannot read the image {name[:200]!r} at {roots.address}: {error}") from error
    _check_size(len(encoded), max_bytes)
    return encoded


def _read_below_roots(name: str, roots: ImageRoots, max_bytes: int) -> bytes:
    """Reads a file whose resolved path lies below an allowed folder."""
    if roots.base is None:
        raise RowError("image_missing", f"image paths such as {name[:200]!r} need a local image_root")
    try:
        path = Path(os.path.realpath(roots.base / name))
        if not any(path.is_relative_to(root) for root in roots.allowed):
            raise RowError("image_outside_root", f"the image path {name[:200]!r} leaves {roots.base}")
        # Non-blocking: opening a pipe must not hang. The path is resolved, so a link here appeared only just now.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RowError("image_missing", f"the image {name[:200]!r} in {roots.base} cannot be read: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RowError("image_missing", f"the image {name[:200]!r} in {roots.base} is not a file")
        _check_size(status.st_size, max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            encoded = file.read(max_bytes + 1)
    except OSError as error:
        detail = f"the image {name[:200]!r} in {roots.base} cannot be read: {error.strerror or error}"
        raise RowError("image_missing", detail) from error
    finally:
        os.close(descriptor)
    _check_size(len(encoded), max_bytes)
    return encoded
