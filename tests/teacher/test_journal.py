"""The journal: durable, recoverable at every byte, and never believing what was damaged."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import teacher.journal as journal_module
from schemas.errors import StorageError
from schemas.requests import Message, Reply, Sampling, TeacherRequest
from teacher.journal import HEADER, Journal, read_journal

ROOT = Path(__file__).parents[2]


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def request_of(number: int) -> TeacherRequest:
    return TeacherRequest(f"sample-{number}", "performance", (Message("user", "?"),), Sampling(), index=number)


def reply_of(number: int, text: str = "") -> Reply:
    return Reply(
        text or f"reply {number} 🙂 \ud800 \x00",
        "stop",
        "m",
        reasoning="because" if number % 2 else None,
        top_logprobs=(("yes", -0.5), ("no", -1.0)),
        prompt_tokens=number,
        seconds=0.25,
    )


def fill(path: Path, num_replies: int) -> None:
    with Journal(path) as journal:
        for number in range(num_replies):
            journal.append(key_of(number), request_of(number), reply_of(number))


def test_a_reply_comes_back_exactly_as_it_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "replies.journal"
    fill(path, 3)
    with Journal(path) as journal:
        assert [journal.lookup(key_of(n)) for n in range(3)] == [reply_of(n) for n in range(3)]
        assert journal.lookup(key_of(3)) is None
        assert len(journal) == 3 and key_of(0) in journal and key_of(3) not in journal


def test_reports_read_every_record_in_order_while_the_journal_is_open(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        journal.append(key_of(1), request_of(1), reply_of(1))
        records = list(read_journal(path))
    assert [(r.key, r.purpose, r.sample_id, r.index) for r in records] == [
        (key_of(0), "performance", "sample-0", 0),
        (key_of(1), "performance", "sample-1", 1),
    ]
    assert [r.reply for r in records] == [reply_of(0), reply_of(1)]


def test_reports_on_a_missing_journal_are_empty(tmp_path: Path) -> None:
    assert list(read_journal(tmp_path / "none")) == []


def test_the_first_reply_of_a_key_stays(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(key_of(0), request_of(0), reply_of(0, "first"))
        journal.append(key_of(0), request_of(0), reply_of(0, "second"))
    with Journal(path) as journal:
        stored = journal.lookup(key_of(0))
    assert stored is not None and stored.text == "first"


def test_a_second_opening_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path), pytest.raises(StorageError, match="in use by another run"):
        Journal(path)
    Journal(path).close()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from teacher.journal import Journal; Journal(Path(sys.argv[1]))"
    with Journal(tmp_path / "j"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "j"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1 and "StorageError" in done.stderr and "in use" in done.stderr


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        journal.close()
        time.sleep(0.1)
        Journal(tmp_path / "j").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.close()
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.append(key_of(0), request_of(0), reply_of(0))


def test_a_closed_journal_does_not_read_from_another_file(tmp_path: Path) -> None:
    fill(tmp_path / "j", 1)
    journal = Journal(tmp_path / "j")
    journal.close()
    with (tmp_path / "j").open("rb"), pytest.raises(StorageError, match="cannot read"):
        journal.lookup(key_of(0))


def test_a_cut_at_every_byte_keeps_exactly_the_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole, path = tmp_path / "whole", tmp_path / "cut"
    ends = [len(HEADER)]
    with Journal(whole) as journal:
        for number in range(2):
            journal.append(key_of(number), request_of(number), reply_of(number))
            ends.append(whole.stat().st_size)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        with Journal(path) as journal:
            expected = sum(end <= size for end in ends[1:])
            assert len(journal) == expected
            assert [journal.lookup(key_of(n)) for n in range(expected)] == [reply_of(n) for n in range(expected)]
        # The torn tail is gone, so that what is appended next is found again.
        assert path.stat().st_size == ends[expected]
        (tmp_path / "cut.damaged").unlink(missing_ok=True)


def test_cut_bytes_are_kept_beside_the_journal_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "j"
    fill(path, 2)
    with path.open("ab") as file:
        file.write(b"half a record")
    with Journal(path) as journal:
        assert len(journal) == 2
    assert "13 damaged bytes in 1 places" in caplog.text
    assert b"half a record" in (tmp_path / "j.damaged").read_bytes()


def test_damage_in_the_middle_costs_one_reply_and_not_those_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    fill(path, 5)
    content = bytearray(path.read_bytes())
    content[content.index(b"reply 2")] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with Journal(path) as journal:
            assert [journal.lookup(key_of(n)) is not None for n in range(5)] == [True, True, False, True, True]
    # The copy is made once, not at each opening.
    assert (tmp_path / "j.damaged").read_bytes().count(b"# bytes") == 1
    with Journal(path) as journal:
        journal.append(key_of(2), request_of(2), reply_of(2))
    with Journal(path) as journal:
        assert [journal.lookup(key_of(n)) for n in range(5)] == [reply_of(n) for n in range(5)]


def test_a_damaged_length_does_not_swallow_the_records_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    fill(path, 3)
    content = bytearray(path.read_bytes())
    content[len(HEADER) + 4 : len(HEADER) + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with Journal(path) as journal:
        assert [journal.lookup(key_of(n)) is not None for n in range(3)] == [False, True, True]


def test_a_record_quoted_inside_a_reply_is_not_taken_for_one(tmp_path: Path) -> None:
    fill(tmp_path / "other", 1)
    forged = (tmp_path / "other").read_bytes()[len(HEADER) :].decode("latin-1")
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(key_of(7), request_of(7), reply_of(7, forged))
    content = bytearray(path.read_bytes())
    content[len(HEADER) + 8] ^= 1  # the checksum: the reader now looks for the next record inside the payload
    path.write_bytes(content)
    assert list(read_journal(path)) == []


_SMALL: list[bytes] = []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_crash_and_never_change_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flips: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    if not _SMALL:
        fill(tmp_path / "small", 4)
        _SMALL.append((tmp_path / "small").read_bytes())
    content = bytearray(_SMALL[0])
    for place, mask in flips:
        content[place % len(content)] ^= mask
    path = tmp_path / "flipped"
    path.write_bytes(content)
    (tmp_path / "flipped.damaged").unlink(missing_ok=True)
    try:
        journal = Journal(path)
    except StorageError:
        # Nothing in the file tells it from somebody else's: neither the header nor a single record.
        assert content[: len(HEADER)] != HEADER and list(read_journal(path)) == []
        return
    with journal:
        replies = [journal.lookup(key_of(number)) for number in range(4)]
        assert all(reply in (None, reply_of(number)) for number, reply in enumerate(replies))
        # Six flipped bytes can hurt at most as many of the four records.
        assert sum(reply is None for reply in replies) <= len(flips)
        journal.append(key_of(9), request_of(9), reply_of(9))
    with Journal(path) as journal:
        assert journal.lookup(key_of(9)) == reply_of(9)
        assert [journal.lookup(key_of(number)) for number in range(4)] == replies


def test_a_record_damaged_while_open_counts_as_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(key_of(0), request_of(0), reply_of(0))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"?")
        assert journal.lookup(key_of(0)) is None


def test_another_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my only copy")
    with pytest.raises(StorageError, match="not a reply journal"):
        Journal(path)
    assert path.read_text() == "my only copy"


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"bimode-journal 2\n" + b"whatever it will hold")
    with pytest.raises(StorageError, match="this version"):
        Journal(tmp_path / "j")


@pytest.mark.parametrize("name", ["folder", "file/below"])
def test_a_path_that_cannot_be_a_file_is_a_storage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot open the journal"):
        Journal(tmp_path / name)


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


def test_a_full_disk_is_a_storage_error_and_keeps_what_was_stored(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests/teacher")
from test_journal import key_of, reply_of, request_of
from schemas.errors import StorageError
from teacher.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(3):
    journal.append(key_of(number), request_of(number), reply_of(number))
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 50, resource.RLIM_INFINITY))
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
    with Journal(tmp_path / "j") as journal:
        assert len(journal) == 3
    assert not (tmp_path / "j.damaged").exists()  # the half-written record was cut back at once


def test_a_failed_fsync_stores_nothing_and_breaks_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal(tmp_path / "j") as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StorageError, match="Input/output error"):
                journal.append(key_of(0), request_of(0), reply_of(0))
        with pytest.raises(StorageError):
            journal.append(key_of(1), request_of(1), reply_of(1))
        assert journal.lookup(key_of(0)) is None


def test_a_writer_killed_at_any_moment_loses_nothing_it_was_promised(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/teacher")
from test_journal import key_of, reply_of, request_of
from teacher.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(10**6):
    journal.append(key_of(number), request_of(number), reply_of(number, "x" * 5000))
    print(number, flush=True)
"""
    path = tmp_path / "j"
    writer = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    promised = [int(writer.stdout.readline()) for _ in range(20)]
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    promised += [int(line) for line in writer.stdout.read().splitlines()]
    writer.wait()
    writer.stdout.close()
    with Journal(path) as journal:
        assert all(journal.lookup(key_of(n)) == reply_of(n, "x" * 5000) for n in promised)
        # Beside the promised ones there is at most the one that was on its way.
        assert len(promised) <= len(journal) <= len(promised) + 1


def test_a_reply_too_long_for_the_journal_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_PAYLOAD_BYTES", 1000)
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(StorageError, match="too long"):
            journal.append(key_of(0), request_of(0), reply_of(0, "x" * 1000))
        journal.append(key_of(1), request_of(1), reply_of(1))
        assert journal.lookup(key_of(1)) == reply_of(1)
