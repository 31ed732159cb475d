"""A run as Prefect's UI shows it: artifacts with stable keys, made once and then updated in place.

| key                      | what it shows                                                                         |
|--------------------------|---------------------------------------------------------------------------------------|
| `NAME-progress`          | the whole run: which stage, and its live line                                         |
| `NAME-progress-STAGE`    | one stage; on the page of its own flow run                                            |
| `NAME-funnel`            | rows in, kept, dropped and quarantined by all stages so far                           |
| `NAME-dropped`           | why rows were dropped                                                                 |
| `NAME-quarantine`        | why rows could not be used, with an example of each reason                            |
| `NAME-cost`              | what the run has paid so far                                                          |
| `NAME-version`           | the version: its figures, the change, where report and corpus are, what to do next    |

NAME is the corpus' name. Their number depends on the stages alone, however many shards and rows there are. They are
updated when a stage has ended, though not twice within two seconds, and progress at most fifty times and once a minute
in each stage. A server that does not answer costs a picture, never the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from flows.artifact_texts import (
    Example,
    Places,
    TableRows,
    artifact_key,
    cost_rows,
    dropped_rows,
    funnel_rows,
    quarantine_text,
    version_text,
)
from flows.publishing import Published
from flows.stages import STAGE_TITLES
from flows.workspace import Marker, Workspace
from schemas.config import RunConfig
from schemas.errors import StorageError
from schemas.fates import Exit, StageCount
from schemas.usage import Ledger

_MIN_SECONDS, _MAX_SECONDS = 2.0, 60.0
_STEP_PERCENT = 2.0

Warn = Callable[[str], None]


class Throttle:
    """When progress is worth an update: it has moved by 2 %, though not within 2 seconds, or a minute has passed."""

    def __init__(self, now: float) -> None:
        self._shown_at, self._shown = now, 0.0

    def is_due(self, now: float, percent: float) -> bool:
        """Returns whether to update now; whoever asks then does."""
        waited = now - self._shown_at
        if waited < _MIN_SECONDS or (percent - self._shown < _STEP_PERCENT and waited < _MAX_SECONDS):
            return False
        self._shown_at, self._shown = now, percent
        return True


class RunArtifacts:
    """The artifacts of one run. Those of the run itself are first shown in its flow, not in a stage's.

    warn: is told what Prefect's server did not take.
    """

    def __init__(self, config: RunConfig, workspace: Workspace, places: Places, warn: Warn) -> None:
        self._config, self._workspace, self._places, self._warn = config, workspace, places, warn
        self._ids: dict[str, UUID] = {}
        self._shown: dict[str, ArtifactUpdate] = {}
        self._examples: dict[tuple[str, str], Example] = {}
        self._counts: Mapping[str, StageCount] = {}
        self._tables_at = -_MIN_SECONDS

    def show_progress(self, what: str, percent: float, line: str) -> None:
        """Shows a progress bar. what: "progress", or "progress-STAGE". line: Markdown of numbers and titles alone."""
        self._show(
            what,
            create=lambda key: create_progress_artifact(percent, key=key, description=line),
            update=ArtifactUpdate(data=percent, description=line),
        )

    def show_stage(self, counts: Mapping[str, StageCount], markers: Sequence[Marker], paid: Ledger) -> None:
        """Takes note of all stages so far, and shows them unless others were shown within the last two seconds.

        counts: by stage, in order. markers: of the last one. paid: by the run so far.
        """
        self._examples |= find_examples(self._workspace, markers)
        self._counts = counts
        if time.monotonic() - self._tables_at >= _MIN_SECONDS:
            self.show_tables(paid)

    def show_tables(self, paid: Ledger) -> None:
        """Shows all stages that were noted, and what the run has paid; called at the end, however that comes."""
        self._tables_at = time.monotonic()
        if self._counts:
            rows = funnel_rows(self._counts, STAGE_TITLES)
            self._show_table("funnel", rows, "What became of the rows, stage by stage")
            text = quarantine_text(self._counts, self._examples, self._config, self._places)
            self._show_page("quarantine", text, "Rows that could not be used")
        if dropped := dropped_rows(self._counts, STAGE_TITLES):
            self._show_table("dropped", dropped, "Why rows were dropped")
        if costs := cost_rows(paid, self._config.prices):
            self._show_table("cost", costs, "What this run has paid so far")

    def show_version(self, published: Published, config: str) -> None:
        """Shows the version. config: path of the configuration file."""
        text = version_text(published.to_record(), published.changes, published.summary, config, self._places)
        news = "" if published.is_new else ", unchanged"
        self._show_page("version", text, f"Corpus {published.version}: {published.num_rows:,} rows{news}")

    def _show_table(self, what: str, rows: TableRows, title: str) -> None:
        self._show(
            what,
            create=lambda key: create_table_artifact(rows, key=key, description=title),
            update=ArtifactUpdate(data=json.dumps(rows), description=title),
        )

    def _show_page(self, what: str, text: str, title: str) -> None:
        self._show(
            what,
            create=lambda key: create_markdown_artifact(text, key=key, description=title),
            update=ArtifactUpdate(data=text, description=title),
        )

    def _show(self, what: str, *, create: Callable[[str], Any], update: ArtifactUpdate) -> None:
        """Makes an artifact, or updates the one this run has made, unless it says just that."""
        if self._shown.get(what) == update:
            return
        with self._forgiving(what):
            if known := self._ids.get(what):
                with get_client(sync_client=True) as client:
                    client.update_artifact(known, update)
            else:
                made = create(artifact_key(self._config.name, what))
                assert isinstance(made, UUID), (
                    "Prefect's types allow for a coroutine, which a flow like ours never gets"
                )
                self._ids[what] = made
            self._shown[what] = update

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, PrefectException) as error:
            self._warn(f"Prefect's server did not take the artifact {what}: {error}")


def find_examples(workspace: Workspace, markers: Sequence[Marker]) -> dict[tuple[str, str], Example]:
    """Returns one quarantined row for each reason of a stage, by stage and reason. Reads one shard's fates for each."""
    examples: dict[tuple[str, str], Example] = {}
    for marker in markers:
        wanted = {reason for reason in marker.count.quarantined if (marker.stage, reason) not in examples}
        if not wanted:
            continue
        path = workspace.fates_path(marker.stage, marker.shard)
        try:
            fates = workspace.read_fates(marker.stage, marker.shard).select(["exit", "reason", "origin", "detail"])
        except StorageError as error:
            examples |= {(marker.stage, reason): Example("", str(error), path) for reason in wanted}
            continue
        for fate in fates.to_pylist():
            key = (marker.stage, fate["reason"])
            if fate["exit"] == Exit.QUARANTINED and fate["reason"] in wanted and key not in examples:
                examples[key] = Example(fate["origin"], fate["detail"], path)
    return examples
