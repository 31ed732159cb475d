from __future__ import annotations

from pathlib import Path

import pytest

from flows.telemetry.settings import TelemetrySettings
from schemas.errors import ConfigError


def test_without_variables_nothing_is_watched() -> None:
    settings = TelemetrySettings.of_environment({"PATH": "/bin"})
    assert (settings.log_format, settings.log_file, settings.metrics_port) == ("text", None, ())


def test_each_setting_is_a_variable() -> None:
    settings = TelemetrySettings.of_environment(
        {
            "BIMODE_LOG_FORMAT": "JSON",
            "BIMODE_LOG_LEVEL": "DEBUG",
            "BIMODE_LOG_FILE": "logs/run.jsonl",
            "BIMODE_METRICS_PORT": "9464",
            "BIMODE_METRICS_HOST": "0.0.0.0",
            "BIMODE_METRICS_FOLDER": "/var/lib/node_exporter",
            "BIMODE_TRACE_CALLS": "0.5",
        }
    )
    assert settings == TelemetrySettings(
        log_format="json",
        log_level="DEBUG",
        log_file=Path("logs/run.jsonl"),
        metrics_port=(9464,),
        metrics_host="0.0.0.0",
        metrics_folder=Path("/var/lib/node_exporter"),
        trace_calls=0.5,
    )


def test_a_range_of_ports_names_each() -> None:
    assert TelemetrySettings.of_environment({"BIMODE_METRICS_PORT": " 9464-9466 "}).metrics_port == (9464, 9465, 9466)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BIMODE_METRICS_PORT", "0"),
        ("BIMODE_METRICS_PORT", "70000"),
        ("BIMODE_METRICS_PORT", "9466-9464"),
        ("BIMODE_METRICS_PORT", "http"),
        ("BIMODE_LOG_FORMAT", "xml"),
        ("BIMODE_LOG_LEVEL", "loud"),
        ("BIMODE_TRACE_CALLS", "1.5"),
        ("BIMODE_TRACE_CALLS", "nan"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        TelemetrySettings.of_environment({name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert TelemetrySettings.of_environment({"BIMODE_METRICS_PORT": "", "BIMODE_LOG_FORMAT": ""}).metrics_port == ()
