"""What judges conclude: three-valued verdicts on replies, and the decision between the two modes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Unscored is not wrong: a timeout, a truncated or an unreadable reply says nothing about the question."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


class Failure(StrEnum):
    """Why a reply could not be scored."""

    TRUNCATED = "truncated"
    EMPTY = "empty"
    UNREADABLE = "unreadable"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    NO_REPLY = "no_reply"
    NO_REFERENCE = "no_reference"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of comparing one reply with the reference.

    extracted: the part of the reply taken as its final answer. failure: set exactly when the outcome is unscored.
    """

    outcome: Outcome
    extracted: str | None = None
    failure: Failure | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        assert (self.failure is not None) == (self.outcome is Outcome.UNSCORED), "failure goes with unscored"

    @property
    def is_correct(self) -> bool:
        return self.outcome is Outcome.CORRECT

    @property
    def is_scored(self) -> bool:
        return self.outcome is not Outcome.UNSCORED


def correct(extracted: str | None = None, detail: str = "") -> Verdict:
    return Verdict(Outcome.CORRECT, extracted, None, detail)


def wrong(extracted: str | None = None, detail: str = "") -> Verdict:
    return Verdict(Outcome.WRONG, extracted, None, detail)


def unscored(failure: Failure, detail: str = "", extracted: str | None = None) -> Verdict:
    return Verdict(Outcome.UNSCORED, extracted, failure, detail)


class Mode(StrEnum):
    """The two modes of the corpus."""

    THINK = "think"
    DIRECT = "direct"


class Heuristic(StrEnum):
    """Which of the paper's two heuristics (section 2.1) decided the mode."""

    DIFFICULTY = "difficulty"
    PERFORMANCE = "performance"


@dataclass(frozen=True, slots=True)
class Decision:
    """The mode of one sample with its evidence.

    num_right, num_scored, num_sampled: the performance heuristic's counts (0 for the difficulty heuristic).
    probability: the difficulty heuristic's probability that reasoning is needed, in [0, 1]; else None.
    is_audit: all samples were drawn whatever their outcome, so that num_right / num_scored is an unbiased pass rate.
    """

    mode: Mode
    heuristic: Heuristic
    num_right: int = 0
    num_scored: int = 0
    num_sampled: int = 0
    probability: float | None = None
    is_audit: bool = False
