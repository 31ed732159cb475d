"""Settings in YAML files: read, and what is wrong with them said in one way.

What is said lands in logs and in Prefect's database, so it repeats no value that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.addresses import holds_credentials
from schemas.errors import ConfigError

_SECRET_WORDS = {"key", "keys", "apikey", "token", "secret", "password", "passwd", "pwd"}
_SECRET_WORDS |= {"credential", "credentials", "auth", "authorization", "bearer"}
"""Words in the name of a setting, or in a value itself, that tell of a secret."""
_KEY = re.compile(r"\b(sk-|hf_|ghp_|github_pat_|AKIA|eyJ)\w")
"""How keys of well-known services begin."""
_MAX_SHOWN = 80


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
        # Not the library's own message, which shows the line, whatever stands in it.
        where = getattr(error, "problem_mark", None)
        place = "" if where is None else f" in line {where.line + 1}, column {where.column + 1}"
        raise ConfigError(
            f"{path} is not valid YAML{place}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from None


def wrong_settings(origin: str | Path, error: ValidationError, raw: Any = None) -> ConfigError:
    """Returns the error that says what is wrong: one line per problem, with the setting and the value seen.

    raw: the settings as they were written, before environment variables were filled in. A value that may be a secret is
    not repeated; of one that comes from the environment, the variable's name is.
    """
    lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']} ({_seen(e, raw)})" for e in error.errors()]
    return ConfigError(f"{origin} has {error.error_count()} problem(s):\n" + "\n".join(lines))


def _seen(problem: Any, raw: Any) -> str:
    """Returns what a message says of the value that was wrong."""
    written = _written(raw, problem["loc"])
    if "${" in str(written):
        return f"got {written!r:.{_MAX_SHOWN}}"
    value = problem["input"]
    if value is None or isinstance(value, bool | int | float):
        return f"got {value!r}"
    named, text = " ".join(map(str, problem["loc"])), repr(value)
    if _SECRET_WORDS & _words(named) or _SECRET_WORDS & _words(text) or _KEY.search(text) or holds_credentials(text):
        return "its value is not shown, as it may be secret"
    return f"got {text:.{_MAX_SHOWN}}"


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _written(raw: Any, path: Sequence[str | int]) -> Any:
    """Returns what stands in the settings at a path; None where it cannot be followed (names of union members)."""
    for part in path:
        if isinstance(raw, list):
            raw = dict(enumerate(raw))
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw
