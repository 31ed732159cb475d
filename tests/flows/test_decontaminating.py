"""The decontamination stage: in the whole flow, on one shard, and with benchmarks that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.curate import curate
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.estimate import estimate_run, render_estimate
from flows.run_config import load_run
from flows.runtime import Runtime
from flows.stages import Progress, read_source_shard, remove_leaks, stages_of
from schemas.errors import ConfigError, SourceError
from sources import plan_units
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

LONG = "A farmer has three fields of wheat and sells the harvest of two of them to the mill in the valley"


def write_benchmark(folder: Path, rows: list[dict[str, Any]], name: str = "mill") -> dict[str, Any]:
    """Writes a benchmark as JSON Lines and returns its description."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"id": "id", **({"images": "image"} if any("image" in row for row in rows) else {})}
    return {"name": name, "format": "jsonl", "path": str(path), "columns": columns}


def add_rows(questions: Path, *rows: dict[str, Any]) -> None:
    with questions.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.usefixtures("prefect")
def test_rows_that_leak_a_benchmark_leave_the_flow_and_are_reported(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "in")
    add_rows(
        questions,
        {"id": "leak", "question": f"{LONG}. How much is that?", "answer": "7"},
        {"id": "short", "question": "The sum of 1 and 1000?", "answer": "1001"},
        {"id": "clean", "question": "A farmer has three fields of rye. What is the sum of 50 and 60?", "answer": "110"},
    )
    benchmark = write_benchmark(
        tmp_path / "in",
        [{"id": "m1", "question": f"{LONG}?"}, {"id": "m2", "question": "the sum of 1 and 1000"}],
    )
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        config = write_config(tmp_path, questions, teacher.url, decontamination={"benchmarks": [benchmark]})
        assert "2 leaks of benchmarks" in render_estimate(estimate_run(load_run(str(config))))
        result = curate(str(config))
        asked = [json.dumps(call.body) for call in teacher.calls]
        again = curate(str(config))
    fates = {fate["origin"]: fate for fate in pq.read_table(Path(result["corpus"], "fates.parquet")).to_pylist()}
    leak, short = fates["sums:questions.jsonl#60"], fates["sums:questions.jsonl#61"]
    assert (leak["stage"], leak["reason"], leak["resembles"]) == (DECONTAMINATION, "contaminated_ngram", "mill:m1")
    assert leak["similarity"] == 1.0
    assert "farmer has three fields" in leak["detail"]
    assert (short["reason"], short["resembles"]) == ("contaminated_exact", "mill:m2")
    assert "sums:questions.jsonl#62" not in fates
    assert asked
    assert not any("farmer has three fields of wheat" in body for body in asked)
    figures = json.loads(Path(result["corpus"], "report.json").read_text(encoding="utf-8"))
    [found] = figures["benchmarks"]
    assert (found["name"], found["num_questions"], found["num_leaked_questions"], found["num_rows"]) == (
        "mill",
        2,
        2,
        2,
    )
    assert all(pair["text"] for pair in found["pairs"]), "the report shows what was leaked"
    assert [pair["question"] for pair in found["pairs"]] == ["m2", "m1"]  # an equal question tells more than a run
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "Rows that leak it" in page
    assert not again["is_new"]
    assert again["new_teacher_calls"] == 0


def runtime_with(tmp_path: Path, *benchmarks: dict[str, Any], **settings: Any) -> Runtime:
    questions = write_questions(tmp_path / "in", 10)
    add_rows(questions, {"id": "leak", "question": LONG, "answer": "7"})
    section = {"benchmarks": list(benchmarks), **settings}
    config = write_config(tmp_path, questions, "http://127.0.0.1:9/v1", decontamination=section)
    return Runtime(load_run(str(config)))


def decontaminated(runtime: Runtime) -> list[int]:
    """Returns how many rows of each shard leave."""
    benchmarks = Benchmarks(runtime)
    markers = [read_source_shard(runtime, unit, Progress(0)) for unit in plan_units(runtime.config)]
    return [remove_leaks(runtime, benchmarks, marker, Progress(0)).count.num_dropped for marker in markers]


def test_a_changed_benchmark_is_compared_again(tmp_path: Path) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": "Nothing of the kind is asked here, is it?"}])
    assert decontaminated(runtime_with(tmp_path, section)) == [0]
    write_benchmark(tmp_path / "in", [{"id": "m1", "question": LONG}])
    assert decontaminated(runtime_with(tmp_path, section)) == [1]


def test_a_shared_image_is_a_leak_unless_switched_off(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", 10)
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": "Whose is it?", "image": "1.png"}])
    assert decontaminated(runtime_with(tmp_path, section)) == [1]
    assert decontaminated(runtime_with(tmp_path, section, images=False)) == [0]


def test_rows_of_a_benchmark_that_cannot_be_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": LONG}, {"id": "m2", "question": " "}])
    assert decontaminated(runtime_with(tmp_path, section)) == [1]
    assert "benchmark mill: rows that cannot be read are not compared: 1 question_empty" in caplog.text


def test_a_benchmark_without_a_readable_row_stops_the_run(tmp_path: Path) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": ""}])
    with pytest.raises(SourceError, match=r"benchmark mill: no row of .*mill.jsonl can be read"):
        decontaminated(runtime_with(tmp_path, section))


def test_a_benchmark_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": LONG}])
    Path(section["path"]).unlink()
    with pytest.raises(SourceError, match="mill"):
        Benchmarks(runtime_with(tmp_path, section))


def test_equal_ids_in_a_benchmark_are_told_apart_by_their_place(tmp_path: Path) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m", "question": LONG}, {"id": "m", "question": "Who is it?"}])
    assert decontaminated(runtime_with(tmp_path, section)) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"min_ngram": 14}, "min_ngram = 14 must not exceed max_ngram = 13"), ({"max_pairs": 0}, "max_pairs")],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": LONG}])
    with pytest.raises(ConfigError, match=message):
        runtime_with(tmp_path, section, **settings)


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    section = write_benchmark(tmp_path / "in", [{"id": "m1", "question": LONG}])
    with pytest.raises(ConfigError, match="benchmark names must be unique"):
        runtime_with(tmp_path, section, section)


def test_without_benchmarks_there_is_no_such_stage(tmp_path: Path) -> None:
    assert DECONTAMINATION not in stages_of(runtime_with(tmp_path).config)
