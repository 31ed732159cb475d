"""The questions of evaluation benchmarks: our corpus, rows of our Sample schema, and VLMEvalKit's TSV files.

Every row ends in exactly one place: it is a question, it was not drawn (`max_questions`), or it is quarantined with its
reason. Images go through the limits of `sources.images` into a content-addressed store, so memory does not grow with
them. What a row means (options, letters, image marks, unreadable values) is decided by `sources.rows`, as in curation.

VLMEvalKit's convention (open-compass/VLMEvalKit, vlmeval/dataset/image_base.py and image_mcq.py), one row a question:

    index       unique name of the row
    image       base64 of one image, a list of them, or (64 characters or less) the index of a row with the same image
    image_path  paths instead, where there is no column `image`; beside one, they only name its images
    question    preceded by the `hint`, where there is one
    A, B, ...   the options; `choices`, a list, in files that have no such columns (MathVista, MATH-Vision)
    answer      a letter, a text, or a list of texts of which each is right; `answer_option`, if there, is the letter
    category    kept, and measured on its own

Left out on purpose: the judges that some benchmarks prescribe (a rule decides here, or the row counts as one without a
comparable reference), and MMBench's circular evaluation (every permutation of the options is a question of its own).
"""

from __future__ import annotations

import ast
import csv
import heapq
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from schemas.config import Columns, SourceConfig
from schemas.errors import RowError, SourceError
from schemas.fates import Fate
from schemas.question import OPTION_LETTERS
from schemas.requests import derived_seed
from schemas.samples import AnswerType, Sample, Topic
from sources import ImageStore, json_rows, parquet
from sources.columns import Row
from sources.files import JSON_SUFFIXES, PARQUET_SUFFIXES, SourceFile, find_files, local_folder, open_binary, reading
from sources.image_values import ImageRoots, encoded_images
from sources.outcomes import row_outcome
from sources.rows import Draft, build_sample
from sources.units import Unit

STAGE = "evaluation"
"""The stage named in the fates of benchmark rows."""

MAX_REFERENCE_CHARS = 64
"""Longest cell of `image` that VLMEvalKit reads as the index of another row."""

MAX_LITERAL_CHARS = 100_000
"""Longest list of answers that is parsed; Python's literal parser is not made for hostile megabytes."""

MAX_ANSWERS = 64
"""Most alternative answers of one row; annotated benchmarks have ten."""

_TSV_SUFFIXES = (".tsv", ".tsv.gz")
_UNDECODED = re.compile("[\udc80-\udcff]")
_QUOTED_LIST = re.compile(r"\[\s*(?:'[^']*'|\"[^\"]*\")(?:\s*,\s*(?:'[^']*'|\"[^\"]*\"))*\s*,?\s*\]")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")

Format = Literal["corpus", "samples", "vlmevalkit"]

_SAMPLE_COLUMNS = Columns(
    images="images",
    choices="choices",
    answer="answer",
    id="id",
    topic="topic",
    kind="kind",
    answer_type="answer_type",
)
_COLUMNS: dict[Format, Columns] = {
    "corpus": _SAMPLE_COLUMNS.model_copy(update={"answer": "reference"}),
    "samples": _SAMPLE_COLUMNS,
    "vlmevalkit": Columns(images="images", choices="choices", answer="answer", id="index"),
}
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "corpus": ("question", "reference"),
    "samples": ("question", "answer"),
    "vlmevalkit": ("index", "question", "answer"),
}
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "corpus": PARQUET_SUFFIXES,
    "samples": PARQUET_SUFFIXES + JSON_SUFFIXES,
    "vlmevalkit": _TSV_SUFFIXES,
}


class BenchmarkConfig(BaseModel):
    """One benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of the benchmark, unique in the run.", pattern=r"^[\w.-]+$")
    path: str = Field(description="File, folder or glob of its files; of our corpus, also the folder of a version.")
    format: Format = Field(
        description="`corpus`: our corpus; `samples`: rows of our Sample schema as Parquet or JSON Lines, images as "
        "bytes, paths, data URLs or references into an image store; `vlmevalkit`: a TSV file."
    )
    topic: Topic | None = Field(None, description="Topic of every row that names none.")
    answer_type: AnswerType | None = Field(
        None, description="Answer type of every row that names none, e.g. `chart` or `ocr` for their tolerances."
    )
    image_root: str | None = Field(
        None, description="Folder (or image store) of the images; by default that of the file. No path may leave it."
    )


@dataclass(frozen=True, slots=True)
class Question:
    """One question as a model is asked it and judged by it.

    load_images: gives its images, RGB, in order; called whenever they are needed, so that they need not stay in memory.
    other_answers: further references beside `sample.answer`; a reply that gives any of them is right.
    """

    sample: Sample
    load_images: Callable[[], list[Image.Image]] = list
    other_answers: tuple[str, ...] = ()
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The questions of one benchmark: num_rows = len(questions) + len(quarantined) + num_not_drawn."""

    name: str
    num_rows: int
    num_not_drawn: int
    questions: tuple[Question, ...]
    quarantined: tuple[Fate, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were quarantined, by reason."""
        return dict(sorted(Counter(fate.reason for fate in self.quarantined).items()))


IsDrawn = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class _File:
    """The rows of one file. rows: yields number in the file and content of each row that is drawn, in order."""

    file: SourceFile
    num_rows: int
    rows: Callable[[IsDrawn], Iterator[tuple[int, Row | RowError]]]


def read_benchmark(
    config: BenchmarkConfig, *, store: ImageStore, max_questions: int | None = None, seed: int = 0
) -> Benchmark:
    """Returns the questions of a benchmark and the fates of the rows that are none.

    store: where its images go. max_questions: how many rows are drawn at random, before any is read; the draw depends
    on seed, name and number of the row alone, and a larger one contains a smaller.

    Raises SourceError: a file is missing or cannot be read, lacks a column, or no row of it can be asked.
    StorageError: an image cannot be stored.
    """
    source = SourceConfig(
        name=config.name,
        format="parquet",
        path=_data_path(config),
        columns=_COLUMNS[config.format],
        topic=config.topic,
        answer_type=config.answer_type,
    )
    files = [_open(config, file, store) for file in find_files(source, _SUFFIXES[config.format])]
    num_rows = sum(file.num_rows for file in files)
    drawn = _draw(num_rows, max_questions, config.name, seed)
    questions: list[Question] = []
    fates: list[Fate] = []
    first = 0
    for file in files:
        roots = _image_roots(config, file.file)
        for number, row in file.rows(partial(_is_drawn, drawn, first)):
            origin = f"{config.name}:{file.file.name}#{number}"
            build = partial(_question, source=source, origin=origin, store=store, roots=roots)
            outcome = row_outcome(row, build, source=config.name, origin=origin, stage=STAGE)
            if isinstance(outcome, Question):
                questions.append(outcome)
            else:
                fates.append(outcome)
        first += file.num_rows
    benchmark = Benchmark(config.name, num_rows, num_rows - len(drawn), tuple(questions), tuple(fates))
    assert num_rows == len(questions) + len(fates) + benchmark.num_not_drawn, f"{config.name} lost rows"
    if not questions:
        why = ", ".join(f"{number} {reason}" for reason, number in benchmark.reasons.items()) or "it has no rows"
        raise SourceError(f"benchmark {config.name}: {config.path} holds no question that can be asked: {why}")
    return benchmark


def _data_path(config: BenchmarkConfig) -> str:
    """Returns where the rows lie: of a version of our corpus, beside its report and the fates of other rows."""
    data = Path(config.path).expanduser() / "data"
    return str(data) if config.format == "corpus" and data.is_dir() else config.path


def _draw(num_rows: int, max_questions: int | None, name: str, seed: int) -> range | set[int]:
    if max_questions is None or max_questions >= num_rows:
        return range(num_rows)
    return set(heapq.nsmallest(max_questions, range(num_rows), key=lambda row: (derived_seed(seed, name, row), row)))


def _is_drawn(drawn: Container[int], first: int, number: int) -> bool:
    """Whether a row is drawn, by its number in a file whose first row has the number `first` in the benchmark."""
    return first + number in drawn


def _image_roots(config: BenchmarkConfig, file: SourceFile) -> ImageRoots:
    folder = local_folder(file.path) if config.image_root is None else Path(config.image_root).expanduser()
    return ImageRoots(None, ()) if folder is None else ImageRoots.at(folder)


def _question(
    row: Row, draft: Draft, *, source: SourceConfig, origin: str, store: ImageStore, roots: ImageRoots
) -> Question:
    sample = build_sample(row, draft, source=source, origin=origin, store=store, roots=roots)
    other_answers = tuple(row.get("other_answers") or ())
    category = row.get("category")
    return Question(sample, partial(_load_images, sample, store), other_answers, category and str(category))


def _load_images(sample: Sample, store: ImageStore) -> list[Image.Image]:
    return [Image.open(io.BytesIO(store.read(image.sha256))).convert("RGB") for image in sample.images]


def _open(config: BenchmarkConfig, file: SourceFile, store: ImageStore) -> _File:
    if config.format == "vlmevalkit":
        return _open_tsv(config.name, file, store)
    if file.name.lower().endswith(PARQUET_SUFFIXES):
        return _open_parquet(config, file)
    return _open_json(config, file)


def _check_columns(config: BenchmarkConfig, file: SourceFile, present: Sequence[str]) -> None:
    missing = [name for name in _REQUIRED[config.format] if name not in present]
    if missing:
        raise _missing_columns(config.name, file, config.format, missing, present)


def _missing_columns(
    name: str, file: SourceFile, form: str, missing: Sequence[str], present: Sequence[str]
) -> SourceError:
    return SourceError(
        f"benchmark {name}: {file.path} lacks the columns {', '.join(missing)} of the format {form}; "
        f"it has {', '.join(present[:30]) or 'none'}"
    )


# --- Parquet and JSON Lines


def _unit(name: str, file: SourceFile, found: Any) -> Unit:
    return Unit(name, 0, file.path, file.name, found.start, found.stop, found.offset, found.digest)


def _open_parquet(config: BenchmarkConfig, file: SourceFile) -> _File:
    present = parquet.read_schema(file, source=config.name).names
    _check_columns(config, file, present)
    ranges = parquet.plan_ranges(file, source=config.name, shard_rows=2**62, max_rows=None)
    columns = [name for name in present if name in {*_COLUMNS[config.format].model_dump().values(), "category"}]

    def rows(is_drawn: IsDrawn) -> Iterator[tuple[int, Row | RowError]]:
        for found in ranges:
            for number, row in enumerate(parquet.read_rows(_unit(config.name, file, found), columns=columns)):
                if is_drawn(number):
                    yield number, _with_stored_images(row, config)

    return _File(file, sum(found.stop - found.start for found in ranges), rows)


def _open_json(config: BenchmarkConfig, file: SourceFile) -> _File:
    present: dict[str, None] = {}

    def note_columns(row: json_rows.JsonRow) -> None:
        if not all(name in present for name in _REQUIRED[config.format]):
            try:
                present.update(dict.fromkeys(row.parse()))
            except RowError:
                return

    ranges = json_rows.plan_ranges(file, source=config.name, shard_rows=2**62, max_rows=None, observers=[note_columns])
    if ranges:
        _check_columns(config, file, list(present))

    def rows(is_drawn: IsDrawn) -> Iterator[tuple[int, Row | RowError]]:
        for found in ranges:
            for number, row in enumerate(json_rows.read_rows(_unit(config.name, file, found))):
                if is_drawn(number):
                    try:
                        yield number, _with_stored_images(row.parse(), config)
                    except RowError as error:
                        yield number, error

    return _File(file, sum(found.stop - found.start for found in ranges), rows)


def _with_stored_images(row: Row | RowError, config: BenchmarkConfig) -> Row | RowError:
    """Returns the row with references into an image store, as a Sample has them, turned into paths of that store."""
    if isinstance(row, RowError) or not isinstance(row.get("images"), list):
        return row
    images = [
        f"{image['sha256'][:3]}/{image['sha256']}.img"
        if isinstance(image, dict) and isinstance(image.get("sha256"), str) and image.get("bytes") is None
        else image
        for image in row["images"]
    ]
    return {**row, "images": images}


# --- VLMEvalKit's TSV


def _open_tsv(name: str, file: SourceFile, store: ImageStore) -> _File:
    header = next(_cells(name, file), None)
    if header is None:
        raise SourceError(f"benchmark {name}: {file.path} is empty")
    missing = [column for column in _REQUIRED["vlmevalkit"] if column not in header]
    if missing:
        raise _missing_columns(name, file, "vlmevalkit", missing, header)
    repeated = [column for column, number in Counter(header).items() if number > 1]
    if repeated:
        raise SourceError(f"benchmark {name}: {file.path} has the columns {', '.join(repeated)} more than once")
    return _File(file, sum(1 for _ in _cells(name, file)) - 1, partial(_tsv_rows, name, file, store))


def _cells(name: str, file: SourceFile) -> Iterator[list[str]]:
    """Yields the cells of each line, the header's first. Bytes that are no UTF-8 become lone surrogates."""
    csv.field_size_limit(max(csv.field_size_limit(), json_rows.MAX_ROW_BYTES))
    with reading(name, file.path), open_binary(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = csv.reader(text, delimiter="\t")
        try:
            yield from (cells for cells in lines if cells)
        except csv.Error as error:
            raise SourceError(f"benchmark {name}: {file.path} is no TSV at line {lines.line_num}: {error}") from error
        finally:
            text.detach()


def _tsv_records(name: str, file: SourceFile, is_drawn: IsDrawn) -> Iterator[tuple[int, dict[str, str] | RowError]]:
    """Yields number and cells by column of each drawn row; cells that stand for "none" are left out."""
    lines = _cells(name, file)
    header = next(lines)
    for number, cells in enumerate(lines):
        if not is_drawn(number):
            continue
        if len(cells) != len(header):
            yield number, RowError("row_misshapen", f"the row has {len(cells)} cells, the header {len(header)}")
        elif bad := next((column for column, cell in zip(header, cells, strict=True) if _UNDECODED.search(cell)), None):
            yield number, RowError("row_not_utf8", f"the cell {bad!r} is not UTF-8")
        else:
            # pandas writes a null as nothing, or as "nan" where it was turned into text. "None" may be an option.
            yield (
                number,
                {column: cell for column, cell in zip(header, cells, strict=True) if cell.strip() not in {"", "nan"}},
            )


def _tsv_rows(
    name: str, file: SourceFile, store: ImageStore, is_drawn: IsDrawn
) -> Iterator[tuple[int, Row | RowError]]:
    """Yields the drawn rows in the form of the format's `Columns`."""
    shared = _SharedImages(name, file, store, is_drawn)
    has_images = bool({"image", "image_path"} & set(next(_cells(name, file))))
    seen: set[str] = set()
    for number, record in _tsv_records(name, file, is_drawn):
        if isinstance(record, RowError):
            yield number, record
            continue
        try:
            index = record.get("index", "").strip()
            if not index or index in seen:
                reason = "index_repeated" if index else "index_missing"
                raise RowError(reason, f"the index {index!r} must be there and unique")
            seen.add(index)
            row = _tsv_row(record)
            row["images"] = shared.of(record)
            if has_images and not row["images"]:
                raise RowError("image_missing", f"row {index!r} has no image, and the file has a column of images")
            yield number, row
        except RowError as error:
            yield number, error


def _tsv_row(record: dict[str, str]) -> Row:
    """Returns question, options, answers and category of a row; not its images.

    Raises RowError: `answer_unreadable` if a list of answers cannot be one.
    """
    options: Any = {letter: record[letter] for letter in OPTION_LETTERS if letter in record}
    if not options:
        listed = record.get("choices", "").strip()
        options = None if listed == "[]" else listed or None
    answers = [record.get("answer")]
    if options is not None:
        answers = [record.get("answer_option", record.get("answer"))]
    elif (alternatives := _text_list(record.get("answer", ""))) is not None:
        answers = list(dict.fromkeys(alternatives))
    if not answers or len(answers) > MAX_ANSWERS:
        raise RowError("answer_unreadable", f"the row lists {len(answers)} answers, not 1 to {MAX_ANSWERS}")
    question = record.get("question")
    if question is not None and "hint" in record:
        question = f"Hint: {record['hint'].strip()}\n{question}"
    return {
        "index": record["index"].strip(),
        "question": question,
        "choices": options,
        "answer": answers[0],
        "other_answers": answers[1:],
        "category": record.get("category"),
    }


def _text_list(cell: str) -> list[str] | None:
    """Returns the texts of a cell that holds a list of texts, as JSON or as Python writes it; None for other cells."""
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")) or len(cell) > MAX_LITERAL_CHARS:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
            return [item for item in parsed if item.strip()]
        return None
    return None


class _SharedImages:
    """The images of a TSV's rows, also where a row names another one whose image it shares."""

    def __init__(self, name: str, file: SourceFile, store: ImageStore, is_drawn: IsDrawn) -> None:
        self._store = store
        wanted = {
            record["image"].strip()
            for _, record in _tsv_records(name, file, is_drawn)
            if not isinstance(record, RowError) and _is_reference(record)
        }
        self._stored: dict[str, list[str] | RowError] = {}
        if wanted:
            for _, record in _tsv_records(name, file, lambda _: True):
                if isinstance(record, dict) and (index := record.get("index", "").strip()) in wanted:
                    self._stored.setdefault(index, self._put(record))

    def _put(self, record: dict[str, str]) -> list[str] | RowError:
        try:
            if _is_reference(record) or "image" not in record:
                raise RowError("image_missing", f"row {record['index']!r} is referred to, but has no image of its own")
            encoded = encoded_images(
                _image_values(record), roots=ImageRoots(None, ()), max_bytes=self._store.limits.max_bytes
            )
            return [self._store.put(image).sha256 for image in encoded]
        except RowError as error:
            return error

    def of(self, record: dict[str, str]) -> list[Any]:
        """Returns the raw image values of a row. Raises RowError: the row it refers to has none that can be read."""
        if not _is_reference(record):
            return _image_values(record)
        index = record["image"].strip()
        stored = self._stored.get(index)
        if stored is None:
            raise RowError("image_missing", f"the image is that of row {index!r}, which is not in the file")
        if isinstance(stored, RowError):
            raise RowError(stored.reason, f"the image is that of row {index!r}: {stored.detail}")
        return [{"bytes": self._store.read(sha256)} for sha256 in stored]


def _is_reference(record: dict[str, str]) -> bool:
    return "image" in record and len(record["image"].strip()) <= MAX_REFERENCE_CHARS


def _image_values(record: dict[str, str]) -> list[Any]:
    """Returns base64 as data URLs, so that none is mistaken for a path, or the paths of a row without base64."""
    if "image" in record:
        return [
            value if value[:5].lower() == "data:" else f"data:image/any;base64,{value}"
            for value in _listed(record["image"])
        ]
    return list(_listed(record.get("image_path", "")))


def _listed(cell: str) -> list[str]:
    """Returns the texts of a cell that is one text or a list of them. Linear, for base64 of any length."""
    cell = cell.strip()
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        parsed = json.loads(cell)
    except (ValueError, RecursionError):
        if not _QUOTED_LIST.fullmatch(cell):
            raise RowError("image_unreadable", f"the images {cell[:60]!r} are no list of texts") from None
        parsed = [single or double for single, double in _QUOTED.findall(cell)]
    if not isinstance(parsed, list) or not all(isinstance(item, str) for item in parsed):
        raise RowError("image_unreadable", f"the images {cell[:60]!r} are no list of texts")
    return parsed
