"""The dry run: what a curation would ask of its teacher, how much, and at what price.

Sources are read, duplicates found and rows routed by rule, as the run itself does it (and what is read is kept for it).
How many samples, traces and answers follow depends on replies, so calls are bounded from below and above, with a likely
value between: the share of rows that need reasoning is taken from the paper (R-4B, Table 1: 5,495,209 of 16,366,767).
These are rules of thumb, and nothing is asked. Where the user allows it, a sample of rows is really labelled, and its
token counts take their place (`flows.sampling_estimate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from corpus.accounting import amount
from flows import removing, stages
from flows.accounting import duration, paid_line
from flows.decontaminating import Benchmarks
from flows.removals import RemovalPlan, split_rows
from flows.runtime import Runtime
from flows.sampling_estimate import Measurement, RowSampler, Scaled, measure
from flows.stages import Progress
from flows.workspace import Marker
from judges import difficulty, performance, reasoning, routing
from judges.panel import teacher_names
from judges.routing import Route, route_by_rules
from judges.sampling_plan import REASONING_SHARE
from schemas.config import EndpointConfig, PricesConfig, RunConfig
from schemas.requests import TeacherRequest
from schemas.samples import Kind, Sample, table_to_samples
from schemas.usage import Usage, UsageKey, cost_of
from sources import plan_units

CHARACTERS_PER_TOKEN = 4.0
"""Rule of thumb for English text and byte-level BPE."""
PIXELS_PER_TOKEN = 28 * 28
"""Qwen2.5-VL: patches of 14 pixels, merged two by two."""
TURN_TOKENS = 12
VERDICT_TOKENS = 2


@dataclass(frozen=True, slots=True)
class PurposeEstimate:
    """Calls of one purpose: at least low, at most high.

    prompt_tokens: of the likely calls; max_prompt_tokens: of the high ones. max_completion_tokens: the bound that the
    settings put on those. max_cost: of both at the configured prices. example: the first such request, as text.
    """

    purpose: str
    low: int
    likely: int
    high: int
    prompt_tokens: int
    max_prompt_tokens: int
    max_completion_tokens: int
    max_cost: float
    example: str


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run would ask. num_rows: read; num_quarantined, num_leaks, num_duplicates: never asked about.

    has_prices: whether anything has a price. measured: by a sample of rows, if one was asked about.
    """

    num_rows: int
    num_quarantined: int
    num_leaks: int
    num_duplicates: int
    purposes: tuple[PurposeEstimate, ...]
    has_prices: bool
    measured: Measurement | None = None

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


class _Purpose:
    """Adds up the requests of one purpose."""

    def __init__(self, purpose: str, endpoint: EndpointConfig, prices: PricesConfig) -> None:
        self.purpose = purpose
        self.endpoint = endpoint
        self.prices = prices
        self.low, self.likely, self.high = 0.0, 0.0, 0.0
        self.prompt_tokens, self.max_prompt_tokens, self.max_completion_tokens = 0.0, 0.0, 0.0
        self.example = ""

    def add(self, request: TeacherRequest, sample: Sample, *, low: float, likely: float, high: float) -> None:
        self.low, self.likely, self.high = self.low + low, self.likely + likely, self.high + high
        prompt_tokens = _prompt_tokens(request, sample, self.endpoint)
        self.prompt_tokens += likely * prompt_tokens
        self.max_prompt_tokens += high * prompt_tokens
        self.max_completion_tokens += high * (VERDICT_TOKENS if request.choices else request.sampling.max_tokens)
        self.example = self.example or render_request(request)

    def estimate(self) -> PurposeEstimate:
        most = Usage(prompt_tokens=round(self.max_prompt_tokens), completion_tokens=round(self.max_completion_tokens))
        key = UsageKey("", self.purpose, "", self.endpoint.model)
        return PurposeEstimate(
            self.purpose,
            round(self.low),
            round(self.likely),
            round(self.high),
            round(self.prompt_tokens),
            most.prompt_tokens,
            most.completion_tokens,
            cost_of({key: most}, self.prices).amount,
            self.example,
        )


def _prompt_tokens(request: TeacherRequest, sample: Sample, endpoint: EndpointConfig) -> float:
    text = sum(len(message.text) / CHARACTERS_PER_TOKEN + TURN_TOKENS for message in request.messages)
    pixels = sum(min(image.num_pixels, endpoint.max_image_pixels) for image in sample.images)
    return text + pixels / PIXELS_PER_TOKEN


def render_request(request: TeacherRequest) -> str:
    """Returns a request as a person reads it."""
    lines = []
    for message in request.messages:
        images = f" [{len(message.images)} image(s)]" if message.images else ""
        lines.append(f"{message.role}:{images} {message.text}")
    if request.choices:
        lines.append(f"(one of: {', '.join(request.choices)})")
    return "\n".join(lines)


def estimate_run(config: RunConfig, *, num_sampled: int = 0) -> RunEstimate:
    """Returns the estimate. num_sampled: rows that are really asked about, to measure; 0 asks nothing.

    Raises ConfigError, SourceError, StorageError as the run would, and if rows are asked about TeacherError and
    ServingError, too.
    """
    runtime = Runtime(config)
    try:
        with runtime.workspace.locked():
            units = plan_units(config)
            progress = Progress(sum(unit.num_rows for unit in units))
            markers = [stages.read_source_shard(runtime, unit, progress) for unit in units]
            num_quarantined = sum(marker.count.num_quarantined for marker in markers)
            if config.decontamination.benchmarks:
                benchmarks = runtime.shared(Benchmarks)
                markers = [stages.remove_leaks(runtime, benchmarks, marker, Progress(0)) for marker in markers]
            num_leaks = sum(marker.count.num_dropped for marker in markers)
            plan = removing.plan_duplicates(runtime, markers)
            sampler = RowSampler(num_sampled, seed=config.seed) if num_sampled else None
            purposes = _estimate_purposes(_kept_samples(runtime, markers, plan, sampler), config)
            measured = measure(runtime, sampler) if sampler is not None and sampler.num_seen else None
    finally:
        runtime.close()
    num_removed = sum(removals.num_rows for removals in plan.values())
    return RunEstimate(
        progress.num_total, num_quarantined, num_leaks, num_removed, purposes, config.prices.has_any, measured
    )


def _kept_samples(
    runtime: Runtime, markers: Sequence[Marker], plan: RemovalPlan, sampler: RowSampler | None
) -> Iterator[Sample]:
    """Yields the rows that will be asked about; shows them to the sampler, too."""
    for marker in markers:
        rows = runtime.workspace.read_rows(marker.stage, marker.shard)
        for sample in table_to_samples(split_rows(rows, plan.get(marker.shard), stages.DUPLICATES)[0]):
            if sampler is not None:
                sampler.see(marker.shard, sample)
            yield sample


def _estimate_purposes(samples: Iterator[Sample], config: RunConfig) -> tuple[PurposeEstimate, ...]:
    teacher, voters = config.teacher, config.difficulty_endpoints
    asked = {
        routing.ROUTING: teacher,
        routing.TOPIC: teacher,
        **dict(zip(_difficulty_purposes(config), voters, strict=True)),
        performance.PURPOSE: teacher,
        reasoning.PURPOSE: config.reasoner_endpoint,
        reasoning.DIRECT: teacher,
    }
    named = {name: _Purpose(name, endpoint, config.prices) for name, endpoint in asked.items()}
    for sample in samples:
        _add_row(named, route_by_rules(sample), config)
    return tuple(purpose.estimate() for purpose in named.values())


def _difficulty_purposes(config: RunConfig) -> list[str]:
    """Returns what a panel's calls are listed under: those of the main teacher as always, the others by name."""
    _, *names = teacher_names(config.difficulty_endpoints)
    return [difficulty.PURPOSE, *(f"{difficulty.PURPOSE}, {name}" for name in names)]


def _add_row(named: dict[str, _Purpose], route: Route, config: RunConfig) -> None:
    sample, asks = route.sample, config.routing.ask_teacher
    if asks and route.needs_kind:
        named[routing.ROUTING].add(routing.kind_request(sample), sample, low=1, likely=1, high=1)
    if asks and route.needs_topic:
        named[routing.TOPIC].add(routing.topic_request(sample), sample, low=1, likely=1, high=1)
    objective = 1.0 if sample.kind is Kind.OBJECTIVE else 0.5 if sample.kind is None and asks else 0.0
    is_certain = sample.kind is not None or not asks
    if objective < 1.0:
        low = 1 if is_certain else 0
        request = difficulty.difficulty_request(sample)
        for name in _difficulty_purposes(config):
            named[name].add(request, sample, low=low, likely=1 - objective, high=1)
    if objective > 0.0:
        num_samples = config.performance.num_samples
        first = num_samples if config.performance.exhaustive else 1
        likely = objective * (REASONING_SHARE * num_samples + (1 - REASONING_SHARE) * first)
        request = performance.performance_request(sample, 0, config.performance, seed=config.seed)
        low = first if is_certain else 0
        named[performance.PURPOSE].add(request, sample, low=low, likely=likely, high=2 * num_samples)
    request = reasoning.reasoning_request(sample, 0, config.reasoning, seed=config.seed)
    named[reasoning.PURPOSE].add(request, sample, low=0, likely=REASONING_SHARE, high=config.reasoning.num_tries)
    if sample.answer is None:
        request = reasoning.direct_request(sample, config.direct, seed=config.seed)
        named[reasoning.DIRECT].add(request, sample, low=0, likely=1 - REASONING_SHARE, high=1)


def render_estimate(estimate: RunEstimate) -> str:
    """Returns the estimate as text for a terminal, with one example of each request."""
    asked = "nothing was asked" if estimate.measured is None else "a sample was asked about"
    lines = [
        f"{estimate.num_rows:,} rows read, {estimate.num_quarantined:,} quarantined, "
        f"{estimate.num_leaks:,} leaks of benchmarks, {estimate.num_duplicates:,} duplicates or id clashes; {asked}.",
        "",
        *_rules_of_thumb(estimate),
    ]
    if estimate.measured is not None:
        lines += ["", *_measured(estimate.measured, has_prices=estimate.has_prices)]
    shown: set[str] = set()
    for purpose in estimate.purposes:
        # The teachers of a panel are asked the very same.
        if purpose.example and purpose.example not in shown:
            lines += ["", f"--- {purpose.purpose}, for example", purpose.example]
            shown.add(purpose.example)
    return "\n".join(lines)


def _rules_of_thumb(estimate: RunEstimate) -> list[str]:
    width = max(12, *(len(purpose.purpose) for purpose in estimate.purposes))
    head = f"{'purpose':<{width}} {'calls at least':>15} {'likely':>12} {'at most':>12} {'prompt tokens':>15} "
    head += f"{'completion at most':>19}" + (f" {'cost at most':>14}" if estimate.has_prices else "")
    lines = ["By rules of thumb:", head]
    rows = {purpose.purpose: _thumb_figures(purpose) for purpose in estimate.purposes}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, (low, likely, high, prompt_tokens, max_completion_tokens, max_cost) in rows.items():
        line = f"{name:<{width}} {low:>15,} {likely:>12,} {high:>12,} {prompt_tokens:>15,} {max_completion_tokens:>19,}"
        lines.append(line + (f" {amount(max_cost):>14}" if estimate.has_prices else ""))
    return [
        *lines,
        "",
        "Likely: a third of the rows needs reasoning, as in the paper. Prompt tokens: of the likely calls, at four",
        "characters a token and one token per 28 x 28 pixels. Judgements of consistency come on top, one per open",
        "trace. A sample tells it better: --sample 50 really asks about 50 rows, whose replies the run will reuse.",
    ]


def _thumb_figures(purpose: PurposeEstimate) -> list[float]:
    calls = [purpose.low, purpose.likely, purpose.high]
    return [*calls, purpose.prompt_tokens, purpose.max_completion_tokens, purpose.max_cost]


def _measured(measured: Measurement, *, has_prices: bool) -> list[str]:
    drawn = ", ".join(
        f"{num_sampled:,} of {measured.num_rows[source]:,} of {source}"
        for source, num_sampled in measured.num_sampled.items()
    )
    lines = [
        f"Measured on {sum(measured.num_sampled.values()):,} rows ({drawn}), {measured.num_quarantined:,} of them "
        "quarantined; the run will reuse their replies.",
        f"For them this dry run {paid_line(measured.paid)}.",
        "",
        f"{'source':<16} {'purpose':<12} {'calls':>25} {'prompt tokens':>30} {'completion tokens':>30}"
        + (f" {'cost':>25}" if has_prices else ""),
    ]
    for usage in measured.usages:
        line = f"{usage.source or 'all':<16.16} {usage.purpose or 'all':<12} {_interval(usage.num_calls):>25} "
        line += f"{_interval(usage.prompt_tokens):>30} {_interval(usage.completion_tokens):>30}"
        lines.append(line + (f" {_interval(usage.cost, amount):>25}" if has_prices else ""))
    lines += ["", "In brackets: intervals that hold the truth for about 95 % of such samples."]
    pace = measured.pace
    if pace is None:
        return [*lines, "All replies were stored before, so no pace was measured."]
    rate = f"{pace.tokens_per_second:,.0f} completion tokens/s"
    lines.append(
        f"Time: {_interval(pace.seconds, duration)} at the sample's {rate}; a run keeps more calls under way and is "
        "faster where the endpoint has room."
    )
    if pace.gpu_seconds is not None and pace.gpu_cost is not None:
        price = f", which cost {_interval(pace.gpu_cost, amount)}" if pace.gpu_cost.value else ""
        lines.append(f"GPU time: {_interval(pace.gpu_seconds.times(1 / 3600), amount)} hours{price}.")
    return lines


def _interval(scaled: Scaled, text: Callable[[float], str] = "{:,.0f}".format) -> str:
    return f"{text(scaled.value)} [{text(scaled.low)}, {text(scaled.high)}]"
