"""Everything known of one row: its way through the stages, its replies and verdicts, where it is published.

A row keeps its place in its shard's name from the first stage to the last, so once it is found among the rows read, one
small file of each stage and one journal of each judge are looked at, however large the corpus is. Its ids in published
versions are looked up by a scan of their columns of ids; shards that versions share are scanned once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from corpus.excerpts import evidence_sentence
from corpus.lineage import read_marks
from corpus.lookup import FoundRow, find_ids, find_rows, read_record
from corpus.storage import storage_errors
from corpus.versions import FATES, MARKS, Manifest, list_versions, load_manifest
from corpus.writer import STAGE as CORPUS_STAGE
from flows.row_replies import StageReplies, read_stage_replies
from flows.run_config import corpus_folder
from flows.stages import LABELLING, SOURCES, stage_digest, stages_of
from flows.work_rows import WORK_SCHEMA, work_rows
from flows.workspace import Workspace
from judges import reasoning
from schemas.config import ImageLimits, RunConfig
from schemas.errors import CorpusError, StorageError
from schemas.fates import Exit, Fate
from schemas.samples import ImageRef, Sample, sample_from_record
from schemas.usage import Cost, Ledger, Usage, UsageKey, cost_of
from sources import ImageStore

_FATES_SUFFIX = ".fates.parquet"
_IMAGE_COLUMNS = ["images"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one stage did with a row.

    outcome: kept, dropped, quarantined; "left before" of a stage behind that; "not done" where the stage has no result
    for the shard yet. said: what it decided, in words. file, row: where that stands, row counted from 0. is_current:
    False where the stage was done under other settings than those of now.
    """

    stage: str
    outcome: str
    said: str = ""
    file: Path | None = None
    row: int | None = None
    fate: Fate | None = None
    is_current: bool = True


@dataclass(frozen=True, slots=True)
class Publication:
    """A row in a version. since: the version whose shard it is. mark: "" or why the version counts it as gone."""

    version: str
    shard: str
    row: int
    since: str
    mark: str = ""
    marked_since: str = ""


@dataclass(frozen=True, slots=True)
class RowImage:
    """An image of a row. width, height: in pixels, None where only a version was looked at. file: in the image store of
    the run; num_bytes: None if it is not there any more."""

    sha256: str
    width: int | None = None
    height: int | None = None
    num_bytes: int | None = None
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class RowHistory:
    """Everything known of one row.

    id: None if it never became a sample; then there is no sample, only its first fate. same_id: origins of other rows
    with the same content. steps: by stage; empty where only a corpus was looked at. replies: of each judging stage that
    the row has come to. resembles: the row that its fate names, as far as it was found. published: newest version
    first. place: in the newest version that has it. record: what stands there, images as their names alone. fates: what
    versions say of it, newest first, where there are no steps. costs: of the stored replies, whoever paid; cost: at the
    run's prices, if it has any.
    """

    id: str | None
    origin: str
    question: str
    same_id: tuple[str, ...] = ()
    sample: Sample | None = None
    images: tuple[RowImage, ...] = ()
    steps: tuple[Step, ...] = ()
    replies: tuple[StageReplies, ...] = ()
    resembles: FoundRow | None = None
    published: tuple[Publication, ...] = ()
    place: FoundRow | None = None
    record: Mapping[str, Any] | None = None
    fates: tuple[tuple[str, Fate], ...] = ()
    costs: Ledger = field(default_factory=dict)
    cost: Cost | None = None

    @property
    def fate(self) -> Fate | None:
        """Why the row left, None if it did not."""
        return next((step.fate for step in self.steps if step.fate), None)


def find_in_run(config: RunConfig, name: str) -> list[FoundRow]:
    """Returns the rows read by a run that a name can mean. See `corpus.lookup.find_rows`."""
    rows, fates = _stage_files(Workspace(config.workdir), SOURCES)
    return _exact([*find_rows(rows, name), *find_rows(fates, name)], name)


def find_in_corpus(corpus: Path, name: str) -> list[FoundRow]:
    """Returns the rows of a corpus's versions that a name can mean, the newest of each; rows that left included."""
    found: dict[tuple[str | None, str], FoundRow] = {}
    paths = list(_unique_shards(_manifests(corpus)))
    fates = [version / FATES for version in reversed(list_versions(corpus)) if (version / FATES).exists()]
    for row in (*find_rows(paths, name), *(row for path in fates for row in find_rows([path], name))):
        found.setdefault((row.id, row.origin), row)
    return _exact(list(found.values()), name)


def _exact(found: list[FoundRow], name: str) -> list[FoundRow]:
    """Returns the rows whose id or origin is the whole name, if there are any, else all."""
    return [row for row in found if name in (row.id, row.origin)] or found


def run_history(config: RunConfig, rows: Sequence[FoundRow]) -> RowHistory:
    """Returns everything that a run and its corpus know of a row.

    rows: of one id, see `find_in_run`; if there are several, the one that went farthest is followed.

    Raises StorageError, CorpusError: a file is damaged.
    """
    workspace = Workspace(config.workdir)
    ways = [(row, _steps(config, workspace, row)) for row in rows]
    row, steps = max(ways, key=lambda way: sum(step.outcome == "kept" for step in way[1]))
    shard = _shard(row.path)
    replies = tuple(_replies(config, workspace, shard, steps))
    costs = _costs(config, row, replies)
    sample = _sample(steps)
    fate = next((step.fate for step in steps if step.fate), None)
    history = RowHistory(
        row.id,
        row.origin,
        row.question,
        same_id=tuple(other.origin for other in rows if other.origin != row.origin),
        sample=sample,
        images=_stored_images(config, sample, fate),
        steps=steps,
        replies=replies,
        costs=costs,
        cost=cost_of(costs, config.prices) if config.prices.has_any else None,
    )
    if fate and fate.resembles:
        rows_read, _ = _stage_files(workspace, SOURCES)
        history = replace(history, resembles=next(iter(find_ids(rows_read, [fate.resembles])), None))
    return _with_publications(history, corpus_folder(config))


def corpus_history(corpus: Path, row: FoundRow) -> RowHistory:
    """Returns what the versions of a corpus know of a row, see `find_in_corpus`. Raises StorageError, CorpusError."""
    history = _with_publications(RowHistory(row.id, row.origin, row.question), corpus)
    fates = []
    for version in reversed(list_versions(corpus)):
        path = version / FATES
        for found in find_rows([path], row.origin) if path.exists() else []:
            if found.origin == row.origin:
                fates.append((version.name, _fate(read_record(found.path, found.row))))
    named = fates[0][1].resembles if fates else None
    kept = find_ids(list(_unique_shards(_manifests(corpus))), [named]) if named else []
    return replace(history, fates=tuple(fates), resembles=next(iter(kept), None))


def _stage_files(workspace: Workspace, stage: str) -> tuple[list[Path], list[Path]]:
    """Returns the files of a stage's rows and those of its fates."""
    folder = workspace.root / "stages" / stage
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    fates = [path for path in files if path.name.endswith(_FATES_SUFFIX)]
    return [path for path in files if not path.name.endswith(_FATES_SUFFIX)], fates


def _shard(path: Path) -> str:
    return path.name.removesuffix(_FATES_SUFFIX).removesuffix(".parquet")


def _costs(config: RunConfig, row: FoundRow, replies: Sequence[StageReplies]) -> Ledger:
    """Returns what the stored replies cost, by stage, purpose and model as it is called in the configuration."""
    configured = {endpoint.model for endpoint in (*config.difficulty_endpoints, config.reasoner_endpoint)}
    costs: dict[UsageKey, Usage] = {}
    for done in replies:
        for stored in done.replies:
            is_trace = stored.purpose == reasoning.PURPOSE
            asked = config.reasoner_endpoint.model if is_trace else config.teacher.model
            # A server may call its model otherwise than it is asked for.
            model = stored.reply.model if stored.reply.model in configured else asked
            key = UsageKey(done.stage, stored.purpose, row.origin.partition(":")[0], model)
            costs[key] = costs.get(key, Usage()) + Usage.of_stored(stored.reply)
    return costs


def _stored_images(config: RunConfig, sample: Sample | None, fate: Fate | None) -> tuple[RowImage, ...]:
    """Returns the images of a row in the image store; of a row that never became a sample, those that were stored."""
    store = ImageStore(Workspace(config.workdir).images, config.images)
    refs = sample.images if sample else [ImageRef(sha256, 0, 0) for sha256 in (fate.images if fate else ())]
    images = []
    for ref in refs:
        file = store.path(ref.sha256)
        num_bytes = file.stat().st_size if file.exists() else None
        images.append(RowImage(ref.sha256, ref.width or None, ref.height or None, num_bytes, file))
    return tuple(images)


def _steps(config: RunConfig, workspace: Workspace, row: FoundRow) -> tuple[Step, ...]:
    """Returns what each stage did with a row, in order."""
    shard, steps, has_left, before = _shard(row.path), [], False, ""
    for stage in stages_of(config):
        if has_left:
            steps.append(Step(stage, "left before"))
            continue
        step = _step(workspace, stage, shard, row.origin, _said_by(stage))
        if stage in LABELLING and step.outcome != "not done":
            step = replace(step, is_current=_is_current(config, workspace, stage, before, shard))
        steps.append(step)
        has_left = step.outcome != "kept"
        before = stage
    if not has_left:
        unwritten = _find_origin(workspace.fates_path(CORPUS_STAGE, "all"), row.origin)
        fate = _fate(read_record(*unwritten)) if unwritten else None
        steps.append(
            Step(CORPUS_STAGE, str(fate.exit) if fate else "kept", _left_words(fate) if fate else "", fate=fate)
        )
    return tuple(steps)


def _step(workspace: Workspace, stage: str, shard: str, origin: str, said: Callable[[Mapping[str, Any]], str]) -> Step:
    found = _find_origin(workspace.rows_path(stage, shard), origin)
    if found:
        return Step(stage, "kept", said(read_record(*found)), *found)
    found = _find_origin(workspace.fates_path(stage, shard), origin)
    if found:
        fate = _fate(read_record(*found))
        return Step(stage, str(fate.exit), _left_words(fate), *found, fate=fate)
    return Step(stage, "not done")


def _left_words(fate: Fate) -> str:
    alike = "" if fate.similarity is None else f" ({fate.similarity:.3f} alike)"
    return f"{fate.reason}: {fate.detail}{alike}"


def _find_origin(path: Path, origin: str) -> tuple[Path, int] | None:
    """Returns the place of the row of an origin in a file, None if it is not there."""
    if not path.exists():
        return None
    rows = pl.scan_parquet(path, glob=False, hive_partitioning=False, row_index_name="row")
    try:
        with storage_errors(path, "read"):
            found = rows.filter(pl.col("origin") == origin).select("row").collect()
    except pl.exceptions.PolarsError as error:
        raise StorageError(f"cannot read {path}: {error}; delete it to have it made again") from error
    return (path, int(found.item(0, 0))) if found.height else None


def _fate(record: Mapping[str, Any]) -> Fate:
    return Fate(**{**record, "exit": Exit(record["exit"]), "images": tuple(record["images"])})


def _is_current(config: RunConfig, workspace: Workspace, stage: str, before: str, shard: str) -> bool:
    """Returns whether a judging stage was done under the settings of now, on what the stage before it holds now."""
    marker, earlier = workspace.read_marker(stage, shard), workspace.read_marker(before, shard)
    if marker is None or earlier is None:
        return False
    return marker.digest == stage_digest(stage, config, earlier.output)


def _said_by(stage: str) -> Callable[[Mapping[str, Any]], str]:
    """Returns what puts into words what a stage decided about the row it kept."""
    said: dict[str, Callable[[Mapping[str, Any]], str]] = {
        SOURCES: lambda row: f"read with {len(row['images'])} images and {len(row['choices'])} options",
        "routing": lambda row: f"{row['kind']}, answer type {row['answer_type']}, topic {row['topic']}",
        "difficulty": lambda row: _decision_words(row, "difficulty"),
        "performance": lambda row: _decision_words(row, "performance"),
        "reasoning": lambda row: (
            f"a chain of thought of {len(row['reasoning'].split())} words" if row["reasoning"] else "needs none"
        ),
        "answers": lambda row: f"the answer is {row['final_answer']!r:.200}",
    }
    return said.get(stage, lambda row: "")


def _decision_words(row: Mapping[str, Any], heuristic: str) -> str:
    if row["heuristic"] != heuristic:
        return f"not for {row['kind']} rows"
    return f"{row['mode']}; {evidence_sentence(dict(row))}"


def _sample(steps: Sequence[Step]) -> Sample | None:
    """Returns the row as the last stage that kept it has it: routed, if it came so far."""
    kept = [step for step in steps if step.outcome == "kept" and step.file is not None and step.row is not None]
    if not kept:
        return None
    last = kept[-1]
    assert last.file is not None and last.row is not None
    return sample_from_record(read_record(last.file, last.row))


def _replies(config: RunConfig, workspace: Workspace, shard: str, steps: Sequence[Step]) -> Iterator[StageReplies]:
    """Yields the stored replies of each judging stage that the row came to, in order."""
    before: Step | None = None
    for step in steps:
        if step.stage in LABELLING and before is not None and before.outcome == "kept":
            assert before.file is not None and before.row is not None
            record = read_record(before.file, before.row)
            table = pa.Table.from_pylist([{name: record.get(name) for name in WORK_SCHEMA.names}], schema=WORK_SCHEMA)
            (row,) = work_rows(table)
            yield read_stage_replies(step.stage, config, workspace.journal_path(step.stage, shard), row)
        before = step


def _manifests(corpus: Path) -> list[tuple[Path, Manifest]]:
    """Returns the versions of a corpus that can be read, newest first."""
    manifests = []
    for version in reversed(list_versions(corpus)):
        try:
            manifests.append((version, load_manifest(version)))
        except CorpusError:
            continue  # Of a damaged version nothing is known; `bimode validate` says what is wrong with it.
    return manifests


def _unique_shards(manifests: Iterable[tuple[Path, Manifest]]) -> dict[Path, str]:
    """Returns a file for each shard that differs from all others, with its sha256."""
    unique: dict[str, Path] = {}
    for folder, manifest in manifests:
        for shard in manifest.shards:
            if (folder / shard.path).is_file():
                unique.setdefault(shard.sha256, folder / shard.path)
    return {path: sha256 for sha256, path in unique.items()}


def _with_publications(history: RowHistory, corpus: Path) -> RowHistory:
    """Returns a history with the versions that hold the row, and what the newest of them holds."""
    if history.id is None or not corpus.is_dir():
        return history
    manifests = _manifests(corpus)
    shards = _unique_shards(manifests)
    places = {shards[row.path]: row for row in find_ids(list(shards), [history.id])}
    published, newest = [], None
    for folder, manifest in manifests:
        marks = {id_: (mark, since) for id_, mark, since in _marks(folder, history.id)}
        for shard in manifest.shards:
            place = places.get(shard.sha256)
            if place is not None:
                newest = newest or place
                mark, marked_since = marks.get(history.id, ("", ""))
                since = shard.since or manifest.version
                published.append(Publication(manifest.version, shard.path, place.row, since, mark, marked_since))
    if newest is None:
        return history
    record = read_record(newest.path, newest.row)
    held = tuple(RowImage(image["path"], num_bytes=len(image["bytes"])) for image in record["images"])
    record["images"] = [image.sha256 for image in held]
    images = history.images or held
    return replace(history, published=tuple(published), place=newest, record=record, images=images)


def _marks(folder: Path, id_: str) -> list[tuple[str, str, str]]:
    marks = pl.DataFrame(read_marks(folder / MARKS)).filter(pl.col("id") == id_)
    return list(marks.iter_rows())


def read_image(history: RowHistory, image: RowImage) -> bytes:
    """Returns the bytes of one of a row's images. Raises StorageError, CorpusError: it is missing or damaged."""
    if image.file is not None:
        return ImageStore(image.file.parents[1], ImageLimits()).read(image.sha256)
    assert history.place is not None, "images of no store come from a version"
    record = read_record(history.place.path, history.place.row, _IMAGE_COLUMNS)
    return next(bytes(shown["bytes"]) for shown in record["images"] if shown["path"] == image.sha256)
