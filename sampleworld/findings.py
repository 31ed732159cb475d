"""What the experiment found: each criterion of `sampleworld.experiment` with its figures, our table beside the paper's.

Reads the figures that `sampleworld.reproduce` records by seed and writes `README.md` and two curves beside them.
Nothing is drawn at random or trained here, so the page can be made again from the recorded figures alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.figure import Figure

from corpus.storage import write_text
from sampleworld.experiment import (
    MAX_AUTO_THINKING_AFTER_ANNEALING,
    MAX_GAP_TO_THINKING,
    MAX_THINKING_ON_GLANCE,
    MIN_GAIN_OF_THINKING,
    MIN_THINKING_ON_STEPS,
    UNSEEN_FAMILY,
)
from sampleworld.world import GLANCE, STEPS
from schemas.template import ThinkingMode
from training.evaluation_report import write_plot

LONG, SHORT, AUTO = str(ThinkingMode.LONG), str(ThinkingMode.SHORT), str(ThinkingMode.AUTO)
GLANCE_FAMILIES, STEP_FAMILIES = tuple(GLANCE), tuple(STEPS)
ALL_FAMILIES = GLANCE_FAMILIES + STEP_FAMILIES

# Two-sided 95 % quantiles of Student's t by degrees of freedom (any table of the distribution).
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

SeedFigures = dict[str, Any]
Statistic = Callable[[SeedFigures], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of a figure over seeds with its 95 % t-interval; one seed has no interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the interval's width, infinite for one seed."""
        n = len(self.values)
        return _T_95[n - 1] * statistics.stdev(self.values) / math.sqrt(n) if n > 1 else math.inf

    def __str__(self) -> str:
        interval = "" if math.isinf(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"


@dataclass(frozen=True, slots=True)
class Criterion:
    """A sentence that was fixed before the run, the figure it is about, whether it holds (None: too few seeds)."""

    letter: str
    text: str
    estimate: Estimate
    holds: bool | None


def mean_of(arm: str, mode: str, families: Sequence[str], measure: str = "accuracy") -> Statistic:
    """Returns what reads one figure of a seed: the unweighted mean of a measure over families."""

    def read(figures: SeedFigures) -> float:
        by_family = figures["evaluations"][arm][mode]
        return statistics.fmean(by_family[family][measure]["share"] or 0.0 for family in families)

    return read


def estimate(seeds: Sequence[SeedFigures], read: Statistic) -> Estimate:
    return Estimate(tuple(read(figures) for figures in seeds))


def difference(first: Statistic, second: Statistic) -> Statistic:
    return lambda figures: first(figures) - second(figures)


def judge_criteria(seeds: Sequence[SeedFigures]) -> list[Criterion]:
    """Returns every criterion with its figure. seeds: the recorded figures of at least one seed."""
    found = [_wins(seeds, arm, mode, text) for arm, mode, text in _CONTENDERS]
    found.append(
        _bounded(
            seeds,
            "b",
            f"after annealing, auto mode thinks on under {MAX_AUTO_THINKING_AFTER_ANNEALING:.0%} of the step questions",
            mean_of("mixed", AUTO, STEP_FAMILIES, "thinking_rate"),
            most=MAX_AUTO_THINKING_AFTER_ANNEALING,
        )
    )
    gain = difference(mean_of("mixed", LONG, STEP_FAMILIES), mean_of("mixed", SHORT, STEP_FAMILIES))
    text = f"there thinking gains over {100 * MIN_GAIN_OF_THINKING:.0f} points"
    found.append(_bounded(seeds, "b", text, gain, least=MIN_GAIN_OF_THINKING))
    for families, name in ((STEP_FAMILIES, "the step questions"), ((UNSEEN_FAMILY,), f"the unseen `{UNSEEN_FAMILY}`")):
        gap = difference(mean_of("bpo", LONG, families), mean_of("bpo", AUTO, families))
        text = f"after BPO, auto mode is within {100 * MAX_GAP_TO_THINKING:.0f} points of always thinking on {name}"
        found.append(_bounded(seeds, "c", text, gap, most=MAX_GAP_TO_THINKING))
        text = f"and thinks on over {MIN_THINKING_ON_STEPS:.0%} of {name}"
        rate = mean_of("bpo", AUTO, families, "thinking_rate")
        found.append(_bounded(seeds, "c", text, rate, least=MIN_THINKING_ON_STEPS))
    text = f"and thinks on under {MAX_THINKING_ON_GLANCE:.0%} of the glance questions"
    rate = mean_of("bpo", AUTO, GLANCE_FAMILIES, "thinking_rate")
    found.append(_bounded(seeds, "c", text, rate, most=MAX_THINKING_ON_GLANCE))
    ours = mean_of("bpo", AUTO, STEP_FAMILIES, "thinking_rate")
    for arm, name in (("choice_masked", "the choice token masked"), ("plain_grpo", "plain GRPO in auto mode")):
        more = difference(ours, mean_of(arm, AUTO, STEP_FAMILIES, "thinking_rate"))
        text = f"BPO thinks on more of the step questions than {name}"
        found.append(Criterion("d", text, estimate(seeds, more), _excludes_zero(estimate(seeds, more))))
    return found


_CONTENDERS = (
    ("reasoning_only", LONG, "Only-R in one pass"),
    ("reasoning_only_all_steps", LONG, "Only-R with as many steps"),
    ("direct_only", SHORT, "Non-R at once"),
    ("two_stage", LONG, "Non-R then R"),
)


def _wins(seeds: Sequence[SeedFigures], arm: str, mode: str, name: str) -> Criterion:
    ahead = estimate(seeds, difference(mean_of("mixed", LONG, ALL_FAMILIES), mean_of(arm, mode, ALL_FAMILIES)))
    return Criterion("a", f"Mixed-R, thinking, beats {name}", ahead, _excludes_zero(ahead))


def _excludes_zero(found: Estimate) -> bool | None:
    """Returns whether a difference is positive beyond its interval; None for a single seed."""
    return None if math.isinf(found.half_width) else found.mean - found.half_width > 0


def _bounded(
    seeds: Sequence[SeedFigures],
    letter: str,
    text: str,
    read: Statistic,
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> Criterion:
    """Returns a criterion whose mean over seeds must lie between two bounds."""
    found = estimate(seeds, read)
    return Criterion(letter, text, found, least < found.mean < most if len(seeds) > 1 else None)


def render_page(seeds: Sequence[SeedFigures]) -> str:
    """Returns the findings as Markdown: criteria, strategies, modes before and after BPO, families."""
    listed = ", ".join(str(figures["seed"]) for figures in seeds)
    lines = [
        "# The paper's findings, small",
        "",
        f"Made by `make reproduce` out of the figures of seed {listed}; accuracy and rates in percent, means over "
        "seeds with 95 % t-intervals. What each arm is, and the criteria, stand in `sampleworld/experiment.py`.",
        "",
        "| | criterion, fixed before the run | measured | holds |",
        "|---|---|---|---|",
    ]
    words = {True: "yes", False: "**no**", None: "one seed: open"}
    lines += [f"| {c.letter} | {c.text} | {c.estimate} | {words[c.holds]} |" for c in judge_criteria(seeds)]
    lines += ["", "## Annealing strategies (the paper's table 3)", "", *_strategies(seeds)]
    lines += ["", "## Modes before and after reinforcement (the paper's table 4)", "", *_modes(seeds)]
    lines += ["", "## By family, after BPO", "", *_families(seeds)]
    lines += [
        "",
        "![thinking rate by step](thinking_rate.png)",
        "",
        "![accuracy of auto mode by step](auto_accuracy.png)",
    ]
    return "\n".join(lines) + "\n"


def _strategies(seeds: Sequence[SeedFigures]) -> list[str]:
    rows = [
        ("Non-R, all rows without thoughts", "direct_only", SHORT, "64.4"),
        ("Only-R, one pass", "reasoning_only", LONG, "65.4"),
        ("Only-R, as many steps as the others", "reasoning_only_all_steps", LONG, "-"),
        ("Non-R then R, two stages", "two_stage", LONG, "66.9"),
        ("Mixed-R", "mixed", LONG, "69.5"),
        ("Mixed-R", "mixed", SHORT, "62.0"),
    ]
    lines = ["| strategy | mode | ours, all families | ours, step families | paper |", "|---|---|---|---|---|"]
    for name, arm, mode, paper in rows:
        both = [estimate(seeds, mean_of(arm, mode, families)) for families in (ALL_FAMILIES, STEP_FAMILIES)]
        lines.append(f"| {name} | {_SHORT_NAMES[mode]} | {both[0]} | {both[1]} | {paper} |")
    return lines


_SHORT_NAMES = {LONG: "T", SHORT: "N-T", AUTO: "A-T"}


def _modes(seeds: Sequence[SeedFigures]) -> list[str]:
    paper = {"mixed": ("42.0", "43.2", "56.1"), "bpo": ("49.9", "57.0", "58.1")}
    names = {
        "mixed": "annealed",
        "bpo": "BPO",
        "choice_masked": "BPO, choice token masked",
        "plain_grpo": "plain GRPO in auto mode",
    }
    lines = [
        "| model | mode | step questions | paper, 6 reasoning benchmarks | glance questions "
        "| thinks on step questions | on glance questions |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, name in names.items():
        for place, mode in enumerate((SHORT, AUTO, LONG)):
            figures = [
                estimate(seeds, mean_of(arm, mode, families, measure))
                for measure in ("accuracy", "thinking_rate")
                for families in (STEP_FAMILIES, GLANCE_FAMILIES)
            ]
            published = paper[arm][place] if arm in paper else "-"
            lines.append(
                f"| {name} | {_SHORT_NAMES[mode]} | {figures[0]} | {published} | {figures[1]} | {figures[2]} "
                f"| {figures[3]} |"
            )
    return lines


def _families(seeds: Sequence[SeedFigures]) -> list[str]:
    lines = ["| family | N-T | A-T | T | thinks in A-T | tokens N-T / A-T / T |", "|---|---|---|---|---|---|"]
    for family in ALL_FAMILIES:
        accuracies = [estimate(seeds, mean_of("bpo", mode, [family])) for mode in (SHORT, AUTO, LONG)]
        rate = estimate(seeds, mean_of("bpo", AUTO, [family], "thinking_rate"))
        tokens = [
            statistics.fmean(figures["evaluations"]["bpo"][mode][family]["mean_output_tokens"] for figures in seeds)
            for mode in (SHORT, AUTO, LONG)
        ]
        unseen = " (never asked by BPO)" if family == UNSEEN_FAMILY else ""
        lengths = " / ".join(f"{length:.0f}" for length in tokens)
        lines.append(f"| {family}{unseen} | {' | '.join(map(str, accuracies))} | {rate} | {lengths} |")
    return lines


_ARM_STYLES = {
    "bpo": ("BPO", "#D55E00", "D"),
    "choice_masked": ("choice token masked", "#0072B2", "o"),
    "plain_grpo": ("plain GRPO", "#009E73", "s"),
}


def plot_curve(seeds: Sequence[SeedFigures], measure: str, label: str) -> Figure:
    """Returns a measure of auto mode by step: solid on step questions, dotted on glance ones, faint lines by seed."""
    with mpl.rc_context({"svg.hashsalt": "bimode", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for arm, (name, colour, marker) in _ARM_STYLES.items():
            for families, dashes, kind in ((STEP_FAMILIES, "-", "step"), (GLANCE_FAMILIES, ":", "glance")):
                lines = [_curve(figures["curves"][arm], families, measure) for figures in seeds]
                steps = [point["step"] for point in seeds[0]["curves"][arm]]
                for line in lines if len(lines) > 1 else []:
                    axes.plot(steps, line, linestyle=dashes, color=colour, alpha=0.25, linewidth=0.8)
                mean = [statistics.fmean(values) for values in zip(*lines, strict=True)]
                axes.plot(
                    steps, mean, linestyle=dashes, color=colour, marker=marker, markersize=4, label=f"{name}, {kind}"
                )
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("optimiser steps after annealing")
        axes.set_ylabel(label)
        axes.grid(visible=True, color="#E5E5E5", linewidth=0.6)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curve(points: Sequence[dict[str, Any]], families: Sequence[str], measure: str) -> list[float]:
    return [statistics.fmean(point["families"][family][measure]["share"] for family in families) for point in points]


def write_findings(folder: Path) -> str:
    """Writes the page and the curves out of the figures recorded in a folder, and returns the page."""
    paths = sorted(folder.glob("seed-*.json"))
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    page = render_page(seeds)
    write_text(folder / "README.md", page)
    write_plot(plot_curve(seeds, "thinking_rate", "auto mode: replies that think"), folder, "thinking_rate")
    write_plot(plot_curve(seeds, "accuracy", "auto mode: accuracy"), folder, "auto_accuracy")
    return page
