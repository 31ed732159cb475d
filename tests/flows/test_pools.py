"""The kinds of the work pool: what their jobs are, by Prefect's own workers and Kubernetes' own schemas; who is served
first, on a real server with real workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from docker.models.containers import _create_container_args
from docker.types import HostConfig
from kubernetes_validate import validate
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Scheduled
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from typer.testing import CliRunner

from flows import pools
from flows.commands import pool
from flows.gpu_devices import GpuHost
from flows.gpu_lease import Leases
from flows.gpu_queue import PRIORITIES, Request
from flows.pool_creation import create_pool
from flows.pools import POOL_KINDS, PoolKind, base_job_template
from schemas.errors import ConfigError

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.31"


def manifest_of(**variables: Any) -> dict[str, Any]:
    """Returns the job that a Kubernetes worker would create for a run with these job variables."""

    async def render() -> Any:
        template = base_job_template("kubernetes")
        configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template, variables)
        configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a run", state=Scheduled()))
        return configuration

    return dict(asyncio.run(render()).job_manifest)


@pytest.mark.parametrize("kind", POOL_KINDS)
def test_what_is_committed_is_what_the_installed_prefect_makes(kind: PoolKind) -> None:
    committed = (ROOT / "deploy" / "pools" / f"{kind}.json").read_text(encoding="utf-8")
    made = pools.template_text(base_job_template(kind))
    assert committed == made, f"write it anew: bimode pool template --type {kind} > deploy/pools/{kind}.json"


@pytest.mark.parametrize(
    ("kind", "choices", "said"),
    [
        ("process", {"image": "x"}, "a process has no image"),
        ("docker", {"gpus": 2}, "--gpus is for kubernetes"),
        ("process", {"secrets": {"KEY": "sk-Secret!"}}, "named like BIMODE_API_KEY=teacher-key; its value does not"),
        ("kubernetes", {"secrets": {"KEY": "sk"}}, "named like BIMODE_API_KEY=teacher/key"),
        ("docker", {"secrets": {"NO NAME": "key"}}, "named like"),
    ],
)
def test_a_setting_that_does_not_fit_the_kind_is_refused(kind: PoolKind, choices: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        base_job_template(kind, **choices)


def test_a_kind_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_kubernetes.worker", None)
    with pytest.raises(ConfigError, match="a pool of kind kubernetes needs the package prefect-kubernetes"):
        base_job_template("kubernetes")


# Kubernetes


@pytest.mark.usefixtures("prefect")
def test_a_job_on_kubernetes_is_valid_and_has_gpus_image_volumes_and_secrets_by_reference() -> None:
    job = manifest_of(gpus=4, env={"BIMODE_GPU_PRIORITY": "urgent"}, memory_limit="256Gi")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == pools.IMAGE
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "256Gi"}
    assert container["resources"]["requests"] == {"nvidia.com/gpu": 4}
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"][:2]}
    assert claims == {"runs": "runs", "models": "models"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["BIMODE_GPU_PRIORITY"]["value"] == "urgent"
    assert environment["BIMODE_API_KEY"] == {
        "name": "BIMODE_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "teacher", "key": "key", "optional": True}},
    }
    assert job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "worker"
    assert pod["terminationGracePeriodSeconds"] == pools.STOP_SECONDS
    assert "priorityClassName" not in pod and "nodeSelector" not in pod
    # Prefect insists on these two, which Kubernetes does not know in a pod.
    assert (pod.pop("completions"), pod.pop("parallelism")) == (1, 1)
    validate(job, KUBERNETES, strict=True)


@pytest.mark.usefixtures("prefect")
def test_a_job_on_kubernetes_runs_without_rights() -> None:
    pod = manifest_of()["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.usefixtures("prefect")
def test_a_job_on_kubernetes_may_be_placed_and_ranked() -> None:
    job = manifest_of(priority_class="night", node_selector={"nvidia.com/gpu.product": "H100"}, runs_claim="mine")
    pod = job["spec"]["template"]["spec"]
    assert (pod["priorityClassName"], pod["nodeSelector"]) == ("night", {"nvidia.com/gpu.product": "H100"})
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"


# Docker and processes


@pytest.mark.usefixtures("prefect")
def test_a_container_has_all_gpus_the_volumes_and_the_folder_of_leases() -> None:
    async def settings() -> dict[str, Any]:
        template = base_job_template("docker", image="mine:1")
        configuration = await DockerWorkerJobConfiguration.from_template_and_values(template, {})
        configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a run", state=Scheduled()))
        engine: Any = SimpleNamespace(version=lambda: {"Version": "28.0.0"})  # all that is asked of it
        return dict(DockerWorker(work_pool_name="gpu")._build_container_settings(engine, configuration))

    made = asyncio.run(settings())
    assert made["image"] == "mine:1"
    # As the client of Docker would send it.
    sent = _create_container_args({**made, "version": "1.43"})
    host: HostConfig = sent["host_config"]
    assert host["DeviceRequests"][0]["Count"] == -1
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert (host["CapDrop"], host["ReadonlyRootfs"], host["ShmSize"]) == (["ALL"], True, 8 * 2**30)
    assert {"/run/lock:/run/lock", "bimode_models:/models"} <= set(host["Binds"])


@pytest.mark.usefixtures("prefect")
def test_a_secret_of_a_process_pool_is_a_block_that_the_worker_looks_up() -> None:
    Secret(value="planted").save("teacher-key", overwrite=True)
    template = base_job_template("process", secrets={"BIMODE_API_KEY": "teacher-key"})
    assert "planted" not in json.dumps(template)

    async def environment() -> dict[str, str | None]:
        configuration = await ProcessJobConfiguration.from_template_and_values(template, {"env": {"MORE": "1"}})
        return dict(configuration.env)

    assert asyncio.run(environment()) == {"BIMODE_API_KEY": "planted", "MORE": "1"}


# A real server


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("kind", POOL_KINDS)
def test_a_server_takes_each_kind_with_its_queues_and_checks_what_a_deployment_asks_for(kind: PoolKind) -> None:
    name = f"gpu-{kind}"
    assert create_pool(name, kind, base_job_template(kind), limit=3)
    assert not create_pool(name, kind, base_job_template(kind, secrets={}), limit=None)
    with get_client(sync_client=True) as client:
        found = client.read_work_pool(name)
        assert (found.type, found.concurrency_limit) == (kind, 3)
        assert found.base_job_template == base_job_template(kind, secrets={})
        queues = {queue: client.read_work_queue_by_name(queue, work_pool_name=name).priority for queue in PRIORITIES}
        assert queues == {"urgent": 1, "default": 2, "later": 3}
        flow_id = client.create_flow_from_name("anything")
        wrong = {"gpus": "many"} if kind == "kubernetes" else {"env": 1}
        with pytest.raises(PrefectHTTPStatusError, match="Error creating deployment"):
            client.create_deployment(flow_id, "wrong", work_pool_name=name, job_variables=wrong)


@pytest.mark.usefixtures("prefect")
def test_a_pool_of_another_kind_is_left_alone() -> None:
    create_pool("gpu-other", "process", base_job_template("process"), limit=None)
    with pytest.raises(ConfigError, match="is of the kind process, which cannot be changed: delete it"):
        create_pool("gpu-other", "docker", base_job_template("docker"), limit=None)


FLOW = """
import json, os, sys, time
from pathlib import Path
from prefect import flow

@flow
def hold(folder: str, name: str) -> None:
    sys.path.insert(0, {root!r})
    from flows.gpu_devices import GpuHost
    from flows.gpu_lease import Leases
    from flows.gpu_priority import current_priority
    from flows.gpu_queue import Request
    leases = Leases(GpuHost.here(Path(folder)))
    with leases.acquire(Request("training", name, ("0",), 1, current_priority()), say=print):
        with open(folder + "/journal", "a") as journal:
            journal.write(f"{{name}} {{current_priority()}}\\n")
"""


@contextmanager
def workers(home: Path, number: int) -> Iterator[None]:
    """Process workers on the pool `gpu-order`, each of which takes two runs at once."""
    environment = {
        **os.environ,
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)]),
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu-order", "--type", "process"]
    started = [
        subprocess.Popen(
            [*command, "--name", f"worker {index}", "--limit", "2"],
            cwd=home,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for index in range(number)
    ]
    try:
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect")
def test_runs_of_several_workers_wait_for_one_gpu_in_the_order_of_their_queues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMODE_GPUS", "0")
    monkeypatch.setenv("BIMODE_GPU_LEASES", str(tmp_path / "leases"))
    (tmp_path / "held_flow.py").write_text(FLOW.format(root=str(ROOT)), encoding="utf-8")
    create_pool("gpu-order", "process", base_job_template("process"), limit=None)
    leases = Leases(GpuHost.here(tmp_path))
    blocker = leases.acquire(Request("serving", "a teacher", ("0",), 1), say=print)
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("hold")
        deployment = client.create_deployment(
            flow_id, "order", work_pool_name="gpu-order", entrypoint="held_flow.hold", pull_steps=[]
        )
        for name, queue in (("a", "later"), ("b", "default"), ("c", "urgent"), ("d", "default")):
            parameters = {"folder": str(tmp_path), "name": name}
            client.create_flow_run_from_deployment(deployment, parameters=parameters, work_queue_name=queue)
        with workers(tmp_path, 2):
            deadline = time.monotonic() + 300
            while len(leases.look()[1]) < 4:
                assert time.monotonic() < deadline, f"only {leases.look()[1]} wait"
                time.sleep(0.5)
            blocker.release()
            journal = tmp_path / "journal"
            while not journal.exists() or len(journal.read_text().splitlines()) < 4:
                assert time.monotonic() < deadline, "not all were served"
                time.sleep(0.5)
    lines = journal.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("c urgent", "a later")
    assert sorted(lines[1:3]) == ["b default", "d default"]


# The command


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leases:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    monkeypatch.setenv("BIMODE_GPUS", "0,1")
    monkeypatch.setenv("BIMODE_GPU_LEASES", str(tmp_path / "leases"))
    return Leases(GpuHost.here(tmp_path))


def test_the_status_says_who_holds_each_gpu_and_who_waits(gpus: Leases) -> None:
    free = CliRunner().invoke(pool.app, ["status"])
    assert free.output.splitlines() == ["GPU 0    free", "GPU 1    free"]
    hostile = Request("training", "evil \x1b[2J\nname", ("0", "1"), 1)
    with gpus.acquire(hostile, say=print), gpus.queue.waiting(Request("serving", "patient", ("0", "1"), 2, "later")):
        shown = CliRunner().invoke(pool.app, ["status"]).output.splitlines()
        record = json.loads(CliRunner().invoke(pool.app, ["status", "--json"]).stdout)
    assert shown[0].startswith("GPU 0    training of evil \ufffd[2J name (process ")
    assert shown[1] == "GPU 1    free"
    assert shown[2].startswith("1. waits  serving of patient (process ")
    assert shown[2].endswith("for 2 GPUs, later")
    assert [gpu["is_held"] for gpu in record["gpus"]] == [True, False]
    assert record["waiting"][0]["gpus"] == 2


def test_the_command_prints_a_template_with_what_was_chosen() -> None:
    words = ["template", "--type", "kubernetes", "--gpus", "8", "--image", "mine:1", "--secret", "KEY=vault/key"]
    made = json.loads(CliRunner().invoke(pool.app, words).stdout)
    variables = made["variables"]["properties"]
    assert (variables["gpus"]["default"], variables["image"]["default"]) == (8, "mine:1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["template", "--type", "podman"], "--type podman: choose one of process, docker, kubernetes"),
        (["template", "--type", "process", "--secret", "KEY"], "--secret KEY: write NAME=REFERENCE"),
    ],
)
def test_a_wrong_use_of_the_command_is_a_clear_error(words: list[str], said: str) -> None:
    result = CliRunner().invoke(pool.app, words)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.usefixtures("prefect")
def test_the_command_creates_the_pool_and_brings_it_up_to_date() -> None:
    first = CliRunner().invoke(pool.app, ["create", "--type", "docker", "--name", "gpu-command", "--limit", "2"])
    assert first.exit_code == 0, first.output
    assert "created the work pool gpu-command (docker), with the work queues urgent, default, later" in first.stderr
    words = ["create", "--type", "docker", "--name", "gpu-command", "--image", "other:1"]
    assert "updated the work pool" in CliRunner().invoke(pool.app, words).stderr
    with get_client(sync_client=True) as client:
        template = client.read_work_pool("gpu-command").base_job_template
    assert template["variables"]["properties"]["image"]["default"] == "other:1"
