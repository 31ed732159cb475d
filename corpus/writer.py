"""Labelled rows to Parquet shards that `datasets` loads and TRL trains on as they are.

The same rows give the same bytes (for one version of pyarrow): compression, row groups and column order are fixed, and
nothing in a file depends on the time or the machine. Rows are read and written one row group at a time, so memory is
bounded by a row group, not by a shard.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, Image, List
from numpy.typing import NDArray

from corpus.storage import file_sha256, replacing, storage_errors
from schemas.errors import RowError, StorageError
from schemas.fates import FATE_SCHEMA, Exit, Fate, fates_to_table
from schemas.question import OPTION_LETTERS, rendered_question
from schemas.rows import CORPUS_SCHEMA, LABELLED_SCHEMA
from schemas.template import CHAT_TEMPLATE, render_completion
from schemas.verdicts import Mode

STAGE = "corpus"
"""Name of the stage under which rows that cannot be written are quarantined."""

ROW_GROUP_ROWS = 100
"""Rows per row group: what the Hugging Face viewer recommends for data with images, and small enough to read one."""

ROW_GROUP_BYTES = 256 * 2**20
"""A row group is closed early at so many bytes of images and text, which bounds memory."""

MAX_ROW_BYTES = 1 << 30
"""Largest row. Arrow's binary columns hold at most 2 GiB, and a larger row could not be read back."""

CONTROL_TOKENS = frozenset(re.findall(r"<\|\w+\|>", CHAT_TEMPLATE)) | {"<|endoftext|>", "<|video_pad|>"}
"""Text that a tokenizer reads as structure. In a question it would open turns or announce images that are not there."""

_CODED_COLUMNS = ["mode", "topic", "kind", "answer_type", "heuristic", "teacher", "reasoner", "recipe", "source"]
_COUNTED_COLUMNS = ["id", *_CODED_COLUMNS, "num_right", "num_scored", "num_sampled", "probability", "is_audit"]
_FATES_PER_GROUP = 10_000
_RENDERED_ROWS = 1_000
"""Rows whose texts are rendered together."""
_SHARDS_AT_ONCE = 2
_CACHED_BYTES = 64 * 2**20
_CONTROL_START = "<|"
assert all(token.startswith(_CONTROL_START) for token in CONTROL_TOKENS)


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
    with replacing(path) as temporary:
        schema = corpus_features().arrow_schema
        with _parquet_writer(temporary, schema, coded=_CODED_COLUMNS, counted=_COUNTED_COLUMNS) as writer:
            for group in _row_groups(rows, fates, read_image=read_image, recipe=recipe):
                num_rows.update(group["mode"].to_pylist())
                table = group.replace_schema_metadata(schema.metadata)
                writer.write_table(table, row_group_size=group.num_rows)
        digest, num_bytes = file_sha256(temporary), temporary.stat().st_size
    return ShardInfo(str(path), num_rows[Mode.THINK], num_rows[Mode.DIRECT], digest, num_bytes, tuple(fates))


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


@dataclass(frozen=True, slots=True)
class _Texts:
    """What a trainer reads of some rows, in order, and the fates (by place) of those that cannot be written."""

    questions: list[str]
    reasonings: list[str]
    answers: list[str]
    completions: list[str]
    fates: dict[int, RowError]


def _row_groups(
    rows: pa.Table, fates: list[Fate], *, read_image: Callable[[str], bytes], recipe: str
) -> Iterator[pa.Table]:
    """Yields row groups with the columns of `CORPUS_SCHEMA`; appends the fate of each row that cannot be written."""
    read_kept = _ImageCache(read_image).read
    for start in range(0, rows.num_rows, _RENDERED_ROWS):
        table = rows.slice(start, _RENDERED_ROWS).combine_chunks()
        texts = _render(table)
        names = _image_names(table)
        written = _text_columns(table, texts, names, recipe)
        group: list[int] = []
        contents: list[list[bytes]] = []
        num_bytes = 0
        for place in range(table.num_rows):
            try:
                if place in texts.fates:
                    raise texts.fates[place]
                images = [_image_content(name, read_kept) for name in names[place]]
                size = sum(map(len, images)) + 8 * (len(texts.questions[place]) + len(texts.completions[place]))
                if size > MAX_ROW_BYTES:
                    raise RowError("row_too_large", f"about {size:,} bytes of images and text, {MAX_ROW_BYTES:,} fit")
            except RowError as error:
                fates.append(_quarantined(table.slice(place, 1), error))
                continue
            group.append(place)
            contents.append(images)
            num_bytes += size
            if len(group) == ROW_GROUP_ROWS or num_bytes >= ROW_GROUP_BYTES:
                yield _with_images(written, group, contents, names)
                group, contents, num_bytes = [], [], 0
        if group:
            yield _with_images(written, group, contents, names)


def _image_names(table: pa.Table) -> list[list[str]]:
    """Returns the sha256 of the images of each row."""
    images = table["images"].combine_chunks()
    names = images.flatten().field("sha256").to_pylist()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(images), 0).to_numpy(zero_copy_only=False)).tolist()
    return [names[start:end] for start, end in pairwise([0, *ends])]


class _ImageCache:
    """Images read last, as rows of one shard share them. Memory: at most `_CACHED_BYTES`."""

    def __init__(self, read_image: Callable[[str], bytes]) -> None:
        self._read_image = read_image
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._num_bytes = 0

    def read(self, sha256: str) -> bytes:
        content = self._contents.get(sha256)
        if content is None:
            content = self._contents[sha256] = self._read_image(sha256)
            self._num_bytes += len(content)
            while self._num_bytes > _CACHED_BYTES:
                self._num_bytes -= len(self._contents.popitem(last=False)[1])
        return content


def _image_content(sha256: str, read_image: Callable[[str], bytes]) -> bytes:
    """Returns the bytes of an image. Raises RowError: it is not in the store. StorageError: the store fails."""
    try:
        content = read_image(sha256)
    except (KeyError, FileNotFoundError) as error:
        raise RowError("image_missing", f"image {sha256} is not in the image store") from error
    except OSError as error:
        raise StorageError(f"cannot read image {sha256}: {error}") from error
    if not content:
        raise RowError("image_missing", f"image {sha256} is empty in the image store")
    return content


def _render(table: pa.Table) -> _Texts:
    """Returns the texts of rows as a trainer reads them."""
    columns = {name: table[name].to_pylist() for name in ("mode", "question", "choices", "answer")}
    reasonings = [(text or "").strip() for text in table["reasoning"].to_pylist()]
    answers = [(text or "").strip() for text in table["final_answer"].to_pylist()]
    suspects = _suspects(table)
    questions, completions, fates = [], [], {}
    for place, (mode, question, choices, reference) in enumerate(zip(*columns.values(), strict=True)):
        rendered = completion = ""
        try:
            _check_mode(Mode(mode), reasonings[place])
            if len(choices) > len(OPTION_LETTERS):
                detail = f"{len(choices)} options, at most {len(OPTION_LETTERS)} have a letter"
                raise RowError("too_many_choices", detail)
            rendered = rendered_question(question, choices)
            completion = render_completion(answers[place], reasonings[place])
            if place in suspects:
                _check_text([rendered, completion, *choices, reference or ""])
        except RowError as error:
            fates[place] = error
        questions.append(rendered)
        completions.append(completion)
    return _Texts(questions, reasonings, answers, completions, fates)


def _suspects(table: pa.Table) -> set[int]:
    """Returns the places of rows whose texts may hold a control token: all of those begin alike."""
    found = pa.array([False] * table.num_rows)
    for name in ("question", "answer", "reasoning", "final_answer"):
        found = pc.or_(found, pc.fill_null(pc.match_substring(table[name], _CONTROL_START), False))
    choices = table["choices"].combine_chunks()
    held = pc.match_substring(choices.flatten(), _CONTROL_START)
    in_choices = pc.list_parent_indices(choices).filter(pc.fill_null(held, False))
    return {*np.flatnonzero(found.to_numpy(zero_copy_only=False)).tolist(), *in_choices.to_pylist()}


def _text_columns(table: pa.Table, texts: _Texts, names: list[list[str]], recipe: str) -> pa.Table:
    """Returns all rows with the columns of `CORPUS_SCHEMA`, but for their images."""
    num_images = np.array([len(held) for held in names], np.int64)
    made = {
        "prompt": _messages("user", texts.questions, num_images),
        "completion": _messages("assistant", texts.completions, np.zeros_like(num_images)),
        "answer": pa.array(texts.answers, pa.string()),
        "reference": table["answer"],
        "reasoning": pa.array(texts.reasonings, pa.string()),
        "recipe": pa.repeat(pa.scalar(recipe), table.num_rows),
    }
    schema = pa.schema([field for field in CORPUS_SCHEMA if field.name != "images"])
    columns = [made[field.name] if field.name in made else _typed(table[field.name], field) for field in schema]
    return pa.table(columns, schema=schema)


def _with_images(written: pa.Table, places: list[int], contents: list[list[bytes]], names: list[list[str]]) -> pa.Table:
    """Returns some of the rows, in order, with their images. contents: the bytes of those of the rows at `places`."""
    first, last = places[0], places[-1]
    is_run = last - first + 1 == len(places)
    rows = written.slice(first, len(places)) if is_run else written.take(pa.array(places))
    kind = CORPUS_SCHEMA.field("images")
    held = [pa.array([content for images in contents for content in images], pa.binary())]
    held.append(pa.array([name for place in places for name in names[place]], pa.string()))
    images = pa.StructArray.from_arrays(held, fields=list(kind.type.value_type))
    offsets = _offsets(np.array([len(images) for images in contents], np.int64))
    column = pa.ListArray.from_arrays(offsets, images, type=kind.type)
    return rows.add_column(CORPUS_SCHEMA.get_field_index("images"), kind, column)


def _typed(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    return column if column.type == field.type else column.cast(field.type)


def _messages(role: str, texts: list[str], num_images: NDArray[np.int64]) -> pa.ListArray:
    """Returns one chat message a row: so many images, then a text."""
    kind = CORPUS_SCHEMA.field("prompt").type
    message = kind.value_type
    parts = message.field("content").type
    ends = np.cumsum(num_images + 1)
    is_text = np.zeros(ends[-1], np.bool_)
    is_text[ends - 1] = True
    place_of_text = np.where(is_text, np.cumsum(is_text) - 1, 0)
    types = pa.array(["image", "text"]).take(pa.array(is_text.astype(np.int8)))
    held = pa.array(texts, pa.string()).take(pa.array(place_of_text, mask=~is_text))
    content = pa.StructArray.from_arrays([types, held], fields=list(parts.value_type))
    contents = pa.ListArray.from_arrays(_offsets(num_images + 1), content, type=parts)
    roles = pa.repeat(pa.scalar(role), len(texts))
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(message))
    return pa.ListArray.from_arrays(_offsets(np.ones_like(num_images)), messages, type=kind)


def _offsets(lengths: NDArray[np.int64]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


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


def _check_mode(mode: Mode, reasoning: str) -> None:
    if mode is Mode.THINK and not reasoning:
        raise RowError("reasoning_empty", "a thinking row has no reasoning")
    if mode is Mode.DIRECT and reasoning:
        raise RowError("reasoning_unexpected", f"a direct row has reasoning: {reasoning[:80]!r}")


def _check_text(texts: Sequence[str]) -> None:
    for text in texts:
        found = sorted(token for token in CONTROL_TOKENS if token in text)
        if found:
            raise RowError("control_token_in_text", f"the text holds {found[0]}, which a tokenizer reads as structure")
