"""The artifacts of a run: made once, updated in place, few, and never in the run's way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.artifacts import Artifact

from flows.artifact_texts import Places
from flows.artifacts import RunArtifacts, Throttle, find_examples
from flows.workspace import Marker, Workspace
from schemas.config import RunConfig, parse_config
from schemas.fates import Exit, Fate, StageCount, fates_to_table
from schemas.samples import samples_to_table

CONFIG = parse_config({"name": "tiny", "sources": [{"name": "a", "format": "jsonl", "path": "a.jsonl"}]})


def fate(number: int, reason: str, exit_: Exit = Exit.QUARANTINED) -> Fate:
    return Fate(f"a:a.jsonl#{number}", None, "a", "sources", exit_, reason, f"what was wrong with row {number}")


def finish(workspace: Workspace, shard: str, fates: list[Fate]) -> Marker:
    """Writes a shard of which nothing is left but fates."""
    table = fates_to_table(fates)
    rows = samples_to_table([])
    return workspace.finish_shard("sources", shard, digest="d", num_in=len(fates), rows=rows, fates=table)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=200))
def test_progress_is_shown_when_it_moves_or_a_minute_has_passed_and_never_twice_within_two_seconds(
    looks: list[tuple[float, float]],
) -> None:
    throttle, now, percent, shown = Throttle(0.0), 0.0, 0.0, [(0.0, 0.0)]
    for seconds, more in looks:
        now, percent = now + seconds, min(100.0, percent + more)
        waited, moved = now - shown[-1][0], percent - shown[-1][1]
        is_due = throttle.is_due(now, percent)
        assert is_due == (waited >= 60 or (waited >= 2 and moved >= 2))
        if is_due:
            shown.append((now, percent))
    assert len(shown) <= 1 + 50 + now / 60


def test_a_stage_is_shown_no_more_often_however_many_shards_it_has() -> None:
    throttle = Throttle(0.0)
    num_shown = sum(throttle.is_due(0.001 * look, look / 10_000) for look in range(1_000_000))
    assert num_shown <= 50 + 1000 / 60


def test_each_reason_has_the_first_row_that_left_for_it_as_an_example(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = finish(workspace, "a-00000", [fate(0, "dropped_one", Exit.DROPPED), fate(1, "empty"), fate(2, "empty")])
    second = finish(workspace, "a-00001", [fate(3, "empty"), fate(4, "missing")])
    found = find_examples(workspace, [first, second])
    assert {key: (example.origin, example.file.name) for key, example in found.items()} == {
        ("sources", "empty"): ("a:a.jsonl#1", "a-00000.fates.parquet"),
        ("sources", "missing"): ("a:a.jsonl#4", "a-00001.fates.parquet"),
    }
    assert found["sources", "empty"].detail == "what was wrong with row 1"


def test_fates_that_cannot_be_read_are_said_in_place_of_the_example(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    marker = finish(workspace, "a-00000", [fate(1, "empty")])
    workspace.fates_path("sources", "a-00000").write_bytes(b"PAR1 and no more")
    [example] = find_examples(workspace, [marker]).values()
    assert example.origin == "" and example.detail.startswith("cannot read ")


@pytest.fixture
def shown(tmp_path: Path) -> RunArtifacts:
    return artifacts_of(CONFIG, tmp_path, [])


def artifacts_of(config: RunConfig, folder: Path, warnings: list[str]) -> RunArtifacts:
    return RunArtifacts(config, Workspace(folder), Places(folder), warnings.append)


def counts(num_quarantined: int) -> dict[str, StageCount]:
    return {"sources": StageCount(100, 100 - num_quarantined, Counter(), Counter(empty=num_quarantined))}


@pytest.mark.usefixtures("prefect")
def test_artifacts_are_made_once_under_stable_keys_and_then_updated(
    shown: RunArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    send = httpx.Client.send

    def counted(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        if "/artifacts" in request.url.path and not request.url.path.endswith("filter"):
            requests.append(request.method)
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", counted)

    @flow
    def run() -> None:
        shown.show_progress("progress", 10.0, "one")
        shown.show_progress("progress", 20.0, "two")
        for number in (1, 2, 2, 2):
            shown.show_stage(counts(number), [], {})
        shown.show_tables({})
        shown.show_tables({})

    run()
    assert requests.count("POST") == 3, "progress, funnel, quarantine; nothing was dropped or paid"
    assert requests.count("PATCH") == 3, "stages that end at once are sent once, and what says the same is not sent"
    progress, quarantine = Artifact.get("tiny-progress"), Artifact.get("tiny-quarantine")
    assert progress is not None and (progress.data, progress.description) == (20.0, "two")
    assert quarantine is not None and str(quarantine.data).startswith("2 of 100 rows (2.0 %)")


@pytest.mark.usefixtures("prefect")
def test_a_server_that_does_not_take_an_artifact_costs_a_picture_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    artifacts = artifacts_of(CONFIG, tmp_path, warnings)

    @flow
    def run() -> None:
        artifacts.show_progress("progress", 10.0, "one")

        def fail(*arguments: Any, **options: Any) -> Any:
            raise httpx.ConnectError("connection refused")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prefect.client.orchestration.SyncPrefectClient.update_artifact", fail)
            artifacts.show_progress("progress", 50.0, "lost")
        artifacts.show_progress("progress", 50.0, "lost")

    run()
    assert warnings == ["Prefect's server did not take the artifact progress: connection refused"]
    found = Artifact.get("tiny-progress")
    assert found is not None and found.description == "lost", "it is sent again"
