"""What changed since the version before, as figures. Nothing in an old `report.json` is relied on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corpus.report_inputs import VersionBefore
from schemas.fates import StageCount


def compared_figures(figures: Mapping[str, Any], before: VersionBefore) -> dict[str, Any]:
    """Returns the figures of the version before beside today's (`report_figures`).

    Rows, shares and reasons come from its manifest. Topics and costs come from its `report.json`: `topics` is empty and
    the costs are None where that cannot be read. has_figures: whether it could be.
    """
    old = before.figures or {}
    old_costs, new_costs = _costs(old), _costs(figures)
    return {
        "version": before.version,
        "created": before.created,
        "is_same_recipe": before.recipe == figures["recipe"],
        "has_figures": before.figures is not None,
        "rows": {
            name: {"before": _share_or_count(before, name), "now": figures["summary"][key]}
            for name, key in (("total", "rows_out"), ("think", "think"), ("direct", "direct"))
        },
        "share_think": {"before": before.rows.share_think, "now": figures["summary"]["share_think"]},
        "topics": _compared_topics(old, figures),
        "reasons": _compared_reasons(before.counts, figures),
        "costs": {
            name: {"before": old_costs.get(name), "now": new_costs.get(name)}
            for name in ("num_calls", "num_replies", "prompt_tokens", "completion_tokens", "cost")
        },
    }


def _share_or_count(before: VersionBefore, name: str) -> int:
    return {"total": before.rows.total, "think": before.rows.think, "direct": before.rows.direct}[name]


def _compared_topics(old: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the topics that either version has rows of, in today's order; none if the old ones are unknown."""
    before = {row["topic"]: row for row in _records(old.get("topics")) if isinstance(row.get("topic"), str)}
    if not before:
        return []
    rows = []
    for row in figures["topics"]:
        earlier = before.get(row["topic"], {})
        num_before = _number(earlier.get("total")) or 0
        if row["total"] or num_before:
            rows.append(
                {
                    "topic": row["topic"],
                    "rows": {"before": num_before, "now": row["total"]},
                    "share_think": {
                        "before": _number(earlier.get("share_think")) if num_before else None,
                        "now": row["share_think"] if row["total"] else None,
                    },
                }
            )
    return rows


def _compared_reasons(counts: Mapping[str, StageCount], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns why rows left, then and now, the largest change first."""
    before = {
        (stage, exit_, reason): rows
        for stage, count in counts.items()
        for exit_, by_reason in (("dropped", count.dropped), ("quarantined", count.quarantined))
        for reason, rows in by_reason.items()
    }
    now = {(row["stage"], row["exit"], row["reason"]): row["rows"] for row in figures["reasons"]}
    rows = [
        {"stage": key[0], "exit": key[1], "reason": key[2], "before": before.get(key, 0), "now": now.get(key, 0)}
        for key in sorted({*before, *now})
    ]
    return sorted(rows, key=lambda row: -abs(row["now"] - row["before"]))


def _costs(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the totals of the stored replies' cost; numbers alone, a cost only where there were prices."""
    accounting = figures.get("accounting")
    costs = accounting.get("costs") if isinstance(accounting, Mapping) else None
    total = costs.get("total") if isinstance(costs, Mapping) else None
    if not isinstance(accounting, Mapping) or not isinstance(total, Mapping):
        return {}
    has_prices = bool(accounting.get("has_prices"))
    return {
        name: number
        for name, value in total.items()
        if (number := _number(value)) is not None and (name != "cost" or has_prices)
    }


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
