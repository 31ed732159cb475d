"""The report of a curation: one HTML page for a person, the same figures as JSON, and a table for the terminal.

The page is one file without scripts, fonts or anything fetched. Everything that came from data is escaped by the
template engine, clipped at a stated length, and kept in its own bidirectional context; on top of that the page's
content security policy allows nothing but its own style sheet and inline images.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corpus.accounting import accounting_figures, gpu_time, money
from corpus.excerpts import ShownFate, ShownRow
from corpus.tally import PROBABILITY_EDGES, TRACE_EDGES, CorpusTally, ModeCount, bin_labels
from schemas.config import PricesConfig
from schemas.fates import StageCount
from schemas.question import OPTION_LETTERS
from schemas.samples import Topic
from schemas.usage import Ledger

PAPER_TABLE_1: Mapping[Topic, ModeCount] = {
    Topic.GENERAL: ModeCount(think=1_365_693, direct=1_351_060),
    Topic.MATH: ModeCount(think=1_821_412, direct=1_908_486),
    Topic.CODE: ModeCount(think=161_085, direct=643_323),
    Topic.CHART: ModeCount(think=1_088_858, direct=1_351_060),
    Topic.OCR: ModeCount(think=225_146, direct=1_366_849),
    Topic.GROUNDING: ModeCount(think=148_710, direct=280_740),
    Topic.CAPTION: ModeCount(think=133_741, direct=1_166_676),
    Topic.KNOWLEDGE: ModeCount(think=359_778, direct=928_190),
    Topic.TEXT: ModeCount(think=190_787, direct=1_875_174),
}
"""Rows by topic and mode of the R-4B corpus: arXiv 2508.21113v2, Table 1 (reasoning, non-reasoning)."""

TOPIC_NAMES: Mapping[str, str] = {
    Topic.GENERAL: "General",
    Topic.MATH: "Math and K12",
    Topic.CODE: "Code",
    Topic.CHART: "Chart",
    Topic.OCR: "OCR",
    Topic.GROUNDING: "Grounding",
    Topic.CAPTION: "Caption",
    Topic.KNOWLEDGE: "Knowledge",
    Topic.TEXT: "Text-only",
}

QUESTION_CHARACTERS = 2_000
TEXT_CHARACTERS = 6_000
LABEL_CHARACTERS = 160
MAX_PAIRS = 20
"""Pairs of row and benchmark question listed on the page for each benchmark; `report.json` has more."""

MAX_GROUPS = 40
"""Sources or reasons listed on the page; `report.json` has them all."""

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class LeakedPair:
    """A row that leaks a benchmark question.

    origin: of the row. question: id in the benchmark. how: ngram, exact or image. share: of the question's words, those
    in shared n-grams. excerpt: the longest run of them.
    """

    origin: str
    question: str
    how: str
    share: float
    excerpt: str


@dataclass(frozen=True, slots=True)
class BenchmarkLeaks:
    """How far a benchmark leaked into the rows read.

    num_leaked_questions: questions of it that some row leaks. num_rows: rows that leak it; a row that leaks two
    benchmarks counts in both. pairs: the worst of them.
    """

    name: str
    num_questions: int
    num_leaked_questions: int
    num_rows: int
    pairs: Sequence[LeakedPair]


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything a report is made of.

    created: ISO 8601 time. recipe, inputs: digests. stages: the count of each stage, in order; the first one's rows in
    are the rows read. tally: of the shards (`tally_corpus`). benchmarks: how far each leaked into the rows read,
    if any were given. costs: of every stored reply that the rows asked for, whoever paid. paid: by the run that makes
    this report. rows, fates: those shown (`pick_rows`, `pick_fates`).
    audit: rows by (num_right, num_scored) of the whole audit slice, if the caller kept it; by default those of the
    corpus, which miss the rows dropped after labelling. num_marked: published rows that this run did not have.
    """

    name: str
    version: str
    created: str
    recipe: str
    inputs: str
    teacher: str
    reasoner: str
    stages: Mapping[str, StageCount]
    tally: CorpusTally
    costs: Ledger = field(default_factory=dict)
    paid: Ledger = field(default_factory=dict)
    benchmarks: Sequence[BenchmarkLeaks] = ()
    prices: PricesConfig = field(default_factory=PricesConfig)
    rows: Sequence[ShownRow] = ()
    fates: Sequence[ShownFate] = ()
    audit: Mapping[tuple[int, int], int] | None = None
    num_marked: int = 0


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text fit for the page. note: "" or what was cut."""

    text: str
    note: str = ""


def build_report(inputs: ReportInputs) -> tuple[str, dict[str, Any]]:
    """Returns the page and its figures (plain JSON-able values); every number of the page is in the figures.

    Raises AssertionError: when a stage or the whole run lost a row, which is a bug of ours.
    """
    figures = report_figures(inputs)
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "whole": whole,
        "money": money,
        "gpu_time": gpu_time,
        "short": lambda number: short_number(number).replace(" ", "\u00a0"),
        "percent": lambda share: percent(share).replace(" ", "\u00a0"),
        "words": lambda name: plain_text(name.replace("_", " "), LABEL_CHARACTERS).text,
        "label": lambda text: plain_text(text, LABEL_CHARACTERS).text,
        "question": lambda text: plain_text(text, QUESTION_CHARACTERS),
        "prose": lambda text: plain_text(text, TEXT_CHARACTERS),
        "letter": lambda index: OPTION_LETTERS[index] if index < len(OPTION_LETTERS) else str(index + 1),
    }
    style = (folder / "report.css.jinja").read_text(encoding="utf-8")
    style_digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    page = environment.get_template("report.html.jinja").render(
        figures=figures,
        rows=inputs.rows,
        fates=inputs.fates,
        style=style,
        style_digest=style_digest,
        topic_names=TOPIC_NAMES,
        max_groups=MAX_GROUPS,
        max_pairs=MAX_PAIRS,
        limits={"question": QUESTION_CHARACTERS, "text": TEXT_CHARACTERS},
    )
    return page, figures


def report_figures(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the figures of a report as plain JSON-able values. Raises AssertionError as `build_report` does."""
    _check_conservation(inputs)
    tally = inputs.tally
    return {
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
        "traces": {
            "median_words": tally.traces.median,
            "p90_words": tally.traces.p90,
            "longest_words": tally.traces.longest,
            "histogram": [
                {"words": label, "rows": rows}
                for label, rows in zip(bin_labels(TRACE_EDGES, is_last_open=True), tally.traces.bins, strict=True)
            ],
        },
        "accounting": accounting_figures(inputs.costs, inputs.paid, inputs.prices),
        "benchmarks": [asdict(benchmark) for benchmark in inputs.benchmarks],
    }


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


def plain_text(text: str, limit: int) -> Clipped:
    """Returns a text with at most `limit` characters, without control characters and lone surrogates."""
    clipped = _CONTROL_CHARACTERS.sub("\ufffd", text[:limit].replace("\r\n", "\n"))
    if len(text) <= limit:
        return Clipped(clipped)
    return Clipped(clipped + "…", f"clipped after {limit:,} of {len(text):,} characters")


def whole(number: float) -> str:
    """Returns 1,234."""
    return f"{number:,.0f}"


def short_number(number: float) -> str:
    """Returns 987, 12.3 K, 4.56 M or 7.89 G: three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if number >= size:
            scaled = number / (1e3 if unit == "K" else size)
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {unit}"
    return whole(number)


def percent(share: float) -> str:
    """Returns a share in [0, 1] as 12.3 %; a share that is neither 0 nor 1 is never shown as if it were."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


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
        "share_out": rows.total / num_in if num_in else 0.0,
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
    """Returns the audit slice's histogram and its mean pass rate, num_right / num_scored over rows with a score."""
    scored = {key: rows for key, rows in audit.items() if key[1] > 0}
    num_rows = sum(scored.values())
    rates = sum(rows * right / num_scored for (right, num_scored), rows in scored.items())
    return {
        "rows": sum(audit.values()),
        "pass_rate": rates / num_rows if num_rows else None,
        "histogram": [
            {"num_right": right, "num_scored": num_scored, "rows": rows}
            for (right, num_scored), rows in sorted(audit.items(), key=lambda item: (item[0][1], item[0][0]))
        ],
    }


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
