"""The program `evaluate`, on the bundled teacher and a scripted endpoint; test_evaluate_vllm.py asks a real server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from schemas.errors import ConfigError, Interrupted, TeacherUnreachable, TrainingError
from schemas.template import ThinkingMode
from teacher.journal import Journal
from tests.replay_teacher import Body, ReplayTeacher, completion, question_text
from tests.training.corpora import png
from training import evaluate as program
from training.evaluate import EvaluationConfig, evaluate
from training.programs import load_program_config, run_program

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "sampleworld" / "teacher"
NUM_QUESTIONS = 12
OUTPUTS = ("table.md", "accuracy.png", "accuracy.svg", "thinking_rate.png", "thinking_rate.svg")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions about the sample world, and two rows that cannot be asked."""
    table = pq.read_table(ROOT / "sampleworld" / "data" / "checkable.parquet").rename_columns({"image": "images"})
    bad = [{**table.slice(0, 1).to_pylist()[0], "images": b"no image", "id": f"bad{i}"} for i in range(2)]
    path = tmp_path_factory.mktemp("bench") / "world.parquet"
    rows = table.slice(0, 230).take(list(range(0, 230, 20)))
    pq.write_table(pa.concat_tables([rows, pa.Table.from_pylist(bad, schema=table.schema)]), path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "text.tsv"
    lines = ["index\tquestion\tA\tB\tanswer\tcategory"]
    lines += [f"{i}\tWhat is {i} + 1?\t{i + 1}\t{i + 2}\tA\t{'even' if i % 2 == 0 else 'odd'}" for i in range(4)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(output: Path, *benchmarks: Path, **settings: Any) -> EvaluationConfig:
    forms = {".parquet": "samples", ".tsv": "vlmevalkit"}
    described = [{"name": path.stem, "path": str(path), "format": forms[path.suffix]} for path in benchmarks]
    fixed = {"model": str(TEACHER), "batch_size": 4, "max_new_tokens": 200}
    return EvaluationConfig.model_validate({"output": str(output), "benchmarks": described, **fixed, **settings})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(world: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    """A whole evaluation; tests only look at it."""
    settings = config(tmp_path_factory.mktemp("run"), world, text)
    evaluate(settings)
    return settings


def test_a_run_leaves_table_plots_replies_metrics_and_a_result(finished: EvaluationConfig) -> None:
    folder = Path(finished.output)
    assert all((folder / name).stat().st_size for name in OUTPUTS)
    result = json.loads((folder / "result.json").read_text())
    world = result["benchmarks"]["world"]
    assert set(world["modes"]) == {"auto", "long", "short"}
    assert world["modes"]["long"]["thinking_rate"]["share"] == 1
    assert world["modes"]["short"]["thinking_rate"]["share"] == 0
    assert world["modes"]["long"]["accuracy"]["num"] >= 10
    assert world["modes"]["long"]["mean_output_tokens"] > world["modes"]["short"]["mean_output_tokens"]
    assert set(result["benchmarks"]["text"]["categories"]) == {"even", "odd"}
    last = lines_of(folder / "metrics.jsonl")[-1]
    assert last["step"] == last["num_steps"] == 3 * (NUM_QUESTIONS + 4)


def test_every_row_is_asked_or_listed_with_its_reason(finished: EvaluationConfig) -> None:
    folder = Path(finished.output)
    counts = json.loads((folder / "result.json").read_text())["benchmarks"]["world"]
    assert (counts["num_rows"], counts["num_questions"], counts["num_quarantined"]) == (14, 12, 2)
    listed = lines_of(folder / "quarantined.jsonl")
    assert [(fate["origin"], fate["reason"]) for fate in listed] == [
        (f"world:world.parquet#{number}", "image_unreadable") for number in (12, 13)
    ]


def test_the_figures_are_those_of_the_replies(finished: EvaluationConfig) -> None:
    folder = Path(finished.output)
    replies, result = lines_of(folder / "replies.jsonl"), json.loads((folder / "result.json").read_text())
    for name, benchmark in result["benchmarks"].items():
        for mode, figures in benchmark["modes"].items():
            own = [reply for reply in replies if (reply["benchmark"], reply["mode"]) == (name, mode)]
            assert figures["num_questions"] == len(own)
            assert figures["accuracy"]["num"] == sum(reply["outcome"] == "correct" for reply in own)
            assert figures["thinking_rate"]["num"] == sum(reply["has_thought"] for reply in own)
            assert figures["mean_output_tokens"] == sum(reply["output_tokens"] for reply in own) / len(own)
    for mode, figures in result["overall"].items():
        of_topics = [by_mode[mode]["accuracy"]["num"] for by_mode in result["topics"].values() if mode in by_mode]
        assert figures["accuracy"]["num"] == sum(of_topics)


def test_a_finished_run_is_not_repeated(finished: EvaluationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was begun again")

    monkeypatch.setattr(program, "read_benchmark", never)
    assert evaluate(finished) == json.loads((Path(finished.output) / "result.json").read_text())


def die_after(num_replies: int, settings: EvaluationConfig) -> None:
    """Runs until so many replies are stored, and dies."""
    append = Journal.append

    def dies(self: Journal, *arguments: Any) -> None:
        append(self, *arguments)
        if len(self) == num_replies:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings)


def test_a_run_that_died_asks_only_what_is_missing_and_ends_like_one_that_did_not(
    finished: EvaluationConfig, world: Path, text: Path, tmp_path: Path
) -> None:
    settings = config(tmp_path, world, text)
    die_after(18, settings)
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "replies.jsonl").exists()
    evaluate(settings)
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["num_stored"] == 18
    assert lines_of(tmp_path / "replies.jsonl") == lines_of(Path(finished.output) / "replies.jsonl")


def test_a_reply_torn_by_the_death_of_its_run_is_asked_again(
    finished: EvaluationConfig, world: Path, text: Path, tmp_path: Path
) -> None:
    settings = config(tmp_path, world, text)
    die_after(10, settings)
    journal = tmp_path / "replies" / "attempt-00001.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    evaluate(settings)
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["num_stored"] == 9
    assert lines_of(tmp_path / "replies.jsonl") == lines_of(Path(finished.output) / "replies.jsonl")


def test_a_signal_ends_the_run_in_order_and_it_goes_on_from_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, world, modes=["long"])
    append = Journal.append

    def signals(self: Journal, *arguments: Any) -> None:
        append(self, *arguments)
        if len(self) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", signals)
        with pytest.raises(Interrupted, match="replies so far are kept"):
            evaluate(settings)
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["step"] == 4
    evaluate(settings)
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["num_stored"] == 4


def test_changed_verification_scores_anew_without_a_question_asked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config(tmp_path, world, modes=["short"]))
    (tmp_path / "result.json").unlink()
    monkeypatch.setattr(program, "checkpoint_replies", lambda *arguments, **_: iter(()))
    again = evaluate(config(tmp_path, world, modes=["short"], verification={"relative_tolerance": 0.5}))
    assert again["config"]["verification"]["relative_tolerance"] == 0.5


def test_another_checkpoint_in_the_same_place_is_asked_itself(world: Path, small_model: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.symlink_to(TEACHER)
    evaluate(config(tmp_path / "run", world, model=str(place), modes=["short"]))
    (tmp_path / "run" / "result.json").unlink()
    place.unlink()
    place.symlink_to(small_model)
    evaluate(config(tmp_path / "run", world, model=str(place), modes=["short"], max_new_tokens=200))
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["num_stored"] == 0


def test_a_missing_checkpoint_is_a_clear_error(world: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        evaluate(config(tmp_path / "run", world, model=str(tmp_path / "none")))


def test_a_benchmark_of_which_no_question_can_be_answered_is_an_error_and_not_a_figure(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "yes", "images": [{"bytes": png(2, 900)}]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "thin.parquet")
    with pytest.raises(TrainingError, match=r"none of 3 questions got a reply.*prompt_refused"):
        evaluate(config(tmp_path / "run", tmp_path / "thin.parquet"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_question_without_a_reply_counts_as_not_right_and_is_shown(world: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "What is 3 + 4?", "answer": "7", "images": [{"bytes": png(*size)}]}
        for size in ((2, 900), (56, 56))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    result = evaluate(config(tmp_path / "run", tmp_path / "mixed.parquet", modes=["short"]))
    figures = result["benchmarks"]["mixed"]["modes"]["short"]
    assert figures["unscored"]["by_failure"] == {"no_reply": 1}
    assert figures["accuracy"]["of"] == 2
    assert figures["thinking_rate"]["of"] == 1
    details = [reply["detail"] for reply in lines_of(tmp_path / "run" / "replies.jsonl")]
    assert any("prompt_refused" in detail for detail in details)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": []}, "benchmarks"),
        ({"benchmarks": [{"name": "b", "path": "p", "format": "excel"}]}, "format"),
        ({"benchmarks": [{"name": "b", "path": "p", "format": "corpus"}] * 2}, "benchmark names must differ"),
        ({"modes": ["auto", "loud"]}, "modes"),
        ({"modes": ["auto", "auto"]}, "modes must differ"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"chekpoint": "x"}, "chekpoint"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = {"output": "o", "model": "m", "benchmarks": [{"name": "b", "path": "p", "format": "corpus"}]}
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({**good, **changes}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_program_config(path, EvaluationConfig)


def test_the_program_prints_its_errors_without_a_traceback_and_exits_with_their_status(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path / "run", world, model=str(tmp_path / "none"))
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run_program(None, EvaluationConfig, evaluate, ["--config", str(path)])
    assert stopped.value.code == TrainingError.exit_code
    assert "error: there is no checkpoint" in capsys.readouterr().err


# --- An endpoint


def adder(body: Body) -> Body:
    """Answers "What is i + 1?" rightly when it thinks; at once, it says B. Refuses what it is asked of 3."""
    mode = body["chat_template_kwargs"]["thinking_mode"]
    if "What is 3 + 1" in question_text(body):
        raise LookupError("3")
    said = {"auto": "\n\n</think>B", "long": "One more.\n</think>A", "short": "B"}[mode]
    answer = completion(said, body)
    answer["usage"] = {
        "prompt_tokens": 9 + list(ThinkingMode).index(ThinkingMode(mode)),
        "completion_tokens": {"auto": 3, "long": 8, "short": 2}[mode],
    }
    return answer


def shares(result: dict[str, Any], figure: str, modes: Sequence[str] = ("auto", "long", "short")) -> list[float]:
    return [result["benchmarks"]["text"]["modes"][mode][figure]["share"] for mode in modes]


def test_an_endpoint_is_measured_like_a_checkpoint(text: Path, tmp_path: Path) -> None:
    with ReplayTeacher(adder, models=["m"]) as server:
        settings = config(tmp_path, text, model="m", url=server.url)
        result = evaluate(settings)
        num_calls = len(server.calls)
        (tmp_path / "result.json").unlink()
        assert evaluate(settings)["overall"] == result["overall"]
        refused, probes = 3, 3
        assert len(server.calls) == num_calls + refused + probes  # what was answered is not asked again
    assert shares(result, "accuracy") == [0, 0.75, 0]
    assert shares(result, "thinking_rate") == [0, 1, 0]
    assert [
        result["benchmarks"]["text"]["modes"][mode]["mean_output_tokens"] for mode in ("auto", "long", "short")
    ] == [
        3,
        8,
        2,
    ]
    failures = result["benchmarks"]["text"]["modes"]["long"]["unscored"]["by_failure"]
    assert failures == {"no_reply": 1}


def test_an_endpoint_that_does_not_answer_is_a_clear_error(text: Path, tmp_path: Path) -> None:
    with ReplayTeacher(adder, models=["m"]) as server:
        url = server.url
    with pytest.raises(TeacherUnreachable, match="has not answered"):
        evaluate(config(tmp_path, text, model="m", url=url, unreachable_seconds=0.2))
