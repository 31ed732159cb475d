"""The flow `train`: what runs, what is not repeated, what starts it, and how it ends; on real servers of Prefect.

Programs are real processes that keep the contract of `training.programs` (`stand_in_program`), but for one test, which
anneals a small model with the GPU-side environment.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from corpus.keeping import collect_versions
from flows import processes, stack, supervisor
from flows.cli import app
from flows.gpu_devices import GpuHost
from flows.gpu_lease import GpusTaken, Leases
from flows.gpu_queue import Request
from flows.stack_teacher import StackTeacher
from flows.train import ProgramView, train
from flows.training_plan import (
    TRAINED_FILE,
    TrainingPlan,
    keep_version,
    launch_command,
    load_training,
    plan_training,
    program_environment,
)
from flows.training_process import Program
from schemas.config import RunConfig
from schemas.errors import ConfigError, CorpusError
from schemas.training_config import TrainingConfig, load_training_config
from tests.flows.small_corpus import write_version
from tests.teacher.test_serving import Stand
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in_program.py")
GPU_PYTHON = ROOT / ".venv-gpu" / "bin" / "python"


def make_home(home: Path) -> Path:
    """Makes a project folder whose training programs are stand-ins."""
    (home / "training").mkdir()
    (home / "training" / "__init__.py").touch()
    for program in ("annealing", "bpo", "evaluate"):
        shutil.copy(STAND_IN, home / "training" / f"{program}.py")
    (home / "base").mkdir()
    (home / "base" / "config.json").write_text("{}", encoding="utf-8")
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    monkeypatch.setenv("BIMODE_GPU_PYTHON", sys.executable)
    return make_home(tmp_path)


@pytest.fixture
def gpus(home: Path, monkeypatch: pytest.MonkeyPatch) -> Leases:
    """The leases of three stand-in GPUs; `torchrun` is a stand-in too, which starts one process."""
    build = {"distribution": "vllm", "version": "0.32.0", "flags": []}
    monkeypatch.setenv("BIMODE_GPUS", "4,5,6")
    monkeypatch.setenv("BIMODE_GPU_LEASES", str(home / "leases"))
    monkeypatch.setenv("BIMODE_TEST_STAND", str(home))
    monkeypatch.setenv("FAKE_BUILD", json.dumps(build))
    launcher = home / "torch" / "distributed" / "run.py"
    launcher.parent.mkdir(parents=True)
    for folder in (launcher.parent, launcher.parent.parent):
        (folder / "__init__.py").touch()
    launcher.write_text(
        "import runpy, sys\n"
        "begin = sys.argv.index('-m')\n"
        "sys.argv = sys.argv[begin + 1 :]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    return Leases(GpuHost.here(home))


def write_config(home: Path, **settings: Any) -> str:
    """Writes a training configuration of all three programs, but for what is given, and returns its path."""
    config: dict[str, Any] = {
        "name": "tiny",
        "model": "base",
        "corpus": "corpus",
        "output": "runs",
        "annealing": {},
        "bpo": {},
        "evaluate": {"benchmarks": [{"name": "b", "path": "x"}]},
        "retry_delay_seconds": 0,
        **settings,
    }
    (home / "sampleworld").mkdir(exist_ok=True)
    path = home / "sampleworld" / "train.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value != "absent"}), "utf-8")
    return str(path)


def plan(config: str, **choices: Any) -> TrainingPlan:
    return plan_training(load_training(config), **choices)


def folders_of(result: dict[str, Any]) -> dict[str, Path]:
    return {program["program"]: Path(program["folder"]) for program in result["programs"]}


def began_at(folder: Path) -> int:
    return int(json.loads((folder / "result.json").read_text(encoding="utf-8"))["began"])


# The configuration and the plan


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"annealing": "absent", "bpo": "absent", "evaluate": "absent"},
            "none of the sections annealing, bpo, evaluate",
        ),
        ({"bpo": {"output": "here"}}, "bpo: Value error, output of a program follows from what it is made from"),
        ({"launch": {"num_processes": 2}}, "kind: python starts one process"),
        ({"trigger": {"min_rows": 1}}, "trigger.min_rows: Extra inputs are not permitted"),
        ({"stop_seconds": 0}, r"stop_seconds: .*greater than 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_by_name(home: Path, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_training_config(write_config(home, **settings))


def test_a_missing_configuration_is_a_clear_error(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the training configuration .*none\.yaml"):
        load_training("none.yaml")


def test_a_section_with_nothing_behind_it_runs_and_a_missing_one_does_not(home: Path) -> None:
    assert load_training_config(write_config(home, bpo="absent", annealing=None)).programs == ("annealing", "evaluate")


def test_each_program_starts_from_the_one_before(home: Path) -> None:
    version, _ = write_version(home / "corpus", 4)
    annealing, bpo, evaluate = plan(write_config(home)).steps
    assert annealing.settings["model"] == str(home / "base")
    assert annealing.settings["corpus"] == [f"{version}/data/*/*.parquet"]
    assert bpo.settings["model"] == str(annealing.folder / "model")
    assert evaluate.settings["model"] == str(bpo.folder / "model")
    assert "corpus" not in evaluate.settings
    assert [step.settings["output"] for step in (annealing, bpo)] == [str(annealing.folder), str(bpo.folder)]


def test_an_endpoint_is_asked_for_the_model_that_the_section_names(home: Path) -> None:
    write_version(home / "corpus", 4)
    evaluate = plan(write_config(home, evaluate={"url": "http://gpu-1/v1", "model": "served"})).steps[-1]
    assert evaluate.settings == {"url": "http://gpu-1/v1", "model": "served", "output": str(evaluate.folder)}


def test_a_folder_is_named_by_all_that_shapes_its_result_and_nothing_else(home: Path) -> None:
    def names(**settings: Any) -> list[str]:
        return [step.folder.name for step in plan(write_config(home, **settings)).steps]

    write_version(home / "corpus", 4)
    before = names(bpo={"num_steps": 3, "seed": 1})
    assert names(bpo={"seed": 1, "num_steps": 3}, stop_seconds=5, trigger={"min_new_rows": 3}) == before
    changed = names(bpo={"num_steps": 4, "seed": 1})
    assert (changed[0], changed[1] != before[1], changed[2] != before[2]) == (before[0], True, True)
    (home / "base" / "config.json").write_text('{"hidden": 4}', encoding="utf-8")
    assert not set(names(bpo={"num_steps": 3, "seed": 1})) & set(before), "another base model is another result"
    (home / "x").write_text("a benchmark", encoding="utf-8")
    with_file = names()
    (home / "x").write_text("another benchmark", encoding="utf-8")
    assert [a == b for a, b in zip(names(), with_file, strict=True)] == [True, True, False]


def test_without_a_finished_corpus_nothing_can_be_trained(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"no finished corpus version in .*corpus: run `bimode curate` first"):
        plan(write_config(home))


def test_the_newest_version_counts_unless_one_is_named(home: Path) -> None:
    first, _ = write_version(home / "corpus", 4)
    second, _ = write_version(home / "corpus", 5)
    assert plan(write_config(home)).corpus == second
    assert plan(write_config(home), corpus=str(first)).corpus == first


def test_a_program_alone_needs_the_one_before(home: Path) -> None:
    write_version(home / "corpus", 4)
    with pytest.raises(ConfigError, match="annealing has not finished on corpus v0001"):
        plan(write_config(home), only="bpo")
    assert plan(write_config(home, bpo={"model": "base"}), only="bpo").selected[0].settings["model"] == "base"


def test_launchers_get_argument_lists_and_evaluation_is_one_plain_process(home: Path) -> None:
    def command(program: Any, **launch: Any) -> list[str]:
        config = TrainingConfig.model_validate({"model": "m", "corpus": "c", "bpo": {}, "launch": launch})
        return launch_command(program, config, python="py", path=Path("a b.yaml"))

    assert command("bpo") == ["py", "-m", "training.bpo", "--config", "a b.yaml"]
    assert command("bpo", kind="torchrun", num_processes=2)[1:6] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ]
    accelerate = command("annealing", kind="accelerate", num_processes=2, arguments=["--config_file", "fsdp.yaml"])
    assert accelerate[3:9] == ["--num_processes", "2", "--config_file", "fsdp.yaml", "-m", "training.annealing"]
    assert command("evaluate", kind="torchrun", num_processes=2) == command("evaluate")


def test_keys_of_prefect_do_not_reach_the_programs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "run")
    write_version(home / "corpus", 4)
    environment = program_environment(plan(write_config(home)).config, sys.executable)
    assert not [name for name in environment if name.startswith("PREFECT")]
    assert environment["HF_HUB_OFFLINE"] == "1", "the base model is a folder"


def test_a_python_that_does_not_run_is_named(home: Path) -> None:
    write_version(home / "corpus", 4)
    with pytest.raises(ConfigError, match=r"'/no/python' cannot be run .*BIMODE_GPU_PYTHON"):
        program_environment(plan(write_config(home)).config, "/no/python")


# New rows


def test_new_rows_of_small_nights_add_up_until_a_version_is_trained_on(home: Path) -> None:
    config = write_config(home)
    write_version(home / "corpus", 4)
    assert plan(config).num_new_rows == 4
    plan(config).record_trained()
    assert plan(config).num_new_rows == 0
    for num_rows in (6, 9):
        write_version(home / "corpus", num_rows)
    assert plan(config).num_new_rows == 5


def test_a_version_is_kept_from_removal_until_the_programs_that_train_on_it_have_finished(home: Path) -> None:
    write_version(home / "corpus", 4)
    made = plan(write_config(home))
    keep_version(made)
    write_version(home / "corpus", 9)
    assert collect_versions(home / "corpus", keep=1, is_dry=True).removed == ()
    for step in made.selected:
        assert collect_versions(home / "corpus", keep=1, is_dry=True).removed == ()
        step.folder.mkdir(parents=True)
        (step.folder / "result.json").write_text("{}", encoding="utf-8")
    assert collect_versions(home / "corpus", keep=1).removed == (made.corpus.name,)


def test_every_row_of_another_recipe_or_corpus_is_new(home: Path) -> None:
    config = write_config(home)
    write_version(home / "corpus", 4)
    plan(config).record_trained()
    write_version(home / "corpus", 4, recipe="recipe-2")
    assert plan(config).num_new_rows == 4


def test_a_damaged_record_of_the_last_training_is_a_clear_error(home: Path) -> None:
    write_version(home / "corpus", 4)
    (home / "runs").mkdir()
    (home / "runs" / TRAINED_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trained\.json is damaged .*delete it"):
        plan(write_config(home))


# The flow, on a server in this process


@pytest.mark.usefixtures("prefect")
class TestFlow:
    def test_a_run_leaves_models_an_evaluation_and_artifacts_and_is_not_repeated(self, home: Path) -> None:
        from prefect.artifacts import Artifact

        write_version(home / "corpus", 4)
        config = write_config(home)
        folders = folders_of(train(config))
        assert list(folders) == ["annealing", "bpo", "evaluate"]
        assert "| auto | 0.75 |" in Artifact.get("evaluation").data
        assert Artifact.get("progress-bpo").data == 100.0
        metrics = {row["metric"]: row["value"] for row in json.loads(Artifact.get("metrics-annealing").data)}
        assert metrics == {"loss": pytest.approx(1 / 3), "reward": 0.5}
        assert json.loads((home / "runs" / TRAINED_FILE).read_text(encoding="utf-8"))["version"] == "v0001"
        stamps = {name: (folder / "program.log").stat().st_mtime_ns for name, folder in folders.items()}
        assert folders_of(train(config)) == folders
        assert {name: (folder / "program.log").stat().st_mtime_ns for name, folder in folders.items()} == stamps

    def test_a_wrong_setting_is_the_programs_own_message_and_nothing_runs_after_it(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        with pytest.raises(ConfigError, match="annealing: lerning_rate: Extra inputs"):
            train(write_config(home, annealing={"lerning_rate": 1}))
        assert [path.name.split("-")[0] for path in (home / "runs").iterdir()] == ["annealing"]

    def test_a_wrong_setting_of_a_later_program_shows_before_the_first_begins(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        with pytest.raises(ConfigError, match="bpo: bta: Extra inputs"):
            train(write_config(home, bpo={"bta": 1}))
        assert not list((home / "runs").glob("annealing-*/metrics.jsonl"))

    def test_a_crashed_program_is_started_again_and_goes_on_from_its_checkpoint(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        folders = folders_of(train(write_config(home, bpo={"crash_at": 2})))
        assert (began_at(folders["annealing"]), began_at(folders["bpo"])) == (0, 2)

    def test_a_program_that_crashes_too_often_quotes_its_log(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        with pytest.raises(Exception, match=r"(?s)bpo failed with exit status 1.*fell off the bus"):
            train(write_config(home, bpo={"crash_at": 2}, retries=0))

    def test_a_stopped_program_is_an_interruption_and_the_next_run_goes_on(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        config = write_config(home, annealing={"num_steps": 60})
        folder = plan(config).steps[0].folder

        def stop_the_supervisor() -> None:
            wait_for(lambda: steps_taken(folder))
            for pid in processes.marked_with(supervisor.MARK, str(folder)):
                if b"flows.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)

        thread = Thread(target=stop_the_supervisor)
        thread.start()
        state = train(config, return_state=True)
        thread.join()
        assert (state.name, state.type.value) == ("Interrupted", "CANCELLED")
        assert "Run it again to go on" in state.message
        assert began_at(folders_of(train(config))["annealing"]) >= 1

    def test_too_few_new_rows_start_nothing_and_say_so(self, home: Path) -> None:
        version, _ = write_version(home / "corpus", 4)
        config = write_config(home, trigger={"min_new_rows": 5})
        state = train(config, announced=str(version), return_state=True)
        assert state.is_completed()
        assert state.message.startswith("4 new rows since the beginning, fewer than trigger.min_new_rows = 5")
        assert not (home / "runs").exists()
        version, _ = write_version(home / "corpus", 5)
        assert train(config, announced=str(version))["trained"]

    def test_the_version_of_another_corpus_starts_nothing(self, home: Path) -> None:
        write_version(home / "corpus", 4)
        other, _ = write_version(home / "other", 4)
        state = train(write_config(home, trigger={"min_new_rows": 0}), announced=str(other), return_state=True)
        assert "is not of the corpus that this configuration trains on" in state.message
        assert not (home / "runs").exists()

    def test_a_damaged_corpus_is_refused_before_anything_is_started(self, home: Path) -> None:
        version, _ = write_version(home / "corpus", 4)
        next(version.rglob("*.parquet")).write_bytes(b"damaged")
        with pytest.raises(CorpusError, match="is damaged"):
            train(write_config(home))
        assert not (home / "runs").exists()

    def test_programs_see_the_gpus_of_their_lease_and_what_they_leave_is_given_back(self, gpus: Leases) -> None:
        home = Path(os.environ["BIMODE_HOME"])
        write_version(home / "corpus", 4)
        config = write_config(home, launch={"kind": "torchrun", "num_processes": 2})
        with gpus.acquire(Request("training", "another", ("4",), 1), say=lambda line: None):
            folders = folders_of(train(config))
        seen = {program: json.loads((folder / "result.json").read_text()) for program, folder in folders.items()}
        assert {program: result["gpus"] for program, result in seen.items()} == {
            "annealing": "5,6",
            "bpo": "5,6",
            "evaluate": "5",
        }
        assert gpus.look() == ({}, [])

    def test_more_processes_than_gpus_are_refused(self, gpus: Leases) -> None:
        home = Path(os.environ["BIMODE_HOME"])
        write_version(home / "corpus", 4)
        with pytest.raises(ConfigError, match=r"tiny, flow run .* asks for 4 GPUs, and this worker has 3"):
            train(write_config(home, launch={"kind": "torchrun", "num_processes": 4}))
        assert gpus.look() == ({}, [])

    def test_the_teacher_gives_way_to_training(self, gpus: Leases) -> None:
        home = Path(os.environ["BIMODE_HOME"])
        write_version(home / "corpus", 4)
        stand = Stand(home)
        source = {"name": "rows", "format": "jsonl", "path": "rows.jsonl"}
        serve = stand.serve.model_dump() | {"data_parallel_size": 3}
        teacher = stand.endpoint.model_dump()
        run = RunConfig.model_validate({"name": "tiny", "sources": [source], "teacher": teacher, "serve": serve})
        stack_teacher = StackTeacher(home, lambda: dict(os.environ))
        stack_teacher.ensure(run, lambda line: None)
        with pytest.raises(GpusTaken, match=r"held by the serving of the teacher .* set release_teacher: true"):
            train(write_config(home, bpo="absent", release_teacher=False))
        assert gpus.server_at(stand.endpoint.url) is not None
        asked = {"benchmarks": [{"name": "b", "path": "x"}], "url": stand.endpoint.url}
        train(write_config(home, annealing="absent", bpo="absent", evaluate=asked, release_teacher=False))
        assert gpus.server_at(stand.endpoint.url) is not None, "what asks an endpoint takes no GPU"
        train(write_config(home, bpo="absent", restart_teacher=False))
        assert gpus.look() == ({}, [])
        assert stand.processes() == []

    def test_the_command_line_runs_the_flow_and_a_dry_run_only_says_what_it_would_do(self, home: Path) -> None:
        version, _ = write_version(home / "corpus", 4)
        config = write_config(home)
        dry = CliRunner().invoke(app, ["train", "--config", config, "--dry-run"])
        assert dry.exit_code == 0
        assert f"corpus    {version} (4 rows, 2 of them thinking)" in dry.output
        assert "annealing new: " in dry.output
        assert not (home / "runs").exists()
        done = CliRunner().invoke(app, ["train", "--config", config, "--only", "annealing", "--json"])
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout[done.stdout.index("{\n") :])
        assert [program["program"] for program in record["programs"]] == ["annealing"]
        wrong = CliRunner().invoke(app, ["train", "--config", config, "--only", "sft"])
        assert wrong.exit_code == 2


def test_a_server_that_does_not_answer_costs_a_picture_and_not_the_training(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        del arguments, named
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr("flows.train._SHOW_SECONDS", 0.0)
    monkeypatch.setattr("flows.train.create_progress_artifact", refuse)
    program = Program("bpo", (), home, home, {}, 1.0)
    with caplog.at_level(logging.INFO):
        view = ProgramView(program, logging.getLogger("tests"))
        (home / "metrics.jsonl").write_text('{"step": 1, "num_steps": 2, "loss": 1.0}\n', encoding="utf-8")
        (home / "program.log").write_text("line\n" * 60, encoding="utf-8")
        view.update()
    said = [record.getMessage() for record in caplog.records if record.name == "tests"]
    assert said[:50] == ["line"] * 50
    assert said[50] == f"... 10 more lines in {home / 'program.log'}"
    assert said[51] == "Prefect's server did not take the progress of bpo: connection refused"
    assert view.metrics.percent == 50.0


# The deployments of the project, on a real server with a real worker


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a real stack with the project's own `prefect.yaml`; its programs are stand-ins."""
    home = make_home(tmp_path_factory.mktemp("stack"))
    shutil.copy(ROOT / "prefect.yaml", home)
    (home / "curate.yaml").write_text(
        "name: tiny\nsources: [{name: rows, format: jsonl, path: rows.jsonl}]\n", encoding="utf-8"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / ".local").mkdir()
    (home / ".local" / "api_url").write_text(f"http://127.0.0.1:{port}/api", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIMODE_HOME", str(home))
        patch.setenv("BIMODE_GPU_PYTHON", sys.executable)
        stack.up(Path("curate.yaml"), report=lambda line: None)
        yield home
        stack.down(lambda line: None)


def call(method: str, path: str, body: Any = None) -> Any:
    """Returns what Prefect's server replies. A busy one (503, its database is locked) is asked again for a minute."""
    for _ in range(60):
        reply = httpx.request(method, stack.status().api_url + path, json=body, timeout=60, trust_env=False)
        if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    reply.raise_for_status()
    return reply.json() if reply.content else None


def start_run(deployment: str, **parameters: Any) -> str:
    found = call("GET", f"/deployments/name/train/{deployment}")
    body = {"parameters": {**found["parameters"], **parameters}, "state": {"type": "SCHEDULED"}}
    return str(call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])


def state_of(run_id: str) -> dict[str, Any]:
    return dict(call("GET", f"/flow_runs/{run_id}")["state"])


def wait_for_state(run_id: str, *types: str) -> dict[str, Any]:
    def reached() -> dict[str, Any] | None:
        state = state_of(run_id)
        return state if state["type"] in types else None

    found: dict[str, Any] = wait_for(reached)
    return found


def steps_taken(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_the_pool_runs_one_thing_at_a_time(running: Path) -> None:
    assert call("GET", f"/work_pools/{stack.POOL}")["concurrency_limit"] == 1


@pytest.mark.slow
def test_a_new_corpus_starts_training_once_a_person_has_approved(running: Path) -> None:
    config = write_config(running, trigger={"approval": True, "min_new_rows": 4})
    version, _ = write_version(running / "corpus", 4)
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "bimode.corpus.created",
        "resource": {"prefect.resource.id": "bimode.corpus.sampleworld"},
        "payload": {"corpus": str(version), "address": str(version)},
        "id": "0b8f1f3e-4c0c-4f6e-9d8e-0e5a6f0f7a11",
    }
    call("POST", "/events", [event])
    [run] = wait_for(
        lambda: call("POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})
    )
    assert run["parameters"]["announced"] == str(version)
    assert not list((running / "runs").glob("annealing-*")), "nothing runs before the answer"
    wait_for(lambda: not stack._flow_runs(stack._Folder(running)))
    call("POST", f"/flow_runs/{run['id']}/resume", {"run_input": {"approve": True, "note": "go"}})
    assert wait_for_state(run["id"], "COMPLETED", "FAILED", "CRASHED")["type"] == "COMPLETED"
    assert all(step.result() for step in plan(config).steps)
    answer = json.loads((running / "runs" / "approvals.jsonl").read_text(encoding="utf-8"))
    assert (answer["version"], answer["approve"], answer["note"]) == (version.name, True, "go")


@pytest.mark.slow
def test_a_refusal_is_recorded_and_takes_no_gpu(running: Path) -> None:
    write_config(running, trigger={"approval": True, "min_new_rows": 1}, annealing={"num_steps": 5})
    version, manifest = write_version(running / "corpus", 7)
    run_id = start_run("bimode", announced=str(version))
    wait_for_state(run_id, "PAUSED")
    call("POST", f"/flow_runs/{run_id}/resume", {"run_input": {"approve": False, "note": "not today"}})
    state = wait_for_state(run_id, "COMPLETED", "FAILED", "CRASHED")
    assert state["type"] == "COMPLETED"
    assert state["message"] == f"training on version {manifest.version} was refused: not today"


@pytest.mark.slow
def test_a_cancelled_run_has_more_time_for_its_checkpoint_than_prefect_gives_and_the_next_goes_on(
    running: Path,
) -> None:
    # Prefect kills the flow's process 30 seconds after it asked it to end.
    config = write_config(running, annealing={"num_steps": 1000, "checkpoint_seconds": 33}, stop_seconds=60)
    write_version(running / "corpus", 8)
    folder = plan(config).steps[0].folder
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        run_id = start_run("annealing")
        wait_for(lambda: steps_taken(folder) > 3)
        call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        wait_for_state(run_id, "CANCELLED")
        wait_for(lambda: not processes.marked_with(supervisor.MARK, str(folder)))
        assert stranger.poll() is None
        stranger.kill()
    [checkpoint] = folder.glob("checkpoint-*")
    again = start_run("annealing")
    wait_for(lambda: f"beginning after step {checkpoint.name.split('-')[1]}" in (folder / "program.log").read_text())
    stack.down(lambda line: None)
    assert processes.marked_with(supervisor.MARK, str(folder)) == {}
    assert len(list(folder.glob("checkpoint-*"))) == 2, "`bimode down` waits for a checkpoint too"
    stack.up(Path("curate.yaml"), report=lambda line: None)
    assert wait_for_state(again, "CRASHED", "FAILED", "CANCELLED")


# One real program


@pytest.mark.slow
@pytest.mark.usefixtures("prefect")
@pytest.mark.skipif(not GPU_PYTHON.exists(), reason="no GPU-side environment: run `make env-gpu`")
def test_a_small_model_is_annealed_by_the_real_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_HOME", str(ROOT))
    monkeypatch.setenv("BIMODE_GPU_PYTHON", str(GPU_PYTHON))
    write_version(tmp_path / "corpus", 8)
    settings = {"max_steps": 2, "batch_size": 2, "log_steps": 1}
    config = write_config(
        tmp_path,
        model=str(ROOT / "sampleworld" / "teacher"),
        corpus=str(tmp_path / "corpus"),
        output=str(tmp_path / "runs"),
        annealing=settings,
        bpo="absent",
        evaluate="absent",
        release_teacher=False,
    )
    folder = folders_of(train(config))["annealing"]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (result["program"], result["steps"]) == ("annealing", 2)
    assert (folder / "model" / "model.safetensors").stat().st_size > 0
    wrong = write_config(tmp_path, **{**yaml.safe_load(Path(config).read_text()), "annealing": {"max_stepps": 2}})
    with pytest.raises(ConfigError, match=r"(?s)annealing: .*max_stepps: Extra inputs are not permitted"):
        train(wrong)
