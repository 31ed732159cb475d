"""Several teachers judge difficulty: real servers on loopback, one of which says yes to everything."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from flows import stages
from flows.commands.agreement import agreement
from flows.curate import curate
from flows.estimate import estimate_run, render_estimate
from flows.panel_votes import judged_shards, panel_agreement
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.stages import RECIPE_VERSION, Progress, stage_digest
from flows.workspace import Marker, digest_of
from judges.prompts import prompt
from schemas.config import RunConfig
from schemas.errors import TeacherUnreachable
from sources import plan_units
from teacher.usage import row_costs
from tests.flows.scripted_world import scripted_answer, texts_of, write_config
from tests.replay_teacher import Body, ReplayTeacher, constrained_completion

MODELS = ["scripted", "careful", "eager", "moody"]
NUM_ROWS = 24
NOBODY = "http://127.0.0.1:9/v1"


def answer(body: Body) -> str | Body:
    """The main teacher wants thought where it is to explain; `careful` also about number 4; `eager` always.

    `moody` takes no question about a number that ends in 7, and agrees with the main teacher elsewhere.
    """
    system, user = texts_of(body)
    if system != prompt("difficulty"):
        return scripted_answer(body)
    number = re.search(r"number (\d+)", user)
    assert number is not None
    if body["model"] == "moody" and number[1].endswith("7"):
        raise LookupError("I do not take that")
    needs = {"careful": "Explain" in user or number[1] == "4", "eager": True}.get(body["model"], "Explain" in user)
    return constrained_completion({"yes": 0.9, "no": 0.1} if needs else {"yes": 0.2, "no": 0.8}, body)


@pytest.fixture
def teachers() -> Iterator[ReplayTeacher]:
    with ReplayTeacher(answer, models=MODELS) as server:
        yield server


def configured(folder: Path, url: str, *others: str, **difficulty: Any) -> RunConfig:
    """Returns a run over open questions, every third of which asks to explain."""
    folder.mkdir(exist_ok=True)
    questions = folder / "open.jsonl"
    rows = [
        {
            "id": str(n),
            "question": f"{'Explain' if n % 3 == 0 else 'Describe'} the thing number {n} here.",
            "image": None,
            "answer": None,
        }
        for n in range(NUM_ROWS)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    panel = [{"model": model, "url": url, "unreachable_seconds": 1} for model in others]
    settings = {"shard_rows": 10, "routing": {"ask_teacher": False}, "difficulty": {"panel": panel, **difficulty}}
    return load_run(str(write_config(folder, questions, url, **settings)))


def judge(config: RunConfig) -> list[Marker]:
    """Runs the stages up to difficulty as a curation does, without Prefect."""
    runtime, progress = Runtime(config), Progress(0)
    try:
        markers = [stages.read_source_shard(runtime, unit, progress) for unit in plan_units(config)]
        markers = [
            stages.remove_planned(runtime, stages.DUPLICATES, marker, None, marker.output, progress)
            for marker in markers
        ]
        for stage in ("routing", "difficulty"):
            markers = [stages.label_shard(runtime, stage, marker, progress) for marker in markers]
        return markers
    finally:
        runtime.close()


def modes(config: RunConfig, markers: list[Marker]) -> dict[int, tuple[str, float]]:
    """Returns mode and probability of each question, by its number."""
    workspace = Runtime(config).workspace
    rows = [row for m in markers for row in workspace.read_rows("difficulty", m.shard).to_pylist()]
    return {int(row["source_id"]): (row["mode"], round(row["probability"], 6)) for row in rows}


def entries_of(config: RunConfig) -> list[Any]:
    runtime = Runtime(config)
    try:
        return panel_agreement(runtime, judged_shards(runtime))
    finally:
        runtime.close()


def test_without_a_panel_the_digest_is_what_it_was() -> None:
    config = RunConfig.model_validate({"sources": [{"name": "s", "format": "jsonl", "path": "s.jsonl"}]})
    identity = ["Qwen/Qwen2.5-VL-32B-Instruct", "", {}, 1_003_520]
    expected = digest_of(RECIPE_VERSION, "difficulty", [{"threshold": 0.5}, identity], "input")
    assert stage_digest("difficulty", config, "input") == expected
    voting = config.model_copy(update={"difficulty": config.difficulty.model_copy(update={"vote": "any", "quorum": 1})})
    assert stage_digest("difficulty", voting, "input") == expected, "settings of a vote mean nothing without a panel"


def test_a_panel_its_vote_and_its_quorum_are_part_of_the_digest(tmp_path: Path) -> None:
    configs = [
        configured(tmp_path, NOBODY),
        configured(tmp_path, NOBODY, "careful"),
        configured(tmp_path, NOBODY, "careful", "eager"),
        configured(tmp_path, NOBODY, "careful", "eager", vote="any"),
        configured(tmp_path, NOBODY, "careful", "eager", quorum=3),
    ]
    digests = [stage_digest("difficulty", config, "input") for config in configs]
    assert len(set(digests)) == len(digests)
    assert len({stage_digest("performance", config, "input") for config in configs}) == 1
    elsewhere = configured(tmp_path, "http://127.0.0.1:10/v1", "careful")
    assert stage_digest("difficulty", elsewhere, "input") == digests[1], "where a teacher is served shapes nothing"


def test_the_majority_outvotes_a_teacher_that_always_says_yes(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    labels = modes(config, judge(config))
    assert len(labels) == NUM_ROWS
    for number, label in labels.items():
        # About number 4 two of three say yes.
        assert label == (("think", 0.9) if number % 3 == 0 or number == 4 else ("direct", 0.2))
    unanimous = configured(tmp_path, teachers.url, "careful", "eager", vote="unanimous")
    num_calls = len(teachers.calls)
    assert {mode for mode, _ in modes(unanimous, judge(unanimous)).values()} == {"think", "direct"}
    anyone = configured(tmp_path, teachers.url, "careful", "eager", vote="any")
    assert {mode for mode, _ in modes(anyone, judge(anyone)).values()} == {"think"}
    assert len(teachers.calls) == num_calls == 3 * NUM_ROWS, "another vote relabels without a call"


def test_the_bias_of_a_teacher_is_seen_in_the_figures(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    judge(config)
    together, main_careful, main_eager, _ = entries_of(config)
    # 8 of 24 are to be explained.
    assert "scripted: no 66.7 %, yes 33.3 % of 24; alone once with no." in together.note
    assert "eager: yes 100.0 % of 24; alone 15 times with yes." in together.note
    assert (main_careful.name, main_careful.agreement) == ("scripted and careful", pytest.approx(23 / 24))
    assert (main_eager.kappa, main_eager.num_rows) == (pytest.approx(0.0), 24)
    assert together.kappa < 0.3
    assert {(cell.judge, cell.person, cell.rows) for cell in main_eager.confusion} == {
        ("yes", "yes", 8),
        ("no", "yes", 16),
    }


def test_votes_are_counted_once_for_each_shard_and_again_when_its_labels_change(
    tmp_path: Path, teachers: ReplayTeacher
) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    judge(config)
    first = entries_of(config)
    kept = sorted((Path(config.workdir) / "panel").glob("*.json"))
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    assert entries_of(config) == first
    assert [path.stat().st_mtime_ns for path in kept] == times
    kept[0].write_text('{"digest": ', encoding="utf-8")
    assert entries_of(config) == first
    strict = configured(tmp_path, teachers.url, "careful", "eager", threshold=0.95)
    assert judged_shards(Runtime(strict)) == [], "labels of another threshold are not these"
    judge(strict)
    assert "eager: no 100.0 %" in entries_of(strict)[0].note


def test_a_call_that_fails_is_a_missing_vote_and_not_a_lost_row(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "moody")
    markers = judge(config)
    assert sum(marker.count.num_kept for marker in markers) == NUM_ROWS
    labels = modes(config, markers)
    assert labels[7] == ("direct", 0.2) and labels[17] == ("direct", 0.2)
    together, _, main_moody, _ = entries_of(config)
    assert "moody: no 63.6 %, yes 36.4 % of 22; 2 missing" in together.note
    assert main_moody.num_rows == 22


def test_a_row_without_a_quorum_is_quarantined_with_what_each_teacher_said(
    tmp_path: Path, teachers: ReplayTeacher
) -> None:
    config = configured(tmp_path, teachers.url, "moody", quorum=2)
    markers = judge(config)
    count = sum((marker.count.quarantined for marker in markers), Counter[str]())
    assert count == {"difficulty_no_quorum": 2}
    workspace = Runtime(config).workspace
    fates = [fate for m in markers for fate in workspace.read_fates("difficulty", m.shard).to_pylist()]
    assert all("1 of 2 teachers gave a verdict, 2 are needed; moody: teacher_" in fate["detail"] for fate in fates)


def test_a_run_that_ended_early_does_not_ask_again_what_is_stored(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    panel = [config.difficulty.panel[0], config.difficulty.panel[1].model_copy(update={"url": NOBODY})]
    down = config.model_copy(update={"difficulty": config.difficulty.model_copy(update={"panel": panel})})
    with pytest.raises(TeacherUnreachable):
        judge(down)
    before = Counter(call.model for call in teachers.calls)
    assert before["scripted"] == before["careful"] == 10 and before["eager"] == 0, "the first shard, without its third"
    judge(config)
    assert Counter(call.model for call in teachers.calls) == dict.fromkeys(["scripted", "careful", "eager"], NUM_ROWS)
    for shard in Path(config.workdir, "stages", "difficulty").glob("*.json"):
        shard.unlink()
    judge(config)
    assert len(teachers.calls) == 3 * NUM_ROWS


def test_the_dry_run_counts_the_calls_of_every_teacher(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    estimate = estimate_run(config)
    likely = {purpose.purpose: purpose.likely for purpose in estimate.purposes}
    voters = ["difficulty", "difficulty, careful", "difficulty, eager"]
    assert [likely[name] for name in voters] == [NUM_ROWS] * 3
    text = render_estimate(estimate)
    assert "difficulty, careful" in text and text.count("--- difficulty") == 1
    assert not teachers.calls
    alone = estimate_run(configured(tmp_path, teachers.url))
    assert [purpose.purpose for purpose in alone.purposes if purpose.purpose.startswith("difficulty")] == ["difficulty"]


def test_a_measured_dry_run_is_what_the_panel_costs(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    measured = estimate_run(config, num_sampled=NUM_ROWS).measured
    assert measured is not None
    costs = row_costs(Path(config.workdir) / "journals").collect()
    voted = next(usage for usage in measured.usages if usage.purpose == "difficulty")
    assert voted.num_calls.value == 3 * NUM_ROWS
    assert measured.usages[-1].completion_tokens.value == costs["completion_tokens"].sum()


def test_two_revisions_of_one_model_vote_and_are_both_counted(tmp_path: Path, teachers: ReplayTeacher) -> None:
    config = configured(tmp_path, teachers.url, "careful")
    twin = config.difficulty.panel[0].model_copy(update={"revision": "v2"})
    difficulty = config.difficulty.model_copy(update={"panel": [*config.difficulty.panel, twin]})
    config = config.model_copy(update={"difficulty": difficulty})
    measured = estimate_run(config, num_sampled=NUM_ROWS).measured
    assert measured is not None
    assert next(u for u in measured.usages if u.purpose == "difficulty").num_calls.value == 3 * NUM_ROWS


@pytest.mark.usefixtures("prefect")
def test_a_whole_run_with_a_panel_makes_a_corpus_and_pays_each_teacher_once(
    tmp_path: Path, teachers: ReplayTeacher
) -> None:
    config = configured(tmp_path, teachers.url, "careful", "eager")
    result: Any = curate(str(tmp_path / "run.yaml"))
    rows = [
        row for path in Path(result["corpus"], "data").rglob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert len(rows) == NUM_ROWS
    assert all((row["probability"] >= 0.5) == (row["mode"] == "think") for row in rows)
    asked = Counter(call.model for call in teachers.calls if call.purpose == "difficulty")
    assert asked == dict.fromkeys(["scripted", "careful", "eager"], NUM_ROWS)
    again: Any = curate(str(tmp_path / "run.yaml"))
    assert again["new_teacher_calls"] == 0
    app = typer.Typer()
    app.command()(agreement)
    printed = CliRunner().invoke(app, ["--config", str(tmp_path / "run.yaml")]).stdout
    assert "all 3 together" in printed and "alpha" in printed
    assert "eager: yes 100.0 % of 24; alone 15 times with yes." in printed
    assert entries_of(config)[0].num_rows == NUM_ROWS
