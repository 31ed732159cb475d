"""The sum of a file while it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.storage import GrowingDigest, file_sha256


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.integers(0, 600_000), max_size=5))
def test_a_growing_file_has_the_sum_that_it_has_when_read_at_the_end(tmp_path: Path, parts: list[int]) -> None:
    path, content = tmp_path / "file", bytes(range(256)) * 2400
    with path.open("wb", buffering=0) as file, GrowingDigest(path) as digest:
        for part in parts:
            file.write(content[:part])
            digest.follow()
    assert digest.hexdigest() == file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest.num_bytes == path.stat().st_size == sum(parts)
