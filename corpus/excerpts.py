"""The rows a report shows: picked by their ids, so that the same corpus shows the same rows, with small images.

Texts are kept as they are; clipping and escaping belong to the page.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from corpus.storage import storage_errors
from corpus.tally import corpus_shards
from schemas.errors import BimodeError, CorpusError, RowError
from schemas.fates import Exit, Fate
from schemas.verdicts import Heuristic, Mode

IMAGE_SIDE_PIXELS = 384
IMAGE_BYTES = 40_000
"""An image is made smaller until it takes no more than so many bytes: thirty rows of three images stay under 5 MB."""

MAX_IMAGES = 3
"""Images shown of one row; the report says how many there are in all."""

MAX_SOURCE_PIXELS = 64_000_000
"""Larger images are not decoded for the report, whatever the limits of the run were."""

_FATES_PER_REASON = 3


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A corpus row as a report shows it. evidence: why it has its mode, as a sentence. images: data URLs of the first
    `MAX_IMAGES` images, None where one cannot be decoded. num_images: how many the row has."""

    id: str
    mode: str
    topic: str
    kind: str
    answer_type: str
    source: str
    origin: str
    licence: str
    teacher: str
    reasoner: str
    question: str
    choices: tuple[str, ...]
    reference: str | None
    reasoning: str
    answer: str
    evidence: str
    images: tuple[str | None, ...] = ()
    num_images: int = 0


@dataclass(frozen=True, slots=True)
class ShownFate:
    """A row that left the pipeline as a report shows it. images, num_images: as of `ShownRow`."""

    fate: Fate
    images: tuple[str | None, ...] = ()


def pick_rows(version_folder: str | Path, *, num_rows: int = 20) -> tuple[ShownRow, ...]:
    """Returns rows of both modes in equal number, thinking ones first; a mode with too few leaves room to the other.

    The choice is random to the eye and depends on the ids alone. Raises CorpusError, StorageError: a shard is damaged.
    """
    places: dict[str, list[_Place]] = {}
    for mode in Mode:
        shards = [path for path in corpus_shards(version_folder) if path.parent.name == mode]
        places[mode] = heapq.nsmallest(num_rows, _places(shards, ["id"]))
    think, direct = places[Mode.THINK], places[Mode.DIRECT]
    num_think = min(len(think), max(num_rows - num_rows // 2, num_rows - len(direct)))
    picked = [*think[:num_think], *direct[: num_rows - num_think]]
    return tuple(_shown_row(record) for record in _records(picked))


def pick_fates(
    fates_path: str | Path, *, num_fates: int = 10, read_image: Callable[[str], bytes]
) -> tuple[ShownFate, ...]:
    """Returns rows that were dropped or quarantined: one of each reason in turn, then a second one, up to three.

    Raises CorpusError, StorageError: the file is damaged. An image that cannot be read is shown as missing.
    """
    by_reason: dict[tuple[str, ...], list[_Place]] = defaultdict(list)
    for place in _places([Path(fates_path)], ["origin", "exit", "stage", "reason"]):
        group = by_reason[place.values[1:]]
        group.append(place)
        if len(group) > _FATES_PER_REASON:
            group.remove(max(group))
    ordered = [sorted(by_reason[reason]) for reason in sorted(by_reason)]
    turns = [group[i] for i in range(_FATES_PER_REASON) for group in ordered if i < len(group)]
    return tuple(_shown_fate(record, read_image) for record in _records(turns[:num_fates]))


def evidence_sentence(record: dict[str, Any]) -> str:
    """Returns why a corpus record has its mode, for a person."""
    if record["heuristic"] == Heuristic.DIFFICULTY:
        probability = record["probability"]
        if probability is None:
            return "Difficulty heuristic: the teacher's verdict, without a probability."
        return f"Difficulty heuristic: needs reasoning with probability {probability:.2f}."
    unscored = record["num_sampled"] - record["num_scored"]
    sentence = f"Performance heuristic: {record['num_right']} of {record['num_scored']} scored answers right"
    sentence += f", {unscored} unscored" if unscored else ""
    return f"{sentence}; {record['num_sampled']} drawn{' (audit)' if record['is_audit'] else ''}."


def thumbnail(encoded: bytes) -> str | None:
    """Returns an image as a data URL of at most `IMAGE_SIDE_PIXELS` a side and `IMAGE_BYTES`, or None if it cannot be
    decoded. Its transparent parts become white."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_SOURCE_PIXELS:
                return None
            image.draft("RGB", (2 * IMAGE_SIDE_PIXELS, 2 * IMAGE_SIDE_PIXELS))
            small = image.convert("RGB" if image.mode in ("RGB", "L", "YCbCr") else "RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    small.thumbnail((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS), reducing_gap=2.0)
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small if small.mode == "RGBA" else None)
    for side in (IMAGE_SIDE_PIXELS, 256, 128, 64):
        flat.thumbnail((side, side))
        for file_format, options in (("PNG", {}), ("JPEG", {"quality": 85}), ("JPEG", {"quality": 60})):
            buffer = io.BytesIO()
            flat.save(buffer, file_format, **options)
            if buffer.tell() <= IMAGE_BYTES:
                content = base64.b64encode(buffer.getvalue()).decode("ascii")
                return f"data:image/{file_format.lower()};base64,{content}"
    return None


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """Where a row lies, ordered by a hash of its first value. values: of the columns asked for."""

    rank: str
    path: Path
    row_group: int
    index: int
    values: tuple[str, ...]


def _places(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[_Place]:
    for path in paths:
        with _reading(path), pq.ParquetFile(path) as file:
            for row_group in range(file.num_row_groups):
                table = file.read_row_group(row_group, columns=list(columns))
                for index, values in enumerate(zip(*(table[column].to_pylist() for column in columns), strict=True)):
                    # Hashed anew: the audit slice is chosen by id as well, and must not fill the sample.
                    rank = hashlib.sha256(f"report:{values[0]}".encode()).hexdigest()
                    yield _Place(rank, path, row_group, index, values)


def _records(places: Sequence[_Place]) -> list[dict[str, Any]]:
    """Returns the whole rows at the places, in their order; each row group is read once."""
    by_group: dict[tuple[Path, int], list[_Place]] = defaultdict(list)
    for place in places:
        by_group[place.path, place.row_group].append(place)
    records: dict[_Place, dict[str, Any]] = {}
    for (path, row_group), group in by_group.items():
        with _reading(path), pq.ParquetFile(path) as file:
            table = file.read_row_group(row_group)
        records |= {place: table.slice(place.index, 1).to_pylist()[0] for place in group}
    return [records[place] for place in places]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with storage_errors(path, "read"):
            yield
    except (pa.ArrowException, KeyError) as error:
        raise CorpusError(f"{path} is not a file of a corpus: {error}") from error


def _shown_row(record: dict[str, Any]) -> ShownRow:
    images = record["images"]
    return ShownRow(
        id=record["id"],
        mode=record["mode"],
        topic=record["topic"] or "",
        kind=record["kind"] or "",
        answer_type=record["answer_type"] or "",
        source=record["source"],
        origin=record["origin"],
        licence=record["licence"] or "",
        teacher=record["teacher"],
        reasoner=record["reasoner"],
        question=record["question"],
        choices=tuple(record["choices"]),
        reference=record["reference"],
        reasoning=record["reasoning"],
        answer=record["answer"],
        evidence=evidence_sentence(record),
        images=tuple(thumbnail(image["bytes"]) for image in images[:MAX_IMAGES]),
        num_images=len(images),
    )


def _shown_fate(record: dict[str, Any], read_image: Callable[[str], bytes]) -> ShownFate:
    images = tuple(record["images"] or ())
    fate = Fate(**{**record, "exit": Exit(record["exit"]), "images": images})
    return ShownFate(fate, tuple(_stored_thumbnail(sha256, read_image) for sha256 in images[:MAX_IMAGES]))


def _stored_thumbnail(sha256: str, read_image: Callable[[str], bytes]) -> str | None:
    try:
        return thumbnail(read_image(sha256))
    except (KeyError, OSError, RowError, BimodeError):
        return None  # The row may have left for this very reason; the report shows the gap.
