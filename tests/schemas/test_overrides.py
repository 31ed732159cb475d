"""Settings for one run: a form made of the configuration model, and their place above the file's."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.config import PerformanceConfig, RunConfig, parse_config
from schemas.errors import ConfigError
from schemas.overrides import RunOverrides, described, overridden, parse_overrides


def config(**settings: Any) -> RunConfig:
    return parse_config({"sources": [{"name": "a", "format": "jsonl", "path": "a.jsonl"}], **settings})


def test_what_is_given_takes_the_place_of_the_file_s_setting_and_the_rest_stays() -> None:
    settings = config(performance={"num_samples": 4, "temperature": 0.7}, max_quarantine_share=0.2)
    changed = overridden(settings, parse_overrides({"performance": {"num_samples": 6}, "seed": 3}))
    assert changed.performance == PerformanceConfig(num_samples=6, temperature=0.7)
    assert (changed.seed, changed.max_quarantine_share) == (3, 0.2)
    assert changed.sources == settings.sources


def test_a_form_left_empty_changes_nothing() -> None:
    settings = config(performance={"num_samples": 4})
    empty: dict[str, Any] = {"performance": {}, "seed": None, "difficulty": {"threshold": None}, "reasoning": None}
    for raw in ({}, empty):
        assert overridden(settings, parse_overrides(raw)) is settings
    assert parse_overrides(empty).model_dump() == {}


def test_a_falsy_value_is_a_value() -> None:
    settings = overridden(config(), parse_overrides({"max_quarantine_share": 0, "duplicates": {"near": False}}))
    assert (settings.max_quarantine_share, settings.duplicates.near) == (0, False)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"performance": {"num_samples": 0}}, r"performance.num_samples: .*greater than or equal to 1 \(got 0\)"),
        ({"difficulty": {"threshold": 1.5}}, r"difficulty.threshold: .*less than or equal to 1"),
        ({"performance": {"samples": 3}}, "performance.samples: Extra inputs are not permitted"),
        ({"teacher": {"url": "http://x/v1"}}, "teacher: Extra inputs are not permitted"),
        ({"duplicates": {"images": "far"}}, "duplicates.images: .*'near' or 'bytes'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)overrides has 1 problem.*{said}"):
        parse_overrides(raw)


def test_settings_that_do_not_fit_the_file_are_refused_together() -> None:
    settings = config(performance={"waves": [1, 1, 2, 4]})
    with pytest.raises(ConfigError, match=r"(?s)with performance.num_samples = 9 has 1 problem.*add up to less than"):
        overridden(settings, parse_overrides({"performance": {"num_samples": 9}}))


def test_settings_are_described_by_their_dotted_names() -> None:
    given = parse_overrides({"seed": 3, "performance": {"exhaustive": True}}).model_dump()
    assert list(described(given)) == ["seed = 3", "performance.exhaustive = True"]


def test_python_may_leave_overrides_out() -> None:
    assert RunOverrides().model_dump() == {}
