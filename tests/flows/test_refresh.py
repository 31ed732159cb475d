"""Night after night: what is published stays byte for byte, what is new is added, what is gone is marked."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.cards import curate_plainly
from corpus.versions import list_versions, load_manifest, locked, verify_version
from flows.run_config import load_run
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher


@pytest.fixture
def teacher() -> Any:
    with ReplayTeacher(scripted_answer, models=["scripted"]) as server:
        yield server


class Nights:
    """One corpus, refreshed again and again."""

    def __init__(self, folder: Path, teacher: ReplayTeacher, **settings: Any) -> None:
        self.questions = write_questions(folder / "in", 24)
        self.config = write_config(folder, self.questions, teacher.url, **settings)
        self.teacher = teacher
        self.corpus = folder / "work" / "corpus"

    def refresh(self) -> dict[str, Any]:
        return curate_plainly(load_run(str(self.config))).to_record()

    def add(self, *numbers: int) -> None:
        with self.questions.open("a", encoding="utf-8") as file:
            for number in numbers:
                row = {"id": f"n{number}", "question": f"What is the sum of {number} and 7?", "answer": f"{number + 7}"}
                file.write(json.dumps(row) + "\n")

    def keep_lines(self, keep: Any) -> list[str]:
        """Removes the lines of the source that are not wanted, and returns all that were there."""
        lines = self.questions.read_text(encoding="utf-8").splitlines()
        self.questions.write_text("".join(f"{line}\n" for line in lines if keep(line)), encoding="utf-8")
        return lines


def ids(version: str | Path) -> set[str]:
    return {i for path in Path(version, "data").rglob("*.parquet") for i in pq.read_table(path)["id"].to_pylist()}


def shard_bytes(version: str | Path) -> dict[str, bytes]:
    return {
        path.relative_to(version).as_posix(): path.read_bytes() for path in Path(version, "data").rglob("*.parquet")
    }


def test_new_rows_come_in_new_shards_and_published_ones_stay_as_they_are(
    tmp_path: Path, teacher: ReplayTeacher
) -> None:
    nights = Nights(tmp_path, teacher, shard_rows=10)
    first = nights.refresh()
    published, num_calls = shard_bytes(first["corpus"]), len(teacher.calls)
    nights.add(30, 31)
    second = nights.refresh()
    after = shard_bytes(second["corpus"])
    assert published.items() < after.items()
    assert (second["version"], second["is_new"], second["added"], second["continues"]) == ("v0002", True, 2, "v0001")
    assert second["rows"] == first["rows"] + 2
    assert teacher.num_repeated == 0 and len(teacher.calls) > num_calls
    manifest = verify_version(second["corpus"])
    assert manifest.changes.num_added == 2 and manifest.num_rows == len(ids(second["corpus"]))
    assert {shard.since for shard in manifest.shards} == {"v0001", "v0002"}
    for path, content in published.items():
        here, there = Path(second["corpus"], path), Path(first["corpus"], path)
        assert here.stat().st_ino == there.stat().st_ino, "shared, not copied"
        assert content == here.read_bytes()
    card = Path(second["corpus"], "README.md").read_text(encoding="utf-8")
    assert "| v0002 |" in card and "| v0001 |" in card


def test_a_night_without_news_makes_no_version(tmp_path: Path, teacher: ReplayTeacher) -> None:
    nights = Nights(tmp_path, teacher, shard_rows=10)
    first = nights.refresh()
    again = nights.refresh()
    assert (again["corpus"], again["is_new"], again["added"]) == (first["corpus"], False, 0)
    nights.add(30)
    nights.refresh()
    assert nights.refresh()["is_new"] is False
    assert [path.name for path in list_versions(nights.corpus)] == ["v0001", "v0002"]


def test_a_row_that_only_repeats_another_is_no_news(tmp_path: Path, teacher: ReplayTeacher) -> None:
    nights = Nights(tmp_path, teacher, shard_rows=10)
    nights.refresh()
    with nights.questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "again", "question": "What is the sum of 0 and 0?", "answer": "0"}\n')
    assert nights.refresh()["is_new"] is False


@pytest.mark.parametrize("shard_rows", [10, 1000])
def test_rows_that_vanish_are_marked_and_their_mark_goes_when_they_return(
    tmp_path: Path, teacher: ReplayTeacher, shard_rows: int
) -> None:
    nights = Nights(tmp_path, teacher, shard_rows=shard_rows)
    first = nights.refresh()
    published = shard_bytes(first["corpus"])
    lines = nights.keep_lines(lambda line: '"id": "3' not in line and '"id": "12"' not in line)
    second = nights.refresh()
    assert shard_bytes(second["corpus"]) == published
    marks = pq.read_table(Path(second["corpus"], "marks.parquet")).to_pylist()
    assert marks and {(mark["mark"], mark["since"]) for mark in marks} == {("vanished", "v0002")}
    assert {mark["id"] for mark in marks} <= ids(first["corpus"])
    assert (second["added"], second["vanished"]) == (0, len(marks))
    nights.questions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    third = nights.refresh()
    assert shard_bytes(third["corpus"]) == published
    assert pq.read_table(Path(third["corpus"], "marks.parquet")).num_rows == 0
    assert load_manifest(third["corpus"]).changes.num_returned == len(marks)
    assert teacher.num_repeated == 0


def test_an_edited_question_is_a_new_row_and_the_old_one_is_marked(tmp_path: Path, teacher: ReplayTeacher) -> None:
    nights = Nights(tmp_path, teacher)
    nights.refresh()
    text = nights.questions.read_text(encoding="utf-8")
    edited = '"What is the sum of 3 and 8?", "answer": "11"'
    nights.questions.write_text(text.replace('"What is the sum of 3 and 7?", "answer": "10"', edited), encoding="utf-8")
    result = nights.refresh()
    assert (result["added"], result["vanished"]) == (1, 1)


def test_a_published_row_that_the_run_lets_go_is_marked_as_withdrawn_and_stays(
    tmp_path: Path, teacher: ReplayTeacher
) -> None:
    nights = Nights(tmp_path, teacher)
    first = nights.refresh()
    text = nights.questions.read_text(encoding="utf-8")
    nights.questions.write_text(text.replace('"id": "6"', '"id": "7"', 1), encoding="utf-8")
    second = nights.refresh()
    marks = pq.read_table(Path(second["corpus"], "marks.parquet")).to_pylist()
    assert sorted(mark["mark"] for mark in marks) == ["vanished", "withdrawn"]
    assert ids(second["corpus"]) > ids(first["corpus"])
    fates = pq.read_table(Path(second["corpus"], "fates.parquet")).to_pylist()
    withdrawn = next(mark["id"] for mark in marks if mark["mark"] == "withdrawn")
    assert withdrawn in {fate["id"] for fate in fates}


def test_another_recipe_starts_anew_and_the_log_says_so(tmp_path: Path, teacher: ReplayTeacher) -> None:
    nights = Nights(tmp_path, teacher)
    nights.refresh()
    nights.config = write_config(tmp_path, nights.questions, teacher.url, verification={"relative_tolerance": 0.5})
    manifest = load_manifest(nights.refresh()["corpus"])
    assert (manifest.version, manifest.base) == ("v0002", "")
    assert [change.version for change in manifest.history] == ["v0001", "v0002"]
    assert "other rules than v0001" in manifest.history[-1].note


def test_a_damaged_shard_is_left_behind_and_its_rows_are_written_again(
    tmp_path: Path, teacher: ReplayTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    nights = Nights(tmp_path, teacher)
    first = nights.refresh()
    shard = Path(first["corpus"], "data/direct/00000.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    nights.add(30)
    with caplog.at_level(logging.WARNING):
        second = nights.refresh()
    assert "data/direct/00000.parquet: altered" in caplog.text
    verify_version(second["corpus"])
    assert "data/direct/00000.parquet" not in shard_bytes(second["corpus"])
    assert second["rows"] == first["rows"] + 1
    assert load_manifest(second["corpus"]).history[-1].note == "1 damaged shards of v0001 were left behind"


def test_a_version_is_made_while_nobody_else_makes_one(tmp_path: Path) -> None:
    entered, order = threading.Event(), []

    def second() -> None:
        entered.wait()
        with locked(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path):
        thread.start()
        entered.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def write_parquet(path: Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("later", [[11.0, 22.0], ["11", "22"], [{"value": "11"}, {"value": "22"}]], ids=str)
def test_an_answer_column_that_changes_its_type_is_read_as_before_or_its_rows_are_named(
    tmp_path: Path, teacher: ReplayTeacher, later: list[Any]
) -> None:
    questions = tmp_path / "rows.parquet"
    asked = ["What is the sum of 4 and 7?", "What is the sum of 10 and 12?"]
    write_parquet(questions, id=["1", "2"], question=asked, answer=[11, 22])
    source = {"name": "sums", "format": "parquet", "path": str(questions), "columns": {"answer": "answer", "id": "id"}}
    settings = {"sources": [source], "max_quarantine_share": 1.0}
    config = write_config(tmp_path, questions, teacher.url, **settings)
    first = curate_plainly(load_run(str(config))).to_record()
    write_parquet(questions, id=["1", "2"], question=asked, answer=later)
    second = curate_plainly(load_run(str(config))).to_record()
    if isinstance(later[0], dict):
        fates = pq.read_table(Path(second["corpus"], "fates.parquet")).to_pylist()
        assert [fate["exit"] for fate in fates] == ["quarantined"] * 2 and second["vanished"] == 2
    else:
        assert second["is_new"] is False, "the answers are the same texts"
    assert ids(second["corpus"]) >= ids(first["corpus"])


def test_two_sources_may_use_the_same_ids_and_hold_the_same_question_once(
    tmp_path: Path, teacher: ReplayTeacher
) -> None:
    sources = []
    for name, second in (("one", 7), ("two", 8)):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"id": "1", "question": f"What is the sum of 4 and {second}?", "answer": f"{4 + second}"},
            {"id": "2", "question": "What is the sum of 10 and 12?", "answer": "22"},
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        columns = {"answer": "answer", "id": "id"}
        sources.append({"name": name, "format": "jsonl", "path": str(path), "columns": columns})
    config = write_config(tmp_path, tmp_path, teacher.url, sources=sources)
    result = curate_plainly(load_run(str(config))).to_record()
    fates = pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()
    assert result["rows"] == 3
    assert [(fate["reason"], fate["resembles"] in ids(result["corpus"])) for fate in fates] == [
        ("duplicate_exact", True)
    ]


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script> What is the sum of 4 and 7?", "\u202eWhat is the sum of 4 and 7?", "x " * 2_000_000],
    ids=["markup", "right to left", "four megabytes"],
)
def test_an_odd_question_comes_through_as_it_is_or_leaves_with_a_reason(
    tmp_path: Path, teacher: ReplayTeacher, text: str
) -> None:
    nights = Nights(tmp_path, teacher, max_quarantine_share=1.0)
    nights.questions.write_text(
        json.dumps({"id": "1", "question": text, "answer": "11", "image": None}) + "\n", encoding="utf-8"
    )
    result = nights.refresh()
    rows = [row for path in Path(result["corpus"]).rglob("data/*/*.parquet") for row in pq.read_table(path).to_pylist()]
    fates = pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()
    assert len(rows) + len(fates) == 1
    if rows:
        assert rows[0]["question"] == text.strip()
    assert b"<script>alert(1)" not in Path(result["corpus"], "report.html").read_bytes()
