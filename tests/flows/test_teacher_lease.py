"""Teachers on leased GPUs: shared, drained for training, started again; a run's own; real processes, with a stand-in
for vLLM and for GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from flows import stack, teacher_lease
from flows.gpu_devices import GpuHost
from flows.gpu_lease import GpusTaken, Holder, Leases
from flows.gpu_queue import Priority, Request
from flows.processes import StackError
from flows.runtime import Runtime
from flows.stack_teacher import StackTeacher
from flows.teacher_lease import Asker, Drain, Seat, open_seat, refuse
from schemas.config import EndpointConfig, RunConfig, ServeConfig
from schemas.errors import Interrupted
from teacher import launcher, serving
from tests.teacher.test_serving import Stand
from tests.waiting import wait_for

FRESH = get_context("forkserver")


def say_nothing(line: str) -> None:
    del line


class Machine:
    """A project folder on a machine with two stand-in GPUs, and a stand-in for vLLM."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.stand = Stand(folder)
        self.leases = Leases(GpuHost.here(folder))
        self.teacher = StackTeacher(folder, lambda: stack.prefect_environment(folder, "http://127.0.0.1:1/api"))
        self.runs: list[ForkServerProcess] = []

    def config(self, *, num_gpus: int = 2, **serve: Any) -> RunConfig:
        settings = self.stand.serve.model_dump() | {"data_parallel_size": num_gpus, **serve}
        source = {"name": "rows", "format": "jsonl", "path": "rows.jsonl"}
        return RunConfig.model_validate(
            {"name": "tiny", "sources": [source], "teacher": self.stand.endpoint.model_dump(), "serve": settings}
        )

    def up(self, **choices: Any) -> list[str]:
        """Does what `bimode up` does with the teacher, and returns what it said."""
        said: list[str] = []
        self.teacher.ensure(self.config(**choices), said.append)
        return said

    def request(self, number: int, name: str = "a training", priority: Priority = "default") -> Request:
        return Request("training", name, tuple(device.key for device in self.leases.host.devices), number, priority)

    def holders(self) -> dict[str, str]:
        """Returns the kind of each GPU's holder, by GPU."""
        return {key: holder.kind for key, holder in self.leases.look()[0].items() if holder is not None}

    def waiting(self) -> list[str]:
        return [ticket.request.name for ticket in self.leases.look()[1]]

    def asker(self, name: str = "a curation", *, stop: threading.Event | None = None) -> Asker:
        return Asker(self.leases, name, "default", say_nothing, (stop or threading.Event()).is_set)

    def seat(self, asker: Asker, run: str = "run", *, num_gpus: int = 2) -> Seat:
        """Takes a seat for a run with a folder of its own."""
        folder = self.home / run
        paths = {"log_path": folder / "vllm.log", "pid_path": folder / "vllm.pid", "media_folder": folder / "images"}
        serve = self.config(num_gpus=num_gpus).serve
        assert serve is not None
        return open_seat(asker, self.stand.endpoint, serve, **paths)

    def start(self, target: Callable[[Path], None]) -> ForkServerProcess:
        """Runs a function of this folder in a process of its own, with the environment of this one."""
        process = FRESH.Process(target=_run, args=(target, self.home, dict(os.environ)))
        process.start()
        self.runs.append(process)
        return process

    def is_up(self) -> bool:
        return serving.running_pid(self.teacher.pid_file) is not None and serving.is_answering(self.stand.endpoint)


def _run(target: Callable[[Path], None], home: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    target(home)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    forkserver.ensure_running()  # before the variables below, by which the stand-in's processes are known
    build = {"distribution": "vllm", "version": "0.32.0", "flags": []}
    for name, value in {
        "BIMODE_HOME": str(tmp_path),
        "BIMODE_GPUS": "0,1",
        "BIMODE_GPU_LEASES": str(tmp_path / "leases"),
        "BIMODE_TEST_STAND": str(tmp_path),
        "FAKE_BUILD": json.dumps(build),
    }.items():
        monkeypatch.setenv(name, value)
    machine = Machine(tmp_path)
    yield machine
    for process in machine.runs:
        process.kill()
        process.join()
    machine.teacher.stop(say_nothing, restart=False)
    for pid in machine.stand.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def train_for_long(home: Path) -> None:
    """A training that drains the teacher, in a process of its own."""
    leases = Leases(GpuHost.here(home))
    request = Request("training", "a long training", ("0", "1"), 2)
    with leases.acquire(request, say=say_nothing, make_room=Drain(leases, say_nothing, restart=True)):
        time.sleep(600)


def environment_of(pid: int) -> dict[str, str]:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


# The teacher of the stack


def test_the_teacher_holds_its_gpus_after_the_command_that_started_it_has_ended(machine: Machine) -> None:
    machine.up(num_gpus=1)
    assert machine.holders() == {"0": "serving"}
    assert environment_of(machine.stand.server())["CUDA_VISIBLE_DEVICES"] == "0"
    assert machine.up(num_gpus=1) == [f"the teacher org/Teacher answers at {machine.stand.endpoint.url}"]
    machine.teacher.stop(say_nothing, restart=False)
    assert machine.holders() == {}


def test_serving_and_training_share_a_machine_whose_gpus_they_divide(machine: Machine) -> None:
    machine.up(num_gpus=1)
    drain = Drain(machine.leases, say_nothing, restart=True)
    with machine.leases.acquire(machine.request(1), say=say_nothing, make_room=drain) as lease:
        assert [device.key for device in lease.devices] == ["1"]
        assert machine.is_up()


def test_training_drains_the_teacher_and_a_killed_training_gives_it_back(machine: Machine) -> None:
    machine.up()
    training = machine.start(train_for_long)
    wait_for(lambda: machine.holders() == {"0": "training", "1": "training"})
    assert not machine.is_up()
    wait_for(lambda: machine.waiting() == [f"the teacher org/Teacher of {machine.home}"])
    training.kill()
    training.join()
    wait_for(machine.is_up)
    assert machine.holders() == {"0": "serving", "1": "serving"}


def test_a_teacher_that_is_not_to_start_again_stays_stopped(machine: Machine) -> None:
    machine.up()
    drain = Drain(machine.leases, say_nothing, restart=False)
    machine.leases.acquire(machine.request(2), say=say_nothing, make_room=drain).release()
    assert machine.leases.look() == ({}, [])
    assert not machine.teacher.pid_file.exists()


def test_a_teacher_whose_gpus_are_taken_starts_when_they_are_free(machine: Machine) -> None:
    lease = machine.leases.acquire(machine.request(1), say=say_nothing)
    said = machine.up(num_gpus=2)
    assert said[-1].startswith("others hold the GPUs of the teacher: it starts when they are free")
    wait_for(machine.waiting)
    lease.release()
    wait_for(machine.is_up)


def test_stopping_the_stack_ends_the_wait_for_its_teacher(machine: Machine) -> None:
    with machine.leases.acquire(machine.request(1), say=say_nothing):
        machine.up(num_gpus=2)
        wait_for(machine.waiting)
        machine.teacher.stop(say_nothing, restart=False)
        assert machine.waiting() == []


def test_training_that_may_not_stop_the_teacher_is_refused_instead_of_waiting_for_ever(machine: Machine) -> None:
    machine.up(num_gpus=1)
    said = r"a training needs 2 of 2 GPUs, held by the serving of the teacher org/Teacher"
    with pytest.raises(GpusTaken, match=said):
        machine.leases.acquire(machine.request(2), say=say_nothing, make_room=refuse)
    assert machine.is_up()
    machine.leases.acquire(machine.request(1), say=say_nothing, make_room=refuse).release()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_teacher_of_another_user_is_waited_for_and_not_touched(machine: Machine) -> None:
    machine.up()
    os.chown(machine.teacher.root, 12345, -1)
    holder = next(iter(machine.leases.look()[0].values()))
    assert holder is not None
    try:
        Drain(machine.leases, say_nothing, restart=True)(machine.request(2), [holder])
        assert machine.is_up()
    finally:
        os.chown(machine.teacher.root, os.getuid(), -1)


def test_a_killed_teacher_leaves_its_gpus_to_the_next(machine: Machine) -> None:
    machine.up()
    for pid in launcher.marked(str(machine.teacher.pid_file.resolve())):
        os.kill(pid, signal.SIGKILL)
    with machine.leases.acquire(machine.request(2), say=say_nothing):
        assert machine.stand.processes() == []


# Runs that ask it


def test_a_run_that_asks_is_not_cut_off_and_one_that_comes_later_waits_for_the_training(machine: Machine) -> None:
    machine.up()
    first = machine.seat(machine.asker("the first"))
    assert first.server is None and first.lease is None
    training = machine.start(train_for_long)
    wait_for(lambda: machine.waiting() == ["a long training"])
    stop = threading.Event()
    gave_up: list[BaseException] = []

    def come_later() -> None:
        try:
            machine.seat(machine.asker("the second", stop=stop))
        except Interrupted as error:
            gave_up.append(error)

    second = threading.Thread(target=come_later, daemon=True)
    second.start()
    wait_for(lambda: machine.waiting() == ["a long training", "the second"])
    time.sleep(1.0)
    assert machine.is_up(), "the first still asks"
    first.leave()
    wait_for(lambda: machine.holders() == {"0": "training", "1": "training"})
    assert not machine.is_up()
    stop.set()
    second.join(30)
    assert "was stopped while it waited" in str(gave_up[0])
    training.kill()


def test_runs_ask_a_shared_teacher_at_the_same_time(machine: Machine) -> None:
    machine.up()
    seats = [machine.seat(machine.asker(f"run {number}"), f"run {number}") for number in range(2)]
    with pytest.raises(StackError, match="a run asks the teacher, whose settings or model changed"):
        machine.up(max_model_len=99)
    for seat in seats:
        seat.leave()
    assert "stopping the teacher: its settings or its model changed" in machine.up(max_model_len=99)


def test_a_teacher_that_others_started_is_asked_without_a_lease(machine: Machine) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", machine.stand.port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        seat = machine.seat(machine.asker())
        assert (seat.server, seat.lease, seat.file) == (None, None, None)
        server.shutdown()
        thread.join()


# A run's own teacher


def curate_for_long(home: Path) -> None:
    """A run that starts its own teacher, in a process of its own."""
    ports = json.loads((home / "ports.json").read_text())
    endpoint, serve = EndpointConfig.model_validate(ports["endpoint"]), ServeConfig.model_validate(ports["serve"])
    leases = Leases(GpuHost.here(home))
    folder = home / "other"
    paths = {"log_path": folder / "vllm.log", "pid_path": folder / "vllm.pid", "media_folder": folder / "images"}
    open_seat(Asker(leases, "another run", "default", say_nothing), endpoint, serve, **paths)
    time.sleep(600)


def start_other_run(machine: Machine) -> ForkServerProcess:
    serve = machine.config().serve
    assert serve is not None
    record = {"endpoint": machine.stand.endpoint.model_dump(mode="json"), "serve": serve.model_dump(mode="json")}
    (machine.home / "ports.json").write_text(json.dumps(record))
    process = machine.start(curate_for_long)
    wait_for(lambda: serving.is_answering(machine.stand.endpoint))
    return process


def test_a_run_starts_its_own_teacher_where_none_answers_and_gives_all_back(machine: Machine) -> None:
    seat = machine.seat(machine.asker(), num_gpus=1)
    assert seat.server is not None
    assert machine.holders() == {"0": "serving"}
    again = machine.seat(machine.asker())
    assert (again.server, again.lease) == (None, None), "another process of the same run asks the same server"
    seat.leave()
    assert machine.holders() == {}
    assert not serving.is_answering(machine.stand.endpoint)


def test_a_curation_leases_gpus_at_its_first_question_and_until_it_is_closed(machine: Machine) -> None:
    config = machine.config(num_gpus=1).model_copy(update={"workdir": str(machine.home / "work")})
    runtime = Runtime(config)
    assert machine.holders() == {}
    runtime.run(runtime.open(config.teacher))
    assert machine.holders() == {"0": "serving"}
    assert runtime.num_gpus(config.teacher) == 1
    runtime.close()
    assert machine.holders() == {}


def test_a_curation_that_is_closed_while_it_waits_for_a_gpu_leaves_the_queue(machine: Machine) -> None:
    config = machine.config(num_gpus=2).model_copy(update={"workdir": str(machine.home / "work")})
    runtime = Runtime(config)
    with machine.leases.acquire(machine.request(1), say=say_nothing):

        def ask() -> None:
            with contextlib.suppress(Interrupted, CancelledError):
                runtime.run(runtime.open(config.teacher))

        asks = threading.Thread(target=ask, daemon=True)
        asks.start()
        wait_for(lambda: machine.waiting() == ["the curation tiny"])
        runtime.close()
        wait_for(lambda: machine.waiting() == [])
    assert machine.holders() == {}


def test_a_run_waits_for_the_end_of_another_runs_teacher_and_a_kill_is_an_end(machine: Machine) -> None:
    other = start_other_run(machine)
    found: list[Seat] = []
    waits = threading.Thread(target=lambda: found.append(machine.seat(machine.asker())), daemon=True)
    waits.start()
    time.sleep(1.5)
    assert not found
    other.kill()
    waits.join(90)
    assert found[0].server is not None
    assert found[0].lease is not None
    assert machine.leases.server_at(machine.stand.endpoint.url) == found[0].lease.holder
    found[0].leave()


def test_a_revived_server_stays_on_the_gpus_of_its_lease(machine: Machine) -> None:
    seat = machine.seat(machine.asker(), num_gpus=1)
    assert seat.server is not None
    os.kill(machine.stand.server(), signal.SIGKILL)
    seat.server = serving.revive(seat.server)
    assert environment_of(machine.stand.server())["CUDA_VISIBLE_DEVICES"] == "0"
    assert machine.holders() == {"0": "serving"}
    seat.leave()
    assert machine.holders() == {}


def test_a_run_with_a_teacher_of_its_own_drains_the_stacks_for_its_gpus(machine: Machine) -> None:
    machine.up()
    other = machine.stand
    (machine.home / "elsewhere").mkdir()
    elsewhere = Stand(machine.home / "elsewhere")
    own = EndpointConfig(model="own", url=elsewhere.endpoint.url)
    folder = machine.home / "run"
    paths = {"log_path": folder / "vllm.log", "pid_path": folder / "vllm.pid", "media_folder": folder / "images"}
    serve = elsewhere.serve.model_copy(update={"data_parallel_size": 2})
    seat = open_seat(machine.asker(), own, serve, **paths)
    assert seat.server is not None and not serving.is_answering(other.endpoint)
    seat.leave()
    wait_for(lambda: serving.is_answering(other.endpoint))


# Calls of strangers


class Busy(BaseHTTPRequestHandler):
    """vLLM's word for how many sequences it works on."""

    num_running = 3

    def do_GET(self) -> None:
        text = f"vllm:num_requests_running {Busy.num_running}\nvllm:num_requests_waiting 1\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def test_calls_of_strangers_have_some_time_to_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[Path] = []
    monkeypatch.setattr(stack, "stop_teacher", lambda home, **choices: stopped.append(home))
    monkeypatch.setattr(teacher_lease, "_IN_FLIGHT_SECONDS", 1.0)
    said: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert serving.num_in_flight(url) == 4
        machine.leases.host.folder.mkdir()
        machine.teacher.root.mkdir()
        holder = Holder("serving", "the teacher", ("0", "1"), teacher_lease.Terms(url=url, home=str(machine.home)))
        Drain(machine.leases, said.append, restart=True)(machine.request(2), [holder])
        server.shutdown()
        thread.join()
    assert stopped == [machine.home]
    assert said == ["stopping the teacher although it still works on 4 calls of unknown callers"]
    assert serving.num_in_flight(url) == 0, "nobody answers any more"
