"""Relabelling is what a curation with the changed settings gives when it needs no reply that is not stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.cards import MODEL, card, card_number, configuration, curate_plainly, teacher_answer, write_cards
from corpus.versions import verify_version
from flows.commands.relabel import EXAMPLES
from flows.commands.relabel import relabel as relabel_command
from flows.relabelling import LEFT, MISSING, OnMissing, Relabelled, relabel
from flows.setting_changes import changed_config
from flows.staging import STAGING
from flows.workspace import Workspace
from judges import difficulty, performance
from schemas.config import RunConfig
from schemas.errors import ConfigError, QuarantineExceeded, StorageError
from teacher.fault_server import Body, FaultServer, constrained_completion, question_text

NUM_ROWS = 90
NOWHERE = "http://127.0.0.1:9/v1"
"""Nobody listens there: a call would fail."""


def answer(body: Body, choice: int) -> str | Body:
    """Answers as the cards' teacher, with a probability of its own for each card, and near misses for wrong sums."""
    number = card_number(question_text(body))
    if number is not None and body["_purpose"] == difficulty.PURPOSE:
        yes = 0.15 + 0.07 * (number // 2 % 11)
        return constrained_completion({"yes": yes, "no": 1 - yes}, body)
    said = teacher_answer(body, choice)
    if number is not None and isinstance(said, str) and body["_purpose"] == performance.PURPOSE:
        reference = card(number).reference or ""
        if reference.isdecimal() and number % 3:
            return said.replace("zebra", f"{reference}.5")
    return said


def write_rows(folder: Path, *, has_references: bool) -> Path:
    """Writes the cards; with references for the open ones, a row that thinks no more needs no other answer."""
    path = write_cards(folder, NUM_ROWS)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows if has_references else []:
        # So long that no short comparison checks a reply against it: such a row is subjective.
        row.setdefault("answer", f"It is row {row['id']}, and that is why: " + "one thing leads to the next, and " * 6)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


class World:
    """A curated work folder. Each `fork` is a copy to go on from, whose teacher is nowhere unless a url is given."""

    def __init__(self, folder: Path, server: FaultServer, *, has_references: bool) -> None:
        self.folder, self.server, self._num_forks = folder, server, 0
        self.cards = write_rows(folder / "in", has_references=has_references)
        self.config = configuration(self.cards, folder / "work", server.url)
        self.first = curate_plainly(self.config)

    def fork(self, url: str = NOWHERE) -> RunConfig:
        self._num_forks += 1
        workdir = self.folder / f"work-{self._num_forks}"
        shutil.copytree(self.folder / "work", workdir, symlinks=True)
        teacher = self.config.teacher.model_copy(update={"url": url})
        return self.config.model_copy(update={"workdir": str(workdir), "teacher": teacher})


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(answer, models=[MODEL]) as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: FaultServer) -> World:
    return World(tmp_path_factory.mktemp("world"), server, has_references=True)


@pytest.fixture(scope="module")
def open_world(tmp_path_factory: pytest.TempPathFactory, server: FaultServer) -> World:
    return World(tmp_path_factory.mktemp("open"), server, has_references=False)


def run(config: RunConfig, settings: Mapping[str, Any], on_missing: OnMissing = "stop") -> Relabelled:
    return relabel(config, changed_config(config, settings), on_missing=on_missing, num_processes=1)


def tree(folder: Path, *names: str) -> dict[str, bytes]:
    """Returns the files below some folders, by path."""
    paths = [path for name in names for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    """Returns what a version says of its rows; card and manifest bear the time."""
    verify_version(folder)
    return tree(folder, "data") | {name: (folder / name).read_bytes() for name in ("fates.parquet", "marks.parquet")}


def stage_outputs(config: RunConfig) -> dict[str, Any]:
    """Returns digest, output and count of every stage and shard, and the bytes of their rows and fates."""
    files = tree(Path(config.workdir), "stages")
    markers = {
        name: {key: value for key, value in json.loads(content).items() if key != "usage"}
        for name, content in files.items()
        if name.endswith(".json") and "published" not in name
    }
    return markers | {name: content for name, content in files.items() if name.endswith(".parquet")}


CHANGES = [
    {"difficulty.threshold": 0.7},
    {"verification.relative_tolerance": 0.2},
    {"difficulty.threshold": 0.65, "verification.anls_threshold": 0.9, "reasoning.duplicate_threshold": 0.5},
    {"reasoning.judge_consistency": False, "difficulty.threshold": 0.55},
]


@pytest.mark.parametrize("settings", CHANGES, ids="+".join)
def test_it_is_byte_for_byte_the_corpus_and_the_stages_that_a_curation_gives(
    world: World, settings: dict[str, Any]
) -> None:
    relabelled, curated = world.fork(), world.fork(world.server.url)
    num_calls = world.server.num_calls
    expected = curate_plainly(changed_config(curated, settings))
    assert world.server.num_calls == num_calls, "the curation needs no new reply"
    found = run(relabelled, settings)
    assert found.published is not None and found.missing == ()
    assert found.num_changed > 0 and found.published.is_new and found.published.version == "v0002"
    assert corpus_bytes(found.published.folder) == corpus_bytes(expected.folder)
    assert corpus_bytes(found.published.folder) != corpus_bytes(world.first.folder)
    assert stage_outputs(relabelled) == stage_outputs(curated)
    assert not (Path(relabelled.workdir) / STAGING).exists()


def test_worker_processes_give_the_same_corpus(world: World) -> None:
    settings = {"difficulty.threshold": 0.7}
    alone, shared = world.fork(), world.fork()
    run(alone, settings)
    relabel(shared, changed_config(shared, settings), num_processes=2)
    assert stage_outputs(shared) == stage_outputs(alone)
    assert corpus_bytes(Path(shared.workdir, "corpus/v0002")) == corpus_bytes(Path(alone.workdir, "corpus/v0002"))


def test_the_same_settings_change_nothing(world: World) -> None:
    config = world.fork()
    before = stage_outputs(config)
    found = run(config, {})
    assert found.published is not None and not found.published.is_new and found.num_changed == 0
    assert stage_outputs(config) == before


def test_after_it_a_curation_with_the_changed_settings_has_nothing_to_do(world: World) -> None:
    config, settings = world.fork(), {"verification.relative_tolerance": 0.2}
    run(config, settings)
    outputs = stage_outputs(config)
    assert not curate_plainly(changed_config(config, settings)).is_new
    assert stage_outputs(config) == outputs


def test_the_costs_are_those_that_a_curation_counts(world: World) -> None:
    """All but the time of GPUs, which nobody measured here."""
    settings = {"verification.relative_tolerance": 0.2, "difficulty.threshold": 0.7}
    relabelled, curated = world.fork(), world.fork(world.server.url)
    run(relabelled, settings)
    curate_plainly(changed_config(curated, settings))
    costs = [_costs(config) for config in (relabelled, curated)]
    assert costs[0] == costs[1] and any(usage for usage in costs[0].values())


def _costs(config: RunConfig) -> dict[str, Any]:
    paths = sorted((Path(config.workdir) / "stages").glob("*/*.json"))
    records = {str(path.relative_to(config.workdir)): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {name: _rounded(record["usage"]) for name, record in records.items() if "usage" in record}


def _rounded(usage: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(v, 6) if isinstance(v, float) else v for key, v in entry.items()} for entry in usage]


def test_rows_that_would_need_a_reply_stop_it_and_nothing_is_changed(open_world: World) -> None:
    config = open_world.fork()
    before = tree(Path(config.workdir), "stages", "corpus", "journals")
    found = run(config, {"difficulty.threshold": 0.3})
    assert found.published is None
    assert {(one.stage, one.purpose, one.model) for one in found.missing} == {("reasoning", "reasoning", MODEL)}
    lacking = sum(number for change, number in found.changes.items() if change.new == MISSING)
    assert found.num_missing == lacking > 0
    assert all(change.old == "direct" for change in found.changes if change.new == MISSING)
    assert all((one.prompt_tokens or 0) > 0 and (one.completion_tokens or 0) > 0 for one in found.missing)
    assert tree(Path(config.workdir), "stages", "corpus", "journals") == before
    assert not (Path(config.workdir) / STAGING).exists()


def test_a_direct_answer_that_was_never_asked_for_is_missing_too(open_world: World) -> None:
    found = run(open_world.fork(), {"difficulty.threshold": 0.7})
    assert {(one.stage, one.purpose) for one in found.missing} == {("answers", "direct")}


def test_what_is_missing_is_what_a_curation_asks_first(open_world: World) -> None:
    settings = {"difficulty.threshold": 0.3}
    found = run(open_world.fork(), settings)
    asked = open_world.fork(open_world.server.url)
    num_calls = len(open_world.server.calls)
    curate_plainly(changed_config(asked, settings))
    calls = open_world.server.calls[num_calls:]
    first_tries = {question_text(call.body) for call in calls if call.purpose == "reasoning"}
    assert len(first_tries) == found.num_missing


def test_rows_without_their_reply_can_be_left_out_and_are_asked_about_by_the_next_curation(open_world: World) -> None:
    settings = {"difficulty.threshold": 0.3, "max_quarantine_share": 0.5}
    config, curated = open_world.fork(open_world.server.url), open_world.fork(open_world.server.url)
    num_calls = open_world.server.num_calls
    found = run(config, settings, "quarantine")
    assert open_world.server.num_calls == num_calls, "no call whatever happens"
    assert found.published is not None and found.num_missing > 0
    fates = pq.read_table(found.published.folder / "fates.parquet").to_pylist()
    left_out = [fate for fate in fates if fate["reason"] == "reply_not_stored"]
    assert len(left_out) == found.num_missing
    assert {(fate["stage"], fate["exit"]) for fate in left_out} == {("reasoning", "quarantined")}
    assert "no reply of cards to the question 'reasoning'" in left_out[0]["detail"]
    curate_plainly(changed_config(curated, settings))
    curate_plainly(changed_config(config, settings))
    assert stage_outputs(config) == stage_outputs(curated)


def test_leaving_out_too_many_rows_is_an_error_and_publishes_nothing(open_world: World) -> None:
    config = open_world.fork()
    before = tree(Path(config.workdir), "stages", "corpus")
    with pytest.raises(QuarantineExceeded, match=r"after stage reasoning, .* reply_not_stored"):
        run(config, {"difficulty.threshold": 0.0}, "quarantine")
    assert tree(Path(config.workdir), "stages", "corpus") == before


def test_a_dry_run_says_what_a_run_changes_and_writes_nothing(world: World) -> None:
    config = world.fork()
    changed = changed_config(config, {"difficulty.threshold": 0.7, "verification.relative_tolerance": 0.2})
    before = tree(Path(config.workdir), "stages", "corpus", "journals")
    looked = relabel(config, changed, is_dry=True, num_processes=1)
    assert looked.published is None and tree(Path(config.workdir), "stages", "corpus", "journals") == before
    found = relabel(config, changed, num_processes=1)
    assert looked.changes == found.changes and looked.missing == found.missing == ()
    modes = {(change.old, change.new) for change in looked.changes}
    assert ("think", "direct") in modes and ("direct", "think") not in modes
    assert sum(looked.changes.values()) == looked.num_rows
    assert all(change.source == "cards" and change.topic for change in looked.changes if change.new != LEFT)


def test_it_goes_on_where_it_was_stopped(world: World) -> None:
    config, undisturbed = world.fork(), world.fork()
    changed = changed_config(config, {"difficulty.threshold": 0.7})
    before = tree(Path(config.workdir), "stages", "corpus")

    def stop(line: str) -> None:
        if line == "comparing traces":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel(config, changed, num_processes=1, say=stop)
    assert tree(Path(config.workdir), "stages", "corpus") == before, "the last run's stages stand until the end"
    staged = Workspace(next((Path(config.workdir) / STAGING).iterdir()))
    times = {path: path.stat().st_mtime_ns for path in staged.root.rglob("*.parquet")}
    assert len(times) > 0
    # One shard was not flushed when the machine went down.
    damaged = staged.rows_path("reasoning", "cards-00001")
    damaged.write_bytes(damaged.read_bytes()[:-7] + b"\0" * 7)

    def look(line: str) -> None:
        if line == "comparing traces":
            again = {path for path, then in times.items() if path.stat().st_mtime_ns != then}
            assert again == {damaged, staged.fates_path("reasoning", "cards-00001")}

    relabel(config, changed, num_processes=1, say=look)
    run(undisturbed, {"difficulty.threshold": 0.7})
    assert stage_outputs(config) == stage_outputs(undisturbed)


def test_what_was_staged_for_other_settings_is_removed(world: World) -> None:
    config = world.fork()
    stale = Path(config.workdir) / STAGING / "0123456789abcdef" / "stages"
    stale.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="enough"):
        relabel(config, changed_config(config, {"difficulty.threshold": 0.7}), num_processes=1, say=_fail)
    assert not stale.exists()


def _fail(line: str) -> None:
    raise RuntimeError("enough")


def test_a_folder_at_work_and_one_that_never_published_are_named(world: World, tmp_path: Path) -> None:
    config = world.fork()
    with Workspace(config.workdir).locked(), pytest.raises(StorageError, match="is at work in"):
        run(config, {})
    with pytest.raises(ConfigError, match=r"no work folder .*run `bimode curate` first"):
        run(config.model_copy(update={"workdir": str(tmp_path / "none")}), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing is published"):
        run(config.model_copy(update={"workdir": str(tmp_path / "empty")}), {})


def test_rows_read_anew_since_the_last_version_are_left_to_a_curation(world: World) -> None:
    config = world.fork()
    marker = Workspace(config.workdir).marker_path("sources", "cards-00000")
    record = json.loads(marker.read_text(encoding="utf-8"))
    marker.write_text(json.dumps({**record, "output": "0" * 64}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"1 of 3 shards were read or compared anew .*cards-00000"):
        run(config, {})


def test_a_published_source_that_the_configuration_lacks_is_named(world: World) -> None:
    config = world.fork()
    source = config.sources[0].model_copy(update={"name": "others"})
    with pytest.raises(ConfigError, match="no source of the published shard cards-00000"):
        run(config.model_copy(update={"sources": [source]}), {})


def invoke(config: RunConfig, folder: Path, *options: str) -> Any:
    app = typer.Typer()
    app.command(epilog=EXAMPLES)(relabel_command)
    path = folder / "run.yaml"
    path.write_text(config.model_dump_json(), encoding="utf-8")  # JSON is YAML
    return CliRunner().invoke(app, ["--config", str(path), "--processes", "1", *options])


def test_the_command_tells_what_changes_and_how_to_make_it_lasting(world: World, tmp_path: Path) -> None:
    config = world.fork()
    done = invoke(config, tmp_path, "--set", "difficulty.threshold=0.7", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "no call was made" in done.stdout and "think -> direct" in done.stdout
    assert "difficulty:\n  threshold: 0.7" in done.stdout
    done = invoke(config, tmp_path, "--set", "difficulty.threshold=0.7", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 0 and record["published"]["version"] == "v0002" and record["missing"] == []
    assert record["published"]["new_teacher_calls"] == 0 and record["settings"] == {"difficulty.threshold": 0.7}


def test_the_command_says_what_to_do_about_missing_replies(open_world: World, tmp_path: Path) -> None:
    done = invoke(open_world.fork(), tmp_path, "--set", "difficulty.threshold=0.3")
    assert done.exit_code == 4
    assert "calls whose replies are not stored" in done.stderr and "--missing quarantine" in done.stderr
    assert "reasoning" in done.stdout and "to make the settings lasting" not in done.stdout.lower()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "difficulty.treshold=0.7"], "did you mean difficulty.threshold"),
        (["--set", "sources=[]"], "'sources' is no labelling setting"),
        (["--set", "workdir=elsewhere"], "'workdir' is no labelling setting"),
        (["--set", "verification=1"], "did you mean verification."),
        (["--set", "difficulty.threshold"], "is no NAME=VALUE"),
        (["--set", "difficulty.threshold=[0.7"], "not valid YAML"),
        (["--set", "difficulty.threshold=1.7"], "difficulty.threshold: Input should be less than or equal to 1"),
        (["--set", "difficulty.threshold=0.6", "--set", "difficulty.threshold=0.7"], "given twice"),
        (["--set", "verification.num_workers=7"], "no label depends on verification.num_workers"),
        (["--missing", "guess"], "choose one of stop, quarantine"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    world: World, tmp_path: Path, options: list[str], complaint: str
) -> None:
    done = invoke(world.config, tmp_path, *options)
    assert done.exit_code == 2 and complaint in done.stderr, done.output
