"""Signs of life, and how a run that is cut off makes way: a process of its own holds a real work folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from flows import heartbeats
from flows.holding import held
from flows.workspace import Workspace
from schemas.errors import StorageError

HOLDER = """
import sys, time
from pathlib import Path
from uuid import uuid4
from prefect.client.schemas.objects import FlowRun
from flows import heartbeats
from flows.holding import held
from flows.workspace import Workspace

run = FlowRun(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), name="first")
heartbeats.deployed_run = lambda: run
with held(Workspace(Path(sys.argv[1])), "first", wait=False, say=print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
AWAY = "http://127.0.0.1:9/api"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@contextmanager
def answering_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def holder(folder: Path, api_url: str, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works in a folder as a deployment's run does, once it holds it."""
    environment = os.environ | {"PREFECT_API_URL": api_url, "PREFECT_HOME": str(folder.parent / "home")}
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def as_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "is_restart", lambda: True)


@pytest.mark.usefixtures("as_restart")
def test_a_run_that_is_cut_off_makes_way_for_the_one_in_its_place(tmp_path: Path) -> None:
    second = held(Workspace(tmp_path / "work"), "second", wait=False, say=print)
    with holder(tmp_path / "work", AWAY, seconds=600) as first, second:
        assert first.wait(60) == -signal.SIGKILL


@pytest.mark.usefixtures("as_restart")
def test_a_run_in_contact_with_the_server_works_on_and_the_other_waits(tmp_path: Path) -> None:
    seconds = heartbeats.YIELD_SECONDS + 4
    second = held(Workspace(tmp_path / "work"), "second", wait=False, say=print)
    with answering_server() as url, holder(tmp_path / "work", url, seconds) as first, second:
        assert first.wait(60) == 0, "it ended by itself"


def test_a_run_that_is_cut_off_works_on_while_nobody_asks(tmp_path: Path) -> None:
    with holder(tmp_path / "work", AWAY, heartbeats.YIELD_SECONDS + 4) as first:
        by_hand = held(Workspace(tmp_path / "work"), "by hand", wait=False, say=print)
        with pytest.raises(StorageError, match="first"), by_hand:
            raise AssertionError("two runs in one folder")
        assert first.wait(60) == 0


def test_who_runs_without_a_deployment_neither_beats_nor_asks(tmp_path: Path) -> None:
    with heartbeats.beating() as pulse:
        assert pulse is None
    heartbeats.ask_to_make_way(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_holding_a_folder_does_not_import_prefect() -> None:
    program = "import sys, flows.holding; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
