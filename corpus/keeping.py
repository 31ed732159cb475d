"""Which versions of a corpus are kept: pins, and the removal of the others.

    {corpus}/.pins/v0002/{holder}.json

Any version but the latest may be removed, as each is whole by itself: shards that a later one shares stay on the disk
under that one's name. A pin keeps a version, for good (a paper, a release) or until a file appears (a training run
keeps its version until its result is there, so a run that was stopped finds its rows again).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from corpus.storage import storage_errors, sync, write_text
from corpus.versions import list_versions, locked
from schemas.errors import ConfigError

PINS = ".pins"
_REMOVING = ".removing-"
_HOLDER = re.compile(r"[\w.-]{1,120}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pin:
    """A reason to keep a version.

    holder: who keeps it, unique among the pins of a version. why: for people. since: ISO 8601 time. until: path of the
    result of a run; once it exists, or the folder of all runs does not, the pin holds no longer. "" is for good.
    """

    version: str
    holder: str
    why: str
    since: str
    until: str = ""

    @property
    def holds(self) -> bool:
        if not self.until:
            return True
        result = Path(self.until)
        return result.parent.parent.is_dir() and not result.exists()


@dataclass(frozen=True, slots=True)
class Collected:
    """What a removal did, or would do.

    kept: why, by the version's name. num_bytes: those set free; shards that a kept version shares do not count.
    """

    removed: tuple[str, ...]
    kept: dict[str, str]
    num_bytes: int


def pin_version(folder: str | Path, pin: Pin) -> None:
    """Keeps a version; a pin of the same holder is replaced.

    Raises ConfigError: there is no such version, or the holder's name is no file name. StorageError.
    """
    with locked(folder):
        names = [path.name for path in list_versions(folder)]
        if pin.version not in names:
            raise ConfigError(f"{folder} has no version {pin.version}; it has {', '.join(names) or 'none'}")
        write_text(_pin_path(folder, pin.version, pin.holder), json.dumps(asdict(pin), indent=2) + "\n")


def unpin_version(folder: str | Path, version: str, holder: str) -> None:
    """Takes a pin away. Raises ConfigError: there is none. StorageError."""
    path = _pin_path(folder, version, holder)
    with locked(folder), storage_errors(path, "remove"):
        if not path.exists():
            holders = [pin.holder for pin in list_pins(folder) if pin.version == version]
            raise ConfigError(f"{holder} does not pin {version}; pinned by: {', '.join(holders) or 'nobody'}")
        path.unlink()


def list_pins(folder: str | Path) -> list[Pin]:
    """Returns all pins, whether or not they hold still, by version and holder.

    Raises StorageError: one cannot be read; guessing would remove what somebody needs.
    """
    return sorted(_pins(Path(folder)), key=lambda pin: (pin.version, pin.holder))


def collect_versions(folder: str | Path, *, keep: int, is_dry: bool = False) -> Collected:
    """Removes all versions but the newest `keep` (at least one) and those that are pinned.

    A version is renamed before it is deleted, so that no reader ever finds half of one; what an interrupted removal
    left is removed by the next. Raises StorageError.
    """
    assert keep >= 1, "the latest version is never removed"
    folder = Path(folder)
    with locked(folder):
        versions = list_versions(folder)
        kept = {path.name: f"one of the newest {keep}" for path in versions[-keep:]}
        for pin in list_pins(folder):
            if pin.holds and any(path.name == pin.version for path in versions):
                kept.setdefault(pin.version, f"pinned by {pin.holder}: {pin.why}")
        gone = [path for path in versions if path.name not in kept]
        num_bytes = _freed_bytes(gone, [path for path in versions if path.name in kept])
        if not is_dry:
            _remove(folder, gone)
    return Collected(tuple(path.name for path in gone), kept, num_bytes)


def _remove(folder: Path, gone: list[Path]) -> None:
    for path in gone:
        with storage_errors(path, "remove"):
            path.rename(folder / f"{_REMOVING}{path.name}")
            sync(folder)
    for path in folder.glob(f"{_REMOVING}*"):
        with storage_errors(path, "remove"):
            shutil.rmtree(path)
    for path in gone:
        with storage_errors(path, "remove"):
            shutil.rmtree(folder / PINS / path.name, ignore_errors=True)


def _freed_bytes(gone: list[Path], kept: list[Path]) -> int:
    held = {file.stat().st_ino for version in kept for file in version.rglob("*") if file.is_file()}
    freed = {}
    for version in gone:
        for file in version.rglob("*"):
            if file.is_file() and file.stat().st_ino not in held:
                freed[file.stat().st_ino] = file.stat().st_size
    return sum(freed.values())


def _pins(folder: Path) -> Iterator[Pin]:
    for path in folder.glob(f"{PINS}/*/*.json"):
        with storage_errors(path, "read"):
            try:
                yield Pin(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise OSError(f"it is no pin ({error}); delete it or restore it") from error


def _pin_path(folder: str | Path, version: str, holder: str) -> Path:
    if not _HOLDER.fullmatch(holder) or not re.fullmatch(r"v\d{4,}", version):
        raise ConfigError(
            f"{holder!r} cannot pin {version!r}: a holder is letters, digits, dots, dashes; a version v0001"
        )
    return Path(folder) / PINS / version / f"{holder}.json"
