"""`bimode validate` as its user sees it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from flows.commands.validate import EXAMPLES, validate
from schemas.samples import ImageRef
from tests.corpus import small_versions
from tests.corpus.small_versions import a_row, rewrite_shard, some_rows, write_version

SHARD = "data/think/00000.parquet"


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return write_version(tmp_path / "corpus", some_rows())


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command(epilog=EXAMPLES)(validate)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_version_that_is_right_ends_with_status_0(version: Path) -> None:
    for arguments in ([version], [version.parent], ["v0001", "--corpus", version.parent], ["--corpus", version.parent]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "9 rows, 9 images" in result.output and "complete and right" in result.output


def test_a_problem_is_named_with_file_row_and_id_and_ends_with_status_7(version: Path) -> None:
    rewrite_shard(version, lambda records: records[1].update(answer="\x1b[31m8", source="\u202eevil"))
    result = run(version)
    assert result.exit_code == 7
    id_ = some_rows()[1].sample.id
    assert f"completion_differs: {SHARD}, row 1, id {id_}" in result.output
    assert "\x1b" not in result.output and "\u202e" not in result.output
    record = json.loads(run(version, "--json").output)
    assert not record["is_valid"] and record["num_problems"]["completion_differs"] == 1
    assert {"file": SHARD, "row": 1, "id": id_}.items() <= next(
        problem for problem in record["problems"] if problem["code"] == "completion_differs"
    ).items()


def test_a_folder_that_is_no_version_is_a_problem_and_one_that_is_not_there_is_wrong_use(
    version: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (version / "manifest.json").unlink()
    for arguments in ([tmp_path / "empty"], [version], ["v0001", "--corpus", version.parent]):
        result = run(*arguments)
        assert result.exit_code == 7 and "manifest_missing" in result.output, result.output
    assert run(tmp_path / "none").exit_code == 2
    assert run().exit_code == 2


def test_images_that_the_store_would_not_hold_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"broken": b"\x89PNG and no more", "grey": encoded("L", (6, 4)), "thin": encoded("RGB", (6, 1))}
    names = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(small_versions, "IMAGES", {names[name]: content for name, content in contents.items()})
    rows = [a_row(n, images=(ImageRef(names[name], 6, 4),)) for n, name in enumerate(contents)]
    record = json.loads(run(write_version(tmp_path, rows), "--json", "--images").output)
    assert record["num_problems"] == {"image_unreadable": 1, "image_not_plain": 1, "image_too_small": 1}


def encoded(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_are_held_to_the_limits_of_the_run_and_kept_duplicates_are_in_order(tmp_path: Path) -> None:
    write_version(tmp_path / "corpus", [a_row(1), a_row(1)])
    config = tmp_path / "run.yaml"
    base = f"workdir: {tmp_path}\nsources: [{{name: tests, format: jsonl, path: none.jsonl}}]\n"
    config.write_text(f"{base}duplicates: {{exact: false, near: false}}\n", encoding="utf-8")
    assert run("--config", config).exit_code == 0
    config.write_text(f"{base}images: {{max_pixels: 10}}\n", encoding="utf-8")
    record = json.loads(run("--config", config, "--json").output)
    assert record["num_problems"] == {"image_too_large_pixels": 2, "id_repeated": 1}
