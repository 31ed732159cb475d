"""What a run will cost, measured: some rows are really labelled, and what that took is scaled to all of them.

The rows go through the very stages of the run, and their replies into its journals, under the keys that the run will
ask for: nothing is paid for twice, and to the run the dry run looks like its own interrupted beginning. Rows are drawn
by a hash of their ids, so that a larger sample holds the smaller one.

Left out on purpose: duplicates among traces, which need all rows; the few rows that go there cost no more calls.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from flows.accounting import AskedUsage
from flows.runtime import Runtime
from flows.stages import LABELLING, Progress, all_or_none, label_rows
from flows.work_rows import WorkRow
from schemas.config import PricesConfig, RunConfig
from schemas.fates import Exit, Fate
from schemas.requests import derived_seed
from schemas.samples import Sample
from schemas.usage import Ledger, Usage, UsageKey, cost_of, total_usage
from teacher.journal import Journal

MIN_SOURCE_ROWS = 5
"""Rows drawn from each source, if it has so many: two are the least that tell a spread at all."""
NORMAL_QUANTILE = 1.96
"""Of the standard normal distribution, for intervals of about 95 %."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """An estimate for all rows, with an interval of about 95 %."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Scaled:
        return Scaled(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class MeasuredUsage:
    """What the rows of a source ("" for all) will need for a purpose ("" for all). cost: of the tokens."""

    source: str
    purpose: str
    num_calls: Scaled
    prompt_tokens: Scaled
    cached_tokens: Scaled
    completion_tokens: Scaled
    cost: Scaled


@dataclass(frozen=True, slots=True)
class SamplePace:
    """How long a run will take at the pace of the sample, which had fewer calls under way than a run has.

    tokens_per_second: completion tokens. gpu_seconds, gpu_cost: where vLLM was started here and has GPUs.
    """

    tokens_per_second: float
    seconds: Scaled
    gpu_seconds: Scaled | None
    gpu_cost: Scaled | None

    @classmethod
    def of(cls, paid: Usage, completion_tokens: Scaled, config: RunConfig) -> SamplePace | None:
        """Returns the pace of what was paid, scaled to so many tokens; None if no tokens were paid for."""
        if not paid.completion_tokens or not paid.wall_seconds:
            return None
        tokens_per_second = paid.completion_tokens / paid.wall_seconds
        seconds = completion_tokens.times(1 / tokens_per_second)
        gpu_seconds = gpu_cost = None
        if paid.num_gpu_calls:
            gpu_seconds = completion_tokens.times(paid.gpu_seconds / paid.completion_tokens)
            gpu_cost = gpu_seconds.times(config.prices.of(config.teacher.model).gpu_hour / 3600)
        return cls(tokens_per_second, seconds, gpu_seconds, gpu_cost)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A sample of rows, and what all rows are going to cost by it.

    num_rows, num_sampled: by source. num_quarantined: of the sampled rows, those that met an error. paid: for the
    sample now; its other replies were stored. usages: as `scaled_usages` yields them.
    pace: None when every reply was stored, so that nothing could be timed.
    """

    num_rows: Mapping[str, int]
    num_sampled: Mapping[str, int]
    num_quarantined: int
    paid: Usage
    usages: tuple[MeasuredUsage, ...]
    pace: SamplePace | None


@dataclass(frozen=True, slots=True)
class Stratum:
    """The rows of a source. ledgers: what the replies to each row drawn cost; at least two, or of all rows."""

    source: str
    num_rows: int
    ledgers: Sequence[Ledger]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row and the shard in whose journals its replies belong."""

    shard: str
    sample: Sample


class RowSampler:
    """Draws rows while all of them pass by; keeps at most `num_rows` of each source.

    num_rows: in all sources together, but at least `MIN_SOURCE_ROWS` of each.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.num_rows = num_rows
        self.num_seen: dict[str, int] = {}
        self._seed = seed
        self._drawn: dict[str, list[tuple[int, str, SampledRow]]] = {}

    def see(self, shard: str, sample: Sample) -> None:
        source = sample.source
        self.num_seen[source] = self.num_seen.get(source, 0) + 1
        drawn = self._drawn.setdefault(source, [])
        # A heap of the smallest ranks, negated: the largest of them is the first to go. Ids differ within a source.
        item = (-derived_seed(self._seed, sample.id, "estimate"), sample.id, SampledRow(shard, sample))
        if len(drawn) < max(self.num_rows, MIN_SOURCE_ROWS):
            heapq.heappush(drawn, item)
        else:
            heapq.heappushpop(drawn, item)

    def rows(self) -> list[SampledRow]:
        """Returns the rows drawn: of each source its share of all rows, rounded up to `MIN_SOURCE_ROWS`."""
        total = sum(self.num_seen.values())
        rows: list[SampledRow] = []
        for source, drawn in self._drawn.items():
            share = max(MIN_SOURCE_ROWS, round(self.num_rows * self.num_seen[source] / total))
            rows += [row for _, _, row in sorted(drawn, key=lambda item: (-item[0], item[1]))[:share]]
        return rows


def measure(runtime: Runtime, sampler: RowSampler) -> Measurement:
    """Labels the sampled rows and scales what that cost. Raises TeacherError, ServingError, StorageError."""
    rows = sampler.rows()
    sampled = _LabelledSample(rows)
    for stage in LABELLING:
        sampled.take(stage, runtime.run(_label(runtime, stage, sampled.shards())))
    drawn: dict[str, list[Ledger]] = {source: [] for source in sampler.num_seen}
    for row in rows:
        drawn[row.sample.source].append(sampled.costs[row.sample.id])
    strata = [Stratum(source, num_rows, drawn[source]) for source, num_rows in sampler.num_seen.items()]
    usages = tuple(scaled_usages(strata, runtime.config.prices))
    paid = total_usage(runtime.accounts.paid().values())
    pace = SamplePace.of(paid, usages[-1].completion_tokens, runtime.config)
    num_sampled = {source: len(ledgers) for source, ledgers in drawn.items()}
    return Measurement(dict(sampler.num_seen), num_sampled, sampled.num_quarantined, paid, usages, pace)


class _LabelledSample:
    """The sampled rows on their way through the stages. costs: of each row's replies so far, by its id."""

    def __init__(self, rows: Sequence[SampledRow]) -> None:
        self._left = {row.sample.id: (row.shard, WorkRow(row.sample)) for row in rows}
        self.costs: dict[str, dict[UsageKey, Usage]] = {row.sample.id: {} for row in rows}
        self.num_quarantined = 0

    def shards(self) -> dict[str, list[WorkRow]]:
        """Returns the rows that no stage has removed, by shard."""
        shards: dict[str, list[WorkRow]] = {}
        for shard, row in self._left.values():
            shards.setdefault(shard, []).append(row)
        return shards

    def take(self, stage: str, labelled: Mapping[str, tuple[list[WorkRow | Fate], list[AskedUsage]]]) -> None:
        """Takes what a stage made of the rows of each shard, in order, and what that cost."""
        for shard, (results, asked) in labelled.items():
            for result in results:
                if isinstance(result, WorkRow):
                    self._left[result.sample.id] = (shard, result)
                else:
                    assert result.id is not None, f"{result.origin} was labelled, so it is a sample"
                    del self._left[result.id]
                    self.num_quarantined += result.exit is Exit.QUARANTINED
            for endpoint in asked:
                for (sample_id, purpose), usage in endpoint.costs.items():
                    # The source of a row is known to whoever scales its costs.
                    # Two teachers of a panel may be revisions of one model.
                    key = UsageKey(stage, purpose, "", endpoint.model)
                    self.costs[sample_id][key] = self.costs[sample_id].get(key, Usage()) + usage


async def _label(
    runtime: Runtime, stage: str, shards: Mapping[str, Sequence[WorkRow]]
) -> dict[str, tuple[list[WorkRow | Fate], list[AskedUsage]]]:
    """Labels rows of many shards at once, as a run does."""
    progress = Progress(0)
    with ExitStack() as opened:
        journals = [opened.enter_context(Journal(runtime.workspace.journal_path(stage, shard))) for shard in shards]
        labelled = await all_or_none(
            asyncio.create_task(label_rows(runtime, stage, journal, rows, advance=progress.advance))
            for journal, rows in zip(journals, shards.values(), strict=True)
        )
    return dict(zip(shards, labelled, strict=True))


def scaled_usages(strata: Sequence[Stratum], prices: PricesConfig) -> Iterator[MeasuredUsage]:
    """Yields what all rows will need: by source and purpose where there are several, by purpose, and in all at last."""
    purposes = dict.fromkeys(key.purpose for stratum in strata for ledger in stratum.ledgers for key in ledger)
    for stratum in strata if len(strata) > 1 else ():
        for purpose in purposes:
            usage = _scaled_usage([stratum], stratum.source, purpose, prices)
            if usage.num_calls.value:
                yield usage
    for purpose in purposes:
        yield _scaled_usage(strata, "", purpose, prices)
    yield _scaled_usage(strata, "", "", prices)


def _scaled_usage(strata: Sequence[Stratum], source: str, purpose: str, prices: PricesConfig) -> MeasuredUsage:
    chosen = [
        [{key: usage for key, usage in ledger.items() if purpose in ("", key.purpose)} for ledger in stratum.ledgers]
        for stratum in strata
    ]

    def of(value: Callable[[Ledger], float]) -> Scaled:
        return scaled(
            [(stratum.num_rows, list(map(value, ledgers))) for stratum, ledgers in zip(strata, chosen, strict=True)]
        )

    return MeasuredUsage(
        source,
        purpose,
        num_calls=of(lambda ledger: total_usage(ledger.values()).num_calls),
        prompt_tokens=of(lambda ledger: total_usage(ledger.values()).prompt_tokens),
        cached_tokens=of(lambda ledger: total_usage(ledger.values()).cached_tokens),
        completion_tokens=of(lambda ledger: total_usage(ledger.values()).completion_tokens),
        cost=of(lambda ledger: cost_of(ledger, prices).amount),
    )


def scaled(strata: Sequence[tuple[int, Sequence[float]]]) -> Scaled:
    """Returns the total over all rows of a stratified sample, each stratum drawn without replacement.

    strata: number of rows, and the values of those drawn. With N rows, n drawn, mean m and variance s2 (over n - 1),
    the total is the sum of N m and its variance that of N^2 (1 - n / N) s2 / n (Cochran, Sampling Techniques, 1977,
    theorem 5.3 and 5.5). The interval takes the total to be normal, which a few rows of very uneven cost are not; it
    never ends below what the drawn rows alone needed.
    """
    total = variance = seen = 0.0
    for num_rows, values in strata:
        num_drawn = len(values)
        total += num_rows * sum(values) / num_drawn
        seen += sum(values)
        if num_drawn < num_rows:
            variance += num_rows**2 * (1 - num_drawn / num_rows) * statistics.variance(values) / num_drawn
    reach = NORMAL_QUANTILE * math.sqrt(variance)
    return Scaled(total, max(seen, total - reach), total + reach)
