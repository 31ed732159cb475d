"""Credentials inside addresses: found, so that they are refused before an error, a log or a manifest repeats them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_SIGNING = frozenset(
    {
        "x-amz-signature",
        "x-amz-security-token",
        "x-goog-signature",
        "signature",
        "sig",
        "token",
        "access_token",
        "auth",
        "key",
        "api_key",
        "apikey",
        "password",
        "secret",
    }
)
"""Names in a query that sign an address or carry a key: who knows the address may do what they allow."""
_NO_PASSWORD = frozenset({"github"})
"""Schemes that write something else before the "@" (github://organisation:repository@revision/path)."""


def holds_credentials(text: str) -> bool:
    """Returns whether a text holds an address with a password, or one that is signed.

    A user name alone is none: `abfs://container@account` and `sftp://user@host` are how such places are called.
    """
    return any(_holds_credentials(address) for address in _ADDRESS.findall(text))


def _holds_credentials(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets that do not match; the user part comes before them
        return "@" in address and ":" in address.split("://", 1)[1].partition("@")[0]
    if parts.password and parts.scheme not in _NO_PASSWORD:
        return True
    return any(name.lower() in _SIGNING for name, _ in parse_qsl(parts.query))
