"""`bimode export` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from corpus.exports import FORMATS
from flows.commands import export
from tests.corpus.conftest import World, build


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    world = World()
    build(
        tmp_path / "corpus", world, [*world.rows(think=2, direct=3), world.row(7, question="What is <image>?")]
    ).commit()
    return tmp_path / "corpus"


def run(*arguments: object) -> Result:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command(epilog=export.EXAMPLES)(export.export)
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_it_says_where_the_export_is_what_is_in_it_and_what_was_left_out(corpus: Path, tmp_path: Path) -> None:
    result = run("llava", "--corpus", corpus, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"export         {tmp_path / 'out'}\n" in result.stdout
    assert "rows           5 of tests v0001, 2 of them thinking" in result.stdout
    assert "left out       1 mark_in_text; named in left_out.jsonl" in result.stdout
    assert "6 of 6 rows (100%)" in result.stderr and "6 of 6" not in result.stdout
    assert "was there already" in run("llava", "--corpus", corpus, "--output", tmp_path / "out").stdout


def test_json_is_one_object_on_standard_output(corpus: Path, tmp_path: Path) -> None:
    result = run("webdataset", "--corpus", corpus, "--output", tmp_path / "out", "--shard-rows", 4, "--json")
    record = json.loads(result.stdout)
    assert (record["kind"], record["num_think"], record["num_direct"], record["is_new"]) == ("webdataset", 2, 4, True)
    assert [file["num_rows"] for file in record["files"]] == [4, 2]


def test_one_mode_of_a_named_version(corpus: Path, tmp_path: Path) -> None:
    arguments = ["--corpus", corpus / "v0001", "--output", tmp_path / "out", "--mode", "think", "--json"]
    record = json.loads(run("ms-swift", *arguments).stdout)
    assert (record["modes"], record["num_think"], record["num_direct"]) == (["think"], 2, 0)


def test_a_run_is_named_by_its_configuration(corpus: Path, tmp_path: Path) -> None:
    settings = {"name": "t", "workdir": str(tmp_path), "sources": [{"name": "s", "format": "jsonl", "path": "x.jsonl"}]}
    (tmp_path / "my.yaml").write_text(json.dumps(settings))
    result = run("llama-factory", "--config", tmp_path / "my.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --config my.yaml or --corpus FOLDER"),
        (["--corpus", "none"], "there is no finished corpus version in none"),
        (["--corpus", "a", "--config", "b.yaml"], "either --config my.yaml or --corpus FOLDER"),
    ],
)
def test_wrong_use_is_named_and_has_its_status(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("llava", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output


def test_a_folder_with_something_else_in_it_is_refused(corpus: Path, tmp_path: Path) -> None:
    result = run("llava", "--corpus", corpus, "--output", corpus, "--overwrite")
    assert result.exit_code == 2
    assert "which no export made" in result.stderr


def test_the_command_knows_every_format_and_the_help_says_that_trl_needs_none() -> None:
    assert {str(kind) for kind in export.Kind} == set(FORMATS)
    text = " ".join(run("--help").output.split())
    assert "TRL and `datasets` need no export" in text
    assert "bimode export llama-factory --config my.yaml" in text
    assert run("parquet", "--output", "x").exit_code == 2
