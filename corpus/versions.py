"""Versions of a corpus: folders `v0001`, `v0002`, ... that are either complete or not there.

A version is built in `.building`, checked, given its `manifest.json` last, and renamed; readers look for folders with
a manifest, so they never see half a version. Building the same corpus again makes no new version.

A version that continues the one before it holds that one's shards under the same paths, as hard links where the disk
has them, and its new rows in further shards: no published shard is ever written again, and each version is whole by
itself, so that any other can be deleted.

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpus.croissant import CroissantInputs, croissant_record
from corpus.lineage import MARK_SCHEMA, num_marks_changed, read_marks, write_marks
from corpus.storage import file_sha256, locked_folder, storage_errors, sync, write_bytes, write_text
from corpus.writer import ShardInfo, shard_path, write_corpus_shard
from schemas.errors import ConfigError, CorpusError, RowError
from schemas.fates import StageCount
from schemas.rows import LABELLED_SCHEMA
from schemas.verdicts import Mode

MANIFEST = "manifest.json"
BUILDING = ".building"
LATEST = "latest"
CARD, REPORT, FIGURES, FATES, MARKS = "README.md", "report.html", "report.json", "fates.parquet", "marks.parquet"
CROISSANT = "croissant.json"
COMPANIONS = (CARD, CROISSANT, FATES, MARKS, REPORT, FIGURES)
"""What every version holds beside its shards."""
_CHECKED = (CARD, CROISSANT, FATES, MARKS)
"""Those whose checksums are in the manifest, though not in the corpus digest. The report tells what the run paid, too:
a run that was killed and started again pays otherwise for the same corpus, and its manifest must be the same."""

_FORMAT = 2
"""Format 1 had no lineage, marks and history; versions of it are read, and never continued."""

_SEEN = ".seen.json"
_VERSION_NAME = re.compile(r"v(\d{4,})")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a version that is not a shard. path: relative to the version's folder."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class VersionChange:
    """One line of the change log: what a version changed.

    created: ISO 8601 time. base: name of the version that it continues, "" if it holds no shard of an earlier one.
    num_think, num_direct: rows that it holds. num_added_*: of them, those in shards of its own. num_vanished: rows
    whose source lost them, or that the run let go, since the base. num_returned: rows that were marked in the base and
    are back. note: "" or why it holds no shard of the version before.
    """

    version: str
    created: str
    base: str
    num_think: int
    num_direct: int
    num_added_think: int
    num_added_direct: int
    num_vanished: int
    num_returned: int
    note: str = ""

    @property
    def num_added(self) -> int:
        return self.num_added_think + self.num_added_direct

    @property
    def is_news(self) -> bool:
        """Whether it changes anything."""
        return bool(self.num_added or self.num_vanished or self.num_returned)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version is. Its presence means that the version is complete.

    created: ISO 8601 time, given by the caller; not part of the digest. recipe, inputs: digests (hex) of the run's
    configuration and of its input. lineage: digest of the rules by which rows are published; a version continues
    another only under the same. shards: in order of path, relative to the version's folder. counts: the conservation
    law of each stage, in order. num_marked: rows that the run no longer has. history: the change log, oldest first;
    the last line is this version's own.
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
    lineage: str = ""
    num_marked: int = 0
    history: tuple[VersionChange, ...] = ()

    @property
    def changes(self) -> VersionChange:
        """This version's line of the change log. All rows of a version of format 1 count as added."""
        if self.history:
            return self.history[-1]
        think, direct = self.num_think, self.num_direct
        return VersionChange(self.version, self.created, "", think, direct, think, direct, 0, 0)

    @property
    def base(self) -> str:
        """Name of the version that this one continues, "" if it starts anew."""
        return self.changes.base

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


@dataclass(frozen=True, slots=True)
class Base:
    """The version that a new one continues.

    shards: those it takes over: all but the damaged ones. damage: one line for each of those; their rows are written
    again as far as the run has them.
    """

    folder: Path
    manifest: Manifest
    shards: tuple[ShardInfo, ...]
    damage: tuple[str, ...] = ()

    @property
    def shard_paths(self) -> list[Path]:
        return [self.folder / shard.path for shard in self.shards]

    @property
    def marks(self) -> pa.Table:
        return read_marks(self.folder / MARKS)

    def next_shard_number(self, mode: Mode) -> int:
        """Returns the number that the first new shard of a mode gets."""
        paths = [PurePosixPath(shard.path) for shard in self.manifest.shards]
        return max((int(path.stem) + 1 for path in paths if path.parent.name == mode), default=0)


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


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds a corpus folder for this process while a version is made or removed; waits for another that does so.

    Raises StorageError: the folder cannot be used.
    """
    held = f"another process makes a version in {folder}; waiting for it"
    with locked_folder(Path(folder), what="corpus folder", on_held=lambda _: _LOG.info("%s", held)):
        yield


def find_base(folder: str | Path, *, name: str, lineage: str) -> Base | None:
    """Returns the latest version if a new one may continue it: made under the same name and lineage.

    Damaged shards are left behind and named in the log. A file that has been checked before and has kept its size and
    time since is not read again. Raises StorageError.
    """
    latest = latest_version(folder)
    if latest is None:
        return None
    try:
        manifest = load_manifest(latest)
        if (manifest.name, manifest.lineage) != (name, lineage):
            return None
        read_marks(latest / MARKS)
    except CorpusError as error:
        _LOG.warning("%s is left as it is, and a new version is made: %s", latest, error)
        return None
    seen = _read_seen(Path(folder))
    problems = {
        shard: problem
        for shard in manifest.shards
        if seen.get(shard.sha256) != _identity(latest / shard.path) and (problem := file_damage(latest, shard))
    }
    for problem in problems.values():
        _LOG.warning("%s is damaged; its rows are written anew: %s", latest, problem)
    healthy = tuple(shard for shard in manifest.shards if shard not in problems)
    return Base(latest, manifest, healthy, tuple(problems.values()))


def begin_version(folder: str | Path, base: Base | None = None) -> Path:
    """Returns a folder to build the next version in: empty but for the shards of the base.

    What an interrupted build left there is removed. The caller holds the folder (`locked`). Raises StorageError.
    """
    building = Path(folder) / BUILDING
    with storage_errors(building, "prepare"):
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(parents=True)
        for shard in base.shards if base else ():
            assert base is not None
            _take_over(base.folder / shard.path, building / shard.path)
    return building


def _take_over(path: Path, target: Path) -> None:
    """Makes the same file under another name: a hard link, or a copy where the disk has none. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def discard_build(building: Path) -> None:
    """Removes what was built. Raises StorageError."""
    with storage_errors(building, "remove"):
        shutil.rmtree(building)


def version_change(building: Path, shards: Sequence[ShardInfo], base: Base | None, *, created: str) -> VersionChange:
    """Returns what the version being built changes. shards: its own ones, without the base's."""
    think, direct = sum(shard.num_think for shard in shards), sum(shard.num_direct for shard in shards)
    version = next_version_name(building.parent)
    latest = latest_version(building.parent)
    if base is None:
        note = "" if latest is None else f"made by other rules than {latest.name}, or anew"
        return VersionChange(version, created, "", think, direct, think, direct, 0, 0, note)
    marked, returned = num_marks_changed(base.marks, read_marks(building / MARKS))
    return VersionChange(
        version,
        created,
        base.manifest.version,
        think + sum(shard.num_think for shard in base.shards),
        direct + sum(shard.num_direct for shard in base.shards),
        think,
        direct,
        marked,
        returned,
        f"{len(base.damage)} damaged shards of {base.manifest.version} were left behind" if base.damage else "",
    )


def version_history(folder: str | Path) -> tuple[VersionChange, ...]:
    """Returns the change log up to the latest version; none if there is no version or it cannot be read."""
    latest = latest_version(folder)
    try:
        manifest = None if latest is None else load_manifest(latest)
    except CorpusError:
        return ()
    return () if manifest is None else manifest.history or (manifest.changes,)


def commit_version(
    building: Path,
    *,
    name: str,
    created: str,
    recipe: str,
    inputs: str,
    shards: Sequence[ShardInfo],
    counts: Mapping[str, StageCount],
    lineage: str = "",
    licence: str = "other",
    base: Base | None = None,
) -> Committed:
    """Checks what was built, writes its description and, last, the manifest, and gives the folder its version name.

    licence: of the corpus as a whole, for the description. shards: those written for this version; the base's come on
    top. A mode without rows gets one empty shard: a configuration that matches no file would keep `datasets` from
    loading the others too. If the latest version is the same corpus and undamaged, the build is discarded and that
    version returned.

    Raises CorpusError: a file is missing, altered or not of the build, or rows are unaccounted for. StorageError: the
    disk fails. In both cases the versions stay as they were.
    """
    folder = building.parent
    version = next_version_name(folder)
    if not (building / MARKS).exists():
        write_marks(MARK_SCHEMA.empty_table(), building / MARKS)
    change = version_change(building, shards, base, created=created)
    own = [replace(_relative(building, shard), since=version) for shard in shards]
    listed = _with_both_modes(building, [*(base.shards if base else ()), *own])
    described = croissant_record(CroissantInputs(name, version, created, licence, listed, building))
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    write_bytes(building / CROISSANT, text.encode("utf-8", "replace"))
    manifest = Manifest(
        name=name,
        version=version,
        created=created,
        recipe=recipe,
        inputs=inputs,
        digest=corpus_digest(listed),
        shards=listed,
        files=_companions(building),
        counts=dict(counts),
        lineage=lineage,
        num_marked=_num_rows(building / MARKS),
        history=(*version_history(folder), change),
    )
    checked = {shard.path for shard in base.shards} if base else set()
    problems = _damage(building, manifest, checked) or [*_misplaced(building, own), *unaccounted(building, manifest)]
    if problems:
        raise CorpusError(f"the new version of corpus {name} cannot be published:\n" + _as_lines(problems))
    same = _same_corpus(folder, manifest) if base is None else None if change.is_news or base.damage else base.folder
    if same is not None:
        discard_build(building)
        _point_latest_to(same)
        return Committed(same, load_manifest(same), is_new=False)
    version_folder = _publish(building, manifest)
    _write_seen(folder, version_folder, manifest)
    return Committed(version_folder, manifest, is_new=True)


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
    if record.get("checksum") != manifest_checksum(record) or manifest.digest != corpus_digest(manifest.shards):
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
            empty = write_corpus_shard(
                LABELLED_SCHEMA.empty_table(), shard_path(building, mode, 0), read_image=_no_image, recipe=""
            )
            shards = [*shards, _relative(building, empty)]
    return tuple(sorted(shards, key=lambda shard: shard.path))


def _no_image(sha256: str) -> bytes:
    raise RowError("image_missing", f"an empty shard has no image {sha256}")


def _companions(building: Path) -> tuple[FileInfo, ...]:
    missing = [name for name in COMPANIONS if not (building / name).is_file()]
    if missing:
        raise CorpusError(f"the version in {building} is incomplete: {', '.join(missing)} not written")
    return tuple(FileInfo(name, file_sha256(building / name), (building / name).stat().st_size) for name in _CHECKED)


def _damage(folder: Path, manifest: Manifest, checked: Collection[str] = ()) -> list[str]:
    """Returns one line for each file of a version that is missing, altered, or foreign to the manifest.

    checked: paths of files that need not be read again.
    """
    expected: list[ShardInfo | FileInfo] = [*manifest.shards, *manifest.files]
    found = (file_damage(folder, file) for file in expected if file.path not in checked)
    problems = [problem for problem in found if problem]
    listed = {file.path for file in expected}
    for path in sorted((folder / "data").rglob("*.parquet")):
        name = path.relative_to(folder).as_posix()
        if name not in listed:
            problems.append(f"{name}: not in the manifest, yet it would be loaded with the corpus")
    return problems


def file_damage(folder: Path, file: ShardInfo | FileInfo) -> str:
    """Returns what is wrong with one file of a version, "" if nothing is. Raises StorageError: it cannot be read."""
    path = folder / file.path
    if not path.is_file():
        return f"{file.path}: missing"
    if path.stat().st_size != file.num_bytes:
        return f"{file.path}: altered, {path.stat().st_size:,} bytes instead of {file.num_bytes:,}"
    return "" if file_sha256(path) == file.sha256 else f"{file.path}: altered, its sha256 is not {file.sha256}"


def _identity(path: Path) -> list[int]:
    """Returns what tells without reading that a file is the one seen before; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _read_seen(folder: Path) -> dict[str, list[int]]:
    """Returns the identities of shards whose checksums were right, by sha256. A note that is damaged counts as none."""
    try:
        seen = json.loads((folder / _SEEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _write_seen(folder: Path, version_folder: Path, manifest: Manifest) -> None:
    seen = {shard.sha256: _identity(version_folder / shard.path) for shard in manifest.shards}
    write_text(folder / _SEEN, json.dumps(seen))


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


def unaccounted(building: Path, manifest: Manifest) -> list[str]:
    """Returns what breaks the conservation law between the rows read, the corpus, and the rows that left."""
    if not manifest.counts:
        return ["no stage was counted, so its rows cannot be accounted for"]
    num_in = next(iter(manifest.counts.values())).num_in
    num_left = sum(count.num_dropped + count.num_quarantined for count in manifest.counts.values())
    num_fates = _num_rows(building / FATES)
    problems = []
    if num_fates != num_left:
        problems.append(f"{FATES}: explains {num_fates} rows, but {num_left} were dropped or quarantined")
    if num_in + manifest.num_marked != manifest.num_rows + num_left:
        problems.append(
            f"{num_in} rows were read and {manifest.num_marked} published ones were not, but {manifest.num_rows} are "
            f"in the corpus and {num_left} left"
        )
    return problems


def _num_rows(path: Path) -> int:
    try:
        with storage_errors(path, "read"):
            return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, ValueError) as error:  # a damaged column name is no Unicode
        raise CorpusError(f"{path} is not a Parquet file: {error}") from error


def _same_corpus(folder: Path, manifest: Manifest) -> Path | None:
    """Returns the latest version if it is the same corpus, by the same rules, and undamaged."""
    latest = latest_version(folder)
    if latest is None:
        return None
    try:
        found = load_manifest(latest)
        is_same = (found.digest, found.lineage) == (manifest.digest, manifest.lineage) and not found.num_marked
        return latest if is_same and verify_version(latest) else None
    except CorpusError as error:
        _LOG.warning("%s is left as it is, and a new version is made: %s", latest, error)
        return None


def _publish(building: Path, manifest: Manifest) -> Path:
    record = _manifest_record(manifest)
    version_folder = building.parent / manifest.version
    write_text(building / MANIFEST, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    with storage_errors(version_folder, "publish"):
        for path in [building / shard.path for shard in manifest.shards]:
            path.chmod(0o444)  # Versions share the file, so that an edit in place would reach them all.
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
        "lineage": manifest.lineage,
        "num_rows": {"think": manifest.num_think, "direct": manifest.num_direct},
        "num_marked": manifest.num_marked,
        "shards": [{key: value for key, value in asdict(shard).items() if key != "fates"} for shard in manifest.shards],
        "files": [asdict(file) for file in manifest.files],
        "counts": [{"stage": stage, **count.to_record()} for stage, count in manifest.counts.items()],
        "history": [asdict(change) for change in manifest.history],
    }
    return {**record, "checksum": manifest_checksum(record)}


def _manifest_from_record(record: dict[str, Any]) -> Manifest:
    if record["format"] not in (1, _FORMAT):
        raise ValueError(f"format {record['format']!r} is unknown, this program reads formats 1 and {_FORMAT}")
    is_old = record["format"] == 1
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
        lineage="" if is_old else record["lineage"],
        num_marked=0 if is_old else record["num_marked"],
        history=() if is_old else tuple(VersionChange(**change) for change in record["history"]),
    )


def manifest_checksum(record: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _as_lines(problems: Sequence[str]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)
