"""What asking has cost, counted per purpose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of the calls of one purpose; sums with +.

    num_calls: requests that no stored reply answered, however they ended. num_reused: requests answered by the journal
    or by an equal call already in flight. num_retries: further attempts beyond the first of a call. num_failures: calls
    that ended without a reply. Tokens are the server's own counts, of replies alone; cached_tokens is the part of
    prompt_tokens it did not compute again. seconds: sum over replies of the time the successful attempt took.
    """

    num_calls: int = 0
    num_reused: int = 0
    num_retries: int = 0
    num_failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in _FIELD_NAMES))

    def to_record(self) -> dict[str, int | float]:
        """Returns plain JSON-able values; `from_record` is the inverse."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, int | float]) -> Usage:
        return cls(**{name: record[name] for name in _FIELD_NAMES})  # type: ignore[arg-type]


_FIELD_NAMES = tuple(field.name for field in fields(Usage))
