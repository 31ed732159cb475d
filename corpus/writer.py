"""Labelled rows to Parquet shards that `datasets` loads and TRL trains on as they are.

The same rows give the same bytes (for one version of pyarrow): compression, row groups and column order are fixed, and
nothing in a file depends on the time or the machine. Rows are read and written one row group at a time, so memory is
bounded by a row group, not by a shard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List

from corpus.storage import file_sha256, replacing, storage_errors
from schemas.errors import RowError, StorageError
from schemas.fates import FATE_SCHEMA, Exit, Fate, fates_to_table
from schemas.question import OPTION_LETTERS, render_question
from schemas.rows import CORPUS_SCHEMA, LabelledSample
from schemas.samples import Sample
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


def corpus_record(row: LabelledSample, *, read_image: Callable[[str], bytes], recipe: str) -> dict[str, Any]:
    """Returns the row as one record of `CORPUS_SCHEMA`, its images inside.

    Raises RowError: when the row cannot be a training example: mode and reasoning contradict each other, the answer
    is empty or holds a think tag, the text holds a control token or is not Unicode, an image is missing, or it is too
    large. Raises StorageError when the image store cannot be read.
    """
    sample, decision = row.sample, row.decision
    reasoning, answer = row.reasoning.strip(), row.answer.strip()
    _check_mode(decision.mode, reasoning)
    if len(sample.choices) > len(OPTION_LETTERS):
        raise RowError(
            "too_many_choices", f"{len(sample.choices)} options, at most {len(OPTION_LETTERS)} have a letter"
        )
    question = render_question(sample)
    completion = render_completion(answer, reasoning)
    _check_text([question, completion, *sample.choices, sample.answer or ""])
    images = _read_images(sample, read_image)
    num_bytes = sum(len(image["bytes"]) for image in images) + 4 * (2 * len(question) + 2 * len(completion))
    if num_bytes > MAX_ROW_BYTES:
        raise RowError("row_too_large", f"about {num_bytes:,} bytes of images and text, at most {MAX_ROW_BYTES:,} fit")
    image_parts = [{"type": "image", "text": None}] * len(images)
    return {
        "id": sample.id,
        "mode": str(decision.mode),
        "prompt": [{"role": "user", "content": [*image_parts, {"type": "text", "text": question}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": completion}]}],
        "images": images,
        "question": sample.question,
        "choices": list(sample.choices),
        "answer": answer,
        "reference": sample.answer,
        "reasoning": reasoning,
        "topic": sample.topic and str(sample.topic),
        "kind": sample.kind and str(sample.kind),
        "answer_type": sample.answer_type and str(sample.answer_type),
        "heuristic": str(decision.heuristic),
        "num_right": decision.num_right,
        "num_scored": decision.num_scored,
        "num_sampled": decision.num_sampled,
        "probability": decision.probability,
        "is_audit": decision.is_audit,
        "teacher": row.teacher,
        "reasoner": row.reasoner,
        "recipe": recipe,
        "source": sample.source,
        "source_id": sample.source_id,
        "origin": sample.origin,
        "licence": sample.licence,
    }


def write_corpus_shard(
    rows: Iterable[LabelledSample], path: str | Path, *, read_image: Callable[[str], bytes], recipe: str
) -> ShardInfo:
    """Writes the rows, in order, as one Parquet file and returns what was written.

    read_image: from the sha256 of a stored image to its bytes. recipe: digest of the run's configuration, kept on each
    row. A row that cannot be written is quarantined in the returned `fates`: len(rows) = num_rows + len(fates).

    Raises StorageError: when the disk or the image store fails; no file is left behind then.
    """
    path = Path(path)
    num_rows: Counter[str] = Counter()
    fates: list[Fate] = []
    schema = corpus_features().arrow_schema
    with replacing(path) as temporary:
        with _parquet_writer(temporary, schema, coded=_CODED_COLUMNS, counted=_COUNTED_COLUMNS) as writer:
            for group in _row_groups(rows, fates, read_image=read_image, recipe=recipe):
                num_rows.update(record["mode"] for record in group)
                writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
        digest, num_bytes = file_sha256(temporary), temporary.stat().st_size
    return ShardInfo(str(path), num_rows[Mode.THINK], num_rows[Mode.DIRECT], digest, num_bytes, tuple(fates))


def shard_path(version_folder: Path, mode: Mode, index: int) -> Path:
    """Returns where the shard `index` of a mode lies in a version: data/think/00000.parquet."""
    return version_folder / "data" / str(mode) / f"{index:05d}.parquet"


def write_shards(
    rows: Iterable[LabelledSample],
    version_folder: Path,
    *,
    shard_rows: int,
    read_image: Callable[[str], bytes],
    recipe: str,
    first: Callable[[Mode], int] = lambda mode: 0,
) -> list[ShardInfo]:
    """Splits a stream of rows by mode into shards of at most `shard_rows` and returns them in order of path.

    first: number of the first shard of a mode. The rows held at once are at most two shards, without their images.

    Raises StorageError as `write_corpus_shard`.
    """
    waiting: dict[Mode, list[LabelledSample]] = {mode: [] for mode in Mode}
    num_shards: Counter[Mode] = Counter()
    shards: list[ShardInfo] = []

    def write(mode: Mode) -> None:
        path = shard_path(version_folder, mode, first(mode) + num_shards[mode])
        shards.append(write_corpus_shard(waiting[mode], path, read_image=read_image, recipe=recipe))
        num_shards[mode] += 1
        waiting[mode] = []

    for row in rows:
        mode = row.decision.mode
        waiting[mode].append(row)
        if len(waiting[mode]) == shard_rows:
            write(mode)
    for mode in Mode:
        if waiting[mode]:
            write(mode)
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
    rows: Iterable[LabelledSample], fates: list[Fate], *, read_image: Callable[[str], bytes], recipe: str
) -> Iterator[list[dict[str, Any]]]:
    """Yields records by row group; appends the fate of each row that cannot be one."""
    group: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        try:
            record = corpus_record(row, read_image=read_image, recipe=recipe)
        except RowError as error:
            fates.append(_quarantined(row.sample, error))
            continue
        group.append(record)
        num_bytes += sum(len(image["bytes"]) for image in record["images"])
        num_bytes += 8 * (len(record["question"]) + len(record["reasoning"]) + len(record["answer"]))
        if len(group) == ROW_GROUP_ROWS or num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _quarantined(sample: Sample, error: RowError) -> Fate:
    return Fate(
        origin=sample.origin,
        id=sample.id,
        source=sample.source,
        stage=STAGE,
        exit=Exit.QUARANTINED,
        reason=error.reason,
        detail=_as_unicode(error.detail),
        question=_as_unicode(sample.question[:500]),
        images=tuple(image.sha256 for image in sample.images),
    )


def _as_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


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
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("text_not_unicode", f"lone surrogate at character {error.start}") from error


def _read_images(sample: Sample, read_image: Callable[[str], bytes]) -> list[dict[str, Any]]:
    images = []
    for image in sample.images:
        try:
            content = read_image(image.sha256)
        except (KeyError, FileNotFoundError) as error:
            raise RowError("image_missing", f"image {image.sha256} is not in the image store") from error
        except OSError as error:
            raise StorageError(f"cannot read image {image.sha256} of row {sample.id}: {error}") from error
        if not content:
            raise RowError("image_missing", f"image {image.sha256} is empty in the image store")
        images.append({"bytes": content, "path": image.sha256})
    return images
