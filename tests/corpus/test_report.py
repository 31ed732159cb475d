"""The report's figures, its page, and the table for the terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from corpus.excerpts import SHARED_IMAGE_BYTES, ShownFate, ShownReply, ShownRow
from corpus.report import (
    PAPER_TABLE_1,
    ReportInputs,
    VersionBefore,
    build_report,
    percent,
    plain_text,
    report_figures,
    short_number,
    summary_table,
)
from corpus.tally import CorpusTally, ModeCount
from schemas.config import PricesConfig
from schemas.fates import Exit, Fate, StageCount
from schemas.usage import Usage, UsageKey

HOSTILE = (
    "</div></article><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<style>body{display:none}</style><svg/onload=alert(1)>\u202e{{ 7*7 }} &lt;b&gt; \x00\x1b[31m\ud800"
)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def inputs(**changes: Any) -> ReportInputs:
    values: dict[str, Any] = {
        "name": "demo",
        "version": "v0003",
        "created": "2026-01-01T00:00:00Z",
        "recipe": "r" * 64,
        "inputs": "i" * 64,
        "teacher": "T",
        "reasoner": "R",
        "stages": {
            "sources": StageCount(10, 9, quarantined=Counter(image_unreadable=1)),
            "duplicates": StageCount(9, 8, dropped=Counter(near_duplicate=1)),
        },
        "tally": CorpusTally(rows=ModeCount(2, 6), by_topic={"math": ModeCount(2, 2), "ocr": ModeCount(0, 4)}),
    }
    return ReportInputs(**{**values, **changes})


def shown_row(text: str = "What is it?", **changes: Any) -> ShownRow:
    fields = ("id", "topic", "kind", "answer_type", "source", "origin", "licence", "teacher", "reasoner")
    values: dict[str, Any] = dict.fromkeys(fields, text)
    values |= {"mode": "think", "question": text, "choices": (text, text), "reference": text}
    return ShownRow(**{**values, "reasoning": text, "answer": text, "evidence": text, **changes})


def test_the_paper_s_table_adds_up() -> None:
    assert sum(count.direct for count in PAPER_TABLE_1.values()) == 10_871_558
    # The paper prints 5,495,209; its rows add up to one more.
    assert sum(count.think for count in PAPER_TABLE_1.values()) == 5_495_210


def key(purpose: str = "performance", source: str = "charts", model: str = "T") -> UsageKey:
    return UsageKey("performance", purpose, source, model)


def visible(html: str) -> str:
    return " ".join("".join(Page(html).text).split())


def test_the_summary_counts_rows() -> None:
    summary = report_figures(inputs())["summary"]
    assert (summary["rows_in"], summary["rows_out"], summary["dropped"], summary["quarantined"]) == (10, 8, 1, 1)
    assert (summary["share_out"], summary["share_think"]) == (0.8, 0.25)


def test_the_page_shows_the_cost_by_purpose_source_and_model() -> None:
    costs = {
        key("routing", "charts", "T"): Usage(10, 10, 0, 1, 0, 1_000_000, 10, 500, 1.5),
        key("performance", "talks", "R"): Usage(20, 160, prompt_tokens=500_000, completion_tokens=250_000),
    }
    paid = {key(): Usage(3, 24, 136, 2, 1, 60_000, 7_000, wall_seconds=9.0)}
    html, figures = build_report(
        inputs(costs=costs, paid=paid, prices=PricesConfig(prompt=2.0, completion=4.0, cached_prompt=2.0))
    )
    accounting, text = figures["accounting"], visible(html)
    assert (accounting["costs"]["total"]["num_calls"], accounting["costs"]["total"]["num_replies"]) == (30, 170)
    assert accounting["costs"]["total"]["cost"] == pytest.approx(1.5 * 2.0 + 0.25001 * 4.0)
    assert [row["cost"] for row in accounting["costs"]["by_source"]] == pytest.approx([2.00004, 2.0])
    assert "Total30170" in text.replace(" ", "") and "talks" in text
    # The run's own: calls, failed, retries, replies, reused.
    assert "performance performance3 1 2 24 136".replace(" ", "") in text.replace(" ", "")
    assert "4.00at the configured prices; 0.1480 paid by the last run" in text


def test_a_run_that_paid_nothing_says_so() -> None:
    html, _ = build_report(inputs(costs={key(): Usage(1, 1)}, paid={key(): Usage(num_reused=1)}))
    assert "Nothing: every reply that it needed was stored before." in visible(html)
    assert "at the configured prices" not in html


def test_topics_stand_beside_the_paper_s_with_the_unknown_ones_last() -> None:
    tally = CorpusTally(rows=ModeCount(2, 6), by_topic={"(not given)": ModeCount(1, 3), "math": ModeCount(1, 3)})
    topics = report_figures(inputs(tally=tally))["topics"]
    assert [row["topic"] for row in topics[-3:]] == ["text", "(not given)", "Total"]
    math = next(row for row in topics if row["topic"] == "math")
    assert (math["share_of_corpus"], math["share_think"]) == (0.5, 0.25)
    assert math["paper_share_think"] == pytest.approx(1_821_412 / (1_821_412 + 1_908_486))
    assert math["paper_share_of_corpus"] == pytest.approx(0.2279, abs=1e-4)
    assert topics[-2]["paper_share_think"] is None
    assert (topics[-1]["total"], topics[-1]["paper_share_of_corpus"]) == (8, 1.0)


def test_the_pass_rate_is_the_mean_over_rows_with_a_score() -> None:
    audit = {(0, 8): 1, (4, 8): 2, (3, 6): 1, (0, 0): 5}
    figures = report_figures(inputs(audit=audit))["audit"]
    assert figures["rows"] == 9
    assert figures["pass_rate"] == pytest.approx((0 + 0.5 + 0.5 + 0.5) / 4)
    assert [row["num_right"] for row in figures["histogram"]] == [0, 3, 0, 4]
    assert report_figures(inputs())["audit"]["pass_rate"] is None


def test_reasons_are_sorted_by_their_rows() -> None:
    stages = {"a": StageCount(10, 2, Counter(few=1, many=5), Counter(some=2))}
    reasons = report_figures(inputs(stages=stages, tally=CorpusTally(rows=ModeCount(1, 1))))["reasons"]
    assert [(row["reason"], row["exit"], row["rows"]) for row in reasons] == [
        ("many", "dropped", 5),
        ("some", "quarantined", 2),
        ("few", "dropped", 1),
    ]


def test_a_run_that_lost_a_row_has_no_report() -> None:
    with pytest.raises(AssertionError, match="the run lost rows: 10 read and 0 published earlier, 7 in the corpus"):
        build_report(inputs(tally=CorpusTally(rows=ModeCount(1, 6))))
    with pytest.raises(AssertionError, match="stage sources lost rows"):
        build_report(inputs(stages={"sources": StageCount(10, 9)}))


def test_figures_are_plain_json_and_the_page_shows_them(build_version: Any, world: Any, dropped_fate: Any) -> None:
    fate = dropped_fate(1, images=(world.image("red").sha256,))
    built = build_version(world.rows(think=4, direct=2), [fate], is_whole=True)
    assert json.loads(json.dumps(built.figures)) == built.figures
    text = " ".join("".join(Page(built.html).text).split())
    assert "Every row is accounted for: 7 read = 6 in the corpus + 1 dropped + 0 quarantined." in text
    assert "66.7\xa0%" in built.html
    assert "Three and four make seven, says step 0." in text
    assert "Near duplicate" in text
    # One image for each of four thinking rows and the fate, two for each of two direct rows.
    assert built.html.count('<img src="data:image/png;base64,') == 4 + 1 + 4


def test_the_same_inputs_give_the_same_page(build_version: Any, world: Any) -> None:
    rows = world.rows(think=2, direct=2)
    assert build_version(rows, is_whole=True).html == build_version(rows, is_whole=True).html


def test_an_empty_corpus_has_a_report() -> None:
    html, figures = build_report(inputs(stages={}, tally=CorpusTally()))
    assert "The corpus is empty." in html
    assert "0 rows read, 0 in the corpus" in summary_table(figures)
    assert "No call was needed." in html


def test_hostile_text_is_shown_and_never_markup() -> None:
    fate = Fate(HOSTILE, HOSTILE, HOSTILE, HOSTILE, Exit.DROPPED, HOSTILE, HOSTILE, HOSTILE, 0.5, HOSTILE, ("x",))
    html, _ = build_report(
        inputs(
            name=HOSTILE,
            teacher=HOSTILE,
            reasoner=HOSTILE,
            created=HOSTILE,
            stages={HOSTILE: StageCount(9, 8, Counter({HOSTILE: 1}))},
            tally=CorpusTally(
                rows=ModeCount(2, 6), by_topic={HOSTILE: ModeCount(2, 6)}, by_source={HOSTILE: ModeCount(1, 1)}
            ),
            costs={UsageKey(HOSTILE, HOSTILE, HOSTILE, HOSTILE): Usage(1, 1)},
            paid={UsageKey(HOSTILE, HOSTILE, HOSTILE, HOSTILE): Usage(1, 1)},
            rows=(shown_row(HOSTILE), shown_row(HOSTILE, mode=HOSTILE, topic=HOSTILE)),
            fates=(ShownFate(fate, (None,)),),
        )
    )
    page = Page(html)
    html.encode("utf-8")
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.tags.count("style") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert {value[0] for _, name, value in page.attributes if name == "href"} == {"#"}
    assert "{{ 7*7 }}" in "".join(page.text) and "\x1b" not in html


def test_a_page_fetches_nothing(build_version: Any, world: Any) -> None:
    page = Page(build_version(world.rows(think=2, direct=2), is_whole=True).html)
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "data", "poster", "action")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert all(alt for tag, name, alt in page.attributes if tag == "img" and name == "alt")


def test_a_page_of_hostile_rows_alone_stays_under_ten_megabytes() -> None:
    text = '<&">' * 50_000
    picture = "data:image/png;base64," + "A" * (SHARED_IMAGE_BYTES * 4 // 3 // 360)
    replies = [ShownReply("performance", n, text, text, text, text, 9, "wrong", text, text) for n in range(20)]
    rows = tuple(
        shown_row(text, id=f"{n:032x}", choices=(text,) * 30, images=(picture,) * 3, num_images=3) for n in range(120)
    )
    fates = tuple(
        ShownFate(
            Fate(f"{n}", f"{200 + n:032x}", text, text, Exit.DROPPED, text, text, text, 0.5, text, ("x",) * 3),
            (picture,) * 3,
            text,
            (text,) * 30,
            text,
        )
        for n in range(120)
    )
    ids = [row.id for row in rows] + [str(shown.fate.id) for shown in fates]
    html, figures = build_report(inputs(rows=rows, fates=fates, replies=dict.fromkeys(ids, replies)))
    assert len(html.encode()) < 10_000_000
    assert html.count("<article ") == 240 and figures["shown"]["rows"] == {
        "think": 120,
        "direct": 0,
        "dropped": 120,
        "quarantined": 0,
    }
    # What was cut is said, by the limits that hold for this page.
    said = re.search(r"Questions are clipped after (\d+) characters, replies after (\d+)", html)
    assert said is not None and int(said[1]) < 2000 and int(said[2]) < 1500
    assert f"clipped after {said[1]} of 200,000 characters" in html


def test_the_script_is_the_one_that_the_policy_names_and_holds_nothing_of_the_data() -> None:
    html, _ = build_report(inputs(rows=(shown_row(HOSTILE),)))
    plain, _ = build_report(inputs())
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [script] == re.findall(r"<script>(.*?)</script>", plain, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for _, name, value in Page(html).attributes if name == "content" and "default-src" in value)
    assert f"script-src 'sha256-{digest}';" in policy and "unsafe" not in policy


def test_rows_can_be_read_without_the_script() -> None:
    html, _ = build_report(inputs(rows=(shown_row("Is it?", id="a" * 32),)))
    article = html[html.index("<article ") : html.index("</article>")]
    assert " hidden" not in article.replace('class="hidden"', "") and "Is it?" in article
    assert '<div class="filters" role="search" aria-label="Filter the rows" data-needs-script hidden>' in html


def test_a_row_shows_the_replies_with_their_verdicts_and_why() -> None:
    replies = [
        ShownReply("performance", 0, "It is 8.", "", "T", "stop", 5, "wrong", "8", "differs from the reference '7'"),
        ShownReply("performance", 1, "Hm", "", "T", "length", 5, "unscored", None, "not scored: truncated"),
        ShownReply("performance", 2, "7", "", "T", "stop", 5, "correct", "7", is_counted=False),
    ]
    html, _ = build_report(inputs(rows=(shown_row(id="a" * 32),), replies={"a" * 32: replies}))
    text = visible(html)
    assert "3 replies of the teacher: 1 wrong, 1 unscored" in text
    assert "wrong performance 1 read as 8 5 tokens" in text and "differs from the reference '7'" in text
    assert "ended by length" in text and "Not counted: asked under other settings" in text


def test_rows_published_earlier_are_part_of_the_account() -> None:
    html, figures = build_report(inputs(num_marked=3, tally=CorpusTally(rows=ModeCount(5, 6))))
    assert "10 read = 8 of those in the corpus + 1 dropped + 1 quarantined. The corpus holds 3 more" in visible(html)
    assert figures["summary"]["share_out"] == 0.8


def test_the_first_version_is_compared_with_none() -> None:
    html, figures = build_report(inputs())
    assert figures["previous"] is None and 'id="previous"' not in html


def test_the_version_before_stands_beside_this_one() -> None:
    old = report_figures(inputs(tally=CorpusTally(rows=ModeCount(4, 4), by_topic={"math": ModeCount(4, 4)})))
    before = VersionBefore("v0002", "2025", "x" * 64, ModeCount(4, 4), inputs().stages, old)
    html, figures = build_report(inputs(before=before))
    text = visible(html)
    assert "Version v0002 was made 2025 by another recipe" in text
    assert "Thinking rows42−2" in text.replace(" ", "").replace("Thinkingrows", "Thinking rows")
    assert "Share of thinking rows50.0 %25.0 %−25.0 points" in text
    assert [row["topic"] for row in figures["previous"]["topics"]] == ["math", "ocr", "Total"]


def test_the_agreement_of_judges_is_shown_where_it_is_given() -> None:
    entry = {
        "name": "judge and person",
        "what": "difficulty",
        "num_rows": 80,
        "kappa": 0.71,
        "low": 0.55,
        "high": 0.87,
        "agreement": 0.9,
        "confusion": [{"judge": "yes", "person": "no", "rows": 5}],
        "note": HOSTILE,
    }
    html, _ = build_report(inputs(agreement={"entries": [entry, {"name": "no rows"}]}))
    text = visible(html)
    assert "judge and persondifficulty800.710.55 to 0.8790.0 %" in text and "no rows0–––" in text
    assert Page(html).tags.count("script") == 1
    assert 'id="agreement"' not in build_report(inputs())[0]


def test_what_is_missing_is_said_first() -> None:
    html, _ = build_report(inputs(missing=["The replies: <b>gone</b>"]))
    assert "Not in this report The replies: <b>gone</b>" in visible(html)


def test_audited_rows_have_intervals() -> None:
    figures = report_figures(inputs(audit={(0, 8): 1, (8, 8): 3, (0, 0): 2}))["audit"]
    assert [bar["rows"] for bar in figures["by_right"]] == [1, 0, 0, 0, 0, 0, 0, 0, 3]
    first = figures["by_right"][0]
    # Wilson's interval of 1 in 4, from its formula by hand.
    assert (first["share"], first["low"], first["high"]) == pytest.approx((0.25, 0.04559, 0.69936), abs=1e-5)
    assert figures["by_right"][1]["low"] == 0.0
    # The mean of 0, 1, 1, 1 with its standard error of 0.25.
    assert figures["pass_rate_low"] == pytest.approx(0.75 - 1.96 * 0.25, abs=1e-4)
    assert figures["pass_rate_high"] == 1.0


def test_huge_texts_are_clipped_and_say_so() -> None:
    html, _ = build_report(inputs(rows=tuple(shown_row("<&>" * 3_500_000) for _ in range(20))))
    assert len(html.encode()) < 10_000_000
    assert "clipped after 2,000 of 10,500,000 characters" in html
    assert "clipped after 6,000 of 10,500,000 characters" in html


def test_many_sources_and_options_are_cut_with_a_word() -> None:
    by_source = {f"s{n}": ModeCount(1, 1) for n in range(100)}
    html, figures = build_report(
        inputs(
            tally=CorpusTally(rows=ModeCount(2, 6), by_source=by_source),
            rows=(shown_row(choices=tuple(map(str, range(40)))),),
        )
    )
    assert "60 more in report.json" in html and "14 more options" in html
    assert len(figures["modes"]["source"]) == 100


def test_the_terminal_table_lines_up() -> None:
    costs = {key("routing"): Usage(34, 34, completion_tokens=34), key(): Usage(1200, 9600, 0, 3, 0, 700_000, 9)}
    assert summary_table(report_figures(inputs(costs=costs))) == TABLE
    with_prices = summary_table(report_figures(inputs(costs=costs, prices=PricesConfig(prompt=2.0))))
    assert [line.split()[-1] for line in with_prices.splitlines()[-3:]] == ["0.00", "1.40", "1.40"]


def test_a_report_of_an_earlier_version_has_a_table_too() -> None:
    figures = report_figures(inputs())
    del figures["accounting"]
    assert "Text-only" in summary_table(figures)


TABLE = """\
demo v0003: 10 rows read, 8 in the corpus, 25.0 % of them thinking

stage       in  kept  dropped  quarantined
------------------------------------------
sources     10     9        0            1
duplicates   9     8        1            0

topic         direct  think  total  thinking   paper
----------------------------------------------------
General            0      0      0         -  50.3 %
Math and K12       2      2      4    50.0 %  48.8 %
Code               0      0      0         -  20.0 %
Chart              0      0      0         -  44.6 %
OCR                4      0      4       0 %  14.1 %
Grounding          0      0      0         -  34.6 %
Caption            0      0      0         -  10.3 %
Knowledge          0      0      0         -  27.9 %
Text-only          0      0      0         -   9.2 %
Total              6      2      8    25.0 %  33.6 %

replies to   calls  replies  retries  prompt tokens  cached  completion tokens
------------------------------------------------------------------------------
routing         34       34        0              0       0                 34
performance  1,200    9,600        3        700,000       0                  9
all          1,234    9,634        3        700,000       0                 43"""


def test_the_terminal_table_carries_no_control_characters() -> None:
    stages = {"\x1b[2Jgone\n": StageCount(8, 8)}
    table = summary_table(report_figures(inputs(name="\x1b]0;title\x07", stages=stages)))
    assert "\x1b" not in table and "\x07" not in table


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (1, "100 %"), (0.25, "25.0 %"), (0.0001, "< 0.1 %"), (0.99999, "> 99.9 %"), (1 / 3, "33.3 %")],
)
def test_shares_are_percentages_and_never_rounded_to_none_or_all(share: float, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (9999, "9,999"), (12_345, "12.3 K"), (999_400, "999 K"), (1_234_567, "1.23 M"), (7.89e9, "7.89 G")],
)
def test_large_numbers_have_three_digits(number: float, shown: str) -> None:
    assert short_number(number) == shown


def test_plain_text_keeps_line_breaks_and_replaces_what_cannot_be_shown() -> None:
    assert plain_text("a\r\nb\tc\x00\ud83d", 10).text == "a\nb\tc\ufffd\ufffd"
    clipped = plain_text("abcdef", 4)
    assert (clipped.text, clipped.note) == ("abcd…", "clipped after 4 of 6 characters")


def test_the_templates_ship_with_the_package() -> None:
    folder = Path(build_report.__code__.co_filename).parent
    assert {path.name for path in folder.glob("report*.jinja")} == {
        f"report.{kind}.jinja" for kind in ("html", "css", "js")
    }
