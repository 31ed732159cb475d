"""Reports made from a version and its work folder, and anew from less."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.cards import MODEL, configuration, curate_plainly, teacher_answer, write_cards
from corpus.excerpts import pick_rows
from corpus.tally import tally_corpus
from corpus.versions import load_manifest
from flows import reporting
from flows.commands.report import EXAMPLES, report
from flows.reported_replies import count_audit, find_rows, read_replies
from flows.reporting import ReportFacts, remake_report, version_before, write_report
from flows.runtime import Runtime
from flows.workspace import Workspace
from schemas.config import RunConfig
from schemas.errors import CorpusError
from teacher.fault_server import FaultServer


@dataclass(frozen=True)
class Done:
    """A finished curation. version: its folder."""

    config: RunConfig
    version: Path

    @property
    def shards(self) -> list[str]:
        return sorted(path.stem for path in Path(self.config.workdir, "stages", "sources").glob("*.json"))


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Cards, labelled by their teacher, which has been stopped since: no test below can ask it anything."""
    folder = tmp_path_factory.mktemp("cards")
    cards = write_cards(folder / "in", 90)
    with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
        config = configuration(cards, folder / "work", server.url, reasoning={"num_tries": 1})
        published = curate_plainly(config)
    return Done(config, published.folder)


@pytest.fixture
def done(curated: Done, tmp_path: Path) -> Done:
    """A copy that a test may damage."""
    shutil.copytree(curated.config.workdir, tmp_path / "work", symlinks=True)
    config = curated.config.model_copy(update={"workdir": str(tmp_path / "work")})
    return Done(config, tmp_path / "work" / "corpus" / curated.version.name)


@pytest.fixture
def runtime(done: Done) -> Iterator[Runtime]:
    made = Runtime(done.config)
    yield made
    made.close()


def page_of(done: Done) -> str:
    return (done.version / "report.html").read_text(encoding="utf-8")


def test_the_report_of_a_published_version_can_be_made_anew_without_a_teacher(done: Done, runtime: Runtime) -> None:
    before = json.loads((done.version / "report.json").read_text(encoding="utf-8"))
    figures = remake_report(runtime, done.version)
    assert json.loads((done.version / "report.json").read_text(encoding="utf-8")) == figures
    for key in ("name", "version", "created", "recipe", "inputs", "funnel", "topics", "modes", "accounting", "teacher"):
        assert figures[key] == before[key]
    manifest = load_manifest(done.version)
    assert figures["shown"]["rows"]["think"] == min(60, manifest.num_think)
    assert figures["shown"]["rows"]["direct"] == min(60, manifest.num_direct)
    assert figures["missing"] == [] and "Not in this report" not in page_of(done)


def test_making_it_twice_gives_the_same_page(done: Done, runtime: Runtime) -> None:
    remake_report(runtime, done.version)
    page = page_of(done)
    remake_report(runtime, done.version)
    assert page_of(done) == page


def test_counted_replies_and_verdicts_are_those_behind_each_label(done: Done, runtime: Runtime) -> None:
    rows = pick_rows(done.version)
    found = find_rows(runtime.workspace, {row.id for row in rows})
    replies = read_replies(runtime, found.known, found.before)
    labelled = {
        record["id"]: record
        for path in (done.version / "data").rglob("*.parquet")
        for record in pq.read_table(
            path, columns=["id", "heuristic", "num_right", "num_scored", "num_sampled"]
        ).to_pylist()
    }
    checked: Counter[str] = Counter()
    for row in rows:
        label = labelled[row.id]
        counted = [reply for reply in replies.get(row.id, ()) if reply.is_counted]
        if label["heuristic"] == "performance":
            outcomes = Counter(reply.outcome for reply in counted if reply.purpose == "performance")
            assert outcomes["correct"] == label["num_right"]
            assert outcomes["correct"] + outcomes["wrong"] == label["num_scored"]
            assert outcomes.total() == label["num_sampled"]
        else:
            (verdict,) = [reply.outcome for reply in counted if reply.purpose == "difficulty"]
            assert verdict == ("yes" if row.mode == "think" else "no")
        tries = [reply.outcome for reply in counted if reply.purpose == "reasoning"]
        assert tries[-1:] == (["passes"] if row.mode == "think" else [])
        checked[label["heuristic"] + row.mode] += 1
    assert min(checked[f"{h}{m}"] for h in ("performance", "difficulty") for m in ("think", "direct")) > 3


def test_a_row_that_left_shows_its_options_its_replies_and_why_each_was_refused(done: Done, runtime: Runtime) -> None:
    fates = pq.read_table(done.version / "fates.parquet").to_pylist()
    failed = [fate for fate in fates if fate["reason"] == "trace_answer_wrong"]
    remake_report(runtime, done.version)
    page = page_of(done)
    for fate in failed:
        article = page[page.index(f'<article id="{fate["id"]}"') :].partition("</article>")[0]
        assert "rejected" in article and "differs from the reference" in article
        assert "<dt>Reference</dt>" in article and 'data-kind="objective"' in article
    assert failed


def test_replies_asked_under_other_settings_are_not_counted(done: Done) -> None:
    hotter = done.config.performance.model_copy(update={"temperature": 0.5})
    runtime = Runtime(done.config.model_copy(update={"performance": hotter}))
    try:
        rows = pick_rows(done.version, num_rows=5)
        found = find_rows(runtime.workspace, {row.id for row in rows})
        replies = read_replies(runtime, found.known, found.before)
        answers = [one for about in replies.values() for one in about if one.purpose == "performance"]
        assert answers and not any(one.is_counted for one in answers)
    finally:
        runtime.close()


def test_the_audit_slice_of_a_run_holds_rows_that_left_after_labelling_too(done: Done, runtime: Runtime) -> None:
    audit = count_audit(runtime.workspace, done.shards)
    in_corpus = tally_corpus(done.version).audit
    assert sum(audit.values()) >= sum(in_corpus.values()) > 0
    assert all(audit[key] >= rows for key, rows in in_corpus.items())


def test_a_version_alone_has_a_report_that_says_what_is_missing(done: Done, tmp_path: Path) -> None:
    lonely = tmp_path / "elsewhere" / done.version.name
    shutil.copytree(done.version, lonely)
    shutil.rmtree(done.config.workdir)
    (lonely / "report.json").unlink()
    runtime = Runtime(done.config)
    try:
        figures = remake_report(runtime, lonely)
    finally:
        runtime.close()
    assert len(figures["missing"]) == 2
    assert "The work folder of the run is not here" in figures["missing"][1]
    assert "costs, leaks of benchmarks, and the audit slice" in figures["missing"][0]
    assert "Image 1 cannot be shown." in (lonely / "report.html").read_text(encoding="utf-8")
    assert figures["summary"]["rows_out"] == load_manifest(lonely).num_rows


def test_a_damaged_journal_costs_the_replies_and_nothing_else(done: Done, runtime: Runtime) -> None:
    compacted = next(Path(done.config.workdir, "journals", "performance").rglob("*.parquet"))
    content = bytearray(compacted.read_bytes())
    content[len(content) // 2] ^= 1
    compacted.write_bytes(content)
    figures = remake_report(runtime, done.version)
    assert len(figures["missing"]) == 1 and "damaged" in figures["missing"][0]
    assert figures["accounting"]["costs"]["total"]["num_calls"] > 0


@pytest.mark.parametrize("content", ["", "[]", '{"accounting": {"costs": 5}}'])
def test_a_damaged_report_json_is_not_relied_on(done: Done, runtime: Runtime, content: str) -> None:
    (done.version / "report.json").write_text(content, encoding="utf-8")
    figures = remake_report(runtime, done.version)
    assert "What the earlier report.json alone told" in figures["missing"][0]


def test_a_version_that_lacks_rows_has_no_report(done: Done, runtime: Runtime) -> None:
    next((done.version / "data" / "think").glob("*.parquet")).unlink()
    with pytest.raises(CorpusError, match=r"its manifest says [\d,]+: it is damaged"):
        remake_report(runtime, done.version)


def test_a_page_elsewhere_leaves_the_version_as_it_is(done: Done, runtime: Runtime, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in done.version.iterdir() if path.is_file()}
    remake_report(runtime, done.version, page=tmp_path / "out" / "page.html")
    assert {path.name: path.read_bytes() for path in done.version.iterdir() if path.is_file()} == before
    assert (tmp_path / "out" / "page.html").stat().st_size > 100_000


def test_a_version_is_compared_with_the_one_before(done: Done, runtime: Runtime) -> None:
    manifest = load_manifest(done.version)
    building = done.version.parent / ".building"
    shutil.copytree(done.version, building)
    (building / "manifest.json").unlink()
    facts = ReportFacts("v0002", "2026", "another recipe", "i", manifest.counts, shards=done.shards)
    figures = write_report(runtime, building, facts)
    assert figures["previous"]["version"] == "v0001" and not figures["previous"]["is_same_recipe"]
    assert figures["previous"]["rows"]["total"] == {"before": manifest.num_rows, "now": manifest.num_rows}
    assert figures["previous"]["topics"] and (building / "report.html").exists()


def test_the_version_before_goes_by_number(done: Done) -> None:
    for name in ("v0003", "v10000"):
        shutil.copytree(done.version, done.version.with_name(name))
    corpus = done.version.parent
    names = {name: version_before(corpus, name) for name in ("v0001", "v0002", "v0003", "v0004", "v10000", "v10001")}
    assert {name: path and path.name for name, path in names.items()} == {
        "v0001": None,
        "v0002": "v0001",
        "v0003": "v0001",
        "v0004": "v0003",
        "v10000": "v0003",
        "v10001": "v10000",
    }


def test_a_damaged_version_before_is_left_out(done: Done, runtime: Runtime) -> None:
    newer = done.version.with_name("v0002")
    shutil.copytree(done.version, newer)
    (done.version / "manifest.json").write_text("{}", encoding="utf-8")
    facts = ReportFacts("v0002", "2026", "r", "i", load_manifest(newer).counts)
    assert write_report(runtime, newer, facts)["previous"] is None


def command(done: Done, tmp_path: Path, *options: str) -> Any:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(done.config.model_dump_json())), encoding="utf-8")
    app = typer.Typer()
    app.command(epilog=EXAMPLES)(report)
    return CliRunner().invoke(app, ["--config", str(path), *options])


def test_the_command_says_where_the_page_is(done: Done, tmp_path: Path) -> None:
    result = command(done, tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"^report +\S+v0001/report\.html$", result.stdout, re.MULTILINE)
    assert "rows read" in result.stdout


def test_the_command_prints_the_figures_and_writes_the_page_elsewhere(done: Done, tmp_path: Path) -> None:
    result = command(done, tmp_path, "--version", "v0001", "--output", str(tmp_path / "page.html"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == "v0001"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_command_knows_no_version_that_is_not_there(done: Done, tmp_path: Path) -> None:
    result = command(done, tmp_path, "--version", "../v0001")
    assert result.exit_code == 2 and "there are: v0001" in result.output


def test_an_empty_work_folder_has_no_replies_and_no_rows(tmp_path: Path) -> None:
    found = find_rows(Workspace(tmp_path), {"a" * 32})
    assert (dict(found.before), dict(found.known)) == ({}, {})
    assert count_audit(Workspace(tmp_path), ["nowhere-00000"]) == {}
    assert reporting.version_before(tmp_path, "v0001") is None
