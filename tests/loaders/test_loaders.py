"""Exports read, rendered and trained on by the tools they are for, each with its own code in its own environment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.loaders.checking import (
    TOOLS,
    Loaded,
    differences,
    export_for,
    exported_rows,
    load_export,
    why_missing,
)
from corpus.exports import CorpusVersion, open_version
from corpus.exports.rows import ExportRow
from schemas.samples import ImageRef
from tests.corpus.conftest import World, build

pytestmark = pytest.mark.slow

ODD = [
    "Two and five?\n\n  Indented, with  two spaces and a tab\t.",
    "¿Qué? 数は？ \u202eעברית\u202c 😀 e\u0301",
    "{{content}} {{QUERY}} {{RESPONSE}} {{SYSTEM}} {% raw %} {{ x }}",
    "<bbox> <ref-object> <cot-process> [image 1] </s> <s> <br> &lt;image&gt;",
    "user\nHuman: assistant: ### Response:",
    "2024-01-01T00:00:00",
    "null",
]


class LargePictures(World):
    """Pictures that no tool scales: of Qwen2.5-VL, 28 x 28 pixels are a token, and LLaMA-Factory wants 32 x 32."""

    def image(self, colour: str, size: tuple[int, int] = (84, 56)) -> ImageRef:
        return super().image(colour, size)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> CorpusVersion:
    """Both modes, one image, several and none, odd texts on both sides, and a row that the tools could not read."""
    world = LargePictures()
    rows = [
        *(world.row(n, reasoning=f"Three and four make seven, says step {n}.") for n in range(6)),
        *(world.row(100 + n, colours=("blue", "lime", "red")[: n % 4]) for n in range(8)),
        *(world.row(200 + n, question=text, answer=text, colours=("red",)[: n % 2]) for n, text in enumerate(ODD)),
        *(world.row(300 + n, question=text, reasoning=f"{text} Then.") for n, text in enumerate(ODD)),
        world.row(400, question="Where is <image>?"),
    ]
    return open_version(build(tmp_path_factory.mktemp("corpus"), world, rows).commit().folder)


@dataclass(frozen=True)
class Run:
    rows: list[ExportRow]
    loaded: Loaded


@pytest.fixture(scope="module")
def run_tool(version: CorpusVersion, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Returns what a tool made of the export and of two training steps; of the same call, once."""

    @functools.cache
    def run(tool: str, *, shard_rows: int | None = None, template: str | None = None, think: bool = True) -> Run:
        if reason := why_missing(tool):
            pytest.skip(reason)
        folder = tmp_path_factory.mktemp(tool)
        exported = export_for(tool, version, folder / "export", shard_rows=shard_rows)
        assert exported.left_out == {"mark_in_text": 1}
        num_steps = 2 if shard_rows is None and template is None else 0
        options = {} if think else {"enable_thinking": False}
        loaded = load_export(tool, exported, folder / "run", num_steps=num_steps, template=template, options=options)
        return Run(exported_rows(version, exported), loaded)

    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_gives_the_model_each_row_as_it_stands_in_the_corpus(run_tool: Callable[..., Run], tool: str) -> None:
    run = run_tool(tool)
    assert differences(run.rows, run.loaded.rows) == []
    assert sum(row.learned.startswith("<think>\n\n</think>") for row in run.loaded.rows) == 8 + len(ODD)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_the_rows_of_a_split_export(run_tool: Callable[..., Run], tool: str) -> None:
    run = run_tool(tool, shard_rows=5)  # and takes its files in the order of the disk
    expected = [row.completion + "<|im_end|>\n" for row in run.rows]
    assert sorted(row.learned for row in run.loaded.rows) == sorted(expected)


def test_both_tools_train_and_begin_with_the_same_loss(run_tool: Callable[..., Run]) -> None:
    """They see the same tokens, images and targets, or their losses would differ."""
    first, second = (run_tool(tool).loaded.losses for tool in TOOLS)
    assert len(first) == len(second) == 2
    assert first[0] == pytest.approx(second[0], rel=1e-3)


@pytest.mark.parametrize("think", [True, False])
def test_reasoning_templates_of_llama_factory_keep_every_think_block(run_tool: Callable[..., Run], think: bool) -> None:
    run = run_tool("llama-factory", template="qwen3_vl", think=think)
    assert differences(run.rows, run.loaded.rows) == []
