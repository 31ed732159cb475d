"""`bimode show`: one row followed through a real curation, refreshed once, killed once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from benchmarks.cards import curate_plainly
from corpus.difference import Change, compare_versions
from corpus.validation import validate_version
from corpus.versions import list_versions, load_manifest
from flows.commands.show import EXAMPLES, show
from flows.run_config import load_run
from schemas.requests import TeacherRequest
from teacher.journal import Journal, read_journal
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

HOSTILE = "What is the sum of 90 and 70? \u202e\x1b[2J <script>alert(1)</script> نقاط"


class World:
    """A finished curation of two versions. rows: what the source held first, by own id."""

    def __init__(self, folder: Path, teacher: ReplayTeacher) -> None:
        self.folder, self.teacher = folder, teacher
        questions = write_questions(folder / "in", 20)
        lines = questions.read_text(encoding="utf-8").splitlines()
        self.lines = [
            *lines,
            json.dumps({"id": "copy", "question": json.loads(lines[0])["question"], "answer": "0"}),
            json.dumps({"id": "hostile", "question": HOSTILE, "answer": "160"}),
            json.dumps({"id": "blank", "question": "  "}),
            json.dumps({"id": "leaving", "question": "What is the sum of 1 and 1?", "answer": "2"}),
        ]
        self.config = write_config(
            folder,
            questions,
            teacher.url,
            shard_rows=10,
            prices={"prompt": 1e6, "completion": 2e6},
            max_quarantine_share=1,
        )
        self._curate(questions, self.lines)
        # The next night has one row more and one less.
        more = [json.dumps({"id": "new", "question": "What is the sum of 50 and 60?", "answer": "110"})]
        self._curate(questions, [*self.lines[:-1], *more])
        self.corpus = folder / "work" / "corpus"

    def _curate(self, questions: Path, lines: list[str]) -> None:
        questions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        curate_plainly(load_run(str(self.config)))

    def changed(self, folder: Path, **settings: Any) -> Path:
        """Returns a configuration of the same work folder with other settings."""
        path = folder / "changed.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(self.config.read_text()), **settings}), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        yield World(tmp_path_factory.mktemp("world"), teacher)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command(epilog=EXAMPLES)(show)
    return CliRunner().invoke(app, list(map(str, arguments)))


def record_of(name: str, *arguments: object) -> dict[str, Any]:
    result = run(name, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def test_a_thinking_row_is_followed_from_the_source_to_the_corpus(world: World) -> None:
    row = record_of("hostile", "--config", world.config)
    assert row["sample"]["question"].startswith("What is the sum of 90 and 70?")
    assert [step["outcome"] for step in row["steps"]] == ["kept"] * 9
    assert all(step["is_current"] for step in row["steps"])
    samples = [reply for reply in row["replies"] if reply["purpose"] == "performance"]
    assert [reply["index"] for reply in samples] == list(range(8))
    assert {reply["verdict"]["outcome"] for reply in samples} == {"wrong"}
    assert {reply["verdict"]["detail"] for reply in samples} == {"gives no answer"}  # It says "zebra".
    (trace,) = (reply for reply in row["replies"] if reply["purpose"] == "reasoning")
    assert trace["finding"].startswith("passes all checks") and trace["is_used"]
    decided = {done["stage"]: done for done in row["recomputed"]}
    assert (
        decided["performance"]["decision"]["mode"] == "think" and decided["performance"]["decision"]["num_scored"] == 8
    )
    assert decided["reasoning"]["reasoning"] == row["record"]["reasoning"]
    assert row["record"]["mode"] == "think"
    assert [(place["version"], place["since"], place["mark"]) for place in row["published"]] == [
        ("v0002", "v0001", ""),
        ("v0001", "v0001", ""),
    ]


def test_the_cost_is_that_of_its_stored_replies(world: World) -> None:
    row = record_of("hostile", "--config", world.config)
    prompt = sum(reply["prompt_tokens"] for reply in row["replies"] if reply["choice"] == 0)
    completion = sum(reply["completion_tokens"] for reply in row["replies"])
    assert row["cost"]["amount"] == pytest.approx(prompt + 2 * completion) and completion > 0


def test_an_open_row_shows_the_words_of_its_judges_with_their_probability(world: World) -> None:
    row = record_of("9", "--config", world.config)
    findings = {reply["purpose"]: reply["finding"] for reply in row["replies"]}
    assert findings["difficulty"].startswith("says yes (yes 0.9")
    assert findings["consistency"].startswith("says consistent")
    assert row["record"]["probability"] == pytest.approx(0.9)


def test_a_right_sample_shows_what_was_read_in_it(world: World) -> None:
    row = record_of("3", "--config", world.config)
    right = [reply for reply in row["replies"] if reply["verdict"] and reply["verdict"]["outcome"] == "correct"]
    assert right and {reply["verdict"]["extracted"] for reply in right} == {row["sample"]["answer"]}
    assert row["record"]["mode"] == "direct"


def test_every_way_of_naming_a_row_leads_to_it(world: World) -> None:
    row = record_of("3", "--config", world.config)
    for name in (row["id"], row["id"][:10], row["origin"]):
        assert record_of(name, "--config", world.config)["id"] == row["id"]


def test_a_duplicate_shows_the_row_that_it_resembles(world: World) -> None:
    rows = [record_of(name, "--config", world.config) for name in ("0", "copy")]
    dropped, kept = sorted(rows, key=lambda row: len(row["published"]))
    step = next(step for step in dropped["steps"] if step["outcome"] == "dropped")
    assert step["stage"] == "duplicates" and step["fate"]["resembles"] == kept["id"]
    assert dropped["resembles"]["id"] == kept["id"] and dropped["resembles"]["question"] == kept["sample"]["question"]
    assert dropped["replies"] == [] and dropped["published"] == []
    assert [step["outcome"] for step in dropped["steps"][2:]] == ["left before"] * 6
    text = run(dropped["id"], "--config", world.config).output
    assert "RESEMBLES" in text and kept["id"] in text and "in no version" in text


def test_a_row_that_never_became_a_sample_is_found_by_its_origin(world: World) -> None:
    row = record_of("sums:questions.jsonl#22", "--config", world.config)
    assert row["id"] is None and row["sample"] is None
    assert row["steps"][0]["fate"]["reason"] == "question_empty"
    assert "never became a sample" in run("sums:questions.jsonl#22", "--config", world.config).output


def test_a_row_that_its_source_lost_is_known_by_the_versions_alone_with_its_mark(world: World) -> None:
    row = record_of("leaving", "--config", world.config)
    assert row["steps"] == [] and row["record"]["source_id"] == "leaving"
    assert [(place["version"], place["mark"], place["marked_since"]) for place in row["published"]] == [
        ("v0002", "vanished", "v0002"),
        ("v0001", "", ""),
    ]
    assert "vanished since v0002" in run("leaving", "--config", world.config).output


def test_a_corpus_alone_shows_what_its_versions_know(world: World) -> None:
    kept = record_of("3", "--corpus", world.corpus)
    assert kept["steps"] == [] and kept["replies"] == [] and kept["record"]["answer"] == kept["record"]["reference"]
    blank = record_of("sums:questions.jsonl#22", "--corpus", world.corpus)
    assert {fate["reason"] for fate in blank["fates"]} == {"question_empty"} and len(blank["fates"]) == 2


def test_changed_settings_show_beside_what_the_stage_wrote(world: World, tmp_path: Path) -> None:
    config = world.changed(tmp_path, difficulty={"threshold": 0.95})
    row = record_of("9", "--config", config)
    step = next(step for step in row["steps"] if step["stage"] == "difficulty")
    assert step["said"].startswith("think") and not step["is_current"]
    decided = {done["stage"]: done for done in row["recomputed"]}
    assert decided["difficulty"]["decision"]["mode"] == "direct"
    assert "other settings than those of now" in run("9", "--config", config).output
    config = world.changed(tmp_path, performance={"num_samples": 9, "audit_share": 0.2})
    decided = {done["stage"]: done for done in record_of("hostile", "--config", config)["recomputed"]}
    assert decided["performance"]["decision"] is None
    assert "no reply of scripted" in decided["performance"]["problem"]


def test_a_run_that_was_killed_shows_what_it_had_asked(world: World, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work", work)
    for stage in ("performance", "reasoning", "traces", "answers"):
        shutil.rmtree(work / "stages" / stage)
    for stage in ("reasoning", "answers"):
        shutil.rmtree(work / "journals" / stage, ignore_errors=True)
    num_replies = sum(_uncompact(journal) for journal in (work / "journals" / "performance").iterdir())
    assert num_replies > 20
    row = record_of("hostile", "--config", world.changed(tmp_path, workdir=str(work)))
    outcomes = {step["stage"]: step["outcome"] for step in row["steps"]}
    assert outcomes["difficulty"] == "kept" and outcomes["performance"] == "not done"
    assert [reply["index"] for reply in row["replies"] if reply["purpose"] == "performance"] == list(range(8))
    decided = {done["stage"]: done for done in row["recomputed"]}
    assert decided["performance"]["decision"]["mode"] == "think"


def _uncompact(folder: Path) -> int:
    """Makes a compacted journal what it was before: an attempt that appended its replies one by one."""
    records = list(read_journal(folder))
    shutil.rmtree(folder)
    with Journal(folder) as journal:
        for stored in records:
            assert stored.sampling and stored.seed is not None
            request = TeacherRequest(
                stored.sample_id,
                stored.purpose,
                stored.messages,
                stored.sampling,
                stored.seed,
                stored.index,
                stored.choices,
            )
            journal.append(stored.key, request, stored.reply)
    assert list(folder.glob("attempt-*.journal"))
    return len(records)


def test_images_are_written_as_they_are_stored(world: World, tmp_path: Path) -> None:
    for number, place in enumerate((["--config", world.config], ["--corpus", world.corpus])):
        folder = tmp_path / str(number)
        row = record_of("3", *place, "--images", folder)
        (path,) = map(Path, row["written_images"])
        assert path.parent == folder and path.suffix == ".png"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["images"][0]["sha256"]


def test_the_versions_that_the_run_made_are_valid_and_differ_by_what_the_second_night_brought(world: World) -> None:
    first, second = list_versions(world.corpus)
    for version in (first, second):
        found = validate_version(version)
        assert found.is_valid, found.problems
    difference = compare_versions(first, second)
    assert {change: difference.num_rows(change) for change in Change if difference.num_rows(change)} == {
        Change.ADDED: 1,
        Change.MARKED: 1,
    }
    assert difference.num_unread == load_manifest(first).num_rows


def test_looking_asks_nothing_and_changes_nothing(world: World) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}

    before, num_calls = files(), len(world.teacher.calls)
    for name in ("hostile", "copy", "9", "leaving"):
        assert run(name, "--config", world.config).exit_code == 0
    assert files() == before and len(world.teacher.calls) == num_calls


def test_hostile_texts_do_nothing_to_the_terminal(world: World) -> None:
    text = run("hostile", "--config", world.config, "--full").output
    assert "<script>alert(1)</script>" in text and "\u2068" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_a_name_of_several_rows_lists_them_and_one_of_none_says_so(world: World, tmp_path: Path) -> None:
    source = yaml.safe_load(world.config.read_text())["sources"][0]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "3", "question": "\x1b[2JWhat is the sum of 4 and 4?", "answer": "8"}) + "\n")
    sources = [source, {**source, "name": "others", "path": str(other), "columns": {"answer": "answer", "id": "id"}}]
    config = world.changed(tmp_path, workdir=str(tmp_path / "work"), sources=sources)
    curate_plainly(load_run(str(config)))
    result = run("3", "--config", config)
    assert result.exit_code == 2 and "can mean several rows" in result.stderr and "\x1b" not in result.stderr
    assert "sums:questions.jsonl#3" in result.stderr and "others:other.jsonl#0" in result.stderr
    assert record_of("others:other.jsonl#0", "--config", config)["sample"]["source"] == "others"
    assert run("f" * 32, "--config", config).exit_code == 2
    assert run("3").exit_code == 2
    assert run("3", "--config", config, "--corpus", tmp_path).exit_code == 2


def test_a_damaged_file_is_an_error_that_names_it(world: World, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work", work)
    for path in (work / "journals" / "performance").rglob("replies-*.parquet"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    result = run("hostile", "--config", world.changed(tmp_path, workdir=str(work)))
    assert result.exit_code == 6 and "damaged" in result.stderr and "Traceback" not in result.output
