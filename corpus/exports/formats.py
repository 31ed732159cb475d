"""The formats: what a row becomes in each, and which texts its loaders would take for something else.

Every record keeps the row's id, mode, source and licence. The loaders of LLaVA, LLaMA-Factory and ms-swift mark the
place of an image by the text `<image>`, and know no way to write that text itself. A row whose own text holds such a
mark is left out and named: changed, it would no longer be the row that was curated; unchanged, it would stop the
loader, show an image where none belongs, or, in ms-swift's `<img>`, have it open a file that the row names.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.exports.rows import ExportRow
from schemas.errors import RowError

Add = Callable[[ExportRow, Sequence[str]], None]
"""Adds a row to an open file. The names are those of its images, relative to the export's folder."""

_IMAGE = "<image>"
_EXTENSIONS = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)


@dataclass(frozen=True, slots=True)
class Format:
    """One export format.

    suffix: of its files. open: opens one of them for writing. marks: texts that its loaders read as something else.
    separator: between the marks of the images and the question. has_image_files: whether images are files of their
    own, each stored once, or stand beside their row. shard_rows: rows of a file unless the user says otherwise, None
    for one file.
    """

    name: str
    suffix: str
    open: Callable[[Path], Any]
    marks: tuple[str, ...] = ()
    has_image_files: bool = True
    shard_rows: int | None = None


def image_extension(content: bytes) -> str:
    """Returns the file extension of an encoded image. Raises RowError: `image_format_unknown`."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    found = next((extension for magic, extension in _EXTENSIONS if content.startswith(magic)), None)
    if found is None:
        raise RowError("image_format_unknown", f"an image begins with {content[:8]!r}, which no known format does")
    return found


def check_row(row: ExportRow, target: Format) -> None:
    """Raises RowError: `mark_in_text` or `image_count_differs`, where a format could not say what the row says."""
    if row.num_marks != len(row.images):
        detail = f"the prompt shows {row.num_marks} images, the row has {len(row.images)}"
        raise RowError("image_count_differs", detail)
    texts = [*(part for part in row.prompt if part is not None), row.completion]
    found = next((mark for mark in target.marks if any(mark in text for text in texts)), None)
    if found is not None:
        raise RowError("mark_in_text", f"the text holds {found}, which the loader of {target.name} reads as a mark")


def llava_record(row: ExportRow, images: Sequence[str]) -> dict[str, Any]:
    """Returns a row of LLaVA's conversations: `image` is a name, or a list where a row has several."""
    marks = f"{_IMAGE}\n" * len(images)
    asked = {"from": "human", "value": marks + "".join(part for part in row.prompt if part is not None)}
    record: dict[str, Any] = {"id": row.id}
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    return {**record, "conversations": [asked, {"from": "gpt", "value": row.completion}], **_provenance(row)}


def messages_record(row: ExportRow, images: Sequence[str]) -> dict[str, Any]:
    """Returns a row of messages with marks in their texts, as LLaMA-Factory and ms-swift read it.

    No newline stands between image and question: their templates then give the tokens that ours gives.
    """
    asked = "".join(_IMAGE if part is None else part for part in row.prompt)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row.completion}]
    return {"id": row.id, "messages": messages, "images": list(images), **_provenance(row)}


def parts_record(row: ExportRow, images: Sequence[str]) -> dict[str, Any]:
    """Returns a row of messages whose images are parts of their own, so that no text is a mark."""
    names = iter(images)
    parts = [
        {"type": "image", "image": next(names)} if part is None else {"type": "text", "text": part}
        for part in row.prompt
    ]
    answered = {"role": "assistant", "content": [{"type": "text", "text": row.completion}]}
    return {"id": row.id, "messages": [{"role": "user", "content": parts}, answered], **_provenance(row)}


def _provenance(row: ExportRow) -> dict[str, str]:
    return {"mode": row.mode, "source": row.source, "licence": row.licence}


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


@contextmanager
def open_json_array(path: Path) -> Iterator[Add]:
    """Opens a file that will be one JSON array, a row a line."""
    with path.open("wb") as file:
        before = b"[\n"

        def add(row: ExportRow, images: Sequence[str]) -> None:
            nonlocal before
            file.write(before + _encoded(llava_record(row, images)))
            before = b",\n"

        yield add
        file.write(b"\n]\n" if before != b"[\n" else b"[]\n")


@contextmanager
def open_json_lines(path: Path) -> Iterator[Add]:
    with path.open("wb") as file:

        def add(row: ExportRow, images: Sequence[str]) -> None:
            file.write(_encoded(messages_record(row, images)) + b"\n")

        yield add


@contextmanager
def open_tar(path: Path) -> Iterator[Add]:
    """Opens a tar whose bytes depend on its rows alone: no times, owners or modes of this machine.

    The images of a row are its members KEY.0.png, KEY.1.jpg, ..., and KEY.json names them.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:

        def add_member(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            file.addfile(member, io.BytesIO(content))

        def add(row: ExportRow, images: Sequence[str]) -> None:
            del images  # They lie beside their row, under its key.
            names = [f"{number}.{image_extension(image)}" for number, image in enumerate(row.images)]
            for name, image in zip(names, row.images, strict=True):
                add_member(f"{row.id}.{name}", image)
            add_member(f"{row.id}.json", _encoded(parts_record(row, names)))

        yield add


FORMATS = {
    target.name: target
    for target in (
        Format("llava", "json", open_json_array, marks=(_IMAGE,)),
        # {{idx}} is the number of the turn in LLaMA-Factory's templates, filled in after the question.
        Format("llama-factory", "jsonl", open_json_lines, marks=(_IMAGE, "<video>", "<audio>", "{{idx}}")),
        # {{ROUND0}}, {{ROUND1}}: the same in ms-swift's.
        Format("ms-swift", "jsonl", open_json_lines, marks=(_IMAGE, "<img>", "{{ROUND0}}", "{{ROUND1}}")),
        Format("webdataset", "tar", open_tar, has_image_files=False, shard_rows=1000),
    )
}
"""By name. TRL needs none: a corpus version is what it trains on."""
