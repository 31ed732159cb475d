"""The drawings of a report."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest

from corpus.charts import MAX_BARS, Chart, draw_charts
from corpus.figures import report_figures
from corpus.report_inputs import ReportInputs, VersionBefore
from corpus.tally import CorpusTally, FatesTally, ModeCount, SimilarityCount, TraceLengths
from schemas.config import PricesConfig
from schemas.fates import StageCount
from schemas.usage import Usage, UsageKey

HOSTILE = "</text></svg><script>document.title='owned'</script>\u202e\x00\x1b\ud800\"'><a href='javascript:alert(1)'>"
COLOURS = {"think", "direct", "kept", "dropped", "quarantined", "plain", "track-ink", "ink", "soft", "line"}


def figures(name: str = "charts", **changes: Any) -> dict[str, Any]:
    usage = {UsageKey("performance", name, name, "T"): Usage(5, 40, 0, 0, 0, 4000, 900, 500, 12.0)}
    values: dict[str, Any] = {
        "stages": {
            "sources": StageCount(20, 19, quarantined=Counter({name: 1})),
            "duplicates": StageCount(19, 8, dropped=Counter({"near_duplicate": 11})),
        },
        "tally": CorpusTally(
            rows=ModeCount(2, 6),
            by_topic={"math": ModeCount(2, 2), name: ModeCount(0, 4)},
            by_source={name: ModeCount(2, 6)},
            by_kind={"objective": ModeCount(2, 6)},
            by_answer_type={"count": ModeCount(2, 6)},
            by_heuristic={"performance": ModeCount(2, 6)},
            audit={(0, 8): 1, (8, 8): 3},
            samples_drawn={1: 4, 8: 2},
            probabilities=(*[ModeCount(0, 1)] * 5, *[ModeCount(2, 0)] * 5),
            traces=TraceLengths((0, 2, 0, 0, 0, 0, 0, 0), 30, 40, 44),
        ),
        "fates_tally": FatesTally({}, (SimilarityCount("duplicates", name, 11, 3, (*[0] * 16, 2, 3, 0, 6)),)),
        "costs": usage,
        "prices": PricesConfig(prompt=1.0),
        "before": VersionBefore(
            "v0001",
            "2026",
            "other",
            ModeCount(1, 3),
            {},
            {"topics": [{"topic": "math", "total": 4, "share_think": 0.5}]},
        ),
    }
    identity = dict.fromkeys(("name", "version", "created", "recipe", "inputs", "teacher", "reasoner"), "x")
    return report_figures(ReportInputs(**{**identity, **values, **changes}))


def nothing_but(**counts: Any) -> dict[str, Chart]:
    tally = CorpusTally(rows=ModeCount(2, 6), **counts)
    return draw_charts(figures(tally=tally, fates_tally=FatesTally(), costs={}, before=None))


@pytest.fixture(scope="module")
def charts() -> dict[str, Chart]:
    return draw_charts(figures())


def drawings(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f"<both>{svg}</both>"))


def test_every_figure_of_a_full_report_has_its_chart(charts: dict[str, Chart]) -> None:
    assert set(charts) == {
        *("funnel", "reasons", "topic_sizes", "topic_thinking", "audit", "samples", "difficulty", "traces"),
        *("modes_source", "modes_kind", "modes_answer_type", "modes_heuristic", "similarity"),
        *("previous_rows", "previous_thinking", "cost_tokens", "cost_calls", "cost_seconds", "cost_money"),
    }


def test_what_has_nothing_to_show_is_not_drawn() -> None:
    empty = figures(stages={}, tally=CorpusTally(), fates_tally=FatesTally(), costs={}, before=None)
    assert draw_charts(empty) == {}


def test_a_chart_is_drawn_for_a_desktop_and_a_phone_and_says_what_it_shows(charts: dict[str, Chart]) -> None:
    wide, narrow = drawings(charts["audit"].svg)
    assert (wide.get("class"), narrow.get("class")) == ("chart wide", "chart narrow")
    assert 470 < float(str(wide.get("width"))) <= 490
    assert 300 < float(str(narrow.get("width"))) <= 320
    for drawing in (wide, narrow):
        assert drawing.get("role") == "img"
        assert "Of 25.0 % no answer was right, of 75.0 % every one." in str(drawing.get("aria-label"))


def test_colours_are_variables_of_the_style_sheet(charts: dict[str, Chart]) -> None:
    for chart in charts.values():
        used = set(re.findall(r'(?:fill|stroke)="([^"]+)"', chart.svg)) - {"none", "transparent"}
        assert used <= {f"var(--{name})" for name in COLOURS}, (chart.name, used)


def test_labels_from_data_are_text_and_bring_no_element_or_attribute() -> None:
    for chart in draw_charts(figures(HOSTILE)).values():
        for drawing in drawings(chart.svg):
            tags = {element.tag for element in drawing.iter()}
            assert tags <= {"svg", "g", "path", "rect", "line", "text", "tspan", "defs", "clipPath"}
            names = {name for element in drawing.iter() for name in element.attrib}
            assert not {name for name in names if name.startswith("on") or name in ("style", "href", "font-family")}


def test_ids_differ_between_the_drawings_of_a_page_and_are_the_same_every_time(
    charts: dict[str, Chart],
) -> None:
    assert draw_charts(figures()) == charts
    page = "".join(chart.svg for chart in charts.values())
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_bars_are_as_long_as_their_numbers() -> None:
    drawn = nothing_but(samples_drawn={1: 30, 2: 60, 3: 120})["samples"]
    bars = re.findall(r' d="M2,0L[\d.]+,0C[\d.,]+L[\d.]+,([\d.]+)C', drawn.svg)
    low, middle, high = (float(height) for height in bars[:3])
    assert (middle / low, high / low) == (pytest.approx(2, rel=0.01), pytest.approx(4, rel=0.01))


def test_a_chart_of_many_bars_shows_the_first() -> None:
    sources = {f"s{n:03}": ModeCount(1, 1) for n in range(100)}
    chart = nothing_but(by_source=sources)["modes_source"]
    labels = [text.text for text in drawings(chart.svg)[0].iter("text") if str(text.text).startswith("s0")]
    assert labels == [f"s{n:03}" for n in range(MAX_BARS)]


@pytest.mark.parametrize("name", ["topic_sizes", "previous_rows"])
def test_what_is_compared_with_has_a_mark_in_the_legend(charts: dict[str, Chart], name: str) -> None:
    assert [is_mark for _, _, is_mark in charts[name].legend] == [False, True]
