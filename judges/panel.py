"""A panel of teachers votes on whether an open question needs reasoning, so that one teacher's bias becomes visible.

Every way of voting is a statistic of the probabilities that the teachers give: their median (majority), lowest
(unanimous), highest (any) or mean. That one number is the row's probability, so a row thinks exactly if its probability
reaches the threshold, as with a single teacher, and a changed threshold or vote relabels without a call.

A verdict that is missing (a call that failed, a reply that is neither yes nor no) is never a vote.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from judges.difficulty import decision_at
from schemas.config import DifficultyConfig, EndpointConfig, RunConfig
from schemas.requests import CallFailure
from schemas.verdicts import Decision

NO_QUORUM = "difficulty_no_quorum"

_STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    # Of an even number it is the mean of the two in the middle: above the threshold if both are, and if they differ,
    # which is a tie, if their mean is.
    "majority": statistics.median,
    "unanimous": min,
    "any": max,
    "mean": statistics.fmean,
}


def num_verdicts_needed(config: DifficultyConfig) -> int:
    """Returns how many verdicts settle a row: the configured quorum, or more than half of all teachers."""
    return config.quorum or (1 + len(config.panel)) // 2 + 1


def panel_decision(verdicts: Sequence[float | None], config: DifficultyConfig) -> Decision | None:
    """Returns the mode with the probability that decided it, or None if too few teachers gave a verdict.

    verdicts: of each teacher the probability that reasoning is needed, in [0, 1]; None where it is missing.
    """
    given = [verdict for verdict in verdicts if verdict is not None]
    if len(given) < num_verdicts_needed(config):
        return None
    return decision_at(_STATISTICS[config.vote](given), config)


def missing_quorum(verdicts: Sequence[float | CallFailure], config: RunConfig) -> CallFailure:
    """Returns why a row has no decision: the failure of a teacher that judges alone, else those of the panel."""
    names = teacher_names(config.difficulty_endpoints)
    failures = {name: v for name, v in zip(names, verdicts, strict=True) if isinstance(v, CallFailure)}
    if len(names) == 1:
        return failures[names[0]]
    needed = num_verdicts_needed(config.difficulty)
    listed = "; ".join(f"{name}: {failure.reason}: {failure.detail}" for name, failure in failures.items())
    num_given = len(verdicts) - len(failures)
    return CallFailure(NO_QUORUM, f"{num_given} of {len(names)} teachers gave a verdict, {needed} are needed; {listed}")


def teacher_names(endpoints: Sequence[EndpointConfig]) -> list[str]:
    """Returns a name for each teacher that no other has: its model, with the revision and a number where needed."""
    names: list[str] = []
    for endpoint in endpoints:
        named = f"{endpoint.model}@{endpoint.revision}" if endpoint.revision else endpoint.model
        numbered = (named if number == 1 else f"{named} #{number}" for number in range(1, len(endpoints) + 1))
        names.append(next(name for name in numbered if name not in names))
    return names
