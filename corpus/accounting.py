"""What a corpus cost, as figures: what its replies cost altogether, and beside it what the last run paid of that.

The two differ wherever replies were stored before: after a killed run, a changed threshold, a nightly refresh. The
first is a function of the stored replies, the second of the run. Neither enters the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from schemas.config import PricesConfig
from schemas.usage import Field, Ledger, Usage, UsageKey, cost_of, split_ledger, total_usage

GROUPINGS: Mapping[str, tuple[Field, ...]] = {
    "by_stage": ("stage",),
    "by_purpose": ("stage", "purpose"),
    "by_source": ("source",),
    "by_model": ("model",),
    "entries": ("stage", "purpose", "source", "model"),
}
"""The tables of a ledger and the fields that tell their rows apart; each sums to the same total."""


def accounting_figures(costs: Ledger, paid: Ledger, prices: PricesConfig) -> dict[str, Any]:
    """Returns the figures of both ledgers (plain JSON-able values).

    costs: of all stored replies that the rows of the corpus asked for. paid: by the run that made it.
    """
    return {
        "has_prices": prices.has_any,
        "costs": _ledger_figures(costs, prices),
        "paid": _ledger_figures(paid, prices),
    }


def ledgers_of(figures: Mapping[str, Any]) -> tuple[Ledger, Ledger]:
    """Returns the ledgers behind figures (`accounting_figures`): the costs and what the run paid, to price them anew.

    Raises KeyError, TypeError: these are no such figures.
    """
    return _ledger_of(figures["costs"]["entries"]), _ledger_of(figures["paid"]["entries"])


def _ledger_of(entries: Sequence[Mapping[str, Any]]) -> dict[UsageKey, Usage]:
    return {
        UsageKey(entry["stage"], entry["purpose"], entry["source"], entry["model"]): Usage.from_record(
            # Shown as unknown, kept as none.
            {**entry, "gpu_seconds": entry["gpu_seconds"] or 0.0}
        )
        for entry in entries
    }


def _ledger_figures(ledger: Ledger, prices: PricesConfig) -> dict[str, Any]:
    tables = {name: _table_figures(ledger, fields, prices) for name, fields in GROUPINGS.items()}
    return {**tables, "total": _figures(ledger, prices)}


def _table_figures(ledger: Ledger, fields: Sequence[Field], prices: PricesConfig) -> list[dict[str, Any]]:
    return [
        {**dict(zip(fields, values, strict=True)), **_figures(part, prices)}
        for values, part in split_ledger(ledger, *fields).items()
    ]


def _figures(ledger: Ledger, prices: PricesConfig) -> dict[str, Any]:
    usage, cost = total_usage(ledger.values()), cost_of(ledger, prices)
    figures = asdict(usage)
    if usage.num_gpu_calls == 0:
        figures["gpu_seconds"] = None
    return {
        **figures,
        "is_gpu_time_whole": usage.is_gpu_time_whole,
        "cost": cost.amount,
        "is_cost_whole": cost.is_whole,
    }


def money(row: Mapping[str, Any]) -> str:
    """Returns the cost in a row of the figures, with "≥" where GPU time is unknown, and "–" where that is all."""
    if row["is_cost_whole"]:
        return amount(row["cost"])
    return f"≥ {amount(row['cost'])}" if row["cost"] else "–"


def gpu_time(row: Mapping[str, Any]) -> str:
    """Returns the GPU-seconds in a row of the figures, with "≥" where those of some calls are unknown, or "–"."""
    if row["gpu_seconds"] is None:
        return "–"
    return f"{'' if row['is_gpu_time_whole'] else '≥ '}{row['gpu_seconds']:,.0f}"


def amount(cost: float) -> str:
    """Returns 1,234.50, or 0.0123 where hundredths would hide what a small run costs."""
    return f"{cost:,.2f}" if cost == 0 or cost >= 1 else f"{cost:.4f}"
