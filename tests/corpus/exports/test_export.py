"""Exports: what is in them, that nothing is lost, and what becomes of folders, interruptions and damage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.exports import FORMATS, CorpusVersion, Exported, export_corpus, open_version
from schemas.errors import ConfigError, CorpusError, StorageError
from schemas.rows import LabelledSample
from schemas.template import render_completion
from schemas.verdicts import Mode
from tests.corpus.conftest import World, build

ROOT = Path(__file__).parents[3]
WITH_IMAGE_FILES = [name for name, target in FORMATS.items() if target.has_image_files]


@pytest.fixture
def version(tmp_path: Path, world: World) -> CorpusVersion:
    """A corpus of 4 thinking rows, 8 direct ones with two images, and one without any."""
    rows = [*world.rows(think=4, direct=8), world.row(77, colours=(), question="Two and five?", licence=None)]
    return made(tmp_path, world, rows)


def made(folder: Path, world: World, rows: Sequence[LabelledSample]) -> CorpusVersion:
    return open_version(build(folder / "corpus", world, rows).commit().folder)


def export(version: CorpusVersion, kind: str, folder: Path, **options: Any) -> Exported:
    return export_corpus(version, FORMATS[kind], folder, **options)


def records(exported: Exported) -> list[dict[str, Any]]:
    """Returns the rows of an export, in order, by plain reading of its files."""
    rows: list[dict[str, Any]] = []
    for file in exported.files:
        text = (Path(exported.folder) / file.path).read_text(encoding="utf-8")
        rows += json.loads(text) if exported.kind == "llava" else [json.loads(line) for line in text.split("\n")[:-1]]
    return rows


def answers(exported: Exported) -> list[str]:
    if exported.kind == "llava":
        return [row["conversations"][1]["value"] for row in records(exported)]
    return [row["messages"][1]["content"] for row in records(exported)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- What is in an export


def test_a_llava_row_is_a_conversation_beside_its_image(version: CorpusVersion, tmp_path: Path, world: World) -> None:
    rows = records(export(version, "llava", tmp_path / "out"))
    row = next(
        row for row in rows if row["conversations"][0]["value"].startswith("<image>\nHow many dots does picture 0")
    )
    name = hashlib.sha256(world.store[world.image("red").sha256]).hexdigest()
    assert row == {
        "id": row["id"],
        "image": f"images/{name[:2]}/{name}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nHow many dots does picture 0 show?"},
            {"from": "gpt", "value": "<think>\nThree and four make seven, says step 0.\n</think>7"},
        ],
        "mode": "think",
        "source": "tests",
        "licence": "MIT",
    }
    two = next(row for row in rows if row["mode"] == "direct" and "image" in row)
    assert len(two["image"]) == 2 and two["conversations"][0]["value"].startswith("<image>\n<image>\nHow many")
    none = next(row for row in rows if row["conversations"][0]["value"] == "Two and five?")
    assert "image" not in none and none["licence"] == ""


@pytest.mark.parametrize("kind", ["llama-factory", "ms-swift"])
def test_a_row_of_messages_marks_its_images_in_the_text(version: CorpusVersion, tmp_path: Path, kind: str) -> None:
    rows = {row["messages"][0]["content"]: row for row in records(export(version, kind, tmp_path / "out"))}
    row = rows["<image><image>How many dots does picture 1000 show?"]
    assert row["messages"][1] == {"role": "assistant", "content": "<think>\n\n</think>7"}
    assert len(row["images"]) == 2
    assert (row["mode"], row["source"], row["licence"]) == ("direct", "tests", "MIT")
    assert rows["Two and five?"]["images"] == []


@pytest.mark.parametrize("kind", WITH_IMAGE_FILES)
def test_an_image_is_stored_once_with_its_own_bytes(
    version: CorpusVersion, tmp_path: Path, world: World, kind: str
) -> None:
    exported = export(version, kind, tmp_path / "out")
    images = [content for name, content in files(tmp_path / "out").items() if name.startswith("images/")]
    assert sorted(images) == sorted(world.store[world.image(colour).sha256] for colour in ("red", "blue", "lime"))
    assert exported.num_images == 4 + 2 * 8


def test_llama_factory_finds_its_list_of_data_sets(version: CorpusVersion, tmp_path: Path) -> None:
    for shard_rows, name in ((None, "train.jsonl"), (5, "train")):
        folder = tmp_path / str(shard_rows)
        export(version, "llama-factory", folder, shard_rows=shard_rows)
        info = json.loads((folder / "dataset_info.json").read_text())
        assert info["tests"]["file_name"] == name and (folder / name).exists()
        assert info["tests"]["formatting"] == "sharegpt"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_webdataset_library_reads_each_row_with_its_images(
    version: CorpusVersion, tmp_path: Path, world: World
) -> None:
    import webdataset

    exported = export(version, "webdataset", tmp_path / "out", shard_rows=5)
    assert [file.path for file in exported.files] == [f"train-00000{index}.tar" for index in range(3)]
    found = webdataset.WebDataset(f"{tmp_path}/out/train-{{000000..000002}}.tar", shardshuffle=False).decode("pil")
    rows = [{key: value for key, value in row.items() if not key.startswith("__")} for row in found]
    assert len(rows) == 13 == exported.num_rows
    two = next(row for row in rows if len(row) == 3)
    assert [two[name].getpixel((0, 0)) for name in ("0.png", "1.png")] == [(0, 0, 255), (0, 255, 0)]
    asked = two["json"]["messages"][0]["content"]
    assert asked[:2] == [{"type": "image", "image": "0.png"}, {"type": "image", "image": "1.png"}]
    assert two["json"]["messages"][1]["content"][0]["text"] == "<think>\n\n</think>7"
    assert {row["json"]["licence"] for row in rows} == {"MIT", ""}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_readme_says_how_to_train_and_counts_licences(version: CorpusVersion, tmp_path: Path, kind: str) -> None:
    exported = export(version, kind, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| tests | MIT | 4 | 8 |" in readme and "| tests | not stated | 0 | 1 |" in readme
    assert sum(count.num_think + count.num_direct for count in exported.licences) == 13
    expected = {"llava": "image_folder", "llama-factory": "qwen2_vl", "ms-swift": "swift sft", "webdataset": ".tar"}
    assert expected[kind] in readme


def test_names_from_data_are_no_markup_in_the_readme(tmp_path: Path, world: World) -> None:
    rows = [world.row(1, source="a|b\n# [x](y) <script>", licence="*MIT* | \x1b[31m")]
    export(made(tmp_path, world, rows), "llava", tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in readme and "<script>" not in readme and "\n# [x]" not in readme


@pytest.mark.parametrize(("mode", "count"), [(Mode.THINK, 4), (Mode.DIRECT, 9)])
def test_one_mode_alone_can_be_exported(version: CorpusVersion, tmp_path: Path, mode: Mode, count: int) -> None:
    rows = records(export(version, "ms-swift", tmp_path / "out", modes=(mode,)))
    assert [row["mode"] for row in rows] == [str(mode)] * count


def test_a_mode_without_rows_is_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(ConfigError, match="no rows of mode think"):
        export(made(tmp_path, world, world.rows(think=0, direct=1)), "llava", tmp_path / "out", modes=(Mode.THINK,))
    assert not (tmp_path / "out").exists()


def test_both_modes_are_mixed_all_along(tmp_path: Path, world: World) -> None:
    rows = records(export(made(tmp_path, world, world.rows(think=10, direct=30)), "ms-swift", tmp_path / "out"))
    for start in range(0, 40, 8):
        assert [row["mode"] for row in rows[start : start + 8]].count("think") == 2


@pytest.mark.parametrize("kind", WITH_IMAGE_FILES)
def test_rows_are_split_into_files_in_order(version: CorpusVersion, tmp_path: Path, kind: str) -> None:
    whole = records(export(version, kind, tmp_path / "whole"))
    split = export(version, kind, tmp_path / "split", shard_rows=5)
    assert [file.num_rows for file in split.files] == [5, 5, 3]
    assert records(split) == whole


# --- Rows that a format cannot hold


MARKED = ["<image>", "a <image> b", "<video>", "<audio>", "<img>/etc/passwd</img>", "{{idx}}", "{{ROUND0}}", "<bbox>"]
HELD_BACK = {
    "llava": {0, 1},
    "llama-factory": {0, 1, 2, 3, 5},
    "ms-swift": {0, 1, 4, 6},
    "webdataset": set(),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_whose_text_is_a_mark_is_left_out_and_named(tmp_path: Path, world: World, kind: str) -> None:
    asking = [world.row(number, question=f"What does {mark} do?") for number, mark in enumerate(MARKED)]
    telling = [world.row(100 + number, answer=f"It is {mark}.") for number, mark in enumerate(MARKED)]
    plain = [world.row(1000)]
    exported = export(made(tmp_path, world, [*asking, *telling, *plain]), kind, tmp_path / "out")
    held_back = {rows[number].sample.id for rows in (asking, telling) for number in HELD_BACK[kind]}
    path = tmp_path / "out" / "left_out.jsonl"
    named = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert {row["id"] for row in named} == held_back and {row["reason"] for row in named} <= {"mark_in_text"}
    assert exported.left_out == ({"mark_in_text": len(held_back)} if held_back else {})
    assert exported.num_rows == 17 - len(held_back)


questions = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(MARKED)
texts = questions.filter(lambda text: bool(text.strip()))


@settings(max_examples=15)
@given(rows=st.lists(st.tuples(texts, texts, st.integers(0, 2), st.booleans()), min_size=1, max_size=8))
@pytest.mark.parametrize("kind", WITH_IMAGE_FILES)
def test_every_row_is_written_as_it_was_or_left_out(kind: str, rows: list[tuple[str, str, int, bool]]) -> None:
    world = World()
    made_rows = [
        world.row(number, question=question, answer=answer, colours=("red", "blue")[:images], reasoning=why)
        for number, (question, answer, images, thinks) in enumerate(rows)
        for why in ["because " + question if thinks else ""]
    ]
    with tempfile.TemporaryDirectory() as folder:
        version = made(Path(folder), world, made_rows)
        exported = export(version, kind, Path(folder) / "out")
        found = answers(exported)
        path = Path(folder) / "out" / "left_out.jsonl"
        left = [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []
        ids = [row["id"] for row in records(exported)]
    assert sorted([*ids, *left]) == sorted(row.sample.id for row in made_rows)
    expected = {row.sample.id: render_completion(row.answer, row.reasoning) for row in made_rows}
    assert [expected[id] for id in ids] == found


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_json_that_begins_with_ten_megabytes_of_text_only_rows_still_loads(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes the columns' types from the first 10 MiB: there, a list of no images has no type."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    text_only = [world.row(number, colours=(), question="x" * 500_000) for number in range(24)]
    rows = [*text_only, world.row(99, question="<image>"), world.row(100, question="What colour?")]
    exported = export(made(tmp_path, world, rows), "llama-factory", tmp_path / "out")
    assert [len(row["images"]) for row in records(exported)] == [1, *[0] * 24]
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out" / "train.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [len(images) for images in loaded["images"]] == [1, *[0] * 24]


# --- Folders


def test_the_same_export_is_not_made_again(version: CorpusVersion, tmp_path: Path) -> None:
    first = export(version, "llava", tmp_path / "out")
    before = files(tmp_path / "out")
    again = export(version, "llava", tmp_path / "out")
    assert first.is_new and not again.is_new
    assert again.to_record() == first.to_record() and files(tmp_path / "out") == before


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_version_gives_the_same_bytes(version: CorpusVersion, tmp_path: Path, kind: str) -> None:
    export(version, kind, tmp_path / "one", shard_rows=4)
    export(version, kind, tmp_path / "two", shard_rows=4)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_another_export_stands_until_it_is_overwritten(version: CorpusVersion, tmp_path: Path) -> None:
    export(version, "llava", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another export \(llava of tests v0001\).*--overwrite"):
        export(version, "ms-swift", tmp_path / "out")
    export(version, "ms-swift", tmp_path / "out", overwrite=True)
    export(version, "ms-swift", tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_export_made_is_never_touched(version: CorpusVersion, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex', which no export made"):
        export(version, "llava", tmp_path / "out", overwrite=overwrite)
    assert files(tmp_path / "out") == {"thesis.tex": b"years of work"}
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match=r"which no export made"):
        export(version, "llava", tmp_path, overwrite=overwrite)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.json").write_text("[]")  # named as one of ours, in a folder that is not
    with pytest.raises(ConfigError, match=r"holds 'train\.json', which no export made"):
        export(version, "llava", tmp_path / "own", overwrite=overwrite)


def test_an_output_that_is_a_file_is_an_error(version: CorpusVersion, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out is a file, not a folder"):
        export(version, "llava", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


# --- Interruptions and damage


class Stop(Exception):
    pass


def stopping_after(num_rows: int) -> Callable[[int, int], None]:
    def progress(num_done: int, num_all: int) -> None:
        if num_done == num_rows:
            raise Stop

    return progress


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 5, 9])
def test_an_interrupted_export_never_looks_finished_and_starts_again(
    version: CorpusVersion, tmp_path: Path, kind: str, num_rows: int
) -> None:
    with pytest.raises(Stop):
        export(version, kind, tmp_path / "out", shard_rows=4, progress=stopping_after(num_rows))
    assert not (tmp_path / "out" / "export.json").exists()
    assert (tmp_path / "out" / "export.unfinished.json").exists()
    export(version, kind, tmp_path / "out", shard_rows=4)
    export(version, kind, tmp_path / "fresh", shard_rows=4)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_an_export_killed_while_another_is_replaced_leaves_neither_finished(
    version: CorpusVersion, tmp_path: Path
) -> None:
    export(version, "llava", tmp_path / "out")
    with pytest.raises(Stop):
        export(version, "ms-swift", tmp_path / "out", overwrite=True, progress=stopping_after(3))
    assert not (tmp_path / "out" / "export.json").exists()
    export(version, "llama-factory", tmp_path / "out")  # the rest of an unfinished export is in nobody's way
    export(version, "llama-factory", tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


KILLED = """
import os, sys
from corpus.exports import FORMATS, export_corpus, open_version
progress = lambda num_done, num_rows: os._exit(9) if num_done == 6 else None
export_corpus(open_version(sys.argv[1]), FORMATS["ms-swift"], sys.argv[2], shard_rows=4, progress=progress)
"""


def test_what_a_killed_process_left_half_written_is_cleared_away(version: CorpusVersion, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(version.place), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ}, check=False).returncode == 9
    assert any(".writing-" in name for name in files(tmp_path / "out"))
    export(version, "ms-swift", tmp_path / "out", shard_rows=4)
    export(version, "ms-swift", tmp_path / "fresh", shard_rows=4)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_damaged_shard_is_named_and_ends_the_export(version: CorpusVersion, tmp_path: Path) -> None:
    shard = tmp_path / "corpus" / "v0001" / version.manifest.shards[-1].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(CorpusError, match=f"{version.manifest.shards[-1].path} was altered"):
        export(version, "llava", tmp_path / "out")
    shard.unlink()
    with pytest.raises(CorpusError, match=f"{version.manifest.shards[-1].path} is missing"):
        export(version, "llava", tmp_path / "out")
    assert not (tmp_path / "out" / "export.json").exists()


def test_a_folder_that_cannot_be_written_is_named(version: CorpusVersion, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=str(tmp_path / "file" / "out")):
        export(version, "llava", tmp_path / "file" / "out")


def test_progress_ends_with_all_rows(version: CorpusVersion, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(version, "llava", tmp_path / "out", progress=lambda done, rows: told.append((done, rows)))
    assert told == [(number, 13) for number in range(1, 14)]
