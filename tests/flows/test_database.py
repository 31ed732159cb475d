"""The database of Prefect's server by one setting, with a real PostgreSQL; its password stays where it belongs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import stack
from flows.database import SQLITE, VARIABLE, check_database, chosen_database, parse_database
from flows.stack import prefect_environment
from schemas.errors import ConfigError
from tests.cluster import postgres
from tests.cluster.postgres import Postgres, running_postgres
from tests.waiting import free_port

SECRET = "planted-Pa55word"
DEPLOYMENT = """
name: tiny
pull: []
deployments:
  - {name: tiny, entrypoint: tiny_flow.say, work_pool: {name: gpu}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    if reason := postgres.why_unavailable():
        pytest.skip(f"NO POSTGRESQL: nothing was tried on it; {reason}")
    with running_postgres() as running:
        yield running


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_an_address_of_postgresql_becomes_what_prefect_wants_and_is_shown_without_its_password(scheme: str) -> None:
    database = parse_database(f"{scheme}://bimode:{SECRET}@db.example:5433/prefect?ssl=require")
    assert database.url == f"postgresql+asyncpg://bimode:{SECRET}@db.example:5433/prefect?ssl=require"
    assert database.shown == "postgresql://bimode@db.example:5433/prefect"
    assert SECRET not in repr(database)
    assert database.server_environment()["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == database.url


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"mysql://u:{SECRET}@h/d", "a database of the kind 'mysql' is not supported"),
        (f"postgresql://u:{SECRET}@/d", "lacks its host or its name"),
        (f"postgresql://u:{SECRET}@h", "lacks its host or its name"),
        (f"u:{SECRET}", "cannot be read"),
        (f"postgresql://u:{SECRET}@h:port/d", "cannot be read"),
    ],
)
def test_a_wrong_address_is_a_clear_error_without_the_password(address: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_database(address)
    assert said in str(error.value)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None, "a traceback would quote the address"
    assert error.value.__context__ is None or error.value.__suppress_context__


def test_the_option_goes_before_the_environment_and_sqlite_comes_last() -> None:
    environment = {VARIABLE: "postgresql://u@env/d"}
    assert chosen_database("postgresql://u@option/d", environment).shown == "postgresql://u@option/d"
    assert chosen_database(None, environment).shown == "postgresql://u@env/d"
    assert chosen_database(None, {}).shown == SQLITE
    assert chosen_database(None, {}).server_environment() == {}


def test_a_database_that_serves_is_accepted(server: Postgres) -> None:
    check_database(parse_database(server.url))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("/prefect", "/elsewhere"), 'database "elsewhere" does not exist'),
        (("bimode@", f"nobody:{SECRET}@"), 'role "nobody" does not exist'),
    ],
)
def test_a_database_that_does_not_serve_is_named_with_its_reason(
    server: Postgres, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        check_database(parse_database(server.url.replace(*change)))
    assert SECRET not in str(error.value)


def test_a_database_that_does_not_answer_is_named() -> None:
    said = r"the database postgresql://u@127.0.0.1:\d+/d cannot be used: .*Connect call failed"
    with pytest.raises(ConfigError, match=said):
        check_database(parse_database(f"postgresql://u@127.0.0.1:{free_port()}/d"))


def test_a_user_who_may_not_create_the_extension_is_told_who_can(server: Postgres) -> None:
    server.query("CREATE ROLE reader LOGIN")
    with pytest.raises(ConfigError, match="have an administrator run CREATE EXTENSION pg_trgm"):
        check_database(parse_database(server.url.replace("bimode@", "reader@")))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "run.yaml").write_text("name: t\nsources: [{name: r, format: jsonl, path: r.jsonl}]\n", "utf-8")
    (tmp_path / "prefect.yaml").write_text(DEPLOYMENT, encoding="utf-8")
    (tmp_path / "tiny_flow.py").write_text("from prefect import flow\n\n@flow\ndef say() -> None: ...\n", "utf-8")
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "api_url").write_text(f"http://127.0.0.1:{free_port()}/api", encoding="utf-8")
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    stack.down(lambda line: None)


@pytest.mark.slow
def test_the_local_stack_keeps_its_state_there_and_only_the_server_learns_the_password(
    home: Path, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv(VARIABLE, server.url.replace("bimode@", f"bimode:{SECRET}@"))
    info = stack.up(Path("run.yaml"), report=lines.append)
    assert server.query("SELECT name FROM deployment") == "tiny"
    assert not (home / ".local" / "prefect" / "prefect.db").exists()

    told = {pid for pid in stack._marked_processes(stack._Folder(home)) if SECRET in _environment(pid)}
    assert told == {info.server_pid}
    assert info.watch_pid is not None and info.worker_pid is not None
    assert SECRET not in "".join(lines)
    files = [path for path in (home / ".local").rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in json.dumps(prefect_environment(home, info.api_url))

    stack.down(lines.append)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match=r"the server's state lies in postgresql://bimode@127.0.0.1.*: name it again"):
        stack.up(Path("run.yaml"), report=lines.append)


def _environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8", errors="replace")
