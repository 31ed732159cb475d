"""Supervised programs: ended as a whole and alone, resumed, never two in one folder; what their files and statuses say.

The programs are real processes (`stand_in_program`), and so are the flow processes that are killed around them.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import heartbeats, processes, supervisor
from flows.gpu_devices import Device, GpuHost
from flows.gpu_lease import Leases
from flows.gpu_queue import Request
from flows.training_process import (
    LOCK_FILE,
    LineReader,
    Metrics,
    Program,
    ProgramCrashed,
    ending,
    run_supervised,
)
from schemas.errors import ConfigError, Interrupted, StorageError, TrainingError
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in_program.py")
FLOW = """
import sys
from pathlib import Path
from tests.flows.test_training_process import program_in
from flows.training_process import run_supervised
folder = Path(sys.argv[1])
run_supervised(program_in(folder, stop_seconds=float(sys.argv[2])), watch=lambda: None, report=print)
"""
LEASED_FLOW = """
import dataclasses, sys
from pathlib import Path
from tests.flows.test_training_process import leases_in, program_in, wanted
from flows.training_process import run_supervised
folder = Path(sys.argv[1])
lease = leases_in(folder).acquire(wanted(), say=print)
program = dataclasses.replace(program_in(folder), held=lease.grant.descriptors)
run_supervised(program, watch=lambda: None, report=print)
"""
linux_only = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="marks are read from /proc")


def write_settings(folder: Path, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.yaml").write_text(yaml.safe_dump({"output": str(folder), **settings}), encoding="utf-8")


def program_in(folder: Path, *, stop_seconds: float = 20.0) -> Program:
    command = (sys.executable, str(STAND_IN), "--config", str(folder / "program.yaml"))
    return Program("annealing", command, folder, ROOT, dict(os.environ), stop_seconds)


def run(folder: Path, *, stop_seconds: float = 20.0, watch: Callable[[], None] = lambda: None) -> list[str]:
    """Runs the program of a folder and returns what was reported."""
    said: list[str] = []
    run_supervised(program_in(folder, stop_seconds=stop_seconds), watch=watch, report=said.append)
    return said


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))


def living(folder: Path) -> dict[int, dict[str, str]]:
    return processes.marked_with(supervisor.MARK, str(folder))


def leases_in(folder: Path) -> Leases:
    return Leases(GpuHost(folder / "leases", (Device("0", "0"),)))


def wanted() -> Request:
    return Request("training", "a training", ("0",), 1)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that has nothing to do with the training."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


def flow_process(folder: Path, stop_seconds: float) -> subprocess.Popen[bytes]:
    """Returns a process that runs the program of a folder as a flow does, once the program has taken two steps."""
    process = subprocess.Popen([sys.executable, "-c", FLOW, str(folder), str(stop_seconds)], cwd=ROOT)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= 2)
    return process


def test_a_program_runs_to_its_end_while_it_is_watched(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=4, step_seconds=0.4)
    calls: list[float] = []
    assert run(tmp_path, watch=lambda: calls.append(time.monotonic())) == []
    assert result_of(tmp_path)["steps"] == 4
    assert len(calls) >= 2


def test_a_wrong_setting_comes_back_as_the_programs_own_message(tmp_path: Path) -> None:
    write_settings(tmp_path, lerning_rate=1)
    with pytest.raises(ConfigError, match="annealing: lerning_rate: Extra inputs are not permitted") as caught:
        run(tmp_path)
    assert caught.value.exit_code == 2


def test_a_crash_quotes_the_end_of_the_log_and_the_next_run_goes_on(tmp_path: Path) -> None:
    write_settings(tmp_path, crash_at=2)
    with pytest.raises(ProgramCrashed, match=r"(?s)exit status 1; .*the accelerator fell off the bus"):
        run(tmp_path)
    run(tmp_path)
    assert result_of(tmp_path)["began"] == 2


def test_a_program_that_cannot_be_started_is_a_crash_that_names_it(tmp_path: Path) -> None:
    tmp_path.joinpath("program.yaml").touch()
    program = Program("bpo", ("/no/such/python", "-m", "x"), tmp_path, ROOT, dict(os.environ), 5.0)
    with pytest.raises(ProgramCrashed, match="/no/such/python"):
        run_supervised(program, watch=lambda: None, report=lambda line: None)


@linux_only
def test_whatever_ends_the_wait_stops_the_program_with_a_checkpoint(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    write_settings(tmp_path, num_steps=1000, checkpoint_seconds=1)

    def cancel() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=cancel)
    assert list(tmp_path.glob("checkpoint-*/trainer_state.json"))
    assert living(tmp_path) == {}
    assert stranger.poll() is None


@linux_only
def test_a_program_that_does_not_stop_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=1000, ignore_signals=True)

    def cancel() -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_seconds=2, watch=cancel)
    assert time.monotonic() - began < 15
    assert living(tmp_path) == {}
    assert "did not end within 2 s and was killed" in (tmp_path / "program.log").read_text(encoding="utf-8")


@linux_only
def test_children_in_other_sessions_end_with_the_program(tmp_path: Path) -> None:
    write_settings(tmp_path, child_seconds=600)
    run(tmp_path)
    child = int((tmp_path / "child.pid").read_text(encoding="utf-8"))
    assert processes.start_time(child) is None


@linux_only
def test_a_program_whose_flow_was_killed_writes_a_checkpoint_and_ends(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    write_settings(tmp_path, num_steps=1000, checkpoint_seconds=1, child_seconds=600)
    flow = flow_process(tmp_path, stop_seconds=20)
    flow.kill()
    flow.wait()
    wait_for(lambda: not living(tmp_path))
    assert list(tmp_path.glob("checkpoint-*/trainer_state.json"))
    assert stranger.poll() is None


@linux_only
def test_a_new_run_waits_for_what_a_killed_one_left_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=60, checkpoint_seconds=3)
    flow = flow_process(tmp_path, stop_seconds=20)
    flow.kill()
    flow.wait()
    said = run(tmp_path)
    assert "a run that was killed left annealing behind; stopping it, with time for a checkpoint" in said
    assert result_of(tmp_path)["began"] >= 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(set(steps)), "two programs at once would have taken steps twice"


@linux_only
def test_a_program_that_lost_its_flow_and_its_supervisor_is_stopped_before_the_next_begins(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=60)
    flow = flow_process(tmp_path, stop_seconds=20)
    watching = [pid for pid in living(tmp_path) if b"flows.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in [flow.pid, *watching]:
        os.kill(pid, signal.SIGKILL)
    flow.wait()
    assert len(watching) == 1
    assert living(tmp_path), "the program itself lives on"
    run(tmp_path)
    assert result_of(tmp_path)["began"] >= 2


@linux_only
def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=1000)
    flow = flow_process(tmp_path, stop_seconds=20)
    with pytest.raises(TrainingError, match=f"process {flow.pid} is at work in"):
        run(tmp_path)
    assert flow.poll() is None
    assert len(living(tmp_path)) == 2
    flow.terminate()
    flow.wait()
    wait_for(lambda: not living(tmp_path))


def test_a_run_in_the_place_of_one_on_another_host_asks_it_to_make_way_and_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "is_restart", lambda: True)
    write_settings(tmp_path, num_steps=2)
    asked = tmp_path / heartbeats.WANTED_FILE
    with (tmp_path / LOCK_FILE).open("w") as lock, ThreadPoolExecutor(1) as thread:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"host": "elsewhere", "pid": 1, "started": "then"}))
        lock.flush()
        said = thread.submit(run, tmp_path)
        wait_for(asked.exists)
        before = asked.read_text()
        wait_for(lambda: asked.read_text() != before)
        assert not (tmp_path / "metrics.jsonl").exists(), "two programs would write to one folder"
        lock.close()
        lines = said.result()
    assert lines.count(f"process 1 of elsewhere is at work in {tmp_path}; waiting for its end") == 1
    assert result_of(tmp_path)


@linux_only
def test_a_supervisor_that_is_told_to_stop_reports_an_interruption(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=1000)

    def stop_it() -> None:
        for pid in living(tmp_path):
            if b"flows.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)

    with pytest.raises(Interrupted, match="Run it again to go on"):
        run(tmp_path, watch=stop_it)


@pytest.mark.parametrize(
    ("status", "log", "kind", "said"),
    [
        (75, "x\nerror: stopped by a signal", Interrupted, "Run it again"),
        (6, "noise\nerror: cannot write: disk full", StorageError, "annealing: cannot write: disk full"),
        (8, "noise\nerror: the loss is nan", TrainingError, "annealing: the loss is nan"),
        (137, "step 3", ProgramCrashed, r"was killed; run again"),
        (1, "Traceback\nValueError: odd", ProgramCrashed, r"(?s)exit status 1.*ValueError: odd"),
        (1, "a\nerror: model: Field required\n  exitcode  : 2 (pid: 7)", ConfigError, "model: Field required"),
        (1, "b\n  exitcode  : 75 (pid: 7)", Interrupted, "Run it again"),
        (1, "b\n  exitcode  : -9 (pid: 7)", ProgramCrashed, "was killed"),
    ],
)
def test_an_exit_status_is_named_also_behind_torchrun(
    tmp_path: Path, status: int, log: str, kind: type[Exception], said: str
) -> None:
    error = ending(program_in(tmp_path), status, log)
    assert type(error) is kind
    with pytest.raises(kind, match=said):
        raise error


def test_lines_are_read_once_whole_and_from_where_the_reader_began(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n", encoding="utf-8")
    reader = LineReader(path)
    assert reader.new_lines() == []
    with path.open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert reader.new_lines() == ["one"]
        file.write(b"o\r 50%\r\n\n\xff\n")
    assert reader.new_lines() == ["two", " 50%", "�"]
    assert reader.new_lines() == []


def test_a_missing_file_has_no_lines_yet(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "later")
    assert reader.new_lines() == []
    (tmp_path / "later").write_text("first\n", encoding="utf-8")
    assert reader.new_lines() == ["first"]


def test_metrics_show_the_newest_values_the_progress_and_the_time_left() -> None:
    metrics = Metrics()
    metrics.add('{"step": 10, "num_steps": 40, "seconds": 5.0, "loss": 2.0, "reward": 0.25}')
    assert metrics.seconds_left is None
    metrics.add('{"step": 20, "num_steps": 40, "seconds": 10.0, "loss": 1.0}')
    assert (metrics.percent, metrics.seconds_left) == (50.0, 10.0)
    assert metrics.table() == [
        {"metric": "loss", "value": 1.0, "step": 20},
        {"metric": "reward", "value": 0.25, "step": 10},
    ]
    assert metrics.line() == "step 20 of 40, loss 1, reward 0.25, about 10 s left"


def test_odd_metrics_are_counted_or_shown_as_text() -> None:
    metrics = Metrics()
    for line in ("not json", "[1]", '{"step": 1, "num_steps": 0, "loss": NaN, "note": "x", "is_last": true}'):
        metrics.add(line)
    assert metrics.num_unreadable == 2
    assert metrics.percent == 0.0
    assert metrics.table() == [{"metric": "loss", "value": "nan", "step": 1}]


@linux_only
def test_the_gpu_of_a_killed_flow_is_free_when_its_program_has_written_a_checkpoint(tmp_path: Path) -> None:
    write_settings(tmp_path, num_steps=10_000, checkpoint_seconds=2.0)
    leases = leases_in(tmp_path)
    flow = subprocess.Popen([sys.executable, "-c", LEASED_FLOW, str(tmp_path)], cwd=ROOT)
    wait_for((tmp_path / "metrics.jsonl").exists)
    flow.kill()
    flow.wait()
    assert leases.try_acquire(wanted(), say=print) is None
    assert not list(tmp_path.glob("checkpoint-*"))
    with leases.acquire(wanted(), say=print):
        assert len(list(tmp_path.glob("checkpoint-*"))) == 1
        assert living(tmp_path) == {}
