"""The figures of a report as plain JSON-able values: every number of the page, and some more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from corpus.accounting import accounting_figures
from corpus.agreement import NORMAL_QUANTILE, wilson
from corpus.comparison import compared_figures
from corpus.report_inputs import PAPER_TABLE_1, ReportInputs
from corpus.tally import (
    PROBABILITY_EDGES,
    SIMILARITY_EDGES,
    TRACE_EDGES,
    CorpusTally,
    FatesTally,
    ModeCount,
    bin_labels,
)
from schemas.fates import StageCount
from schemas.samples import Topic


def report_figures(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the figures of a report.

    Raises AssertionError: when a stage or the whole run lost a row, which is a bug of ours.
    """
    _check_conservation(inputs)
    tally = inputs.tally
    figures = {
        "name": inputs.name,
        "version": inputs.version,
        "created": inputs.created,
        "recipe": inputs.recipe,
        "inputs": inputs.inputs,
        "teacher": inputs.teacher,
        "reasoner": inputs.reasoner,
        "summary": _summary_figures(inputs),
        "funnel": [_stage_figures(stage, count) for stage, count in inputs.stages.items()],
        "reasons": _reason_figures(inputs.stages),
        "topics": _topic_figures(tally),
        "modes": {
            "source": _mode_figures(tally.by_source),
            "kind": _mode_figures(tally.by_kind),
            "answer_type": _mode_figures(tally.by_answer_type),
            "heuristic": _mode_figures(tally.by_heuristic),
        },
        "audit": _audit_figures(tally.audit if inputs.audit is None else inputs.audit),
        "samples_drawn": [{"num_sampled": n, "rows": rows} for n, rows in tally.samples_drawn.items()],
        "difficulty": [
            {"probability": label, "think": count.think, "direct": count.direct}
            for label, count in zip(bin_labels(PROBABILITY_EDGES, is_last_open=False), tally.probabilities, strict=True)
        ],
        "traces": _trace_figures(tally),
        "removed": _removed_figures(inputs.fates_tally),
        "accounting": accounting_figures(inputs.costs, inputs.paid, inputs.prices),
        "benchmarks": [asdict(benchmark) for benchmark in inputs.benchmarks],
        "agreement": _agreement_figures(inputs.agreement),
        "missing": list(inputs.missing),
    }
    before = None if inputs.before is None else compared_figures(figures, inputs.before)
    return {**figures, "previous": before}


def _check_conservation(inputs: ReportInputs) -> None:
    for stage, count in inputs.stages.items():
        count.check(stage)
    num_in = _rows_in(inputs.stages)
    num_left = sum(count.num_dropped + count.num_quarantined for count in inputs.stages.values())
    num_rows = inputs.tally.rows.total
    assert num_in + inputs.num_marked == num_rows + num_left, (
        f"the run lost rows: {num_in} read and {inputs.num_marked} published earlier, {num_rows} in the corpus "
        f"+ {num_left} dropped or quarantined"
    )


def _rows_in(stages: Mapping[str, StageCount]) -> int:
    return next((count.num_in for count in stages.values()), 0)


def _summary_figures(inputs: ReportInputs) -> dict[str, Any]:
    num_in, rows = _rows_in(inputs.stages), inputs.tally.rows
    return {
        "rows_in": num_in,
        "rows_out": rows.total,
        "marked": inputs.num_marked,
        "share_out": (rows.total - inputs.num_marked) / num_in if num_in else 0.0,
        "think": rows.think,
        "direct": rows.direct,
        "share_think": rows.share_think,
        "dropped": sum(count.num_dropped for count in inputs.stages.values()),
        "quarantined": sum(count.num_quarantined for count in inputs.stages.values()),
        "images": inputs.tally.num_images,
        "text_only": inputs.tally.num_text_only,
        "paper_share_think": _paper_total().share_think,
    }


def _stage_figures(stage: str, count: StageCount) -> dict[str, Any]:
    return {
        "stage": stage,
        "in": count.num_in,
        "kept": count.num_kept,
        "dropped": count.num_dropped,
        "quarantined": count.num_quarantined,
    }


def _reason_figures(stages: Mapping[str, StageCount]) -> list[dict[str, Any]]:
    reasons = [
        {"stage": stage, "exit": exit_name, "reason": reason, "rows": rows}
        for stage, count in stages.items()
        for exit_name, by_reason in (("dropped", count.dropped), ("quarantined", count.quarantined))
        for reason, rows in by_reason.items()
        if rows
    ]
    return sorted(reasons, key=lambda row: (-int(str(row["rows"])), str(row["stage"]), str(row["reason"])))


def _topic_figures(tally: CorpusTally) -> list[dict[str, Any]]:
    """Returns one entry per topic of the paper, in its order, then those it does not know, then the total."""
    paper_total = _paper_total()
    others = [topic for topic in tally.by_topic if topic not in set(Topic)]
    counts = [(str(topic), tally.by_topic.get(topic, ModeCount()), PAPER_TABLE_1[topic]) for topic in PAPER_TABLE_1]
    counts += [(topic, tally.by_topic[topic], ModeCount()) for topic in others]
    return [
        {
            "topic": topic,
            "direct": count.direct,
            "think": count.think,
            "total": count.total,
            "share_of_corpus": count.total / tally.rows.total if tally.rows.total else 0.0,
            "share_think": count.share_think,
            "paper_share_of_corpus": paper.total / paper_total.total if paper.total else None,
            "paper_share_think": paper.share_think if paper.total else None,
        }
        for topic, count, paper in [*counts, ("Total", tally.rows, paper_total)]
    ]


def _paper_total() -> ModeCount:
    counts = PAPER_TABLE_1.values()
    return ModeCount(sum(count.think for count in counts), sum(count.direct for count in counts))


def _mode_figures(counts: Mapping[str, ModeCount]) -> list[dict[str, Any]]:
    return [
        {"value": value, "direct": c.direct, "think": c.think, "total": c.total, "share_think": c.share_think}
        for value, c in counts.items()
    ]


def _audit_figures(audit: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    """Returns the audit slice's histogram and its mean pass rate, num_right / num_scored over rows with a score.

    The interval of the mean is the normal one over rows, as the answers to one question are no independent draws. That
    of each bar of the histogram by right answers is Wilson's.
    """
    scored = {key: rows for key, rows in audit.items() if key[1] > 0}
    num_rows = sum(scored.values())
    mean, margin = _mean_with_margin([(right / of, rows) for (right, of), rows in scored.items()])
    by_right: dict[int, int] = {}
    for (right, _), rows in scored.items():
        by_right[right] = by_right.get(right, 0) + rows
    most = max((of for _, of in scored), default=-1)
    return {
        "rows": sum(audit.values()),
        "pass_rate": mean,
        "pass_rate_low": None if margin is None or mean is None else max(0.0, mean - margin),
        "pass_rate_high": None if margin is None or mean is None else min(1.0, mean + margin),
        "by_right": [_share_figures(right, by_right.get(right, 0), num_rows) for right in range(most + 1)],
        "histogram": [
            {"num_right": right, "num_scored": num_scored, "rows": rows}
            for (right, num_scored), rows in sorted(audit.items(), key=lambda item: (item[0][1], item[0][0]))
        ],
    }


def _share_figures(num_right: int, rows: int, num_rows: int) -> dict[str, Any]:
    share = wilson(rows / num_rows, num_rows)
    return {"num_right": num_right, "rows": rows, "share": share.value, "low": share.low, "high": share.high}


def _mean_with_margin(values: Sequence[tuple[float, int]]) -> tuple[float | None, float | None]:
    """Returns the mean of values, each with how often it occurs, and half its 95 % interval; None where unknown."""
    number = sum(times for _, times in values)
    if number == 0:
        return None, None
    mean = sum(value * times for value, times in values) / number
    if number == 1:
        return mean, None
    variance = sum(times * (value - mean) ** 2 for value, times in values) / (number - 1)
    return mean, NORMAL_QUANTILE * math.sqrt(variance / number)


def _trace_figures(tally: CorpusTally) -> dict[str, Any]:
    labels = bin_labels(TRACE_EDGES, is_last_open=True)
    return {
        "median_words": tally.traces.median,
        "p90_words": tally.traces.p90,
        "longest_words": tally.traces.longest,
        "histogram": [{"words": label, "rows": rows} for label, rows in zip(labels, tally.traces.bins, strict=True)],
    }


def _agreement_figures(agreement: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the agreement of judges with every key that an entry may have."""
    if agreement is None:
        return None
    unknown = dict.fromkeys(("kappa", "low", "high", "agreement"))
    blank: dict[str, Any] = {"name": "", "what": "", "num_rows": 0, **unknown, "confusion": [], "note": ""}
    return {**agreement, "entries": [{**blank, **entry} for entry in agreement.get("entries", [])]}


def _removed_figures(tally: FatesTally) -> dict[str, Any]:
    """Returns the rows that left by source, and how alike to another row those are that left for it."""
    labels = bin_labels(SIMILARITY_EDGES, is_last_open=False)
    return {
        "by_source": [
            {"source": source, "exit": exit_, "rows": rows} for (source, exit_), rows in tally.by_source.items()
        ],
        "similarities": [
            {
                "stage": found.stage,
                "reason": found.reason,
                "rows": found.num_rows,
                "equal": found.num_equal,
                "histogram": [
                    {"similarity": label, "rows": rows} for label, rows in zip(labels, found.bins, strict=True)
                ],
            }
            for found in tally.similarities
        ],
    }
