"""How many samples the performance heuristic asks for at once: little waste on easy rows, few calls on hard ones.

A wave is one call with n choices: its prompt is computed once. A wave of one wastes no completion when the first answer
is right, and pays for another prompt when it is wrong; all eight at once pay for one prompt. Which is cheaper depends
on how often the teacher fails on such rows and on how long prompts and replies are. Both are learned per source while
rows are labelled, and the cheapest plan for what is known follows by dynamic programming.

The plan decides the cost alone. Labels and their evidence rest on `judges.performance.evidence`, which no grouping of
the samples changes, so what was learned need not be stored: a run that starts again learns again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from judges.performance import draws_all, num_needed
from schemas.config import PerformanceConfig
from schemas.requests import CallFailure, Reply
from schemas.verdicts import Verdict

REASONING_SHARE = 5_495_209 / 16_366_767
"""Share of reasoning rows in R-4B's corpus (Table 1): rows on which eight answers were wrong."""
PRIOR_ROWS = 8.0
"""Before anything is learned, the prior weighs as much as so many rows."""
PRIOR_PROMPT_TOKENS = 500.0
PRIOR_REPLY_TOKENS = 500.0
"""A question with one image, and a reply of usual length; they weigh as much as one call."""
FIRST_ROWS = 32
"""So many rows of a source begin before anything is learned."""
STEADY_REPLIES = 64
"""After so many replies a single one hardly moves the estimates: the plan is made again for each 64th part more."""


@dataclass(frozen=True, slots=True)
class CallCosts:
    """What sampling costs, in the price of one completion token.

    first_prompt, later_prompt: the prompt of a row's first call, and of a later one, which finds it in the prefix
    cache. sample: the completion of one sample.
    """

    first_prompt: float
    later_prompt: float
    sample: float

    def wave(self, num_before: int, size: int) -> float:
        """Returns the cost of a wave of `size` samples after `num_before` others."""
        return (self.later_prompt if num_before else self.first_prompt) + size * self.sample


def expected_cost(waves: Sequence[int], survival: Sequence[float], costs: CallCosts) -> float:
    """Returns the mean cost of a row under fixed waves.

    survival [N + 1]: the share of rows with no right answer among the first k samples, for k = 0 to N; the first is 1.
    """
    num_before, total = 0, 0.0
    for size in waves:
        total += survival[num_before] * costs.wave(num_before, size)
        num_before += size
    return total


def best_waves(survival: Sequence[float], costs: CallCosts) -> tuple[int, ...]:
    """Returns for k = 0 to N - 1 the best size of the next wave of a row whose first k samples were wrong [N].

    survival [N + 1]: as for `expected_cost`. With V(k) = S(k) times the expected cost from k on, V(N) = 0 and
    V(k) = min over w of S(k) * (cost of a wave of w after k) + V(k + w). Of equally good sizes the largest is taken:
    it needs the fewest calls.
    """
    num_samples = len(survival) - 1
    values = [0.0] * (num_samples + 1)
    sizes = [0] * num_samples
    for k in reversed(range(num_samples)):
        options = ((survival[k] * costs.wave(k, w) + values[k + w], -w) for w in range(1, num_samples - k + 1))
        values[k], negative_size = min(options)
        sizes[k] = -negative_size
    return tuple(sizes)


def prior_survival(num_right: int) -> float:
    """Returns the share of rows with no right answer among the first `num_right` samples, before anything is known.

    A share q of all rows is never answered rightly, the pass rates of the others are spread evenly over [0, 1]:
    S(k) = q + (1 - q) / (k + 1), with q such that S(8) is the paper's share of reasoning rows.
    """
    never = (REASONING_SHARE - 1 / 9) / (1 - 1 / 9)
    return never + (1 - never) / (num_right + 1)


class LearnedPlan:
    """The plan for the rows of one source, better with each wave that comes back.

    Failure at the k-th scored answer is counted among the rows that got so far without a right one (Kaplan and Meier's
    estimate), so rows that are still being sampled, the hard ones, do not bias it.
    """

    def __init__(self, config: PerformanceConfig) -> None:
        self._config = config
        prior = [PRIOR_ROWS * prior_survival(k) for k in range(config.num_samples + 1)]
        self._num_tried = prior[:-1]
        self._num_failed = prior[1:]
        self._first_prompts = _PromptTokens()
        self._later_prompts = _PromptTokens()
        self._num_replies = 1.0
        self._reply_tokens = min(PRIOR_REPLY_TOKENS, config.max_tokens / 2)
        self._turns = asyncio.Semaphore(FIRST_ROWS)
        self._num_begun = 0
        self._num_observed = 0
        self._waves: tuple[int, ...] = ()
        self._stale_from = 0

    @asynccontextmanager
    async def turn(self, *, is_first: bool) -> AsyncIterator[None]:
        """Holds a row back until its next wave may be chosen; the wave is chosen, drawn and observed within.

        All rows of a shard come at once. Unheld, each would choose its first wave before any reply has taught anything.
        So at most `FIRST_ROWS` first waves are under way in the beginning, later as many as have come back: the bound
        doubles with every round and soon is none. Further waves (is_first false) never wait.
        """
        if not is_first:
            yield
            return
        async with self._turns:
            yield
        self._num_begun += 1
        if self._num_begun > FIRST_ROWS:
            self._turns.release()

    def next_wave(self, num_wrong: int) -> int:
        """Returns how many samples to ask for at once when so many scored answers were wrong and none right."""
        if self._num_observed >= self._stale_from:
            self._waves = best_waves(self.survival, self.costs)
            self._stale_from = self._num_observed + 1 + self._num_observed // STEADY_REPLIES
        return self._waves[num_wrong]

    @property
    def survival(self) -> tuple[float, ...]:
        """The estimated share of rows with no right answer among the first k scored samples, k = 0 to N."""
        shares = [1.0]
        for num_tried, num_failed in zip(self._num_tried, self._num_failed, strict=True):
            shares.append(shares[-1] * num_failed / num_tried)
        return tuple(shares)

    @property
    def costs(self) -> CallCosts:
        """The estimated costs. Until a later call was seen, its prompt is taken to be cached, so that one is tried."""
        num_calls = 1.0 + self._first_prompts.num_calls + self._later_prompts.num_calls
        prompt_tokens = (PRIOR_PROMPT_TOKENS + self._first_prompts.total + self._later_prompts.total) / num_calls
        first_share = self._first_prompts.cached_share(prompt_tokens, prior_share=0.0)
        later_share = self._later_prompts.cached_share(prompt_tokens, prior_share=1.0)
        return CallCosts(
            prompt_tokens * self._token_cost(first_share),
            prompt_tokens * self._token_cost(later_share),
            self._reply_tokens / self._num_replies,
        )

    def _token_cost(self, cached_share: float) -> float:
        """Returns the cost of one prompt token of a prompt of which a share is cached."""
        settings = self._config
        return cached_share * settings.cached_token_cost + (1.0 - cached_share) * settings.prompt_token_cost

    def observe_verdicts(self, verdicts: Sequence[Verdict], num_known: int) -> None:
        """Learns from a row's verdicts, in order of index, of which the first `num_known` were observed before."""
        num_wrong = 0
        self._num_observed += 1
        for index, verdict in enumerate(verdicts):
            if not verdict.is_scored:
                continue
            if index >= num_known:
                self._num_tried[num_wrong] += 1
                self._num_failed[num_wrong] += not verdict.is_correct
            num_wrong += 1
            if verdict.is_correct or num_wrong == self._config.num_samples:
                return

    def observe_reply(self, reply: Reply, index: int) -> None:
        """Learns from the token counts of a reply. index: of the sample; 0 belongs to a row's first call."""
        self._num_replies += 1
        self._num_observed += 1
        self._reply_tokens += reply.completion_tokens
        if reply.choice == 0:
            prompts = self._later_prompts if index else self._first_prompts
            prompts.num_calls += 1
            prompts.total += reply.prompt_tokens
            prompts.cached += reply.cached_tokens


@dataclass(slots=True)
class _PromptTokens:
    """Prompt tokens of some calls, and those of them that were cached."""

    num_calls: int = 0
    total: int = 0
    cached: int = 0

    def cached_share(self, prior_tokens: float, *, prior_share: float) -> float:
        """Returns the share of cached tokens; a prior call of `prior_tokens` counts as one of those seen."""
        total = self.total + prior_tokens
        return (self.cached + prior_share * prior_tokens) / total if total else prior_share


class SamplingPlans:
    """Chooses the waves of all rows: by the configured list, or by what was learned of their source.

    Shared by all shards of a process, and used from one event loop only. Memory grows with the number of sources.
    """

    def __init__(self, config: PerformanceConfig) -> None:
        self._config = config
        self._learned: dict[str, LearnedPlan] = {}

    def of(self, source: str) -> LearnedPlan:
        """Returns the plan of a source; what it learns counts for all its rows."""
        if source not in self._learned:
            self._learned[source] = LearnedPlan(self._config)
        return self._learned[source]

    def next_indices(self, source: str, verdicts: Sequence[Verdict], *, is_audit: bool) -> range:
        """Returns the indices of the samples to ask for in one call; empty when the row's label is settled.

        verdicts: of all samples so far, in order of index.
        """
        most = num_needed(verdicts, self._config, is_audit=is_audit)
        start = len(verdicts)
        if most == 0 or draws_all(self._config, is_audit=is_audit):
            size = most
        elif self._config.waves == "auto":
            size = self.of(source).next_wave(sum(verdict.is_scored for verdict in verdicts))
        else:
            size = _listed_wave(self._config.waves, start, self._config.num_samples) or most
        return range(start, start + min(size, most))

    def observe(self, source: str, verdicts: Sequence[Verdict], replies: Sequence[Reply | CallFailure]) -> None:
        """Learns from a wave.

        verdicts: of all samples of the row, the wave's included. replies: of the wave; failures teach no costs.
        """
        plan = self.of(source)
        num_known = len(verdicts) - len(replies)
        plan.observe_verdicts(verdicts, num_known)
        for index, reply in enumerate(replies, start=num_known):
            if isinstance(reply, Reply):
                plan.observe_reply(reply, index)


def _listed_wave(waves: Sequence[int], num_drawn: int, num_samples: int) -> int:
    """Returns the rest of the listed wave that sample `num_drawn` belongs to; 0 for a replacement, beyond the list."""
    end = 0
    for wave in waves:
        end = min(end + wave, num_samples)
        if end > num_drawn:
            return end - num_drawn
    return 0
