"""What an evaluation measures of a model's answers, and how sure the figures are.

Accuracy is right answers over questions that have a reference a rule can compare. A reply that cannot be scored (cut
off, a thought that never ends, unreadable, no reply at all) counts there as not right: a benchmark asks for an answer,
and a model must not gain by being unreadable. Since "unscored" is not "wrong" either, its share is reported beside it,
by failure. That differs on purpose from curation and BPO, where an unscored reply is left out of the count.

Thinking rate, tokens and truncation are measured on every reply, also to questions without such a reference. Output
tokens are those the model generated, its end-of-turn token included; the forced prefix of a mode is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from judges.answers import VerifierPool, reference_problem
from schemas.requests import CallFailure
from schemas.samples import Sample
from schemas.template import parse_completion
from schemas.verdicts import Failure, Outcome, Verdict, unscored
from training.benchmark_questions import Question

_Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question.

    completion: its whole text, with the forced prefix of the mode. num_tokens: generated after that prefix.
    failure: why there is none; then the rest is empty.
    """

    completion: str = ""
    num_tokens: int = 0
    is_truncated: bool = False
    failure: CallFailure | None = None

    @property
    def has_thought(self) -> bool:
        """Whether the think block holds anything but white space."""
        return bool(parse_completion(self.completion).reasoning)


@dataclass(frozen=True, slots=True)
class Scored:
    """What counts of one answer. has_reference: its question has one that a rule can compare replies with."""

    outcome: Outcome
    failure: Failure | None
    has_reference: bool
    has_reply: bool
    has_thought: bool
    is_truncated: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Rate:
    """num of total, with the 95 % Wilson score interval (Wilson 1927), which stays inside [0, 1] at the edges."""

    num: int
    total: int

    @property
    def share(self) -> float | None:
        return self.num / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; (0, 1) of nothing."""
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.num / self.total, _Z_95
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        low, high = self.interval
        return {"num": self.num, "of": self.total, "share": self.share, "low": low, "high": high}


@dataclass(frozen=True, slots=True)
class Measures:
    """The figures of a set of answers in one mode. See the module's description for what each counts.

    num_unscored: answers to questions with a reference that could not be scored, by failure.
    """

    num_questions: int
    accuracy: Rate
    thinking_rate: Rate
    truncated: Rate
    num_unscored: dict[str, int]
    num_without_reference: int
    num_output_tokens: int

    @property
    def unscored(self) -> Rate:
        return Rate(sum(self.num_unscored.values()), self.accuracy.total)

    @property
    def mean_output_tokens(self) -> float | None:
        """Tokens per reply."""
        num_replies = self.thinking_rate.total
        return self.num_output_tokens / num_replies if num_replies else None

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        return {
            "num_questions": self.num_questions,
            "num_without_reference": self.num_without_reference,
            "accuracy": self.accuracy.to_record(),
            "thinking_rate": self.thinking_rate.to_record(),
            "mean_output_tokens": self.mean_output_tokens,
            "truncated": self.truncated.to_record(),
            "unscored": self.unscored.to_record() | {"by_failure": self.num_unscored},
        }


def judge_answers(
    questions: Sequence[Question], answers: Sequence[Answer], verifiers: VerifierPool
) -> list[tuple[Scored, Verdict]]:
    """Returns what counts of each answer, and the verdict on it, in order.

    A question with several references is answered rightly by any of them, and wrongly only if all are scored wrong.
    """
    candidates = [_candidates(question) for question in questions]
    items = [
        (answer.completion, sample, answer.is_truncated)
        for answer, samples in zip(answers, candidates, strict=True)
        if answer.failure is None
        for sample in samples
    ]
    verdicts = iter(verifiers.verify_many(items))
    judged = []
    for question, answer, samples in zip(questions, answers, candidates, strict=True):
        if answer.failure is not None:
            verdict = unscored(Failure.NO_REPLY, f"{answer.failure.reason}: {answer.failure.detail}")
        else:
            verdict = _best([next(verdicts) for _ in samples])
        judged.append((_scored(question, answer, verdict), verdict))
    return judged


def score(questions: Sequence[Question], answers: Sequence[Answer], verifiers: VerifierPool) -> Measures:
    """Returns the measures of the answers, one for each question, in order."""
    return measure(scored for scored, _ in judge_answers(questions, answers, verifiers))


def measure(scored: Iterable[Scored]) -> Measures:
    """Returns the measures of scored answers."""
    rows = list(scored)
    judged = [row for row in rows if row.has_reference]
    replies = [row for row in rows if row.has_reply]
    failures = Counter(str(row.failure) for row in judged if row.failure is not None)
    return Measures(
        num_questions=len(rows),
        accuracy=Rate(sum(row.outcome is Outcome.CORRECT for row in judged), len(judged)),
        thinking_rate=Rate(sum(row.has_thought for row in replies), len(replies)),
        truncated=Rate(sum(row.is_truncated for row in replies), len(replies)),
        num_unscored=dict(sorted(failures.items())),
        num_without_reference=len(rows) - len(judged),
        num_output_tokens=sum(row.num_tokens for row in replies),
    )


def measure_by(pairs: Iterable[tuple[Key, Scored]]) -> dict[Key, Measures]:
    """Returns the measures by key, in the order in which keys first occur."""
    groups: dict[Key, list[Scored]] = {}
    for key, scored in pairs:
        groups.setdefault(key, []).append(scored)
    return {key: measure(group) for key, group in groups.items()}


def _candidates(question: Question) -> list[Sample]:
    """Returns the sample once for each of its references that can be compared; as it is if none can."""
    answers = (question.sample.answer, *question.other_answers)
    samples = [_with_answer(question.sample, answer) for answer in answers]
    return [sample for sample in samples if reference_problem(sample) is None] or samples[:1]


def _with_answer(sample: Sample, answer: str | None) -> Sample:
    return sample if answer == sample.answer else replace(sample, answer=answer)


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    rank = {Outcome.CORRECT: 0, Outcome.UNSCORED: 1, Outcome.WRONG: 2}
    return min(verdicts, key=lambda verdict: rank[verdict.outcome])


def _scored(question: Question, answer: Answer, verdict: Verdict) -> Scored:
    return Scored(
        outcome=verdict.outcome,
        failure=verdict.failure,
        has_reference=any(reference_problem(sample) is None for sample in _candidates(question)),
        has_reply=answer.failure is None,
        has_thought=answer.has_thought,
        is_truncated=answer.is_truncated,
        num_tokens=answer.num_tokens,
    )
