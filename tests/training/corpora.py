"""Small corpora written by hand, in the columns that annealing reads."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from schemas.template import render_completion

_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
SCHEMA = pa.schema([("prompt", _MESSAGES), ("completion", _MESSAGES), ("images", _IMAGES)])


@dataclass(frozen=True, slots=True)
class Row:
    """One row. thought: "" for a direct row. images: encoded images, each with its place in the prompt."""

    question: str = "What number is in the red cell?"
    answer: str = "7"
    thought: str = ""
    images: tuple[bytes, ...] = ()

    def record(self) -> dict[str, Any]:
        places = [{"type": "image", "text": None} for _ in self.images]
        completion = render_completion(self.answer, self.thought)
        return {
            "prompt": [{"role": "user", "content": [*places, {"type": "text", "text": self.question}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": completion}]}],
            "images": [{"bytes": image, "path": None} for image in self.images],
        }


def png(width: int, height: int, shade: int = 0) -> bytes:
    """Returns an image of one colour. Of width and height, 28 pixels are one token of Qwen2.5-VL."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 255 - shade, 128)).save(stream, "PNG")
    return stream.getvalue()


def write_corpus(path: Path, rows: Iterable[Row | dict[str, Any]]) -> Path:
    """Writes rows, or records made by hand, as one Parquet file and returns its path."""
    records = [row.record() if isinstance(row, Row) else row for row in rows]
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path)
    return path
