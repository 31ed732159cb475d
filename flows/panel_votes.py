"""How the teachers of a panel voted, read from the stored replies alone: their agreement, and each one's bias.

Votes stand in no table of their own. They are counted once per shard, under the digest of its difficulty stage, and the
counts kept, so that a refresh reads the replies of its new shards only.

    {workdir}/panel/{shard}.json    rows of a shard by the answers of all teachers
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from corpus.agreement import AgreementEntry, panel_entries
from corpus.storage import write_text
from flows.labelling import Ask, difficulty_verdicts
from flows.runtime import Runtime
from flows.stages import LABELLING, stage_digest
from flows.work_rows import work_rows
from flows.workspace import Marker, digest_of
from judges import difficulty
from judges.panel import teacher_names
from schemas.config import EndpointConfig
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import Kind, Sample
from teacher.client import reply_key
from teacher.journal import read_journal

_STAGE = difficulty.PURPOSE
_BEFORE = list(LABELLING)[list(LABELLING).index(_STAGE) - 1]

_Votes = tuple[str | None, ...]


def panel_agreement(runtime: Runtime, shards: Iterable[str]) -> list[AgreementEntry]:
    """Returns how far the teachers of a panel agree on the rows of some shards; nothing where there is no panel.

    shards: whose difficulty stage is done. Raises StorageError: rows or replies cannot be read.
    """
    config = runtime.config
    if not config.difficulty.panel:
        return []
    ratings: Counter[_Votes] = Counter()
    for shard in shards:
        marker = runtime.workspace.read_marker(_STAGE, shard)
        if marker is not None:
            ratings.update(_shard_votes(runtime, marker))
    names = teacher_names(config.difficulty_endpoints)
    return panel_entries(names, ratings, what="the question needs reasoning", seed=config.seed)


def judged_shards(runtime: Runtime) -> list[str]:
    """Returns the shards of the configured sources whose difficulty stage is done as now configured."""
    workspace, shards = runtime.workspace, []
    sources = {source.name for source in runtime.config.sources}
    for path in sorted(workspace.marker_path(_STAGE, "").parent.glob("*.json")):
        before, marker = workspace.read_marker(_BEFORE, path.stem), workspace.read_marker(_STAGE, path.stem)
        if before is None or marker is None or marker.shard.rpartition("-")[0] not in sources:
            continue
        if marker.digest == stage_digest(_STAGE, runtime.config, before.output):
            shards.append(marker.shard)
    return shards


def _shard_votes(runtime: Runtime, marker: Marker) -> Counter[_Votes]:
    """Returns the rows of a shard by the answers of all teachers, counted now or before."""
    path = runtime.workspace.root / "panel" / f"{marker.shard}.json"
    digest = digest_of(marker.digest, marker.output)
    kept = _read_votes(path, digest)
    if kept is not None:
        return kept
    rows = work_rows(runtime.workspace.read_rows(_BEFORE, marker.shard))
    samples = [row.sample for row in rows if row.sample.kind is Kind.SUBJECTIVE]
    votes: Counter[_Votes] = Counter()
    if samples:
        journal = runtime.workspace.journal_path(_STAGE, marker.shard)
        replies = {record.key: record.reply for record in read_journal(journal)}
        votes = runtime.run(_count_votes(runtime, samples, replies))
    write_text(path, json.dumps({"digest": digest, "votes": sorted(votes.items(), key=str)}))
    return votes


def _read_votes(path: Path, digest: str) -> Counter[_Votes] | None:
    """Returns counts that were kept, None if there are none, or others, or damaged ones."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["digest"] != digest:
            return None
        return Counter({tuple(votes): int(num_rows) for votes, num_rows in record["votes"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def _count_votes(runtime: Runtime, samples: Sequence[Sample], replies: Mapping[str, Reply]) -> Counter[_Votes]:
    """Asks the stored replies what the teachers were asked, so that the very same reading and retry decide a vote."""
    asks = [partial(_stored, replies, endpoint) for endpoint in runtime.config.difficulty_endpoints]
    return Counter([await _votes_of(sample, asks, runtime.config.difficulty.threshold) for sample in samples])


async def _stored(
    replies: Mapping[str, Reply], endpoint: EndpointConfig, request: TeacherRequest
) -> Reply | CallFailure:
    return replies.get(reply_key(request, endpoint)) or CallFailure("not_stored", "the call failed")


async def _votes_of(sample: Sample, asks: Sequence[Ask], threshold: float) -> _Votes:
    verdicts = await difficulty_verdicts(sample, asks)
    return tuple(None if isinstance(v, CallFailure) else "yes" if v >= threshold else "no" for v in verdicts)
