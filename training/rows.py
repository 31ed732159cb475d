"""The corpus as training programs read it: columns of Parquet files, images decoded when a row is read.

Before supervised training each row is *measured*, so that nothing has to be cut later: its mode, its tokens (those of
its images included, from their sizes alone, without decoding one) and whether it can be trained on at all. The measures
lie in a file of the run's folder, which a resumed run reads instead of measuring again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Features, Value, load_dataset
from PIL import Image

from corpus.storage import storage_errors
from schemas.errors import RowError, TrainingError
from schemas.template import Completion, parse_completion, render_completion
from schemas.verdicts import Mode

TRAINING_COLUMNS = ("prompt", "completion", "images")
ROWS_PER_MEASURE = 256


class Skip(StrEnum):
    """Why a row is not trained on. Rows skipped are counted in result.json."""

    TOO_LONG = "too_long"
    """It has more tokens than allowed, images included. Cutting it would lose image tokens or the answer."""
    MALFORMED_COMPLETION = "malformed_completion"
    """Its completion is not one message in the bi-mode form, byte for byte: the token after `<think>` is the choice."""
    MISMATCHED_IMAGES = "mismatched_images"
    """Its prompt has places for another number of images than the row holds."""
    UNUSABLE_IMAGE = "unusable_image"
    """An image has no bytes, is of no known format, or has a shape that the model's processor refuses."""


_FAULTS = (None, Skip.MALFORMED_COMPLETION, Skip.MISMATCHED_IMAGES, Skip.UNUSABLE_IMAGE)
_MEASURES = Features({"thinks": Value("bool"), "num_tokens": Value("int32"), "fault": Value("int8")})


@dataclass(frozen=True, slots=True)
class RowMeasures:
    """What is known of each row without decoding its images; six bytes a row.

    thinks [num_rows]: the completion has a thought. num_tokens [num_rows]: tokens of prompt, images and completion, as
    they would be trained on; 0 for a faulty row. faults [num_rows]: index into the reasons, 0 for a sound row.
    """

    thinks: npt.NDArray[np.bool_]
    num_tokens: npt.NDArray[np.int32]
    faults: npt.NDArray[np.int8]

    def usable(self, max_length: int) -> npt.NDArray[np.bool_]:
        """Returns which rows are sound and have at most `max_length` tokens [num_rows]."""
        usable: npt.NDArray[np.bool_] = (self.faults == 0) & (self.num_tokens <= max_length)
        return usable

    def reason(self, row: int) -> str:
        """Returns why a row that is not usable is skipped."""
        return str(_FAULTS[self.faults[row]] or Skip.TOO_LONG)

    def num_skipped(self, max_length: int) -> dict[str, int]:
        """Returns how many rows are skipped for each reason, every reason named."""
        found = Counter(self.faults.tolist())
        counts = {str(reason): found[index] for index, reason in enumerate(_FAULTS) if reason is not None}
        return {str(Skip.TOO_LONG): int((self.num_tokens > max_length).sum()), **counts}


def load_rows(patterns: list[str], columns: Sequence[str] = TRAINING_COLUMNS) -> Any:
    """Returns these columns of the corpus as a dataset, by default those that supervised training reads.

    Raises TrainingError: no file matches, a column is missing, or there is no row.
    """
    try:
        rows = load_dataset("parquet", data_files=patterns, split="train")
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "valid data file" not in str(error):
            raise
        raise TrainingError(f"no corpus file matches {patterns}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise TrainingError(f"{patterns} lack the columns {missing}; they have {rows.column_names}")
    if len(rows) == 0:
        raise TrainingError(f"{patterns} hold no rows")
    return rows.select_columns(list(columns)).with_transform(decode_rows)


def without_thoughts(rows: Any) -> Any:
    """Returns the rows of `load_rows` with the empty think block in place of each thought, and the same answers."""

    def decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        decoded = decode_rows(batch)
        return {**decoded, "completion": [[_without_thought(m) for m in row] for row in decoded["completion"]]}

    return rows.with_transform(decode)


def measure_rows(rows: Any, processor: Any, folder: Path, *, strip_thoughts: bool) -> RowMeasures:
    """Returns the measures of all rows of `load_rows`, from their file in the folder if it is there.

    The file's name holds a digest of the rows, the tokenizer and the image processor. Rows are read in batches, of
    their images the headers alone, so memory does not grow with the corpus. strip_thoughts: measure the rows as
    `without_thoughts` returns them; `thinks` still tells what the corpus says.

    Raises StorageError: the file cannot be written. TrainingError: the processor cannot tell an image's tokens.
    """
    return _measured(rows, _measure_batch, processor, folder, {"strip_thoughts": strip_thoughts})


def measure_prompts(rows: Any, processor: Any, folder: Path) -> RowMeasures:
    """Returns the measures of the prompts alone, up to and with `<think>`; no row thinks. Raises as `measure_rows`."""
    return _measured(rows, _measure_prompt_batch, processor, folder, {})


def _measured(
    rows: Any, measure: Callable[..., pa.Table], processor: Any, folder: Path, settings: dict[str, Any]
) -> RowMeasures:
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        raise TrainingError(
            f"{type(processor).__name__} cannot tell how many tokens an image takes: transformers' processors for "
            "models that vLLM serves do (Qwen2.5-VL, Qwen3-VL and others)"
        )
    digest = _measures_digest(rows, processor, [measure.__name__, settings])
    with storage_errors(folder, "write the measures of the rows in"):
        measured = rows.with_format("arrow").map(
            measure,
            fn_kwargs={"processor": processor, **settings},
            batched=True,
            batch_size=ROWS_PER_MEASURE,
            remove_columns=rows.column_names,
            features=_MEASURES,
            cache_file_name=str(folder / f"measures-{digest}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=digest,
            desc="measuring rows",
        )
    table = measured.with_format("arrow")[:]
    return RowMeasures(*(table[name].to_numpy() for name in ("thinks", "num_tokens", "fault")))


def _measures_digest(rows: Any, processor: Any, how: object) -> str:
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for of_last_call in ("padding", "truncation"):
        tokenizer.pop(of_last_call)
    images = processor.image_processor.to_json_string()
    shaped_by = [rows._fingerprint, tokenizer, str(processor.chat_template), images, how]
    return hashlib.sha256(json.dumps(shaped_by).encode()).hexdigest()[:16]


def _measure_batch(table: pa.Table, *, processor: Any, strip_thoughts: bool) -> pa.Table:
    """Returns the measures of some rows, one for one. The images of the table are not copied."""
    prompts, completions = (
        [[_plain_message(message) for message in row] for row in table[name].to_pylist()]
        for name in ("prompt", "completion")
    )
    parsed = [_parsed_completion(completion) for completion in completions]
    if strip_thoughts:
        completions = [
            [_without_thought(completion[0])] if found else completion
            for completion, found in zip(completions, parsed, strict=True)
        ]
    texts = [
        processor.apply_chat_template([*prompt, *completion], tokenize=False)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths, faults = [], []
    for row_ids, found, images in zip(ids, parsed, table["images"], strict=True):
        fault = None if found else Skip.MALFORMED_COMPLETION
        num_tokens = 0
        if fault is None:
            num_tokens, fault = _num_tokens(row_ids, images, processor)
        lengths.append(num_tokens)
        faults.append(_FAULTS.index(fault))
    thinks = [found is not None and found.mode is Mode.THINK for found in parsed]
    return pa.table({"thinks": thinks, "num_tokens": lengths, "fault": faults}, schema=_MEASURES.arrow_schema)


def _measure_prompt_batch(table: pa.Table, *, processor: Any) -> pa.Table:
    """Returns the measures of some rows' prompts, one for one."""
    texts = [
        processor.apply_chat_template(
            [_plain_message(message) for message in prompt], tokenize=False, add_generation_prompt=True
        )
        for prompt in table["prompt"].to_pylist()
    ]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = [_num_tokens(row_ids, images, processor) for row_ids, images in zip(ids, table["images"], strict=True)]
    columns = {
        "thinks": [False] * len(found),
        "num_tokens": [num_tokens for num_tokens, _ in found],
        "fault": [_FAULTS.index(fault) for _, fault in found],
    }
    return pa.table(columns, schema=_MEASURES.arrow_schema)


def _num_tokens(ids: list[int], images: pa.ListScalar, processor: Any) -> tuple[int, Skip | None]:
    """Returns the tokens of a row, 0 if its images are at fault, and the fault.

    ids: the row's text, with one token in the place of each image.
    """
    views = [image.as_buffer() for image in images.values.field("bytes")] if images.is_valid else []
    if ids.count(processor.image_token_id) != len(views):
        return 0, Skip.MISMATCHED_IMAGES
    if any(view is None for view in views):
        return 0, Skip.UNUSABLE_IMAGE
    try:
        # The bytes lie in a mapped file: reading through Arrow's view of them touches the header's pages alone.
        sizes = [Image.open(pa.BufferReader(view)).size for view in views]
        found = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, Skip.UNUSABLE_IMAGE
    return len(ids) - len(sizes) + sum(found.num_image_tokens), None


def decode_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns rows with images as RGB pictures and messages without the empty fields that Arrow adds."""
    decoded = dict(batch)
    for column in ("prompt", "completion"):
        if column in batch:
            decoded[column] = [[_plain_message(message) for message in row] for row in batch[column]]
    if "images" in batch:
        decoded["images"] = [[_decode_image(image) for image in row or ()] for row in batch["images"]]
    return decoded


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _message_text(message: Mapping[str, Any]) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _parsed_completion(completion: Sequence[Mapping[str, Any]]) -> Completion | None:
    """Returns reasoning and answer of a completion in the bi-mode form, None of any other."""
    if len(completion) != 1:
        return None
    text = _message_text(completion[0])
    found = parse_completion(text)
    try:
        return found if text == render_completion(found.answer, found.reasoning) else None
    except RowError:
        return None


def _without_thought(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the message of a bi-mode completion with the empty think block and the same answer."""
    text = render_completion(parse_completion(_message_text(message)).answer)
    return {"role": message["role"], "content": [{"type": "text", "text": text}]}


def _decode_image(image: Any) -> Image.Image:
    """Returns an image of the corpus as RGB. Raises TrainingError: its bytes are damaged behind a sound header."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return Image.open(io.BytesIO(image["bytes"])).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise TrainingError(f"an image of {len(image['bytes'])} bytes cannot be decoded: {error}") from error
