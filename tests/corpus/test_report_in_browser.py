"""The report in a real browser: its filters work, hostile rows stay text, and it is read on a phone and in the dark.

Screenshots are kept in the folder that BIMODE_SCREENSHOTS names, else with the test's other files.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from corpus.excerpts import ShownFate, ShownPair, ShownReply, ShownRow
from corpus.report import ReportInputs, VersionBefore, build_report
from corpus.tally import CorpusTally, FatesTally, ModeCount, SimilarityCount, TraceLengths
from corpus.thumbnails import thumbnail
from schemas.fates import Exit, Fate, StageCount
from schemas.usage import Usage, UsageKey
from tests.corpus.chromium import Chromium, Page
from tests.corpus.conftest import encoded_image

pytestmark = pytest.mark.slow

OWN = "document.title='owned'"
HOSTILE = [
    f"<script>{OWN}</script>",
    f"</div></dd></dl></article></section></main><script>{OWN}</script>",
    f'<img src=x onerror="{OWN}">',
    f'"><svg onload="{OWN}">',
    f'<iframe srcdoc="<script>parent.{OWN}</script>"></iframe>',
    f'<a href="javascript:{OWN}" autofocus onfocus="{OWN}">x</a>',
    "<meta http-equiv=refresh content='0;url=data:text/html,<title>owned</title>'>",
    f"</style></title></textarea></noscript></script><script>{OWN}</script>",
    f"\u202e<script>{OWN}</script>\u202c{{{{ ''.__class__ }}}}{{% raw %}}",
    "<base href='https://example.invalid/'><style>body{display:none}</style><b id=owned>owned</b>",
    f"javascript:{OWN}//\x00\x1b[2J\ud800",
    "A" * 3000,
    "<" * 5000,
    f"\u2067{'بسم ' * 30}\u2069 <select id=search><option>",
]
TOPICS = ("math", "ocr", "chart")
FACETS_OF_A_HALF = 30
LUMINANCE = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data);
  };
  const luminance = (colour) => {
    const [r, g, b] = rgba(colour).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const has_text = Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.data.trim());
    if (!has_text || !element.checkVisibility() || element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element);
    const fore = luminance(element.closest("svg") ? style.fill : style.color), back = luminance(behind(element));
    const ratio = (Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
})()
"""


def shown_row(number: int, mode: str, text: str = "") -> ShownRow:
    said = text or f"How many dots does picture {number} show?"
    return ShownRow(
        id=f"{number:032x}",
        mode=mode,
        topic=text or TOPICS[number % 3],
        kind="objective",
        answer_type=text or "count",
        source=text or f"source{number % 2}",
        origin=f"s:f#{number}",
        licence="MIT",
        teacher="teacher",
        reasoner=text,
        question=said,
        choices=(text, "7") if text else (),
        reference=text or "7",
        reasoning=(text or f"Three and four make seven, says step {number}.") if mode == "think" else "",
        answer=text or "7",
        evidence=text or "Performance heuristic: 0 of 8 scored answers right; 8 drawn.",
        images=(thumbnail(encoded_image("teal", (90, 60))), None),
        num_images=2,
    )


def shown_fate(number: int, exit_: Exit, text: str = "") -> ShownFate:
    reason = text or ("duplicate_near" if exit_ is Exit.DROPPED else "image_unreadable")
    fate = Fate(
        f"s:f#{number}", f"{number:032x}", text or "source1", text or "duplicates", exit_, reason, text or "why"
    )
    return ShownFate(fate, question=text or f"What leaves as number {number}?", topic="math")


def report(texts: list[str] | None = None) -> str:
    """Returns a page with 30 rows of each mode and some that left; texts: further rows of each kind with such texts."""
    texts = texts or []
    rows = [shown_row(n, "think" if n < FACETS_OF_A_HALF else "direct") for n in range(2 * FACETS_OF_A_HALF)]
    rows += [shown_row(100 + n, "think", text) for n, text in enumerate(texts)]
    fates = [shown_fate(200 + n, Exit.DROPPED) for n in range(8)] + [shown_fate(220, Exit.QUARANTINED)]
    fates += [shown_fate(300 + n, Exit.DROPPED, text) for n, text in enumerate(texts)]
    some = "zebra" if not texts else texts[0]
    replies = {
        row.id: [
            ShownReply("performance", n, text, text, text, text, 9, "wrong", text, text) for n, text in enumerate(said)
        ]
        for row, said in zip(rows, [[some, "the second reply"], *[[text] for text in texts]], strict=False)
    }
    num_left, num_rows = len(fates), len(rows)
    pairs = [
        ShownPair(shown.fate, (), "f" * 32, text, ()) for shown, text in zip(fates, texts or ["Kept?"], strict=False)
    ]
    return build_report(
        ReportInputs(
            name="tests",
            version="v0002",
            created="2026-01-01T00:00:00Z",
            recipe="r" * 64,
            inputs="i" * 64,
            teacher="teacher",
            reasoner="reasoner",
            stages={some: StageCount(num_rows + num_left, num_rows, Counter({some: num_left}))},
            tally=CorpusTally(
                rows=ModeCount(num_rows // 2, num_rows - num_rows // 2),
                by_topic={"math": ModeCount(30, 30), some: ModeCount(9, 9)},
                by_source={text: ModeCount(2, 3) for text in (texts or ["charts", "talks"])},
                by_kind={"objective": ModeCount(30, 30)},
                by_answer_type={"count": ModeCount(20, 30), "number": ModeCount(10, 0)},
                by_heuristic={"performance": ModeCount(30, 30)},
                audit={(0, 8): 3, (5, 8): 2, (8, 8): 4},
                samples_drawn={1: 20, 8: 10},
                probabilities=(*[ModeCount(0, 3)] * 5, *[ModeCount(2, 0)] * 5),
                traces=TraceLengths((3, 20, 7, 0, 0, 0, 0, 0), 31, 60, 70),
            ),
            fates_tally=FatesTally({}, (SimilarityCount("duplicates", some, 9, 3, (*[0] * 17, 2, 4, 3)),)),
            costs={UsageKey(some, some, some, some): Usage(40, 90, 0, 2, 0, 48_000, 9_000, 1000, 14.5)},
            rows=rows,
            fates=fates,
            pairs=pairs,
            replies=replies,
            before=VersionBefore(
                "v0001", "2025", "x", ModeCount(20, 30), {}, {"topics": [{"topic": "math", "total": 9}]}
            ),
            missing=texts[:1],
        )
    )[0]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("NO BROWSER: the report was not tested in one; install Debian's package chromium")
    with Chromium(program, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    with chromium.page() as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "report.html"
    path.write_text(report(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    path.write_bytes(report(HOSTILE).encode("utf-8", "replace"))
    return path


def kept(tmp_path: Path, name: str) -> Path:
    """Returns where a screenshot is kept."""
    folder = Path(os.environ.get("BIMODE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def visible(page: Page, name: str = "group") -> list[str]:
    """Returns a facet of each row that is shown, in order."""
    return list(
        page.value(f"[...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.dataset.{name})")
    )


def choose(page: Page, facet: str, value: str) -> None:
    page.value(
        f"(() => {{ const s = document.getElementById('filter-{facet}'); s.value = {value!r};"
        "s.dispatchEvent(new Event('change')); })()"
    )


def hits(page: Page) -> str:
    return str(page.value("document.getElementById('hits').textContent"))


def search(page: Page, text: str) -> None:
    page.value("document.getElementById('search').focus()")
    page.type(text)
    page.value("new Promise(done => setTimeout(done, 300))")


def active(page: Page) -> str:
    return str(page.value("document.activeElement.id"))


def test_filters_show_the_rows_that_fit_all_of_them_and_their_number(page: Page, plain: Path, tmp_path: Path) -> None:
    page.open(plain, height=1400)
    assert hits(page) == "69 of 69 rows"
    choose(page, "group", "dropped")
    assert visible(page) == ["dropped"] * 8
    choose(page, "group", "direct")
    choose(page, "topic", "ocr")
    assert set(visible(page, "topic")) == {"ocr"} and set(visible(page)) == {"direct"}
    assert hits(page) == "10 of 69 rows"
    # Each filter says how many rows its values would leave beside the other filters.
    options = "[...document.getElementById('filter-source').options].map(o => o.textContent)"
    assert page.value(options) == ["all", "source0 (5)", "source1 (5)"]
    page.value("document.getElementById('rows').scrollIntoView()")
    page.screenshot(kept(tmp_path, "filtered.png"))
    page.value("document.getElementById('clear').click()")
    assert hits(page) == "69 of 69 rows"


def test_further_rows_come_on_demand(page: Page, plain: Path) -> None:
    page.open(plain)
    assert len(visible(page)) == 20
    page.value("document.getElementById('more').click()")
    assert len(visible(page)) == 40
    assert page.value("document.activeElement === document.querySelectorAll('article')[20]")
    for _ in range(2):
        page.value("document.getElementById('more').click()")
    assert len(visible(page)) == 69 and page.value("document.getElementById('more').hidden")


def test_the_search_finds_words_of_any_text_of_a_row(page: Page, plain: Path) -> None:
    page.open(plain)
    search(page, "STEP 17.")
    assert hits(page) == "1 of 69 rows"
    page.press("Escape")
    assert hits(page) == "69 of 69 rows"
    search(page, "second reply")
    assert page.value("[...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.id)") == ["0" * 32]
    search(page, " no such words")
    assert hits(page) == "0 of 69 rows"


def test_rows_are_walked_through_by_keys(page: Page, plain: Path) -> None:
    page.open(plain)
    for key, number in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.press(key)
        assert active(page) == f"{number:032x}"
    page.press("/")
    assert active(page) == "search"
    page.type("j")
    assert page.value("document.getElementById('search').value") == "j"


def test_everything_can_be_reached_with_the_tab_key_alone(page: Page, plain: Path) -> None:
    page.open(plain)
    page.press("Tab")
    assert page.value("document.activeElement.className") == "skip"
    page.press("Enter")
    page.press("Tab")
    assert active(page) == "search"
    page.press("Tab")
    assert active(page) == "filter-group"


def test_a_link_to_a_row_shows_it_whatever_the_filters_say(page: Page, plain: Path) -> None:
    last = f"{220:032x}"
    page.open(plain, fragment=f"#{last}")
    assert active(page) == last
    assert 0 <= page.value(f"document.getElementById('{last}').getBoundingClientRect().top") < 900
    choose(page, "group", "think")
    page.value(f"location.hash = '#{55:032x}'; new Promise(done => setTimeout(done, 200))")
    assert active(page) == f"{55:032x}" and hits(page) == "69 of 69 rows"


def test_nothing_of_a_hostile_row_runs_or_becomes_markup(page: Page, hostile: Path, tmp_path: Path) -> None:
    page.open(hostile, height=1400)
    assert page.value("document.title") == "tests v0002: curation report"
    for element in (
        "iframe",
        "base",
        "img[src='x']",
        "#owned",
        "article svg",
        "article script",
        "[onerror]",
        "[onload]",
    ):
        assert page.value(f"document.querySelectorAll({element!r}).length") == 0, element
    assert page.value("document.querySelectorAll('script').length") == 1
    links = set(page.value("[...document.links].map(a => a.getAttribute('href')[0])"))
    assert links == {"#"}
    search(page, "</style></title>")
    # A row of the corpus, a row that left and a reply hold it; it is found as the text that it is.
    assert hits(page) == f"3 of {69 + 2 * len(HOSTILE)} rows"
    assert page.complaints == []
    assert set(page.requests) == {hostile.as_uri()}
    page.value("document.getElementById('rows').scrollIntoView()")
    page.screenshot(kept(tmp_path, "hostile.png"))


def test_escaping_and_the_policy_each_hold_alone(page: Page, hostile: Path, tmp_path: Path) -> None:
    html = hostile.read_text(encoding="utf-8")
    marked = html.replace("</main>", "<script>document.body.dataset.ran = 'yes'</script></main>")
    without_policy, with_policy = tmp_path / "without.html", tmp_path / "with.html"
    without_policy.write_text(marked.replace("Content-Security-Policy", "x-nothing"), encoding="utf-8")
    with_policy.write_text(marked, encoding="utf-8")
    page.open(without_policy)
    assert page.value("document.body.dataset.ran") == "yes"
    assert page.value("document.title") == "tests v0002: curation report"
    page.open(with_policy)
    assert page.value("document.body.dataset.ran") is None
    # Only the script of the page itself may run: its filters are there.
    assert hits(page).endswith("rows") and any("script-src" in complaint for complaint in page.complaints)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_a_phone(page: Page, hostile: Path, plain: Path, tmp_path: Path, is_dark: bool) -> None:
    for path in (hostile, plain):
        page.open(path, width=375, height=800, is_dark=is_dark)
        for _ in range(6):
            page.value("document.getElementById('more').click()")
        page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.value("document.documentElement.scrollWidth") == 375
        assert page.value(
            "[...document.querySelectorAll('svg.wide')].every(s => getComputedStyle(s).display === 'none')"
        )
    background = "rgb(17, 20, 27)" if is_dark else "rgb(245, 246, 248)"
    assert page.value("getComputedStyle(document.body).backgroundColor") == background
    page.open(plain, width=375, height=800, is_dark=is_dark, fragment="#rows")
    page.screenshot(kept(tmp_path, f"phone_{'dark' if is_dark else 'light'}.png"))


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(page: Page, plain: Path, tmp_path: Path, is_dark: bool) -> None:
    page.open(plain, height=2400, is_dark=is_dark)
    page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.value(LUMINANCE) == []
    page.open(plain, height=2400, is_dark=is_dark)
    page.screenshot(kept(tmp_path, f"desktop_{'dark' if is_dark else 'light'}.png"))


def test_headings_labels_and_landmarks_are_in_order(page: Page, plain: Path) -> None:
    page.open(plain)
    levels = page.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    unlabelled = "[...document.querySelectorAll('input, select')].filter(c => !c.labels.length).length"
    assert page.value(unlabelled) == 0
    unnamed = "[...document.querySelectorAll('section, article')].filter(s => !s.getAttribute('aria-labelledby')"
    assert page.value(f"{unnamed} || !document.getElementById(s.getAttribute('aria-labelledby'))).length") == 0
    assert page.value("['header', 'main', 'nav', 'footer'].every(n => document.querySelector(n))")
    assert page.value("[...document.images].every(i => i.alt)")
    assert page.value(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label').length > 20)"
    )
    assert page.value(
        "document.querySelectorAll('[id]').length === new Set([...document.querySelectorAll('[id]')]"
        ".map(e => e.id)).size"
    )


def test_without_a_script_every_row_can_be_read(page: Page, plain: Path, tmp_path: Path) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.open(plain)
    assert len(visible(page)) == 69
    assert not page.value("document.querySelector('.filters').checkVisibility()")
    assert page.value("document.querySelector('noscript').textContent").startswith("Without JavaScript")
    page.screenshot(kept(tmp_path, "without_script.png"))


def test_charts_take_the_colours_of_the_page(page: Page, plain: Path) -> None:
    seen: dict[bool, Any] = {}
    for is_dark in (False, True):
        page.open(plain, is_dark=is_dark)
        seen[is_dark] = page.value(
            "getComputedStyle(document.querySelector('#chart-difficulty svg.wide path[fill=\"var(--think)\"]')).fill"
        )
    assert seen == {False: "rgb(79, 91, 213)", True: "rgb(139, 149, 246)"}
