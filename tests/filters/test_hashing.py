"""The compiled xxHash against the package of that name."""

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.hashing import joined64, xxh32, xxh64


@settings(deadline=None)  # the first call compiles
@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_both_hashes_equal_the_package(content: bytes, seed: int, start: int) -> None:
    data = np.frombuffer(b"\xff" * start + content + b"\xff", np.uint8)
    end = start + len(content)
    assert xxh32(data, start, end, np.uint32(seed)) == xxhash.xxh32_intdigest(content, seed)
    assert xxh64(data, start, end, np.uint64(seed)) == xxhash.xxh64_intdigest(content, seed)


def test_joining_depends_on_the_order() -> None:
    one, two = np.uint64(1), np.uint64(2)
    assert joined64(joined64(np.uint64(0), one), two) != joined64(joined64(np.uint64(0), two), one)
