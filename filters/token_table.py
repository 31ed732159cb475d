"""The tokens of many texts as two flat arrays, the form in which texts are compared by the million.

Row i is the bytes text[offsets[i]:offsets[i + 1]]: its tokens (`filters.normalise.tokens`) in order, each in UTF-8,
joined by single spaces. No token holds a space or is empty, so the join loses nothing; a row without tokens is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from filters.normalise import normalise_text, tokens


@dataclass(frozen=True, slots=True)
class TokenTable:
    """text: uint8 [num_bytes]. offsets: int64 [num_rows + 1], from 0 to num_bytes."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __add__(self, other: TokenTable) -> TokenTable:
        """Returns the rows of both tables, one table after the other."""
        text = np.concatenate([self.text[: self.offsets[-1]], other.text[other.offsets[0] : other.offsets[-1]]])
        return TokenTable(text, np.concatenate([self.offsets, other.offsets[1:] - other.offsets[0] + self.offsets[-1]]))

    def row(self, place: int) -> list[str]:
        """Returns the tokens of one row."""
        content = self.text[self.offsets[place] : self.offsets[place + 1]].tobytes()
        return content.decode("utf-8", "surrogatepass").split(" ") if content else []


def joined_tokens(text: str) -> bytes:
    """Returns one row of a table, from a raw text."""
    return " ".join(tokens(normalise_text(text))).encode("utf-8", "surrogatepass")


def token_table(texts: Sequence[str]) -> TokenTable:
    """Returns the table of raw texts, one row each, in order."""
    rows = [joined_tokens(text) for text in texts]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return TokenTable(np.frombuffer(b"".join(rows), np.uint8), offsets)
