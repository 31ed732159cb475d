"""Starting, watching and stopping vLLM beside us, as a process of its own on the loopback interface.

Nothing here imports vLLM: it lives in another environment (`serve.python`, else BIMODE_GPU_PYTHON, else our own
Python). Its command line is `teacher.vllm_command`'s, and that nothing of it is left is `teacher.launcher`'s task; what
outlives even that is found by a mark in its environment. Left out on purpose: several servers, several machines,
containers; whoever has those gives the pipeline addresses instead.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import ServingError
from teacher import launcher
from teacher.engine_load import parse_load
from teacher.parallelism import Gpu, Parallelism, choose_parallelism, find_gpus
from teacher.vllm_command import HOST, PYTHON_VARIABLE, VllmBuild, find_build, server_command
from teacher.weights import cached_folder, model_facts, model_folder

__all__ = [
    "PYTHON_VARIABLE",
    "Grant",
    "ServerHandle",
    "ServerStart",
    "cpu_python_path",
    "is_answering",
    "num_gpus_wanted",
    "num_in_flight",
    "revive",
    "running_pid",
    "server_environment",
    "start_server",
    "stop_server",
]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_LOG_EVERY_SECONDS = 15.0
_GRACE_SECONDS = 15.0
"""For the server to end in order: vLLM needs a few seconds to release a GPU."""
_STOP_SECONDS = _GRACE_SECONDS + 15.0
"""For the launcher, which kills what is left after the grace, and for itself."""
_KILL_SECONDS = 10.0
_HUNG_SECONDS = 60.0
"""A server that runs and says nothing for so long, not even to /health, does not come back."""
_FIRST_REPLY_SECONDS = 300.0
_LOG_READ_BYTES = 2**18
_HERE = Path(__file__).parent
_NOTE = re.compile(r"^# \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)$", re.MULTILINE)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_children: dict[int, subprocess.Popen[bytes]] = {}
"""The launchers that this process started, to be reaped when they end."""
_restarts: dict[Path, list[float]] = {}
"""When servers were started again (monotonic seconds), by pid file."""
_reviving = threading.Lock()


@dataclass(frozen=True, slots=True)
class Grant:
    """GPUs that a program was given, and what holds them.

    environment: variables that make it see these GPUs alone. descriptors: open files whose locks say that the GPUs are
    taken; the program's launcher holds them as well, so that they are taken for as long as it lives.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


_NO_GRANT = Grant()


@dataclass(frozen=True, slots=True)
class ServerStart:
    """All that decides how a server is started, kept so that it can be started again.

    media_folder: the images that calls may name by address. detached: it outlives the process that started it. grant:
    the GPUs it may use; all that are visible where it says nothing of them.
    """

    endpoint: EndpointConfig
    serve: ServeConfig
    media_folder: Path | None = None
    detached: bool = False
    grant: Grant = _NO_GRANT


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that runs.

    pid: of its launcher. url: its API, ending in /v1. num_copies: of the model, side by side behind that address; a
    call may choose one with the header `X-data-parallel-rank`, from 0, and then finds there what the copy has cached.
    num_gpus: that all copies take together.
    """

    pid: int
    url: str
    model: str
    log_path: Path
    pid_path: Path
    num_copies: int
    num_gpus: int
    start: ServerStart

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
    endpoint: EndpointConfig,
    serve: ServeConfig,
    *,
    log_path: Path,
    pid_path: Path,
    detached: bool = False,
    media_folder: Path | None = None,
    grant: Grant = _NO_GRANT,
) -> ServerHandle:
    """Starts vLLM and returns when it has answered a real request; returns the running one if it is the same.

    The server gets the name `endpoint.model` and the address 127.0.0.1:`serve.port`, with which `endpoint.url` must
    agree. Its output goes to log_path; an older log is kept beside it (see `_put_log_away`). detached: it outlives
    this process; otherwise it ends with it, however this process ends. media_folder: where the server may read images
    that calls name by address. grant: the GPUs it may use, and what holds them.

    Raises ServingError: if it cannot be started, ends, or does not answer in `start_timeout_seconds`; the message
    quotes the end of the log, and nothing is left running.
    """
    return _start(ServerStart(endpoint, serve, media_folder, detached, grant), log_path, pid_path)


def num_gpus_wanted(endpoint: EndpointConfig, serve: ServeConfig) -> int:
    """Returns how many of the visible GPUs a server would take; 0 for a build without GPUs. Raises ServingError."""
    build = find_build(_python(serve))
    if build.is_cpu:
        return 0
    parallelism = _parallelism(build, ServerStart(endpoint, serve))
    return parallelism.tensor * parallelism.data


def num_in_flight(url: str) -> int:
    """Returns how many sequences a vLLM server computes or queues now; 0 when it does not say. url: ending in /v1."""
    try:
        text = _request(EndpointConfig(model="", url=url), f"{url.removesuffix('/v1')}/metrics", timeout_seconds=5.0)
    except (OSError, ValueError):
        return 0
    load = parse_load(text)
    return 0 if load is None else load.num_running + load.num_waiting


def revive(handle: ServerHandle) -> ServerHandle:
    """Starts a server again that died during a run, and returns its new handle; one that is well is left alone.

    For clients that nobody answers any more. Any thread may call it, with an old handle too. A server that runs but
    has been silent for a minute is ended first. Log and logging say each restart and why.

    Raises ServingError: after `serve.max_restarts` restarts in `serve.restart_window_minutes`, with the reason of the
    last death and the end of the log; or as `start_server`. Nothing is left running then.
    """
    with _reviving:
        recorded = _read_pid_file(handle.pid_path)
        if recorded is not None and _comes_back(recorded, handle.start):
            return replace(handle, pid=recorded.pid)
        is_hung = recorded is not None and _is_running(recorded)
        stop_server(handle.pid_path)
        why = f"it ran but was silent for {_HUNG_SECONDS:.0f} s" if is_hung else _last_note(handle.log_path)
        note = f"{_count_restart(handle, why)}. Why: {why}"
        _log.warning("%s is started again: %s", handle.model, note)
        return _start(handle.start, handle.log_path, handle.pid_path, note)


def _start(start: ServerStart, log_path: Path, pid_path: Path, note: str | None = None) -> ServerHandle:
    endpoint, serve = start.endpoint, start.serve
    _check_address(endpoint, serve)
    _make_media_folder(start.media_folder)
    python = _python(serve)
    build = find_build(python)
    parallelism = _parallelism(build, start)
    command = server_command(
        endpoint, serve, python=python, build=build, parallelism=parallelism, media_folder=start.media_folder
    )
    url = f"http://{HOST}:{serve.port}/v1"
    recorded = _read_pid_file(pid_path)
    num_gpus = 0 if build.is_cpu else parallelism.tensor * parallelism.data

    def handle(pid: int) -> ServerHandle:
        return ServerHandle(pid, url, endpoint.model, log_path, pid_path, parallelism.data, num_gpus, start)

    if recorded is not None and _is_running(recorded):
        if recorded.command == command and is_answering(endpoint):
            return handle(recorded.pid)
        raise ServingError(f"{pid_path} belongs to a server that runs already (process {recorded.pid}); stop it first")
    _end(pid_path, recorded)
    _check_port(serve.port)
    _begin_log(log_path, command, serve, note)
    environment = {**server_environment(build, serve, endpoint), **start.grant.environment}
    process = _launch(command, environment, start, log_path=log_path, pid_path=pid_path)
    record = _PidFile(process.pid, _start_time(process.pid), command)
    try:
        _write_pid_file(pid_path, record)
        _wait_until_ready(process, start, parallelism, log_path=log_path)
    except BaseException:
        _end(pid_path, record)
        pid_path.unlink(missing_ok=True)
        raise
    return handle(process.pid)


def _python(serve: ServeConfig) -> str:
    return serve.python or os.environ.get(PYTHON_VARIABLE) or sys.executable


def _parallelism(build: VllmBuild, start: ServerStart) -> Parallelism:
    model = start.serve.model_path or start.endpoint.model
    folder = model_folder(model) or cached_folder(model, start.endpoint.revision)
    return choose_parallelism([] if build.is_cpu else _granted_gpus(start.grant), model_facts(folder), start.serve)


def _granted_gpus(grant: Grant) -> list[Gpu]:
    granted = grant.environment.get("CUDA_VISIBLE_DEVICES")
    return [gpu for gpu in find_gpus() if granted is None or gpu.index in granted.split(",")]


def _comes_back(recorded: _PidFile, start: ServerStart) -> bool:
    """Returns whether a server answers that it is well, which may take it a while; False as soon as it has ended."""
    deadline = time.monotonic() + _HUNG_SECONDS
    while _is_running(recorded) and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            _request(start.endpoint, f"http://{HOST}:{start.serve.port}/health", timeout_seconds=5.0)
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _count_restart(handle: ServerHandle, why: str) -> str:
    """Counts a restart and returns which one it is. Raises ServingError: if there were too many."""
    serve, now = handle.start.serve, time.monotonic()
    window = f"in {serve.restart_window_minutes:g} minutes"
    recent = [then for then in _restarts.get(handle.pid_path, []) if now - then < 60 * serve.restart_window_minutes]
    if len(recent) >= serve.max_restarts:
        what = f"vLLM died again after {len(recent)} restarts {window}, which is all that serve.max_restarts allows"
        raise _serving_error(f"{what}. Why: {why}", handle.log_path)
    _restarts[handle.pid_path] = [*recent, now]
    return f"restart {len(recent) + 1} of at most {serve.max_restarts} {window}"


def stop_server(pid_path: Path) -> None:
    """Ends the server of a pid file with all its processes, in order if it can, and removes the file.

    What an earlier server left behind is ended too, even without the file. Raises ServingError: if a process survives
    SIGKILL.
    """
    _end(pid_path, _read_pid_file(pid_path))
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


def server_environment(build: VllmBuild, serve: ServeConfig, endpoint: EndpointConfig) -> dict[str, str]:
    """Returns the environment of the server process: ours, with defaults that a user's own settings override."""
    environment = {
        # No statistics leave the machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Progress bars of downloads and loading do not belong in a log.
        "TQDM_MININTERVAL": "30",
        # vLLM renames its processes, which by default overwrites the environment that the launcher's mark is read from.
        "SPT_NOENV": "1",
        # CUDA numbers GPUs by speed by default, nvidia-smi by slot: one numbering for both.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **os.environ,
    }
    if model_folder(serve.model_path or endpoint.model) is not None:
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


def _make_media_folder(folder: Path | None) -> None:
    """Makes the folder of images, which vLLM refuses when it is missing. Raises ServingError."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServingError(f"cannot make the folder of images {folder}: {error.strerror}") from error


def _check_address(endpoint: EndpointConfig, serve: ServeConfig) -> None:
    address = urlsplit(endpoint.url)
    if address.hostname not in {"127.0.0.1", "localhost", "::1"} or address.port != serve.port:
        raise ServingError(
            f"the teacher's address is {endpoint.url}, but vLLM would be started at http://{HOST}:{serve.port}/v1; "
            "let teacher.url and serve.port agree, or leave out `serve` to use a server that runs elsewhere"
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServingError(
                f"port {port} is taken by another program ({error.strerror}); stop it or choose another serve.port"
            ) from error


def _begin_log(log_path: Path, command: list[str], serve: ServeConfig, note: str | None) -> None:
    """Begins a new log with the command line, and with the reason if it is a restart."""
    lines = [] if note is None else [launcher.note_line(note)]
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        _put_log_away(log_path, serve.num_old_logs)
        log_path.write_bytes(b"".join([*lines, launcher.note_line(f"starting {' '.join(command)}")]))
    except OSError as error:
        raise ServingError(f"cannot write the server's log {log_path}: {error.strerror}") from error


def _put_log_away(log_path: Path, num_old: int) -> None:
    """Keeps the log of an earlier start.

    That of a server which was stopped becomes PATH.1, older ones move on, the oldest goes. That of any other, which
    crashed or lost its machine, gets a name with its time, which nothing moves, removes or writes again: there are few,
    for restarts are limited, and each may be wanted weeks later.
    """
    if not log_path.exists():
        return
    if launcher.ENDED_IN_ORDER in _last_note(log_path):
        launcher.shift_logs(log_path, num_old)
        return
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(log_path.stat().st_mtime))
    name = kept = f"{log_path.name}.crash-{stamp}"
    number = 1
    while log_path.with_name(kept).exists():
        number += 1
        kept = f"{name}-{number}"
    log_path.rename(log_path.with_name(kept))


def _last_note(log_path: Path) -> str:
    """Returns the last line that the launcher wrote into a log: how the server ended, if it still could."""
    notes = _NOTE.findall(_log_text(log_path))
    if not notes or notes[-1].startswith("starting "):
        return "it was killed together with its launcher, or its machine stopped"
    return str(notes[-1])


def _log_text(log_path: Path) -> str:
    """Returns beginning and end of a log, without the middle of a long one; empty when it cannot be read."""
    try:
        with log_path.open("rb") as log:
            text = log.read(_LOG_READ_BYTES)
            size = log.seek(0, os.SEEK_END)
            log.seek(max(len(text), size - _LOG_READ_BYTES))
            text += log.read()
    except OSError:
        return ""
    return text.decode(errors="replace")


def _launch(
    command: list[str], environment: Mapping[str, str], start: ServerStart, *, log_path: Path, pid_path: Path
) -> subprocess.Popen[bytes]:
    serve = start.serve
    options = ["--log", str(log_path), "--max-log-bytes", str(serve.log_megabytes * 2**20)]
    options += ["--num-old-logs", str(serve.num_old_logs), "--grace-seconds", str(_GRACE_SECONDS)]
    if not start.detached:
        options += ["--while", str(os.getpid())]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(_HERE / "launcher.py"), *options, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, launcher.MARK: _mark(pid_path)},
            pass_fds=start.grant.descriptors,
            start_new_session=True,
        )
    _children[process.pid] = process
    return process


def _wait_until_ready(
    process: subprocess.Popen[bytes], start: ServerStart, parallelism: Parallelism, *, log_path: Path
) -> None:
    began = logged = time.monotonic()
    endpoint, serve = start.endpoint, start.serve
    health = f"http://{HOST}:{serve.port}/health"
    while True:
        if process.poll() is not None:
            raise _serving_error(f"vLLM ended with status {process.returncode} while starting", log_path)
        with contextlib.suppress(OSError, ValueError):
            _request(endpoint, health, timeout_seconds=5.0)
            break
        waited = time.monotonic() - began
        if waited > serve.start_timeout_seconds:
            raise _serving_error(f"vLLM was not ready after {waited:.0f} s", log_path)
        if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
            logged = time.monotonic()
            _log.info("vLLM is starting (%.0f s); its log is %s", waited, log_path)
        time.sleep(_POLL_SECONDS)
    try:
        for copy in range(parallelism.data):
            _first_reply(endpoint, serve, copy if parallelism.data > 1 else None)
    except (OSError, ValueError) as error:
        detail = error.read().decode(errors="replace")[:1000] if isinstance(error, urllib.error.HTTPError) else error
        raise _serving_error(f"vLLM is up but does not answer a question: {detail}", log_path) from error
    _log.info("vLLM serves %s after %.0f s", endpoint.model, time.monotonic() - began)


def _first_reply(endpoint: EndpointConfig, serve: ServeConfig, copy: int | None) -> None:
    """Asks for one token under a constraint. copy: of the model, where there are several.

    /health says nothing about the model, and the first constraint of a server takes up to half a minute, in which the
    first rows would otherwise wait.
    """
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    headers = {} if copy is None else {"X-data-parallel-rank": str(copy)}
    url = f"http://{HOST}:{serve.port}/v1/chat/completions"
    answer = _request(endpoint, url, body=body, headers=headers, timeout_seconds=_FIRST_REPLY_SECONDS)
    if not json.loads(answer).get("choices"):
        raise ValueError(f"no choices in {answer[:500]!r}")


def _request(
    endpoint: EndpointConfig,
    url: str,
    *,
    timeout_seconds: float,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Returns the body of an answer. Raises HTTPError (an OSError), OSError, or ValueError for an impossible URL."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError(f"{url!r} is no http address")
    sent = {"Content-Type": "application/json", **(headers or {})}
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if key:
        sent["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, sent)  # noqa: S310  (the scheme is checked above)
    try:
        with _NO_PROXY.open(request, timeout=timeout_seconds) as answer:
            content: bytes = answer.read(2**20)
            return content
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP: {error!r}") from error


def _serving_error(what: str, log_path: Path) -> ServingError:
    """Returns the error with the end of the log, and with its first complaints: vLLM's last words point above them."""
    text = _log_text(log_path)
    if launcher.CONTINUED in text.partition("\n")[0]:
        text = _log_text(log_path.with_name(f"{log_path.name}.1")) + text
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    end = lines[-25:]
    first = [line for line in lines[:-25] if "Error" in line][:5]
    quoted = "\n".join(f"  {line[:300]}" for line in [*first, *(["..."] if first else []), *end])
    return ServingError(f"{what}. The end of its log, {log_path}:\n{quoted or '  (nothing)'}")


def _end(pid_path: Path, recorded: _PidFile | None) -> None:
    """Ends all processes of a pid file's server: asks first, then kills."""
    members = _members(pid_path, recorded)
    if not members:
        return
    # The launcher ends the server in order; a second signal to the server itself would cut that short. Without a
    # launcher its heirs are asked: those whose parent is not one of them.
    for pid in members:
        stat = launcher.read_stat(pid)
        if stat is None or stat.parent not in members:
            _send(pid, signal.SIGTERM)
    if _wait_until_gone(pid_path, recorded, _STOP_SECONDS):
        return
    _log.warning("the server's processes %s do not end; killing them", _members(pid_path, recorded))
    if not _wait_until_gone(pid_path, recorded, _KILL_SECONDS, kill=True):
        raise ServingError(f"the processes {_members(pid_path, recorded)} of the vLLM server cannot be ended")


def _wait_until_gone(pid_path: Path, recorded: _PidFile | None, timeout_seconds: float, *, kill: bool = False) -> bool:
    """Returns whether all processes have ended in time; reaps the launcher if it is our child."""
    deadline = time.monotonic() + timeout_seconds
    while members := _members(pid_path, recorded):
        if time.monotonic() > deadline:
            return False
        for pid in members if kill else ():
            _send(pid, signal.SIGKILL)
        time.sleep(0.05)
    return True


def _members(pid_path: Path, recorded: _PidFile | None) -> list[int]:
    """Returns the living processes of a pid file's server: the one it names, and those that carry its mark."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            _children.pop(pid, None)
    named = [recorded.pid] if recorded is not None and _is_running(recorded) else []
    marked = launcher.marked(_mark(pid_path)) if Path("/proc/self/stat").exists() else []
    return list(dict.fromkeys([*named, *marked]))


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _mark(pid_path: Path) -> str:
    return str(pid_path.resolve())


def _start_time(pid: int) -> str:
    stat = launcher.read_stat(pid)
    return stat.started if stat is not None else ""


def _is_running(recorded: _PidFile) -> bool:
    stat = launcher.read_stat(recorded.pid)
    if stat is not None:
        return stat.started == recorded.started and stat.state != "Z"
    if recorded.started:
        return False
    try:
        os.kill(recorded.pid, 0)
    except ProcessLookupError:
        return False
    return True


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
