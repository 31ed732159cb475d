"""The launcher as a program, and the log that it keeps. That it leaves no process behind is in test_serving.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher import launcher
from teacher.launcher import CONTINUED, Log, marked, shift_logs

PROGRAM = Path(launcher.__file__)


def launch(log: Path, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(PROGRAM), "--log", str(log), *options, "--", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("script", "status", "note"),
    [
        ("echo out; echo err >&2; exit 3", 3, "the server ended by itself: exit status 3"),
        ("echo out; echo err >&2; kill -KILL $$", 137, "the server ended by itself: killed by SIGKILL"),
    ],
)
def test_output_and_end_of_a_server_stand_in_its_log(tmp_path: Path, script: str, status: int, note: str) -> None:
    log = tmp_path / "log"
    assert launch(log, "sh", "-c", script).returncode == status
    out, err, last = log.read_text().splitlines()
    assert (out, err) == ("out", "err") and last.startswith("# 2") and last.endswith(note)


def test_a_program_that_does_not_exist_is_told_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(log, str(tmp_path / "missing")).returncode == 127
    assert "the server cannot be started" in log.read_text() and "missing" in log.read_text()


@pytest.mark.parametrize("again", range(5))  # the two processes race
def test_a_server_ends_in_order_when_who_wanted_it_is_not_there(tmp_path: Path, again: int) -> None:
    log = tmp_path / "log"
    assert launch(log, "sleep", "600", options=("--while", "1")).returncode == 143
    assert "the process that started the server is gone" in log.read_text()
    assert "the server was stopped: killed by SIGTERM" in log.read_text()


def copied(log: Log, pieces: list[bytes]) -> None:
    """Sends pieces through a pipe into the log, each taken before the next is sent."""
    for piece in pieces:
        reader, writer = os.pipe()
        thread = threading.Thread(target=log.copy, args=(reader,))
        thread.start()
        os.write(writer, piece)
        os.close(writer)
        thread.join()
        os.close(reader)


def test_a_log_is_continued_in_a_new_file_and_the_oldest_part_goes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    copied(Log(path, max_bytes=100, num_old=2), [character * 101 for character in (b"a", b"b", b"c", b"d")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    old, older = ((tmp_path / name).read_text().splitlines() for name in ("log.1", "log.2"))
    assert CONTINUED in old[0] and old[1] == "d" * 101
    assert CONTINUED in older[0] and older[1] == "c" * 101
    assert path.read_text().endswith("continued from log.1\n")


def test_what_a_full_disk_cost_is_counted_and_told_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "away" / "log"
    log = Log(path, max_bytes=1000, num_old=1)
    copied(log, [b"one\n"])
    path.parent.mkdir()
    copied(log, [b"two\n", b"three\n"])
    lost, *rest = path.read_text().splitlines()
    assert lost.endswith("4 bytes of output could not be written") and rest == ["two", "three"]


@given(num_logs=st.integers(0, 8), num_old=st.integers(1, 5))
def test_shifting_keeps_the_newest_logs_in_order(
    tmp_path_factory: pytest.TempPathFactory, num_logs: int, num_old: int
) -> None:
    path = tmp_path_factory.mktemp("logs") / "log"
    for number in range(num_logs):
        path.write_text(str(number))
        shift_logs(path, num_old)
    kept = {file.name: int(file.read_text()) for file in path.parent.iterdir()}
    assert kept == {f"log.{age}": num_logs - age for age in range(1, min(num_logs, num_old) + 1)}


def test_processes_are_found_by_their_mark_and_no_others() -> None:
    def sleeper(value: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "600"], env={launcher.MARK: value, "PATH": os.environ["PATH"]})

    one, other = sleeper("/run/a b.pid"), sleeper("/run/a b.pid2")
    try:
        assert marked("/run/a b.pid") == [one.pid]
    finally:
        for process in (one, other):
            process.kill()
            process.wait()
    assert marked("/run/a b.pid") == []
