"""The local stack: records of processes, clear errors, and one real Prefect server from start to stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from flows import stack
from flows.processes import StackError
from schemas.config import load_config
from schemas.errors import ConfigError, ServingError
from teacher import serving
from tests.waiting import free_port

CONFIG = "name: tiny\nsources: [{name: rows, format: jsonl, path: rows.jsonl}]\n"
SERVED = "teacher: {model: small, url: 'http://127.0.0.1:%d/v1'}\nserve: {model_path: weights}\n"
DEPLOYMENT = """
name: tiny
pull: []
deployments:
  - name: tiny
    entrypoint: tiny_flow.wait
    work_pool: {name: gpu}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
"""
FLOW = """
import json, os, time
from pathlib import Path
from prefect import flow

@flow
def wait(seconds: float, note: str) -> None:
    Path(note).write_text(json.dumps(dict(os.environ)))
    time.sleep(seconds)
"""


def say_nothing(line: str) -> None:
    del line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "prefect.yaml").write_text(DEPLOYMENT, encoding="utf-8")
    return tmp_path


def record_of(home: Path, name: str, text: str) -> None:
    (home / ".local").mkdir(exist_ok=True)
    (home / ".local" / f"{name}.pid").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "\x00", "17", '{"pid": "x", "started": "1"}', '{"pid": 1, "started": null}']
)
def test_a_damaged_record_names_no_process(home: Path, text: str) -> None:
    record_of(home, "server", text)
    assert stack.status().server_pid is None


def test_a_pid_that_was_given_to_another_process_is_neither_ours_nor_stopped(home: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        record_of(home, "worker", json.dumps({"pid": stranger.pid, "started": "an earlier boot:1"}))
        assert stack.status().worker_pid is None
        stack.down(say_nothing)
        assert stranger.poll() is None
        stranger.kill()


def test_stopping_in_a_folder_without_a_stack_says_so_and_creates_nothing(home: Path) -> None:
    lines: list[str] = []
    stack.down(lines.append)
    assert lines == ["nothing runs: there is no local stack in this folder"]
    assert not (home / ".local").exists()


def test_a_folder_without_prefect_yaml_is_refused(home: Path) -> None:
    (home / "prefect.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no prefect.yaml in .*: run this in the project folder, or set BIMODE_HOME"):
        stack.up(Path("run.yaml"), report=say_nothing)


def test_a_project_folder_that_cannot_be_written_is_a_clear_error(home: Path) -> None:
    (home / ".local").write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(StackError, match=r"cannot write to .*\.local: File exists"):
        stack.up(Path("run.yaml"), report=say_nothing)


def test_a_server_that_ends_while_starting_is_an_error_that_quotes_its_log(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = home / "python"
    program.write_text("#!/bin/sh\necho no space left on device: $3 $4\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(StackError, match=r"(?s)server ended while it was starting.*no space left on device: server"):
        stack.up(Path("run.yaml"), report=say_nothing)
    assert stack.status().server_pid is None


def test_the_port_of_the_last_start_is_kept_and_a_taken_one_is_replaced_and_named(home: Path) -> None:
    folder = stack._Folder(home)
    (home / ".local").mkdir()
    port = free_port()
    folder.api_url_file.write_text(f"http://127.0.0.1:{port}/api\n", encoding="utf-8")
    lines: list[str] = []
    assert stack._choose_port(folder, lines.append) == port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert stack._choose_port(folder, lines.append) != port
    assert lines[0].startswith(f"port {port} is taken by another program; using ")


def test_settings_of_another_prefect_do_not_reach_the_stack(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql://elsewhere")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setenv("BIMODE_GPU_PYTHON", "/opt/gpu/bin/python")
    environment = stack.prefect_environment(home, "http://127.0.0.1:1/api")
    assert "PREFECT_API_KEY" not in environment
    assert "PREFECT_API_DATABASE_CONNECTION_URL" not in environment
    assert environment["PREFECT_HOME"] == str(home / ".local" / "prefect")
    assert environment["BIMODE_GPU_PYTHON"] == "/opt/gpu/bin/python"
    assert environment["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# The teacher


@pytest.fixture
def endpoint() -> Iterator[HTTPServer]:
    """A server that lists one model, called "small"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": "small"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # silence
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the `serve` sections that a teacher was started with, instead of starting vLLM."""
    calls: list[Any] = []

    def start_server(endpoint: Any, serve: Any, **paths: Any) -> None:
        del endpoint
        assert paths["detached"]
        calls.append(serve)

    monkeypatch.setattr(serving, "start_server", start_server)
    return calls


def ensure_teacher(home: Path, text: str) -> list[str]:
    (home / "run.yaml").write_text(CONFIG + text, encoding="utf-8")
    (home / ".local").mkdir(exist_ok=True)
    lines: list[str] = []
    stack._teacher(stack._Folder(home)).ensure(load_config(home / "run.yaml"), lines.append)
    return lines


def test_a_teacher_that_answers_is_reused(home: Path, endpoint: HTTPServer, started: list[Any]) -> None:
    lines = ensure_teacher(home, SERVED % endpoint.server_port)
    assert lines == [f"the teacher small answers at http://127.0.0.1:{endpoint.server_port}/v1"]
    assert started == []


def test_a_teacher_address_that_serves_another_model_is_an_error(
    home: Path, endpoint: HTTPServer, started: list[Any]
) -> None:
    with pytest.raises(ServingError, match="is taken by a server of small, not of large: stop it, or change"):
        ensure_teacher(home, SERVED.replace("small", "large") % endpoint.server_port)
    assert started == []


def test_our_own_teacher_is_started_anew_when_its_model_was_trained_again(
    home: Path, endpoint: HTTPServer, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "weights").mkdir()
    (home / "weights" / "model.safetensors").write_bytes(b"old")
    monkeypatch.setattr(serving, "running_pid", lambda pid_file: 17)
    monkeypatch.setattr(serving, "stop_server", lambda pid_file: None)
    text = SERVED % endpoint.server_port
    ensure_teacher(home, text)
    assert len(started) == 1, "nobody knows what a teacher without a memory serves"
    ensure_teacher(home, text)
    assert len(started) == 1
    (home / "weights" / "model.safetensors").write_bytes(b"newer")
    assert "stopping the teacher: its settings or its model changed" in ensure_teacher(home, text)
    assert len(started) == 2


def test_what_a_start_logs_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_server(*arguments: Any, **paths: Any) -> None:
        del arguments, paths
        logging.getLogger("teacher.serving").info("vLLM is starting (%.0f s)", 15)

    monkeypatch.setattr(serving, "start_server", start_server)
    assert "  vLLM is starting (15 s)" in ensure_teacher(home, SERVED % free_port())


def test_a_missing_teacher_is_started_with_its_model_folder_as_an_absolute_path(home: Path, started: list[Any]) -> None:
    (home / "weights").mkdir()
    ensure_teacher(home, SERVED % free_port())
    assert [serve.model_path for serve in started] == [str(home / "weights")]


def test_a_hub_name_stays_a_hub_name(home: Path, started: list[Any]) -> None:
    ensure_teacher(home, SERVED.replace("weights", "Qwen/Qwen2.5-VL-32B-Instruct") % free_port())
    assert [serve.model_path for serve in started] == ["Qwen/Qwen2.5-VL-32B-Instruct"]


def test_a_run_without_a_serve_section_starts_no_teacher(home: Path, started: list[Any]) -> None:
    ensure_teacher(home, "teacher: {url: 'http://127.0.0.1:1/v1'}\n")
    assert started == []


# One real server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a real stack on a free port, with a flow that waits."""
    home = tmp_path_factory.mktemp("stack")
    (home / "run.yaml").write_text(CONFIG, encoding="utf-8")
    (home / "prefect.yaml").write_text(DEPLOYMENT, encoding="utf-8")
    (home / "tiny_flow.py").write_text(FLOW, encoding="utf-8")
    (home / ".local").mkdir()
    (home / ".local" / "api_url").write_text(f"http://127.0.0.1:{free_port()}/api", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIMODE_HOME", str(home))
        patch.setenv("PYTHONPATH", str(home))
        yield home
        stack.down(say_nothing)


def call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Returns what Prefect's server replies. A busy one (503, its database is locked) is asked again for a minute."""
    for _ in range(60):
        reply = httpx.request(method, stack.status().api_url + path, json=body, timeout=60, trust_env=False)
        if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    reply.raise_for_status()
    return reply.json()


def start_run(home: Path, *, seconds: float) -> tuple[str, Path]:
    """Returns the id of a new run and the file that it writes its environment to when it begins."""
    deployment = call("GET", "/deployments/name/wait/tiny")
    note = home / f"{time.monotonic_ns()}.json"
    parameters = {"seconds": seconds, "note": str(note)}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    run = call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)
    return str(run["id"]), note


def wait_until_begun(note: Path) -> dict[str, str]:
    deadline = time.monotonic() + 300
    while not note.exists() or not note.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "the flow run did not begin"
        time.sleep(0.2)
    return dict(json.loads(note.read_text(encoding="utf-8")))


def final_state(run_id: str) -> str:
    deadline = time.monotonic() + 300
    while (state := call("GET", f"/flow_runs/{run_id}")["state_type"]) not in {"COMPLETED", "FAILED", "CRASHED"}:
        assert time.monotonic() < deadline, f"the flow run stays {state}"
        time.sleep(0.2)
    return str(state)


@pytest.mark.slow
def test_a_second_start_reuses_everything_and_the_worker_runs_what_is_deployed(running: Path) -> None:
    first = stack.up(Path("run.yaml"), report=say_nothing)
    assert first.server_pid is not None
    assert first.worker_pid is not None
    assert stack.up(Path("run.yaml"), report=say_nothing) == first
    run_id, note = start_run(running, seconds=0)
    environment = wait_until_begun(note)
    assert environment["BIMODE_HOME"] == str(running)
    assert environment["BIMODE_GPU_PYTHON"].endswith("python")
    assert environment["PREFECT_API_URL"] == first.api_url
    assert final_state(run_id) == "COMPLETED"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="orphans are found through /proc")
def test_a_killed_worker_is_replaced_and_its_lost_run_frees_the_only_slot(running: Path) -> None:
    before = stack.up(Path("run.yaml"), report=say_nothing)
    lost, note = start_run(running, seconds=3600)
    wait_until_begun(note)
    # As the kernel does when memory runs out: nobody is asked, nothing is recorded.
    for pid in [before.worker_pid, *stack._flow_runs(stack._Folder(running))]:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    lines: list[str] = []
    after = stack.up(Path("run.yaml"), report=lines.append)
    assert after.server_pid == before.server_pid
    assert after.worker_pid not in {None, before.worker_pid}
    assert any("was cut off; recording it as crashed" in line for line in lines)
    assert final_state(lost) == "CRASHED"
    run_id, note = start_run(running, seconds=0)
    assert final_state(run_id) == "COMPLETED"


@pytest.mark.slow
def test_down_ends_a_running_flow_leaves_no_process_and_keeps_the_data(running: Path) -> None:
    stack.up(Path("run.yaml"), report=say_nothing)
    run_id, note = start_run(running, seconds=3600)
    wait_until_begun(note)
    stack.down(say_nothing)
    stopped = stack.status()
    assert (stopped.server_pid, stopped.worker_pid, stopped.teacher_pid) == (None, None, None)
    assert stack._marked_processes(stack._Folder(running)) == {}
    assert (running / ".local" / "prefect" / "prefect.db").stat().st_size > 0
    stack.up(Path("run.yaml"), report=say_nothing)
    assert final_state(run_id) == "CRASHED"


@pytest.mark.slow
def test_a_deployment_that_prefect_refuses_is_an_error_with_prefects_words(running: Path) -> None:
    stack.up(Path("run.yaml"), report=say_nothing)
    project = running / "prefect.yaml"
    project.write_text(DEPLOYMENT.replace("tiny_flow.wait", "tiny_flow.missing"), encoding="utf-8")
    try:
        with pytest.raises(StackError, match=r"(?s)`prefect deploy --all` failed.*missing"):
            stack.up(Path("run.yaml"), report=say_nothing)
    finally:
        project.write_text(DEPLOYMENT, encoding="utf-8")
