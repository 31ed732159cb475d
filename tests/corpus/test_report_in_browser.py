"""The report in a real browser: hostile rows stay text, and the page is styled although it allows no script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</div></dd></dl></article></section></main><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload="document.title=\'owned\'">',
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<a href=\"javascript:document.title='owned'\" autofocus onfocus=\"document.title='owned'\">x</a>",
    "<meta http-equiv=refresh content='0;url=data:text/html,<title>owned</title>'>",
    "</style></title></textarea></noscript><script>document.title='owned'</script>",
    "\u202e<script>document.title='owned'</script>\u202c{{ ''.__class__ }}{% raw %}",
    "<base href='https://example.invalid/'><style>body{display:none}</style><b id=owned>owned</b>",
]
TITLE = "<title>tests v0001: curation report</title>"


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "NO BROWSER: the report was not tested against scripts; install Debian's package chromium"
        pytest.skip(reason)
    return found


def run(chromium: str, page: Path, tmp_path: Path, *options: str) -> str:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,700", "--hide-scrollbars"]
    flags += ["--blink-settings=preferredColorScheme=1", "--virtual-time-budget=2000"]
    command = [chromium, *flags, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.slow
def test_no_script_of_a_hostile_row_runs(
    chromium: str, build_version: Any, world: Any, dropped_fate: Any, tmp_path: Path
) -> None:
    rows = [
        world.row(n, question=text, answer=text, choices=(text, "7"), reasoning=text if n % 2 else "", source=text)
        for n, text in enumerate(HOSTILE)
    ]
    fates = [dropped_fate(n, reason=text, question=text, detail=text) for n, text in enumerate(HOSTILE)]
    built = build_version(rows, fates, is_whole=True)
    page = tmp_path / "report.html"
    marked = built.html.replace("</main>", "<script>document.body.dataset.ran = 'yes'</script></main>")

    # Escaping alone: the policy is taken away, and a script of ours proves that scripts do run in this page.
    page.write_text(marked.replace("Content-Security-Policy", "x-nothing"), encoding="utf-8")
    seen = run(chromium, page, tmp_path, "--dump-dom")
    assert 'data-ran="yes"' in seen
    assert TITLE in seen
    for element in ("<iframe", "<base", '<img src="x"', "<b id="):
        assert element not in seen
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in seen

    # The policy alone: not even a script that got into the page runs.
    page.write_text(marked, encoding="utf-8")
    seen = run(chromium, page, tmp_path, "--dump-dom")
    assert 'data-ran="yes"' not in seen and TITLE in seen


@pytest.mark.slow
def test_the_style_sheet_passes_the_page_s_own_policy(
    chromium: str, build_version: Any, world: Any, tmp_path: Path
) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(build_version(world.rows(think=2, direct=2), is_whole=True).html, encoding="utf-8")
    run(chromium, page, tmp_path, f"--screenshot={picture}")
    with Image.open(picture) as screenshot:
        assert screenshot.convert("RGB").getpixel((3, 3)) == (0xF5, 0xF6, 0xF8)
