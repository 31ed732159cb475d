"""The table and the two plots of an evaluation, out of its measures. Nothing is computed here that is not shown.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers can tell apart; modes differ by
marker as well. Plots are drawn without a display, and the same figures give the same SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib import patheffects, ticker
from matplotlib.figure import Figure

from corpus.storage import replacing
from schemas.template import ThinkingMode
from training.measures import Measures, Rate

MODE_NAMES = {
    ThinkingMode.SHORT: "short (never thinks)",
    ThinkingMode.AUTO: "auto (chooses)",
    ThinkingMode.LONG: "long (always thinks)",
}
_COLOURS = {ThinkingMode.SHORT: "#0072B2", ThinkingMode.AUTO: "#D55E00", ThinkingMode.LONG: "#009E73"}
_MARKERS = {ThinkingMode.SHORT: "o", ThinkingMode.AUTO: "D", ThinkingMode.LONG: "s"}
_MAX_LABELLED = 8
"""With more benchmarks than this, their names beside the points would hide them."""
_MAX_NAME_CHARS = 40
_GREY = "#767676"
_STYLE = {"font.size": 10.0, "svg.hashsalt": "bimode", "axes.spines.top": False, "axes.spines.right": False}

ByMode = Mapping[ThinkingMode, Measures]


@dataclass(frozen=True, slots=True)
class Figures:
    """The measures of a model. benchmarks, topics: by name and mode. overall: all questions together, by mode."""

    benchmarks: Mapping[str, ByMode]
    topics: Mapping[str, ByMode]
    overall: ByMode

    @property
    def modes(self) -> list[ThinkingMode]:
        """The modes measured, from never thinking to always."""
        return [mode for mode in MODE_NAMES if mode in self.overall]


@dataclass(frozen=True, slots=True)
class Mean:
    """Unweighted means over benchmarks, as papers report them; None where no benchmark has the figure."""

    accuracy: float | None
    thinking_rate: float | None
    output_tokens: float | None


def mean_over_benchmarks(figures: Figures, mode: ThinkingMode) -> Mean:
    """Returns the means of a mode: each benchmark counts the same, however many questions it has."""
    measured = [by_mode[mode] for by_mode in figures.benchmarks.values()]
    return Mean(
        _mean([measures.accuracy.share for measures in measured]),
        _mean([measures.thinking_rate.share for measures in measured]),
        _mean([measures.mean_output_tokens for measures in measured]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# --- The table


def render_table(figures: Figures) -> str:
    """Returns the figures as a page in Markdown."""
    lines = [
        "# Evaluation",
        "",
        "Accuracy: right answers over questions with a reference that can be compared, with the 95 % Wilson interval. "
        "Unscored replies (cut off, unreadable, none) count there as not right and are listed on their own. "
        "Thinking rate: replies whose thought is not empty. Output tokens: generated after the forced prefix of the "
        "mode, means over replies.",
        "",
        *_table("benchmark", figures.benchmarks, figures.modes),
        *(_mean_row(figures, mode) for mode in figures.modes if len(figures.benchmarks) > 1),
        "",
        "## By topic",
        "",
        *_table("topic", figures.topics, figures.modes),
    ]
    return "\n".join(lines) + "\n"


def _table(what: str, groups: Mapping[str, ByMode], modes: Sequence[ThinkingMode]) -> list[str]:
    header = f"| {what} | mode | questions | accuracy | thinking rate | mean output tokens | truncated | unscored |"
    rows = [_row(name, mode, by_mode[mode]) for name, by_mode in groups.items() for mode in modes if mode in by_mode]
    return [header, "|---|---|---:|---|---:|---:|---:|---:|", *rows]


def _row(name: str, mode: ThinkingMode, measures: Measures) -> str:
    without = measures.num_without_reference
    asked = f"{measures.num_questions:,}" + (f" ({without:,} without reference)" if without else "")
    cells = [
        _escaped(name),
        str(mode),
        asked,
        _with_interval(measures.accuracy),
        _percent(measures.thinking_rate.share),
        _number(measures.mean_output_tokens),
        _percent(measures.truncated.share),
        _percent(measures.unscored.share),
    ]
    return f"| {' | '.join(cells)} |"


def _mean_row(figures: Figures, mode: ThinkingMode) -> str:
    mean = mean_over_benchmarks(figures, mode)
    name = f"**mean of {len(figures.benchmarks)} benchmarks**"
    cells = [_percent(mean.accuracy), _percent(mean.thinking_rate), _number(mean.output_tokens)]
    return f"| {name} | {mode} | | {' | '.join(cells)} | | |"


def _with_interval(rate: Rate) -> str:
    low, high = rate.interval
    return "" if rate.share is None else f"{rate.share:.1%} ({low:.1%} to {high:.1%})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- The plots


def plot_accuracy(figures: Figures) -> Figure:
    """Returns accuracy over mean output tokens: a faint line per benchmark through its modes, and their means.

    A benchmark without accuracy or without replies in a mode has no point there.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 5.0), layout="constrained")
        axes = figure.subplots()
        for name, by_mode in figures.benchmarks.items():
            points = {mode: _point(by_mode[mode]) for mode in figures.modes if mode in by_mode}
            known = [point for point in points.values() if point is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], color=_GREY, alpha=0.5, linewidth=0.8, zorder=1)
            for mode, point in points.items():
                if point is not None:
                    _draw_point(axes, mode, point, by_mode[mode].accuracy)
            if known and len(figures.benchmarks) <= _MAX_LABELLED:
                # Beside the rightmost point; long tails to the left would cross the other lines.
                place = max(known)
                _draw_name(axes, name, place)
        has_means = len(figures.benchmarks) > 1
        for mode in figures.modes:
            _draw_mean(axes, mode, mean_over_benchmarks(figures, mode), is_shown=has_means)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.margins(x=0.14, y=0.08)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("mean output tokens per reply (log scale)")
        axes.set_ylabel("accuracy, with 95 % interval")
        large = " (large: means over benchmarks)" if has_means else ""
        axes.set_title(f"Accuracy over output tokens by mode{large}", loc="left", fontsize=11)
        axes.grid(visible=True, color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _point(measures: Measures) -> tuple[float, float] | None:
    tokens, accuracy = measures.mean_output_tokens, measures.accuracy.share
    return (tokens, accuracy) if tokens and accuracy is not None else None


def _draw_name(axes: Any, name: str, place: tuple[float, float]) -> None:
    label = axes.annotate(
        _shortened(name), place, xytext=(8, 0), textcoords="offset points", va="center", fontsize=8, zorder=4
    )
    label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def _draw_point(axes: Any, mode: ThinkingMode, point: tuple[float, float], accuracy: Rate) -> None:
    low, high = accuracy.interval
    x, y = point
    axes.errorbar(
        x,
        y,
        yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        fmt=_MARKERS[mode],
        color=_COLOURS[mode],
        markersize=5,
        elinewidth=0.8,
        alpha=0.75,
        zorder=2,
    )


def _draw_mean(axes: Any, mode: ThinkingMode, mean: Mean, *, is_shown: bool) -> None:
    """Draws the mean of a mode as a large hollow marker, which hides no point, and in any case the mode's legend."""
    axes.plot(
        [],
        [],
        linestyle="none",
        marker=_MARKERS[mode],
        color=_COLOURS[mode],
        markersize=6,
        label=MODE_NAMES[mode],
    )
    if is_shown and mean.output_tokens and mean.accuracy is not None:
        axes.plot(
            mean.output_tokens,
            mean.accuracy,
            linestyle="none",
            marker=_MARKERS[mode],
            markersize=15,
            markerfacecolor="none",
            markeredgecolor=_COLOURS[mode],
            markeredgewidth=2.2,
            zorder=3,
        )


def plot_thinking_rate(figures: Figures) -> Figure:
    """Returns the thinking rate in auto mode by benchmark, as bars from the least to the most thinking.

    Without auto mode there is nothing to choose, and the first mode measured is shown.
    """
    mode = ThinkingMode.AUTO if ThinkingMode.AUTO in figures.modes else figures.modes[0]
    rates = {name: by_mode[mode].thinking_rate for name, by_mode in figures.benchmarks.items()}
    names = sorted((name for name in rates if rates[name].total), key=lambda name: (rates[name].share, name))
    shares = [rates[name].share or 0.0 for name in names]
    bounds = [rates[name].interval for name in names]
    below = [max(0.0, share - low) for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 1.6 + 0.32 * max(1, len(names))), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), shares, color=_COLOURS[mode], height=0.65, zorder=2)
        axes.errorbar(
            shares,
            range(len(names)),
            xerr=[below, above],
            fmt="none",
            ecolor="black",
            elinewidth=0.9,
            capsize=2,
            zorder=3,
        )
        for place, (share, (_, high)) in enumerate(zip(shares, bounds, strict=True)):
            axes.annotate(
                f"{share:.1%}", (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
        axes.set_ylim(-0.6, max(1, len(names)) - 0.4)
        axes.set_xlim(0, 1.1)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("replies that think, with 95 % interval")
        axes.set_title(f"Thinking rate by benchmark, mode {MODE_NAMES[mode]}", loc="left", fontsize=11)
        axes.grid(visible=True, axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 1] + "…"


def write_plot(figure: Figure, folder: Path, name: str) -> None:
    """Writes a plot as `{name}.png` and `{name}.svg`. Raises StorageError."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for form in ("png", "svg"):
        with mpl.rc_context(_STYLE), replacing(folder / f"{name}.{form}") as temporary:
            figure.savefig(temporary, format=form, dpi=160, metadata=metadata[form])
