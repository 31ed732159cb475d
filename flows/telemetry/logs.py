"""The log of a run: as JSON lines with run, stage, shard and row, or as Prefect's text; in both without secrets.

The library is python-json-logger, a formatter for the standard library's logging, which all our code and Prefect's
uses; structlog would be a second way to log beside it. JSON lines are ASCII: whatever a row holds, its control
characters are escaped and it cannot begin a line of its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from flows.telemetry.secrets import Redactor, SecretFilter
from flows.telemetry.settings import TelemetrySettings
from schemas.context import current_context
from schemas.errors import StorageError

LIBRARIES = ("teacher", "flows", "sources", "judges", "corpus", "filters")
"""Packages of ours that log."""
SINGLE_EVENTS = "bimode"
"""Parent of the loggers of what befalls single calls, shards and rows: too much for a text that a person reads."""
_PREFECT_LOGGERS = ("prefect", "prefect.flow_runs", "prefect.task_runs", "prefect.extra")
_MAX_BYTES, _NUM_OLD_FILES = 64 * 2**20, 10
_RELAYED = "bimode_relayed"
"""Marks a library's message that was passed on to the flow run's log: where both end in one place, one is enough."""
RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]


class JsonLines(JsonFormatter):
    """Formats a record as one line of JSON.

    Fields: timestamp (ISO 8601, UTC), level, logger, message; run, corpus, stage, shard, row, trace_id and span_id
    where they are known; exception; and whatever was given as `extra`, which goes before what is known of the context.
    """

    def __init__(self, redactor: Redactor) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            timestamp=True,
            json_ensure_ascii=True,
        )
        self._redactor = redactor

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        context = current_context()
        known = {
            "run": context.run or str(log_data.get("flow_run_id") or ""),
            "corpus": context.corpus,
            "stage": context.stage,
            "shard": context.shard,
            "row": context.row,
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            known |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        moment = log_data.pop("timestamp")
        fields = {"timestamp": moment.isoformat(timespec="milliseconds"), **log_data}
        fields = {name: value for name, value in fields.items() if value is not None and name != _RELAYED}
        fields = {name: value for name, value in known.items() if value} | fields
        order = ("timestamp", "level", "logger", "message", *known)
        redacted: dict[str, Any] = self._redactor.value(fields)
        return {name: redacted[name] for name in order if name in redacted} | redacted


def _is_no_relay(record: logging.LogRecord) -> bool:
    return not getattr(record, _RELAYED, False)


@contextmanager
def logging_of(settings: TelemetrySettings, redactor: Redactor, workdir: Path | None) -> Iterator[None]:
    """Sets the process's logging for a run, and puts it back after.

    workdir: where a relative `log_file` lies; None in a process that works for a run elsewhere and logs to stderr.

    Raises StorageError: the log file cannot be opened.
    """
    with ExitStack() as changes:
        if settings.log_format == "json":
            handler = _json_handler(settings, redactor, workdir)
            changes.callback(handler.close)
            _replace_console(handler, changes)
            _set_level(SINGLE_EVENTS, settings.log_level, changes)
        for existing in {
            handler
            for name in ("", *_PREFECT_LOGGERS, *LIBRARIES)
            for handler in logging.getLogger(name or None).handlers
        }:
            secrets = SecretFilter(redactor)
            existing.addFilter(secrets)
            changes.callback(existing.removeFilter, secrets)
        for name in LIBRARIES:
            _set_level(name, settings.log_level, changes)
        yield


def _set_level(name: str, level: str, changes: ExitStack) -> None:
    logger = logging.getLogger(name)
    changes.callback(logger.setLevel, logger.level)
    logger.setLevel(level)


def _json_handler(settings: TelemetrySettings, redactor: Redactor, workdir: Path | None) -> logging.Handler:
    handler: logging.Handler
    if settings.log_file is None or workdir is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path = workdir / settings.log_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=_NUM_OLD_FILES, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write the log {path} (BIMODE_LOG_FILE): {error.strerror or error}") from error
    handler.setFormatter(JsonLines(redactor))
    handler.addFilter(_is_no_relay)
    return handler


def _replace_console(handler: logging.Handler, changes: ExitStack) -> None:
    """Makes a handler the only one that writes to the console; those that store or send records stay."""
    for name in ("", *_PREFECT_LOGGERS):
        logger = logging.getLogger(name or None)
        changes.callback(setattr, logger, "handlers", list(logger.handlers))
        logger.handlers = [existing for existing in logger.handlers if not _writes_to_console(existing)]
    logging.getLogger().addHandler(handler)


def _writes_to_console(handler: logging.Handler) -> bool:
    if isinstance(handler, logging.FileHandler):
        return False
    # Prefect's console handler is a StreamHandler, too.
    return isinstance(handler, logging.StreamHandler) and handler.stream in {
        sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__,
    }  # fmt: skip


class _ToRun(logging.Handler):
    """Passes a library's messages on to the flow run's log, which names the run itself, so that any thread may log."""

    def __init__(self, run_logger: RunLogger) -> None:
        super().__init__()
        self._run_logger = run_logger

    def emit(self, record: logging.LogRecord) -> None:
        self._run_logger.log(record.levelno, "%s", record.getMessage(), extra={_RELAYED: True})


@contextmanager
def library_logs_shown(run_logger: RunLogger) -> Iterator[None]:
    """Shows the messages of our packages in the flow run's log, so that waiting for a teacher is seen in the UI."""
    handler = _ToRun(run_logger)
    libraries = [logging.getLogger(name) for name in LIBRARIES]
    levels = [library.level for library in libraries]
    for library in libraries:
        if library.level == logging.NOTSET:
            library.setLevel(logging.INFO)
        library.addHandler(handler)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.removeHandler(handler)
            library.setLevel(level)
