"""What is said of wrong settings: enough to correct them, and nothing that may be secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.config import load_config, parse_config
from schemas.errors import ConfigError

SOURCE = {"name": "a", "format": "jsonl", "path": "a.jsonl"}


def told(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config({"sources": [SOURCE], **settings})
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    return str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": {"api_key": "s3cr3t-value"}},
        {"teacher": {"apikey": "s3cr3t-value"}},
        {"teacher": {"headers": {"Authorization": "Bearer s3cr3t-value"}}},
        {"teacher": {"api_key_env": "s3cr3t-value"}},
        {"teacher": {"port": "sk-s3cr3t-value"}},
        {"storage": "http://me:s3cr3t-value@host/"},
        {"password": ["s3cr3t-value"]},
    ],
)
def test_a_value_that_may_be_secret_is_not_repeated(settings: dict[str, Any]) -> None:
    text = told(settings)
    assert "s3cr3t-value" not in text and "1 problem" in text and "may be secret" in text


def test_of_a_value_from_the_environment_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "s3cr3t-value")
    text = told({"shard_rows": "${PLANTED}", "teacher": {"more_urls": [{"a": "${PLANTED}"}]}})
    assert "shard_rows" in text and "'${PLANTED}'" in text and "s3cr3t-value" not in text


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"shard_rows": 0}, "shard_rows: .*got 0"),
        ({"teacher": {"urll": "http://host/v1"}}, "urll.*got 'http://host/v1'"),
        ({"performance": {"max_tokens": -3}}, "max_tokens.*got -3"),
        ({"name": "a b"}, "name.*got 'a b'"),
    ],
)
def test_any_other_value_is_shown(settings: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        parse_config({"sources": [SOURCE], **settings})


def test_a_file_that_is_no_yaml_is_named_by_line_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('name: a\nteacher: {api_key: "s3cr3t-value\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not valid YAML in line \d+, column \d+: ") as raised:
        load_config(path)
    assert "s3cr3t-value" not in str(raised.value) and raised.value.__cause__ is None
