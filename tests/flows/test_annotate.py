"""The human check on a finished run: people are shown questions, not verdicts, and what they say is held against these.

The people here are scripted: they know the sums of the scripted world, and which questions ask to explain.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from corpus.annotation import ASKED, Check, Mark
from corpus.marks import Annotations
from flows.annotating import consensus, weighted_strata
from flows.commands.agreement import agreement
from flows.commands.annotate import annotate
from flows.curate import curate
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

Person = Callable[[Mapping[str, str]], str]

app = typer.Typer()
app.command()(annotate)
app.command()(agreement)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect: None) -> Path:
    """The folder of a finished run; its teacher is gone."""
    folder = tmp_path_factory.mktemp("run")
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        curate(str(write_config(folder, write_questions(folder / "in", 80), teacher.url)))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The configuration of a finished run that a test may change."""
    return changed(finished / "run.yaml", shutil.copytree(finished / "work", tmp_path / "work"))


def changed(config: Path, workdir: Path, **settings: Any) -> Path:
    record = yaml.safe_load(config.read_text(encoding="utf-8"))
    path = workdir.parent / f"run-{len(list(workdir.parent.glob('run-*')))}.yaml"
    path.write_text(yaml.safe_dump({**record, "workdir": str(workdir), **settings}), encoding="utf-8")
    return path


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


def figures(config: Path, *arguments: object) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(call("agreement", "--config", config, "--json", *arguments))
    return record


def table(folder: Path) -> list[dict[str, str]]:
    text = (folder / "annotation.csv").read_text(encoding="utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def knows(shown: Mapping[str, str]) -> str:
    """Answers as somebody who is right about every question."""
    if "need reasoning" in shown["asked"]:
        return "yes" if "Explain" in shown["question"] else "no"
    return "yes" if shown["reply"].split(":")[-1].strip() == shown["reference"] else "no"


def marked(folder: Path, person: Person, name: str = "ann.csv") -> Path:
    """Returns the table as a person sends it back."""
    rows = [{**row, "mark": person(row)} for row in table(folder)]
    path = folder / name
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_people_are_shown_no_verdict_and_asked_about_both_judges(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = json.loads(call("annotate", "--config", run, "--output", out, "--rows", 40, "--json"))
    rows = table(out)
    asked = Counter(row["asked"] for row in rows)
    assert asked[ASKED[Check.DIFFICULTY]] == 16, "all open questions, and the rest replies"
    assert said["items"] == {"difficulty": 16, "verifier": len(rows) - 16} and said["missing"] == 0
    for row in rows:
        shown = " ".join([row["question"], row["reference"], row["reply"], row["item"]])
        assert not re.search(r"\b(think|direct|correct|wrong|0\.9|0\.2)\b", shown)
        assert bool(row["reference"] and row["reply"]) == ("reply right" in row["asked"])
        assert all((out / name).is_file() for name in row["images"].split())
    keys = Annotations(tmp_path / "work" / "annotation").read_keys()
    assert len(rows) == len(keys) and set(keys) == {row["item"] for row in rows}
    # The same reply to a row is asked about once and counts as often as it was drawn.
    assert sum(key.num_equal for key in keys.values()) == 40 > len(keys)
    verdicts = Counter((key.check, key.verdict) for key in keys.values())
    assert all(verdicts[check, verdict] for check in Check for verdict in (Mark.YES, Mark.NO))
    assert not list(out.glob("*key*")), "the key stays in the work folder"


def test_the_stored_reply_that_is_shown_is_the_one_that_was_judged(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("annotate", "--config", run, "--output", out, "--rows", 60, "--check", "verifier")
    keys = Annotations(tmp_path / "work" / "annotation").read_keys()
    for row in table(out):
        assert (knows(row) == "yes") == (keys[row["item"]].verdict is Mark.YES), row


def test_marks_are_read_once_and_the_judges_agreement_follows(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("annotate", "--config", run, "--output", out, "--rows", 40)
    assert figures(run)["entries"] == []
    divided = iter(range(100))
    returned = marked(
        out,
        lambda row: "no" if knows(row) == "yes" and "Explain" in row["question"] and next(divided) < 2 else knows(row),
    )
    record = figures(run, returned)
    num_items = len(table(out))
    assert record["read"] == {"new_marks": num_items, "left_out": {}}
    judge, verifier = record["entries"]
    assert (judge["name"], judge["num_rows"]) == ("difficulty judge and ann", 16)
    # The judge calls 8 of 16 hard, the person 6 of those. All were drawn, so nothing is uncertain about the corpus.
    assert judge["confusion"] == [
        {"judge": "yes", "person": "yes", "rows": 6},
        {"judge": "yes", "person": "no", "rows": 2},
        {"judge": "no", "person": "no", "rows": 8},
    ]
    assert judge["kappa"] == pytest.approx(0.75) and judge["low"] == judge["high"] == pytest.approx(0.75)
    assert (verifier["name"], verifier["num_rows"]) == ("answer verifier and ann", 24)
    assert (verifier["kappa"], verifier["agreement"]) == (1.0, 1.0)
    again = figures(run, returned)
    assert again["read"]["new_marks"] == 0 and again["read"]["left_out"]["already read"]["number"] == num_items
    assert again["entries"] == record["entries"] == figures(run)["entries"]
    text = call("agreement", "--config", run)
    assert "difficulty judge and ann" in text and "kappa 0.75 (0.75 to 0.75), 87.5 % equal" in text


def test_lines_that_give_no_mark_are_named_and_hostile_ones_harmless(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("annotate", "--config", run, "--output", out, "--rows", 10)
    items = [row["item"] for row in table(out)]
    back = tmp_path / "back.csv"
    back.write_text(f"item,mark\n{items[0]},yes\n{items[1]},\n{items[2]},hm\nnobody\x1b[2J,no\n,\n", encoding="utf-8")
    text = call("agreement", "--config", run, back, "--annotator", "\x1b]0;bob\x07")
    assert "1 new marks" in text and "\x1b" not in text and "\x07" not in text
    for reason in ("no mark", "mark that cannot be read", "unknown item", "blank line"):
        assert f"1 {reason}: back.csv, line" in text


def test_label_studios_annotators_are_compared_with_the_judge_and_each_other(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("annotate", "--config", run, "--output", out, "--rows", 32, "--format", "label-studio")
    tasks = json.loads((out / "tasks.json").read_text(encoding="utf-8"))

    def annotation(who: str, mark: str, *, skipped: bool = False) -> dict[str, Any]:
        region = {"from_name": "mark", "to_name": "question", "type": "choices", "value": {"choices": [mark]}}
        return {"completed_by": {"id": 1, "email": who}, "was_cancelled": skipped, "result": [region]}

    for number, task in enumerate(tasks):
        true = knows(task["data"])
        carol = "can't tell" if number % 8 == 0 else "yes"
        task["annotations"] = [
            annotation("ann@x.org", true),
            annotation("bob@x.org", true, skipped=number % 4 == 0),
            annotation("carol@x.org", carol),
        ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks), encoding="utf-8")
    record = figures(run, path)
    assert record["read"]["left_out"]["skipped"]["number"] == 8
    names = [entry["name"] for entry in record["entries"]]
    assert names[:5] == [
        "difficulty judge and 3 people",
        "difficulty judge and ann@x.org",
        "difficulty judge and bob@x.org",
        "difficulty judge and carol@x.org",
        "all 3 together",
    ]
    by_name = {entry["name"]: entry for entry in record["entries"][:8]}
    assert by_name["difficulty judge and ann@x.org"]["kappa"] == 1.0
    assert by_name["difficulty judge and carol@x.org"]["kappa"] == pytest.approx(0.0)
    assert "could not be told" in by_name["difficulty judge and carol@x.org"]["note"]
    assert "carol@x.org: yes 100.0 %" in by_name["all 3 together"]["note"]


def test_a_changed_judge_is_held_against_the_marks_that_were_given(run: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    call("annotate", "--config", run, "--output", out, "--rows", 40)
    before = figures(run, marked(out, knows))
    # The verdicts in the key hold while the verifier is as it was; another one judges the stored replies anew.
    [key] = (work / "annotation" / "keys").iterdir()
    key.write_text(key.read_text(encoding="utf-8").replace('"verdict": "no"', '"verdict": "yes"'), encoding="utf-8")
    assert figures(run)["entries"][1]["agreement"] < 1.0
    other = changed(run, work, verification={"relative_tolerance": 0.001})
    assert figures(other)["entries"][1] == before["entries"][1]
    # A threshold that nothing reaches makes every open row direct, and the same marks say how bad that is.
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        endpoint = {"model": "scripted", "url": teacher.url}
        strict = changed(run, work, difficulty={"threshold": 0.95}, teacher=endpoint)
        curate(str(strict))
        assert {call.purpose for call in teacher.calls} == {"direct"}
    judge = figures(strict)["entries"][0]
    assert {(cell["judge"], cell["person"]): cell["rows"] for cell in judge["confusion"]} == {
        ("no", "yes"): 8,
        ("no", "no"): 8,
    }
    assert judge["kappa"] == pytest.approx(0.0)


def test_wrong_use_is_an_error_with_what_to_do(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "run `bimode annotate` first" in call("agreement", "--config", run, run, status=2)
    assert "none of: difficulty, verifier, both" in call(
        "annotate", "--config", run, "--output", out, "--check", "all", status=2
    )
    assert "none of: csv, label-studio" in call(
        "annotate", "--config", run, "--output", out, "--format", "xls", status=2
    )
    call("annotate", "--config", run, "--output", out, "--rows", 5)
    assert "is not empty" in call("annotate", "--config", run, "--output", out, status=2)
    assert "does not exist" in call("agreement", "--config", run, tmp_path / "none.csv", status=2)
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n", encoding="utf-8")
    assert "no columns 'item' and 'mark'" in call("agreement", "--config", run, bad, status=3)


def test_replies_that_are_not_stored_any_more_are_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.rmtree(tmp_path / "work" / "journals" / "performance")
    text = call("annotate", "--config", run, "--output", out, "--rows", 40)
    assert "24 replies are left out" in text and len(table(out)) == 16
    nothing = call("annotate", "--config", run, "--output", tmp_path / "o2", "--check", "verifier", status=2)
    assert "holds nothing to be marked" in nothing


@pytest.mark.parametrize(
    ("marks", "agreed"),
    [
        ([Mark.YES], Mark.YES),
        ([Mark.YES, Mark.NO, Mark.NO], Mark.NO),
        ([Mark.YES, Mark.NO, Mark.CANT_TELL], None),
        ([Mark.CANT_TELL, Mark.YES], Mark.YES),
        ([Mark.CANT_TELL, Mark.CANT_TELL], Mark.CANT_TELL),
    ],
)
def test_people_agree_by_majority_of_those_who_can_tell(marks: list[Mark], agreed: Mark | None) -> None:
    assert consensus(marks) is agreed


def test_marked_rows_stand_for_their_stratum_and_exports_count_by_their_marks() -> None:
    equal = {("yes", "yes"): 4}
    strata = weighted_strata(
        {("first", "rare"): equal, ("first", "common"): equal, ("second", "all"): {("no", "no"): 2}},
        {("first", "rare"): 10, ("first", "common"): 390, ("second", "all"): 1000},
    )
    # Of the first export's 8 marks the rare stratum has the part that it has of 400 rows; the second's are 2 marks.
    parts = [stratum.weight * stratum.num_rows for stratum in strata]
    assert parts == pytest.approx([8 * 10 / 400, 8 * 390 / 400, 2])
    assert [stratum.drawn_share for stratum in strata] == pytest.approx([0.4, 4 / 390, 0.002])
