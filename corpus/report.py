"""The report of a curation: one HTML page for a person, the same figures as JSON, and a table for the terminal.

The page is one file that fetches nothing: charts are drawn when it is made, images and style stand inside, and its only
script, which filters the rows that the page holds anyway, is named by its digest in the content security policy.
Everything that came from data is escaped by the template engine, clipped at a stated length, and kept in its own
bidirectional context; nothing of it ever enters the script. A page that would exceed `MAX_PAGE_BYTES` is clipped more.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from corpus.accounting import gpu_time, money
from corpus.browser import FACETS, GROUPS, BrowserRow, browser_rows, facet_name, facet_values
from corpus.excerpts import MAX_IMAGES, ShownReply
from corpus.figures import report_figures
from corpus.report_inputs import PAPER_TABLE_1, TOPIC_NAMES, BenchmarkLeaks, LeakedPair, ReportInputs, VersionBefore
from corpus.shown_text import Clipped, in_words, percent, plain_text, points, short_number, signed, whole
from corpus.thumbnails import IMAGE_SIDE_PIXELS
from schemas.question import OPTION_LETTERS

__all__ = [
    "PAPER_TABLE_1",
    "TOPIC_NAMES",
    "BenchmarkLeaks",
    "Clipped",
    "LeakedPair",
    "ReportInputs",
    "VersionBefore",
    "build_report",
    "percent",
    "plain_text",
    "report_figures",
    "short_number",
    "summary_table",
    "whole",
]

MAX_PAGE_BYTES = 9_900_000
MAX_PAIRS = 20
"""Pairs of row and benchmark question listed on the page for each benchmark; `report.json` has more."""

MAX_GROUPS = 40
"""Sources or reasons listed on the page; `report.json` has them all."""

_FOLDER = Path(__file__).parent
_OUTCOMES = ("correct", "wrong", "unscored")


@dataclass(frozen=True, slots=True)
class Limits:
    """Where texts of the page are clipped, in characters, and how many replies and options of a row are shown.

    label: names of sources, reasons, ids and the like. num_replies: twice the paper's eight samples.
    """

    question: int = 2_000
    text: int = 6_000
    reply: int = 1_500
    label: int = 160
    num_replies: int = 16
    num_choices: int = 26

    def tighter(self) -> Limits:
        return Limits(
            self.question // 2,
            self.text // 2,
            self.reply // 2,
            max(24, self.label // 2),
            max(2, self.num_replies - 2),
            max(4, self.num_choices - 4),
        )


def build_report(inputs: ReportInputs) -> tuple[str, dict[str, Any]]:
    """Returns the page and its figures (plain JSON-able values); every number of the page is in the figures.

    Raises AssertionError: when a stage or the whole run lost a row, which is a bug of ours.
    """
    rows, figures = browser_rows(inputs), report_figures(inputs)
    shown = {group: sum(row.group == group for row in rows) for group in GROUPS}
    figures = {**figures, "shown": {"rows": shown, "pairs": len(inputs.pairs)}}
    template, values = _template(), _page_values(inputs, figures, rows)
    limits = Limits()
    page = template.render(limits=limits, **values)
    while len(page.encode("utf-8", "replace")) > MAX_PAGE_BYTES and limits.question > 1:
        limits = limits.tighter()
        page = template.render(limits=limits, **values)
    return page, figures


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "whole": whole,
        "money": money,
        "gpu_time": gpu_time,
        "signed": signed,
        "points": lambda difference: _unbroken(points(difference)),
        "short": lambda number: _unbroken(short_number(number)),
        "percent": lambda share: _unbroken(percent(share)),
        "words": in_words,
        "clip": plain_text,
        "label": lambda text, limit: plain_text(text, limit).text,
        "letter": lambda index: OPTION_LETTERS[index] if index < len(OPTION_LETTERS) else str(index + 1),
        "outcomes": _outcomes,
        "row_counts": lambda rows, key: [(row[key], row["rows"]) for row in rows[:MAX_GROUPS]],
    }
    return environment.get_template("report.html.jinja")


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _page_values(inputs: ReportInputs, figures: Mapping[str, Any], rows: Sequence[BrowserRow]) -> dict[str, Any]:
    """Returns all that the template needs but the limits."""
    from corpus.charts import draw_charts  # noqa: PLC0415 - takes a second, and the terminal needs no charts

    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("report.css.jinja", "report.js.jinja"))
    return {
        "figures": figures,
        "charts": draw_charts(figures),
        "rows": rows,
        "pairs": inputs.pairs,
        "leaked_rows": inputs.leaked_questions,
        "facets": [(name, FACETS[name], values) for name, values in facet_values(rows).items()],
        "facet_name": facet_name,
        "groups": GROUPS,
        "style": style,
        "style_digest": _digest(style),
        "script": script,
        "script_digest": _digest(script),
        "topic_names": TOPIC_NAMES,
        "max_groups": MAX_GROUPS,
        "max_pairs": MAX_PAIRS,
        "max_images": MAX_IMAGES,
        "image_side": IMAGE_SIDE_PIXELS,
    }


def _digest(text: str) -> str:
    """Returns the digest by which a content security policy knows a style sheet or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _outcomes(replies: Sequence[ShownReply]) -> str:
    """Returns how many replies there are, and what came of those that were compared with a reference."""
    counts = Counter(reply.outcome for reply in replies if reply.is_counted)
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    number = f"{len(replies)} {'reply' if len(replies) == 1 else 'replies'} of the teacher"
    return f"{number}: {listed}" if listed else number


def summary_table(figures: Mapping[str, Any]) -> str:
    """Returns the funnel, the table by topic and mode, and what the replies cost as plain text for a terminal."""
    summary = figures["summary"]
    stages = [
        [row["stage"], *(whole(row[key]) for key in ("in", "kept", "dropped", "quarantined"))]
        for row in figures["funnel"]
    ]
    topics = [
        [
            TOPIC_NAMES.get(row["topic"], row["topic"]),
            *(whole(row[key]) for key in ("direct", "think", "total")),
            percent(row["share_think"]) if row["total"] else "-",
            "-" if row["paper_share_think"] is None else percent(row["paper_share_think"]),
        ]
        for row in figures["topics"]
    ]
    title = (
        f"{figures['name']} {figures['version']}: {whole(summary['rows_in'])} rows read, "
        f"{whole(summary['rows_out'])} in the corpus, {percent(summary['share_think'])} of them thinking"
    )
    tables = [
        _text_table(["stage", "in", "kept", "dropped", "quarantined"], stages),
        _text_table(["topic", "direct", "think", "total", "thinking", "paper"], topics),
    ]
    # The report of a version that an earlier program made has no accounting.
    accounting = figures.get("accounting")
    if accounting is not None and accounting["costs"]["total"]["num_replies"]:
        tables.append(_cost_table(accounting))
    return "\n\n".join([plain_text(title, 400).text, *tables])


def _cost_table(accounting: Mapping[str, Any]) -> str:
    """Returns what the replies cost by purpose, with a total, as plain text."""
    columns = {
        "calls": "num_calls",
        "replies": "num_replies",
        "retries": "num_retries",
        "prompt tokens": "prompt_tokens",
        "cached": "cached_tokens",
        "completion tokens": "completion_tokens",
    }
    costs = accounting["costs"]
    named = [*((row["purpose"], row) for row in costs["by_purpose"]), ("all", costs["total"])]
    rows = [[name, *(whole(row[key]) for key in columns.values())] for name, row in named]
    names = ["replies to", *columns]
    if accounting["has_prices"]:
        names.append("cost")
        rows = [[*cells, money(row)] for cells, (_, row) in zip(rows, named, strict=True)]
    return _text_table(names, rows)


def _text_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with the first column to the left and the others to the right."""
    cells = [list(names), *([plain_text(cell.replace("\n", " "), 40).text for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])
