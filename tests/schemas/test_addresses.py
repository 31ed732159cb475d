"""Credentials inside addresses are seen, and what merely looks like them is let through."""

from __future__ import annotations

import pytest

from schemas.addresses import holds_credentials


@pytest.mark.parametrize(
    "address",
    [
        "http://user:pass@host/v1",
        "HTTPS://user:pass@host:8443",
        "ftp://:pass@host/file",
        "s3://id:secret@bucket/folder",
        "filecache::sftp://user:pass@host/rows.jsonl",
        "http://user:pass@[::1/rows",  # not an address, yet with a password
        "https://bucket.s3.amazonaws.com/a.parquet?X-Amz-Algorithm=A&X-Amz-Signature=abc",
        "https://account.blob.core.windows.net/c/a.parquet?sv=2024&sig=abc%3D",
        "https://host/a?token=abc",
        "cannot read http://user:pass@host/v1: refused",
    ],
)
def test_a_password_or_a_signature_is_a_credential(address: str) -> None:
    assert holds_credentials(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a@b/c.parquet",
        "http://host:8000/v1",
        "abfs://container@account.dfs.core.windows.net/folder",
        "sftp://user@host/rows.jsonl",
        "github://organisation:repository@main/rows.jsonl",
        "https://host/rows.jsonl?download=true",
        "https://host/rows.jsonl?sig=",
        "data/rows.jsonl",
        "user:pass@host",
        "",
    ],
)
def test_places_without_a_password_are_none(address: str) -> None:
    assert not holds_credentials(address)
