"""Makes the report of a version: at the end of a run from all that the work folder holds, or anew at any time.

The shards, the rows that left and the work folder are read here; the page is built in `corpus.report`. What is missing,
a work folder that is gone or a journal that is damaged, is said on the page and costs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from corpus.accounting import ledgers_of
from corpus.excerpts import ShownFate, ShownReply, ShownRow, pick_fates, pick_pairs, pick_rows, questions_of
from corpus.lineage import read_marks
from corpus.report import BenchmarkLeaks, LeakedPair, ReportInputs, VersionBefore, build_report
from corpus.storage import storage_errors, write_bytes
from corpus.tally import CorpusTally, ModeCount, tally_corpus, tally_fates
from corpus.versions import FATES, FIGURES, MARKS, REPORT, list_versions, load_manifest
from flows.reported_replies import RunRows, count_audit, find_rows, read_replies
from flows.runtime import Runtime
from schemas.errors import BimodeError, CorpusError, StorageError
from schemas.fates import StageCount
from schemas.samples import AnswerType, Kind, Sample, Topic
from schemas.usage import Ledger


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What a report tells beside what is counted in the version's files.

    recipe, inputs: digests. counts: of each stage, in order, that of the corpus last. costs: of all stored replies that
    the rows asked for. paid: by the run. leaks: of each benchmark. shards: of the run, whose audit slice is counted in
    the work folder; audit: that slice, where it is known already. agreement: see `ReportInputs`.
    """

    version: str
    created: str
    recipe: str
    inputs: str
    counts: Mapping[str, StageCount]
    costs: Ledger = field(default_factory=dict)
    paid: Ledger = field(default_factory=dict)
    leaks: Sequence[BenchmarkLeaks] = ()
    shards: Sequence[str] = ()
    audit: Mapping[tuple[int, int], int] | None = None
    agreement: Mapping[str, Any] | None = None
    teacher: str = ""
    reasoner: str = ""
    missing: Sequence[str] = ()


def write_report(
    runtime: Runtime,
    folder: Path,
    facts: ReportFacts,
    *,
    tally: CorpusTally | None = None,
    before: Path | None = None,
    page: Path | None = None,
) -> dict[str, Any]:
    """Writes the report of a version, finished or being built, and returns its figures.

    tally: of the shards, where the caller has counted them. before: the version to compare with; by default the one
    before this in the same corpus folder. page: where the page goes, alone; by default it goes into the version with
    its figures beside it, `report.html` and `report.json`.

    Raises CorpusError, StorageError: a file of the version is damaged, or the disk fails.
    """
    inputs = _gather(runtime, folder, facts, tally or tally_corpus(folder))
    earlier = before or version_before(folder.parent, facts.version)
    html, figures = build_report(replace(inputs, before=_version_record(earlier) if earlier else None))
    write_bytes(page or folder / REPORT, html.encode("utf-8", "replace"))
    if page is None:
        text = json.dumps(figures, indent=2, ensure_ascii=False)
        write_bytes(folder / FIGURES, text.encode("utf-8", "replace"))
    return figures


def remake_report(runtime: Runtime, version: Path, *, page: Path | None = None) -> dict[str, Any]:
    """Writes the report of a published version anew and returns its figures.

    What no file of the version or the work folder tells any more (costs, leaks, the audit slice) is taken from the
    report that it has. page: as of `write_report`.

    Raises CorpusError: the version is damaged. StorageError.
    """
    manifest, figures = load_manifest(version), _read_figures(version / FIGURES)
    tally = tally_corpus(version)
    if tally.rows.total != manifest.num_rows:
        raise CorpusError(
            f"{version} holds {tally.rows.total:,} rows, its manifest says {manifest.num_rows:,}: it is damaged"
        )
    known = _facts_of(figures)
    facts = ReportFacts(
        version=manifest.version,
        created=manifest.created,
        recipe=manifest.recipe,
        inputs=manifest.inputs,
        counts=manifest.counts,
        **known,
    )
    return write_report(runtime, version, facts, tally=tally, page=page)


def version_before(corpus: Path, version: str) -> Path | None:
    """Returns the newest finished version of a corpus folder that is older than one of this name."""
    # Names sort by their numbers as long as these have equally many digits, which `v9999` ends.
    older = [path for path in list_versions(corpus) if (len(path.name), path.name) < (len(version), version)]
    return older[-1] if older else None


def _gather(runtime: Runtime, folder: Path, facts: ReportFacts, tally: CorpusTally) -> ReportInputs:
    """Returns all that the page is made of, but for the version before."""
    config, read_image = runtime.config, runtime.images.read
    rows = pick_rows(folder)
    fates = pick_fates(folder / FATES, read_image=read_image)
    missing = list(facts.missing)
    found, replies = _look_up(runtime, rows, fates, missing)
    audit = facts.audit
    if audit is None and facts.shards:
        audit = count_audit(runtime.workspace, facts.shards)
    leaked = {pair.origin for leaks in facts.leaks for pair in leaks.pairs}
    return ReportInputs(
        name=config.name,
        version=facts.version,
        created=facts.created,
        recipe=facts.recipe,
        inputs=facts.inputs,
        teacher=facts.teacher or config.teacher.model,
        reasoner=facts.reasoner or config.reasoner_endpoint.model,
        stages=facts.counts,
        tally=tally,
        num_marked=read_marks(folder / MARKS).num_rows,
        fates_tally=tally_fates(folder / FATES),
        costs=facts.costs,
        paid=facts.paid,
        benchmarks=facts.leaks,
        prices=config.prices,
        rows=rows,
        fates=tuple(_with_sample(shown, found.known.get(shown.fate.id or "")) for shown in fates),
        pairs=pick_pairs(folder, folder / FATES, read_image=read_image),
        replies=replies,
        leaked_questions=questions_of(folder / FATES, leaked) if leaked else {},
        audit=audit,
        agreement=facts.agreement,
        missing=missing,
    )


def _look_up(
    runtime: Runtime, rows: Sequence[ShownRow], fates: Sequence[ShownFate], missing: list[str]
) -> tuple[RunRows, Mapping[str, Sequence[ShownReply]]]:
    """Returns what the work folder knows of the shown rows; adds to `missing` what it does not."""
    workspace, nothing = runtime.workspace, RunRows({}, {})
    if not workspace.root.is_dir():
        missing.append("The work folder of the run is not here: no replies, images and options of rows that left.")
        return nothing, {}
    ids = {row.id for row in rows} | {shown.fate.id for shown in fates if shown.fate.id}
    try:
        found = find_rows(workspace, ids)
        samples = {**{row.id: _sample_of(row) for row in rows}, **found.known}
        replies = read_replies(runtime, samples, found.before)
    except StorageError as error:
        missing.append(f"The stored replies: {error}")
        return nothing, {}
    if rows and not replies:
        missing.append("The teacher's replies: the journals of the work folder hold none about the rows shown.")
    return found, replies


def _with_sample(shown: ShownFate, sample: Sample | None) -> ShownFate:
    if sample is None:
        return shown
    return replace(
        shown,
        question=sample.question,
        choices=sample.choices,
        reference=sample.answer,
        topic=str(sample.topic or ""),
        kind=str(sample.kind or ""),
        answer_type=str(sample.answer_type or ""),
    )


def _sample_of(row: ShownRow) -> Sample:
    """Returns the sample of a row of the corpus, as far as a verifier needs it."""
    return Sample(
        row.id,
        row.source,
        row.origin,
        row.question,
        choices=row.choices,
        answer=row.reference,
        topic=Topic(row.topic) if row.topic else None,
        kind=Kind(row.kind) if row.kind else None,
        answer_type=AnswerType(row.answer_type) if row.answer_type else None,
    )


def _version_record(version: Path) -> VersionBefore | None:
    """Returns what a report says of the version before; None if that is damaged."""
    try:
        manifest = load_manifest(version)
    except BimodeError:
        return None
    return VersionBefore(
        manifest.version,
        manifest.created,
        manifest.recipe,
        ModeCount(manifest.num_think, manifest.num_direct),
        manifest.counts,
        _read_figures(version / FIGURES),
    )


def _read_figures(path: Path) -> Mapping[str, Any] | None:
    """Returns the figures of a report, None if they cannot be read: no checksum covers them."""
    try:
        with storage_errors(path, "read"):
            figures = json.loads(path.read_text(encoding="utf-8"))
    except (StorageError, ValueError):
        return None
    return figures if isinstance(figures, Mapping) else None


def _facts_of(figures: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the facts that only an earlier report tells, and what of them is missing."""
    lost = "What the earlier report.json alone told: costs, leaks of benchmarks, and the audit slice of rows that left."
    if figures is None:
        return {"missing": [lost]}
    try:
        costs, paid = ledgers_of(figures["accounting"])
        leaks = [
            BenchmarkLeaks(**{**entry, "pairs": [LeakedPair(**pair) for pair in entry["pairs"]]})
            for entry in figures["benchmarks"]
        ]
        audit = {(bar["num_right"], bar["num_scored"]): bar["rows"] for bar in figures["audit"]["histogram"]}
        names = {name: str(figures[name]) for name in ("teacher", "reasoner")}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {"missing": [lost]}
    return {
        "costs": costs,
        "paid": paid,
        "leaks": leaks,
        "audit": audit,
        "agreement": figures.get("agreement"),
        **names,
    }
