"""Versions of a corpus: folders `v0001`, `v0002`, ... that are either complete or not there.

A version is built in `.building`, checked, given its `manifest.json` last, and renamed; readers look for folders with
a manifest, so they never see half a version. Building the same corpus again makes no new version.

The corpus digest is what `sha256sum data/*/*.parquet | sha256sum` prints inside a version's folder, so that anyone can
check it without this project.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpus.storage import file_sha256, storage_errors, sync, write_text
from corpus.writer import ShardInfo, shard_path, write_corpus_shard
from schemas.errors import ConfigError, CorpusError, RowError
from schemas.fates import StageCount
from schemas.verdicts import Mode

MANIFEST = "manifest.json"
BUILDING = ".building"
LATEST = "latest"
CARD, REPORT, FIGURES, FATES = "README.md", "report.html", "report.json", "fates.parquet"
COMPANIONS = (CARD, FATES, REPORT, FIGURES)
"""What every version holds beside its shards."""
_CHECKED = (CARD, FATES)
"""Those whose checksums are in the manifest, though not in the corpus digest. The report tells what the run paid, too:
a run that was killed and started again pays otherwise for the same corpus, and its manifest must be the same."""

_FORMAT = 1
_VERSION_NAME = re.compile(r"v(\d{4,})")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a version that is not a shard. path: relative to the version's folder."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version is. Its presence means that the version is complete.

    created: ISO 8601 time, given by the caller; not part of the digest. recipe, inputs: digests (hex) of the run's
    configuration and of its input. shards: in order of path, relative to the version's folder. counts: the
    conservation law of each stage, in order.
    """

    name: str
    version: str
    created: str
    recipe: str
    inputs: str
    digest: str
    shards: tuple[ShardInfo, ...]
    files: tuple[FileInfo, ...]
    counts: Mapping[str, StageCount]

    @property
    def num_think(self) -> int:
        return sum(shard.num_think for shard in self.shards)

    @property
    def num_direct(self) -> int:
        return sum(shard.num_direct for shard in self.shards)

    @property
    def num_rows(self) -> int:
        return self.num_think + self.num_direct


@dataclass(frozen=True, slots=True)
class Committed:
    """The outcome of a build. is_new: False when the latest version already was this very corpus."""

    folder: Path
    manifest: Manifest
    is_new: bool


def corpus_digest(shards: Iterable[ShardInfo]) -> str:
    """Returns the sha256 (hex) over the shards' checksums and relative paths, in order of path."""
    lines = [f"{shard.sha256}  {shard.path}\n" for shard in sorted(shards, key=lambda shard: shard.path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def list_versions(folder: str | Path) -> list[Path]:
    """Returns the complete versions of a corpus folder, oldest first; none if the folder does not exist."""
    return [path for _, path in _numbered(Path(folder)) if (path / MANIFEST).is_file()]


def latest_version(folder: str | Path) -> Path | None:
    """Returns the newest complete version of a corpus folder, or None."""
    versions = list_versions(folder)
    return versions[-1] if versions else None


def find_version(corpus: str | Path) -> Path:
    """Returns the folder of the newest version in a corpus folder, or the folder itself if it is a version.

    Raises ConfigError: there is no finished version.
    """
    folder = Path(corpus)
    version = folder if (folder / MANIFEST).is_file() else latest_version(folder)
    if version is None:
        raise ConfigError(f"there is no finished corpus version in {folder}: run `bimode curate` first")
    return version.resolve()


def next_version_name(folder: str | Path) -> str:
    """Returns the name that the next new version will get. A number once used is not used again."""
    numbered = _numbered(Path(folder))
    return f"v{(numbered[-1][0] if numbered else 0) + 1:04d}"


def begin_version(folder: str | Path) -> Path:
    """Returns an empty folder to build the next version in. What an interrupted build left there is removed.

    One build at a time: the flow's concurrency limit sees to it. Raises StorageError.
    """
    building = Path(folder) / BUILDING
    with storage_errors(building, "prepare"):
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(parents=True)
    return building


def commit_version(
    building: Path,
    *,
    name: str,
    created: str,
    recipe: str,
    inputs: str,
    shards: Sequence[ShardInfo],
    counts: Mapping[str, StageCount],
) -> Committed:
    """Checks what was built, writes the manifest last, and gives the folder its version name.

    A mode without rows gets one empty shard: a configuration that matches no file would keep `datasets` from loading
    the others too. If the latest version is the same corpus and undamaged, the build is discarded and that version
    returned.

    Raises CorpusError: a file is missing, altered or not of the build, or rows are unaccounted for. StorageError: the
    disk fails. In both cases the versions stay as they were.
    """
    folder = building.parent
    listed = _with_both_modes(building, [_relative(building, shard) for shard in shards])
    files = _companions(building)
    version = next_version_name(folder)
    manifest = Manifest(name, version, created, recipe, inputs, corpus_digest(listed), listed, files, dict(counts))
    problems = _damage(building, manifest) or [*_misplaced(building, listed), *_unaccounted(building, manifest)]
    if problems:
        raise CorpusError(f"the new version of corpus {name} cannot be published:\n" + _as_lines(problems))
    same = _same_corpus(folder, manifest.digest)
    if same is not None:
        with storage_errors(building, "remove"):
            shutil.rmtree(building)
        _point_latest_to(same)
        return Committed(same, load_manifest(same), is_new=False)
    return Committed(_publish(building, manifest), manifest, is_new=True)


def load_manifest(version_folder: str | Path) -> Manifest:
    """Returns the manifest of a version.

    Raises CorpusError: when it is missing (the version was never finished), unreadable, or altered since.
    """
    path = Path(version_folder) / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(f"{version_folder} is not a finished corpus version: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise CorpusError(f"the manifest {path} cannot be read: {error}") from error
    try:
        manifest = _manifest_from_record(record)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CorpusError(f"the manifest {path} is damaged: {type(error).__name__}: {error}") from error
    if record.get("checksum") != _checksum(record) or manifest.digest != corpus_digest(manifest.shards):
        raise CorpusError(f"the manifest {path} was altered: its checksum does not fit; restore it or curate again")
    return manifest


def verify_version(version_folder: str | Path) -> Manifest:
    """Returns the manifest of a version after comparing every file with its checksum.

    Raises CorpusError: names each missing, altered or foreign file. StorageError: a file cannot be read.
    """
    folder = Path(version_folder)
    manifest = load_manifest(folder)
    problems = _damage(folder, manifest)
    if problems:
        raise CorpusError(f"corpus version {folder} is damaged:\n" + _as_lines(problems))
    return manifest


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    with storage_errors(folder, "list"):
        matches = [(_VERSION_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _relative(building: Path, shard: ShardInfo) -> ShardInfo:
    path = Path(shard.path)
    if path.is_absolute() or not (building / path).is_file():
        try:
            path = path.resolve().relative_to(building.resolve())
        except ValueError as error:
            raise CorpusError(f"shard {shard.path} does not lie in {building}") from error
    return replace(shard, path=path.as_posix(), fates=())


def _with_both_modes(building: Path, shards: list[ShardInfo]) -> tuple[ShardInfo, ...]:
    for mode in Mode:
        if not any(shard.path.startswith(f"data/{mode}/") for shard in shards):
            empty = write_corpus_shard([], shard_path(building, mode, 0), read_image=_no_image, recipe="")
            shards = [*shards, _relative(building, empty)]
    return tuple(sorted(shards, key=lambda shard: shard.path))


def _no_image(sha256: str) -> bytes:
    raise RowError("image_missing", f"an empty shard has no image {sha256}")


def _companions(building: Path) -> tuple[FileInfo, ...]:
    missing = [name for name in COMPANIONS if not (building / name).is_file()]
    if missing:
        raise CorpusError(f"the version in {building} is incomplete: {', '.join(missing)} not written")
    return tuple(FileInfo(name, file_sha256(building / name), (building / name).stat().st_size) for name in _CHECKED)


def _damage(folder: Path, manifest: Manifest) -> list[str]:
    """Returns one line for each file of a version that is missing, altered, or foreign to the manifest."""
    problems = []
    expected: list[ShardInfo | FileInfo] = [*manifest.shards, *manifest.files]
    for file in expected:
        path = folder / file.path
        if not path.is_file():
            problems.append(f"{file.path}: missing")
        elif path.stat().st_size != file.num_bytes:
            problems.append(f"{file.path}: altered, {path.stat().st_size:,} bytes instead of {file.num_bytes:,}")
        elif file_sha256(path) != file.sha256:
            problems.append(f"{file.path}: altered, its sha256 is not {file.sha256}")
    listed = {file.path for file in expected}
    for path in sorted((folder / "data").rglob("*.parquet")):
        name = path.relative_to(folder).as_posix()
        if name not in listed:
            problems.append(f"{name}: not in the manifest, yet it would be loaded with the corpus")
    return problems


def _misplaced(building: Path, shards: Sequence[ShardInfo]) -> list[str]:
    problems = []
    for shard in shards:
        allowed = {f"data/{Mode.THINK}": shard.num_direct == 0, f"data/{Mode.DIRECT}": shard.num_think == 0}
        if not allowed.get(str(PurePosixPath(shard.path).parent), False):
            problems.append(f"{shard.path}: holds {shard.num_think} thinking and {shard.num_direct} direct rows")
        path = building / shard.path
        if path.is_file() and (num_rows := _num_rows(path)) != shard.num_rows:
            problems.append(f"{shard.path}: holds {num_rows} rows instead of {shard.num_rows}")
    return problems


def _unaccounted(building: Path, manifest: Manifest) -> list[str]:
    """Returns what breaks the conservation law between the rows read, the corpus, and the rows that left."""
    if not manifest.counts:
        return ["no stage was counted, so its rows cannot be accounted for"]
    num_in = next(iter(manifest.counts.values())).num_in
    num_left = sum(count.num_dropped + count.num_quarantined for count in manifest.counts.values())
    num_fates = _num_rows(building / FATES)
    problems = []
    if num_fates != num_left:
        problems.append(f"{FATES}: explains {num_fates} rows, but {num_left} were dropped or quarantined")
    if num_in != manifest.num_rows + num_left:
        problems.append(f"{num_in} rows were read, but {manifest.num_rows} are in the corpus and {num_left} left")
    return problems


def _num_rows(path: Path) -> int:
    try:
        with storage_errors(path, "read"):
            return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} is not a Parquet file: {error}") from error


def _same_corpus(folder: Path, digest: str) -> Path | None:
    """Returns the latest version if it is the same corpus and undamaged."""
    latest = latest_version(folder)
    if latest is None:
        return None
    try:
        return latest if load_manifest(latest).digest == digest and verify_version(latest) else None
    except CorpusError as error:
        _LOG.warning("%s is left as it is, and a new version is made: %s", latest, error)
        return None


def _publish(building: Path, manifest: Manifest) -> Path:
    record = _manifest_record(manifest)
    version_folder = building.parent / manifest.version
    write_text(building / MANIFEST, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    with storage_errors(version_folder, "publish"):
        building.rename(version_folder)
        sync(building.parent)
    _point_latest_to(version_folder)
    return version_folder


def _point_latest_to(version_folder: Path) -> None:
    """Points the link `latest` to a version. It is a convenience: where links cannot be made, it is left out."""
    link = version_folder.parent / LATEST
    temporary = link.with_name(f".{LATEST}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(version_folder.name, target_is_directory=True)
        os.replace(temporary, link)
    except OSError as error:
        _LOG.warning("cannot point %s to %s: %s", link, version_folder.name, error)


def _manifest_record(manifest: Manifest) -> dict[str, Any]:
    record: dict[str, Any] = {
        "format": _FORMAT,
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "recipe": manifest.recipe,
        "inputs": manifest.inputs,
        "digest": manifest.digest,
        "num_rows": {"think": manifest.num_think, "direct": manifest.num_direct},
        "shards": [{key: value for key, value in asdict(shard).items() if key != "fates"} for shard in manifest.shards],
        "files": [asdict(file) for file in manifest.files],
        "counts": [{"stage": stage, **count.to_record()} for stage, count in manifest.counts.items()],
    }
    return {**record, "checksum": _checksum(record)}


def _manifest_from_record(record: dict[str, Any]) -> Manifest:
    if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']!r} is unknown, this program reads format {_FORMAT}")
    shards = tuple(ShardInfo(**shard) for shard in record["shards"])
    files = tuple(FileInfo(**file) for file in record["files"])
    for path in [shard.path for shard in shards] + [file.path for file in files]:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"path {path!r} leaves the version's folder")
    return Manifest(
        name=record["name"],
        version=record["version"],
        created=record["created"],
        recipe=record["recipe"],
        inputs=record["inputs"],
        digest=record["digest"],
        shards=shards,
        files=files,
        counts={count["stage"]: StageCount.from_record(count) for count in record["counts"]},
    )


def _checksum(record: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _as_lines(problems: Sequence[str]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)
