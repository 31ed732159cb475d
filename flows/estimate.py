"""The dry run: what a curation would ask of its teacher, and how much, without asking.

Sources are read, duplicates found and rows routed by rule, as the run itself does it (and what is read is kept for it).
How many samples, traces and answers follow depends on replies, so calls are bounded from below and above, with a likely
value between: the share of rows that need reasoning is taken from the paper (R-4B, Table 1: 5,495,209 of 16,366,767).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flows import removing, stages
from flows.decontaminating import Benchmarks
from flows.removing import RemovalPlan, split_rows
from flows.runtime import Runtime
from flows.stages import Progress
from flows.workspace import Marker
from judges import difficulty, performance, reasoning, routing
from judges.routing import Route, route_by_rules
from schemas.config import EndpointConfig, RunConfig
from schemas.requests import TeacherRequest
from schemas.samples import Kind, Sample, table_to_samples
from sources import plan_units

REASONING_SHARE = 5_495_209 / 16_366_767
"""Share of reasoning rows in R-4B's corpus (Table 1)."""
CHARACTERS_PER_TOKEN = 4.0
"""Rule of thumb for English text and byte-level BPE."""
PIXELS_PER_TOKEN = 28 * 28
"""Qwen2.5-VL: patches of 14 pixels, merged two by two."""
TURN_TOKENS = 12
VERDICT_TOKENS = 2


@dataclass(frozen=True, slots=True)
class PurposeEstimate:
    """Calls of one purpose: at least low, at most high.

    prompt_tokens: of the likely calls. max_completion_tokens: the bound that the settings put on high calls. example:
    the first such request, as text.
    """

    purpose: str
    low: int
    likely: int
    high: int
    prompt_tokens: int
    max_completion_tokens: int
    example: str


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run would ask. num_rows: read; num_quarantined, num_leaks, num_duplicates: never asked about."""

    num_rows: int
    num_quarantined: int
    num_leaks: int
    num_duplicates: int
    purposes: tuple[PurposeEstimate, ...]

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


class _Purpose:
    """Adds up the requests of one purpose."""

    def __init__(self, purpose: str, endpoint: EndpointConfig) -> None:
        self.purpose = purpose
        self.endpoint = endpoint
        self.low, self.likely, self.high = 0.0, 0.0, 0.0
        self.prompt_tokens, self.max_completion_tokens = 0.0, 0.0
        self.example = ""

    def add(self, request: TeacherRequest, sample: Sample, *, low: float, likely: float, high: float) -> None:
        self.low, self.likely, self.high = self.low + low, self.likely + likely, self.high + high
        self.prompt_tokens += likely * _prompt_tokens(request, sample, self.endpoint)
        self.max_completion_tokens += high * (VERDICT_TOKENS if request.choices else request.sampling.max_tokens)
        self.example = self.example or render_request(request)

    def estimate(self) -> PurposeEstimate:
        return PurposeEstimate(
            self.purpose,
            round(self.low),
            round(self.likely),
            round(self.high),
            round(self.prompt_tokens),
            round(self.max_completion_tokens),
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


def estimate_run(config: RunConfig) -> RunEstimate:
    """Returns the estimate. Raises ConfigError, SourceError, StorageError as the run would."""
    runtime = Runtime(config)
    try:
        with runtime.workspace.locked():
            units = plan_units(config)
            progress = Progress(sum(unit.num_rows for unit in units))
            markers = [stages.read_source_shard(runtime, unit, progress) for unit in units]
            num_quarantined = sum(marker.count.num_quarantined for marker in markers)
            if config.decontamination.benchmarks:
                benchmarks = Benchmarks(runtime)
                markers = [stages.remove_leaks(runtime, benchmarks, marker, Progress(0)) for marker in markers]
            num_leaks = sum(marker.count.num_dropped for marker in markers)
            plan = removing.plan_duplicates(runtime, markers)
            samples = (sample for marker in markers for sample in _kept_samples(runtime, marker, plan))
            purposes = _estimate_purposes(samples, config)
    finally:
        runtime.close()
    num_removed = sum(removals.num_rows for removals in plan.values())
    return RunEstimate(progress.num_total, num_quarantined, num_leaks, num_removed, purposes)


def _kept_samples(runtime: Runtime, marker: Marker, plan: RemovalPlan) -> list[Sample]:
    rows = runtime.workspace.read_rows(marker.stage, marker.shard)
    return table_to_samples(split_rows(rows, plan.get(marker.shard), stages.DUPLICATES)[0])


def _estimate_purposes(samples: Iterator[Sample], config: RunConfig) -> tuple[PurposeEstimate, ...]:
    teacher, reasoner = config.teacher, config.reasoner_endpoint
    named = {
        name: _Purpose(name, reasoner if name == reasoning.PURPOSE else teacher)
        for name in (
            routing.ROUTING,
            routing.TOPIC,
            difficulty.PURPOSE,
            performance.PURPOSE,
            reasoning.PURPOSE,
            reasoning.DIRECT,
        )
    }
    for sample in samples:
        _add_row(named, route_by_rules(sample), config)
    return tuple(purpose.estimate() for purpose in named.values())


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
        named[difficulty.PURPOSE].add(request, sample, low=low, likely=1 - objective, high=1)
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
    lines = [
        f"{estimate.num_rows:,} rows read, {estimate.num_quarantined:,} quarantined, "
        f"{estimate.num_leaks:,} leaks of benchmarks, {estimate.num_duplicates:,} duplicates or id clashes; "
        "nothing was asked.",
        "",
        f"{'purpose':<12} {'calls at least':>15} {'likely':>12} {'at most':>12} {'prompt tokens':>15} "
        f"{'completion at most':>19}",
    ]
    for purpose in estimate.purposes:
        lines.append(
            f"{purpose.purpose:<12} {purpose.low:>15,} {purpose.likely:>12,} {purpose.high:>12,} "
            f"{purpose.prompt_tokens:>15,} {purpose.max_completion_tokens:>19,}"
        )
    likely = sum(purpose.likely for purpose in estimate.purposes)
    tokens = sum(purpose.prompt_tokens for purpose in estimate.purposes)
    lines += [
        f"{'all':<12} {sum(p.low for p in estimate.purposes):>15,} {likely:>12,} "
        f"{sum(p.high for p in estimate.purposes):>12,} {tokens:>15,}",
        "",
        "Likely: a third of the rows needs reasoning, as in the paper. Prompt tokens: of the likely calls, at four",
        "characters a token and one token per 28 x 28 pixels. Judgements of consistency come on top, one per open",
        "trace.",
    ]
    for purpose in estimate.purposes:
        if purpose.example:
            lines += ["", f"--- {purpose.purpose}, for example", purpose.example]
    return "\n".join(lines)
