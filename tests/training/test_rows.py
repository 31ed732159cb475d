from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from schemas.errors import TrainingError
from schemas.template import CHAT_TEMPLATE
from tests.training.corpora import Row, png, write_corpus
from training.rows import RowMeasures, Skip, load_rows, measure_rows, without_thoughts

pytestmark = pytest.mark.filterwarnings("default")

ROWS = [
    Row(),
    Row(images=(png(84, 56),)),
    Row(thought="red is 3.\n3 + 4 = 7.", images=(png(28, 28), png(112, 84))),
    Row(question="名前は? Ünïcode\n\n\tx", answer="été\n\n7", thought="1\n\n\n2"),
    Row(answer="a", images=(png(500, 333),)),  # larger than the processor allows: it is scaled
]


def processor_of(small_model: Path, family: str) -> Any:
    processor = AutoProcessor.from_pretrained(small_model)
    if family == "qwen2.5-vl":
        return processor
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
    shape = {"patch_size": 16, "merge_size": 2, "size": pixels}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=processor.tokenizer,
        video_processor=Qwen3VLVideoProcessor(**shape),
        chat_template=CHAT_TEMPLATE,
    )


def measured(path: Path, processor: Any, folder: Path, *, strip_thoughts: bool = False) -> RowMeasures:
    folder.mkdir(exist_ok=True)
    return measure_rows(load_rows([str(path)]), processor, folder, strip_thoughts=strip_thoughts)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("strip_thoughts", [False, True])
def test_a_row_is_as_long_as_the_trainer_makes_it(
    small_model: Path, tmp_path: Path, family: str, strip_thoughts: bool
) -> None:
    processor = processor_of(small_model, family)
    path = write_corpus(tmp_path / "rows.parquet", ROWS)
    rows = without_thoughts(load_rows([str(path)])) if strip_thoughts else load_rows([str(path)])
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    lengths = [int(collate([row])["attention_mask"].sum()) for row in rows]
    found = measured(path, processor, tmp_path, strip_thoughts=strip_thoughts)
    assert found.num_tokens.tolist() == lengths
    assert found.thinks.tolist() == [False, False, True, True, False]
    assert found.faults.tolist() == [0] * 5


def faulty(row: Row, **changes: Any) -> dict[str, Any]:
    return {**row.record(), **changes}


def answer_text(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


SEEN = Row(images=(png(56, 56),))
FAULTY = [
    (faulty(SEEN, completion=answer_text("7")), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=answer_text("<think>\nnever ended")), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=answer_text("<think>\n\n</think>")), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=answer_text("<think>\n\n</think>a<think>b")), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=answer_text("<think>no newline</think>7")), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=[]), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, completion=[*SEEN.record()["completion"]] * 2), Skip.MALFORMED_COMPLETION),
    (faulty(SEEN, images=[]), Skip.MISMATCHED_IMAGES),
    (faulty(SEEN, images=None), Skip.MISMATCHED_IMAGES),
    (faulty(Row(), images=[{"bytes": png(56, 56), "path": None}]), Skip.MISMATCHED_IMAGES),
    (faulty(Row(question="What is <|image_pad|>?")), Skip.MISMATCHED_IMAGES),
    (faulty(SEEN, images=[{"bytes": b"GIF89a, not an image", "path": None}]), Skip.UNUSABLE_IMAGE),
    (faulty(SEEN, images=[{"bytes": None, "path": "/etc/hostname"}]), Skip.UNUSABLE_IMAGE),
    (faulty(Row(images=(png(2, 900),))), Skip.UNUSABLE_IMAGE),  # the processor takes sides of 1 : 200 at most
]


@pytest.mark.parametrize(("record", "reason"), FAULTY)
def test_a_row_that_cannot_be_trained_on_is_counted_under_its_reason(
    small_model: Path, tmp_path: Path, record: dict[str, Any], reason: Skip
) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [Row(), record, SEEN])
    found = measured(path, AutoProcessor.from_pretrained(small_model), tmp_path)
    assert found.usable(10_000).tolist() == [True, False, True]
    assert {name: count for name, count in found.num_skipped(10_000).items() if count} == {str(reason): 1}


def test_a_row_may_be_exactly_as_long_as_allowed(small_model: Path, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [Row(), Row(images=(png(84, 84),))])
    found = measured(path, AutoProcessor.from_pretrained(small_model), tmp_path)
    short, long = found.num_tokens.tolist()
    assert long == short + 11  # nine tokens of 28 x 28 pixels between two that mark the image
    assert found.usable(long).tolist() == [True, True]
    assert found.usable(long - 1).tolist() == [True, False]
    assert found.num_skipped(short - 1)["too_long"] == 2
    assert found.num_skipped(long)["too_long"] == 0


def test_no_image_is_decoded_to_be_measured(small_model: Path, tmp_path: Path) -> None:
    cut_off = png(84, 56)[:60]  # the header, and the first bytes of the pixels
    path = write_corpus(tmp_path / "rows.parquet", [Row(images=(cut_off,)), Row(images=(png(84, 56),))])
    found = measured(path, AutoProcessor.from_pretrained(small_model), tmp_path)
    assert found.num_tokens[0] == found.num_tokens[1]


def test_an_image_damaged_behind_its_header_is_a_clear_error_when_it_is_decoded(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [Row(images=(png(84, 56)[:60],))])
    with pytest.raises(TrainingError, match="an image of 60 bytes cannot be decoded"):
        load_rows([str(path)])[0]


def test_rows_are_measured_once_and_again_when_what_shapes_them_changes(small_model: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(small_model)
    path = write_corpus(tmp_path / "rows.parquet", ROWS)
    runs = tmp_path / "run"
    first = measured(path, processor, runs)
    (file,) = runs.iterdir()
    written = file.stat().st_mtime_ns
    processor.tokenizer(
        ["a", "longer"], padding=True, truncation=True, max_length=9
    )  # leaves its traces in the tokenizer
    assert measured(path, processor, runs).num_tokens.tolist() == first.num_tokens.tolist()
    assert [f.stat().st_mtime_ns for f in runs.iterdir()] == [written]
    processor.image_processor.size["longest_edge"] = 28 * 28 * 4
    assert measured(path, processor, runs).num_tokens[4] < first.num_tokens[4]
    processor.tokenizer.add_tokens(["What number"])
    assert measured(path, processor, runs).num_tokens[0] < first.num_tokens[0]
    assert measured(path, processor, runs, strip_thoughts=True).num_tokens[2] < first.num_tokens[2]
    assert len(list(runs.iterdir())) == 4


def test_a_processor_that_cannot_tell_the_tokens_of_an_image_is_refused(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(TrainingError, match="cannot tell how many tokens an image takes"):
        measure_rows(load_rows([str(path)]), PreTrainedTokenizerFast, tmp_path, strip_thoughts=False)


def test_a_thought_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", ROWS)
    kept, stripped = load_rows([str(path)]), without_thoughts(load_rows([str(path)]))
    texts = [row["completion"][0]["content"][0]["text"] for row in stripped]
    answers = ["7", "7", "7", "été\n\n7", "a"]
    assert texts == [f"<think>\n\n</think>{answer}" for answer in answers]
    for before, after in zip(kept, stripped, strict=True):
        assert {**before, "completion": None} == {**after, "completion": None}
    assert [before["completion"] == after["completion"] for before, after in zip(kept, stripped, strict=True)] == [
        True,
        True,
        False,
        False,
        True,
    ]
