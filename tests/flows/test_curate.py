"""The whole flow on a real Prefect server, with a scripted teacher and with faults."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from benchmarks.cards import curate_plainly
from corpus.versions import load_manifest, verify_version
from flows.curate import curate
from flows.estimate import estimate_run, render_estimate
from flows.holding import held
from flows.run_config import load_run
from flows.stages import STAGES
from schemas.errors import (
    ConfigError,
    QuarantineExceeded,
    SourceError,
    StorageError,
    TeacherMisconfigured,
    TeacherUnreachable,
)
from schemas.template import parse_completion
from teacher.fault_server import Fault, FaultSchedule, FaultServer
from teacher.usage import row_costs
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

pytestmark = pytest.mark.usefixtures("prefect")


def run(config: Path) -> dict[str, Any]:
    result: dict[str, Any] = curate(str(config))
    return result


def run_plainly(config: Path) -> dict[str, Any]:
    """Runs the stages of the flow in threads; only what Prefect itself does takes the whole flow to be tested."""
    return curate_plainly(load_run(str(config))).to_record()


@pytest.fixture
def teacher() -> Any:
    with ReplayTeacher(scripted_answer, models=["scripted"]) as server:
        yield server


def corpus_rows(folder: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(folder, "data").rglob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def test_every_row_is_in_the_corpus_or_has_a_fate(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in")
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "x", "question": ""}\n{"id": "y", "question": "Whose?", "image": "none.png"}\n')
        file.write('{"id": "0b", "question": "What is the sum of 0 and 0?", "answer": "0"}\n')
    result = run(write_config(tmp_path, questions, teacher.url))
    rows = corpus_rows(result["corpus"])
    fates = pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()
    origins = [row["origin"] for row in rows] + [fate["origin"] for fate in fates]
    assert sorted(origins) == sorted(f"sums:questions.jsonl#{number}" for number in range(63))
    reasons = {fate["reason"] for fate in fates}
    assert {"question_empty", "image_not_found", "duplicate_exact"} <= reasons | {"image_missing", "image_not_found"}
    verify_version(result["corpus"])


def test_modes_follow_from_what_the_teacher_can_do(tmp_path: Path, teacher: ReplayTeacher) -> None:
    result = run_plainly(write_config(tmp_path, write_questions(tmp_path / "in"), teacher.url))
    for row in corpus_rows(result["corpus"]):
        completion = parse_completion(row["completion"][0]["content"][0]["text"])
        assert (completion.reasoning != "") == (row["mode"] == "think")
        if row["kind"] == "objective":
            is_hard = int(row["reference"]) >= 100
            assert row["mode"] == ("think" if is_hard else "direct")
            assert completion.answer == row["reference"]
            assert row["num_scored"] == 8 if is_hard else row["num_right"] >= 1
        else:
            assert row["mode"] == ("think" if "Explain" in row["question"] else "direct")
            assert row["probability"] == pytest.approx(0.9 if row["mode"] == "think" else 0.2, abs=1e-6)


def test_the_corpus_loads_with_datasets(tmp_path: Path, teacher: ReplayTeacher, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run_plainly(write_config(tmp_path, write_questions(tmp_path / "in"), teacher.url))
    loaded = datasets.load_dataset(result["corpus"], "all", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == result["rows"]
    with_image = next(row for row in loaded if row["images"])
    assert with_image["images"][0].size == (40, 30)


def test_a_second_run_makes_no_call_and_no_new_version(tmp_path: Path, teacher: ReplayTeacher) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in"), teacher.url)
    first = run(config)
    num_calls = len(teacher.calls)
    second = run(config)
    assert len(teacher.calls) == num_calls
    assert (second["corpus"], second["is_new"], second["new_teacher_calls"]) == (first["corpus"], False, 0)


def test_a_new_corpus_is_announced_once_under_its_own_name(
    tmp_path: Path, teacher: ReplayTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = []
    monkeypatch.setattr(
        "flows.events.emit_event",
        lambda event, resource, payload: announced.append((event, resource["prefect.resource.id"], payload)),
    )
    config = write_config(tmp_path, write_questions(tmp_path / "in", 10), teacher.url, name="charts.v2")
    first = run(config)
    run(config)
    assert {resource for _, resource, _ in announced} == {"bimode.corpus.charts.v2"}
    told = [(event, payload) for event, _, payload in announced if event != "bimode.stage.finished"]
    assert told == [
        ("bimode.corpus.created", first),
        (
            "bimode.corpus.unchanged",
            {"corpus": first["corpus"], "version": "v0001", "rows": 10, "new_teacher_calls": 0},
        ),
    ]
    stages = [payload["stage"] for event, _, payload in announced if event == "bimode.stage.finished"]
    assert stages == 2 * [stage for stage in STAGES if stage != "decontamination"]


def test_settings_for_one_run_take_the_place_of_the_file_s(tmp_path: Path, teacher: ReplayTeacher) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in", 20), teacher.url)
    given = {"performance": {"exhaustive": True}, "difficulty": {"threshold": 0.95}}
    result: dict[str, Any] = curate(str(config), overrides=given)
    rows = corpus_rows(result["corpus"])
    assert {row["num_sampled"] for row in rows if row["kind"] == "objective"} == {8}
    assert {row["mode"] for row in rows if row["kind"] == "subjective"} == {"direct"}


def test_settings_that_do_not_fit_stop_a_run_before_any_work(tmp_path: Path, teacher: ReplayTeacher) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in", 20), teacher.url, performance={"waves": [4, 4]})
    with pytest.raises(ConfigError, match=r"(?s)with performance.num_samples = 9 has 1 problem.*add up to less"):
        curate(str(config), overrides={"performance": {"num_samples": 9}})
    assert not (tmp_path / "work").exists() and not teacher.calls


def test_a_changed_verifier_relabels_without_a_call(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in")
    first = run_plainly(write_config(tmp_path, questions, teacher.url))
    teacher.stop()
    second = run_plainly(write_config(tmp_path, questions, teacher.url, verification={"relative_tolerance": 0.5}))
    assert (second["version"], second["new_teacher_calls"]) == ("v0002", 0)
    assert corpus_rows(first["corpus"])[0]["recipe"] != corpus_rows(second["corpus"])[0]["recipe"]


def test_the_corpus_does_not_depend_on_workers_or_waves(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in")
    texts = []
    for name, settings in (
        ("one", {"parallel_shards": 1, "shard_rows": 7}),
        ("two", {"parallel_shards": 4, "shard_rows": 25, "performance": {"waves": [8], "audit_share": 0.2}}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        result = run_plainly(write_config(folder, questions, teacher.url, **settings))
        texts.append([(row["id"], row["mode"], row["completion"]) for row in corpus_rows(result["corpus"])])
    assert sorted(texts[0], key=str) == sorted(texts[1], key=str)


def test_new_rows_alone_cost_calls(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in", 30)
    config = write_config(tmp_path, questions, teacher.url)
    run_plainly(config)
    before = {call.key for call in teacher.calls} if hasattr(teacher.calls[0], "key") else set()
    num_calls = len(teacher.calls)
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "new", "question": "What is the sum of 30 and 31?", "answer": "61"}\n')
    result = run_plainly(config)
    assert result["version"] == "v0002"
    assert 1 <= len(teacher.calls) - num_calls <= 9
    assert teacher.num_repeated == 0, before


@pytest.mark.parametrize("shard_rows", [10, 1000], ids=["in new shards", "in a shard read anew"])
def test_published_rows_stay_when_a_better_copy_comes(tmp_path: Path, teacher: ReplayTeacher, shard_rows: int) -> None:
    questions = write_questions(tmp_path / "in", 30)
    config = write_config(tmp_path, questions, teacher.url, shard_rows=shard_rows)
    before = {row["id"] for row in corpus_rows(run_plainly(config)["corpus"])}
    stage = tmp_path / "work" / "stages" / "duplicates"
    settled = {path.name: path.stat().st_mtime_ns for path in stage.glob("*.published")}
    better = {"id": "better", "question": "Describe the thing number 4 here.", "image": "4.png", "answer": "A thing."}
    other = {"id": "other", "question": "What is the sum of 30 and 31?", "answer": "61"}
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps(better) + "\n" + json.dumps(other) + "\n")
    result = run_plainly(config)
    after = {row["id"] for row in corpus_rows(result["corpus"])}
    assert before < after and len(after) == len(before) + 1
    fates = pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()
    fate = next(fate for fate in fates if fate["origin"] == "sums:questions.jsonl#30")
    assert fate["reason"] == "duplicate_exact" and fate["resembles"] in before
    assert "equals sums:questions.jsonl#4" in fate["detail"]
    again = {path.name: path.stat().st_mtime_ns for path in stage.glob("*.published")}
    if shard_rows == 10:
        assert again.items() > settled.items(), "settled shards are not made again"
    assert not list(stage.glob("*.features"))


def test_a_killed_run_ends_with_the_identical_corpus(tmp_path: Path) -> None:
    """The whole process group is killed at random moments; only calls in flight are made again."""
    questions = write_questions(tmp_path / "in", 40)
    digests = []
    for name, num_kills in (("calm", 0), ("killed", 4)):
        folder = tmp_path / name
        folder.mkdir()
        with ReplayTeacher(scripted_answer, models=["scripted"], delay_seconds=0.02) as server:
            config = write_config(folder, questions, server.url)
            rng = random.Random(5)
            for _ in range(num_kills):
                _run_and_kill(config, after_calls=rng.randrange(5, 60), server=server)
            result = run(config)
        digests.append(load_manifest(result["corpus"]).digest)
    assert digests[0] == digests[1]


def _run_and_kill(config: Path, *, after_calls: int, server: ReplayTeacher) -> None:
    """Runs the flow in a process group of its own and kills it once the teacher has had so many more calls."""
    script = f"from flows.curate import curate; curate({str(config)!r})"
    before = len(server.calls)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # The run starts a Prefect server of its own, which takes more than the usual 20 s on a busy machine.
        env={
            **os.environ,
            "PYTHONPATH": os.getcwd(),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        },
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(server.calls) - before < after_calls and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_unreachable_teacher_is_named_with_its_address(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in", 10), "http://127.0.0.1:9/v1")
    with pytest.raises(TeacherUnreachable, match=r"127\.0\.0\.1:9"):
        run(config)


def test_a_wrong_model_name_lists_the_served_ones(tmp_path: Path, teacher: ReplayTeacher) -> None:
    settings = {"model": "gpt-none", "url": teacher.url}
    config = write_config(tmp_path, write_questions(tmp_path / "in", 10), teacher.url, teacher=settings)
    with pytest.raises(TeacherMisconfigured, match="scripted"):
        run(config)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in", 10)
    sources = [{"name": "a", "format": "jsonl", "path": str(questions), "columns": {"question": "frage"}}]
    with pytest.raises(SourceError, match="question"):
        run(write_config(tmp_path, questions, teacher.url, sources=sources))


def test_a_corrupt_parquet_file_is_named(tmp_path: Path, teacher: ReplayTeacher) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not parquet")
    sources = [{"name": "a", "format": "parquet", "path": str(tmp_path / "bad.parquet")}]
    with pytest.raises(SourceError, match=r"bad\.parquet"):
        run(write_config(tmp_path, tmp_path, teacher.url, sources=sources))


def test_too_large_a_quarantine_stops_the_run_and_says_why(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = tmp_path / "bad.jsonl"
    empty = '{"id": "1", "question": ""}\n'
    questions.write_text(empty * 5 + '{"id": "2", "question": "Why?", "answer": "so"}\n', encoding="utf-8")
    sources = [
        {"name": "a", "format": "jsonl", "path": str(questions), "columns": {"answer": "answer", "id": "id"}},
    ]
    with pytest.raises(QuarantineExceeded, match=r"5 of 6 rows .*question_empty"):
        run(write_config(tmp_path, questions, teacher.url, sources=sources))


def test_two_rows_with_one_id_keep_the_first(tmp_path: Path, teacher: ReplayTeacher) -> None:
    questions = write_questions(tmp_path / "in", 30)
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "3", "question": "What is the sum of 5 and 50?", "answer": "55"}\n')
    result = run(write_config(tmp_path, questions, teacher.url))
    fates = pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()
    clash = next(fate for fate in fates if fate["reason"] == "duplicate_source_id")
    assert (clash["exit"], clash["origin"]) == ("quarantined", "sums:questions.jsonl#30")


def test_a_work_folder_that_is_in_use_is_refused(tmp_path: Path, teacher: ReplayTeacher) -> None:
    from flows.workspace import Workspace

    config = write_config(tmp_path, write_questions(tmp_path / "in", 10), teacher.url)
    with Workspace(tmp_path / "work").locked(), pytest.raises(StorageError, match="another run is at work"):
        run(config)
    named = r"someone \(process \d+ on .* is at work in .*work\. Nothing was changed: wait for it \(--wait does\)"
    holder = held(Workspace(tmp_path / "work"), "someone", wait=False, say=print)
    with holder, pytest.raises(StorageError, match=named):
        run(config)
    assert not teacher.calls


def test_a_full_disk_is_told_by_name(tmp_path: Path, teacher: ReplayTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in", 10), teacher.url)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corpus.storage.os.fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*free some space and run again"):
        run(config)


def test_the_report_tells_what_the_replies_cost_and_what_the_run_paid(tmp_path: Path) -> None:
    """With calls that fail for a while, and one question that the teacher never takes."""

    def answer(body: dict[str, Any], choice: int) -> str | dict[str, Any]:
        return scripted_answer({**body, "_index": body["_index"] + choice})

    faults = FaultSchedule(
        share=0.2,
        kinds=(Fault.SERVER_ERROR, Fault.CUT_JSON),
        persistent=lambda body: Fault.TOO_LARGE if "the thing number 4 here" in str(body["messages"]) else None,
    )
    questions = write_questions(tmp_path / "in")
    with FaultServer(answer, models=["scripted"], faults=faults) as server:
        prices = {"prompt": 1.0, "models": {"scripted": {"prompt": 2.0, "completion": 5.0}}}
        config = write_config(tmp_path, questions, server.url, prices=prices, performance={"waves": [8]})
        result = run_plainly(config)
        num_calls = server.num_calls
        again = run_plainly(config)
        assert server.num_calls == num_calls
    accounting = json.loads(Path(result["corpus"], "report.json").read_text(encoding="utf-8"))["accounting"]
    costs, paid = accounting["costs"]["total"], accounting["paid"]["total"]
    assert paid["num_calls"] + paid["num_retries"] == num_calls and paid["num_retries"] > 10
    assert paid["num_failures"] >= 1 and costs["num_calls"] == paid["num_calls"] - paid["num_failures"]
    performance = next(row for row in accounting["costs"]["by_purpose"] if row["purpose"] == "performance")
    assert performance["num_replies"] == 8 * performance["num_calls"]
    assert costs["cost"] == pytest.approx((2.0 * costs["prompt_tokens"] + 5.0 * costs["completion_tokens"]) / 1e6)
    assert [(row["source"], row["cost"]) for row in accounting["costs"]["by_source"]] == [("sums", costs["cost"])]
    stored = row_costs(tmp_path / "work" / "journals").sum().collect().to_dicts()[0]
    for name in ("num_calls", "num_replies", "num_retries", "prompt_tokens", "completion_tokens"):
        assert stored[name] == costs[name], name
    assert (result["paid"]["num_calls"], again["paid"]["num_calls"]) == (paid["num_calls"], 0)
    assert again["paid"]["text"] == "paid nothing: nothing was asked"
    assert (again["corpus"], again["is_new"]) == (result["corpus"], False)


def test_a_dry_run_asks_nothing_and_bounds_the_calls(tmp_path: Path, teacher: ReplayTeacher) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in"), teacher.url)
    estimate = estimate_run(load_run(str(config)))
    assert len(teacher.calls) == 0
    by_purpose = {purpose.purpose: purpose for purpose in estimate.purposes}
    assert by_purpose["difficulty"].low == by_purpose["difficulty"].high == 12
    assert "What is the sum" in render_estimate(estimate)
    run(config)
    calls = [call.purpose for call in teacher.calls]
    for name, purpose in by_purpose.items():
        assert purpose.low <= calls.count(name) <= purpose.high, name
    json.dumps(estimate.to_record())


def test_a_missing_configuration_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        run(tmp_path / "none.yaml")


def test_relative_paths_start_at_the_project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "workdir: runs/demo\n"
        "corpus: {folder: out/corpus}\n"
        "sources:\n"
        "  - {name: a, format: jsonl, path: data/a.jsonl, image_root: data/images}\n"
        "  - {name: b, format: datasets, path: team/set}\n"
        "  - {name: c, format: parquet, path: 's3://bucket/c.parquet'}\n",
        encoding="utf-8",
    )
    loaded = load_run("run.yaml")
    assert loaded.workdir == str(tmp_path / "runs/demo")
    assert loaded.corpus.folder == str(tmp_path / "out/corpus")
    assert [source.path for source in loaded.sources] == [
        str(tmp_path / "data/a.jsonl"),
        "team/set",
        "s3://bucket/c.parquet",
    ]
    assert loaded.sources[0].image_root == str(tmp_path / "data/images")
