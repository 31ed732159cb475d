"""How many rows each stage sees, what it asks the teacher, and how many tokens that is.

The stages are those of `flows.stages`, in their order, with the settings of a configuration. Prompts are those that
the judges really render, about a question of the assumed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flows.estimate import CHARACTERS_PER_TOKEN, TURN_TOKENS, VERDICT_TOKENS
from flows.planning.assumptions import Assumptions, Values
from judges import difficulty, performance, reasoning, routing
from judges.sampling_plan import CallCosts, best_waves
from schemas.config import PerformanceConfig, RunConfig
from schemas.requests import TeacherRequest
from schemas.samples import Kind, Sample, content_id
from schemas.template import Completion

SOURCES, DECONTAMINATION, DUPLICATES, TRACES, CORPUS = "sources", "decontamination", "duplicates", "traces", "corpus"
_QUESTION = "?"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for one purpose; all arrays are [1 + draws].

    samples: replies, of which a call brings one or more. prompt_tokens: of all calls, text and images. new_text_tokens,
    new_image_tokens: those of them that no prefix cache holds. longest_chain: calls of one row, one after the other.
    """

    purpose: str
    model: str
    calls: Values
    samples: Values
    prompt_tokens: Values
    new_text_tokens: Values
    new_image_tokens: Values
    completion_tokens: Values
    longest_chain: int = 1


@dataclass(frozen=True, slots=True)
class StageDemand:
    """rows: that reach the stage. looked_at: that it does something about. kept: that leave it for the next."""

    stage: str
    rows: Values
    looked_at: Values
    kept: Values
    asked: tuple[Asked, ...] = ()


def known_from_sources(assumptions: Assumptions, config: RunConfig) -> Assumptions:
    """Returns the assumptions with what the sources of a configuration settle: what need not be asked about."""
    sources = config.sources
    known: dict[str, float] = {}
    if not config.routing.ask_teacher:
        known |= {"asks_kind_share": 0.0, "asks_topic_share": 0.0}
    if all(source.kind or source.answer_type or source.columns.kind for source in sources):
        known["asks_kind_share"] = 0.0
    if all(source.topic or source.columns.topic for source in sources):
        known["asks_topic_share"] = 0.0
    if all(source.kind is Kind.SUBJECTIVE for source in sources):
        known["objective_share"] = 0.0
    if all(source.kind is Kind.OBJECTIVE and source.columns.answer for source in sources):
        known["objective_share"] = 1.0
    if not any(source.columns.images or source.columns.conversations for source in sources):
        known["text_only_share"] = 1.0
    return assumptions.known("the sources of the configuration", **known)


def demand(
    num_rows: int, config: RunConfig, assumptions: Assumptions, sampling: SamplingCost | None = None
) -> list[StageDemand]:
    """Returns what each stage of a run over so many rows sees and asks, in order, the corpus last.

    sampling: what the performance heuristic asks per objective row, where it was measured.
    """
    prompts, a = _Prompts(config, assumptions), assumptions
    stages: list[StageDemand] = []

    def add(stage: str, rows: Values, kept: Values, looked_at: Values | None = None, *asked: Asked) -> Values:
        stages.append(StageDemand(stage, rows, rows if looked_at is None else looked_at, kept, asked))
        return kept

    rows = np.full_like(a.quarantined_share.drawn(), float(num_rows))
    rows = add(SOURCES, rows, rows * (1 - a.quarantined_share.drawn()))
    if config.decontamination.benchmarks:
        rows = add(DECONTAMINATION, rows, rows * (1 - a.leaked_share.drawn()))
    rows = add(DUPLICATES, rows, rows * (1 - a.duplicate_share.drawn()))
    objective, thinking = rows * a.objective_share.drawn(), a.thinking_objective_share.drawn()
    subjective, open_thinking = rows - objective, a.thinking_subjective_share.drawn()
    rows = add("routing", rows, rows, None, *_routing(rows, prompts))
    rows = add("difficulty", rows, rows, subjective, *_difficulty(subjective, prompts))
    rows = add("performance", rows, rows, objective, _performance(objective, thinking, prompts, sampling))
    checked, open_ended = objective * thinking, subjective * open_thinking
    asked, lost = _reasoning(checked, open_ended, prompts)
    rows = add("reasoning", rows, rows - lost, checked + open_ended, *asked)
    traces = checked + open_ended - lost
    rows = add(TRACES, rows, rows - traces * a.repeated_trace_share.drawn(), traces)
    unanswered = (subjective - open_ended) * a.unanswered_share.drawn()
    rows = add("answers", rows, rows, unanswered, _direct(unanswered, prompts))
    add(CORPUS, rows, rows)
    return stages


class _Prompts:
    """The lengths of what the judges ask, in tokens, by the project's rule of thumb for text."""

    def __init__(self, config: RunConfig, assumptions: Assumptions) -> None:
        self.config = config
        self.assumptions = assumptions
        a = assumptions
        self.question = a.question_tokens.drawn()
        self.image = (1 - a.text_only_share.drawn()) * a.images_per_row.drawn() * a.image_tokens.drawn()

    def asked(
        self,
        request: TeacherRequest,
        calls: Values,
        completion: Values | float,
        *,
        samples: Values | None = None,
        first_calls: Values | None = None,
        more_text: Values | float = 0.0,
        model: str = "",
        purpose: str = "",
        longest_chain: int = 1,
    ) -> Asked:
        """Returns what calls like this one add up to.

        completion: tokens of one sample. first_calls: those whose prompt is in no cache; all by default. more_text:
        tokens of a prompt beside question and instructions.
        """
        samples = calls if samples is None else samples
        first_calls = calls if first_calls is None else first_calls
        characters = sum(len(message.text) for message in request.messages) - len(_QUESTION)
        text = characters / CHARACTERS_PER_TOKEN + TURN_TOKENS * len(request.messages) + self.question + more_text
        return Asked(
            purpose or request.purpose,
            model or self.config.teacher.model,
            calls,
            samples,
            calls * (text + self.image),
            first_calls * text,
            first_calls * self.image,
            samples * completion,
            longest_chain,
        )

    def sample(self, kind: Kind) -> Sample:
        return Sample(content_id("plan", _QUESTION, [], [], None, ""), "plan", "plan#0", _QUESTION, kind=kind)


def _routing(rows: Values, prompts: _Prompts) -> list[Asked]:
    a, sample = prompts.assumptions, prompts.sample(Kind.OBJECTIVE)
    return [
        prompts.asked(routing.kind_request(sample), rows * a.asks_kind_share.drawn(), VERDICT_TOKENS),
        prompts.asked(routing.topic_request(sample), rows * a.asks_topic_share.drawn(), VERDICT_TOKENS),
    ]


def _difficulty(rows: Values, prompts: _Prompts) -> list[Asked]:
    request = difficulty.difficulty_request(prompts.sample(Kind.SUBJECTIVE))
    asked = prompts.asked(request, rows, VERDICT_TOKENS)
    panel = [replace(asked, model=endpoint.model) for endpoint in prompts.config.difficulty.panel]
    return [asked, *panel]


def survival(thinking_share: float, num_samples: int) -> list[float]:
    """Returns the share of rows without a right answer among the first k samples, k = 0 to N; the last is given.

    As `judges.sampling_plan.prior_survival`: some rows are never answered rightly, the pass rates of the others are
    spread evenly, so 1 / (k + 1) of these are still without a right answer. Where even spread alone leaves more than
    the given share, pass rates are higher: (k + 1) to a power.
    """
    least = 1 / (num_samples + 1)
    if thinking_share >= least:
        never = (thinking_share - least) / (1 - least)
        return [never + (1 - never) / (k + 1) for k in range(num_samples + 1)]
    power = np.log(max(thinking_share, 1e-9)) / np.log(least)
    return [float((k + 1) ** -power) for k in range(num_samples + 1)]


@dataclass(frozen=True, slots=True)
class SamplingCost:
    """What the performance heuristic asks per row: calls, samples, and the most calls one after the other."""

    calls: float
    samples: float
    longest_chain: int


def sampling_cost(config: PerformanceConfig, thinking_share: float, costs: CallCosts) -> SamplingCost:
    """Returns the mean cost of a row. costs: of prompts and samples, from which `auto` waves follow."""
    shares = survival(thinking_share, config.num_samples)
    waves = [config.num_samples] if config.exhaustive else _waves(config, shares, costs)
    calls = samples = 0.0
    num_before = 0
    for size in waves:
        calls += shares[num_before]
        samples += shares[num_before] * size
        num_before += size
    audit = config.audit_share  # these rows draw all samples in one call
    return SamplingCost(audit + (1 - audit) * calls, audit * config.num_samples + (1 - audit) * samples, len(waves))


def _waves(config: PerformanceConfig, shares: Sequence[float], costs: CallCosts) -> list[int]:
    waves: list[int] = []
    if config.waves == "auto":
        sizes = best_waves(shares, costs)
        while sum(waves) < config.num_samples:
            waves.append(sizes[sum(waves)])
    else:
        for size in config.waves:
            waves.append(min(size, config.num_samples - sum(waves)))
    return [size for size in waves if size]


def _performance(rows: Values, thinking: Values, prompts: _Prompts, sampling: SamplingCost | None) -> Asked:
    config, answer = prompts.config.performance, prompts.assumptions.answer_tokens.drawn()
    answer = np.minimum(answer, config.max_tokens)
    request = performance.performance_request(prompts.sample(Kind.OBJECTIVE), 0, config, seed=0)
    prompt = prompts.asked(request, np.ones_like(rows), 0.0).prompt_tokens
    each = [
        sampling
        or sampling_cost(
            config,
            share,
            CallCosts(length * config.prompt_token_cost, length * config.cached_token_cost, tokens),
        )
        for share, length, tokens in zip(thinking, prompt, answer, strict=True)
    ]
    calls, samples = (np.array([getattr(cost, name) for cost in each]) for name in ("calls", "samples"))
    # The further waves of a row come seconds later: its prompt is still cached.
    return prompts.asked(
        request,
        rows * calls,
        answer,
        samples=rows * samples,
        first_calls=rows,
        longest_chain=each[0].longest_chain,
    )


def _reasoning(checked: Values, open_ended: Values, prompts: _Prompts) -> tuple[list[Asked], Values]:
    """Returns what is asked for the thinking rows, and how many of them end without a trace."""
    config, a = prompts.config, prompts.assumptions
    tries, most = config.reasoning, config.reasoning.num_tries
    trace = np.minimum(a.trace_tokens.drawn(), tries.max_tokens)
    right, consistent = a.trace_right_share.drawn(), a.trace_consistent_share.drawn()
    checked_tries, open_tries = _mean_tries(right, most), _mean_tries(consistent, most)
    calls = checked * checked_tries + open_ended * open_tries
    reasoner = config.reasoner_endpoint.model
    request = reasoning.reasoning_request(prompts.sample(Kind.OBJECTIVE), 0, tries, seed=0)
    asked = [prompts.asked(request, calls, trace, first_calls=checked + open_ended, model=reasoner, longest_chain=most)]
    if tries.judge_consistency:
        sample = prompts.sample(Kind.SUBJECTIVE)
        judged = reasoning.consistency_request(sample, Completion("", ""))
        asked.append(prompts.asked(judged, open_ended * open_tries, VERDICT_TOKENS, more_text=trace))
    lost = checked * (1 - right) ** most + open_ended * (1 - consistent) ** most
    return asked, lost


def _mean_tries(success: Values, most: int) -> Values:
    """Returns the mean number of tries until the first success, at most so many: (1 - (1 - p)^m) / p."""
    safe = np.maximum(success, 1e-9)
    return np.asarray((1 - (1 - safe) ** most) / safe)


def _direct(rows: Values, prompts: _Prompts) -> Asked:
    config = prompts.config.direct
    answer = np.minimum(prompts.assumptions.direct_tokens.drawn(), config.max_tokens)
    request = reasoning.direct_request(prompts.sample(Kind.SUBJECTIVE), config, seed=0)
    return prompts.asked(request, rows, answer)
