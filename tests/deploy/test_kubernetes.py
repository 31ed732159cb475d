"""The manifests: valid against Kubernetes' schemas, alone and as overlays, restricted, and closed to the outside."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from flows.database import Database
from flows.retention import Keep
from flows.stack import server_environment
from schemas.config import load_config
from tests.deploy.places import BY_DIGEST, COMPOSE, KUBERNETES, documents

VERSIONS = ("1.30", "1.34")
"""Of Kubernetes: the oldest that we promise, and a new one."""
OVERLAYS = ["one-node", "cluster"]
PATCHES = {"overlays/cluster/teacher.yaml", "overlays/cluster/curator.yaml"}
"""Parts of resources, whole only once they are laid over others."""
NOT_MANIFESTS = {"kustomization.yaml", "run.yaml"}
WHOLE = [
    path
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name not in NOT_MANIFESTS and str(path.relative_to(KUBERNETES)) not in PATCHES
]
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders overlays, is not installed: overlays NOT CHECKED"
)


@lru_cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """Returns what `kubectl apply --kustomize` would send."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(resources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the pod templates by the name of what makes them."""
    return {
        resource["metadata"]["name"]: resource["spec"]["template"]
        for resource in resources
        if resource["kind"] in {"Deployment", "StatefulSet", "Job"}
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_a_manifest_is_what_kubernetes_understands(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


@needs_kubectl
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_what_kubernetes_understands(overlay: str, version: str) -> None:
    for resource in rendered(overlay):
        kubernetes_validate.validate(resource, version, strict=True)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "bimode"


ALL_PODS = pods([document for path in WHOLE for document in documents(path)])


@pytest.mark.parametrize("name", sorted(ALL_PODS))
def test_a_pod_meets_the_restricted_standard_and_has_a_read_only_root(name: str) -> None:
    spec = ALL_PODS[name]["spec"]
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    of_pod = spec["securityContext"]
    assert of_pod["runAsNonRoot"] is True and of_pod["runAsUser"] > 0
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container["resources"].keys() and "memory" in container["resources"]["limits"]
        assert container["image"] in {"bimode", "bimode-gpu"} or BY_DIGEST.fullmatch(container["image"])
    kinds = [set(volume) - {"name"} for volume in spec.get("volumes", ())]
    assert all(kind <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret"} for kind in kinds)


@pytest.mark.parametrize("name", sorted(ALL_PODS.keys() - {"deployments", "watch"}))
def test_what_stays_up_is_watched(name: str) -> None:
    (container,) = ALL_PODS[name]["spec"]["containers"]
    assert {"startupProbe", "livenessProbe"} <= container.keys()
    ports = {port["name"] for port in container.get("ports", ())}
    probes = [container[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe in container]
    assert all(probe["httpGet"]["port"] in ports for probe in probes if "httpGet" in probe)


def test_no_secret_is_in_a_manifest() -> None:
    everything = [document for path in WHOLE for document in documents(path)]
    assert "Secret" not in {document["kind"] for document in everything}
    for name, pod in ALL_PODS.items():
        for variable in pod["spec"]["containers"][0].get("env", ()):
            is_secret = any(word in variable["name"] for word in ("PASSWORD", "KEY", "TOKEN", "AUTH_STRING"))
            assert not is_secret or "secretKeyRef" in variable["valueFrom"], (name, variable["name"])


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_reached_but_what_is_named(overlay: str) -> None:
    policies = {r["metadata"]["name"]: r["spec"] for r in rendered(overlay) if r["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    peers = [
        peer
        for spec in policies.values()
        for rule in [*spec.get("ingress", ()), *spec.get("egress", ())]
        for peer in [*rule.get("from", ()), *rule.get("to", ())]
    ]
    assert peers and all(rule for rule in peers)  # an empty peer, or none, would be everybody
    blocks = [peer["ipBlock"] for peer in peers if "ipBlock" in peer]
    for block in blocks:
        if block["cidr"] == "0.0.0.0/0":  # never the cloud's metadata service, nor private addresses
            assert {"169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} <= set(block["except"])


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_policy_and_service_is_about_pods_that_exist(overlay: str) -> None:
    resources = rendered(overlay)
    labels = [pod["metadata"]["labels"] for pod in pods(resources).values()]
    selectors = [r["spec"]["selector"] for r in resources if r["kind"] == "Service"]
    selectors += [r["spec"]["podSelector"].get("matchLabels", {}) for r in resources if r["kind"] == "NetworkPolicy"]
    assert all(any(selector.items() <= label.items() for label in labels) for selector in selectors)
    claims = {r["metadata"]["name"] for r in resources if r["kind"] == "PersistentVolumeClaim"}
    volumes = [volume for pod in pods(resources).values() for volume in pod["spec"].get("volumes", ())]
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} <= claims


@needs_kubectl
def test_the_cluster_names_as_many_teachers_as_it_has() -> None:
    resources = rendered("cluster")
    teacher = next(r for r in resources if r["kind"] == "StatefulSet" and r["metadata"]["name"] == "teacher")
    configurations = next(r for r in resources if r["kind"] == "ConfigMap" and "teachers.txt" in r["data"])
    addresses = [f"http://teacher-{number}.teacher:8000/v1" for number in range(teacher["spec"]["replicas"])]
    assert configurations["data"]["teachers.txt"].split() == addresses
    (container,) = teacher["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    num_gpus = int(variables["TENSOR_PARALLEL"] or 0) * int(variables["DATA_PARALLEL"] or 0)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(num_gpus) == "2"
    assert all(f"$({name})" in " ".join(container["args"]) for name in variables if name.isupper() and variables[name])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_example_of_a_run_is_a_configuration(overlay: str) -> None:
    config = load_config(KUBERNETES / "overlays" / overlay / "run.yaml")
    assert config.teacher.model == "Qwen/Qwen2.5-VL-32B-Instruct"
    assert (config.serve is None) == (overlay == "cluster")


def test_the_database_is_the_one_of_the_compose_file() -> None:
    (compose,) = documents(COMPOSE)
    (container,) = ALL_PODS["database"]["spec"]["containers"]
    assert container["image"] == compose["services"]["database"]["image"]


@needs_kubectl
def test_the_server_is_set_as_the_one_that_we_start_ourselves() -> None:
    maps = {r["metadata"]["name"].rsplit("-", 1)[0]: r["data"] for r in rendered("cluster") if r["kind"] == "ConfigMap"}
    assert maps["server"] == server_environment(Database("", "SQLite"), Keep())
    assert maps["database"]["PREFECT_SERVER_DATABASE_HOST"] == "postgres.example.com"
