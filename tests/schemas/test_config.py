from __future__ import annotations

from pathlib import Path

import pytest

from schemas.config import RunConfig, load_config, parse_config
from schemas.errors import ConfigError

SOURCE = {"name": "a", "format": "jsonl", "path": "a.jsonl"}


def test_a_source_alone_is_a_configuration() -> None:
    config = parse_config({"sources": [SOURCE]})
    assert config.performance.num_samples == 8
    assert config.teacher.model == "Qwen/Qwen2.5-VL-32B-Instruct"
    assert config.reasoner_endpoint == config.teacher


def test_an_unknown_setting_is_named_with_its_value() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.urll.*Extra inputs.*http://x"):
        parse_config({"sources": [SOURCE], "teacher": {"urll": "http://x"}})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problem"):
        parse_config({"sources": [SOURCE], "shard_rows": 0, "name": "a b"})


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="unique"):
        parse_config({"sources": [SOURCE, SOURCE]})


def test_waves_that_cannot_reach_all_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="less than num_samples"):
        parse_config({"sources": [SOURCE], "performance": {"waves": [1, 2]}})


def test_an_environment_variable_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMODE_TEST_FOLDER", "/data")
    config = parse_config({"sources": [SOURCE], "workdir": "${BIMODE_TEST_FOLDER}/run"})
    assert config.workdir == "/data/run"


def test_an_unset_environment_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="BIMODE_NOT_SET"):
        parse_config({"sources": [SOURCE], "workdir": "${BIMODE_NOT_SET}/run"})


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "mapping"), ("", "mapping"), ("{}", "sources")]
)
def test_a_file_that_is_no_configuration_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_every_setting_is_described() -> None:
    def undescribed(schema: dict[str, object], name: str) -> list[str]:
        properties = schema.get("properties", {})
        assert isinstance(properties, dict)
        return [f"{name}.{key}" for key, value in properties.items() if not {"description", "$ref"} & set(value)]

    schema = RunConfig.model_json_schema()
    missing = undescribed(schema, "RunConfig")
    for name, definition in schema["$defs"].items():
        missing += undescribed(definition, name)
    assert not missing
