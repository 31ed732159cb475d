"""Relabelling: other thresholds, verifiers or parsers over the stored replies, with no call to any teacher.

The rows are those of the last published version, the labels those that a curation with the changed settings would give
if it needed no new reply. Shards are labelled by worker processes, each through all row-by-row stages in one go, and
staged beside the last run's (`flows.staging`); they take its place only when the whole corpus can be made.

Where a label needs a reply that is not stored (a row that now thinks has no trace), nothing is guessed: by default
nothing is published, and how many replies are missing is said; or those rows are quarantined. A shard that has such
rows never counts as done for a curation, which asks for what is missing.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

from corpus.storage import read_json
from flows import publishing, removing, stages
from flows.accounting import duration
from flows.decontaminating import DECONTAMINATION, Benchmarks
from flows.holding import held
from flows.publishing import Published
from flows.runtime import Runtime
from flows.shard_relabelling import (
    FIRST_STAGES,
    LEFT,
    MISSING,
    UNLABELLED,
    Change,
    OnMissing,
    Plan,
    ShardResult,
    answer_stored_shard,
    label_stored_shard,
    shard_processes,
)
from flows.stages import DUPLICATES, LABELLING, SOURCES, TRACES, Progress, stage_digest
from flows.workspace import Marker
from schemas.config import PricesConfig, RunConfig
from schemas.errors import ConfigError
from schemas.usage import Cost, Usage, UsageKey, cost_of, merged_ledgers, total_usage

__all__ = ["LEFT", "MISSING", "UNLABELLED", "Change", "MissingReplies", "OnMissing", "Relabelled", "relabel"]

Say = Callable[[str], None]

_SAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class MissingReplies:
    """Replies that labels need and nobody asked for: one for each row, the first that it lacks; more may follow.

    prompt_tokens, completion_tokens, cost: what they would cost at the mean of the stored replies to such questions;
    None where there are none, cost also where nothing has a price.
    """

    stage: str
    purpose: str
    model: str
    num_rows: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Relabelled:
    """What relabelling found. published: None if it was only looked, or if replies are missing."""

    num_rows: int
    changes: Mapping[Change, int]
    missing: tuple[MissingReplies, ...] = ()
    seconds: float = 0.0
    published: Published | None = None

    @property
    def num_missing(self) -> int:
        return sum(one.num_rows for one in self.missing)

    @property
    def num_changed(self) -> int:
        """Rows whose new state is known and another than their old one."""
        return sum(number for change, number in self.changes.items() if change.new not in (change.old, MISSING))

    def to_record(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        return {
            "rows": self.num_rows,
            "changed": self.num_changed,
            "changes": [{**asdict(change), "rows": number} for change, number in sorted(self.changes.items())],
            "missing": [asdict(one) for one in self.missing],
            "seconds": self.seconds,
            "published": self.published and self.published.to_record(),
        }


def relabel(
    before: RunConfig,
    config: RunConfig,
    *,
    on_missing: OnMissing = "stop",
    is_dry: bool = False,
    num_processes: int | None = None,
    say: Say = lambda line: None,
) -> Relabelled:
    """Relabels the published rows and publishes the corpus, unless replies are missing or it is a dry run.

    before: the configuration as its file has it. config: the changed one. num_processes: by default, one for each
    processor. say: gets a line about the progress every few seconds.

    Raises ConfigError: nothing is published that could be relabelled. StorageError, CorpusError, QuarantineExceeded as
    a curation does. What was labelled until then is kept, and the same call goes on from there.
    """
    num_processes = num_processes or len(os.sched_getaffinity(0))
    plan = Plan(before, config, on_missing, is_dry, num_processes)
    runtime = Runtime(config)
    runtime.workspace = workspace = plan.workspace
    if not workspace.root.exists():
        raise ConfigError(f"there is no work folder {workspace.root}: run `bimode curate` first")
    try:
        with held(workspace, "bimode relabel", wait=False, say=say):
            if not is_dry:
                workspace.begin()
            return Relabelling(plan, runtime, say).run()
    finally:
        runtime.close()


class Relabelling:
    """One relabelling of a work folder that this process holds. markers: of the stages done, as for a curation."""

    def __init__(self, plan: Plan, runtime: Runtime, say: Say) -> None:
        self._plan, self._config, self._runtime, self._say = plan, plan.config, runtime, say
        self._workspace = plan.workspace
        self._began = time.monotonic()
        self._benchmarks = runtime.shared(Benchmarks) if plan.config.decontamination.benchmarks else None
        self._markers = published_shards(runtime)

    def run(self) -> Relabelled:
        published = self._markers[DUPLICATES]
        num_rows = sum(marker.count.num_kept for marker in published)
        self._say(f"{num_rows:,} published rows in {len(published):,} shards")
        with shard_processes(self._plan) as processes:
            results = self._each(processes, label_stored_shard, published, "labelled")
            changes = sum((result.changes for result in results), Counter[Change]())
            found = Relabelled(num_rows, changes, self._missing(results))
            if self._plan.is_dry:
                return self._ended(found)
            if not self._must_stop(found):
                for place, stage in enumerate(FIRST_STAGES):
                    self._done(stage, [result.markers[place] for result in results])
                self._done(TRACES, self._compare_traces())
                answers = self._each(processes, answer_stored_shard, self._markers[TRACES], "answered")
                found = replace(found, missing=(*found.missing, *self._missing(answers)))
        if self._must_stop(found):
            self._workspace.discard()
            return self._ended(found)
        self._done("answers", [result.markers[0] for result in answers])
        self._workspace.promote(marker for done in self._markers.values() for marker in done)
        self._say("writing the corpus")
        made = publishing.publish(self._runtime, self._markers, self._benchmarks)
        self._workspace.discard()
        return self._ended(replace(found, published=made))

    def _must_stop(self, found: Relabelled) -> bool:
        return bool(found.missing) and self._plan.on_missing == "stop"

    def _ended(self, found: Relabelled) -> Relabelled:
        return replace(found, seconds=time.monotonic() - self._began)

    def _missing(self, results: Sequence[ShardResult]) -> tuple[MissingReplies, ...]:
        missing = sum((result.missing for result in results), Counter[tuple[str, str, str]]())
        return missing_replies(missing, self._last_costs(), self._config.prices) if missing else ()

    def _done(self, stage: str, markers: Sequence[Marker]) -> None:
        self._markers[stage] = list(markers)
        num_rows = sum(marker.count.num_in for marker in self._markers[SOURCES])
        folder = self._workspace.staged.root
        stages.check_quarantine(self._config, self._markers, stage, num_rows=num_rows, folder=folder)

    def _each(
        self, processes: Executor, work: Callable[[Marker], ShardResult], markers: Sequence[Marker], what: str
    ) -> list[ShardResult]:
        """Returns the result of each shard, in order; says how far it has come."""
        futures = [processes.submit(work, marker) for marker in markers]
        num_rows, num_done, said = sum(marker.count.num_kept for marker in markers), 0, time.monotonic()
        began = said
        try:
            for future in as_completed(futures):
                num_done += future.result().num_rows
                now = time.monotonic()
                if now - said > _SAY_SECONDS:
                    said = now
                    left = (num_rows - num_done) * (now - began) / max(1, num_done)
                    self._say(f"{num_done:,} of {num_rows:,} rows {what}, {duration(left)} left")
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def _compare_traces(self) -> list[Marker]:
        """Runs the stage that removes duplicate traces; threads do, as its work is done outside of Python."""
        before = self._markers[FIRST_STAGES[-1]]
        digest = stage_digest(TRACES, self._config, [marker.output for marker in before])
        found = [self._workspace.find_marker(TRACES, marker.shard, digest) for marker in before]
        if all(found):
            return [marker for marker in found if marker is not None]
        self._say("comparing traces")
        removals = removing.plan_traces(self._runtime, before)
        progress = Progress(0)

        def remove(place: int) -> Marker:
            done = found[place]
            planned = removals.get(before[place].shard)
            return done or stages.remove_planned(self._runtime, TRACES, before[place], planned, digest, progress)

        with ThreadPoolExecutor(self._plan.num_processes + 1, thread_name_prefix=TRACES) as threads:
            return list(threads.map(remove, range(len(before))))

    def _last_costs(self) -> dict[UsageKey, Usage]:
        """Returns what the replies behind the last run's labels cost."""
        shards = [marker.shard for marker in self._markers[DUPLICATES]]
        found = (self._workspace.last_run.read_marker(stage, shard) for stage in LABELLING for shard in shards)
        return merged_ledgers(marker.usage for marker in found if marker is not None)


def published_shards(runtime: Runtime) -> dict[str, list[Marker]]:
    """Returns the markers of the stages up to the removal of duplicates, of the shards that were published last.

    The shards come in the order of the sources in the configuration, as a curation reads them.

    Raises ConfigError: nothing was published, or another set of rows is at work since.
    """
    workspace, config = runtime.workspace, runtime.config
    ledger = read_json(workspace.root / "stages" / DUPLICATES / removing.LEDGER)
    if not ledger:
        raise ConfigError(f"nothing is published from {workspace.root} that could be relabelled: run `bimode curate`")
    names = _in_order(ledger["shards"], config)
    before = [stage for stage in stages.stages_of(config) if stage in (SOURCES, DECONTAMINATION)]
    found = {stage: [workspace.read_marker(stage, shard) for shard in names] for stage in before}
    markers = {stage: [marker for marker in done if marker is not None] for stage, done in found.items()}
    settled = removing.settled_shards(runtime, markers[before[-1]])
    lost = [shard for shard in names if shard not in settled]
    if lost or any(len(done) < len(names) for done in markers.values()):
        raise ConfigError(
            f"{len(lost)} of {len(names)} shards were read or compared anew since the last version was published "
            f"({', '.join(lost[:3])}): run `bimode curate`, which publishes them, and relabel then"
        )
    return {**markers, DUPLICATES: [settled[shard] for shard in names]}


def _in_order(shards: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Returns shard names by source and number. Raises ConfigError: a shard is of no source."""
    places: dict[str, tuple[int, int]] = {}
    for number, source in enumerate(config.sources):
        for shard in shards:
            if found := re.fullmatch(rf"{re.escape(source.name)}-(\d{{5,}})", shard):
                places[shard] = (number, int(found[1]))
    if strange := sorted(set(shards) - set(places)):
        raise ConfigError(
            f"the configuration has no source of the published shard {strange[0]}: relabelling keeps the rows that are "
            "published. Put the source back, or run `bimode curate`"
        )
    return sorted(places, key=places.__getitem__)


def missing_replies(
    missing: Mapping[tuple[str, str, str], int], costs: Mapping[UsageKey, Usage], prices: PricesConfig
) -> tuple[MissingReplies, ...]:
    """Returns what is missing, with what it would cost. costs: of the stored replies. missing: as in `ShardResult`."""
    listed = []
    order = list(LABELLING)
    for (stage, purpose, model), number in sorted(missing.items(), key=lambda item: (order.index(item[0][0]), item[0])):
        known = total_usage(usage for key, usage in costs.items() if (key.purpose, key.model) == (purpose, model))
        prompt = completion = None
        cost: Cost | None = None
        if known.num_calls and known.num_replies:
            prompt = round(number * known.prompt_tokens / known.num_calls)
            completion = round(number * known.completion_tokens / known.num_replies)
            cached = round(number * known.cached_tokens / known.num_calls)
            usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
            cost = cost_of({UsageKey(stage, purpose, "", model): usage}, prices) if prices.has_any else None
        listed.append(MissingReplies(stage, purpose, model, number, prompt, completion, cost.amount if cost else None))
    return tuple(listed)
