"""Every stored reply of a run as one table: what was asked, what came back, what it cost.

    import polars as pl
    from teacher.replies import scan_replies

    replies = scan_replies("runs/corpus/journals")
    calls = pl.col("choice") == 0   # the prompt of a call with several choices was computed once
    replies.group_by("purpose").agg(
        replies=pl.len(),
        prompt_tokens=pl.col("prompt_tokens").filter(calls).sum(),
        completion_tokens=pl.col("completion_tokens").sum(),
    ).collect(engine="streaming")

The columns are those of `teacher.compacted.SCHEMA`. A row is a stored reply, not a use of one: two judges that ask the
very same thing share it, and it stands under the one that asked first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import StorageError
from teacher.attempts import Plan, is_first_version, is_journal_name, read_plan, storage_errors
from teacher.compacted import SCHEMA, check_whole, table_of
from teacher.journal import read_journal

if TYPE_CHECKING:
    import polars as pl

_BATCH_ROWS = 4096


def scan_replies(folder: str | Path, *, check: bool = True) -> pl.LazyFrame:
    """Returns all believed replies of the journals at any depth below a folder, one row each, columns as in `SCHEMA`.

    Compacted journals are scanned as Parquet, so only what a query needs is read. What is not compacted yet is read
    record by record, a batch at a time, when the query runs.

    check: read all compacted files once to see that they are whole. polars looks at no checksum: of a damaged file it
    may show other texts and numbers than were stored. Turn it off for a quick look at many gigabytes.

    Raises StorageError: there is no such folder, it cannot be read, or a file in it is damaged or no journal.
    """
    import polars as pl  # noqa: PLC0415 - not in the environment of training programs, which write journals, too
    from polars.io.plugins import register_io_source  # noqa: PLC0415

    schema = pl.DataFrame(SCHEMA.empty_table()).schema
    plans = _read_plans(Path(folder))
    compacted = [plan.compacted for plan in plans.values() if plan.compacted is not None and not plan.parts]
    if check:
        _check_compacted(compacted)
    growing = [journal for journal, plan in plans.items() if plan.parts]

    def read_growing(
        columns: list[str] | None, predicate: pl.Expr | None, num_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        records = islice((record for journal in growing for record in read_journal(journal)), num_rows)
        while rows := list(islice(records, batch_size or _BATCH_ROWS)):
            frame = pl.DataFrame(table_of(rows))
            frame = frame if predicate is None else frame.filter(predicate)
            yield frame if columns is None else frame.select(columns)

    frames = [register_io_source(read_growing, schema=schema)]
    if compacted:
        frames.insert(0, pl.scan_parquet(compacted, schema=schema, missing_columns="insert"))
    return pl.concat(frames)


def scan_rows(folder: str | Path) -> pl.LazyFrame:
    """Returns which journals hold replies to which rows: columns `sample_id` and `journal` (its path), repeatedly.

    Of compacted journals only one column is read, and no checksum is looked at.

    Raises StorageError: there is no such folder, or it cannot be read.
    """
    import polars as pl  # noqa: PLC0415 - as above

    schema = {"sample_id": pl.String(), "journal": pl.String()}
    frames = [pl.LazyFrame(schema=schema)]
    journals: dict[str, str] = {}
    for journal, plan in _read_plans(Path(folder)).items():
        if plan.compacted is not None and not plan.parts:
            journals[str(plan.compacted)] = str(journal)
        elif plan.parts:
            rows = {record.sample_id: str(journal) for record in read_journal(journal)}
            frames.append(pl.LazyFrame({"sample_id": list(rows), "journal": list(rows.values())}, schema=schema))
    if journals:
        compacted = pl.scan_parquet(list(journals), include_file_paths="file").select("sample_id", "file")
        names = pl.LazyFrame({"file": list(journals), "journal": list(journals.values())})
        frames.append(compacted.join(names, on="file").select("sample_id", "journal"))
    return pl.concat(frames)


def _check_compacted(paths: list[Path]) -> None:
    try:
        for path in paths:
            check_whole(path)
    except FileNotFoundError as error:
        raise StorageError(f"{error.filename} was compacted anew meanwhile; ask again") from error


def _read_plans(folder: Path) -> dict[Path, Plan]:
    """Returns what is believed of every journal below a folder, in the order of their paths."""
    if not folder.is_dir():
        raise StorageError(f"cannot read the journals in {folder}: there is no such folder")
    with storage_errors("read the journals in", folder):
        return {journal: read_plan(journal) for journal in sorted(_find_journals(folder))}


def _find_journals(folder: Path) -> set[Path]:
    found: set[Path] = set()
    for parent, _, names in os.walk(folder, onerror=_raise):
        if any(is_journal_name(name) for name in names):
            found.add(Path(parent))
        # A journal of the first version is a file beside the folder of those that followed it.
        found |= {Path(parent, name).with_suffix("") for name in names if is_first_version(name)}
    return found


def _raise(error: OSError) -> None:
    raise error
