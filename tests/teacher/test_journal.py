"""The journal: durable, recoverable at every byte, fenced against zombies, never believing what was damaged."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import teacher.attempts as attempts_module
import teacher.compacted as compacted_module
import teacher.frames as frames_module
import teacher.journal as journal_module
from schemas.errors import StorageError
from schemas.requests import Reply
from teacher.attempts import HEADER, create_attempt
from teacher.frames import framed, scan
from teacher.journal import Journal, JournalRecord, compact, read_journal
from teacher.records import rendered_question, rendered_record
from tests.teacher.stored_replies import NUM_REPLIES, fill, key_of, reply_of, request_of

ROOT = Path(__file__).parents[2]


def attempt(folder: Path, number: int) -> Path:
    return folder / f"attempt-{number:05d}.journal"


def frame_of(number: int, text: str = "") -> bytes:
    """Returns the bytes with which a run stores a reply."""
    request = request_of(number)
    question = rendered_question(request)
    return framed(rendered_record(key_of(number), request, question, reply_of(number, text), stored_at=1.5))


def stored(folder: Path, num_replies: int) -> list[Reply | None]:
    with Journal(folder) as journal:
        return [journal.lookup(key_of(number)) for number in range(num_replies)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Gives a file other content in place; emptied first, it would be flushed to the disk each time."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def start(*arguments: str, crash_at: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"BIMODE_CRASH_AT": crash_at}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def hung_writer(folder: Path, *, before: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a process that stores reply 0, and hangs within storing reply 1 ("zombie") until it gets a line."""
    code = f"""
import sys
from pathlib import Path
import teacher.journal as module
from tests.teacher.stored_replies import key_of, reply_of, request_of
journal = module.Journal(Path(sys.argv[1]))
journal.append(key_of(0), request_of(0), reply_of(0))
def hang(*arguments, real=module.{before}):
    print("hung", flush=True)
    sys.stdin.readline()
    return real(*arguments)
module.{before} = hang
try:
    journal.append(key_of(1), request_of(1), reply_of(1, "zombie"))
    print("stored")
except module.StorageError as error:
    print(error)
"""
    process = start("-c", code, str(folder))
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "hung\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def wake(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate("\n\n\n")
    return output.replace("hung\n", "")


# Storing and reading


def test_a_reply_comes_back_exactly_as_it_was_stored(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "shard"
    fill(folder, range(3))
    with Journal(folder) as journal:
        assert [journal.lookup(key_of(n)) for n in range(3)] == [reply_of(n) for n in range(3)]
        assert journal.lookup(key_of(3)) is None
        assert len(journal) == 3 and key_of(0) in journal and key_of(3) not in journal


def test_reports_read_what_was_asked_and_answered_in_order_while_the_journal_is_open(tmp_path: Path) -> None:
    began = time.time()
    with Journal(tmp_path / "j") as journal:
        for number in range(2):
            journal.append(key_of(number), request_of(number), reply_of(number))
        records = list(read_journal(tmp_path / "j"))
    request = request_of(1)
    times = [record.stored_at for record in records]
    assert records[1] == JournalRecord(
        key_of(1), "performance", "sample-1", 1, reply_of(1), 8, request.messages, request.sampling, (), times[1]
    )
    assert [record.key for record in records] == [key_of(0), key_of(1)]
    assert all(began - 1 <= (stored_at or 0) <= time.time() + 1 for stored_at in times)


def test_a_missing_journal_is_empty_and_reading_it_makes_no_folder(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path / "none")) == []
    assert stored(tmp_path / "none", 1) == [None]
    assert compact(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_each_run_that_stores_has_a_file_of_its_own_and_one_that_does_not_has_none(tmp_path: Path) -> None:
    fill(tmp_path / "j", [0])
    before = attempt(tmp_path / "j", 1).read_bytes()
    assert stored(tmp_path / "j", 1) == [reply_of(0)]
    fill(tmp_path / "j", [0, 1])
    assert names(tmp_path / "j") == ["attempt-00001.journal", "attempt-00002.journal"]
    assert attempt(tmp_path / "j", 1).read_bytes() == before
    assert stored(tmp_path / "j", 2) == [reply_of(0), reply_of(1)]


async def test_the_first_reply_of_a_key_stays_and_is_what_storing_returns(tmp_path: Path) -> None:
    first, second, third = (reply_of(0, text) for text in ("first", "second", "third"))
    with Journal(tmp_path / "j") as journal:
        assert journal.append(key_of(0), request_of(0), first) == first
        assert journal.append(key_of(0), request_of(0), second) == first
        records = [(key_of(n), request_of(n), reply) for n, reply in ((0, third), (1, second), (1, third))]
        assert await journal.append_many_durably(records) == [first, second, second]
    assert stored(tmp_path / "j", 2) == [first, second]


async def test_the_samples_of_a_question_are_stored_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_syncs = 0
    real_fsync = os.fsync

    def counted(file: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        real_fsync(file)

    base, other = request_of(0), request_of(100)
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(99), request_of(99), reply_of(99))
        monkeypatch.setattr(os, "fsync", counted)
        records = [(key_of(n), base.sample(n) if n < 8 else other, reply_of(n)) for n in range(9)]
        assert await journal.append_many_durably(records) == [reply_of(n) for n in range(9)]
        assert num_syncs == 1
    _, *stored_records = read_journal(tmp_path / "j")
    assert [(r.index, r.seed, r.sample_id) for r in stored_records] == [
        *((n, 7 + n, "sample-0") for n in range(8)),
        (100, 107, "sample-100"),
    ]
    assert [record.reply for record in stored_records] == [reply_of(n) for n in range(9)]
    assert all(record.messages == base.messages for record in stored_records)


def test_a_closed_journal_takes_nothing_and_reads_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "j", [0])
    journal = Journal(tmp_path / "j")
    journal.close()
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.append(key_of(1), request_of(1), reply_of(1))
    with (tmp_path / "other").open("wb"), pytest.raises(StorageError, match="cannot read"):
        journal.lookup(key_of(0))


def test_a_forked_child_lets_go_of_the_journal_and_its_parent_goes_on(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        child = os.fork()
        if child == 0:
            try:
                journal.append(key_of(1), request_of(1), reply_of(1))
            except StorageError as error:
                os._exit(0 if "closed" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        journal.append(key_of(1), request_of(1), reply_of(1))
    assert stored(tmp_path / "j", 2) == [reply_of(0), reply_of(1)]


async def test_many_concurrent_replies_share_few_fsyncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_syncs = 0
    real_fsync = os.fsync

    def slow_fsync(file: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        time.sleep(0.01)
        real_fsync(file)

    with Journal(tmp_path / "j") as journal:
        monkeypatch.setattr(os, "fsync", slow_fsync)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticker = asyncio.create_task(tick())
        await asyncio.gather(*(journal.append_durably(key_of(n), request_of(n), reply_of(n)) for n in range(500)))
        ticker.cancel()
        assert 1 <= num_syncs <= 20
        assert ticks > 0  # the event loop went on meanwhile
        assert all(journal.lookup(key_of(n)) == reply_of(n) for n in range(500))


async def test_a_reply_whose_waiter_was_cancelled_is_stored_all_the_same(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        waiter = asyncio.create_task(journal.append_durably(key_of(0), request_of(0), reply_of(0)))
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        await journal.append_durably(key_of(1), request_of(1), reply_of(1))
        assert journal.lookup(key_of(0)) == reply_of(0)


def test_a_reply_whose_event_loop_has_gone_is_stored_all_the_same(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:

        async def leave() -> None:
            asyncio.get_running_loop().create_task(journal.append_durably(key_of(0), request_of(0), reply_of(0)))
            await asyncio.sleep(0)

        asyncio.run(leave())
        journal.append(key_of(1), request_of(1), reply_of(1))
        assert journal.lookup(key_of(0)) == reply_of(0)


def test_a_reply_too_long_for_the_journal_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_module, "MAX_PAYLOAD_BYTES", 1000)
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(StorageError, match="too long"):
            journal.append(key_of(0), request_of(0), reply_of(0, "x" * 1000))
        journal.append(key_of(1), request_of(1), reply_of(1))
        assert journal.lookup(key_of(1)) == reply_of(1)


# Several runs on one shard


def test_of_two_open_journals_the_one_that_stored_last_goes_on(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as first, Journal(tmp_path / "j") as second:
        first.append(key_of(0), request_of(0), reply_of(0))
        second.append(key_of(1), request_of(1), reply_of(1))
        for _ in range(2):
            with pytest.raises(StorageError, match=r"taken over by attempt 2 \(this is attempt 1\)"):
                first.append(key_of(2), request_of(2), reply_of(2))
        assert first.lookup(key_of(0)) == reply_of(0)
        second.append(key_of(3), request_of(3), reply_of(3))
    assert stored(tmp_path / "j", 4) == [reply_of(0), reply_of(1), None, reply_of(3)]


def test_the_first_append_learns_what_another_run_stored_since_opening(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as first, Journal(tmp_path / "j") as second:
        first.append(key_of(0), request_of(0), reply_of(0, "first"))
        assert second.lookup(key_of(0)) is None
        assert second.append(key_of(0), request_of(0), reply_of(0, "second")) == reply_of(0, "first")
        assert second.lookup(key_of(0)) == reply_of(0, "first")
    assert stored(tmp_path / "j", 1) == [reply_of(0, "first")]


def test_a_run_that_hung_before_its_write_is_told_and_its_bytes_are_never_believed(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with hung_writer(folder, before="write_all") as zombie, Journal(folder) as journal:
        journal.append(key_of(1), request_of(1), reply_of(1, "true"))
        assert "taken over by attempt 2" in wake(zombie)
        journal.append(key_of(2), request_of(2), reply_of(2))
    zombies = [payload for _, _, payload in scan_file(attempt(folder, 1)) if b"zombie" in payload]
    assert len(zombies) == 1  # whole and with a true checksum, but too late
    for _ in range(2):
        assert stored(folder, 3) == [reply_of(0), reply_of(1, "true"), reply_of(2)]
        assert [record.reply for record in read_journal(folder)] == [reply_of(0), reply_of(1, "true"), reply_of(2)]
        compact(folder)


def test_a_run_that_hung_before_its_check_writes_nothing_more(tmp_path: Path) -> None:
    with hung_writer(tmp_path / "j", before="check_newest") as zombie:
        size = attempt(tmp_path / "j", 1).stat().st_size
        fill(tmp_path / "j", [1])
        assert "taken over by attempt 2" in wake(zombie)
    assert attempt(tmp_path / "j", 1).stat().st_size == size
    assert stored(tmp_path / "j", 2) == [reply_of(0), reply_of(1)]


def test_what_a_run_wrote_before_it_hung_is_believed_though_it_is_told_nothing_was_stored(tmp_path: Path) -> None:
    with hung_writer(tmp_path / "j", before="os.fsync") as zombie:
        with Journal(tmp_path / "j") as journal:
            assert journal.append(key_of(1), request_of(1), reply_of(1, "true")) == reply_of(1, "zombie")
        assert "taken over by attempt 2" in wake(zombie)
    assert stored(tmp_path / "j", 2) == [reply_of(0), reply_of(1, "zombie")]


def test_a_run_whose_journal_was_compacted_behind_its_back_is_told(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        compact(tmp_path / "j")
        with pytest.raises(StorageError, match="taken over by attempt 2"):
            journal.append(key_of(1), request_of(1), reply_of(1))
    assert stored(tmp_path / "j", 2) == [reply_of(0), None]


def test_a_run_whose_file_was_removed_is_told(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        attempt(tmp_path / "j", 1).unlink()
        with pytest.raises(StorageError, match=r"attempt-00001\.journal was removed"):
            journal.append(key_of(1), request_of(1), reply_of(1))


def test_what_a_taken_over_run_appends_later_is_beyond_belief_whatever_byte_of_the_statement_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    folder = tmp_path / "j"
    fill(folder, [0])
    fill(folder, [1])
    with attempt(folder, 1).open("ab") as file:
        file.write(frame_of(1, "zombie") + frame_of(2, "zombie"))
    content = attempt(folder, 2).read_bytes()
    first_reply = next(start for start, _, payload in scan_file(attempt(folder, 2)) if payload.startswith(b'{"key"'))
    for place in range(first_reply):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        overwrite(attempt(folder, 2), damaged)
        assert stored(folder, 3) == [reply_of(0), reply_of(1), None]


def test_a_lower_attempt_that_turns_up_after_a_higher_one_began_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    for number in range(3):
        fill(folder, [number])
    attempt(folder, 2).unlink()
    fill(folder, [3])  # as this one saw it, there is no second attempt
    attempt(folder, 2).write_bytes(HEADER + frame_of(9, "zombie"))
    assert stored(folder, 10) == [reply_of(0), None, reply_of(2), reply_of(3), *[None] * 6]


def test_what_is_appended_to_a_compacted_attempt_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "remove_covered", lambda folder, number: None)
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        journal.compact()
    with attempt(tmp_path / "j", 1).open("ab") as file:
        file.write(frame_of(1, "zombie"))
    assert stored(tmp_path / "j", 2) == [reply_of(0), None]


def test_of_two_believed_replies_under_a_key_the_first_counts(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    with attempt(folder, 1).open("ab") as file:
        file.write(frame_of(0, "second"))
    assert stored(folder, 1) == [reply_of(0)]
    assert [record.reply for record in read_journal(folder)] == [reply_of(0)]


def test_a_file_that_was_made_but_not_begun_costs_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "j", [0])
    os.close(create_attempt(tmp_path / "j")[1])
    assert stored(tmp_path / "j", 1) == [reply_of(0)]
    fill(tmp_path / "j", [1])
    assert stored(tmp_path / "j", 2) == [reply_of(0), reply_of(1)]
    assert names(tmp_path / "j")[-1] == "attempt-00003.journal"


def test_a_run_that_is_overtaken_while_it_begins_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    real = create_attempt

    def overtaken(folder: Path) -> tuple[int, int]:
        made = real(folder)
        monkeypatch.setattr(journal_module, "create_attempt", real)
        fill(folder, [1])
        return made

    monkeypatch.setattr(journal_module, "create_attempt", overtaken)
    with Journal(folder) as journal, pytest.raises(StorageError, match="taken over by attempt 3"):
        journal.append(key_of(2), request_of(2), reply_of(2))
    assert stored(folder, 3) == [reply_of(0), reply_of(1), None]


def test_a_number_that_was_compacted_away_is_never_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    real = attempts_module._list
    stale = real(folder)
    fill(folder, [1])
    compact(folder)
    answers = [stale]
    monkeypatch.setattr(attempts_module, "_list", lambda folder: answers.pop() if answers else real(folder))
    number, file = create_attempt(folder)  # lists before the others began, makes its file after they have finished
    os.close(file)
    assert number == 4 and names(folder)[0] == "attempt-00004.journal"


def test_opening_goes_on_when_files_are_compacted_away_between_listing_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    real = journal_module._fill
    calls = []

    def late(view: journal_module._View, *, durably: bool) -> None:
        calls.append(view)
        if len(calls) == 1:
            monkeypatch.setattr(journal_module, "_fill", real)
            compact(folder)
        real(view, durably=durably)

    monkeypatch.setattr(journal_module, "_fill", late)
    assert stored(folder, 1) == [reply_of(0)]


# Damage


def scan_file(path: Path) -> list[tuple[int, int, bytes]]:
    with path.open("rb") as file:
        return list(scan(file.fileno(), 0, path.stat().st_size))


def test_a_cut_at_every_byte_keeps_exactly_the_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    fill(tmp_path / "whole", range(2))
    content = attempt(tmp_path / "whole", 1).read_bytes()
    ends = [end for _, end, payload in scan_file(attempt(tmp_path / "whole", 1)) if payload.startswith(b'{"key"')]
    folder = tmp_path / "cut"
    for size in range(len(content) + 1):
        folder.mkdir()
        attempt(folder, 1).write_bytes(content[:size])
        num_whole = sum(end <= size for end in ends)
        expected = [reply_of(n) if n < num_whole else None for n in range(2)]
        assert stored(folder, 2) == expected
        assert [record.reply for record in read_journal(folder)] == expected[:num_whole]
        # What is stored next is found again, and what the torn one writes on is not.
        fill(folder, [1])
        with attempt(folder, 1).open("ab") as file:
            file.write(content[size:] + frame_of(3, "zombie"))
        assert stored(folder, 4) == [expected[0], reply_of(1), None, None]
        shutil.rmtree(folder)


def test_torn_bytes_are_kept_beside_the_journal_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "j"
    fill(folder, range(2))
    with attempt(folder, 1).open("ab") as file:
        file.write(b"half a record")
    fill(folder, [2])
    assert "13 damaged bytes in 1 places" in caplog.text
    assert b"half a record" in (folder / "attempt-00001.journal.damaged").read_bytes()
    caplog.clear()
    fill(folder, [3])
    assert stored(folder, 4) == [reply_of(n) for n in range(4)]
    assert caplog.text == ""  # what was cut off once is no news


def test_damage_in_the_middle_costs_one_reply_and_not_those_behind_it(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    fill(folder, range(5))
    content = bytearray(attempt(folder, 1).read_bytes())
    content[content.index(b"reply 2")] ^= 1
    attempt(folder, 1).write_bytes(content)
    assert stored(folder, 5) == [None if n == 2 else reply_of(n) for n in range(5)]
    fill(folder, [2])
    assert stored(folder, 5) == [reply_of(n) for n in range(5)]
    fill(folder, [5])
    # The copy is made once, not by each run.
    assert (folder / "attempt-00001.journal.damaged").read_bytes().count(b"# bytes") == 1


def test_a_damaged_length_does_not_swallow_the_records_behind_it(tmp_path: Path) -> None:
    fill(tmp_path / "j", range(3))
    path = attempt(tmp_path / "j", 1)
    content = bytearray(path.read_bytes())
    start = next(start for start, _, payload in scan_file(path) if payload.startswith(b'{"key"'))
    content[start + 4 : start + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert stored(tmp_path / "j", 3) == [None, reply_of(1), reply_of(2)]


def test_a_record_quoted_inside_a_reply_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with Journal(folder) as journal:
        journal.append(key_of(7), request_of(7), reply_of(7, frame_of(0).decode("latin-1")))
    path = attempt(folder, 1)
    content = bytearray(path.read_bytes())
    start = next(start for start, _, payload in scan_file(path) if payload.startswith(b'{"key"'))
    content[start + 8] ^= 1  # the checksum: the reader now looks for the next record inside the payload
    path.write_bytes(content)
    assert list(read_journal(folder)) == []


def test_every_flipped_byte_costs_at_most_the_record_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    folder = tmp_path / "j"
    fill(folder, range(3))
    path = attempt(folder, 1)
    content = path.read_bytes()
    spans = [(start, end) for start, end, payload in scan_file(path) if payload.startswith(b'{"key"')]
    draws = random.Random(5)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= draws.randrange(1, 256)
        overwrite(path, damaged)
        expected = [None if begin <= place < end else reply_of(n) for n, (begin, end) in enumerate(spans)]
        assert stored(folder, 3) == expected


def test_thousands_of_damaged_files_never_crash_and_never_change_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(logging.getLogger("teacher.journal"), "disabled", True)
    folder = tmp_path / "j"
    fill(folder, range(4))
    content = attempt(folder, 1).read_bytes()
    draws = random.Random(6)
    for number in range(3000):
        damaged = bytearray(content)
        num_flips = draws.randrange(1, 7)
        for _ in range(num_flips):
            damaged[draws.randrange(len(damaged))] ^= draws.randrange(1, 256)
        overwrite(attempt(folder, 1), damaged)
        replies = stored(folder, 4)
        assert all(reply in (None, reply_of(number)) for number, reply in enumerate(replies))
        # Flipped bytes can hurt at most as many records.
        assert sum(reply is None for reply in replies) <= num_flips
        if number % 10:
            continue
        fill(folder, [9])
        assert stored(folder, 4) == replies and stored(folder, 10)[9] == reply_of(9)
        attempt(folder, 2).unlink()


def test_a_record_damaged_while_open_counts_as_not_stored(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        content = attempt(tmp_path / "j", 1).read_bytes()
        attempt(tmp_path / "j", 1).write_bytes(content[:-1] + b"?")
        assert journal.lookup(key_of(0)) is None and key_of(0) not in journal


@pytest.mark.parametrize("is_looked_up", [False, True])
def test_a_record_damaged_while_open_is_not_compacted_away_without_a_copy(tmp_path: Path, is_looked_up: bool) -> None:
    folder = tmp_path / "j"
    with Journal(folder) as journal:
        for number in range(2):
            journal.append(key_of(number), request_of(number), reply_of(number))
        content = attempt(folder, 1).read_bytes()
        overwrite(attempt(folder, 1), content[:-1] + b"?")
        if is_looked_up:
            assert journal.lookup(key_of(1)) is None
        with pytest.raises(StorageError, match="damaged while it was open; start again"):
            journal.compact()
    compact(folder)
    assert stored(folder, 2) == [reply_of(0), None]
    assert content[-100:-1] in (folder / "attempt-00001.journal.damaged").read_bytes()


@pytest.mark.parametrize("content", [b"my only copy", b"bimode-journal 3\n" + b"whatever it will hold"])
def test_another_file_or_a_later_version_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    attempt(tmp_path, 1).write_bytes(content)
    with pytest.raises(StorageError, match=r"attempt-00001\.journal is not a reply journal of this version"):
        Journal(tmp_path)
    assert attempt(tmp_path, 1).read_bytes() == content


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder_is_a_storage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot open the journal"):
        Journal(tmp_path / name)


def test_a_full_disk_is_a_storage_error_and_keeps_what_was_stored(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from tests.teacher.stored_replies import key_of, reply_of, request_of
from schemas.errors import StorageError
from teacher.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(3):
    journal.append(key_of(number), request_of(number), reply_of(number))
[path] = Path(sys.argv[1]).iterdir()
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, resource.RLIM_INFINITY))
for number in (3, 4):
    try:
        journal.append(key_of(number), request_of(number), reply_of(number))
        sys.exit("stored on a full disk")
    except StorageError as error:
        print(error)
assert journal.lookup(key_of(2)) == reply_of(2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "j"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write the journal") == 2 and "start again" in done.stdout
    fill(tmp_path / "j", [3])
    assert stored(tmp_path / "j", 4) == [reply_of(n) for n in range(4)]
    assert not list((tmp_path / "j").glob("*.damaged"))  # the half-written record was cut back at once


def test_a_failed_fsync_stores_nothing_and_breaks_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StorageError, match="Input/output error"):
                journal.append(key_of(1), request_of(1), reply_of(1))
        with pytest.raises(StorageError, match="Input/output error"):
            journal.append(key_of(2), request_of(2), reply_of(2))
        assert journal.lookup(key_of(1)) is None
    assert stored(tmp_path / "j", 3) == [reply_of(0), None, None]


# Kills


def test_a_writer_killed_at_any_moment_loses_nothing_it_was_promised(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.teacher.stored_replies import key_of, reply_of, request_of
from teacher.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(10**6):
    journal.append(key_of(number), request_of(number), reply_of(number, "x" * 5000))
    print(number, flush=True)
"""
    writer = start("-c", code, str(tmp_path / "j"))
    assert writer.stdout is not None and writer.stdin is not None
    promised = [int(writer.stdout.readline()) for _ in range(20)]
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    promised += [int(line) for line in writer.stdout.read().splitlines()]
    writer.wait()
    writer.stdout.close()
    writer.stdin.close()
    with Journal(tmp_path / "j") as journal:
        assert all(journal.lookup(key_of(n)) == reply_of(n, "x" * 5000) for n in promised)
        # Beside the promised ones there is at most the one that was on its way.
        assert len(promised) <= len(journal) <= len(promised) + 1


KILLS = [
    *("attempt-created", "attempt-created:2", "attempt-created:3", "attempt-created:4"),
    *("attempt-opened", "attempt-opened:4"),
    *("journal-before-fsync:2", "journal-before-fsync:5", "journal-after-fsync:2", "journal-after-fsync:6"),
    *("compact-before-fsync", "compact-after-fsync:2", "compact-before-rename", "compact-before-rename:2"),
    *("compact-after-rename", "compact-after-rename:2", "compact-removing", "compact-removing:4", "compact-done"),
]


@pytest.mark.parametrize("kill", KILLS)
def test_a_run_killed_at_a_named_moment_loses_nothing_and_ends_like_one_that_was_not(tmp_path: Path, kill: str) -> None:
    folder = tmp_path / "j"
    killed = start("-m", "tests.teacher.stored_replies", str(folder), crash_at=kill)
    promised, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = stored(folder, NUM_REPLIES)
    assert [record.reply for record in read_journal(folder)] == [reply for reply in before if reply is not None]
    assert all(before[int(number)] == reply_of(int(number)) for number in promised.split())
    assert sum(reply is not None for reply in before) <= len(promised.split()) + 1
    again = start("-m", "tests.teacher.stored_replies", str(folder))
    asked_again, _ = again.communicate()
    assert again.returncode == 0
    assert [int(number) for number in asked_again.split()] == [n for n in range(NUM_REPLIES) if before[n] is None]
    assert stored(folder, NUM_REPLIES) == [reply_of(n) for n in range(NUM_REPLIES)]
    assert len([name for name in names(folder) if not name.endswith(".damaged")]) == 1


def test_a_crash_point_with_a_wrong_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_CRASH_AT", "attempt-created:soon")
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match="which time"):
        journal.append(key_of(0), request_of(0), reply_of(0))


# Compaction


def test_a_compacted_journal_answers_as_before_and_takes_more(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    fill(folder, [2, 0])
    fill(folder, [1])
    before = {record.key: record for record in read_journal(folder)}
    path = compact(folder)
    assert path is not None and names(folder) == [path.name]
    assert path.name.startswith("replies-00003-")
    assert [record.sample_id for record in read_journal(folder)] == ["sample-0", "sample-1", "sample-2"]
    assert {record.key: record for record in read_journal(folder)} == before
    with Journal(folder) as journal:
        assert len(journal) == 3 and [journal.lookup(key_of(n)) for n in range(3)] == [reply_of(n) for n in range(3)]
        journal.append(key_of(3), request_of(3), reply_of(3))
        assert journal.append(key_of(1), request_of(1), reply_of(1, "late")) == reply_of(1)
    assert names(folder) == ["attempt-00004.journal", path.name]
    merged = compact(folder)
    assert merged is not None and names(folder) == [merged.name]
    assert stored(folder, 4) == [reply_of(n) for n in range(4)]


def test_a_journal_that_compacts_itself_answers_on_and_takes_more(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with Journal(folder) as journal:
        assert journal.compact() is None
        journal.append(key_of(1), request_of(1), reply_of(1))
        path = journal.compact()
        assert path is not None and names(folder) == [path.name] and path.name.startswith("replies-00001-")
        assert journal.compact() == path
        assert journal.lookup(key_of(1)) == reply_of(1)
        journal.append(key_of(0), request_of(0), reply_of(0))
        merged = journal.compact()
        assert merged is not None and names(folder) == [merged.name] and merged.name.startswith("replies-00002-")
        assert [journal.lookup(key_of(n)) for n in range(3)] == [reply_of(0), reply_of(1), None]
    assert stored(folder, 2) == [reply_of(0), reply_of(1)]


@pytest.mark.parametrize("has_stored", [False, True])
def test_a_zombie_neither_compacts_nor_disturbs_the_run_that_took_over(tmp_path: Path, has_stored: bool) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    with Journal(folder) as zombie, Journal(folder) as journal:
        if has_stored:
            zombie.append(key_of(1), request_of(1), reply_of(1))
        journal.append(key_of(2), request_of(2), reply_of(2))
        before = names(folder)
        with pytest.raises(StorageError, match=f"taken over by attempt {2 + has_stored}"):
            zombie.compact()
        assert names(folder) == before
        journal.append(key_of(3), request_of(3), reply_of(3))
        path = journal.compact()
        if not has_stored:
            assert zombie.compact() == path  # there is nothing left to do
    assert stored(folder, 4) == [reply_of(0), reply_of(1) if has_stored else None, reply_of(2), reply_of(3)]


def test_a_second_compaction_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "j", range(3))
    path = compact(tmp_path / "j")
    assert path is not None
    before = path.stat()
    assert compact(tmp_path / "j") == path
    assert names(tmp_path / "j") == [path.name]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_compaction_that_is_taken_over_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    real = compacted_module._write_parquet

    def hung(path: Path, records: Iterator[JournalRecord]) -> None:
        real(path, records)
        fill(folder, [1])

    monkeypatch.setattr(compacted_module, "_write_parquet", hung)
    with pytest.raises(StorageError, match="taken over by attempt 3"):
        compact(folder)
    assert names(folder) == [attempt(folder, number).name for number in (1, 2, 3)]
    assert stored(folder, 2) == [reply_of(0), reply_of(1)]


@pytest.mark.parametrize("is_compacted_too", [False, True])
def test_a_compaction_that_hung_before_its_rename_harms_no_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_compacted_too: bool
) -> None:
    folder = tmp_path / "j"
    fill(folder, [0])
    real = os.replace

    def hung(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        zombies = source.read_bytes()
        fill(folder, [1])
        if is_compacted_too:
            compact(folder)
        source.write_bytes(zombies)  # the later compaction clears temporary files away
        real(source, target)

    monkeypatch.setattr(os, "replace", hung)
    compact(folder)
    assert stored(folder, 2) == [reply_of(0), reply_of(1)]
    assert len(list(read_journal(folder))) == 2
    fill(folder, [2])
    compact(folder)
    assert len(names(folder)) == 1
    assert stored(folder, 3) == [reply_of(n) for n in range(3)]


def test_a_compacted_file_with_any_byte_flipped_or_cut_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    fill(folder, range(2))
    path = compact(folder)
    assert path is not None
    content = path.read_bytes()
    draws = random.Random(7)
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ draws.randrange(1, 256)]) + content[place + 1 :]
        for damaged in (flipped, content[:place]) if place % 8 == 0 else (flipped,):
            overwrite(path, damaged)
            with pytest.raises(StorageError, match=rf"{path.name} are damaged.*Put back a copy of the file"):
                Journal(folder)
    with pytest.raises(StorageError, match="damaged"):
        list(read_journal(folder))
    with pytest.raises(StorageError, match="damaged"):
        compact(folder)
    path.write_bytes(content)
    assert stored(folder, 2) == [reply_of(0), reply_of(1)]


def test_a_compacted_file_damaged_while_open_is_an_error(tmp_path: Path) -> None:
    text = random.Random(8).randbytes(300_000).hex()
    with Journal(tmp_path / "j") as journal:
        journal.append(key_of(0), request_of(0), reply_of(0, text))
    path = compact(tmp_path / "j")
    assert path is not None
    content = path.read_bytes()
    for place in range(20_000, 200_000, 10_000):
        overwrite(path, content)
        with Journal(tmp_path / "j") as journal:
            overwrite(path, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(StorageError, match=f"{path.name} are damaged"):
                journal.lookup(key_of(0))


# The journal's first version


def first_version_frame(number: int) -> bytes:
    fields = asdict(reply_of(number))
    del fields["choice"], fields["num_attempts"]
    record = {
        "key": key_of(number),
        "purpose": "performance",
        "sample_id": f"sample-{number}",
        "index": number,
        "reply": fields,
    }
    payload = json.dumps(record, separators=(",", ":")).encode("ascii")
    length = len(payload).to_bytes(4, "little")
    return b"\xb1\xf0J\x01" + length + zlib.crc32(length + payload).to_bytes(4, "little") + payload


def first_version_reply(number: int) -> Reply:
    fields = asdict(reply_of(number)) | {"choice": 0, "num_attempts": 1}
    return Reply(**fields | {"top_logprobs": reply_of(number).top_logprobs})


def test_a_journal_of_the_first_version_is_read_beside_the_new_one_and_compacted_with_it(tmp_path: Path) -> None:
    folder, old = tmp_path / "shard.1-00000", tmp_path / "shard.1-00000.journal"
    content = b"bimode-journal 1\n" + first_version_frame(0) + first_version_frame(1)
    old.write_bytes(content + b"torn")
    expected = [first_version_reply(0), first_version_reply(1), reply_of(2)]
    assert stored(folder, 3) == [*expected[:2], None] and not folder.exists()
    [record, _] = read_journal(old)
    assert record == JournalRecord(key_of(0), "performance", "sample-0", 0, first_version_reply(0))
    fill(folder, [1, 2])
    assert stored(folder, 3) == expected
    assert old.read_bytes() == content + b"torn"
    assert old.with_name(old.name + ".damaged").exists()
    records = list(read_journal(folder))
    compact(folder)
    assert not old.exists() and stored(folder, 3) == expected
    assert list(read_journal(folder)) == records


def test_a_journal_of_the_first_version_opened_as_the_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "replies.journal").write_bytes(b"bimode-journal 1\n")
    with pytest.raises(StorageError, match="is opened as the folder NAME beside it"):
        Journal(tmp_path / "replies.journal")


# Everything at once


class JournalMachine(RuleBasedStateMachine):
    """Appends, new runs, zombies, torn tails and compactions in any order, against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda file: None)
        self.patch.setattr(logging.getLogger("teacher.journal"), "disabled", True)
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "j"
        self.journal = Journal(self.folder)
        self.zombies: list[Journal] = []
        self.has_attempt = False
        self.model: dict[int, str] = {}

    def teardown(self) -> None:
        for journal in (self.journal, *self.zombies):
            journal.close()
        self.patch.undo()
        shutil.rmtree(self.root)

    @rule(number=st.integers(0, 9), text=st.text(min_size=1, max_size=5))
    def append(self, number: int, text: str) -> None:
        kept = self.journal.append(key_of(number), request_of(number), reply_of(number, text))
        self.model.setdefault(number, text)
        self.has_attempt = True
        assert kept.text == self.model[number]

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal, self.has_attempt = Journal(self.folder), False

    @rule()
    def take_over(self) -> None:
        """A new run begins while this one hangs."""
        if self.has_attempt:
            self.zombies.append(self.journal)
        else:
            self.journal.close()
        self.journal, self.has_attempt = Journal(self.folder), False
        self.append(9, "newest")

    @rule(which=st.integers(0, 5), number=st.integers(0, 9))
    def a_zombie_wakes(self, which: int, number: int) -> None:
        if self.zombies:
            zombie = self.zombies[which % len(self.zombies)]
            try:
                kept = zombie.append(key_of(number), request_of(number), reply_of(number, "zombie"))
            except StorageError as error:
                assert "taken over" in str(error)  # noqa: PT017 - it need not be raised
            else:  # nothing was to be written: it knew the reply
                assert kept.text == self.model[number]

    @rule(number=st.integers(0, 9), which=st.integers(0, 5))
    def a_zombie_writes_unseen(self, number: int, which: int) -> None:
        older = sorted(self.folder.glob("attempt-*.journal"))[:-1]
        if older:
            with older[which % len(older)].open("ab") as file:
                file.write(frame_of(number, "zombie"))

    @rule(size=st.integers(1, 400), number=st.integers(0, 9))
    def kill_while_it_writes(self, size: int, number: int) -> None:
        self.journal.close()
        newest = sorted(self.folder.glob("attempt-*.journal"))[-1:]
        frame = frame_of(number, "torn")
        if newest:
            with newest[0].open("ab") as file:
                file.write(frame[: min(size, len(frame) - 1)])
        self.journal, self.has_attempt = Journal(self.folder), False

    @rule()
    def compact(self) -> None:
        self.journal.compact()
        self.has_attempt = False

    @rule()
    def compact_and_die_before_removing(self) -> None:
        self.journal.close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal_module, "remove_covered", lambda folder, number: None)
            compact(self.folder)
        self.journal, self.has_attempt = Journal(self.folder), False

    @invariant()
    def answers_like_the_model(self) -> None:
        replies = {number: self.journal.lookup(key_of(number)) for number in range(10)}
        assert {number: reply.text for number, reply in replies.items() if reply is not None} == self.model
        assert len(self.journal) == len(self.model)

    @invariant()
    def reads_like_the_model(self) -> None:
        records = list(read_journal(self.folder))
        assert {record.index: record.reply.text for record in records} == self.model
        assert len(records) == len(self.model)


JournalMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_history_of_runs_zombies_kills_and_compactions_answers_like_a_dictionary = JournalMachine.TestCase
