"""The corpus as training programs read it: columns of Parquet files, images decoded when a row is read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from datasets import load_dataset
from PIL import Image

from schemas.errors import TrainingError

TRAINING_COLUMNS = ("prompt", "completion", "images")


def load_rows(patterns: list[str], columns: Sequence[str] = TRAINING_COLUMNS) -> Any:
    """Returns these columns of the corpus as a dataset, by default those that supervised training reads.

    Raises TrainingError: no file matches, a column is missing, or there is no row.
    """
    try:
        rows = load_dataset("parquet", data_files=patterns, split="train")
    except FileNotFoundError as error:
        raise TrainingError(f"no corpus file matches {patterns}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise TrainingError(f"{patterns} lack the columns {missing}; they have {rows.column_names}")
    if len(rows) == 0:
        raise TrainingError(f"{patterns} hold no rows")
    return rows.select_columns(list(columns)).with_transform(_decode_rows)


def _decode_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns rows with images as RGB pictures and messages without the empty fields that Arrow adds."""
    decoded = dict(batch)
    for column in ("prompt", "completion"):
        if column in batch:
            decoded[column] = [[_plain_message(message) for message in row] for row in batch[column]]
    if "images" in batch:
        decoded["images"] = [[_decode_image(image) for image in row] for row in batch["images"]]
    return decoded


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _decode_image(image: Any) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))).convert("RGB")
