"""What the UI says of a run: figures in order, and texts from data that stay texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from corpus.versions import VersionChange
from flows.artifact_texts import (
    FILES_URL,
    MAX_REASONS,
    Example,
    Places,
    artifact_key,
    cell,
    change_line,
    code_block,
    code_span,
    cost_rows,
    dropped_rows,
    funnel_rows,
    markdown_table,
    quarantine_text,
    version_text,
)
from schemas.config import PricesConfig, parse_config
from schemas.errors import ConfigError
from schemas.fates import StageCount
from schemas.usage import Usage, UsageKey

HOSTILE = [
    "![x](http://evil.example/a.png)",
    "<img src=http://evil.example/a.png>",
    "[click](http://evil.example)",
    "https://evil.example/x www.evil.example me@evil.example",
    "`![x](http://evil.example/a.png)`",
    "a ``` b\n\n![x](http://evil.example/a.png)",
    "| a | b |\n|---|---|\n| ![x](http://evil.example/a.png) |",
    "<!-- --> <script>alert(1)</script>",
    "\u202egnp.a/elpmaxe.live//:ptth",
    "``",
    "\\`![x](http://evil.example/a.png)\\`",
]
COUNTS = {
    "sources": StageCount(1000, 990, Counter(), Counter(image_missing=7, question_empty=3)),
    "duplicates": StageCount(990, 900, Counter(duplicate_near=30, duplicate_exact=60), Counter()),
}
CONFIG = parse_config({"sources": [{"name": "a", "format": "jsonl", "path": "a.jsonl"}]})


def rendered(markdown: str) -> list[Any]:
    """Returns all tokens, nested ones too, of Markdown with tables and raw HTML."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    return [token for outer in tokens for token in (outer, *(outer.children or []))]


def kinds(markdown: str) -> set[str]:
    return {token.type for token in rendered(markdown)}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_renders_as_code_and_nothing_else(text: str) -> None:
    in_table = markdown_table(["a", "b"], [[code_span(text), cell(text)]])
    for markdown in (f"before {code_span(text)} after", in_table, code_block(text), cell(text)):
        assert not kinds(markdown) & {"image", "link_open", "html_inline", "html_block"}, markdown
    assert [token.type for token in rendered(code_span(text))] == [
        "paragraph_open",
        "inline",
        "code_inline",
        "paragraph_close",
    ]


@given(st.text())
def test_any_text_is_one_piece_of_code_in_a_line_and_one_cell_in_a_table(text: str) -> None:
    inner = [token for token in rendered(f"x {code_span(text)} y") if token.level == 0 and not token.children]
    pieces = [(token.type, token.content) for token in inner if not token.type.startswith("paragraph")]
    if code_span(text) == "(empty)":
        assert pieces == [("text", "x (empty) y")]
    else:
        assert [pieces[0], pieces[2]] == [("text", "x "), ("text", " y")]
        assert pieces[1][0] == "code_inline" and len(pieces) == 3
    table = rendered(markdown_table(["a"], [[code_span(text)]]))
    assert sum(token.type == "td_open" for token in table) == 1
    assert not {token.type for token in table} & {"image", "link_open", "html_inline"}


@given(st.text())
def test_any_text_in_a_block_of_code_stays_in_it(text: str) -> None:
    types = kinds(code_block(text.replace("\r", "")))
    assert types == {"fence"}


def test_harmless_words_stay_as_they_are_in_a_table() -> None:
    assert [cell(word) for word in ("image_missing", "near 5 %", "a-b (c)")] == ["image_missing", "near 5 %", "a-b (c)"]


def test_a_long_text_is_cut_and_marks_that_turn_its_direction_go() -> None:
    assert code_span("a" * 500) == f"`{'a' * 200}…`"
    assert code_span("a\u202eb\x1b[31m\u2066c") == "`ab�[31mc`"


@pytest.mark.parametrize(
    ("name", "key"),
    [("sampleworld", "sampleworld-funnel"), ("Charts.V2_a", "charts-v2-a-funnel"), ("äöü", "corpus-funnel")],
)
def test_keys_are_made_of_what_prefect_allows(name: str, key: str) -> None:
    assert artifact_key(name, "funnel") == key


def test_the_funnel_counts_every_stage_and_what_is_left_of_all() -> None:
    assert funnel_rows(COUNTS, {"sources": "read the sources"}) == [
        {
            "stage": "read the sources",
            "rows in": "1,000",
            "kept": "990",
            "dropped": "0",
            "quarantined": "10",
            "left of all": "99.0 %",
        },
        {
            "stage": "duplicates",
            "rows in": "990",
            "kept": "900",
            "dropped": "90",
            "quarantined": "0",
            "left of all": "90.0 %",
        },
    ]
    assert funnel_rows({"sources": StageCount()}, {})[0]["left of all"] == "-"


def test_reasons_come_by_stage_the_most_frequent_first() -> None:
    assert [(row["reason"], row["rows"], row["of all read"]) for row in dropped_rows(COUNTS, {})] == [
        ("duplicate_exact", "60", "6.0 %"),
        ("duplicate_near", "30", "3.0 %"),
    ]


def test_tables_of_reasons_have_an_end() -> None:
    many = {"sources": StageCount(1000, 0, Counter({f"r{n}": 10 for n in range(100)}), Counter())}
    assert len(dropped_rows(many, {})) == MAX_REASONS
    quarantined = {"sources": StageCount(1000, 0, Counter(), Counter({f"r{n}": 10 for n in range(100)}))}
    text = quarantine_text(quarantined, {}, CONFIG, Places(Path("/home")))
    assert sum(token.type == "tr_open" for token in rendered(text)) == MAX_REASONS + 1


def test_the_quarantine_names_an_example_of_each_reason_and_its_file() -> None:
    file = Path("/home/work/stages/sources/a-00000.fates.parquet")
    example = Example("a:a.jsonl#3", "the image 'x.png' cannot be read", file)
    text = quarantine_text(COUNTS, {("sources", "image_missing"): example}, CONFIG, Places(Path("/home")))
    assert text.startswith("10 of 1,000 rows (1.0 %) could not be used; a run stops above `max_quarantine_share`")
    assert "| sources | image_missing | 7 | `a:a.jsonl#3`: `the image 'x.png' cannot be read` |" in text
    assert "| sources | question_empty | 3 |  |" in text
    assert f"- `{file}`" in text
    assert "stops.**" not in text
    strict = CONFIG.model_copy(update={"max_quarantine_share": 0.001})
    assert "**More than the 0.1 % allowed: the run stops.**" in quarantine_text(COUNTS, {}, strict, Places(Path("/")))


def test_costs_come_by_purpose_with_their_sum_and_a_price_where_there_is_one() -> None:
    ledger = {
        UsageKey("difficulty", "difficulty", "a", "m"): Usage(num_calls=2, num_replies=2, prompt_tokens=1_000_000),
        UsageKey("performance", "performance", "a", "m"): Usage(num_calls=3, num_replies=9, completion_tokens=500_000),
    }
    rows = cost_rows(ledger, PricesConfig(prompt=2.0, completion=4.0))
    assert [(row["stage"], row["calls"], row["replies"], row["cost"]) for row in rows] == [
        ("difficulty", "2", "2", "2.00"),
        ("performance", "3", "9", "2.00"),
        ("all", "5", "11", "4.00"),
    ]
    assert "cost" not in cost_rows(ledger, PricesConfig())[0]
    assert cost_rows({}, PricesConfig()) == []


CHANGES = VersionChange("v0002", "2026-01-01", "v0001", 30, 70, 3, 7, 2, 1)


def record(*, is_new: bool) -> dict[str, Any]:
    return {
        "corpus": "/home/runs/a b/corpus/v0002",
        "report": "/home/runs/a b/corpus/v0002/report.html",
        "version": "v0002",
        "rows": 100,
        "think": 30,
        "is_new": is_new,
        "paid": {"text": "paid nothing: nothing was asked"},
    }


def test_the_page_of_a_new_version_says_what_changed_and_what_to_do_next() -> None:
    text = version_text(record(is_new=True), CHANGES, "a table", "runs/my run.yaml", Places(Path("/home")))
    assert text.startswith("# New version `v0002`")
    assert "100: 30 think, 70 direct" in text
    assert "continues `v0001`: +10 rows (3 think, 7 direct), 2 marked as gone, 1 back again" in text
    assert "bimode diff v0001 v0002 --config 'runs/my run.yaml'" in text
    assert "`/home/runs/a b/corpus/v0002/report.html`" in text, "no browser opens file:// from a server's page"
    assert "link_open" not in kinds(text)


def test_the_page_of_a_night_without_news_says_so() -> None:
    text = version_text(record(is_new=False), CHANGES, "a table", "my.yaml", Places(Path("/home")))
    assert text.startswith("# No news: `v0002`")
    assert "none: `v0002` stays the newest version" in text


def test_a_version_that_starts_anew_says_so() -> None:
    anew = VersionChange("v0002", "2026-01-01", "", 1, 1, 1, 1, 0, 0, "made by other rules than v0001, or anew")
    line = "starts anew, +2 rows (1 think, 1 direct); `made by other rules than v0001, or anew`"
    assert change_line(anew) == line


def test_files_are_links_where_the_project_folder_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILES_URL, "http://files.example:8080/bimode/")
    places = Places.of_environment(Path("/home"))
    text = version_text(record(is_new=True), CHANGES, "", "my.yaml", places)
    address = "http://files.example:8080/bimode/runs/a%20b/corpus/v0002"
    assert f"[report.html]({address}/report.html)" in text and f"[v0002]({address})" in text
    assert places.address("/elsewhere/report.html") is None
    assert places.address("s3://bucket/corpus/v0001") is None
    assert places.link("s3://bucket/v0001") == "`s3://bucket/v0001`"


@pytest.mark.parametrize("url", ["files.example", "file:///x", "http://a b/", "http://x/)![", "javascript:alert(1)"])
def test_an_address_that_cannot_be_one_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILES_URL, url)
    with pytest.raises(ConfigError, match=r"BIMODE_FILES_URL = .* is no address such as"):
        Places.of_environment(Path("/home"))
