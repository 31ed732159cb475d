"""The compose file: valid, hardened, started in order, and the same server as the one we start ourselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.commands import pool
from flows.commands.watch import watch
from flows.database import Database
from flows.retention import Keep
from flows.stack import prefect_environment, server_environment
from tests.deploy.places import BY_DIGEST, COMPOSE, ROOT, documents, flags

(FILE,) = documents(COMPOSE)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
EXAMPLE = (COMPOSE.parent / ".env.example").read_text("utf-8")


def test_it_is_what_compose_understands() -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_can_change_and_gain_nothing(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & service.keys()
    assert service["image"].startswith("${BIMODE_") or BY_DIGEST.fullmatch(service["image"])
    if "build" in service:
        assert (COMPOSE.parent / service["build"]["context"]).resolve() == ROOT
        assert f" AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text("utf-8")


def test_no_port_is_open_to_the_network_and_the_database_is_reached_from_inside_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"server": ["127.0.0.1:${PREFECT_PORT:-4200}:4200"]}
    assert SERVICES["database"]["networks"] == ["inside"] and FILE["networks"]["inside"] == {"internal": True}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_waits_for_what_it_needs_to_be_well(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert SERVICES[needed]["healthcheck"]["test"][0] == "CMD"
        else:
            assert how["condition"] == "service_completed_successfully"
            assert SERVICES[needed]["restart"].startswith("on-failure")


def test_secrets_are_files_that_those_who_need_them_see() -> None:
    for name, service in SERVICES.items():
        wanted = set(service.get("secrets", ()))
        named = {v.removeprefix("/run/secrets/") for v in service["environment"].values() if "/run/secrets/" in str(v)}
        assert wanted == named <= FILE["secrets"].keys(), name
        literal = [k for k, v in service["environment"].items() if re.search("PASSWORD|KEY|TOKEN|AUTH", k) and v]
        assert all(k.endswith("_FILE") or service["environment"][k].startswith("${") for k in literal), name


def test_each_secret_from_a_file_is_one_that_the_entry_point_reads() -> None:
    entrypoint = (ROOT / "deploy" / "image" / "entrypoint").read_text("utf-8")
    ours = [service for service in SERVICES.values() if "build" in service]
    names = {name for service in ours for name in service["environment"] if name.endswith("_FILE")}
    assert names and all(re.search(rf"\b{name.removesuffix('_FILE')}\b", entrypoint) for name in names)


def test_every_variable_is_explained_in_the_example_or_has_a_default() -> None:
    used = set(re.findall(r"\$\{(\w+)([^}]*)\}", COMPOSE.read_text("utf-8")))
    explained = set(re.findall(r"^(\w+)=", EXAMPLE, re.MULTILINE))
    assert all(default.startswith(":-") for _, default in used)
    assert explained - {"COMPOSE_PROFILES"} <= {name for name, _ in used}
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", ())}
    assert profiles == {"worker", "teacher"}


def test_the_commands_exist() -> None:
    script = SERVICES["deployments"]["command"][2]
    assert script.splitlines() == ["bimode pool create --type process", "exec prefect --no-prompt deploy --all"]
    assert "create" in {command.callback.__name__ for command in pool.app.registered_commands if command.callback}
    assert SERVICES["watch"]["command"] == ["bimode", watch.__name__]
    for name in ("worker", "curator"):
        assert flags(SERVICES[name]["command"]) == ["--pool", "--type", "--install-policy", "--with-healthcheck"]


def test_server_and_clients_are_set_as_those_that_we_start_ourselves() -> None:
    ours = server_environment(Database("", "SQLite"), Keep())
    assert {name: SERVICES["server"]["environment"][name] for name in ours} == ours
    local = prefect_environment(ROOT, "http://127.0.0.1:4200/api")
    for name in ("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "PREFECT_CLIENT_RETRY_EXTRA_CODES"):
        assert SERVICES["worker"]["environment"][name] == SERVICES["watch"]["environment"][name] == local[name]
