"""One run at a time in a work folder: the second names the first, or waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.holding import HOLDER_FILE, find_holder, held
from flows.workspace import Workspace
from schemas.errors import StorageError


def say_nothing(line: str) -> None:
    del line


def test_a_second_run_gives_up_and_names_the_first(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    named = rf"(?s)the run 'corpus 1' \(process {os.getpid()} on .*, since 20.*\) is at work in {tmp_path}.*--wait"
    with (
        held(workspace, "the run 'corpus 1'", wait=False, say=say_nothing),
        pytest.raises(StorageError, match=named),
        held(workspace, "the run 'corpus 2'", wait=False, say=say_nothing),
    ):
        raise AssertionError("two runs in one folder")
    assert find_holder(workspace) is None


def test_a_waiting_run_says_for_whom_and_begins_when_the_other_has_ended(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    said: list[str] = []
    has_said, begun = threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        has_said.set()

    def second() -> None:
        with held(workspace, "the second", wait=True, say=say):
            begun.append(str(find_holder(workspace)).split(" (")[0])

    with held(workspace, "the first", wait=False, say=say_nothing):
        thread = threading.Thread(target=second)
        thread.start()
        assert has_said.wait(60)
        assert begun == []
    thread.join(60)
    assert begun == ["the second"]
    assert len(said) == 1 and said[0].startswith("waiting for the first (process ")


def test_an_error_of_the_run_itself_is_not_taken_for_a_held_folder(tmp_path: Path) -> None:
    def fail() -> None:
        raise StorageError("disk full") from BlockingIOError()

    with pytest.raises(StorageError, match="disk full"), held(Workspace(tmp_path), "x", wait=True, say=say_nothing):
        fail()
    assert not (tmp_path / HOLDER_FILE).exists()


def test_a_folder_that_cannot_be_used_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot use the work folder"),
        held(Workspace(tmp_path / "file"), "x", wait=True, say=say_nothing),
    ):
        raise AssertionError("a file is no folder")


def test_a_killed_run_leaves_the_folder_free_and_is_not_named(tmp_path: Path) -> None:
    script = (
        "import os, signal; from flows.holding import held; from flows.workspace import Workspace\n"
        f"with held(Workspace({str(tmp_path)!r}), 'killed', wait=False, say=print):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert json.loads((tmp_path / HOLDER_FILE).read_text(encoding="utf-8"))["name"] == "killed"
    assert find_holder(Workspace(tmp_path)) is None
    with held(Workspace(tmp_path), "next", wait=False, say=say_nothing):
        assert str(find_holder(Workspace(tmp_path))).startswith("next (process ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}', "\x00"])
def test_a_damaged_note_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / HOLDER_FILE).write_text(text, encoding="utf-8")
    with (
        Workspace(tmp_path).locked(),
        pytest.raises(StorageError, match="another run is at work"),
        held(Workspace(tmp_path), "x", wait=False, say=say_nothing),
    ):
        raise AssertionError("the folder is held")
