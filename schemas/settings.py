"""Settings in YAML files: read, and what is wrong with them said in one way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.errors import ConfigError


def read_yaml(path: Path, what: str = "") -> Any:
    """Returns what a YAML file holds. what: the file as a message names it, e.g. "the configuration ".

    Raises ConfigError: it cannot be read or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what}{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what}{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def wrong_settings(origin: str | Path, error: ValidationError) -> ConfigError:
    """Returns the error that says what is wrong: one line per problem, with the setting and the value seen."""
    lines = [
        f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']} (got {e['input']!r:.80})" for e in error.errors()
    ]
    return ConfigError(f"{origin} has {error.error_count()} problem(s):\n" + "\n".join(lines))
