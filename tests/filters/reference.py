"""The definitions of near duplicates on plain Python sets, one pair at a time: what the compiled code must equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from filters.normalise import content_tokens, normalise_text, tokens


@dataclass(frozen=True, slots=True)
class ComparedText:
    """A text ready for comparison: its tokens in order and the set of their shingles."""

    tokens: tuple[str, ...]
    shingles: frozenset[str]


def compared(text: str, size: int) -> ComparedText:
    words = tokens(normalise_text(text))
    return ComparedText(tuple(words), shingles(words, size))


def shingles(words: Sequence[str], size: int) -> frozenset[str]:
    """Returns the set of `size`-grams of the tokens, both ends padded with `size - 1` empty tokens.

    Without the padding the first and the last word lie in one shingle and all others in `size`: "What colour is the car
    that stands behind the bus?" would pass for the same question about a truck.
    """
    padded = [""] * (size - 1) + list(words) + [""] * (size - 1)
    return frozenset(" ".join(padded[start : start + size]) for start in range(len(padded) - size + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    num_all = len(first | second)
    return len(first & second) / num_all if num_all else 1.0


def similarity(first: ComparedText, second: ComparedText, *, threshold: float) -> float | None:
    """Returns the Jaccard similarity of two texts that say the same in the same order, or None."""
    likeness = jaccard(first.shingles, second.shingles)
    return likeness if likeness >= threshold and is_same_order(first.tokens, second.tokens) else None


def is_same_order(first: Sequence[str], second: Sequence[str]) -> bool:
    content = content_tokens(first), content_tokens(second)
    counts = Counter(content[0]), Counter(content[1])
    shared = {token for token, count in counts[0].items() if counts[1][token] == count}
    return [token for token in content[0] if token in shared] == [token for token in content[1] if token in shared]


def joined_tokens(text: str) -> bytes:
    """Returns the tokens of a raw text in UTF-8, joined by single spaces."""
    return " ".join(tokens(normalise_text(text))).encode("utf-8", "surrogatepass")
