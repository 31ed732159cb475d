"""The Croissant description, read by the library that defines what is valid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from corpus.croissant import CROISSANT, CroissantInputs, croissant_record
from corpus.versions import Manifest
from schemas.rows import CORPUS_SCHEMA

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _absl_logs_to_the_real_stderr() -> None:
    """mlcroissant brings absl, whose log handler closes its stream once logging is set up anew: here, pytest's own."""
    import mlcroissant  # noqa: F401
    from absl import logging

    handler = logging.get_absl_handler().python_handler
    assert handler is not None
    handler.stream = sys.__stderr__


def described(folder: Path, manifest: Manifest, **changes: Any) -> Any:
    """Writes the description into a version's folder and opens it with mlcroissant."""
    import mlcroissant

    values = {"name": manifest.name, "version": manifest.version, "created": manifest.created, "licence": "MIT"}
    inputs = CroissantInputs(**{**values, "shards": manifest.shards, "folder": folder, **changes})
    (folder / CROISSANT).write_text(json.dumps(croissant_record(inputs)), encoding="utf-8")
    return mlcroissant.Dataset(jsonld=str(folder / CROISSANT))


def test_it_is_valid_without_an_error_or_a_warning(build_version: Any, world: Any) -> None:
    committed = build_version(world.rows(think=4, direct=2)).commit()
    issues = described(committed.folder, committed.manifest).metadata.ctx.issues
    assert (issues.errors, issues.warnings) == (set(), set())


def test_every_row_can_be_read_through_it(build_version: Any, world: Any) -> None:
    rows = [*world.rows(think=4, direct=2), world.row(77, colours=(), choices=("3", "7"), question="Two and five?")]
    committed = build_version(rows).commit()
    records = list(described(committed.folder, committed.manifest).records("rows"))
    assert sorted(record["rows/id"].decode() for record in records) == sorted(row.sample.id for row in rows)
    of_id = {record["rows/id"].decode(): record for record in records}
    thinking, plain = of_id[rows[0].sample.id], of_id[rows[-1].sample.id]
    assert thinking["rows/mode"] == b"think" and thinking["rows/reasoning"].decode() == rows[0].reasoning
    assert thinking["rows/images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert thinking["rows/num_scored"] == 8 and thinking["rows/licence"] == b"MIT"
    assert [choice.decode() for choice in plain["rows/choices"]] == ["3", "7"]
    assert len(plain["rows/images"]) == 0


def test_it_names_every_column_but_the_messages(build_version: Any, world: Any) -> None:
    committed = build_version(world.rows(think=1, direct=1)).commit()
    (record_set,) = described(committed.folder, committed.manifest).metadata.record_sets
    names = {field.name for field in record_set.fields}
    assert names == set(CORPUS_SCHEMA.names) - {"prompt", "completion"}


def test_it_holds_the_checksum_of_every_shard_wherever_it_is_written(build_version: Any, world: Any) -> None:
    built = build_version(world.rows(think=4, direct=2))
    inputs = CroissantInputs("tests", "v0001", "2026-01-01T00:00:00Z", "MIT", built.shards, built.building)
    while_building = croissant_record(inputs)["distribution"]
    committed = built.commit()
    files = {file.id: file for file in described(committed.folder, committed.manifest).metadata.file_objects}
    assert {name: file.sha256 for name, file in files.items()} == {
        shard.path: shard.sha256 for shard in committed.manifest.shards
    }
    assert {part["@id"] for part in while_building} == {"shards", *files}


def test_it_describes_the_version(build_version: Any, world: Any) -> None:
    committed = build_version(world.rows(think=4, direct=2)).commit()
    metadata = described(committed.folder, committed.manifest, version="v0012", licence="CC-BY-4.0").metadata
    assert (metadata.name, str(metadata.version), metadata.license) == ("tests", "12.0.0", ["CC-BY-4.0"])
    assert "4 rows" in metadata.description and "2 at once" in metadata.description
