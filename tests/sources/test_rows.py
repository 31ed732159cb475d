"""One raw row: what becomes a sample, and the reason of each that does not."""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest

from schemas.samples import AnswerType, Kind, Sample, Topic, content_id, samples_to_table
from tests.sources.conftest import Bench, png


def sample_of(outcome: Sample | str) -> Sample:
    assert isinstance(outcome, Sample), outcome
    return outcome


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"question": "cut', "row_not_json"),
        ("not json\n", "row_not_json"),
        ('{"question": ' + "[" * 50_000 + "\n", "row_not_json"),
        ('{"question": "x", "n": ' + "9" * 5000 + "}\n", "row_not_json"),
        ([1, 2], "row_not_object"),
        ("null\n", "row_not_object"),
        ({}, "question_missing"),
        ({"question": None}, "question_missing"),
        ({"question": ""}, "question_empty"),
        ({"question": " \n\t\u3000\u200b\ufeff"}, "question_empty"),
        ({"question": "\x00\x00"}, "question_empty"),
        ({"question": "\ud800"}, "question_empty"),
        ({"question": 5}, "question_not_text"),
        ({"question": True}, "question_not_text"),
        ('{"question": NaN}\n', "question_not_text"),
        ({"question": ["a"]}, "question_not_text"),
        ({"question": {"a": 1}}, "question_not_text"),
        ({"question": "x" * 100_001}, "question_too_long"),
        ({"question": "a <think> b"}, "think_tag_in_text"),
        ({"question": "a </think>"}, "think_tag_in_text"),
        ({"question": "a<|im_end|>\n<|im_start|>assistant"}, "control_token_in_text"),
        ({"question": "<image>\nWhat?"}, "image_missing"),
    ],
)
def test_a_row_without_a_usable_question_is_quarantined(bench: Bench, row: object, reason: str) -> None:
    assert bench.only(row) == reason


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\r\nb\rc  ", "a\nb\nc"),
        ("a\x00b", "ab"),
        ("a\ud800b", "ab"),
        ("\ud83d\ude42 ok", "🙂 ok"),
        ("cafe\u0301", "cafe\u0301"),
        ("كم عدد القطط؟", "كم عدد القطط؟"),
        ("x  y", "x  y"),
        ("'; DROP TABLE samples; --", "'; DROP TABLE samples; --"),
    ],
)
def test_text_is_cleaned_but_not_rewritten(bench: Bench, raw: str, clean: str) -> None:
    sample = sample_of(bench.only({"question": raw}))
    assert sample.question == clean
    samples_to_table([sample])


def test_a_byte_that_is_not_utf8_quarantines_its_row_only(bench: Bench) -> None:
    path = bench.folder / "rows.jsonl"
    path.write_bytes(b'{"question": "one"}\n{"question": "t\xff"}\n{"question": "three"}\n')
    outcome = bench.read(path)
    assert [sample.question for sample in outcome.samples] == ["one", "three"]
    assert outcome.reasons == ["row_not_utf8"]
    assert outcome.fates[0].origin == "s:rows.jsonl#1"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  yes ", "yes"),
        (72, "72"),
        (72.0, "72"),
        (2.5, "2.5"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (None, None),
        ("", None),
        (" ", None),
        ([], None),
        (["one"], "one"),
        ("<think>long</think>short", "short"),
        ("é\x00", "é"),
    ],
)
def test_answers_become_text(bench: Bench, answer: object, expected: str | None) -> None:
    assert sample_of(bench.only({"question": "q", "answer": answer}, answer="answer")).answer == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"a": 1}, "answer_unreadable"),
        (["one", "two"], "answer_is_a_list"),
        ("x" * 100_001, "answer_too_long"),
        ("<think>only thought</think>", "answer_empty"),
        ("<think>never ends", "answer_empty"),
        ("<|im_end|>", "control_token_in_text"),
    ],
)
def test_answers_that_cannot_be_references_are_quarantined(bench: Bench, answer: object, reason: str) -> None:
    assert bench.only({"question": "q", "answer": answer}, answer="answer") == reason


def test_a_number_that_is_not_finite_is_no_answer(bench: Bench) -> None:
    outcome = bench.read(
        bench.lines('{"question": "a", "answer": NaN}\n', '{"question": "b", "answer": Infinity}\n'),
        columns={"answer": "answer"},
    )
    assert [sample.answer for sample in outcome.samples] == [None]
    assert outcome.reasons == ["answer_unreadable"]


def test_lists_are_answers_where_the_answer_type_says_so(bench: Bench) -> None:
    path = bench.lines(
        {"question": "a", "answer": [1, 2, 3.5, 4], "type": "box"},
        {"question": "b", "answer": ["x", "ü"], "type": "LIST"},
        {"question": "c", "answer": ["x", {"y": None}], "type": "list"},
        {"question": "d", "answer": ["x", "y"], "type": "text"},
    )
    outcome = bench.read(path, columns={"answer": "answer", "answer_type": "type"})
    assert [sample.answer for sample in outcome.samples] == ["[1, 2, 3.5, 4]", '["x", "ü"]', '["x", {"y": null}]']
    assert outcome.samples[0].answer_type is AnswerType.BOX
    assert outcome.reasons == ["answer_is_a_list"]


def test_a_choice_answer_becomes_its_letter_or_is_quarantined(bench: Bench) -> None:
    path = bench.lines(
        {"question": "a", "options": ["red", "blue"], "answer": "blue"},
        {"question": "b", "options": ["red", "blue"], "answer": "green"},
        {"question": "c", "options": ["red", "blue"], "answer": None},
        {"question": "d", "options": [], "answer": "green"},
        {"question": "e", "options": ["red"], "answer": "red"},
    )
    outcome = bench.read(path, columns={"answer": "answer", "choices": "options"})
    assert [(s.question, s.answer, s.choices) for s in outcome.samples] == [
        ("a", "B", ("red", "blue")),
        ("c", None, ("red", "blue")),
        ("d", "green", ()),
    ]
    assert outcome.reasons == ["answer_outside_choices", "choices_too_few"]
    assert outcome.fates[0].question == "b"


def test_the_answer_pattern_takes_the_final_answer(bench: Bench) -> None:
    path = bench.lines(
        {"question": "a", "answer": "48/2 = 24\n#### 72,000 "},
        {"question": "b", "answer": "no mark"},
        {"question": "c", "answer": "#### "},
        {"question": "d", "answer": None},
        {"question": "e", "answer": 5},
    )
    outcome = bench.read(path, columns={"answer": "answer"}, answer_pattern="#### (.+)")
    assert [sample.answer for sample in outcome.samples] == ["72,000", None]
    assert outcome.reasons == ["answer_pattern_not_found"] * 3


def test_fields_come_from_columns_then_from_the_source(bench: Bench) -> None:
    path = bench.lines(
        {"question": "a", "meta": {"topic": "OCR", "kind": "subjective"}, "no": 7, "lic": "mit"},
        {"question": "b", "meta": {"topic": None}, "no": "x"},
        {"question": "c", "meta": {"topic": "sports"}},
        {"question": "d", "meta": {"kind": 3}},
        {"question": "e", "meta": None, "no": 1.0},
        {"question": "f", "no": {"x": 1}},
    )
    columns = {"topic": "meta.topic", "kind": "meta.kind", "id": "no", "licence": "lic"}
    outcome = bench.read(path, columns=columns, topic="math", kind="objective", licence="cc0", answer_type="number")
    assert [(s.topic, s.kind, s.source_id, s.licence) for s in outcome.samples] == [
        (Topic.OCR, Kind.SUBJECTIVE, "7", "mit"),
        (Topic.MATH, Kind.OBJECTIVE, "x", "cc0"),
        (Topic.MATH, Kind.OBJECTIVE, "1", "cc0"),
    ]
    assert outcome.reasons == ["topic_unknown", "kind_unknown", "id_unreadable"]
    assert {s.answer_type for s in outcome.samples} == {AnswerType.NUMBER}


def test_a_column_with_a_dot_in_its_name_wins_over_a_path(bench: Bench) -> None:
    path = bench.lines({"question": "a", "x.y": "flat", "x": {"y": "deep"}}, {"question": "b", "x": {"y": ["deep"]}})
    assert [s.answer for s in bench.read(path, columns={"answer": "x.y"}).samples] == ["flat", "deep"]
    deep = bench.lines({"question": "a", "x": {"y": ["one", "two"]}})
    assert bench.read(deep, columns={"answer": "x.y.1"}).samples[0].answer == "two"


def test_the_id_depends_on_content_alone(bench: Bench) -> None:
    sample = sample_of(bench.only({"question": " q ", "answer": "a"}, answer="answer"))
    assert sample.id == content_id("s", "q", [], [], "a", None)
    assert sample.origin == "s:rows.jsonl#1"


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def image_row(value: object) -> dict[str, Any]:
    return {"question": "<image>\nWhat?", "image": value}


def test_images_come_as_paths_urls_base64_structs_and_lists(bench: Bench) -> None:
    (bench.folder / "pics").mkdir()
    (bench.folder / "pics/ä 1.png").write_bytes(png())
    bare = base64.b64encode(png()).decode()
    values = [
        "pics/ä 1.png",
        "./pics/../pics/ä 1.png",
        str(bench.folder / "pics/ä 1.png"),
        data_url(png()),
        data_url(png()).replace("data:image", "DATA:image"),
        bare,
        "\n".join(bare[i : i + 76] for i in range(0, len(bare), 76)),
        {"bytes": None, "path": "pics/ä 1.png"},
        {"bytes": data_url(png()), "path": "gone.png"},
        {"url": data_url(png())},
        ["pics/ä 1.png"],
        [None, {"bytes": None, "path": "pics/ä 1.png"}, ""],
        '["pics/ä 1.png"]',
    ]
    outcome = bench.read(bench.lines(*map(image_row, values)), columns={"images": "image"})
    assert outcome.fates == []
    assert len({sample.images for sample in outcome.samples}) == 1
    assert len({sample.id for sample in outcome.samples}) == 1
    assert (outcome.samples[0].images[0].width, outcome.samples[0].question) == (8, "What?")


def test_several_images_keep_their_order(bench: Bench) -> None:
    for colour in ("red", "blue"):
        (bench.folder / f"{colour}.png").write_bytes(png(colour))
    rows = [image_row(["red.png", "blue.png"]), image_row(["blue.png", "red.png"]), image_row(["red.png", "red.png"])]
    first, second, third = bench.read(bench.lines(*rows), columns={"images": "image"}).samples
    assert first.images == second.images[::-1]
    assert third.images == (first.images[0],) * 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gone.png", "image_missing"),
        (".", "image_missing"),
        ("pipe", "image_missing"),
        ("a\x00b.png", "image_missing"),
        ("\ud800.png", "image_missing"),
        ("n" * 3000, "image_missing"),
        ("../secret.png", "image_outside_root"),
        ("/etc/passwd", "image_outside_root"),
        ("link.png", "image_outside_root"),
        ("linked/secret.png", "image_outside_root"),
        ("//host/share.png", "image_outside_root"),
        ("C:\\secret.png", "image_missing"),
        ("..\\secret.png", "image_missing"),
        ("\\\\host\\share.png", "image_missing"),
        ("root/../../secret.png", "image_outside_root"),
        ("http://127.0.0.1/a.png", "image_address_not_fetched"),
        ("HTTPS://example.com/a.png", "image_address_not_fetched"),
        ("file:///etc/passwd", "image_address_not_fetched"),
        ("http://2130706433/a.png", "image_address_not_fetched"),
        ("http://[::ffff:127.0.0.1]/a.png", "image_address_not_fetched"),
        ("s3://bucket/a.png", "image_address_not_fetched"),
        ("simplecache::http://example.com/a.png", "image_missing"),  # a file name like any other
        ({"url": "http://x/a.png"}, "image_address_not_fetched"),
        ("text.png", "image_unreadable"),
        ("data:image/png;base64,????", "image_unreadable"),
        ("data:image/png;base64", "image_unreadable"),
        ("data:,hello", "image_unreadable"),
        ("iVBORw0KGgo" + "A" * 60, "image_unreadable"),
        ("z" * 5000, "image_unreadable"),
        (5, "image_unreadable"),
        (True, "image_unreadable"),
        ({"x": 1}, "image_unreadable"),
        ([["a.png"]], "image_unreadable"),
        (data_url(png(side=101)), "image_too_large_pixels"),
        (data_url(png(side=1)), "image_too_small"),
        (["gone.png"] * 65, "too_many_images"),
        (None, "image_missing"),
        ([], "image_missing"),
    ],
)
def test_a_bad_image_quarantines_its_row(bench: Bench, value: object, reason: str) -> None:
    outside = bench.folder / "outside"
    root = bench.folder / "root"
    outside.mkdir()
    root.mkdir()
    (bench.folder / "secret.png").write_bytes(png())
    (outside / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "text.png").write_text("no picture")
    os.mkfifo(root / "pipe")
    path = bench.lines({"question": "sound", "image": None}, image_row(value), name="root/rows.jsonl")
    outcome = bench.read(path, columns={"images": "image"})
    assert outcome.reasons == [reason]
    assert len(outcome.samples) == 1


def test_a_link_inside_the_root_may_be_followed(bench: Bench) -> None:
    (bench.folder / "a.png").write_bytes(png())
    (bench.folder / "b.png").symlink_to("a.png")
    assert len(bench.read(bench.lines(image_row("b.png")), columns={"images": "image"}).samples) == 1


def test_an_image_root_replaces_the_folder_of_the_file(bench: Bench) -> None:
    (bench.folder / "pics").mkdir()
    (bench.folder / "pics/a.png").write_bytes(png())
    (bench.folder / "b.png").write_bytes(png())
    path = bench.lines(image_row("a.png"), image_row("../b.png"))
    outcome = bench.read(path, columns={"images": "image"}, image_root=str(bench.folder / "pics"))
    assert len(outcome.samples) == 1
    assert outcome.reasons == ["image_outside_root"]


def test_encoded_size_is_checked_before_decoding(bench: Bench) -> None:
    (bench.folder / "big.png").write_bytes(bytes(40 * 2**20))
    values = ["big.png", "data:image/png;base64," + "A" * (45 * 2**20)]
    outcome = bench.read(bench.lines(*map(image_row, values)), columns={"images": "image"})
    assert outcome.reasons == ["image_too_large_bytes"] * 2


def test_a_fate_shows_question_and_images_of_its_row(bench: Bench) -> None:
    (bench.folder / "a.png").write_bytes(png())
    path = bench.lines({"question": "q" * 600, "image": ["a.png", "gone.png"]})
    (fate,) = bench.read(path, columns={"images": "image"}).fates
    assert (fate.stage, fate.exit, fate.origin, fate.id) == ("sources", "quarantined", "s:rows.jsonl#0", None)
    assert fate.question == "q" * 500
    assert len(fate.images) == 1
    assert "gone.png" in fate.detail
