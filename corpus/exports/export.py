"""Writes a corpus version in another trainer's format.

    {output}/train.jsonl, or train/00000.jsonl, ...    the rows
    {output}/images/ab/ab12...png                      each image once, by the sha256 of its bytes
    {output}/left_out.jsonl                            rows that the format cannot hold, with the reason
    {output}/README.md                                 how to train on it, and the licences of its rows
    {output}/export.json                               what it is; written last: its presence means that all is there

While an export is written, its folder holds `export.unfinished.json`. An export that was interrupted starts again and
keeps the images that are there. The same version and settings give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from corpus.exports.formats import Format, check_row, image_extension
from corpus.exports.images import IMAGES, ImageFiles
from corpus.exports.readme import render_readme
from corpus.exports.rows import CorpusVersion, ExportRow, read_rows
from corpus.places import Place
from corpus.storage import file_sha256
from schemas.errors import ConfigError, RowError
from schemas.verdicts import Mode

DONE, UNFINISHED = "export.json", "export.unfinished.json"
README, LEFT_OUT, DATASET_INFO = "README.md", "left_out.jsonl", "dataset_info.json"
_RECORD_FORMAT = 1
_NAMED = (DONE, UNFINISHED, README, LEFT_OUT, DATASET_INFO)
_OURS = re.compile(rf"{IMAGES}|train|train(-\d+)?\.\w+|\.writing-.*|" + "|".join(map(re.escape, _NAMED)))
"""What an export may have in its folder. Nothing else is ever removed."""

Progress = Callable[[int, int], None]
"""Called now and then with the rows done and the rows in all."""


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file of rows. path: relative to the export's folder."""

    path: str
    sha256: str
    num_bytes: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class LicenceCount:
    """How many exported rows come from a source under a licence."""

    source: str
    licence: str
    num_think: int
    num_direct: int


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished export.

    folder: its path or address. corpus, version, digest: what was exported. num_images: images of rows, each counted
    as often as it is used. num_several: rows with several images. num_text_only: rows with none. left_out: rows that
    the format cannot hold, by reason. is_new: False if the export was already there.
    """

    folder: str
    kind: str
    corpus: str
    version: str
    digest: str
    modes: tuple[str, ...]
    shard_rows: int | None
    num_think: int
    num_direct: int
    num_images: int
    num_several: int
    num_text_only: int
    left_out: dict[str, int]
    licences: tuple[LicenceCount, ...]
    files: tuple[ExportedFile, ...]
    is_new: bool = True

    @property
    def num_rows(self) -> int:
        return self.num_think + self.num_direct

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values, without what depends on where and when it was made."""
        record = {key: value for key, value in asdict(self).items() if key not in ("folder", "is_new")}
        return {"format": _RECORD_FORMAT, **record}

    @classmethod
    def from_record(cls, record: dict[str, Any], folder: str) -> Exported:
        values = {key: value for key, value in record.items() if key != "format"}
        values["modes"] = tuple(values["modes"])
        values["licences"] = tuple(LicenceCount(**count) for count in values["licences"])
        values["files"] = tuple(ExportedFile(**file) for file in values["files"])
        return cls(folder=folder, is_new=False, **values)


def export_corpus(
    version: CorpusVersion,
    target: Format,
    output: str | Path,
    *,
    modes: Sequence[Mode] = tuple(Mode),
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Exports the rows of the modes and returns what was written, or what is there if it is this very export.

    shard_rows: rows of a file; by default what the format says. overwrite: a finished export in `output` is removed
    first; what is no export never is.

    Raises ConfigError: there is something else in `output`, or there are no rows of these modes. CorpusError: the
    version is damaged. StorageError.
    """
    num_rows = version.num_rows(modes)
    if not num_rows:
        raise ConfigError(f"{version.place} has no rows of mode {' or '.join(modes)} to export")
    place = Place(output)
    rows_per_file = shard_rows or target.shard_rows
    plan = {
        "format": _RECORD_FORMAT,
        "kind": target.name,
        "digest": version.manifest.digest,
        "modes": [str(mode) for mode in modes],
        "shard_rows": rows_per_file,
    }
    finished = _claim(place, plan, overwrite=overwrite)
    if finished is not None:
        return finished
    rows = _ordered(version, target, modes)
    if progress is not None:
        rows = _told(rows, num_rows, progress)
    tally = _Tally()
    with place.writing(LEFT_OUT) as left_out, left_out.open("wb") as file:
        kept = _kept(rows, target, tally, file)
        files = _write_files(place, target, kept, rows_per_file=rows_per_file)
    if not tally.left_out:
        place.remove(LEFT_OUT)
    exported = tally.exported(place, version, plan, files)
    assert exported.num_rows + sum(exported.left_out.values()) == num_rows, "the export lost rows"
    for name, content in _companions(exported, target).items():
        place.write(name, content)
    place.flush()
    place.write(DONE, _json(exported.to_record()))
    place.remove(UNFINISHED)
    return exported


def _claim(place: Place, plan: dict[str, Any], *, overwrite: bool) -> Exported | None:
    """Makes the folder ready for an export and says so in it; returns the export that is there if it is the same.

    Raises ConfigError: something else is there.
    """
    names = place.names()
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign or (names and not {DONE, UNFINISHED} & set(names)):
        what = (foreign or names)[0]
        raise ConfigError(f"{place} holds {what!r}, which no export made; choose an empty folder")
    is_finished = DONE in names and UNFINISHED not in names
    found = _read_record(place, DONE if is_finished else UNFINISHED) if names else {}
    is_same = {key: found.get(key) for key in plan} == plan
    if is_finished and not overwrite:
        if is_same:
            return Exported.from_record(found, str(place))
        there = f"{found.get('kind')} of {found.get('corpus')} {found.get('version')}"
        raise ConfigError(f"{place} holds another export ({there}); choose another folder, or pass --overwrite")
    place.write(UNFINISHED, _json(plan))
    for name in names:
        if name != UNFINISHED and not (name == IMAGES and is_same and not is_finished):
            place.remove(name)
    return None


def _read_record(place: Place, name: str) -> dict[str, Any]:
    """Returns the record of an export; an empty one if it is damaged, so that it is no export known."""
    try:
        record = json.loads(place.read(name) or b"")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _ordered(version: CorpusVersion, target: Format, modes: Sequence[Mode]) -> Iterator[ExportRow]:
    """Yields the rows to export; where images are files, the first row has one if any has.

    `datasets`, with which LLaMA-Factory and ms-swift load JSON, takes the type of a column from the first 10 MiB. If
    all lists of images there were empty, it would stop at the first that is not.
    """
    rows = enumerate(read_rows(version, modes))
    head = list(islice(rows, 1))
    further = islice(enumerate(read_rows(version, modes)), 1, None)  # opens nothing until it is asked
    lead = next((index for index, row in chain(head, further) if _can_lead(row, target)), 0)
    if lead:
        yield from islice(read_rows(version, modes), lead, lead + 1)
    yield from (row for index, row in chain(head, rows) if index != lead or not lead)


def _can_lead(row: ExportRow, target: Format) -> bool:
    return not target.has_image_files or (bool(row.images) and _why_left_out(row, target) is None)


def _why_left_out(row: ExportRow, target: Format) -> RowError | None:
    try:
        check_row(row, target)
        for image in row.images:
            image_extension(image)
    except RowError as error:
        return error
    return None


@dataclass(slots=True)
class _Tally:
    """What the exported rows are. rows: by mode, source and licence."""

    rows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    num_images: int = 0
    num_several: int = 0
    num_text_only: int = 0

    def count(self, row: ExportRow) -> None:
        self.rows[row.mode, row.source, row.licence] += 1
        self.num_images += len(row.images)
        self.num_several += len(row.images) > 1
        self.num_text_only += not row.images

    def exported(
        self, place: Place, version: CorpusVersion, plan: dict[str, Any], files: Sequence[ExportedFile]
    ) -> Exported:
        think, direct = str(Mode.THINK), str(Mode.DIRECT)
        origins = sorted({(source, licence) for _, source, licence in self.rows})
        return Exported(
            folder=str(place),
            kind=plan["kind"],
            corpus=version.manifest.name,
            version=version.manifest.version,
            digest=plan["digest"],
            modes=tuple(plan["modes"]),
            shard_rows=plan["shard_rows"],
            num_think=sum(count for (mode, _, _), count in self.rows.items() if mode == think),
            num_direct=sum(count for (mode, _, _), count in self.rows.items() if mode == direct),
            num_images=self.num_images,
            num_several=self.num_several,
            num_text_only=self.num_text_only,
            left_out=dict(sorted(self.left_out.items())),
            licences=tuple(LicenceCount(*o, self.rows[think, *o], self.rows[direct, *o]) for o in origins),
            files=tuple(files),
        )


def _told(rows: Iterator[ExportRow], num_rows: int, progress: Progress) -> Iterator[ExportRow]:
    for number, row in enumerate(rows, start=1):
        yield row
        progress(number, num_rows)


def _kept(rows: Iterator[ExportRow], target: Format, tally: _Tally, left_out: IO[bytes]) -> Iterator[ExportRow]:
    """Yields the rows that the format can hold and counts all of them; the others become lines of `left_out`."""
    for row in rows:
        error = _why_left_out(row, target)
        if error is None:
            tally.count(row)
            yield row
        else:
            tally.left_out[error.reason] += 1
            why = {"id": row.id, "mode": row.mode, "source": row.source, "reason": error.reason, "detail": error.detail}
            left_out.write(json.dumps(why, ensure_ascii=False).encode() + b"\n")


def _write_files(
    place: Place, target: Format, rows: Iterator[ExportRow], *, rows_per_file: int | None
) -> list[ExportedFile]:
    """Writes rows and images; at least one file, so that a loader finds what it is told to load."""
    images = ImageFiles(place)
    files: list[ExportedFile] = []
    while True:
        part = islice(rows, rows_per_file)
        first = list(islice(part, 1))
        if files and not first:
            break
        name = _file_name(target, len(files), is_only=rows_per_file is None)
        with place.writing(name) as path:
            num_rows = 0
            with target.open(path) as add:
                for row in chain(first, part):
                    add(row, [images.add(image) for image in row.images] if target.has_image_files else [])
                    num_rows += 1
            files.append(ExportedFile(name, file_sha256(path), path.stat().st_size, num_rows))
        if rows_per_file is None:
            break
    images.flush()
    return files


def _file_name(target: Format, index: int, *, is_only: bool) -> str:
    if is_only:
        return f"train.{target.suffix}"
    return f"train/{index:05d}.{target.suffix}" if target.has_image_files else f"train-{index:06d}.{target.suffix}"


def _companions(exported: Exported, target: Format) -> dict[str, bytes]:
    """Returns what stands beside the rows: the README, and for LLaMA-Factory its list of data sets."""
    name = dataset_name(exported.corpus)
    data = f"train.{target.suffix}" if exported.shard_rows is None else "train"
    companions = {README: render_readme(exported, name=name, data=data).encode()}
    if target.name == "llama-factory":
        entry = {
            "file_name": data,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        }
        companions[DATASET_INFO] = _json({name: entry})
    return companions


def dataset_name(corpus: str) -> str:
    """Returns the name of a corpus as the name of a data set on a command line."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", corpus).strip("-") or "corpus"
