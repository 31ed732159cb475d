"""The work pool `gpu` in its kinds: flow runs as processes, as Docker containers, as jobs on Kubernetes.

Each template is the one that Prefect's own worker brings, changed where we need it, so an upgrade of Prefect cannot
leave ours behind; `deploy/pools/*.json` are what this module makes, and a test holds them together. The changes:

- process: secrets alone. What a process may use is what its worker may use; which GPUs, its lease says.
- docker: our image, all GPUs of the host (the lease says which are used; a number here would give every container
  the first ones), shared memory for NCCL, the volumes of deploy/compose, the host's folder of locks, in which the
  leases lie, no rights but those of a user. Prefect's worker gives a cancelled container 30 seconds, which no template
  changes: a training goes on from its newest whole checkpoint then.
- kubernetes: our image, so many GPUs of its own (`gpus`), the volume claims of deploy/kubernetes, secrets by reference,
  a user without rights, and time for a checkpoint. Prefect wants `completions` and `parallelism` where Kubernetes does
  not know them, and Kubernetes leaves them out.

A deployment, or one run, may change each variable: `prefect deployment run train/bpo --job-variable gpus=4`. A secret
is never part of a template: process and Docker name a Prefect block, Kubernetes a key of one of its secrets.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from flows.gpu_queue import PRIORITIES
from schemas.errors import ConfigError

PoolKind = Literal["process", "docker", "kubernetes"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)
IMAGE = "bimode-gpu:0.1.0"
STOP_SECONDS = 330
"""For a checkpoint (`stop_seconds` of the training configuration, 300 s by default), and for what ends after it."""
KUBERNETES_SECRETS = {"BIMODE_API_KEY": "teacher/key", "HF_TOKEN": "hub/token"}
"""Those of deploy/kubernetes. Each may be missing, as a run may not need it."""
_WORKERS = {
    "process": ("prefect", "prefect.workers.process", "ProcessWorker"),
    "docker": ("prefect-docker", "prefect_docker.worker", "DockerWorker"),
    "kubernetes": ("prefect-kubernetes", "prefect_kubernetes.worker", "KubernetesWorker"),
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLOCK = re.compile(r"[a-z0-9-]+")
_KEY = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")
_VOLUMES = ["bimode_runs:/project/runs", "bimode_models:/models", "bimode_home:/home/bimode", "/run/lock:/run/lock"]

Template = dict[str, Any]


def base_job_template(
    kind: PoolKind, *, image: str | None = None, gpus: int | None = None, secrets: Mapping[str, str] | None = None
) -> Template:
    """Returns the base job template of a kind.

    image: of its containers. gpus: of a job on Kubernetes, 1 by default. secrets: where each environment variable comes
    from: the name of a Prefect secret block, on Kubernetes SECRET/KEY.

    Raises ConfigError: a setting does not fit the kind, or the kind's Prefect package is not installed.
    """
    if kind == "process" and image is not None:
        raise ConfigError("a process has no image: --image is for docker and kubernetes")
    if kind != "kubernetes" and gpus is not None:
        raise ConfigError("--gpus is for kubernetes; elsewhere a lease says which GPUs a run takes (docs/gpu-pool.md)")
    given = KUBERNETES_SECRETS if secrets is None and kind == "kubernetes" else dict(secrets or {})
    _check_secrets(kind, given)
    template = _default_template(kind)
    if kind == "docker":
        _fit_docker(template, image or IMAGE)
    if kind == "kubernetes":
        _fit_kubernetes(template, image or IMAGE, 1 if gpus is None else gpus, given)
    elif given:
        references = {name: f"{{{{ prefect.blocks.secret.{block} }}}}" for name, block in given.items()}
        _properties(template)["env"]["default"] = references
    return template


def template_text(template: Template) -> str:
    """Returns a template as the files under deploy/pools hold it."""
    return json.dumps(template, indent=2, sort_keys=True) + "\n"


def queue_priorities() -> dict[str, int]:
    """Returns the work queues of the pool with their priorities, of which 1 comes first."""
    return {name: number for number, name in enumerate(PRIORITIES, start=1)}


def _check_secrets(kind: PoolKind, secrets: Mapping[str, str]) -> None:
    form, example = (_KEY, "teacher/key") if kind == "kubernetes" else (_BLOCK, "teacher-key")
    for name, reference in secrets.items():
        if not _VARIABLE.fullmatch(name) or not form.fullmatch(reference):
            raise ConfigError(
                f"{name}={reference}: a secret of a {kind} pool is named like BIMODE_API_KEY={example}; its value does "
                "not belong here"
            )


def _default_template(kind: PoolKind) -> Template:
    """Returns the template that the kind's own worker brings. Raises ConfigError: it is not installed."""
    package, module, worker = _WORKERS[kind]
    try:
        found = getattr(importlib.import_module(module), worker)  # only the hosts of such workers have it
    except ImportError as error:
        raise ConfigError(f"a pool of kind {kind} needs the package {package}: {error}") from error
    template: Template = found.get_default_base_job_template()
    return copy.deepcopy(template)


def _fit_docker(template: Template, image: str) -> None:
    variables = _properties(template)
    variables["image"]["default"] = image
    variables["volumes"]["default"] = list(_VOLUMES)
    variables["container_create_kwargs"]["default"] = {
        "device_requests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}],
        "shm_size": "8g",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        "tmpfs": {"/tmp": "exec"},  # noqa: S108 - inside the container; compiled kernels are loaded from there
    }


def _fit_kubernetes(template: Template, image: str, gpus: int, secrets: Mapping[str, str]) -> None:
    _set_kubernetes_variables(_properties(template), image, gpus)
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    _fit_pod(pod)
    _fit_container(pod["containers"][0], secrets)


def _set_kubernetes_variables(variables: dict[str, Any], image: str, gpus: int) -> None:
    for name, default in {
        "image": image,
        "namespace": "bimode",
        "service_account_name": "bimode",
        "finished_job_ttl": 86_400,
        "pod_watch_timeout_seconds": 7 * 86_400,  # a pod waits for its GPUs, and nobody calls that a failure
        # The network policies of deploy/kubernetes let these reach teachers and Prefect's server.
        "labels": {"app.kubernetes.io/name": "flow-run", "app.kubernetes.io/component": "worker"},
    }.items():
        variables[name]["default"] = default
    variables["gpus"] = _variable("GPUs", "integer", gpus, "GPUs of the job, which nobody else gets meanwhile.") | {
        "minimum": 0
    }
    for name, title, default, description in (
        ("runs_claim", "Claim of runs", "runs", "Volume claim of work folders and models; several pods write to it."),
        ("models_claim", "Claim of models", "models", "Volume claim of the cache of weights."),
        ("configurations", "Configurations", "run-configurations", "Config map with the run configurations."),
        ("shared_memory", "Shared memory", "16Gi", "Memory through which NCCL and vLLM's processes pass tensors."),
    ):
        variables[name] = _variable(title, "string", default, description)
    why = "Seconds that a stopped job has, for a checkpoint among others."
    variables["grace_seconds"] = _variable("Grace", "integer", STOP_SECONDS, why)
    variables["priority_class"] = _variable("Priority class", "string", None, "Who is served first by Kubernetes.")
    variables["node_selector"] = {
        "title": "Node selector",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "Labels of the nodes that may run the job, e.g. nvidia.com/gpu.product.",
    }


def _variable(title: str, kind: str, default: object, description: str) -> dict[str, Any]:
    known = {"type": kind} if default is not None else {"anyOf": [{"type": kind}, {"type": "null"}]}
    return {"title": title, "description": description, "default": default, **known}


def _fit_pod(pod: dict[str, Any]) -> None:
    pod |= {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": "{{ grace_seconds }}",
        "priorityClassName": "{{ priority_class }}",
        "nodeSelector": "{{ node_selector }}",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": "{{ runs_claim }}"}},
            {"name": "models", "persistentVolumeClaim": {"claimName": "{{ models_claim }}"}},
            {"name": "config", "configMap": {"name": "{{ configurations }}"}},
            {"name": "home", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "locks", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shared_memory }}"}},
        ],
    }


def _fit_container(container: dict[str, Any], secrets: Mapping[str, str]) -> None:
    container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpus }}"
    container["resources"]["requests"]["nvidia.com/gpu"] = "{{ gpus }}"
    # Prefect puts its own variables, and those of the deployment, before these.
    container["env"] = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for name, (secret, key) in ((name, reference.split("/")) for name, reference in secrets.items())
    ]
    container["envFrom"] = [
        {"configMapRef": {"name": "client", "optional": True}},
        {"secretRef": {"name": "object-storage", "optional": True}},
    ]
    container["securityContext"] = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    container["volumeMounts"] = [
        {"name": "runs", "mountPath": "/project/runs"},
        {"name": "models", "mountPath": "/models"},
        {"name": "config", "mountPath": "/project/config", "readOnly": True},
        {"name": "home", "mountPath": "/home/bimode"},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "locks", "mountPath": "/run/lock"},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]


def _properties(template: Template) -> dict[str, Any]:
    properties: dict[str, Any] = template["variables"]["properties"]
    return properties
