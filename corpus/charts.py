"""The charts of a report: drawn by Vega-Lite when the page is made, as SVG that stands in the page itself.

Each is drawn twice, for a column of a desktop page and for a phone, since text in a chart that is merely scaled cannot
be read. Colours are variables of the page's style sheet, so a chart follows it into the dark. Whatever the library
writes is rebuilt from a short list of elements and attributes: labels come from data, and no style or link passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from xml.etree import ElementTree

import altair as alt
import vl_convert
from markupsafe import Markup

from corpus.report_inputs import TOPIC_NAMES
from corpus.shown_text import in_words, percent, whole

WIDE_PIXELS, NARROW_PIXELS = 486, 317
"""Half of the page's column on a desktop, and the whole of it on a phone of 375 pixels."""

MAX_BARS = 14
"""Sources and reasons in a chart; the table behind it has more."""

_LABEL_CHARACTERS = 40
_ROW_PIXELS = 25
_COLUMN_PIXELS = 210
_MEASURED_FONT_PIXELS = 13.5
"""Labels are given room for letters of this size. The style sheet sets them at 12 pixels: the reader's font may be
wider than the one that the library measures with."""

_HERE, _PAPER, _NOW, _BEFORE = "this corpus", "the paper", "now", "before"
_COLOURS: Mapping[str, str] = {
    "thinking": "var(--think)",
    "direct": "var(--direct)",
    "kept": "var(--kept)",
    "dropped": "var(--dropped)",
    "quarantined": "var(--quarantined)",
    "prompt": "var(--plain)",
    "cached prompt": "var(--track-ink)",
    "completion": "var(--kept)",
    _HERE: "var(--kept)",
    _PAPER: "var(--ink)",
    _NOW: "var(--kept)",
    _BEFORE: "var(--ink)",
}
_CONFIG: dict[str, Any] = {
    "aria": False,
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "labelFontSize": _MEASURED_FONT_PIXELS,
        "titleFontSize": _MEASURED_FONT_PIXELS,
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelLimit": 150,
        "labelFlush": False,
    },
    "axisY": {"labelColor": "var(--ink)", "labelPadding": 6, "ticks": False, "domain": False},
}
_TAGS = frozenset(["svg", "g", "path", "rect", "line", "text", "tspan", "circle", "defs", "clipPath"])
_PLACES = ["d", "transform", "x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "r", "width", "height", "viewBox"]
_STROKES = ["stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap"]
_ATTRIBUTES = frozenset([*_PLACES, *_STROKES, "text-anchor", "fill", "fill-opacity", "opacity", "clip-path", "id"])
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_REFERENCE = re.compile(r"url\(#([\w-]+)\)")

Values: TypeAlias = list[dict[str, Any]]
_Drawing: TypeAlias = Any
"""An Altair chart or several layers; its own types are lost where encodings are added."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart. description: what it shows, as a sentence for those who do not see it. svg: both drawings.

    legend: names and colours of its parts where there are several, and whether a part is a mark and no bar.
    """

    name: str
    title: str
    description: str
    svg: Markup
    legend: tuple[tuple[str, str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A chart to be drawn. layers: makes it, anew for each width. parts: what its colours tell apart."""

    title: str
    description: str
    layers: Callable[[], _Drawing]
    parts: Sequence[str] = ()


def draw_charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns the charts of a report's figures by name, those alone that have something to show."""
    plans = {
        "funnel": _funnel(figures),
        "reasons": _reasons(figures),
        "topic_sizes": _topics(figures, "share_of_corpus", "Share of the corpus by topic"),
        "topic_thinking": _topics(figures, "share_think", "Share of thinking rows by topic"),
        **{f"modes_{name}": _modes(name, rows) for name, rows in figures["modes"].items()},
        "audit": _audit(figures["audit"]),
        "samples": _samples(figures["samples_drawn"]),
        "difficulty": _difficulty(figures["difficulty"]),
        "traces": _traces(figures),
        "similarity": _similarity(figures["removed"]["similarities"]),
        "previous_rows": _previous(figures["previous"], "rows", "Rows by topic, before and now"),
        "previous_thinking": _previous(figures["previous"], "share_think", "Share of thinking rows, before and now"),
        **_costs(figures["accounting"]),
    }
    return {name: _drawn(name, plan) for name, plan in plans.items() if plan is not None}


def _funnel(figures: Mapping[str, Any]) -> _Plan | None:
    values = [
        _part(in_words(row["stage"], _LABEL_CHARACTERS).capitalize(), part, row[part])
        for row in figures["funnel"]
        for part in ("kept", "dropped", "quarantined")
    ]
    if not any(value["value"] for value in values):
        return None
    summary = figures["summary"]
    said = f"{whole(summary['dropped'])} of {whole(summary['rows_in'])} rows were dropped, "
    said += f"{whole(summary['quarantined'])} quarantined."
    return _Plan("Rows by stage", said, lambda: _stacked(values, "rows"), _parts_of(values))


def _reasons(figures: Mapping[str, Any]) -> _Plan | None:
    shown = figures["reasons"][:MAX_BARS]
    values = [_part(in_words(row["reason"], _LABEL_CHARACTERS), row["exit"], row["rows"]) for row in shown]
    said = "Most frequent: " + ", ".join(f"{value['label']} {whole(value['value'])}" for value in values[:3]) + "."
    return _Plan("Why rows left", said, lambda: _stacked(values, "rows"), _parts_of(values)) if values else None


def _topics(figures: Mapping[str, Any], measure: str, title: str) -> _Plan | None:
    rows = [row for row in figures["topics"] if row["topic"] != "Total"]
    if not figures["summary"]["rows_out"]:
        return None
    values, marks = [], []
    for row in rows:
        label = _topic(row["topic"])
        values.append(_part(label, _HERE, row[measure] if row["total"] else 0))
        if row[f"paper_{measure}"] is not None:
            marks.append(_part(label, _PAPER, row[f"paper_{measure}"]))
    total = figures["topics"][-1]
    said = "Bars are this corpus, marks the proportions of the paper's Table 1."
    if measure == "share_think":
        said += f" Altogether {percent(total['share_think'])} think here, {percent(total['paper_share_think'])} there."
    return _Plan(title, said, lambda: _bars_and_marks(values, marks, is_share=True), [_HERE, _PAPER])


def _modes(name: str, rows: Sequence[Mapping[str, Any]]) -> _Plan | None:
    shown = rows[:MAX_BARS]
    values = [
        _part(f"{in_words(row['value'], _LABEL_CHARACTERS)}", part, row[key])
        for row in shown
        for part, key in (("thinking", "think"), ("direct", "direct"))
    ]
    title = f"Share of thinking rows by {in_words(name, _LABEL_CHARACTERS)}"
    said = "; ".join(
        f"{in_words(row['value'], _LABEL_CHARACTERS)} {percent(row['share_think'])} of {whole(row['total'])}"
        for row in shown[:6]
    )
    return (
        _Plan(title, f"{said}.", lambda: _stacked(values, "share of rows", is_normalised=True), _parts_of(values))
        if values
        else None
    )


def _audit(audit: Mapping[str, Any]) -> _Plan | None:
    if not audit["by_right"]:
        return None
    values = [
        {**row, "label": str(row["num_right"]), "part": "direct" if row["num_right"] else "thinking"}
        for row in audit["by_right"]
    ]
    said = f"Of {whole(audit['rows'])} audited rows; the lines are 95 % intervals. "
    said += f"Of {percent(values[0]['share'])} no answer was right, of {percent(values[-1]['share'])} every one."

    def layers() -> _Drawing:
        base = alt.Chart(alt.InlineData(values=values)).encode(
            x=alt.X("label:O", sort=None, title="right answers", axis=alt.Axis(labelAngle=0))
        )
        bars = base.mark_bar(cornerRadiusEnd=2).encode(
            y=alt.Y("share:Q", title="share of audited rows", axis=alt.Axis(format="~%", tickCount=5)),
            color=_colour(["thinking", "direct"]),
        )
        spans = base.mark_rule(color="var(--ink)", strokeWidth=1.4).encode(y="low:Q", y2="high:Q")
        return alt.layer(bars, spans).properties(height=_COLUMN_PIXELS)

    return _Plan("How many answers were right in the audit slice", said, layers, ["thinking", "direct"])


def _samples(drawn: Sequence[Mapping[str, Any]]) -> _Plan | None:
    values = [{"label": whole(row["num_sampled"]), "value": row["rows"]} for row in drawn[:MAX_BARS]]
    total = sum(row["rows"] for row in drawn)
    said = f"Of {whole(total)} rows labelled by the performance heuristic."
    return _Plan("Samples drawn per question", said, lambda: _columns(values, "samples")) if values else None


def _difficulty(rows: Sequence[Mapping[str, Any]]) -> _Plan | None:
    values: Values = [
        {"low": i / len(rows), "high": (i + 1) / len(rows), "part": part, "value": row[key]}
        for i, row in enumerate(rows)
        for part, key in (("thinking", "think"), ("direct", "direct"))
    ]
    total = sum(value["value"] for value in values)
    said = f"{whole(total)} rows by the teacher's probability that the question needs reasoning."
    if not total:
        return None
    title, parts = "probability that reasoning is needed", ["thinking", "direct"]
    return _Plan("Difficulty verdicts", said, lambda: _histogram(values, title, parts, [0, 1]), parts)


def _traces(figures: Mapping[str, Any]) -> _Plan | None:
    values = [{"label": row["words"], "value": row["rows"]} for row in figures["traces"]["histogram"]]
    if not figures["summary"]["think"]:
        return None
    said = f"Half of the chains of thought have at most {whole(figures['traces']['median_words'])} words, "
    said += f"nine in ten at most {whole(figures['traces']['p90_words'])}."
    return _Plan("Length of chains of thought", said, lambda: _plain_bars(values, "rows", "var(--think)"))


def _similarity(similarities: Sequence[Mapping[str, Any]]) -> _Plan | None:
    values: Values = []
    for found in similarities:
        num_bins = len(found["histogram"])
        values += [
            {"low": i / num_bins, "high": (i + 1) / num_bins, "part": _reason(found), "value": bar["rows"]}
            for i, bar in enumerate(found["histogram"])
            if bar["rows"]
        ]
    if not values:
        return None
    reasons = sorted({value["part"] for value in values})
    said = f"{whole(sum(value['value'] for value in values))} rows that left for resembling another."
    low = min(value["low"] for value in values)
    span = [round(min(low, 0.7), 2), 1]
    return _Plan(
        "How alike the removed rows are", said, lambda: _histogram(values, "similarity", reasons, span), reasons
    )


def _previous(previous: Mapping[str, Any] | None, measure: str, title: str) -> _Plan | None:
    if previous is None or not previous["topics"]:
        return None
    rows = [row for row in previous["topics"] if row["topic"] != "Total"]
    bars = [_part(_topic(row["topic"]), _NOW, row[measure]["now"] or 0) for row in rows]
    befores = [(row["topic"], row[measure]["before"]) for row in rows]
    marks = [_part(_topic(topic), _BEFORE, before) for topic, before in befores if before is not None]
    said = f"Bars are this version, marks {previous['version']}."
    return _Plan(title, said, lambda: _bars_and_marks(bars, marks, is_share=measure == "share_think"), [_NOW, _BEFORE])


def _costs(accounting: Mapping[str, Any]) -> dict[str, _Plan | None]:
    rows = accounting["costs"]["by_purpose"][:MAX_BARS]
    if not rows:
        return {}
    labels = [in_words(row["purpose"], _LABEL_CHARACTERS) for row in rows]
    tokens: Values = []
    for label, row in zip(labels, rows, strict=True):
        cached = min(row["cached_tokens"], row["prompt_tokens"])
        parts = (row["prompt_tokens"] - cached, cached, row["completion_tokens"])
        tokens += map(_part, [label] * 3, ("prompt", "cached prompt", "completion"), parts)
    said = "Read and written by the teacher."
    plans: dict[str, _Plan | None] = {
        "cost_tokens": _Plan("Tokens by purpose", said, lambda: _stacked(tokens, "tokens"), _parts_of(tokens))
    }
    singles = [("cost_calls", "num_calls", "Calls by purpose", "calls")]
    singles += [("cost_seconds", "seconds", "Time by purpose", "seconds, summed over calls")]
    singles += (
        [("cost_money", "cost", "Cost by purpose", "at the configured prices")] if accounting["has_prices"] else []
    )
    for name, key, title, unit in singles:
        values = [{"label": label, "value": row[key]} for label, row in zip(labels, rows, strict=True)]
        if any(value["value"] for value in values):
            said = "; ".join(f"{value['label']} {_rounded(value['value'])}" for value in values[:6]) + "."
            plans[name] = _Plan(title, said, partial(_plain_bars, values, unit, "var(--plain)"))
    return plans


def _rounded(number: float) -> str:
    return whole(number) if number >= 100 or number == int(number) else f"{number:.3g}"


def _topic(name: str) -> str:
    return TOPIC_NAMES.get(name, in_words(name, _LABEL_CHARACTERS))


def _reason(found: Mapping[str, Any]) -> str:
    return in_words(found["reason"], _LABEL_CHARACTERS)


def _part(label: str, part: str, value: float) -> dict[str, Any]:
    return {"label": label, "part": part, "value": value}


def _colours(parts: Sequence[str]) -> list[str]:
    """Returns the colours of parts; those without one of their own share three, in order."""
    others = ["var(--dropped)", "var(--kept)", "var(--quarantined)"]
    return [_COLOURS.get(part, others[i % len(others)]) for i, part in enumerate(parts)]


def _colour(parts: Sequence[str]) -> alt.Color:
    # The legend stands in the page, where it wraps.
    return alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=_colours(parts)), legend=None)


def _parts_of(values: Values) -> list[str]:
    return list(dict.fromkeys(value["part"] for value in values))


def _counts(title: str, *, is_share: bool = False) -> alt.X:
    axis = alt.Axis(format="~%" if is_share else "~s", tickCount=5, tickMinStep=0.01 if is_share else 1)
    return alt.X("value:Q", title=title, axis=axis)


def _labels() -> alt.Y:
    return alt.Y("label:N", sort=None, title=None)


def _stacked(values: Values, title: str, *, is_normalised: bool = False) -> _Drawing:
    """Returns horizontal bars of several parts each."""
    parts = _parts_of(values)
    numbered = [{**value, "order": parts.index(value["part"])} for value in values]
    count = _counts(title, is_share=is_normalised).stack("normalize" if is_normalised else "zero")
    return (
        alt.Chart(alt.InlineData(values=numbered), height=alt.Step(_ROW_PIXELS))
        .mark_bar()
        .encode(x=count, y=_labels(), color=_colour(parts), order="order:Q")
    )


def _plain_bars(values: Values, title: str, colour: str) -> _Drawing:
    bars = alt.Chart(alt.InlineData(values=values), height=alt.Step(_ROW_PIXELS)).mark_bar(
        color=colour, cornerRadiusEnd=2
    )
    return bars.encode(x=_counts(title), y=_labels())


def _bars_and_marks(bars: Values, marks: Values, *, is_share: bool) -> _Drawing:
    """Returns horizontal bars, each with a mark of what it is compared with."""
    colour = _colour(_parts_of([*bars, *marks]))
    count = _counts("", is_share=is_share).title(None)
    bar = alt.Chart(alt.InlineData(values=bars)).mark_bar(cornerRadiusEnd=2)
    drawn = bar.encode(x=count, y=_labels(), color=colour)
    ticks = alt.Chart(alt.InlineData(values=marks)).mark_tick(thickness=2.5, size=15, opacity=1)
    return alt.layer(drawn, ticks.encode(x=count, y=_labels(), color=colour)).properties(height=alt.Step(_ROW_PIXELS))


def _columns(values: Values, title: str) -> _Drawing:
    bars = alt.Chart(alt.InlineData(values=values), height=_COLUMN_PIXELS).mark_bar(
        color="var(--plain)", cornerRadiusEnd=2
    )
    return bars.encode(x=alt.X("label:O", sort=None, title=title, axis=alt.Axis(labelAngle=0)), y=_heights())


def _histogram(values: Values, title: str, parts: Sequence[str], span: Sequence[float]) -> _Drawing:
    """Returns columns over bins given by their ends, `low` and `high`."""
    axis = alt.Axis(format=".2~f", tickCount=6, grid=False)
    low = alt.X("low:Q", bin="binned", title=title, scale=alt.Scale(domain=list(span)), axis=axis)
    bars = alt.Chart(alt.InlineData(values=values), height=_COLUMN_PIXELS).mark_bar()
    return bars.encode(x=low, x2="high:Q", y=_heights(), color=_colour(parts))


def _heights() -> alt.Y:
    return alt.Y("value:Q", title="rows", stack="zero", axis=alt.Axis(format="~s", tickCount=5, tickMinStep=1))


def _drawn(name: str, plan: _Plan) -> Chart:
    spec = _specification(plan.layers())
    drawings = Markup("\n").join(
        _page_svg(_svg(spec, width), f"{name}-{css_class}", css_class, f"{plan.title}. {plan.description}")
        for css_class, width in (("wide", WIDE_PIXELS), ("narrow", NARROW_PIXELS))
    )
    is_mark = [part in (_PAPER, _BEFORE) for part in plan.parts]
    legend = tuple(zip(plan.parts, _colours(plan.parts), is_mark, strict=True)) if len(plan.parts) > 1 else ()
    return Chart(name, plan.title, plan.description, drawings, legend)


def _specification(chart: _Drawing) -> dict[str, Any]:
    """Returns a chart as Vega-Lite's JSON, all but its width."""
    # Checking it against the whole grammar takes longer than drawing; what is wrong with it fails there.
    spec: dict[str, Any] = chart.to_dict(validate=False)
    is_stepped = isinstance(spec["height"], dict)
    return {**spec, "config": _CONFIG, "autosize": {"type": "fit-x" if is_stepped else "fit", "contains": "padding"}}


def _svg(spec: Mapping[str, Any], width: int) -> str:
    # Without an address from which data may be loaded: nothing is fetched, whatever a specification says.
    svg: str = vl_convert.vegalite_to_svg({**spec, "width": width}, allowed_base_urls=[])
    return svg


def _page_svg(svg: str, prefix: str, css_class: str, label: str) -> Markup:
    """Returns a drawing rebuilt for the page: what is allowed, with ids of its own and short numbers."""
    root = _rebuilt(ElementTree.fromstring(svg), _Names(prefix))  # noqa: S314 - written by our own library
    assert root is not None, "a drawing has a root"
    root.set("class", f"chart {css_class}")
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - escaped by the writer of XML


class _Names:
    """New ids for those of a drawing: the library counts its ids over all drawings of a process."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._known: dict[str, str] = {}

    def new(self, name: str) -> str:
        return self._known.setdefault(name, f"{self._prefix}-{len(self._known)}")


def _rebuilt(element: ElementTree.Element, names: _Names) -> ElementTree.Element | None:
    """Returns an element with its allowed attributes and children, without namespace; None if it shows nothing."""
    tag = element.tag.rpartition("}")[2]
    is_empty = tag == "path" and (not element.get("d") or element.get("display") == "none")
    if tag not in _TAGS or is_empty:
        return None
    rebuilt = ElementTree.Element(tag)
    for name, value in element.attrib.items():
        if name == "id":
            rebuilt.set(name, names.new(value))
        elif name in _ATTRIBUTES:
            local = _REFERENCE.sub(lambda found: f"url(#{names.new(found[1])})", value)
            rebuilt.set(name, local if name == "id" else _LONG_NUMBER.sub(_short, local))
    rebuilt.text = element.text
    rebuilt.extend(child for child in _children(element, names) if child is not None)
    if tag == "g" and len(rebuilt) == 0:
        return None
    return rebuilt


def _children(element: ElementTree.Element, names: _Names) -> Iterable[ElementTree.Element | None]:
    return (_rebuilt(child, names) for child in element)


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
