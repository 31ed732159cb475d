"""A plan as text for a terminal: ranges with as many digits as they deserve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from corpus.accounting import amount
from flows.commands.terminal import columns, fields
from flows.planning.assumptions import Range, Values
from flows.planning.demand import StageDemand
from flows.planning.gpus import PATCHES_PER_TOKEN, speed
from flows.planning.limits import Limit, limits
from flows.planning.plan import Plan
from flows.planning.request import context_tokens
from flows.planning.stage_plans import StagePlan

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_NUM_LIMITS = 6


def short(value: float) -> str:
    """Returns a number with three digits at most, and a letter for its thousands: 16.4M."""
    if value == 0:
        return "0"
    # Rounded before the unit is chosen, else 999,999 would be 1000k.
    value = round(value, 2 - math.floor(math.log10(abs(value))))
    unit, letter = next((each for each in _UNITS if abs(value) >= each[0]), (1.0, ""))
    value /= unit
    digits = min(4, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}{letter}"


def ranged(values: Values) -> str:
    """Returns the expected value, and in brackets between which nine tenths of the draws lie."""
    return shown_range(Range.of(np.asarray(values)))


def shown_range(found: Range) -> str:
    if found.low == found.high:
        return short(found.expected)
    return f"{short(found.expected)} ({short(found.low)} to {short(found.high)})"


def render_plan(plan: Plan, nightly: Plan | None = None) -> str:
    """Returns the plan as text. nightly: the plan of what a night adds."""
    layout, request = plan.layout, plan.request
    lines = [
        f"{request.num_rows:,} rows on {layout.num_gpus} x {layout.gpu.name} with {layout.model.name}: "
        f"{layout.num_copies} copies on {layout.tensor} GPUs each"
        + (f", {layout.num_idle} GPUs idle" if layout.num_idle else ""),
        f"{request.num_shards:,} shards of {request.config.shard_rows:,} rows, {plan.setup.num_parallel} in work at "
        f"once (parallel_shards: {plan.setup.parallel_per_process}); {request.machines.num_cores} cores; "
        + (f"{request.machines.num_processes} processes on Ray" if request.is_ray else "one process, without Ray")
        + ("" if request.is_own else "; shard_rows and parallel_shards are chosen"),
        "",
        *_stage_table(plan),
        "",
        *_summary(plan),
    ]
    if nightly is not None:
        lines += ["", *_nightly(nightly)]
    lines += ["", *_bottleneck(plan), "", *limit_table(limits(plan))]
    return "\n".join(
        [
            *lines,
            "",
            "In brackets: between which nine tenths of the outcomes lie if the assumptions vary within their ranges; "
            "--explain shows these.",
        ]
    )


def _stage_table(plan: Plan) -> list[str]:
    header = ["stage", "bound by", "rows", "calls", "prompt", "completion", "GPU hours", "core hours", "hours"]
    rows = [_stage_cells(stage) for stage in plan.stages]
    totals = [plan.total("calls"), plan.total("prompt_tokens"), plan.total("completion_tokens")]
    rows.append(
        [
            "all",
            "",
            "",
            *(short(float(total[0])) for total in totals),
            ranged(plan.gpu_seconds / 3600),
            short(float(plan.core_seconds[0]) / 3600),
            ranged(plan.wall_seconds / 3600),
        ]
    )
    return columns(header, rows, num_left=2)


def _stage_cells(stage: StagePlan) -> list[str]:
    seen: StageDemand = stage.demand
    asked = [stage.total("calls"), stage.total("prompt_tokens"), stage.total("completion_tokens")]
    return [
        stage.name,
        stage.bound_by,
        short(float(seen.looked_at[0])),
        *(short(float(total[0])) if float(total[0]) else "" for total in asked),
        ranged(stage.gpu_seconds / 3600) if stage.gpu_seconds[0] else "",
        short(float(stage.core_seconds[0]) / 3600),
        ranged(stage.wall_seconds / 3600),
    ]


def _summary(plan: Plan) -> list[str]:
    storage, last = plan.storage, plan.stages[-1]
    found = [
        ("rows in the corpus", ranged(last.demand.rows)),
        ("calls", ranged(plan.total("calls"))),
        ("prompt tokens", ranged(plan.total("prompt_tokens"))),
        ("completion tokens", ranged(plan.total("completion_tokens"))),
        ("days", ranged(plan.wall_seconds / 86400)),
        ("GPU hours held", ranged(plan.held_gpu_seconds / 3600)),
        *_costs(plan),
        ("storage", f"{_bytes(storage.total)}, in {short(float(storage.image_files[0]) + storage.other_files)} files"),
        ("  images", _bytes(storage.images)),
        ("  journals", _bytes(storage.journals)),
        ("  stages", _bytes(storage.stages)),
        ("  corpus", _bytes(storage.corpus)),
        (
            "driver's memory",
            f"{_bytes(storage.traces_memory)} for traces, {_bytes(storage.compared_memory)} for rows",
        ),
        ("Prefect", f"{plan.num_tasks:,} task runs, a database of {_bytes(plan.database_bytes)}"),
    ]
    return fields(found)


def _bytes(values: Values) -> str:
    found = Range.of(np.asarray(values))
    low, expected, high = (f"{short(value)}B" for value in (found.low, found.expected, found.high))
    return expected if low == high else f"{expected} ({low} to {high})"


def _costs(plan: Plan) -> list[tuple[str, str]]:
    costs = [("cost of the GPUs", plan.gpu_cost), ("cost of the tokens", plan.token_cost)]
    shown = [(name, _money(cost)) for name, cost in costs if cost[0]]
    return shown or [("cost", "no prices are known: --gpu-hour-price, or prices in the configuration")]


def _money(cost: Values) -> str:
    found = Range.of(cost)
    return f"{amount(found.expected)} ({amount(found.low)} to {amount(found.high)})"


def _nightly(nightly: Plan) -> list[str]:
    storage = nightly.storage.total
    return [
        f"A night that adds {nightly.request.num_rows:,} rows:",
        *fields(
            [
                ("calls", ranged(nightly.total("calls"))),
                ("hours", ranged(nightly.wall_seconds / 3600)),
                ("storage", f"{_bytes(storage)}; {_bytes(365 * storage)} in a year"),
                *_costs(nightly),
            ],
            indent=2,
        ),
    ]


def _bottleneck(plan: Plan) -> list[str]:
    """Returns what sets the pace: of which the slowest stages are bound."""
    shares: dict[str, float] = {}
    for stage in plan.stages:
        shares[stage.bound_by] = shares.get(stage.bound_by, 0.0) + float(stage.wall_seconds[0])
    total = sum(shares.values())
    listed = ", ".join(f"{name} {share / total:.0%}" for name, share in sorted(shares.items(), key=lambda e: -e[1]))
    slowest = max(plan.stages, key=lambda stage: float(stage.wall_seconds[0]))
    return [f"What sets the pace: {listed} of the time. The longest stage is {slowest.name}."]


def limit_table(found: Sequence[Limit]) -> list[str]:
    """Returns the tightest limits as a table, each with what to do."""
    rows = [
        [limit.name, f"{limit.load:.1%}" if limit.load < 1 else f"{limit.load:.1f} x", _reached(limit), limit.what]
        for limit in found[:_NUM_LIMITS]
    ]
    lines = columns(["breaks first", "load", "is reached at", "because"], rows, num_left=1)
    return [*lines, "", "What then:", *fields([(limit.name, limit.then) for limit in found[:_NUM_LIMITS]], indent=2)]


def _reached(limit: Limit) -> str:
    if limit.grows_with == "speed":
        return f"{short(limit.at)} x as fast a copy"
    return f"{short(limit.at)} {limit.grows_with}"


def render_explanation(plan: Plan) -> str:
    """Returns how the GPUs' speed follows from their data sheet, and every assumption with its source."""
    layout, a = plan.layout, plan.request.assumptions
    model, gpu = layout.model, layout.gpu
    context = context_tokens(a)
    pace = speed(
        layout,
        layout.max_sequences(context),
        context,
        prefill=a.prefill_utilisation.drawn(),
        decode=a.decode_utilisation.drawn(),
    )
    step_gb = (model.weights_bytes + float(pace.sequences[0] * context[0]) * model.token_bytes) / 1e9
    image_flop = 2 * model.params + 2 * PATCHES_PER_TOKEN * model.vision_params
    lines = [
        f"How fast {model.name} answers on {layout.tensor} x {gpu.name} ({gpu.source}):",
        *fields(
            [
                (
                    "weights",
                    f"{model.weights_bytes / 1e9:.1f} GB in bfloat16, {model.params / 1e9:.1f} G parameters a token",
                ),
                (
                    "cache",
                    f"{model.token_bytes / 1024:.0f} KiB a token; beside the weights {short(layout.cache_tokens)} "
                    "tokens fit",
                ),
                ("sequences", f"{ranged(pace.sequences)} in a step, of {ranged(context)} tokens in the mean"),
                (
                    "a prompt token",
                    f"{2 * model.params / 1e9:.0f} GFLOP, of an image {image_flop / 1e9:.0f}; "
                    f"at {gpu.flops / 1e12:.0f} TFLOP/s a GPU computes "
                    f"{ranged(1 / pace.image_token / layout.tensor)} of the latter a second",
                ),
                (
                    "a step",
                    f"reads {step_gb:.0f} GB at {layout.tensor} x {gpu.bandwidth / 1e12:.2f} TB/s: "
                    f"{ranged(pace.step_seconds * 1000)} ms",
                ),
                ("completion tokens", f"{ranged(1 / pace.completion_token / layout.tensor)} a second and GPU"),
            ],
            indent=2,
        ),
        "  Both parts are added: engines overlap them, which makes this the careful side.",
        "",
        "Assumptions:",
    ]
    rows = [
        [each.name, short(each.low), short(each.expected), short(each.high), f" {each.unit}; {each.source}"]
        for each in a
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    lines += [
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}} {row[4]}"
        for row in rows
    ]
    return "\n".join(lines)
