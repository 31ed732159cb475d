"""Containers and plans: every format, every broken source, and the laws of conservation and of shard size."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import ImageLimits, parse_config
from schemas.errors import ConfigError, SourceError, StorageError
from schemas.fates import count_stage, fates_to_table
from schemas.samples import samples_to_table
from sources import ImageStore, Unit, json_rows, parquet, plan_units, read_unit
from tests.sources.conftest import Bench, png

TEN = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
ANSWER = {"answer": "answer"}


def questions(outcome: Any) -> list[str]:
    return [sample.question for sample in outcome.samples]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# --- JSON Lines


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.json"])
def test_json_lines_are_read_plain_and_packed(bench: Bench, name: str) -> None:
    text = "".join(json.dumps(row) + "\n" for row in TEN).encode()
    path = bench.folder / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    outcome = bench.read(path, columns=ANSWER, shard_rows=3)
    assert questions(outcome) == [f"q{i}" for i in range(10)]
    assert [(unit.index, unit.start, unit.stop) for unit in outcome.units] == [
        (0, 0, 3),
        (1, 3, 6),
        (2, 6, 9),
        (3, 9, 10),
    ]
    assert outcome.samples[9].origin == f"s:{name}#9"


def test_blank_lines_byte_order_marks_and_windows_line_ends_are_no_trouble(bench: Bench) -> None:
    path = bench.folder / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"question": "a"}\r\n \n\n{"question": "b\xc2\x85\xe2\x80\xa8c"}')
    outcome = bench.read(path, shard_rows=1)
    assert questions(outcome) == ["a", "b\x85\u2028c"]
    assert [sample.origin for sample in outcome.samples] == ["s:rows.jsonl#0", "s:rows.jsonl#1"]


def test_appended_rows_leave_earlier_units_unchanged(bench: Bench) -> None:
    path = bench.lines(*TEN)
    path.write_text(path.read_text().rstrip("\n"))
    before = plan_units(bench.config(path, shard_rows=5))
    path.write_text(path.read_text() + "\n\n" + json.dumps({"question": "new"}))
    after = plan_units(bench.config(path, shard_rows=5))
    assert after[:2] == before
    assert len(after) == 3


def test_a_changed_row_changes_the_digest_of_its_unit_alone(bench: Bench) -> None:
    before = plan_units(bench.config(bench.lines(*TEN), shard_rows=5))
    after = plan_units(bench.config(bench.lines(*TEN[:-1], {"question": "q9", "answer": "b9"}), shard_rows=5))
    assert before[0].digest == after[0].digest
    assert before[1].digest != after[1].digest


@pytest.mark.parametrize("stored_as", ["jsonl", "parquet"])
def test_a_file_that_changed_after_planning_is_not_read(bench: Bench, stored_as: str) -> None:
    def write(rows: list[dict[str, Any]]) -> Path:
        return bench.lines(*rows) if stored_as == "jsonl" else write_parquet(bench.folder / "rows.parquet", rows)

    config = bench.config(write(TEN), stored_as=stored_as)
    (unit,) = plan_units(config)
    write(TEN[1:] + TEN[:1] * 3)
    with pytest.raises(SourceError, match="changed after the run was planned"):
        read_unit(unit, config, ImageStore(bench.folder / "images", config.images))


def test_a_row_beyond_all_bounds_is_quarantined_without_being_held(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_rows, "_WINDOW_BYTES", 16)
    path = bench.lines({"question": "a"}, {"question": "x" * 1000}, {"question": "b"})
    outcome = bench.read(path, shard_rows=1)
    assert questions(outcome) == ["a", "b"]
    assert outcome.reasons == ["row_too_large"]


@pytest.mark.parametrize("cut", [20, -10])
def test_a_truncated_gzip_file_is_a_source_error(bench: Bench, cut: int) -> None:
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in TEN * 100))
    (bench.folder / "rows.jsonl.gz").write_bytes(packed[:cut])
    with pytest.raises(SourceError, match=r"rows\.jsonl\.gz is a damaged or truncated gzip"):
        plan_units(bench.config(bench.folder / "rows.jsonl.gz"))


def test_utf16_is_a_source_error(bench: Bench) -> None:
    (bench.folder / "rows.jsonl").write_text('{"question": "a"}\n', encoding="utf-16")
    with pytest.raises(SourceError, match="UTF-16"):
        plan_units(bench.config(bench.folder / "rows.jsonl"))


# --- JSON arrays and conversations

LLAVA = [
    {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": "Red."}]},
    {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]  # fmt: skip


@pytest.mark.parametrize("name", ["llava.json", "llava.json.gz", "llava.jsonl"])
def test_llava_conversations_give_the_first_exchange(bench: Bench, name: str) -> None:
    (bench.folder / "a.png").write_bytes(png())
    text = "\n".join(map(json.dumps, LLAVA)) if name.endswith("jsonl") else json.dumps(LLAVA, indent=2)
    (bench.folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    first, second = bench.read(bench.folder / name, stored_as="conversations", columns={"id": "id"}).samples
    assert (first.question, first.answer, len(first.images), first.source_id) == ("What is it?", "A square.", 1, "1")
    assert (second.question, second.answer, second.images, second.kind) == ("Hi", "Hello", (), None)


def test_messages_of_roles_and_parts_are_read(bench: Bench) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": [{"type": "text", "text": "Red"}]}]},
        {"messages": [{"role": "assistant", "content": "Hi, I am here."}, {"role": "USER", "content": "Why?"}]},
        {"conversations": [{"from": "user", "value": "old"}, {"from": "chatgpt", "value": "style"}]},
    ]  # fmt: skip
    first, second, third = bench.read(bench.lines(*rows), stored_as="conversations").samples
    assert (first.question, first.answer, len(first.images)) == ("What?", "Red", 1)
    assert (second.question, second.answer) == ("Why?", None)
    assert (third.question, third.answer) == ("old", "style")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "conversation_missing"),
        ([], "conversation_unreadable"),
        ("text", "conversation_unreadable"),
        (["text"], "conversation_unreadable"),
        ([{"from": "gpt", "value": "Hello"}], "conversation_unreadable"),
        ([{"from": "human", "value": 7}], "conversation_unreadable"),
        ([{"from": "human", "value": [7]}], "conversation_unreadable"),
        ([{"from": "human"}], "question_empty"),
        ([{"from": "human", "value": "<image>"}], "image_missing"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}], "image_missing"),
    ],
)
def test_a_broken_conversation_is_quarantined(bench: Bench, turns: object, reason: str) -> None:
    outcome = bench.read(bench.lines(LLAVA[1], {"conversations": turns}), stored_as="conversations")
    assert outcome.reasons == [reason]


def test_conversations_in_parquet_are_read_by_either_format(bench: Bench) -> None:
    path = write_parquet(bench.folder / "chat.parquet", [{"messages": LLAVA[1]["conversations"]}])
    by_name = bench.read(path, stored_as="parquet", columns={"conversations": "messages"})
    by_default = bench.read(path, stored_as="conversations")
    assert questions(by_name) == questions(by_default) == ["Hi"]


@pytest.mark.parametrize("window", [1, 7, 2**20])
def test_an_array_is_read_through_any_window(bench: Bench, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(json_rows, "_WINDOW_BYTES", window)
    rows = [{"question": 'é🙂\\"[]{}', "n": 12345}, 12, "é,]", None, [1, [2]], {"question": "last"}]
    (bench.folder / "rows.json").write_text("\ufeff " + json.dumps(rows, ensure_ascii=False, indent=1) + " \n")
    outcome = bench.read(bench.folder / "rows.json", shard_rows=1)
    assert questions(outcome) == ['é🙂\\"[]{}', "last"]
    assert outcome.reasons == ["row_not_object"] * 4


@pytest.mark.parametrize(
    "text", ['[{"question": "a"}', '[{"question": "a"} {"question": "b"}]', '[{"question": "a"}, {"q']
)
def test_a_damaged_array_is_a_source_error(bench: Bench, text: str) -> None:
    (bench.folder / "rows.json").write_text(text)
    with pytest.raises(SourceError, match=r"rows\.json .*(valid JSON array|lacks a comma)"):
        plan_units(bench.config(bench.folder / "rows.json"))


# --- Parquet


def test_parquet_rows_are_read_across_row_groups(bench: Bench) -> None:
    path = write_parquet(
        bench.folder / "rows.parquet", [{"q": f"q{i}", "junk": i} for i in range(100)], row_group_size=7
    )
    outcome = bench.read(path, stored_as="parquet", columns={"question": "q"}, shard_rows=33)
    assert questions(outcome) == [f"q{i}" for i in range(100)]
    assert [unit.num_rows for unit in outcome.units] == [33, 33, 33, 1]
    assert outcome.samples[50].origin == "s:rows.parquet#50"


def parquet_units(bench: Bench, row_group_size: int) -> tuple[Path, list[Unit], Callable[[Unit], list[Any]]]:
    """Returns a file of 90 rows, its units of 20 rows, and what reads one."""
    rows = [{"q": f"q{number}"} for number in range(90)]
    path = write_parquet(bench.folder / "rows.parquet", rows, row_group_size=row_group_size)
    units = plan_units(bench.config(path, stored_as="parquet", columns={"question": "q"}, shard_rows=20))
    return path, units, lambda unit: list(parquet.read_rows(unit, columns=["q"]))


def test_units_that_follow_one_another_decode_a_row_group_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, units, read = parquet_units(bench, 1000)
    decoded: list[range] = []
    rows_of_group = parquet._rows_of_group

    def noted(file: Any, group: int, wanted: range, columns: list[str]) -> Any:
        decoded.append(wanted)
        return rows_of_group(file, group, wanted, columns)

    monkeypatch.setattr(parquet, "_rows_of_group", noted)
    read_in_order = [row["q"] for unit in units for row in read(unit)]
    assert read_in_order == [f"q{number}" for number in range(90)]
    assert decoded == [range(90)], "the whole file was decoded once"


@pytest.mark.parametrize("row_group_size", [7, 33, 1000])
def test_units_read_in_any_order_hold_their_own_rows(bench: Bench, row_group_size: int) -> None:
    _, units, read = parquet_units(bench, row_group_size)
    for number in (2, 3, 0, 1, 2, 4, 3, 4, 0):
        unit = units[number]
        assert [row["q"] for row in read(unit)] == [f"q{row}" for row in range(unit.start, unit.stop)]


def test_a_file_that_changes_between_two_units_is_noticed(bench: Bench) -> None:
    path, units, read = parquet_units(bench, 1000)
    read(units[0])
    write_parquet(path, [{"q": f"other{number}"} for number in range(91)])
    with pytest.raises(SourceError, match="changed after the run was planned"):
        read(units[1])


def test_a_unit_that_is_not_read_to_its_end_leaves_no_file_open(bench: Bench) -> None:
    _, units, read = parquet_units(bench, 1000)
    begun = parquet.read_rows(units[0], columns=["q"])
    next(begun)
    begun.close()
    assert parquet._left_open.reader is None
    assert len(read(units[1])) == 20
    read(units[4])
    assert parquet._left_open.reader is None, "the last unit of a file closes it"


def test_parquet_structs_lists_and_bytes_are_read(bench: Bench) -> None:
    rows = [
        {
            "q": {"text": "one?"},
            "image": {"bytes": png(), "path": None},
            "opts": {"A": "x", "B": "y", "C": None},
            "a": "y",
        },
        {"q": {"text": None}, "image": None, "opts": {"A": "x", "B": "y", "C": "z"}, "a": "z"},
        {"q": {"text": "three?"}, "image": None, "opts": {"A": "x", "B": "y", "C": "z"}, "a": "w"},
    ]
    path = write_parquet(bench.folder / "rows.parquet", rows)
    columns = {"question": "q.text", "images": "image", "choices": "opts", "answer": "a"}
    outcome = bench.read(path, stored_as="parquet", columns=columns)
    assert [(s.question, s.choices, s.answer, len(s.images)) for s in outcome.samples] == [("one?", ("x", "y"), "B", 1)]
    assert outcome.reasons == ["question_missing", "answer_outside_choices"]


def test_a_parquet_text_that_is_not_utf8_quarantines_its_row(bench: Bench) -> None:
    raw = pa.array([b"good", b"bad\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"question": raw}), bench.folder / "rows.parquet")
    outcome = bench.read(bench.folder / "rows.parquet", stored_as="parquet")
    assert (questions(outcome), outcome.reasons) == (["good", "fine"], ["row_unreadable"])


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "footer"])
def test_a_corrupt_parquet_file_is_a_source_error(bench: Bench, damage: str) -> None:
    path = write_parquet(bench.folder / "rows.parquet", TEN)
    sound = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"question\nfoo\n", "truncated": sound[:-20], "footer": sound[:-40] + sound[-8:]}[damage]
    )
    with pytest.raises(SourceError, match=r"source s: .*rows\.parquet is no sound Parquet file"):
        plan_units(bench.config(path, stored_as="parquet"))


def test_damage_inside_a_parquet_file_is_a_source_error_when_read(bench: Bench) -> None:
    path = write_parquet(bench.folder / "rows.parquet", TEN * 50, compression="zstd")
    when = path.stat()
    sound = path.read_bytes()
    path.write_bytes(sound[:8] + b"\xff" * 120 + sound[128:])
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    config = bench.config(path, stored_as="parquet")
    (unit,) = plan_units(config)
    with pytest.raises(SourceError, match="no sound Parquet file"):
        read_unit(unit, config, ImageStore(bench.folder / "images", config.images))


# --- Files


def test_folders_and_globs_are_read_in_the_order_of_names(bench: Bench) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/10.ndjson", ".hidden/x.jsonl", "_tmp/x.jsonl", "a/notes.md"):
        bench.lines({"question": name}, name=f"data/{name}")
    expected = ["a/1.jsonl", "a/10.ndjson", "b/2.jsonl"]
    outcome = bench.read(bench.folder / "data")
    assert questions(outcome) == expected
    assert [unit.file for unit in outcome.units] == expected
    assert [unit.index for unit in outcome.units] == [0, 1, 2]
    assert questions(bench.read(bench.folder / "data/*/*.jsonl")) == ["_tmp/x.jsonl", "a/1.jsonl", "b/2.jsonl"]
    assert bench.read(bench.folder / "data/a/*.jsonl").units[0].file == "1.jsonl"


def test_a_file_whose_name_looks_like_a_glob_is_a_file(bench: Bench) -> None:
    assert questions(bench.read(bench.lines({"question": "a"}, name="rows[1]*.jsonl"))) == ["a"]


def test_a_file_name_that_is_not_utf8_can_be_stored(bench: Bench) -> None:
    os.mkdir(bench.folder / "data")
    path = os.fsencode(bench.folder / "data") + b"/r\xff.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"question": "a"}\n{}\n')
    outcome = bench.read(bench.folder / "data")
    assert samples_to_table(outcome.samples).num_rows == fates_to_table(outcome.fates).num_rows == 1


def test_max_rows_counts_over_the_files_of_a_source(bench: Bench) -> None:
    for name in ("1", "2", "3"):
        bench.lines(*[{"question": f"{name}-{i}"} for i in range(4)], name=f"data/{name}.jsonl")
        write_parquet(bench.folder / f"pq/{name}.parquet", [{"question": f"{name}-{i}"} for i in range(4)])
    for folder, stored_as in (("data", "jsonl"), ("pq", "parquet")):
        for max_rows in (1, 4, 6):
            outcome = bench.read(bench.folder / folder, stored_as=stored_as, max_rows=max_rows, shard_rows=3)
            assert questions(outcome) == [f"{n}-{i}" for n in (1, 2, 3) for i in range(4)][:max_rows]


def test_fsspec_addresses_are_read(bench: Bench) -> None:
    with fsspec.open("memory://bench/rows.jsonl", "wb") as file:
        file.write(b'{"question": "far", "image": null}\n{"question": "away", "image": "a.png"}\n')
    outcome = bench.read("memory://bench/*.jsonl", columns={"images": "image"})
    assert (questions(outcome), outcome.reasons) == (["far"], ["image_missing"])
    with fsspec.open("memory://bench/rows.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(TEN), file)
    assert len(bench.read("memory://bench/rows.parquet", stored_as="parquet", shard_rows=4).samples) == 10


def test_sources_come_in_the_order_of_the_configuration(bench: Bench) -> None:
    one, two = bench.lines(*TEN, name="z.jsonl"), bench.lines(*TEN, name="a.jsonl")
    sources = [{"name": name, "format": "jsonl", "path": str(path)} for name, path in (("z", one), ("a", two))]
    units = plan_units(parse_config({"sources": sources, "shard_rows": 6}))
    assert [(unit.source, unit.index) for unit in units] == [("z", 0), ("z", 1), ("a", 0), ("a", 1)]
    assert pickle.loads(pickle.dumps(units)) == units


# --- `datasets`


def test_a_saved_dataset_with_an_image_feature_is_read(bench: Bench) -> None:
    import datasets
    from PIL import Image

    (bench.folder / "a.png").write_bytes(png("blue"))
    features = datasets.Features(
        question=datasets.Value("string"), image=datasets.Image(), more=datasets.List(datasets.Image())
    )
    rows = {
        "question": ["one", "two", ""],
        "image": [Image.new("RGB", (8, 8), "red"), str(bench.folder / "a.png"), None],
        "more": [[], [{"bytes": png("red"), "path": None}, {"bytes": b"rot", "path": None}][:1], []],
    }
    data = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features=features))
    data.save_to_disk(str(bench.folder / "saved"))
    outcome = bench.read(
        bench.folder / "saved", stored_as="datasets", split="test", columns={"images": "image"}, shard_rows=2
    )
    assert questions(outcome) == ["one", "two"]
    assert [len(sample.images) for sample in outcome.samples] == [1, 1]
    assert (outcome.reasons, outcome.samples[1].origin) == (["question_empty"], "s:test#1")
    several = bench.read(bench.folder / "saved", stored_as="datasets", split="test", columns={"images": "more"})
    assert [len(sample.images) for sample in several.samples] == [0, 1]
    with pytest.raises(SourceError, match="has no split 'train', only 'test'"):
        plan_units(bench.config(bench.folder / "saved", stored_as="datasets"))
    with pytest.raises(SourceError, match=r"no column 'answer'.*'question', 'image', 'more'"):
        plan_units(bench.config(bench.folder / "saved", stored_as="datasets", split="test", columns=ANSWER))


def test_a_dataset_that_cannot_be_loaded_is_a_source_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match=r"owner/name cannot be loaded from the hub.*no route to the hub"):
        plan_units(bench.config("owner/name", stored_as="datasets"))
    with pytest.raises(SourceError, match="gone does not exist"):
        plan_units(bench.config(bench.folder / "gone", stored_as="datasets"))


# --- Sources that cannot be used


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl", "does not exist"),
        ("gone*.jsonl", "matches no file"),
        ("empty", "holds no file that ends in .jsonl"),
        ("nowhere://x/rows.jsonl", "cannot read"),
    ],
)
def test_a_source_that_is_not_there_names_its_path(bench: Bench, path: str, message: str) -> None:
    (bench.folder / "empty").mkdir()
    where = path if "://" in path else str(bench.folder / path)
    with pytest.raises(SourceError, match=message) as caught:
        plan_units(bench.config(where))
    assert where in str(caught.value)
    assert "source s" in str(caught.value)


def test_a_source_without_rows_is_an_error_but_an_empty_file_among_others_is_not(bench: Bench) -> None:
    empty = bench.lines(name="data/0.jsonl")
    with pytest.raises(SourceError, match="has no rows"):
        plan_units(bench.config(empty))
    bench.lines({"question": "a"}, name="data/1.jsonl")
    assert questions(bench.read(bench.folder / "data")) == ["a"]


@pytest.mark.parametrize("stored_as", ["jsonl", "parquet"])
def test_a_missing_column_names_file_columns_and_setting(bench: Bench, stored_as: str) -> None:
    rows = [{"prompt": "answer", "meta": {"x": 1}}] * 30
    path = bench.lines(*rows) if stored_as == "jsonl" else write_parquet(bench.folder / "rows.parquet", rows)
    for columns, setting in (({}, "question"), ({"question": "prompt", "answer": "meta.answer"}, "answer")):
        with pytest.raises(SourceError) as caught:
            plan_units(bench.config(path, stored_as=stored_as, columns=columns))
        assert all(part in str(caught.value) for part in (path.name, "'prompt', 'meta'", f"columns.{setting}"))


def test_a_column_may_be_absent_from_single_rows_and_from_single_files(bench: Bench) -> None:
    bench.lines({"question": "a"}, {}, name="data/1.jsonl")
    bench.lines(*[{"question": "b"}] * 30, {"question": "c", "answer": "x"}, name="data/2.jsonl")
    outcome = bench.read(bench.folder / "data", columns=ANSWER)
    assert len(outcome.samples) == 32
    assert outcome.samples[-1].answer == "x"
    assert outcome.reasons == ["question_missing"]
    bench.lines({"other": "a"}, name="data/3.jsonl")
    with pytest.raises(SourceError, match=r"3\.jsonl has no column 'question'"):
        plan_units(bench.config(bench.folder / "data", columns=ANSWER))


@pytest.mark.parametrize(("pattern", "message"), [("#### .+", "needs a group"), ("(", "no regular expression")])
def test_a_bad_answer_pattern_is_a_configuration_error(bench: Bench, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_units(bench.config(bench.lines(*TEN), answer_pattern=pattern))


def test_an_image_root_that_is_no_folder_is_a_source_error(bench: Bench) -> None:
    with pytest.raises(SourceError, match="image_root"):
        plan_units(bench.config(bench.lines(*TEN), image_root=str(bench.folder / "gone")))


def test_a_unit_of_another_configuration_is_refused(bench: Bench) -> None:
    (unit,) = plan_units(bench.config(bench.lines(*TEN)))
    other = parse_config({"sources": [{"name": "t", "format": "jsonl", "path": "x"}]})
    with pytest.raises(ConfigError, match="no source 's'"):
        read_unit(unit, other, ImageStore(bench.folder / "images", ImageLimits()))


def test_a_store_that_cannot_be_written_stops_the_unit(bench: Bench) -> None:
    (bench.folder / "a.png").write_bytes(png())
    config = bench.config(bench.lines({"question": "a", "image": "a.png"}), columns={"images": "image"})
    (unit,) = plan_units(config)
    with pytest.raises(StorageError, match="cannot store an image"):
        read_unit(unit, config, ImageStore(bench.folder / "a.png", config.images))


# --- Laws

COLUMNS = {"answer": "a", "choices": "c", "images": "i", "id": "id", "topic": "t", "kind": "k", "licence": "l.x"}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.sampled_from(["A", "math", "<image>", "\ud800"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ABx"), inner, max_size=3)
)
ROWS = st.one_of(
    st.fixed_dictionaries({"question": st.text(min_size=1)}, optional=dict.fromkeys([*"actik", "id", "l"], VALUES)),
    st.dictionaries(st.sampled_from(["question", *"actik", "id", "l"]), VALUES),
    VALUES,
)
SOUND = {"question": "sound", "a": None, "c": None, "i": None, "id": None, "t": None, "k": None, "l": {"x": None}}


@settings(deadline=None, max_examples=30)
@given(st.lists(ROWS, max_size=12))
def test_no_row_is_ever_lost_and_shards_change_nothing(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        path = bench.lines(SOUND, *[json.dumps(row) + "\n" for row in rows])
        outcomes = [bench.read(path, columns=COLUMNS, shard_rows=size) for size in (1, 3, 100)]
    first = outcomes[0]
    for outcome in outcomes:
        assert (outcome.samples, outcome.fates) == (first.samples, first.fates)
        count_stage(len(rows) + 1, len(outcome.samples), outcome.fates).check("sources")
    assert "row_unreadable" not in first.reasons
    assert samples_to_table(first.samples).num_rows + fates_to_table(first.fates).num_rows == len(rows) + 1
    assert len({row.origin for row in [*first.samples, *first.fates]}) == len(rows) + 1


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_source_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        (bench.folder / "rows.jsonl").write_bytes(b'{"question": "sound"}\n' + content)
        outcome = bench.read(bench.folder / "rows.jsonl", shard_rows=2)
    assert outcome.samples[0].question == "sound"
