"""No secret in a log, artifact, parameter, report or file: whole runs with planted ones, and everything they leave.

What is planted: the keys of two teachers, credentials of an object store, a proxy with a password, a token of the hub,
passwords inside addresses and inside a wrong configuration, and a server that repeats the key it was given. What is
searched: every file below the test's folder (Parquet decoded), Prefect's database, all logs, and what is printed.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy
import typer
import yaml
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL
from typer.testing import CliRunner

from flows.commands.export import export
from flows.commands.report import report
from flows.commands.show import show
from flows.commands.summary import summary
from flows.commands.validate import validate
from flows.curate import curate
from schemas.errors import BimodeError
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

pytest_plugins = ("tests.s3_server",)
pytestmark = pytest.mark.usefixtures("prefect")

TEACHER_KEY = "sk-planted-teacher-4f1c9a"
PANEL_KEY = "sk-planted-panel-77d0b2"
STORE_SECRET = "planted-store-secret-a83e51"
STORE_ID = "AKIAPLANTED5C2E"
PROXY_PASSWORD = "planted-proxy-0b9d44"
HUB_TOKEN = "hf_planted_token_e5210c"
ADDRESS_PASSWORD = "planted-address-91c37f"
WRITTEN_KEY = "sk-planted-in-file-3d88aa"
SECRETS = (
    TEACHER_KEY,
    PANEL_KEY,
    STORE_SECRET,
    STORE_ID,
    PROXY_PASSWORD,
    HUB_TOKEN,
    ADDRESS_PASSWORD,
    WRITTEN_KEY,
)


def forms(secret: str) -> set[bytes]:
    """Returns a secret as it may be written: plain, quoted for addresses, and in base64 behind any beginning."""
    encoded = secret.encode()
    found = {encoded, urllib.parse.quote(secret, safe="").encode()}
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + encoded)
        found.add(whole[4 if shift else 0 : -4])  # without the characters that its neighbours shape
    return found


def leaks(where: str, content: bytes) -> list[str]:
    return [f"{secret} in {where}" for secret in SECRETS if any(form in content for form in forms(secret))]


def contents(file: Path) -> Iterator[bytes]:
    """Yields what a file says: its bytes, and the values of a Parquet file."""
    yield file.read_bytes()
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        yield str(table.schema.metadata).encode()
        yield str(table.to_pylist()).encode("utf-8", "backslashreplace")


def leaks_in_files(folder: Path) -> list[str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    assert files
    return [leak for file in files for content in contents(file) for leak in leaks(str(file), content)]


def leaks_in_database() -> list[str]:
    """Searches every value of every table of Prefect's database."""
    url = PREFECT_SERVER_DATABASE_CONNECTION_URL.value().replace("+aiosqlite", "")
    engine = sqlalchemy.create_engine(url)
    found: list[str] = []
    num_values = 0
    with closing(engine.raw_connection()) as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for row in connection.execute(f'select * from "{table}"'):
                num_values += len(row)
                found += leaks(f"Prefect's table {table}", "\n".join(map(str, row)).encode())
    engine.dispose()
    assert num_values > 100 and {"flow_run", "log", "artifact", "events"} <= set(tables)
    return found


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants the secrets that belong into the environment. The proxy is for the outside and never called."""
    monkeypatch.setenv("BIMODE_API_KEY", TEACHER_KEY)
    monkeypatch.setenv("PANEL_API_KEY", PANEL_KEY)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("PLANTED_PASSWORD", ADDRESS_PASSWORD)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://someone:{PROXY_PASSWORD}@127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Records all that is logged from INFO on, and by our own packages from DEBUG on."""
    caplog.set_level(logging.INFO)
    for name in ("teacher", "flows", "sources", "judges", "corpus", "filters"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def logged_text(caplog: pytest.LogCaptureFixture) -> bytes:
    assert caplog.records
    return caplog.text.encode()


class Locked(BaseHTTPRequestHandler):
    """A server of files behind a password: what `http://user:password@host/rows.jsonl` is made for."""

    rows = b""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.rows)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.rows)

    def log_message(self, *_: object) -> None:
        pass


class Echo(BaseHTTPRequestHandler):
    """A teacher's endpoint that answers every call with an error that repeats the key it was given."""

    status = 401

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        content = json.dumps({"error": {"message": f"Incorrect API key provided: {key}.", "code": "bad"}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Any]:
    """Starts servers of request handlers on the loopback interface; yields what starts one, as host:port."""
    servers: list[ThreadingHTTPServer] = []

    def serve(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_whole_run_with_its_exports_and_commands_leaves_no_secret(
    tmp_path: Path, bucket: str, planted: None, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", STORE_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", STORE_SECRET)
    fsspec.filesystem("s3").clear_instance_cache()
    questions = write_questions(tmp_path / "in", 20)
    with fsspec.open(f"{bucket}/in/questions.jsonl", "wb") as file:
        file.write(questions.read_bytes().replace(b"1.png", b"1.missing"))  # some rows are quarantined, with a detail
    for image in questions.parent.glob("*.png"):
        with fsspec.open(f"{bucket}/in/{image.name}", "wb") as file:
            file.write(image.read_bytes())
    with (
        ReplayTeacher(scripted_answer, models=["scripted"], api_key=TEACHER_KEY) as teacher,
        ReplayTeacher(scripted_answer, models=["second"], api_key=PANEL_KEY) as second,
    ):
        config = write_config(
            tmp_path,
            questions,
            teacher.url,
            sources=[
                {
                    "name": "sums",
                    "format": "jsonl",
                    "path": f"{bucket}/in/questions.jsonl",
                    "columns": {"images": "image", "answer": "answer", "id": "id"},
                }
            ],
            difficulty={"panel": [{"model": "second", "url": second.url, "api_key_env": "PANEL_API_KEY"}]},
            corpus={"folder": f"{bucket}/corpus"},
            max_quarantine_share=1.0,
        )
        result: dict[str, Any] = curate(str(config))
        assert teacher.calls and second.calls and result["rows"] > 5
        assert "AWS" not in config.read_text()
    app = typer.Typer()
    for command in (export, report, show, summary, validate):
        app.command()(command)
    printed = ""
    some_id = pq.read_table(next(Path(result["corpus"]).rglob("data/**/*.parquet")), columns=["id"])["id"][0].as_py()
    for arguments in (
        ["export", "llava", "--config", str(config), "--output", str(tmp_path / "exported")],
        ["report", "--config", str(config)],
        ["show", some_id, "--config", str(config)],
        ["summary", "--config", str(config)],
        ["validate", "--config", str(config)],
    ):
        told = CliRunner().invoke(app, arguments)
        assert told.exit_code == 0, told.output
        printed += told.output
    sent = io.BytesIO()
    filesystem = fsspec.filesystem("s3")
    for name in filesystem.find(f"{bucket}/corpus"):
        sent.write(filesystem.cat_file(name))
    assert len(sent.getvalue()) > 10_000
    found = leaks_in_files(tmp_path) + leaks("the object store", sent.getvalue()) + leaks("output", printed.encode())
    assert found + leaks("the log", logged_text(logged)) + leaks_in_database() == []


def failing_run(config: Path) -> str:
    """Runs a curation that fails for a reason of the user's; returns what the error says, with its causes."""
    with pytest.raises(BimodeError) as raised:
        curate(str(config))
    told = [str(error) for error in (raised.value, raised.value.__cause__) if error is not None]
    return "\n".join(told)


def no_leak(tmp_path: Path, config: Path, told: str, logged: pytest.LogCaptureFixture) -> list[str]:
    """Searches all that a failed run left; the configuration itself may hold what its author wrote into it."""
    config.unlink()
    work = leaks_in_files(tmp_path) if any(file.is_file() for file in tmp_path.rglob("*")) else []
    return work + leaks("the error", told.encode()) + leaks("the log", logged_text(logged)) + leaks_in_database()


@pytest.mark.parametrize("status", [401, 400, 500])
def test_a_server_that_repeats_the_key_does_not_make_us_store_it(
    status: int, tmp_path: Path, planted: None, logged: pytest.LogCaptureFixture, served: Any
) -> None:
    address = served(type("EchoStatus", (Echo,), {"status": status}))
    teacher = {"model": "scripted", "url": f"http://{address}/v1", "unreachable_seconds": 1, "max_retries": 1}
    config = write_config(tmp_path, write_questions(tmp_path / "in", 5), "", teacher=teacher, max_quarantine_share=0.0)
    told = failing_run(config)
    assert no_leak(tmp_path, config, told, logged) == []


def test_a_password_in_the_teacher_s_address_is_refused_and_not_repeated(
    tmp_path: Path, planted: None, logged: pytest.LogCaptureFixture
) -> None:
    questions = write_questions(tmp_path / "in", 5)
    config = write_config(tmp_path, questions, "http://someone:${PLANTED_PASSWORD}@127.0.0.1:9/v1")
    told = failing_run(config)
    assert "teacher.url holds credentials" in told
    assert no_leak(tmp_path, config, told, logged) == []


@pytest.mark.parametrize("part", ["path", "image_root"])
def test_a_password_in_a_source_s_address_is_refused_and_not_repeated(
    part: str, tmp_path: Path, planted: None, logged: pytest.LogCaptureFixture, served: Any
) -> None:
    questions = write_questions(tmp_path / "in", 5)
    address = served(type("Rows", (Locked,), {"rows": questions.read_bytes()}))
    source = {"name": "sums", "format": "jsonl", "path": str(questions), "columns": {"images": "image"}}
    source[part] = f"http://someone:${{PLANTED_PASSWORD}}@{address}/questions.jsonl"
    config = write_config(tmp_path, questions, "http://127.0.0.1:9/v1", sources=[source])
    told = failing_run(config)
    assert "credentials" in told
    assert no_leak(tmp_path, config, told, logged) == []


def test_a_password_in_the_corpus_s_address_is_refused_and_not_repeated(
    tmp_path: Path, planted: None, logged: pytest.LogCaptureFixture
) -> None:
    questions = write_questions(tmp_path / "in", 5)
    with ReplayTeacher(scripted_answer, models=["scripted"], api_key=TEACHER_KEY) as teacher:
        folder = "ftp://someone:${PLANTED_PASSWORD}@127.0.0.1:9/corpus"
        config = write_config(tmp_path, questions, teacher.url, corpus={"folder": folder})
        told = failing_run(config)
    assert no_leak(tmp_path, config, told, logged) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"teacher": {"model": "scripted", "api_key": WRITTEN_KEY}},
        {"teacher": {"model": "scripted", "url": ["${BIMODE_API_KEY}"]}},
        {"api_key": WRITTEN_KEY},
    ],
)
def test_a_key_written_into_the_configuration_is_not_repeated_by_the_error(
    wrong: dict[str, Any], tmp_path: Path, planted: None, logged: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, write_questions(tmp_path / "in", 5), "http://127.0.0.1:9/v1")
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | wrong))
    told = failing_run(config)
    assert no_leak(tmp_path, config, told, logged) == []


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    header = b"Basic " + base64.b64encode(f"someone:{ADDRESS_PASSWORD}".encode())
    for name, content in {"a.txt": TEACHER_KEY.encode(), "b.bin": b"\0" + header}.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(
        pa.table({"detail": [f"Incorrect key {PANEL_KEY}"] * 50}), tmp_path / "c.parquet", compression="zstd"
    )
    assert {leak.rsplit("/", 1)[1] for leak in leaks_in_files(tmp_path)} == {"a.txt", "b.bin", "c.parquet"}
