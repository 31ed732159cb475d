"""Keeps secrets out of logs and traces: known ones by value, others by how they are written.

What is known are the values of environment variables that hold keys, by the names that the configuration gives
(`api_key_env`) and by how such variables are called.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from schemas.config import RunConfig

REDACTED = "[redacted]"
MIN_CHARACTERS = 6
"""Shorter values are words that occur anywhere; who has such a key has none."""
_SECRET_NAME = re.compile(
    r"KEY$|TOKEN$|SECRET|PASSW|CREDENTIAL|AUTH_STRING$|AUTHORIZATION$|OTLP(_TRACES)?_HEADERS$", re.IGNORECASE
)
_PATTERNS = (
    # The header, as text, JSON or a Python dict: the rest of its value.
    (re.compile(r"""(authorization\\?["']?\s*[:=]\s*\\?["']?)[^\r\n"'\\,;}]+""", re.IGNORECASE), rf"\g<1>{REDACTED}"),
    (re.compile(r"\b(bearer|basic)\s+(?=[\w.~+/=-]*[\d+/=])[\w.~+/=-]{6,}", re.IGNORECASE), rf"\g<1> {REDACTED}"),
    (
        re.compile(
            r"""\b((?:x-)?api[_-]?key|password|secret)(\\?["']?\s*[:=]\s*\\?["']?)[^\s"'\\,;&}]+""", re.IGNORECASE
        ),
        rf"\g<1>\g<2>{REDACTED}",
    ),
    # User and password of an address, of a database's for example.
    (re.compile(r"(\w://)[^\s/@:]*:[^\s/@]+@"), rf"\g<1>{REDACTED}@"),
    (re.compile(r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[opsu]_\w{20,}|AKIA[A-Z0-9]{16})\b"), REDACTED),
)


class Redactor:
    """Replaces secrets in texts. values: known secrets; those under `MIN_CHARACTERS` are left out."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        known = sorted({value for value in values if len(value) >= MIN_CHARACTERS}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    @classmethod
    def of(cls, config: RunConfig | None, environment: Mapping[str, str] = os.environ) -> Redactor:
        """Returns what hides a run's secrets: values of the variables its endpoints name, and of all called like it."""
        endpoints = [] if config is None else [config.teacher, config.reasoner_endpoint, *config.difficulty.panel]
        named = {endpoint.api_key_env for endpoint in endpoints}
        values = [value.strip() for name, value in environment.items() if name in named or _SECRET_NAME.search(name)]
        # Of KEY=value,KEY=value each value; a header's value without its scheme.
        parts = [part for value in values for part in re.split(r"[,\s]|(?<=\w)=", value)]
        return cls([*values, *parts])

    def text(self, text: str) -> str:
        """Returns a text without its secrets."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    def value(self, value: Any) -> Any:
        """Returns a JSON-able value without secrets; what is neither finite number nor container becomes its text."""
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.value(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(entry) for entry in value]
        return self.text(str(value))


class SecretFilter(logging.Filter):
    """Redacts the records that pass a handler, for every handler after it, too."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        message = self._message(record)
        redacted = self._redactor.text(message)
        if redacted != message:
            record.msg, record.args = redacted, None
        if record.exc_info and not record.exc_text:
            # Formatters take this text instead of making their own.
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self._redactor.text(record.exc_text)
        return True

    @staticmethod
    def _message(record: logging.LogRecord) -> str:
        try:
            return record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: the handler complains about it
            return str(record.msg)
