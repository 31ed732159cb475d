"""Replies follow their rows: a row that comes to lie in another shard takes its stored replies along.

A journal belongs to a shard, and shards are runs of rows of a source. Where a source lost a row, was sorted anew, or
got a file that comes before the others, rows move to other shards; without this, all their replies would be asked for
again. What is moved is copied: the old journal stays as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import polars as pl

from flows.workspace import Marker, Workspace
from schemas.requests import Reply, TeacherRequest
from teacher.journal import Journal, JournalRecord, read_journal
from teacher.replies import scan_rows

_log = logging.getLogger(__name__)

_BATCH_ROWS = 1024
_Entry = tuple[str, TeacherRequest, Reply]


def fetch_moved(workspace: Workspace, stage: str, undone: Sequence[Marker]) -> int:
    """Copies replies of a stage into the journals of the shards whose rows they answer; returns how many there were.

    undone: markers of the stage before, for the shards about to be labelled. Costs nothing on a first run; else reads
    one column of the stage's journals, and of the journals concerned the records. Memory: 12 bytes a row of the undone
    shards. Killed at any moment, it goes on where it was.

    Raises StorageError: a journal is damaged, or the disk refuses.
    """
    folder = workspace.journal_path(stage, "any").parent
    if not folder.is_dir() or not undone:
        return 0
    num_moved, markers = 0, {marker.shard: marker for marker in undone}
    for shard, journals in _donors(workspace, folder, stage, undone).items():
        marker = markers[shard]
        ids = set(workspace.read_columns(marker.stage, shard, ["id"])["id"].to_pylist())
        num_moved += _copy(journals, workspace.journal_path(stage, shard), ids)
    if num_moved:
        _log.info("%s: %d stored replies followed their rows to other shards", stage, num_moved)
    return num_moved


def _donors(workspace: Workspace, folder: Path, stage: str, undone: Sequence[Marker]) -> dict[str, list[Path]]:
    """Returns by undone shard the other journals that hold replies to its rows."""
    shards = [marker.shard for marker in undone]
    parts = []
    for number, marker in enumerate(undone):
        ids = pl.Series("id", workspace.read_columns(marker.stage, marker.shard, ["id"])["id"])
        parts.append(pl.DataFrame({"hash": ids.hash()}).with_columns(shard=pl.lit(number, pl.UInt32)))
    own = pl.LazyFrame(
        {
            "shard": range(len(shards)),
            "own": [str(workspace.journal_path(stage, shard)) for shard in shards],
        },
        schema={"shard": pl.UInt32, "own": pl.String},
    )
    pairs = (
        scan_rows(folder)
        .select("journal", hash=pl.col("sample_id").hash())
        .join(pl.concat(parts).lazy(), on="hash")
        .select("journal", "shard")
        .unique()
        .join(own, on="shard")
        .filter(pl.col("journal") != pl.col("own"))
        .sort("shard", "journal")
        .collect(engine="streaming")
    )
    donors: dict[str, list[Path]] = {}
    for journal, number in pairs.select("journal", "shard").iter_rows():
        donors.setdefault(shards[number], []).append(Path(journal))
    return donors


def _copy(journals: Sequence[Path], target: Path, ids: set[str]) -> int:
    """Stores the records of some rows in another journal, as far as it lacks them; returns how many they were."""
    num_copied = 0
    with Journal(target) as journal:

        def missing() -> Iterator[_Entry]:
            for donor in journals:
                for record in read_journal(donor):
                    request = _request(record) if record.sample_id in ids and record.key not in journal else None
                    if request is not None:
                        yield record.key, request, record.reply

        entries = missing()
        while batch := list(islice(entries, _BATCH_ROWS)):
            asyncio.run(journal.append_many_durably(batch))
            num_copied += len(batch)
    return num_copied


def _request(record: JournalRecord) -> TeacherRequest | None:
    """Returns the request of a record as it was asked; None for one of the first version, which does not say."""
    if record.sampling is None or record.seed is None:
        return None
    return TeacherRequest(
        purpose=record.purpose,
        sample_id=record.sample_id,
        messages=record.messages,
        sampling=record.sampling,
        index=record.index,
        seed=record.seed,
        choices=record.choices,
    )
