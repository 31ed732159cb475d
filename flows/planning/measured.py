"""What a finished run says about the next one: its shares, its tokens per call, its bytes per row.

All of it stands in a version: the manifest's counts, and the costs of all replies in `report.json`. What no version
records stays assumed: how fast processors and GPUs were, and what the work folder took.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.accounting import ledgers_of
from corpus.versions import FIGURES, Manifest, find_version, load_manifest
from flows.estimate import CHARACTERS_PER_TOKEN, TURN_TOKENS
from flows.planning.assumptions import Assumptions
from flows.planning.demand import SamplingCost
from judges import difficulty, performance, reasoning, routing
from judges.prompts import ANSWER_INSTRUCTION, prompt
from schemas.config import RunConfig
from schemas.errors import ConfigError
from schemas.fates import StageCount
from schemas.usage import Usage

_MIN_ROWS = 30
"""A share of fewer rows tells little; a plan from it would look measured and be chance."""

_INSTRUCTION_TOKENS = {
    performance.PURPOSE: len(ANSWER_INSTRUCTION) / CHARACTERS_PER_TOKEN + TURN_TOKENS,
    difficulty.PURPOSE: len(prompt(difficulty.PURPOSE)) / CHARACTERS_PER_TOKEN + 2 * TURN_TOKENS,
}


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What a finished run settles. sampling: what the performance heuristic asked per objective row."""

    assumptions: Assumptions
    sampling: SamplingCost | None
    source: str


@dataclass(frozen=True, slots=True)
class _Figures:
    """The figures of a version that are used."""

    usage: Mapping[str, Usage]
    rows: int
    text_only: int
    kinds: Mapping[str, tuple[int, int]]


def measured_run(folder: Path, config: RunConfig, assumptions: Assumptions) -> MeasuredRun:
    """Returns what a version says, the newest where the folder of several is given, or a work folder.

    Raises ConfigError: there is no version, too few rows, or no figures in it. CorpusError: its manifest is damaged.
    """
    inner = folder / "corpus"
    version = find_version(inner if inner.is_dir() else folder)
    manifest, figures = load_manifest(version), _read_figures(version)
    if figures.rows < _MIN_ROWS:
        raise ConfigError(f"{version} has {figures.rows} rows; shares measured on fewer than {_MIN_ROWS} are chance")
    known = {
        **_row_shares(manifest.counts),
        **_label_shares(figures, manifest.counts, config),
        **_lengths(figures, assumptions),
        "text_only_share": figures.text_only / figures.rows,
    }
    known |= _image_bytes(manifest, {**{a.name: a.expected for a in assumptions}, **known})
    source = f"measured: {manifest.name} {manifest.version}, {figures.rows:,} rows"
    return MeasuredRun(assumptions.known(source, **known), _sampling(figures), source)


def _read_figures(version: Path) -> _Figures:
    """Returns the figures of a version; no checksum covers them, so nothing in them is relied on."""
    path = version / FIGURES
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        costs, _ = ledgers_of(record["accounting"])
        usage: dict[str, Usage] = {}
        for key, spent in costs.items():
            usage[key.purpose] = usage.get(key.purpose, Usage()) + spent
        kinds = {row["value"]: (int(row["think"]), int(row["total"])) for row in record["modes"]["kind"]}
        return _Figures(usage, int(record["summary"]["rows_out"]), int(record["summary"]["text_only"]), kinds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no figures to plan from ({error!r}); `bimode report` makes it anew") from error


def _row_shares(counts: Mapping[str, StageCount]) -> dict[str, float]:
    known = {}
    for stage, name in (("decontamination", "leaked_share"), ("duplicates", "duplicate_share")):
        if stage in counts and counts[stage].num_in:
            known[name] = 1 - counts[stage].num_kept / counts[stage].num_in
    if counts["sources"].num_in:
        known["quarantined_share"] = 1 - counts["sources"].num_kept / counts["sources"].num_in
    return known


def _label_shares(figures: _Figures, counts: Mapping[str, StageCount], config: RunConfig) -> dict[str, float]:
    routed = counts["routing"].num_in or 1
    thinking, objective = figures.kinds.get("objective", (0, 0))
    open_thinking, subjective = figures.kinds.get("subjective", (0, 0))
    known = {
        "asks_kind_share": min(1.0, figures.usage.get(routing.ROUTING, Usage()).num_calls / routed),
        "asks_topic_share": min(1.0, figures.usage.get(routing.TOPIC, Usage()).num_calls / routed),
        "objective_share": objective / (objective + subjective),
    }
    if objective:
        known["thinking_objective_share"] = thinking / objective
    if subjective:
        known["thinking_subjective_share"] = open_thinking / subjective
    if subjective > open_thinking:
        asked = figures.usage.get(reasoning.DIRECT, Usage()).num_calls
        known["unanswered_share"] = min(1.0, asked / (subjective - open_thinking))
    if thinking + open_thinking:
        tries = figures.usage.get(reasoning.PURPOSE, Usage()).num_replies / (thinking + open_thinking)
        share = success_share(tries, config.reasoning.num_tries)
        known |= {"trace_right_share": share, "trace_consistent_share": share}
    return known


def success_share(mean_tries: float, most: int) -> float:
    """Returns the share of tries that succeed, of which so many were needed: the p with (1 - (1 - p)^m) / p = tries."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 - (1 - middle) ** most) / middle > mean_tries:
            low = middle
        else:
            high = middle
    return high


def _lengths(figures: _Figures, assumptions: Assumptions) -> dict[str, float]:
    """Returns tokens per sample, and those of a question with its images: which of the two is text, nobody recorded."""
    known = {}
    for purpose, name in (
        (performance.PURPOSE, "answer_tokens"),
        (reasoning.PURPOSE, "trace_tokens"),
        (reasoning.DIRECT, "direct_tokens"),
    ):
        usage = figures.usage.get(purpose, Usage())
        if usage.num_replies:
            known[name] = usage.completion_tokens / usage.num_replies
    for purpose in (performance.PURPOSE, difficulty.PURPOSE):
        usage = figures.usage.get(purpose, Usage())
        images = (1 - figures.text_only / figures.rows) * assumptions.images_per_row.expected
        if usage.num_calls and usage.prompt_tokens:
            # The rest of a prompt, after the instruction: the question as assumed, and images; or a shorter question.
            rest = max(1.0, usage.prompt_tokens / usage.num_calls - _INSTRUCTION_TOKENS[purpose])
            text = min(assumptions.question_tokens.expected, rest) if images else rest
            known["question_tokens"] = text
            known["image_tokens"] = (rest - text) / images if images else 0.0
            break
    return known


def _image_bytes(manifest: Manifest, known: Mapping[str, float]) -> dict[str, float]:
    """Returns the bytes of an image, by those of the corpus, which holds one for each row that has any."""
    rows = manifest.num_think + manifest.num_direct
    per_row = sum(shard.num_bytes for shard in manifest.shards) / rows
    texts = known["text_bytes"] * (
        known["question_tokens"] + manifest.num_think / rows * known.get("trace_tokens", 0.0)
    )
    images = (1 - known["text_only_share"]) * known["images_per_row"]
    return {"image_bytes": max(0.0, per_row - texts) / images} if images else {}


def _sampling(figures: _Figures) -> SamplingCost | None:
    usage, (_, objective) = figures.usage.get(performance.PURPOSE, Usage()), figures.kinds.get("objective", (0, 0))
    if not usage.num_calls or not objective:
        return None
    return SamplingCost(usage.num_calls / objective, usage.num_replies / objective, 4)
