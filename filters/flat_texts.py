"""An Arrow string column as two flat arrays, which compiled code reads without an object per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FlatTexts:
    """Row i is the UTF-8 bytes content[offsets[i]:offsets[i + 1]]. content: uint8. offsets: int64 [num_rows + 1]."""

    content: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> FlatTexts:
        """Returns a string column; absent texts are empty. Copies the text only where the column has several chunks."""
        flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        flat = flat.cast(pa.large_string())
        if flat.null_count:
            flat = flat.fill_null("")
        _, offsets, content = flat.buffers()
        if not len(flat):
            return cls(np.zeros(1, np.uint8), np.zeros(1, np.int64))
        return cls(
            np.frombuffer(content, np.uint8) if content is not None and content.size else np.zeros(1, np.uint8),
            np.frombuffer(offsets, np.int64)[flat.offset : flat.offset + len(flat) + 1],
        )

    @classmethod
    def of_strings(cls, texts: Sequence[str]) -> FlatTexts:
        """Returns texts in memory, which may hold lone surrogates."""
        rows = [text.encode("utf-8", "surrogatepass") for text in texts]
        content = np.frombuffer(b"".join([*rows, b" "]), np.uint8)
        return cls(content, np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """The bytes of the longest row."""
        return int(np.diff(self.offsets).max(initial=0))

    def text(self, place: int) -> str:
        content = self.content[self.offsets[place] : self.offsets[place + 1]].tobytes()
        return content.decode("utf-8", "surrogatepass")
