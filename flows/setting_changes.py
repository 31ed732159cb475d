"""Labelling settings given on the command line, as `difficulty.threshold=0.7`, in place of those of the file.

Values are read as YAML and validated by the configuration model, so that what is accepted here is what a file may say.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flows.stages import DUPLICATES, LABELLING, STAGES, TRACES, changed_stages
from schemas.config import RunConfig
from schemas.errors import ConfigError
from schemas.settings import wrong_settings

SECTIONS = ("routing", "difficulty", "performance", "verification", "reasoning", "direct")
"""The sections of the configuration that shape labels from stored replies."""
LIMITS = ("max_quarantine_share",)
"""Settings beside them that may be given: they say when to stop."""
_LABELLING = (*LABELLING, TRACES)


def read_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """Returns the values by dotted name. assignments: "name=value", the value in YAML.

    Raises ConfigError: one cannot be read, is given twice, or names no labelling setting; the nearest names are listed.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--set {assignment!r} is no NAME=VALUE, e.g. --set difficulty.threshold=0.7")
        _check_name(name)
        if name in changes:
            raise ConfigError(f"--set {name} is given twice: {changes[name]!r} and {text!r}")
        try:
            changes[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    return changes


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration with some settings replaced, checked as a whole.

    Raises ConfigError: a value is wrong, or no label depends on the settings.
    """
    try:
        changed = RunConfig.model_validate(_merged(config.model_dump(), nested(changes)))
    except ValidationError as error:
        raise wrong_settings("the configuration with --set", error) from None  # its own message shows values
    given = [name for name in changes if name not in LIMITS]
    if changed != config and given and not changed_stages(config, changed):
        raise ConfigError(
            f"no label depends on {', '.join(given)}: speed and cost are not relabelled. Change it in the file"
        )
    assert set(changed_stages(config, changed)) <= set(_LABELLING), "only labelling settings can be given"
    return changed


def lasting_lines(changes: Mapping[str, Any]) -> str:
    """Returns the lines of YAML that make the settings lasting, "" without any."""
    return yaml.safe_dump(nested(changes), sort_keys=False, allow_unicode=True).rstrip() if changes else ""


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted name as the mappings of a configuration file."""
    sections: dict[str, Any] = {}
    for name, value in changes.items():
        *path, last = name.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return sections


def setting_names() -> list[str]:
    """Returns the dotted names of all settings that may be given."""
    return [*(f"{section}.{name}" for section in SECTIONS for name in _fields(section)), *LIMITS]


def _fields(section: str) -> list[str]:
    model = RunConfig.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel), section
    return list(model.model_fields)


def _check_name(name: str) -> None:
    """Raises ConfigError: the name is none of a labelling setting."""
    known = setting_names()
    if name in known:
        return
    section = name.partition(".")[0]
    if section in RunConfig.model_fields and section not in SECTIONS:
        before = ", ".join(stage for stage in STAGES[: STAGES.index(DUPLICATES) + 1])
        raise ConfigError(
            f"--set {name}: {section!r} is no labelling setting. Relabelling starts from the rows that are published "
            f"and changes what follows from stored replies ({', '.join(SECTIONS)}); it reads no source and redoes none "
            f"of the stages {before}. Change the file and run `bimode curate`"
        )
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or [k for k in known if k.startswith(f"{section}.")]
    listed = f"; did you mean {', '.join(near)}?" if near else f"; settings are {', '.join(known)}"
    raise ConfigError(f"--set {name}: there is no such setting{listed}")


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        merged[name] = _merged(merged[name], value) if isinstance(value, dict) else value
    return merged
