"""What a runtime shows of itself at one moment, to those that look at it from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from judges.answers import VerifierPool
from schemas.config import VerificationConfig
from schemas.samples import Sample
from schemas.usage import Ledger
from schemas.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class EndpointView:
    """One address. state: up, down or out, see `teacher.endpoints`. num_deaths: times that it was seen to die.

    num_in_flight: sequences there now; window: most there may be.
    """

    url: str
    model: str
    state: str
    num_in_flight: int
    window: int
    num_deaths: int


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """A runtime at one moment.

    paid: by this process so far. num_waiting: calls that wait for room, by model. verdicts: given so far, by outcome.
    num_comparing: replies that verifier processes have or will get.
    """

    paid: Ledger = field(default_factory=dict)
    endpoints: tuple[EndpointView, ...] = ()
    num_waiting: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)
    num_comparing: int = 0

    @property
    def num_in_flight(self) -> int:
        """Sequences that engines have."""
        return sum(endpoint.num_in_flight for endpoint in self.endpoints)


class CountedVerifiers(VerifierPool):
    """A `VerifierPool` that counts what it is asked in the event loop."""

    def __init__(self, config: VerificationConfig) -> None:
        super().__init__(config)
        self.num_comparing = 0
        self.verdicts: dict[str, int] = {}

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        self.num_comparing += 1
        try:
            verdict = await super().verify_async(reply_text, sample, is_truncated=is_truncated)
        finally:
            self.num_comparing -= 1
        outcome = str(verdict.failure or verdict.outcome)
        self.verdicts[outcome] = self.verdicts.get(outcome, 0) + 1
        return verdict
