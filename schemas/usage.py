"""What asking the teacher costs: counts that sum, kept by stage, purpose, source and model, and their price.

Two ledgers are kept apart everywhere. The *cost of the replies* counts every stored reply that some rows asked for,
whoever paid for it and when. What a *run paid* counts the calls that one process really made.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

from schemas.config import PricesConfig
from schemas.requests import Reply


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts that sum with +.

    num_calls: calls that had to be made, however they ended; one may bring several replies. num_replies: replies they
    brought. num_reused: requests answered by the journal or by an equal call already under way. num_retries: attempts
    beyond the first of a call. num_failures: calls that ended without a reply. Tokens are the server's own counts, of
    replies alone; cached_tokens is the part of prompt_tokens it did not compute again. seconds: sum over calls of the
    time the successful attempt took. wall_seconds: time on the clock, which calls under way together share; sums over
    calls are the time during which any was under way. gpu_seconds: the same for the GPUs of a server of ours, times
    their number. num_gpu_calls: calls of which gpu_seconds is known.

    Where replies are counted whoever paid for them, num_reused, num_failures and wall_seconds are 0.
    """

    num_calls: int = 0
    num_replies: int = 0
    num_reused: int = 0
    num_retries: int = 0
    num_failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    num_gpu_calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, _counts(self), _counts(other)))

    @classmethod
    def of_replies(cls, replies: Sequence[Reply], *, num_calls: int = 0, num_retries: int = 0) -> Usage:
        """Returns what replies add to their calls: the prompt of a call belongs to its first choice."""
        firsts = [reply for reply in replies if reply.choice == 0]
        return cls(
            num_calls=num_calls,
            num_replies=len(replies),
            num_retries=num_retries,
            prompt_tokens=sum([reply.prompt_tokens for reply in firsts]),
            completion_tokens=sum([reply.completion_tokens for reply in replies]),
            cached_tokens=sum([reply.cached_tokens for reply in firsts]),
            seconds=sum([reply.seconds for reply in firsts]),
        )

    @classmethod
    def of_stored(cls, reply: Reply) -> Usage:
        """Returns what a stored reply cost, whoever paid: its call, too, if it is the first choice of that."""
        if reply.choice:
            return cls.of_replies([reply])
        return cls.of_replies([reply], num_calls=1, num_retries=reply.num_attempts - 1)

    @property
    def is_gpu_time_whole(self) -> bool:
        """Whether gpu_seconds is known of every call; otherwise it is a lower bound."""
        return self.num_gpu_calls >= self.num_calls

    def to_record(self) -> dict[str, int | float]:
        """Returns plain JSON-able values; `from_record` is the inverse."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, int | float]) -> Usage:
        """Returns the usage of a record, which may hold more. Raises KeyError: a count is missing."""
        return cls(**{name: record[name] for name in _FIELD_NAMES})  # type: ignore[arg-type]


_FIELD_NAMES = tuple(field.name for field in fields(Usage))
_counts = operator.attrgetter(*_FIELD_NAMES)


@dataclass(frozen=True, slots=True, order=True)
class UsageKey:
    """What a usage was for. purpose: the judge that asked. model: the name by which it was asked."""

    stage: str
    purpose: str
    source: str
    model: str


Ledger: TypeAlias = Mapping[UsageKey, Usage]
Field = Literal["stage", "purpose", "source", "model"]


def total_usage(usages: Iterable[Usage]) -> Usage:
    return sum(usages, Usage())


def merged_ledgers(ledgers: Iterable[Ledger]) -> dict[UsageKey, Usage]:
    """Returns the sum of several ledgers, the keys in order of their first appearance."""
    merged: dict[UsageKey, Usage] = {}
    for ledger in ledgers:
        for key, usage in ledger.items():
            merged[key] = merged.get(key, Usage()) + usage
    return merged


def split_ledger(ledger: Ledger, *fields: Field) -> dict[tuple[str, ...], dict[UsageKey, Usage]]:
    """Returns the parts of a ledger by the values of some fields of its keys, in order of their first appearance."""
    parts: dict[tuple[str, ...], dict[UsageKey, Usage]] = {}
    for key, usage in ledger.items():
        parts.setdefault(tuple(getattr(key, name) for name in fields), {})[key] = usage
    return parts


@dataclass(frozen=True, slots=True)
class Cost:
    """An amount in the currency of the prices. is_whole: else it lacks GPU time that has a price but is unknown."""

    amount: float = 0.0
    is_whole: bool = True

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.amount + other.amount, self.is_whole and other.is_whole)


def cost_of(ledger: Ledger, prices: PricesConfig) -> Cost:
    """Returns what a ledger costs at the prices of its models."""
    return sum((_usage_cost(usage, key.model, prices) for key, usage in ledger.items()), Cost())


def _usage_cost(usage: Usage, model: str, prices: PricesConfig) -> Cost:
    price = prices.of(model)
    cached_price = price.prompt if price.cached_prompt is None else price.cached_prompt
    # A server may count more tokens as cached than there were; nobody is paid back for those.
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    tokens = (usage.prompt_tokens - cached) * price.prompt + cached * cached_price
    tokens += usage.completion_tokens * price.completion
    is_whole = price.gpu_hour == 0 or usage.is_gpu_time_whole
    return Cost(tokens / 1e6 + usage.gpu_seconds / 3600 * price.gpu_hour, is_whole)
