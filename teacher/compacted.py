"""The replies of a finished shard as one Parquet file: a row per reply, sorted, checksummed as a whole.

The file's name bears the crc32 of all its bytes, which is checked when it is opened, and its pages bear their own,
which are checked when they are read: a damaged file is an error that names it, never a shorter or an empty one.

Strings in Parquet are valid Unicode and integers have 64 bits, but what a server sends need not be so. Such a record is
kept a second time, whole, in the column `exact_record` (JSON); its other columns show what can be shown.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import StorageError
from schemas.requests import Message, Reply, Sampling
from teacher.attempts import check_newest, compacted_crc32, compacted_path, storage_errors, sync_folder, temporary_path
from teacher.crash_points import reach
from teacher.records import JournalRecord, json_text, parsed_record

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("purpose", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        ("seed", pa.int64()),
        ("messages", pa.string()),  # JSON: a list of {role, text, images}
        ("images", pa.list_(pa.string())),  # sha256 of all the messages show, in order
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_tokens", pa.int64()),
        ("choices", pa.list_(pa.string())),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        ("reasoning", pa.string()),
        ("top_logprobs", pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float64())]))),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("cached_tokens", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("choice", pa.int64(), nullable=False),
        pa.field("num_attempts", pa.int64(), nullable=False),
        ("stored_at", pa.timestamp("ms", tz="UTC")),
        ("exact_record", pa.string()),
    ]
)
"""Columns of a compacted file, named like the fields of `JournalRecord`, `Sampling` and `Reply`.

A file of an earlier version may lack some: a reply has the default of its field then, a query sees null.
"""
_ASKED_FIELDS = ("key", "sample_id", "purpose", "index", "seed")
_REPLY_FIELDS = [field.name for field in fields(Reply)]
_REPLY_COLUMNS = [*_REPLY_FIELDS, "exact_record"]
_LONG_COLUMNS = ("text", "reasoning")
_PLAIN_COLUMNS = [name for name in _REPLY_FIELDS if name not in {*_LONG_COLUMNS, "top_logprobs"}]
_COST_COLUMNS = [
    *("sample_id", "purpose", "index", "choice", "num_attempts"),
    *("prompt_tokens", "completion_tokens", "cached_tokens", "seconds"),
]
_REPEATED_COLUMNS = ["purpose", "sample_id", "messages", "images.list.element", "finish_reason", "model"]
# Statistics hold whole values: those of long texts would double the file.
_MEASURED_COLUMNS = [name for name in SCHEMA.names if name not in {"messages", "text", "reasoning", "exact_record"}]
_ROW_GROUP_ROWS = 4096
_CHUNK_BYTES = 2**20
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_INT64 = 2**63


class CompactedReplies:
    """A compacted file, open for looking replies up by row. Safe to use from several threads.

    Memory: the columns of the replies (not of what was asked) are kept from the first look on, so as much as the texts
    of the shard are long; about 2 kB a reply of 500 tokens. Shards are looked up row by row in an order of their own,
    so reading single row groups on demand would decode each of them many times.

    Raises FileNotFoundError: it was compacted away meanwhile. Raises StorageError: it is damaged, or the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._columns: _ReplyColumns | None = None
        check_whole(path)
        with _parquet_errors(self.path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        unknown = set(self._file.schema_arrow.names) - set(SCHEMA.names)
        if unknown:
            self._file.close(force=True)
            raise StorageError(f"{path} was written by a later version (columns {sorted(unknown)}): use that version")

    def keys(self) -> Iterator[bytes]:
        """Yields the key (32 bytes) of each row in order."""
        with _parquet_errors(self.path):
            for batch in self._file.iter_batches(columns=["key"], use_threads=False):
                yield from map(bytes.fromhex, batch.column(0).to_pylist())

    def without_texts(self) -> pa.Table:
        """Returns the columns that say whose replies there are and what they cost, a row for each reply."""
        with _parquet_errors(self.path):
            return self._file.read(columns=_COST_COLUMNS, use_threads=False)

    def reply(self, row: int) -> Reply:
        with self._lock:
            if self._columns is None:
                with _parquet_errors(self.path):
                    table = self._file.read(columns=_REPLY_COLUMNS, use_threads=False)
                self._columns = _ReplyColumns(table)
            columns = self._columns
        return columns.reply(row)

    def records(self) -> Iterator[JournalRecord]:
        """Yields every record in order, a row group at a time."""
        with _parquet_errors(self.path):
            for batch in self._file.iter_batches(batch_size=_ROW_GROUP_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield _record(row)

    def close(self) -> None:
        """Lets go of the file; looking further replies up is an error. Safe to call twice."""
        self._columns = None
        self._file.close(force=True)


class _ReplyColumns:
    """The columns of replies, from which one reply after the other is made.

    Long texts stay in Arrow until they are asked for. All else becomes Python values at once, by column, which takes a
    tenth of the time that it takes value by value.
    """

    def __init__(self, table: pa.Table) -> None:
        columns = {name: _one_array(table.column(name)) for name in table.column_names}
        self._long = {name: columns[name] for name in _LONG_COLUMNS if name in columns}
        self._exact = columns["exact_record"]
        self._has_exact = self._exact.null_count < len(self._exact)
        plain = {name: columns[name].to_pylist() for name in _PLAIN_COLUMNS if name in columns}
        self._names, self._plain = tuple(plain), list(zip(*plain.values(), strict=True))
        logprobs = columns["top_logprobs"]
        pairs = logprobs.flatten()
        self._pairs = list(zip(*(pairs.field(name).to_pylist() for name in ("token", "logprob")), strict=True))
        lengths = pc.fill_null(pc.list_value_length(logprobs), 0).to_numpy()
        self._starts = [0, *np.cumsum(lengths).tolist()]

    def reply(self, row: int) -> Reply:
        if self._has_exact and self._exact[row].is_valid:
            return parsed_record(self._exact[row].as_py()).reply
        return Reply(
            **{name: column[row].as_py() for name, column in self._long.items()},
            **dict(zip(self._names, self._plain[row], strict=True)),
            top_logprobs=tuple(self._pairs[self._starts[row] : self._starts[row + 1]]),
        )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def write_compacted(folder: Path, number: int, records: Iterable[JournalRecord]) -> Path:
    """Writes the compacted file of an attempt, whole or not at all, and returns its path.

    records: sorted. They are taken one row group at a time.

    Raises StorageError: another run has taken over, or the disk refuses.
    """
    return write_compacted_tables(folder, number, _row_groups(records))


def write_compacted_tables(folder: Path, number: int, row_groups: Iterable[pa.Table]) -> Path:
    """Does what `write_compacted` does with records that are tables with `SCHEMA` already, each one row group."""
    temporary = temporary_path(folder, number)
    with storage_errors("write", temporary):
        try:
            _write_parquet(temporary, row_groups)
            reach("compact-before-fsync")
            checksum = _synced_crc32(temporary)
            reach("compact-after-fsync")
            check_newest(folder, number)
            path = compacted_path(folder, number, checksum)
            reach("compact-before-rename")
            os.replace(temporary, path)
            reach("compact-after-rename")
            sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def table_of(records: Iterable[JournalRecord]) -> pa.Table:
    """Returns records as rows of `SCHEMA`."""
    known = list(records)
    try:
        return pa.table(_columns(known), schema=SCHEMA)
    except (pa.ArrowException, UnicodeError, OverflowError):  # a column cannot hold what it should
        return pa.Table.from_pylist([_row(record) for record in known], schema=SCHEMA)


def _columns(records: Sequence[JournalRecord]) -> dict[str, list[Any]]:
    """Returns what `_row` does of all records, by column, in a third of the time; for records that columns can hold."""
    samplings = [record.sampling for record in records]
    logprobs = [record.reply.top_logprobs for record in records]
    return {
        **{name: [getattr(record, name) for record in records] for name in _ASKED_FIELDS},
        "messages": [_messages_json(record.messages) for record in records],
        "images": [[sha256 for message in record.messages for sha256 in message.images] for record in records],
        **{name: [s and getattr(s, name) for s in samplings] for name in ("temperature", "top_p", "max_tokens")},
        "choices": [record.choices for record in records],
        **{name: [getattr(record.reply, name) for record in records] for name in _REPLY_FIELDS},
        "top_logprobs": [[{"token": token, "logprob": logprob} for token, logprob in pairs] for pairs in logprobs],
        "stored_at": [None if record.stored_at is None else round(1000 * record.stored_at) for record in records],
        "exact_record": [None] * len(records),
    }


def _row_groups(records: Iterable[JournalRecord]) -> Iterator[pa.Table]:
    remaining = iter(records)
    while rows := list(islice(remaining, _ROW_GROUP_ROWS)):
        yield table_of(rows)


def _write_parquet(path: Path, row_groups: Iterable[pa.Table]) -> None:
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression="zstd",
        use_dictionary=_REPEATED_COLUMNS,
        write_statistics=_MEASURED_COLUMNS,
        write_page_checksum=True,
    ) as writer:
        for table in row_groups:
            writer.write_table(table)


def _synced_crc32(path: Path) -> int:
    """Returns the crc32 of a file's bytes, which are on the disk then. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return _crc32(file)


def _crc32(file: BinaryIO) -> int:
    checksum = 0
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def check_whole(path: Path) -> None:
    """Reads a compacted file once.

    Raises FileNotFoundError: it was compacted away. Raises StorageError: it is damaged, or the disk refuses.
    """
    try:
        with path.open("rb") as file:
            is_whole = _crc32(file) == compacted_crc32(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    if not is_whole:
        raise _damage(path, "its bytes are not those of which its name bears the checksum")


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise _damage(path, str(error)) from error


def _damage(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"the compacted replies {path} are damaged: {reason}. Put back a copy of the file; or move it away, and its "
        "replies will be asked for again"
    )


def _row(record: JournalRecord) -> dict[str, Any]:
    """Returns a record as a row of `SCHEMA`, with the exact record if a column cannot hold what it should."""
    row = {
        **{name: getattr(record, name) for name in _ASKED_FIELDS},
        "messages": _messages_json(record.messages),
        "images": [sha256 for message in record.messages for sha256 in message.images],
        **dict.fromkeys(("temperature", "top_p", "max_tokens")),
        **(asdict(record.sampling) if record.sampling else {}),
        "choices": record.choices,
        **{name: getattr(record.reply, name) for name in _REPLY_FIELDS},
        "top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in record.reply.top_logprobs],
        "stored_at": None if record.stored_at is None else round(1000 * record.stored_at),
    }
    shown: dict[str, Any] = _shown(row)
    return shown | {"exact_record": None if shown == row else json_text(record)}


def _messages_json(messages: Sequence[Message]) -> str | None:
    shown = [{"role": message.role, "text": message.text, "images": message.images} for message in messages]
    return _to_json(shown) if shown else None


def _shown(value: Any) -> Any:
    """Returns a value as columns can hold it: strings of valid Unicode, integers of 64 bits."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return max(-_INT64, min(value, _INT64 - 1))
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shown(item) for item in value)
    return value


def _record(row: dict[str, Any]) -> JournalRecord:
    if row["exact_record"] is not None:
        return parsed_record(row["exact_record"])
    messages = json.loads(row["messages"] or "[]")
    sampling = Sampling(row["temperature"], row["top_p"], row["max_tokens"]) if row["max_tokens"] is not None else None
    return JournalRecord(
        **{name: row[name] for name in ("key", "purpose", "sample_id", "index", "seed")},
        reply=stored_reply(row),
        messages=tuple(Message(message["role"], message["text"], tuple(message["images"])) for message in messages),
        sampling=sampling,
        choices=tuple(row["choices"]),
        stored_at=None if row["stored_at"] is None else round(row["stored_at"].timestamp(), 3),
    )


def stored_reply(row: Mapping[str, Any]) -> Reply:
    """Returns the reply of a row with the columns of `SCHEMA`; one of an earlier version may lack its last fields."""
    if row["exact_record"] is not None:
        return parsed_record(row["exact_record"]).reply
    members = {name: row[name] for name in _REPLY_FIELDS if row.get(name) is not None}
    members["top_logprobs"] = tuple((pair["token"], pair["logprob"]) for pair in row["top_logprobs"] or ())
    return Reply(**members)
