"""The tokens of many texts as two flat arrays, for comparisons that need the words themselves.

Row i is the bytes text[offsets[i]:offsets[i + 1]]: its tokens (`filters.normalise.tokens`) in order, each in UTF-8,
joined by single spaces. No token holds a space or is empty, so the join loses nothing; a row without tokens is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenTable:
    """text: uint8 [num_bytes]. offsets: int64 [num_rows + 1], from 0 to num_bytes."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, place: int) -> list[str]:
        """Returns the tokens of one row."""
        content = self.text[self.offsets[place] : self.offsets[place + 1]].tobytes()
        return content.decode("utf-8", "surrogatepass").split(" ") if content else []
