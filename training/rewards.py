"""The rule-based reward of BPO: is the final answer right, as the project's own verification judges it?

Right is 1, wrong is 0. A reply that cannot be scored (cut off, unreadable, a comparison that timed out) has no reward:
it is left out of its group's mean and deviation and gets no advantage, because a failure to judge says nothing about
the policy. Counting it as 0 would teach the model to avoid whatever the verifier cannot read.

R-4B (section 3) uses accuracy on mathematical questions alone. A format reward can be added to every scored reply; it
never stands alone, or an unscored reply would be judged by its looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from judges.answers import VerifierPool
from schemas.config import VerificationConfig
from schemas.samples import Sample
from schemas.template import CLOSE_THINK, OPEN_THINK, ThinkingMode, parse_completion
from schemas.verdicts import Verdict

LogMetric = Callable[[str, float], None]


def accuracy_reward(verdict: Verdict) -> float | None:
    """Returns 1 for a right answer, 0 for a wrong one, None for one that could not be scored."""
    return float(verdict.is_correct) if verdict.is_scored else None


def is_well_formed(completion: str) -> bool:
    """Returns whether a completion, forced prefix included, is one think block followed by an answer.

    A thinking one must hold a thought: a block that opens with a line and closes at once is neither mode.
    """
    if completion.count(OPEN_THINK) != 1 or completion.count(CLOSE_THINK) != 1 or not completion.startswith(OPEN_THINK):
        return False
    parsed = parse_completion(completion)
    is_direct = completion.startswith(f"{OPEN_THINK}\n\n{CLOSE_THINK}")
    return bool(parsed.answer) and (is_direct or bool(parsed.reasoning))


def combined_reward(verdict: Verdict, completion: str, format_weight: float) -> float | None:
    """Returns accuracy plus `format_weight` where the completion is well formed; None where it is unscored."""
    accuracy = accuracy_reward(verdict)
    if accuracy is None:
        return None
    return accuracy + (format_weight if format_weight and is_well_formed(completion) else 0.0)


class RuleReward:
    """A reward function for TRL. Owns the verifier's processes: close it, or use it as a context manager.

    Beside the rewards it logs, for each rollout mode, the mean accuracy and the share of unscored replies, and their
    difference `bpo/delta`, thinking minus direct, which is what moves the choice of mode.
    """

    __name__ = "reward"

    def __init__(self, config: VerificationConfig, *, format_weight: float = 0.0) -> None:
        self._pool = VerifierPool(config)
        self._format_weight = format_weight

    def __enter__(self) -> RuleReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def __call__(
        self,
        *,
        completions: Sequence[Sequence[dict[str, str]]],
        sample: Sequence[Sample],
        rollout_mode: Sequence[str],
        is_truncated: Sequence[bool],
        log_metric: LogMetric,
        **_: Any,
    ) -> list[float | None]:
        """Returns the reward of each completion [2g per prompt], None where it is unscored.

        sample: the question of each completion. rollout_mode: the mode it was forced into. is_truncated: it ended at
        the length limit.
        """
        texts = [turns[0]["content"] for turns in completions]
        verdicts = self._pool.verify_many(list(zip(texts, sample, is_truncated, strict=True)))
        log_by_mode(verdicts, rollout_mode, log_metric)
        return [
            combined_reward(verdict, text, self._format_weight) for verdict, text in zip(verdicts, texts, strict=True)
        ]


def log_by_mode(verdicts: Sequence[Verdict], modes: Sequence[str], log_metric: LogMetric) -> None:
    """Logs accuracy and the share of unscored replies by rollout mode, and the accuracies' difference."""
    means: dict[str, float] = {}
    for mode in sorted(set(modes)):
        own = [verdict for verdict, of in zip(verdicts, modes, strict=True) if of == mode]
        scored = [verdict.is_correct for verdict in own if verdict.is_scored]
        log_metric(f"bpo/unscored_{mode}", 1 - len(scored) / len(own))
        if scored:
            means[mode] = sum(scored) / len(scored)
            log_metric(f"bpo/accuracy_{mode}", means[mode])
    if {ThinkingMode.LONG, ThinkingMode.SHORT} <= set(means):
        log_metric("bpo/delta", means[ThinkingMode.LONG] - means[ThinkingMode.SHORT])
