"""`bimode diff` as its user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from flows.commands.diff import EXAMPLES, diff
from tests.corpus.small_versions import a_row, some_rows, write_version

HOSTILE = "\x1b[2J\u202eHow many <b>dots</b>?"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two versions: a row more, a row less, a row that thinks no more, a hostile one."""
    folder = tmp_path / "corpus"
    rows = some_rows()
    write_version(folder, rows, has_card=False)
    write_version(folder, [a_row(0), *rows[2:], a_row(77, question=HOSTILE)], has_card=False, recipe="cd" * 32)
    return folder


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command(epilog=EXAMPLES)(diff)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_it_says_in_words_what_changed(corpus: Path) -> None:
    result = run("v0001", "v0002", "--corpus", corpus)
    assert result.exit_code == 0, result.output
    for line in ("recipe  abababababab… became cdcdcdcdcdcd…", "added ", "think to direct", "question   How many dots"):
        assert line in result.output
    assert "by topic  added  removed  think to direct\nmath          1        1                1" in result.output
    assert "How many <b>dots</b>?" in result.output
    assert "\x1b" not in result.output and "\u202e" not in result.output


def test_json_holds_the_same(corpus: Path) -> None:
    record = json.loads(run("v0001", corpus / "v0002", "--corpus", corpus, "--json", "--examples", 1).output)
    changes = {name: number for name, number in record["changes"].items() if number}
    assert changes == {"added": 1, "removed": 1, "think_to_direct": 1}
    assert record["num_rows"] == {"old": 9, "new": 9, "both": 8} and record["num_changed"] == 1
    assert record["by_mode"] == {
        "direct": {"added": 1, "think_to_direct": 1},
        "think": {"removed": 1},
    }
    assert not record["is_equal"] and not record["is_same_recipe"]
    assert [row["change"] for row in record["examples"]] == ["added", "removed", "think_to_direct"]
    assert record["examples"][0]["new"]["question"] == HOSTILE and record["examples"][0]["old"] is None


def test_the_status_says_whether_rows_differ_if_it_is_asked_to(corpus: Path) -> None:
    assert run("v0001", "v0002", "--corpus", corpus).exit_code == 0
    assert run("v0001", "v0002", "--corpus", corpus, "--exit-code").exit_code == 1
    same = run("v0001", "v0001", "--corpus", corpus, "--exit-code")
    assert same.exit_code == 0 and "No row differs." in same.output


def test_the_list_of_ids_is_written(corpus: Path, tmp_path: Path) -> None:
    assert run("v0001", "v0002", "--corpus", corpus, "--ids", tmp_path / "ids.csv").exit_code == 0
    assert len((tmp_path / "ids.csv").read_text().splitlines()) == 4
    assert run("v0001", "v0002", "--corpus", corpus, "--ids", tmp_path / "ids.txt").exit_code == 2


def test_wrong_use_and_damage_have_their_own_status(corpus: Path, tmp_path: Path) -> None:
    assert run("v0001", "v0009", "--corpus", corpus).exit_code == 2
    both = run("v0001", "v0002", "--corpus", corpus, "--config", tmp_path / "run.yaml")
    assert both.exit_code == 2 and "leave one out" in both.stderr
    (corpus / "v0001/manifest.json").write_text("{}")
    damaged = run("v0001", "v0002", "--corpus", corpus)
    assert damaged.exit_code == 7 and damaged.stderr.startswith("error: ")


def test_versions_are_found_by_the_configuration(corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    source = "{name: tests, format: jsonl, path: none.jsonl}"
    config.write_text(f"workdir: {tmp_path}\nsources: [{source}]\n", encoding="utf-8")
    assert run("v0001", "latest", "--config", config).exit_code == 0
