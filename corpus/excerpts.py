"""The rows a report shows: picked by their ids, so that the same corpus shows the same rows, with small images.

Texts are kept as they are; clipping and escaping belong to the page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.sampling import pick_spread
from corpus.storage import corpus_file_errors
from corpus.tally import NOT_GIVEN, corpus_shards
from corpus.thumbnails import IMAGE_BYTES, thumbnail
from schemas.errors import BimodeError, RowError
from schemas.fates import Exit, Fate
from schemas.verdicts import Heuristic, Mode

NUM_SHOWN = 60
"""Rows shown of each mode and each exit."""

NUM_PAIRS = 8
"""Duplicates shown beside the row that was kept."""

MAX_IMAGES = 3
"""Images shown of one row; the report says how many there are in all."""

SHARED_IMAGE_BYTES = 2_000_000
"""What the images of all rows of the corpus may take together, and those of all rows that left, before base64. With the
pairs and base64, two thirds of a page of 10 MB are images at most, and a third is left to text and charts."""

PAIR_IMAGE_BYTES = 20_000

_ROW_STRATA = ("topic", "source", "answer_type")
_FATE_STRATA = ("stage", "reason", "source")
_BATCH_ROWS = 50_000
ReadImage = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class ShownReply:
    """A stored reply of the teacher and what was made of it.

    purpose: the judge that asked. index: which sample of the question. outcome: correct, wrong or unscored for an
    answer that was compared with a reference, the verdict in a word for a judge's question, else "". extracted: what
    was read as the final answer. why: the reason for the outcome, as a sentence. is_counted: False where the label
    of the row does not rest on it, as it was asked under other settings or drawn beyond need.
    """

    purpose: str
    index: int
    text: str
    reasoning: str = ""
    model: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    outcome: str = ""
    extracted: str | None = None
    why: str = ""
    is_counted: bool = True


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
    """A row that left the pipeline as a report shows it. images: as of `ShownRow`.

    The other fields are those of its sample, as far as the caller knows them: a fate has the start of the question.
    """

    fate: Fate
    images: tuple[str | None, ...] = ()
    question: str = ""
    choices: tuple[str, ...] = ()
    reference: str | None = None
    topic: str = ""
    kind: str = ""
    answer_type: str = ""


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A row that was dropped as a duplicate and the one that was kept instead. question, images: of the latter."""

    fate: Fate
    images: tuple[str | None, ...]
    kept_id: str
    kept_question: str
    kept_images: tuple[str | None, ...]


def pick_rows(version_folder: str | Path, *, num_rows: int = NUM_SHOWN) -> tuple[ShownRow, ...]:
    """Returns up to `num_rows` rows of each mode, thinking ones first, spread over topics, sources and answer types.

    Raises CorpusError, StorageError: a shard is damaged.
    """
    records: list[dict[str, Any]] = []
    for mode in Mode:
        shards = [path for path in corpus_shards(version_folder) if path.parent.name == mode]
        records += _records(_picked_places(shards, "id", _ROW_STRATA, num_rows))
    max_bytes = _bytes_per_image(len(record["images"]) for record in records)
    return tuple(_shown_row(record, max_bytes) for record in records)


def pick_fates(fates_path: str | Path, *, num_fates: int = NUM_SHOWN, read_image: ReadImage) -> tuple[ShownFate, ...]:
    """Returns up to `num_fates` rows of each exit, dropped ones first, spread over stages, reasons and sources.

    read_image: from the sha256 of a stored image to its bytes. An image that cannot be read is shown as missing.
    Raises CorpusError, StorageError: the file is damaged.
    """
    fates: list[Fate] = []
    for exit_ in Exit:
        only = pl.col("exit") == str(exit_)
        places = _picked_places([Path(fates_path)], "origin", _FATE_STRATA, num_fates, extra=("exit",), only=only)
        fates += map(_fate, _records(places))
    max_bytes = _bytes_per_image(len(fate.images) for fate in fates)
    return tuple(ShownFate(fate, _stored_thumbnails(fate.images, read_image, max_bytes)) for fate in fates)


def pick_pairs(
    version_folder: str | Path, fates_path: str | Path, *, num_pairs: int = NUM_PAIRS, read_image: ReadImage
) -> tuple[ShownPair, ...]:
    """Returns duplicates beside the rows that were kept instead, spread over reasons and sources, least alike first.

    A kept row that later left for another reason is shown, too. Raises CorpusError, StorageError as `pick_fates`.
    """
    near = pl.col("similarity").is_not_null() & pl.col("resembles").str.contains(r"^[0-9a-f]{32}$")
    places = _picked_places(
        [Path(fates_path)],
        "origin",
        ("reason", "source"),
        num_pairs,
        extra=("similarity", "resembles"),
        only=near,
    )
    fates = [_fate(record) for record in _records(places)]
    kept = _kept_rows(version_folder, fates_path, {fate.resembles for fate in fates if fate.resembles}, read_image)
    pairs = [
        ShownPair(fate, _stored_thumbnails(fate.images, read_image, PAIR_IMAGE_BYTES), fate.resembles, *found)
        for fate in fates
        if fate.resembles and (found := kept.get(fate.resembles)) is not None
    ]
    return tuple(sorted(pairs, key=lambda pair: (pair.fate.similarity or 0.0, pair.fate.origin)))


def questions_of(fates_path: str | Path, origins: Collection[str]) -> dict[str, str]:
    """Returns the beginnings of the questions of rows that left, by origin. Raises CorpusError, StorageError."""
    wanted = pl.col("origin").is_in(pl.Series(sorted(origins), dtype=pl.String).implode())
    return {
        origin: question or ""
        for batch in _batches(Path(fates_path), ["origin", "question"])
        for origin, question in batch.filter(wanted).select("origin", "question").iter_rows()
    }


def _kept_rows(
    version_folder: str | Path, fates_path: str | Path, ids: Collection[str], read_image: ReadImage
) -> dict[str, tuple[str, tuple[str | None, ...]]]:
    """Returns question and images of rows by id, from the corpus, else from the rows that left."""
    wanted = pl.Series("id", sorted(ids), dtype=pl.String)
    kept: dict[str, tuple[str, tuple[str | None, ...]]] = {}
    for fate in map(_fate, _records(_places_of(Path(fates_path), wanted))):
        kept[str(fate.id)] = (fate.question, _stored_thumbnails(fate.images, read_image, PAIR_IMAGE_BYTES))
    for shard in corpus_shards(version_folder):
        for record in _records(_places_of(shard, wanted)):
            images = tuple(thumbnail(image["bytes"], PAIR_IMAGE_BYTES) for image in record["images"][:MAX_IMAGES])
            kept[record["id"]] = (record["question"], images)
    return kept


def evidence_sentence(record: Mapping[str, Any]) -> str:
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row lies: its number in a file."""

    path: Path
    row: int


def _picked_places(
    paths: Sequence[Path],
    key: str,
    strata: Sequence[str],
    num_rows: int,
    *,
    extra: Sequence[str] = (),
    only: pl.Expr | None = None,
) -> list[_Place]:
    """Returns the places of rows, picked by `pick_spread`. only: which rows may be. extra: further columns for that."""
    columns = list(dict.fromkeys((key, *strata, *extra)))
    filled = [pl.col(name).fill_null(NOT_GIVEN) for name in (key, *strata)]
    batches = (
        (batch if only is None else batch.filter(only)).with_columns(filled, path=pl.lit(index, pl.Int64))
        for index, path in enumerate(paths)
        for batch in _batches(path, columns)
    )
    picked = pick_spread(batches, key=key, strata=strata, num_rows=num_rows)
    chosen = () if picked is None else picked.select("path", "row").iter_rows()
    return [_Place(paths[path], row) for path, row in chosen]


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Yields some columns of a file, with the number of each row as `row`."""
    num_read = 0
    with corpus_file_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            table = pa.Table.from_batches([batch])
            frame = pl.DataFrame({name: pl.Series(name, table[name]) for name in columns})
            yield frame.with_row_index("row", offset=num_read)
            num_read += frame.height


def _places_of(path: Path, ids: pl.Series) -> list[_Place]:
    """Returns the places of the rows that have one of the ids."""
    rows = (
        row
        for batch in _batches(path, ["id"])
        for row in batch.filter(pl.col("id").is_in(ids.implode()))["row"].to_list()
    )
    return [_Place(path, row) for row in rows]


def _records(places: Sequence[_Place]) -> list[dict[str, Any]]:
    """Returns the whole rows at the places, in their order; each row group is read once."""
    by_file: dict[Path, list[_Place]] = defaultdict(list)
    for place in places:
        by_file[place.path].append(place)
    records: dict[_Place, dict[str, Any]] = {}
    for path, wanted in by_file.items():
        with corpus_file_errors(path), pq.ParquetFile(path) as file:
            start = 0
            for index in range(file.num_row_groups):
                stop = start + file.metadata.row_group(index).num_rows
                if here := [place for place in wanted if start <= place.row < stop]:
                    group = file.read_row_group(index)
                    records |= {place: group.slice(place.row - start, 1).to_pylist()[0] for place in here}
                start = stop
    return [records[place] for place in places]


def _bytes_per_image(nums_images: Iterable[int]) -> int:
    """Returns how large an image may be so that all that are shown share the room."""
    num_shown = sum(min(number, MAX_IMAGES) for number in nums_images)
    return min(IMAGE_BYTES, SHARED_IMAGE_BYTES // max(1, num_shown))


def _shown_row(record: dict[str, Any], max_bytes: int) -> ShownRow:
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
        images=tuple(thumbnail(image["bytes"], max_bytes) for image in images[:MAX_IMAGES]),
        num_images=len(images),
    )


def _fate(record: Mapping[str, Any]) -> Fate:
    return Fate(**{**record, "exit": Exit(record["exit"]), "images": tuple(record["images"] or ())})


def _stored_thumbnails(images: Sequence[str], read_image: ReadImage, max_bytes: int) -> tuple[str | None, ...]:
    return tuple(_stored_thumbnail(sha256, read_image, max_bytes) for sha256 in images[:MAX_IMAGES])


def _stored_thumbnail(sha256: str, read_image: ReadImage, max_bytes: int) -> str | None:
    try:
        return thumbnail(read_image(sha256), max_bytes)
    except (KeyError, OSError, RowError, BimodeError):
        return None  # The row may have left for this very reason; the report shows the gap.
