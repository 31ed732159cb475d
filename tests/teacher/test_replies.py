"""Compacted replies: exact whatever a server sent, and all of a run in one polars table."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import teacher.compacted as compacted_module
import teacher.journal as journal_module
from schemas.errors import StorageError
from schemas.requests import Message, Reply, Sampling
from teacher.attempts import compacted_path, create_attempt
from teacher.compacted import SCHEMA, CompactedReplies, write_compacted
from teacher.journal import Journal, JournalRecord, compact, read_journal
from teacher.records import json_text, parsed_record
from teacher.replies import scan_replies
from tests.teacher.stored_replies import fill, key_of, reply_of, request_of

texts = st.text(st.characters(codec=None), max_size=8) | st.just("lone \udfff") | st.just("\x00 🙂")
integers = st.integers(-(2**70), 2**70) | st.integers(0, 9)
floats = st.floats(allow_nan=False)
replies = st.builds(
    Reply,
    text=texts,
    finish_reason=texts,
    model=texts,
    reasoning=st.none() | texts,
    top_logprobs=st.lists(st.tuples(texts, floats), max_size=3).map(tuple),
    prompt_tokens=integers,
    completion_tokens=integers,
    cached_tokens=integers,
    seconds=floats,
    choice=integers,
    num_attempts=integers,
)
messages = st.builds(
    Message, role=st.sampled_from(["system", "user"]), text=texts, images=st.lists(texts, max_size=2).map(tuple)
)
samplings = st.builds(Sampling, temperature=floats, top_p=floats, max_tokens=integers)
records = st.builds(
    JournalRecord,
    key=st.integers(0, 99).map(key_of),
    purpose=texts,
    sample_id=texts,
    index=integers,
    reply=replies,
    seed=st.none() | integers,
    messages=st.lists(messages, max_size=2).map(tuple),
    sampling=st.none() | samplings,
    choices=st.lists(texts, max_size=2).map(tuple),
    stored_at=st.none() | st.integers(0, 10**13).map(lambda milliseconds: milliseconds / 1000),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compacted")


@given(stored=st.lists(records, max_size=4))
def test_whatever_a_server_sent_comes_back_exactly(scratch: Path, stored: list[JournalRecord]) -> None:
    assert [parsed_record(json_text(record)) for record in stored] == stored
    number, file = create_attempt(scratch)
    os.close(file)
    path = write_compacted(scratch, number, stored)
    replies = CompactedReplies(path)
    try:
        assert list(replies.records()) == stored
        assert [replies.reply(row) for row in range(len(stored))] == [record.reply for record in stored]
        assert list(map(bytes.hex, replies.keys())) == [record.key for record in stored]
    finally:
        replies.close()
        path.unlink()
        (scratch / f"attempt-{number:05d}.journal").unlink()


def test_rows_of_several_row_groups_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacted_module, "_ROW_GROUP_ROWS", 3)
    fill(tmp_path / "j", range(8))
    path = compact(tmp_path / "j")
    assert path is not None and pq.ParquetFile(path).num_row_groups == 3
    with Journal(tmp_path / "j") as journal:
        assert [journal.lookup(key_of(n)) for n in range(8)] == [reply_of(n) for n in range(8)]
    assert [record.index for record in read_journal(tmp_path / "j")] == list(range(8))


def test_every_field_of_a_reply_and_its_request_has_a_column() -> None:
    names = {field.name for model in (JournalRecord, Reply, Sampling) for field in fields(model)}
    assert names - {"reply", "sampling"} == set(SCHEMA.names) - {"images", "exact_record"}


def test_a_file_of_an_earlier_version_has_defaults_for_the_columns_it_lacks(tmp_path: Path) -> None:
    fill(tmp_path / "j", [1])
    fill(tmp_path / "now", [0])
    compact(tmp_path / "now")
    path = compact(tmp_path / "j")
    assert path is not None
    columns = pq.read_table(path).drop_columns(["choice", "num_attempts"])
    columns = columns.set_column(columns.column_names.index("exact_record"), "exact_record", pa.nulls(1, pa.string()))
    path.unlink()
    replace_compacted(tmp_path / "j", columns)
    with Journal(tmp_path / "j") as journal:
        reply = journal.lookup(key_of(1))
    assert reply is not None and (reply.choice, reply.num_attempts, reply.reasoning) == (0, 1, "because")
    rows = scan_replies(tmp_path).sort("index").collect()
    assert rows["choice"].to_list() == [0, None]
    assert rows["prompt_tokens"].to_list() == [0, 1]


def test_a_file_of_a_later_version_is_an_error_that_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "j", [1])
    path = compact(tmp_path / "j")
    assert path is not None
    table = pq.read_table(path)
    path.unlink()
    replace_compacted(tmp_path / "j", table.append_column("mood", pa.array(["good"])))
    with pytest.raises(StorageError, match=r"written by a later version \(columns \['mood'\]\)"):
        Journal(tmp_path / "j")


def replace_compacted(folder: Path, table: pa.Table) -> None:
    """Puts a table in place of a folder's compacted file, under a name that bears its checksum."""
    temporary = folder / "table"
    pq.write_table(table, temporary)
    temporary.rename(compacted_path(folder, 2, compacted_module._synced_crc32(temporary)))


# The table of all replies


def test_tokens_by_purpose_over_compacted_and_growing_journals(tmp_path: Path) -> None:
    fill(tmp_path / "performance" / "a-00000", range(4))
    fill(tmp_path / "performance" / "a-00001", range(4, 6))
    fill(tmp_path / "performance" / "a-00002", [6])
    compact(tmp_path / "performance" / "a-00000")
    compact(tmp_path / "performance" / "a-00001")
    fill(tmp_path / "performance" / "a-00001", [7])  # compacted, and growing again
    by_purpose = (
        scan_replies(tmp_path)
        .group_by("purpose")
        .agg(
            replies=pl.len(),
            prompt_tokens=pl.col("prompt_tokens").filter(pl.col("choice") == 0).sum(),
            completion_tokens=pl.col("completion_tokens").sum(),
        )
    )
    # Numbers 0, 3 and 6 are the first choices of their calls; a prompt has as many tokens as its number says.
    expected = [("performance", 8, 0 + 3 + 6, 8 * 3)]
    assert by_purpose.collect().rows() == by_purpose.collect(engine="streaming").rows() == expected


def test_columns_rows_and_limits_are_pushed_into_growing_journals(tmp_path: Path) -> None:
    fill(tmp_path / "stage" / "shard", range(5))
    scan = scan_replies(tmp_path)
    assert scan.filter(pl.col("index") > 2).select("sample_id").collect()["sample_id"].to_list() == [
        "sample-3",
        "sample-4",
    ]
    assert scan.head(2).select("index").collect()["index"].to_list() == [0, 1]
    assert scan.head(3).filter(pl.col("index") > 1).collect().height == 1


def test_a_row_shows_what_was_asked_and_when(tmp_path: Path) -> None:
    question = Message("user", "What is this? 问", ("a" * 64,)), Message("user", "And this?", ("b" * 64,))
    request = request_of(0)
    request = type(request)(request.sample_id, "routing", question, request.sampling, 5, 0, ("yes", "no"))
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request, Reply("yes", "stop", "m", top_logprobs=(("yes", -0.5),)))
    compact(tmp_path / "j")
    [row] = scan_replies(tmp_path).collect().to_dicts()
    [record] = read_journal(tmp_path / "j")
    assert row["stored_at"].timestamp() == pytest.approx(record.stored_at)
    assert json.loads(row["messages"])[0] == {
        "role": "user",
        "text": "What is this? 问",
        "images": ["a" * 64],
    }
    assert "问" in row["messages"]
    assert row["images"] == ["a" * 64, "b" * 64] and row["choices"] == ["yes", "no"]
    assert row["top_logprobs"] == [{"token": "yes", "logprob": -0.5}]
    assert (row["temperature"], row["top_p"], row["max_tokens"], row["seed"]) == (0.7, 1.0, 64, 5)
    assert row["exact_record"] is None


def test_a_journal_whose_compaction_was_killed_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stage" / "shard"
    fill(folder, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "remove_covered", lambda folder, number: None)
        compact(folder)
        fill(folder, [3])
        compact(folder)
    assert len(list(folder.glob("replies-*.parquet"))) == 2 and len(list(folder.glob("attempt-*.journal"))) == 4
    assert sorted(scan_replies(tmp_path).collect()["index"]) == [0, 1, 2, 3]
    compact(folder)
    assert len(list(folder.iterdir())) == 1
    assert sorted(scan_replies(tmp_path).collect()["index"]) == [0, 1, 2, 3]


def test_journals_of_the_first_version_are_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "shard.journal").write_bytes(b"bimode-journal 1\n")
    fill(tmp_path / "stage" / "shard", [1])
    assert scan_replies(tmp_path).collect()["index"].to_list() == [1]


def test_no_replies_yet_are_an_empty_table_and_no_folder_an_error(tmp_path: Path) -> None:
    table = scan_replies(tmp_path).collect()
    assert table.height == 0 and table.columns == SCHEMA.names
    with pytest.raises(StorageError, match="no such folder"):
        scan_replies(tmp_path / "none")


def test_a_file_that_is_no_journal_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b", [0])
    (tmp_path / "a" / "c.journal").write_text("my notes")
    with pytest.raises(StorageError, match=r"c\.journal is not a reply journal"):
        scan_replies(tmp_path)


def test_a_damaged_file_is_an_error_before_any_row_is_shown(tmp_path: Path) -> None:
    fill(tmp_path / "j", range(3))
    path = compact(tmp_path / "j")
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    with pytest.raises(StorageError, match=f"{path.name} are damaged"):
        scan_replies(tmp_path)
    scan_replies(tmp_path, check=False)
