from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cards import configuration, teacher_answer
from flows import telemetry
from flows.runtime import Runtime
from flows.telemetry import library_logs_shown
from flows.telemetry.logs import JsonLines, logging_of
from flows.telemetry.secrets import Redactor
from flows.telemetry.settings import TelemetrySettings
from schemas.context import RunContext, enter_row, within
from schemas.errors import StorageError
from schemas.requests import Message, Sampling, TeacherRequest
from teacher.endpoints import State
from teacher.fault_server import FaultServer
from tests.flows.telemetry.watched_world import RUN, Seen

SECRET = "Tr0ub4dor-3-planted"
JSON = TelemetrySettings(log_format="json")


@contextmanager
def logged(settings: TelemetrySettings = JSON, redactor: Redactor | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yields the lines that the block logs to stderr, parsed once it has ended."""
    lines: list[dict[str, Any]] = []
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with logging_of(settings, redactor or Redactor(), None):
            yield lines
    lines += [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_record_is_one_line_of_json_that_says_where_it_belongs() -> None:
    with logged() as lines, within(RunContext("r1", "exams", "routing", "exams-00001", "row-7")):
        logging.getLogger("teacher.group").warning("%d of %s", 3, "four", extra={"purpose": "topic"})
    (line,) = lines
    assert line.pop("timestamp").endswith("+00:00")
    assert line == {
        "level": "WARNING", "logger": "teacher.group", "message": "3 of four", "run": "r1", "corpus": "exams",
        "stage": "routing", "shard": "exams-00001", "row": "row-7", "purpose": "topic",
    }  # fmt: skip


def test_what_a_message_says_itself_goes_before_its_context() -> None:
    with logged() as lines, within(RunContext(stage="routing", row="a")):
        logging.getLogger("flows.x").info("about another", extra={"row": "b"})
    assert (lines[0]["stage"], lines[0]["row"]) == ("routing", "b")


def test_an_exception_is_part_of_its_line_and_holds_no_secret() -> None:
    with logged(redactor=Redactor([SECRET])) as lines:
        try:
            raise RuntimeError(f"refused {SECRET}")
        except RuntimeError:
            logging.getLogger("flows.x").exception("failed")
    assert "RuntimeError: refused [redacted]" in lines[0]["exception"] and SECRET not in json.dumps(lines)


@given(st.text(), st.text(), st.dictionaries(st.text(), st.text(), max_size=2))
def test_no_text_of_a_row_breaks_or_forges_a_line(message: str, row: str, extra: dict[str, str]) -> None:
    record = logging.LogRecord("flows", logging.INFO, "f", 1, "%s", (message,), None)
    record.detail = extra
    with within(RunContext(row=row)):
        line = JsonLines(Redactor()).format(record)
    assert line.isascii() and line.isprintable()
    parsed = json.loads(line)
    assert parsed["level"] == "INFO" and ("row" in parsed) == bool(row)
    if all(character.isalnum() or character == " " for character in message):
        assert parsed["message"] == message


@pytest.mark.parametrize("secret", ['Tr0ub4dor"3\\planted', SECRET])
def test_a_secret_is_hidden_wherever_a_record_holds_it(secret: str) -> None:
    with logged(redactor=Redactor([secret])) as lines, within(RunContext(shard=secret)):
        extra = {"headers": {"Authorization": f"Bearer {secret}"}, "error": ValueError(secret), "list": [secret]}
        logging.getLogger("flows.x").warning("key %s", secret, extra=extra)
    assert "planted" not in json.dumps(lines) and len(lines) == 1


def test_a_message_that_was_passed_on_to_the_run_is_written_once() -> None:
    run_logger = logging.getLogger("a_run")
    with logged() as lines, library_logs_shown(run_logger), within(RunContext(row="r")):
        logging.getLogger("teacher.endpoints").info("the teacher answers")
    assert [(line["logger"], line["row"]) for line in lines] == [("teacher.endpoints", "r")]


def test_the_log_of_the_run_gets_what_libraries_say(caplog: pytest.LogCaptureFixture) -> None:
    run_logger = logging.getLogger("a_run")
    with caplog.at_level(logging.INFO, "a_run"), library_logs_shown(run_logger):
        logging.getLogger("teacher.endpoints").info("the teacher at %s answers", "x")
    assert [record.getMessage() for record in caplog.records if record.name == "a_run"] == ["the teacher at x answers"]


def test_the_level_of_our_own_messages_can_be_set() -> None:
    with logged(TelemetrySettings(log_format="json", log_level="WARNING")) as lines:
        logging.getLogger("flows.x").info("little")
        logging.getLogger("flows.x").warning("much")
    assert [line["message"] for line in lines] == ["much"]


def test_afterwards_logging_is_as_it_was() -> None:
    def state() -> list[Any]:
        named = [logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "teacher", "bimode")]
        return [(logger.level, list(logger.handlers), [list(h.filters) for h in logger.handlers]) for logger in named]

    console = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(console)
    try:
        before = state()
        with pytest.raises(ValueError, match="x"), logging_of(JSON, Redactor(), None):  # noqa: PT012  (the same)
            assert console not in logging.getLogger().handlers, "two formats on one console"
            raise ValueError("x")
        assert state() == before
    finally:
        logging.getLogger().removeHandler(console)


def test_text_logs_hide_secrets_too(capsys: pytest.CaptureFixture[str]) -> None:
    console = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(console)
    try:
        with logging_of(TelemetrySettings(), Redactor([SECRET]), None):
            logging.getLogger("teacher.group").warning("refused %s", SECRET)
    finally:
        logging.getLogger().removeHandler(console)
    assert "refused [redacted]" in capsys.readouterr().err


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file", encoding="utf-8")
    settings = TelemetrySettings(log_format="json", log_file=Path("logs/run.jsonl"))
    with (
        pytest.raises(StorageError, match=r"logs/run.jsonl \(BIMODE_LOG_FILE\)"),
        logging_of(settings, Redactor(), tmp_path),
    ):
        pass


def test_a_run_logs_its_shards_the_rows_that_leave_and_calls_that_fail(seen: Seen) -> None:
    lines = seen.log
    assert {line["run"] for line in lines} == {RUN} and {line["corpus"] for line in lines} == {"cards"}

    done = [(line["stage"], line["shard"]) for line in lines if line["message"] == "shard done"]
    assert ("routing", "cards-00000") in done and ("answers", "cards-00001") in done and len(done) == len(set(done))

    failed = [line for line in lines if line["logger"] == "bimode.calls"]
    assert failed and all(line["row"] and line["shard"] and line["purpose"] for line in failed)
    assert {line["stage"] for line in failed} <= {"routing", "difficulty", "performance", "reasoning", "answers"}

    left = [line for line in lines if line["logger"] == "bimode.rows"]
    assert left and all(line["row"] and line["reason"] == "trace_inconsistent" for line in left)


def test_the_teachers_key_is_in_no_line_of_a_run(seen: Seen) -> None:
    assert any(f"Bearer {seen.secret}" in call.headers.values() for call in seen.calls), "it was used"
    assert seen.log and seen.secret not in json.dumps(seen.log)


def test_what_outlasts_a_row_does_not_log_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_LOG_FORMAT", "json")
    monkeypatch.setenv("BIMODE_LOG_FILE", "run.jsonl")
    monkeypatch.setattr("teacher.endpoints.PROBE_SECONDS", 0.3)
    with FaultServer(teacher_answer, models=["cards"]) as teacher:
        config = configuration(tmp_path / "none.jsonl", tmp_path / "work", teacher.url, teacher={"max_retries": 1})
        runtime = Runtime(config)
        question = TeacherRequest(
            "row-7", "routing", (Message("user", "Card 1"),), Sampling(max_tokens=8), choices=("a",)
        )

        async def ask() -> None:
            enter_row("row-7")
            group = runtime.group(config.teacher)
            await group.call(question)
            teacher.stop()
            address = group.addresses.all[0]
            await group.addresses.confirm(address)
            assert address.state is State.DOWN
            teacher.start()
            await group.addresses.wait_until_one_answers()

        with telemetry.run(runtime, run_id=RUN), telemetry.stage("routing"):
            try:
                runtime.run(ask())
            finally:
                runtime.close()
    lines = [json.loads(line) for line in (tmp_path / "work" / "run.jsonl").read_text(encoding="ascii").splitlines()]
    back = [line for line in lines if line["message"].endswith("answers")]
    assert back and all("row" not in line and line["run"] == RUN for line in back)
