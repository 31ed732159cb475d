"""Labelled rows to Parquet shards that `datasets` loads and TRL trains on as they are.

The same rows give the same bytes (for one version of pyarrow): compression, row groups and column order are fixed, and
nothing in a file depends on the time or the machine. Rows are read and written one row group at a time, so memory is
bounded by a row group, not by a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, Image, List
from numpy.typing import NDArray

from corpus.shard_images import GroupImages, SharedImages, image_names
from corpus.shard_texts import Texts, messages, render_texts
from corpus.storage import GrowingDigest, replacing, storage_errors
from schemas.errors import RowError
from schemas.fates import FATE_SCHEMA, Exit, Fate, fates_to_table
from schemas.rows import CORPUS_SCHEMA, LABELLED_SCHEMA
from schemas.verdicts import Mode

STAGE = "corpus"
"""Name of the stage under which rows that cannot be written are quarantined."""

ROW_GROUP_ROWS = 100
"""Rows per row group: what the Hugging Face viewer recommends for data with images, and small enough to read one."""

ROW_GROUP_BYTES = 256 * 2**20
"""A row group is closed early at so many bytes of images and text, which bounds memory."""

MAX_ROW_BYTES = 1 << 30
"""Largest row. Arrow's binary columns hold at most 2 GiB, and a larger row could not be read back."""

_CODED_COLUMNS = ["mode", "topic", "kind", "answer_type", "heuristic", "teacher", "reasoner", "recipe", "source"]
_COUNTED_COLUMNS = ["id", *_CODED_COLUMNS, "num_right", "num_scored", "num_sampled", "probability", "is_audit"]
_FATES_PER_GROUP = 10_000
_RENDERED_ROWS = 1_000
"""Rows whose texts are rendered together."""
_SHARDS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One written Parquet file.

    path: as given to the writer; in a manifest, relative to the version's folder. sha256, num_bytes: of the file.
    since: name of the version that it was written for, "" outside a manifest.
    fates: rows that could not be written, quarantined with their reasons; they are not in a manifest, and the caller
    adds them to the fates and counts of the stage "corpus".
    """

    path: str
    num_think: int
    num_direct: int
    sha256: str
    num_bytes: int
    fates: tuple[Fate, ...] = ()
    since: str = ""

    @property
    def num_rows(self) -> int:
        return self.num_think + self.num_direct


def corpus_features() -> Features:
    """Returns the corpus columns as `datasets` features: `CORPUS_SCHEMA` with `images` as a list of Image."""
    features = Features.from_arrow_schema(CORPUS_SCHEMA)
    features["images"] = List(Image())
    return features


def write_corpus_shard(
    rows: pa.Table, path: str | Path, *, read_image: Callable[[str], bytes], recipe: str
) -> ShardInfo:
    """Writes labelled rows, in order, as one Parquet file and returns what was written.

    rows: with the columns of `LABELLED_SCHEMA`. read_image: from the sha256 of a stored image to its bytes. recipe:
    digest of the run's configuration, kept on each row. A row that cannot be a training example is quarantined in the
    returned `fates` (mode and reasoning contradict each other, the answer is empty or holds a think tag, the text holds
    a control token, an image is missing, it is too large): num_rows + len(fates) rows went in.

    Raises StorageError: when the disk or the image store fails; no file is left behind then.
    """
    path = Path(path)
    num_rows: Counter[str] = Counter()
    fates: list[Fate] = []
    schema = corpus_features().arrow_schema
    with (
        replacing(path) as temporary,
        _parquet_writer(temporary, schema, coded=_CODED_COLUMNS, counted=_COUNTED_COLUMNS) as writer,
        GrowingDigest(temporary) as digest,
    ):
        for group in _row_groups(rows, fates, read_image=read_image, recipe=recipe):
            num_rows.update(group["mode"].to_pylist())
            table = group.replace_schema_metadata(schema.metadata)
            writer.write_table(table, row_group_size=group.num_rows)
            digest.follow()
        writer.close()
        digest.follow()
    return ShardInfo(
        str(path), num_rows[Mode.THINK], num_rows[Mode.DIRECT], digest.hexdigest(), digest.num_bytes, tuple(fates)
    )


def shard_path(version_folder: Path, mode: Mode, index: int) -> Path:
    """Returns where the shard `index` of a mode lies in a version: data/think/00000.parquet."""
    return version_folder / "data" / str(mode) / f"{index:05d}.parquet"


def write_shards(
    tables: Iterable[pa.Table],
    version_folder: Path,
    *,
    shard_rows: int,
    read_image: Callable[[str], bytes],
    recipe: str,
    first: Callable[[Mode], int] = lambda mode: 0,
) -> list[ShardInfo]:
    """Splits a stream of labelled rows by mode into shards of at most `shard_rows`; returns them in order of path.

    tables: with the columns of `LABELLED_SCHEMA`. first: number of the first shard of a mode. Two shards are written at
    a time; the rows held are those of at most four shards and one table, without their images.

    Raises StorageError as `write_corpus_shard`.
    """
    waiting = {mode: LABELLED_SCHEMA.empty_table() for mode in Mode}
    num_shards: Counter[Mode] = Counter()
    written: list[Future[ShardInfo]] = []

    def write(mode: Mode, rows: pa.Table) -> None:
        if len(written) >= _SHARDS_AT_ONCE:
            written[-_SHARDS_AT_ONCE].result()
        path = shard_path(version_folder, mode, first(mode) + num_shards[mode])
        written.append(pool.submit(write_corpus_shard, rows, path, read_image=read_image, recipe=recipe))
        num_shards[mode] += 1

    with ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="shard") as pool:
        for table in tables:
            for mode in Mode:
                part = table.filter(pc.equal(table["mode"], str(mode))).select(LABELLED_SCHEMA.names)
                rows = pa.concat_tables([waiting[mode], part.cast(LABELLED_SCHEMA)])
                while rows.num_rows >= shard_rows:
                    write(mode, rows.slice(0, shard_rows))
                    rows = rows.slice(shard_rows)
                waiting[mode] = rows
        for mode in Mode:
            if waiting[mode].num_rows:
                write(mode, waiting[mode])
        shards = [shard.result() for shard in written]
    return sorted(shards, key=lambda shard: shard.path)


def read_ids(path: Path) -> pa.ChunkedArray:
    """Returns the ids of a shard's rows. Raises StorageError."""
    with storage_errors(path, "read"), pq.ParquetFile(path) as file:
        return file.read(["id"])["id"]


def write_fates(fates: Iterable[Fate], path: str | Path) -> int:
    """Writes the rows that left the pipeline, in order, as one Parquet file and returns how many there were.

    Raises StorageError.
    """
    path, num_fates = Path(path), 0
    group: list[Fate] = []
    with replacing(path) as temporary:
        coded = ["source", "stage", "exit", "reason"]
        with _parquet_writer(temporary, FATE_SCHEMA, coded=coded, counted=coded) as writer:
            for fate in fates:
                group.append(fate)
                if len(group) == _FATES_PER_GROUP:
                    writer.write_table(fates_to_table(group))
                    num_fates, group = num_fates + len(group), []
            if group:
                writer.write_table(fates_to_table(group))
    return num_fates + len(group)


def _parquet_writer(path: Path, schema: pa.Schema, *, coded: Sequence[str], counted: Sequence[str]) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=list(coded),
        write_statistics=list(counted),
    )


def _row_groups(
    rows: pa.Table, fates: list[Fate], *, read_image: Callable[[str], bytes], recipe: str
) -> Iterator[pa.Table]:
    """Yields row groups with the columns of `CORPUS_SCHEMA`; appends the fate of each row that cannot be written.

    A row group must be written before the next one is taken, which uses its memory.
    """
    images = GroupImages(SharedImages(rows, read_image).read)
    for start in range(0, rows.num_rows, _RENDERED_ROWS):
        table = rows.slice(start, _RENDERED_ROWS).combine_chunks()
        texts = render_texts(table)
        names = image_names(table)
        written = _text_columns(table, texts, np.array([len(held) for held in names], np.int64), recipe)
        group: list[int] = []
        num_bytes = 0
        for place, size_of_text in enumerate(_text_sizes(texts)):
            try:
                if place in texts.errors:
                    raise texts.errors[place]
                size = size_of_text + images.add_row(names[place])
                if size > MAX_ROW_BYTES:
                    images.drop_row()
                    raise RowError("row_too_large", f"about {size:,} bytes of images and text, {MAX_ROW_BYTES:,} fit")
            except RowError as error:
                fates.append(_quarantined(table.slice(place, 1), error))
                continue
            group.append(place)
            num_bytes += size
            if len(group) == ROW_GROUP_ROWS or num_bytes >= ROW_GROUP_BYTES:
                yield _with_images(written, group, images)
                group, num_bytes = [], 0
                images.clear()
        if group:
            yield _with_images(written, group, images)
            images.clear()


def _text_sizes(texts: Texts) -> list[int]:
    """Returns about how many bytes the texts of each row take: they are written in several columns."""
    lengths = pc.add(pc.utf8_length(texts.questions), pc.utf8_length(texts.completions))
    return [8 * length for length in lengths.to_pylist()]


def _text_columns(table: pa.Table, texts: Texts, num_images: NDArray[np.int64], recipe: str) -> pa.Table:
    """Returns all rows with the columns of `CORPUS_SCHEMA`, but for their images."""
    made = {
        "prompt": messages("user", texts.questions, num_images),
        "completion": messages("assistant", texts.completions, np.zeros_like(num_images)),
        "answer": texts.answers,
        "reference": table["answer"],
        "reasoning": texts.reasonings,
        "recipe": pa.repeat(pa.scalar(recipe), table.num_rows),
    }
    schema = pa.schema([field for field in CORPUS_SCHEMA if field.name != "images"])
    columns = [made[field.name] if field.name in made else _typed(table[field.name], field) for field in schema]
    return pa.table(columns, schema=schema)


def _with_images(written: pa.Table, places: list[int], images: GroupImages) -> pa.Table:
    """Returns some of the rows, in order, with their images. images: of the rows at `places`."""
    first, last = places[0], places[-1]
    is_run = last - first + 1 == len(places)
    rows = written.slice(first, len(places)) if is_run else written.take(pa.array(places))
    field = CORPUS_SCHEMA.field("images")
    return rows.add_column(CORPUS_SCHEMA.get_field_index("images"), field, images.column())


def _typed(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    return column if column.type == field.type else column.cast(field.type)


def _quarantined(row: pa.Table, error: RowError) -> Fate:
    record = row.select(["origin", "id", "source", "question", "images"]).to_pylist()[0]
    return Fate(
        origin=record["origin"],
        id=record["id"],
        source=record["source"],
        stage=STAGE,
        exit=Exit.QUARANTINED,
        reason=error.reason,
        detail=error.detail.encode("utf-8", "replace").decode("utf-8"),
        question=record["question"][:500],
        images=tuple(image["sha256"] for image in record["images"]),
    )
