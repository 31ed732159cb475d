"""Versions on object storage: copies of those on a disk, each there as a whole or not at all.

A corpus folder may be an address (s3://bucket/corpus). Its versions are then made on the worker's disk and sent: files
first, the manifest last, so that a reader never takes half a version for one. A shard that the version before has there
already is copied within the store. Programs read a version from a copy of their own, whose every file is held against
its checksum.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from corpus.places import Place, is_address
from corpus.storage import empty_folder, storage_errors
from corpus.versions import (
    COMPANIONS,
    MANIFEST,
    Manifest,
    find_version,
    latest_version,
    load_manifest,
    locked,
    verify_version,
)
from schemas.errors import ConfigError, CorpusError

CACHE_VARIABLE = "BIMODE_CACHE"
"""Names the folder of the copies; `bimode` in the user's cache folder by default."""

_LOG = logging.getLogger(__name__)
_VERSION_NAME = re.compile(r"v\d{4,}")
_FETCHING = ".fetching"


def remote_versions(address: str) -> list[str]:
    """Returns the names of the complete versions at an address, oldest first. Raises StorageError."""
    place = Place(address)
    names = [name for name in place.names() if _VERSION_NAME.fullmatch(name)]
    return sorted((name for name in names if place.has_file(f"{name}/{MANIFEST}")), key=lambda name: int(name[1:]))


def send_version(version: Path, address: str) -> int:
    """Makes a version on the disk one at an address, unless it is there; returns the bytes sent.

    An interrupted sending leaves no version, and the next does it again. Raises CorpusError: another version of that
    name is there. StorageError: the store fails.
    """
    place, manifest = Place(address), load_manifest(version)
    name = manifest.version
    there = place.read(f"{name}/{MANIFEST}")
    if there is not None:
        if there != (version / MANIFEST).read_bytes():
            raise CorpusError(f"{place.address(name)} is another version of that name: choose another address")
        return 0
    held = _held_shards(place, manifest)
    num_bytes = 0
    for path in _files(version, manifest):
        if path in held:
            place.copy(held[path], f"{name}/{path}")
            continue
        with place.writing(f"{name}/{path}") as copy, storage_errors(version / path, "send"):
            shutil.copyfile(version / path, copy)
            num_bytes += copy.stat().st_size
    with storage_errors(version / MANIFEST, "read"):
        place.write(f"{name}/{MANIFEST}", (version / MANIFEST).read_bytes())
    _LOG.info("%s is at %s, %.1f MB sent", name, place.address(name), num_bytes / 1e6)
    return num_bytes


def fetch_version(address: str, folder: Path) -> Path:
    """Returns a checked copy, in a folder on the disk, of the version that an address names; makes it if need be.

    address: of a version, or of a corpus, which means its newest version. A copy that is damaged is made again.

    Raises ConfigError: there is no finished version. CorpusError: a file there is damaged. StorageError.
    """
    place, name = _named(address)
    with locked(folder):
        copy = folder / name
        if (copy / MANIFEST).is_file():
            try:
                if (copy / MANIFEST).read_bytes() == place.read(f"{name}/{MANIFEST}"):
                    verify_version(copy)
                    return copy
            except CorpusError as error:
                _LOG.warning("%s is fetched again: %s", copy, error)
        with empty_folder(folder / _FETCHING) as fetching:
            _fetch(place, f"{name}/{MANIFEST}", fetching / MANIFEST)
            for path in _files(fetching, load_manifest(fetching), is_listed=True):
                if place.has_file(f"{name}/{path}"):
                    _fetch(place, f"{name}/{path}", fetching / path)
            verify_version(fetching)
            with storage_errors(copy, "replace"):
                if copy.exists():
                    shutil.rmtree(copy)
                fetching.rename(copy)
    return copy


def local_version(named: str | Path) -> Path:
    """Returns the folder of a version on the disk, whatever a person names: a folder, or an address, which is fetched.

    Raises ConfigError: there is no finished version. CorpusError, StorageError: it cannot be fetched.
    """
    if not is_address(named):
        return find_version(named)
    return fetch_version(str(named), cache_folder(str(named)))


def restore_latest(address: str, folder: Path) -> None:
    """Brings the newest version at an address into an empty corpus folder, for the next version to continue it.

    Raises CorpusError, StorageError.
    """
    if latest_version(folder) is None and (names := remote_versions(address)):
        _LOG.info("%s has no version; %s is fetched from %s", folder, names[-1], address)
        fetch_version(f"{address.rstrip('/')}/{names[-1]}", folder)


def remove_remote(address: str, names: Sequence[str]) -> None:
    """Removes versions at an address, each manifest first, so that no reader finds half of one. Raises StorageError."""
    place = Place(address)
    for name in names:
        place.remove(f"{name}/{MANIFEST}")
        place.remove(name)


def cache_folder(address: str) -> Path:
    """Returns where copies of the versions at an address are kept."""
    root = os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bimode")
    corpus = re.sub(r"/v\d{4,}/?$", "", address).rstrip("/")
    return Path(root) / "versions" / hashlib.sha256(corpus.encode()).hexdigest()[:16]


def _named(address: str) -> tuple[Place, str]:
    """Returns the corpus at an address, and the name of the version meant."""
    parent, _, name = address.rstrip("/").rpartition("/")
    if _VERSION_NAME.fullmatch(name) and Place(parent).has_file(f"{name}/{MANIFEST}"):
        return Place(parent), name
    names = remote_versions(address)
    if not names:
        raise ConfigError(f"there is no finished corpus version at {address}")
    return Place(address), names[-1]


def _held_shards(place: Place, manifest: Manifest) -> dict[str, str]:
    """Returns the shards that the base has at the place, by path: their names there."""
    if not manifest.base or not place.has_file(f"{manifest.base}/{MANIFEST}"):
        return {}
    return {shard.path: f"{manifest.base}/{shard.path}" for shard in manifest.shards if shard.since != manifest.version}


def _files(version: Path, manifest: Manifest, *, is_listed: bool = False) -> list[str]:
    """Returns the paths of a version's files but for the manifest. is_listed: also those that are not there."""
    listed = [*(shard.path for shard in manifest.shards), *(file.path for file in manifest.files), *COMPANIONS]
    return [path for path in dict.fromkeys(listed) if is_listed or (version / path).is_file()]


def _fetch(place: Place, name: str, path: Path) -> None:
    with place.fetched(name) as copy, storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(copy, path)
