"""Leases of GPUs, with stand-ins for GPUs and real processes: never two holders, in order, whatever kills whom."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from flows import held_files, processes
from flows.gpu_devices import Device, GpuHost, find_devices, visible_to
from flows.gpu_lease import MARK, Holder, Lease, Leases, Terms
from flows.gpu_queue import PRIORITY_STEP_SECONDS, Priority, Request
from schemas.errors import ConfigError, Interrupted, StorageError
from tests.flows.gpu_contender import contend
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
FRESH = get_context("forkserver")
"""Processes of their own that know nothing of this one, but need not import everything anew."""
FRESH.set_forkserver_preload(["tests.flows.gpu_contender"])


def say_nothing(line: str) -> None:
    del line


def host_with(folder: Path, number: int) -> GpuHost:
    return GpuHost(folder / "leases", tuple(Device(str(index), str(index)) for index in range(number)))


def request_for(leases: Leases, number: int, name: str = "a training", priority: Priority = "default") -> Request:
    return Request("training", name, tuple(device.key for device in leases.host.devices), number, priority)


class Contenders:
    """Real processes that want the GPUs of one folder."""

    def __init__(self, folder: Path, num_gpus: int) -> None:
        self.folder, self.num_gpus = folder, num_gpus
        self.leases = Leases(host_with(folder, num_gpus))
        self.all: list[ForkServerProcess] = []

    def start(self, name: str, number: int = 1, hold: float = 0.0, priority: Priority = "default") -> ForkServerProcess:
        process = FRESH.Process(target=contend, args=(self.folder, self.num_gpus, number, hold, priority, name))
        process.start()
        self.all.append(process)
        return process

    def start_waiting(self, name: str, **choices: Any) -> ForkServerProcess:
        """Starts one and waits until it stands in the queue."""
        process = self.start(name, **choices)
        wait_for(lambda: name in self.waiting())
        return process

    def waiting(self) -> list[str]:
        return [ticket.request.name for ticket in self.leases.look()[1]]

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def served(self) -> list[str]:
        return [event["name"] for event in self.events() if event["event"] == "taken"]

    def finish(self) -> None:
        for process in self.all:
            process.join(120)
            assert process.exitcode in {0, -signal.SIGKILL}


def kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()


@pytest.fixture
def contenders(tmp_path: Path) -> Iterator[Callable[[int], Contenders]]:
    made: list[Contenders] = []

    def make(num_gpus: int) -> Contenders:
        made.append(Contenders(tmp_path, num_gpus))
        return made[-1]

    yield make
    for each in made:
        for process in each.all:
            kill(process)


# Which GPUs there are


def test_gpus_are_named_by_a_variable_where_nobody_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_GPUS", "0, 1,2")
    assert [device.index for device in find_devices()] == ["0", "1", "2"]
    assert visible_to(find_devices()[1:])["CUDA_VISIBLE_DEVICES"] == "1,2"


@pytest.mark.parametrize("text", ["0,0", "0;1", "../x", "0 1"])
def test_names_that_are_no_names_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BIMODE_GPUS", text)
    with pytest.raises(ConfigError, match=r"BIMODE_GPUS = .* is no list of different names"):
        find_devices()


def test_a_machine_without_gpus_has_one_device_of_the_project_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMODE_GPUS", "")
    monkeypatch.delenv("BIMODE_GPU_LEASES", raising=False)
    host = GpuHost.here(tmp_path)
    assert (host.num_gpus, [device.key for device in host.devices]) == (0, ["cpu"])
    assert host.folder == tmp_path / ".local" / "gpus"
    assert visible_to(host.devices) == {}


def test_the_leases_of_gpus_lie_in_one_folder_for_all_projects_of_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMODE_GPUS", "0")
    monkeypatch.delenv("BIMODE_GPU_LEASES", raising=False)
    assert GpuHost.here(tmp_path / "one").folder == GpuHost.here(tmp_path / "other").folder
    monkeypatch.setenv("BIMODE_GPU_LEASES", str(tmp_path / "chosen"))
    assert GpuHost.here(tmp_path / "one").folder == tmp_path / "chosen"


# One process


def test_a_lease_says_which_gpus_its_program_sees_and_who_holds_them(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 4))
    with (
        leases.acquire(request_for(leases, 1), say=say_nothing),
        leases.acquire(request_for(leases, 2, "the second"), say=say_nothing) as second,
    ):
        assert second.grant.environment["CUDA_VISIBLE_DEVICES"] == "1,2"
        assert second.grant.environment[MARK] == second.holder.lease
        holders = leases.look()[0]
    assert {key: holder.name for key, holder in holders.items() if holder} == {
        "0": "a training",
        "1": "the second",
        "2": "the second",
    }
    assert leases.look() == ({}, [])


def test_more_gpus_than_there_are_is_a_clear_error(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 2))
    with pytest.raises(ConfigError, match=r"a training asks for 3 GPUs, and this worker has 2 \(GPU 0, GPU 1\)"):
        leases.acquire(request_for(leases, 3), say=say_nothing)


def test_gpus_that_are_no_longer_needed_go_to_the_next_while_the_rest_stays(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 2))
    with leases.acquire(request_for(leases, 2), say=say_nothing) as first:
        assert leases.try_acquire(request_for(leases, 1), say=say_nothing) is None
        first.keep(1)
        assert first.grant.environment["CUDA_VISIBLE_DEVICES"] == "0"
        second = leases.try_acquire(request_for(leases, 1), say=say_nothing)
        assert second is not None
        assert second.grant.environment["CUDA_VISIBLE_DEVICES"] == "1"
        second.release()


def test_what_it_waits_for_is_said(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 1))
    said: list[str] = []
    with leases.acquire(request_for(leases, 1, "the first"), say=say_nothing), pytest.raises(Interrupted):
        leases.acquire(request_for(leases, 1), say=said.append, should_stop=lambda: bool(said))
    assert said[0].startswith("waiting for 1 of 1 GPUs, held by the training of the first (process ")
    assert leases.look() == ({}, []), "whoever gives up leaves no ticket"


def test_nobody_takes_gpus_at_once_past_one_that_waits(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 2))
    with leases.queue.waiting(request_for(leases, 2)):
        assert leases.try_acquire(request_for(leases, 1), say=say_nothing) is None
        other = Leases(GpuHost(leases.host.folder, (Device("9", "9"),)))
        free = other.try_acquire(request_for(other, 1), say=say_nothing)
        assert free is not None, "a GPU that the other could not get"
        free.release()


@pytest.mark.parametrize(
    ("earlier", "later", "seconds", "first"),
    [
        ("default", "default", 0.0, "earlier"),
        ("default", "urgent", PRIORITY_STEP_SECONDS - 60, "later"),
        ("default", "urgent", PRIORITY_STEP_SECONDS + 60, "earlier"),
        ("later", "urgent", 2 * PRIORITY_STEP_SECONDS - 60, "later"),
        ("later", "urgent", 2 * PRIORITY_STEP_SECONDS + 60, "earlier"),
    ],
)
def test_a_step_of_priority_is_worth_some_hours_of_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Priority, later: Priority, seconds: float, first: str
) -> None:
    leases = Leases(host_with(tmp_path, 1))
    begin = time.monotonic()
    monkeypatch.setattr("flows.gpu_queue.time.monotonic", lambda: begin)
    with leases.queue.waiting(request_for(leases, 1, "earlier", earlier)):
        monkeypatch.setattr("flows.gpu_queue.time.monotonic", lambda: begin + seconds)
        with leases.queue.waiting(request_for(leases, 1, "later", later)):
            assert leases.look()[1][0].request.name == first


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"kind": "x"}', "\x00" * 40])
def test_a_damaged_note_hides_who_holds_a_gpu_but_not_that_it_is_held(tmp_path: Path, text: str) -> None:
    leases = Leases(host_with(tmp_path, 1))
    with leases.acquire(request_for(leases, 1), say=say_nothing):
        leases.path("0").write_text(text)
        assert leases.look()[0] == {"0": None}
        assert leases.try_acquire(request_for(leases, 1), say=say_nothing) is None
    leases.acquire(request_for(leases, 1), say=say_nothing).release()


def test_a_link_in_place_of_a_lease_is_not_followed(tmp_path: Path) -> None:
    leases = Leases(host_with(tmp_path, 1))
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    leases.host.folder.mkdir()
    leases.path("0").symlink_to(victim)
    with pytest.raises(StorageError):
        leases.acquire(request_for(leases, 1), say=say_nothing)
    assert victim.read_text() == "untouched"


def test_a_forked_copy_of_the_holder_does_not_hold(tmp_path: Path) -> None:
    # In a process of its own: this one has threads.
    script = f"""
import os, time
from pathlib import Path
from flows.gpu_lease import Leases
from tests.flows.test_gpu_lease import host_with, request_for, say_nothing
leases = Leases(host_with(Path({str(tmp_path)!r}), 1))
lease = leases.acquire(request_for(leases, 1), say=say_nothing)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
lease.release()
again = leases.try_acquire(request_for(leases, 1), say=say_nothing)
os.close(write)
os.waitpid(child, 0)
raise SystemExit(0 if again else "the copy holds the GPU")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Several processes


def test_several_are_served_in_order_and_the_urgent_first(contenders: Callable[[int], Contenders]) -> None:
    race = contenders(1)
    blocker = race.leases.acquire(request_for(race.leases, 1), say=say_nothing)
    order: list[tuple[str, Priority]] = [
        ("late", "later"),
        ("one", "default"),
        ("two", "default"),
        ("first", "urgent"),
        ("three", "default"),
        ("second", "urgent"),
    ]
    for name, priority in order:
        race.start_waiting(name, priority=priority)
    assert race.waiting() == ["first", "second", "one", "two", "three", "late"]
    blocker.release()
    race.finish()
    assert race.served() == ["first", "second", "one", "two", "three", "late"]


def test_a_large_request_is_not_starved_by_small_ones_that_would_fit(contenders: Callable[[int], Contenders]) -> None:
    race = contenders(2)
    half = race.leases.acquire(request_for(race.leases, 1), say=say_nothing)
    race.start_waiting("large", number=2)
    race.start_waiting("small", number=1)
    time.sleep(1.5)
    assert race.served() == [], "one GPU is free, and the small one would fit"
    half.release()
    race.finish()
    assert race.served() == ["large", "small"]


def test_one_that_waits_and_is_killed_is_forgotten(contenders: Callable[[int], Contenders]) -> None:
    race = contenders(1)
    blocker = race.leases.acquire(request_for(race.leases, 1), say=say_nothing)
    killed = race.start_waiting("killed")
    race.start_waiting("next")
    kill(killed)
    wait_for(lambda: race.waiting() == ["next"])
    blocker.release()
    race.finish()
    assert race.served() == ["next"]


def test_the_gpu_of_a_killed_holder_is_free_at_once_whoever_has_its_process_number(
    contenders: Callable[[int], Contenders],
) -> None:
    race = contenders(1)
    holder = race.start("killed", hold=600)
    wait_for(lambda: race.served() == ["killed"])
    race.start_waiting("next")
    kill(holder)
    race.finish()
    assert race.served() == ["killed", "next"]
    # The number lives again: the note names a process that has nothing to do with it.
    note = json.loads(race.leases.path("0").read_text()) | {"pid": os.getpid()}
    race.leases.path("0").write_text(json.dumps(note))
    lease = race.leases.try_acquire(request_for(race.leases, 1), say=say_nothing)
    assert lease is not None
    lease.release()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_never_two_hold_a_gpu_and_all_are_served_while_some_are_killed(
    contenders: Callable[[int], Contenders], seed: int
) -> None:
    chance = random.Random(seed)
    race = contenders(4)
    for number in range(16):
        priority: Priority = chance.choice(["urgent", "default", "default", "later"])
        race.start(f"job {number}", chance.randint(1, 3), chance.uniform(0.1, 0.6), priority)
    killed: set[str] = set()
    wait_for(race.served)
    while living := [process for process in race.all if process.is_alive()]:
        if len(killed) < 4:
            victim = chance.choice(living)
            kill(victim)
            killed.add(victim.name)
        time.sleep(0.3)
    race.finish()  # a second holder of a GPU would have failed
    assert len(killed) == 4
    finished = {event["pid"] for event in race.events() if event["event"] == "given back"}
    assert {process.pid for process in race.all if process.name not in killed} <= finished
    assert race.leases.look() == ({}, [])


# What holds a GPU with us


@pytest.fixture
def stray() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start_program(lease: Lease, *, held: bool) -> subprocess.Popen[bytes]:
    grant = lease.grant
    return subprocess.Popen(
        ["sleep", "600"],
        env=os.environ | dict(grant.environment),
        pass_fds=grant.descriptors if held else (),
        start_new_session=True,
    )


def test_a_gpu_is_taken_for_as_long_as_the_program_on_it_lives(
    tmp_path: Path, stray: list[subprocess.Popen[bytes]]
) -> None:
    leases = Leases(host_with(tmp_path, 1))
    lease = leases.acquire(request_for(leases, 1), say=say_nothing)
    stray.append(start_program(lease, held=True))
    lease.release()
    assert leases.try_acquire(request_for(leases, 1), say=say_nothing) is None
    holder = leases.look()[0]["0"]
    assert holder is not None and holder.name == "a training"
    stray[0].kill()
    stray[0].wait()
    again = leases.try_acquire(request_for(leases, 1), say=say_nothing)
    assert again is not None
    again.release()


def test_a_program_that_outlived_all_who_held_its_gpu_is_ended_before_the_next_begins(
    tmp_path: Path, stray: list[subprocess.Popen[bytes]]
) -> None:
    leases = Leases(host_with(tmp_path, 2))
    lease = leases.acquire(request_for(leases, 1), Terms(stop_seconds=5.0), say=say_nothing)
    stray.append(start_program(lease, held=False))
    lease.release()
    said: list[str] = []
    with leases.acquire(request_for(leases, 1), say=said.append):
        assert stray[0].wait(10) == -signal.SIGTERM
    assert f"was killed and left processes [{stray[0].pid}] on the GPU; stopping them" in said[0]


def test_what_goes_on_under_a_lease_is_left_alone_by_who_takes_a_gpu_that_it_gave_back(
    tmp_path: Path, stray: list[subprocess.Popen[bytes]]
) -> None:
    leases = Leases(host_with(tmp_path, 2))
    with leases.acquire(request_for(leases, 2), say=say_nothing) as lease:
        lease.keep(1)
        stray.append(start_program(lease, held=True))
        with leases.acquire(request_for(leases, 1), say=say_nothing):
            assert stray[0].poll() is None


def test_a_holder_of_another_container_is_shown_but_its_process_numbers_are_not_believed(
    tmp_path: Path, stray: list[subprocess.Popen[bytes]]
) -> None:
    leases = Leases(host_with(tmp_path, 1))
    lease = leases.acquire(request_for(leases, 1), say=say_nothing)
    stray.append(start_program(lease, held=False))
    elsewhere = Holder("training", "x", ("0",), lease=lease.holder.lease, host="another")
    lease.holder = elsewhere
    lease.note()
    lease.release()
    assert not elsewhere.is_here and " on another, since " in str(elsewhere)
    with leases.acquire(request_for(leases, 1), say=say_nothing):
        assert stray[0].poll() is None
    assert processes.marked_with(MARK, elsewhere.lease)


def test_a_file_that_several_share_is_free_for_one_alone_when_the_last_has_left(tmp_path: Path) -> None:
    one, two, alone = (held_files.open_file(tmp_path / "file") for _ in range(3))
    assert held_files.take(one, shared=True) and held_files.take(two, shared=True)
    assert not held_files.take(alone)
    held_files.close(one)
    assert not held_files.take(alone)
    held_files.close(two)
    assert held_files.take(alone)
    held_files.close(alone)
