"""A version that is right passes; each way of being wrong is found, and named with its file, row and id."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import validation
from corpus.validation import Problem, Validation, validate_version
from schemas.errors import RowError
from schemas.fates import Exit, Fate
from schemas.samples import AnswerType, Kind
from tests.corpus.small_versions import a_row, rewrite_manifest, rewrite_shard, some_rows, write_version

SHARD = "data/think/00000.parquet"
FATES = [
    Fate(f"tests:file#9{n}", f"{n:032x}", "tests", "duplicates", Exit.DROPPED, "duplicate_exact", "equals another")
    for n in range(2)
]


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return write_version(tmp_path / "corpus", some_rows(), FATES)


def only(found: Validation) -> Problem:
    """Returns the one problem of a version."""
    assert found.num_problems.total() == 1, found.problems
    return found.problems[0]


def codes(found: Validation) -> set[str]:
    assert not found.is_valid
    return set(found.num_problems)


def test_a_version_that_is_right_has_no_problem(version: Path) -> None:
    told: list[tuple[int, int]] = []
    found = validate_version(version, watch=lambda *progress: told.append(progress))
    assert found.is_valid and found.problems == [] and found.notes == []
    assert (found.version, found.num_rows, found.num_images, found.num_files) == ("v0001", 9, 9, 8)
    assert told[-1] == (9, 9)


def test_hostile_texts_are_no_problem(tmp_path: Path) -> None:
    texts = ["<script>alert(1)</script>", "dots " * 2_000_000, "كم عدد النقاط؟ \u202eمرحبا", "\x1b[2J\x07 bell"]
    rows = [a_row(n, question=text) for n, text in enumerate(texts)]
    assert validate_version(write_version(tmp_path, rows)).is_valid


def test_a_version_without_rows_is_right(tmp_path: Path) -> None:
    assert validate_version(write_version(tmp_path, [])).is_valid


def test_a_folder_that_is_no_version_is_none(tmp_path: Path, version: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    half = tmp_path / "half"
    shutil.copytree(version, half, ignore=shutil.ignore_patterns("manifest.json"))
    for folder in ("empty", "photos", "half"):
        problem = only(validate_version(tmp_path / folder))
        assert problem.code == "manifest_missing" and "not a finished corpus version" in problem.detail


def test_a_manifest_of_a_future_format_is_named_as_such(version: Path) -> None:
    path = version / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    problem = only(validate_version(version))
    assert problem.code == "manifest_damaged" and "format 99 is unknown" in problem.detail


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}'])
def test_a_damaged_manifest_is_the_only_thing_said(version: Path, text: str) -> None:
    (version / "manifest.json").write_text(text)
    assert only(validate_version(version)).code == "manifest_damaged"


def test_a_shard_that_is_gone_is_named(version: Path) -> None:
    (version / SHARD).unlink()
    found = validate_version(version)
    assert codes(found) == {"file_missing", "files_not_loaded"}
    assert {problem.file for problem in found.problems} == {SHARD, "README.md"}


def test_a_shard_that_was_cut_is_named_as_altered_and_unreadable(version: Path) -> None:
    shard = version / SHARD
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert codes(validate_version(version)) == {"file_altered", "file_unreadable", "row_count_differs"}


@pytest.fixture(scope="module")
def whole_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("whole"), some_rows(think=3, direct=3), FATES)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([SHARD, "data/direct/00000.parquet", "fates.parquet", "marks.parquet", "README.md"]),
    place=st.floats(0, 1, exclude_max=True),
    flipped=st.integers(1, 255),
    end=st.none() | st.floats(0, 1, exclude_max=True),
)
@example(name="marks.parquet", place=0.421875, flipped=1, end=None)
def test_a_changed_byte_or_a_cut_anywhere_is_found_in_its_file_and_nothing_else_happens(
    whole_version: Path, name: str, place: float, flipped: int, end: float | None
) -> None:
    file = whole_version / name
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= flipped
    file.chmod(0o644)
    file.write_bytes(damaged if end is None else damaged[: int(end * len(content))])
    try:
        found = validate_version(whole_version)
    finally:
        file.write_bytes(content)
    assert found.num_problems["file_altered"] == 1
    assert name in {problem.file for problem in found.problems if problem.code == "file_altered"}


def test_text_that_is_no_unicode_is_found(version: Path) -> None:
    table = pq.read_table(version / SHARD, partitioning=None)
    texts = pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string())
    (version / SHARD).unlink()
    pq.write_table(table.set_column(table.column_names.index("question"), "question", texts), version / SHARD)
    rewrite_manifest(version)
    (problem,) = (p for p in validate_version(version).problems if p.code == "file_unreadable")
    assert problem.file == SHARD and "UTF8" in problem.detail


@pytest.mark.parametrize(
    ("column", "value", "code"),
    [
        ("answer", "8", "completion_differs"),
        ("num_right", 3, "mode_differs"),
        ("question", "Another?", "prompt_differs"),
        ("id", "0" * 32, "id_differs"),
        ("mode", "direct", "mode_differs"),
        ("licence", "MIT", ""),
    ],
)
def test_a_value_changed_with_care_checksums_and_all_is_found_with_its_row(
    version: Path, column: str, value: Any, code: str
) -> None:
    rewrite_shard(version, lambda records: records[1].update({column: value}))
    _fit_card(version)
    found = validate_version(version)
    if not code:  # It was so before.
        assert found.is_valid
        return
    assert code in codes(found)
    assert {(problem.file, problem.row) for problem in found.problems} == {(SHARD, 1)}


def _fit_card(version: Path) -> None:
    """Writes into the card what its manifest says of the sizes, as someone would who hides a change."""
    sizes = {"think": 0, "direct": 0}
    for shard in json.loads((version / "manifest.json").read_text())["shards"]:
        if shard["num_think"] or shard["num_direct"]:
            sizes[Path(shard["path"]).parent.name] += shard["num_bytes"]
    card = version / "README.md"
    _, metadata, body = card.read_text().split("---\n", 2)
    data = yaml.safe_load(metadata)
    for info in data["dataset_info"]:
        size = sum(number for mode, number in sizes.items() if info["config_name"] in ("all", mode))
        for split in info.get("splits", []):
            split["num_bytes"] = info["download_size"] = info["dataset_size"] = size
    card.write_text(f"---\n{yaml.safe_dump(data)}---\n{body}")
    rewrite_manifest(version)


def test_a_row_too_many_is_found_as_a_repeated_id_and_in_every_count(version: Path) -> None:
    rewrite_shard(version, lambda records: records.append(records[0]))
    found = validate_version(version)
    assert {"id_repeated", "card_differs", "rows_unaccounted"} <= codes(found)
    repeated = next(problem for problem in found.problems if problem.code == "id_repeated")
    assert (repeated.file, repeated.row) == (SHARD, 3) and repeated.id


def test_rows_of_one_content_are_in_order_where_the_run_kept_duplicates(tmp_path: Path) -> None:
    version = write_version(tmp_path, [a_row(1), a_row(1)])
    assert only(validate_version(version)).code == "id_repeated"
    found = validate_version(version, may_repeat_ids=True)
    assert found.is_valid and "repeat the content" in found.notes[0]


def test_rows_in_the_folder_of_the_other_mode_are_found(version: Path) -> None:
    rows = pq.read_table(version / "data/direct/00000.parquet", partitioning=None).to_pylist()
    rewrite_shard(version, lambda records: records.__setitem__(slice(None), rows))
    found = validate_version(version)
    assert any("'direct' row in the folder think" in problem.detail for problem in found.problems)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda table: table.drop_columns(["licence"]), "columns are missing: licence"),
        (lambda table: table.append_column("note", pa.nulls(len(table))), "columns are not ours: note"),
        (lambda table: table.set_column(0, "id", table["id"].cast(pa.large_string())), "id is large_string instead"),
        (lambda table: table.select(sorted(table.column_names)), "another order"),
    ],
)
def test_a_shard_of_another_schema_is_named(version: Path, change: Any, detail: str) -> None:
    table = pq.read_table(version / SHARD, partitioning=None)
    (version / SHARD).unlink()
    pq.write_table(change(table), version / SHARD)
    rewrite_manifest(version)
    (problem,) = (p for p in validate_version(version).problems if p.code == "schema_differs")
    assert problem.file == SHARD and detail in problem.detail


def test_foreign_files_are_named_and_hidden_ones_are_not(version: Path) -> None:
    shutil.copy(version / SHARD, version / "data/think/99999.parquet")
    (version / "notes.txt").write_text("mine")
    (version / ".gitattributes").write_text("*.parquet filter=lfs")
    found = validate_version(version)
    foreign = {problem.file: problem.detail for problem in found.problems if problem.code == "file_foreign"}
    assert set(foreign) == {"data/think/99999.parquet", "notes.txt"}
    assert "would be loaded" in foreign["data/think/99999.parquet"]
    assert "files_not_loaded" in codes(found)


@pytest.mark.parametrize("name", ["README.md", "fates.parquet", "marks.parquet", "report.html", "report.json"])
def test_a_missing_companion_is_named(version: Path, name: str) -> None:
    (version / name).unlink()
    found = validate_version(version)
    assert "file_missing" in codes(found)
    assert any(problem.file == name for problem in found.problems)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no metadata at all\n", "card_differs"),
        ("---\nlicense: [\n---\n", "card_unreadable"),
        ("---\nconfigs: 7\n---\n", "card_unreadable"),
    ],
)
def test_a_card_that_cannot_be_used_is_named(version: Path, text: str, code: str) -> None:
    (version / "README.md").write_text(text)
    rewrite_manifest(version)
    assert codes(validate_version(version)) == {code}


def test_a_card_of_other_sizes_is_named(version: Path) -> None:
    card = version / "README.md"
    card.write_text(card.read_text().replace("num_examples: 9", "num_examples: 8"))
    rewrite_manifest(version)
    problem = only(validate_version(version))
    assert (problem.code, problem.file) == ("card_differs", "README.md") and "configuration all" in problem.detail


def test_fates_that_the_manifest_counts_otherwise_are_named(version: Path) -> None:
    path = version / "fates.parquet"
    table = pq.read_table(path)
    records = table.to_pylist()
    records[0]["reason"] = "trace_answer_wrong"
    records[1]["exit"] = "eaten"
    pq.write_table(pa.Table.from_pylist(records, table.schema), path)
    rewrite_manifest(version)
    found = validate_version(version)
    assert codes(found) == {"fates_differ", "fate_unknown"}
    assert next(p for p in found.problems if p.code == "fate_unknown").row == 1


def test_a_stage_that_lost_a_row_is_named(version: Path) -> None:
    def lose(record: dict[str, Any]) -> None:
        record["counts"][0]["kept"] -= 1

    rewrite_manifest(version, lose)
    found = validate_version(version)
    assert codes(found) == {"rows_unaccounted"} and "stage duplicates lost rows" in found.problems[0].detail


def test_marks_belong_to_rows_that_exist(tmp_path: Path) -> None:
    rows = some_rows()
    right = write_version(tmp_path / "a", rows, marks=[(rows[0].sample.id, "vanished", "v0001")])
    assert validate_version(right).is_valid
    wrong = write_version(tmp_path / "b", rows, marks=[("0" * 32, "vanished", "v0001")])
    problem = only(validate_version(wrong))
    assert (problem.code, problem.file, problem.row, problem.id) == ("mark_without_row", "marks.parquet", 0, "0" * 32)
    eaten = write_version(tmp_path / "c", rows, marks=[(rows[0].sample.id, "eaten", "v0001")])
    assert only(validate_version(eaten)).code == "mark_unknown"


def test_modes_that_no_threshold_can_have_led_to_are_found(tmp_path: Path) -> None:
    rows = []
    for number, probability in enumerate([0.9, 0.4, 0.1, 0.6]):
        row = a_row(number, kind=Kind.SUBJECTIVE, answer_type=AnswerType.OPEN, answer=None, thinks=number < 2)
        rows.append(replace(row, decision=replace(row.decision, probability=probability)))
    problem = only(validate_version(write_version(tmp_path, rows)))
    assert problem.code == "mode_differs" and problem.id == rows[3].sample.id and "0.6000" in problem.detail


def test_rows_without_a_licence_are_noted(tmp_path: Path) -> None:
    found = validate_version(write_version(tmp_path, [a_row(1, licence=None), a_row(2)]))
    assert found.is_valid and found.notes == ["1 rows of source tests state no licence"]


def test_images_are_decoded_by_the_caller_all_or_a_sample(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> None:
        raise RowError("image_unreadable", f"{len(content)} bytes")

    found = validate_version(version, check_image=refuse, checks_all_images=True)
    assert found.num_problems == {"image_unreadable": 9} and found.num_decoded == 9
    assert (found.problems[0].file, found.problems[0].row) == ("data/direct/00000.parquet", 0)
    monkeypatch.setattr(validation, "FIRST_IMAGES", 2)
    monkeypatch.setattr(validation, "EVERY_IMAGE", 4)
    assert validate_version(version, check_image=lambda content: None).num_decoded == 4  # 1, 2, 4 and 8


def test_a_row_group_that_claims_to_be_huge_is_not_read(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_GROUP_BYTES", 10)
    found = validate_version(version)
    assert "row_group_too_large" in codes(found) and found.num_rows == 0


def test_of_many_problems_some_are_listed_and_all_counted(tmp_path: Path) -> None:
    version = write_version(tmp_path, some_rows(think=0, direct=60), shard_rows=60)

    def break_all(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["answer"] = "8"

    rewrite_shard(version, break_all, path="data/direct/00000.parquet")
    _fit_card(version)
    found = validate_version(version)
    assert found.num_problems == {"completion_differs": 60} and len(found.problems) == validation.MAX_LISTED


def test_a_version_of_the_first_format_is_validated_too(version: Path) -> None:
    (version / "marks.parquet").unlink()

    def first_format(record: dict[str, Any]) -> None:
        for key in ("lineage", "num_marked", "history"):
            del record[key]
        record["format"] = 1
        record["files"] = [file for file in record["files"] if file["path"] != "marks.parquet"]
        for shard in record["shards"]:
            del shard["since"]

    path = version / "manifest.json"
    record = json.loads(path.read_text())
    record["files"] = [file for file in record["files"] if file["path"] != "marks.parquet"]
    path.write_text(json.dumps(record))
    rewrite_manifest(version, first_format)
    assert validate_version(version).is_valid
