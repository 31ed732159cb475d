"""The sample as a project of Label Studio, and the annotations that it exports as JSON.

`tasks.json` is imported as data, `config.xml` is pasted as the labeling interface. Images travel inside the tasks as
data URLs, made small enough for Label Studio's limit on uploads, so no storage has to be connected.

See labelstud.io/guide/task_format and labelstud.io/guide/export.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from corpus.annotation import ASKED, AnnotationItem, Mark
from corpus.annotation_csv import read_mark
from corpus.marks import GivenMark, Problems
from corpus.shown_text import plain_text
from corpus.storage import storage_errors, write_bytes, write_text
from schemas.errors import SourceError

TASKS, CONFIG = "tasks.json", "config.xml"
IMAGE_SIDE_PIXELS = 1024
IMAGE_BYTES = 200_000
_MAX_SOURCE_PIXELS = 64_000_000
_TEXT_CHARACTERS = 32_000
_NOTHING = "(not part of this question)"

LABEL_CONFIG = f"""<View>
  <Text name="asked" value="$asked"/>
  <Image name="images" valueList="$images" zoom="true" zoomControl="true"/>
  <Text name="question" value="$question"/>
  <Text name="reference" value="$reference"/>
  <Text name="reply" value="$reply"/>
  <Choices name="mark" toName="question" choice="single" required="true" showInline="true">
    <Choice value="{Mark.YES}" hotkey="1"/>
    <Choice value="{Mark.NO}" hotkey="2"/>
    <Choice value="{Mark.CANT_TELL}" hotkey="3"/>
  </Choices>
  <TextArea name="comment" toName="question" placeholder="comment, if any" rows="2"/>
</View>
"""


def write_project(items: Iterable[AnnotationItem], folder: Path) -> Path:
    """Writes tasks, in order, and configuration. Returns the tasks' path. Raises StorageError."""
    tasks = [{"data": _task_data(item)} for item in items]
    write_text(folder / CONFIG, LABEL_CONFIG)
    path = folder / TASKS
    write_bytes(path, json.dumps(tasks, ensure_ascii=False, indent=1).encode("utf-8", "replace"))
    return path


def _task_data(item: AnnotationItem) -> dict[str, Any]:
    # Every variable of the configuration must be in every task, and a list of images must not be empty.
    texts = {"question": item.question, "reference": item.reference or _NOTHING, "reply": item.reply or _NOTHING}
    shown = {name: plain_text(text, _TEXT_CHARACTERS).text for name, text in texts.items()}
    images = [data_url(image) for image in item.images] or [_sign("no image")]
    return {"item": item.id, "asked": ASKED[item.check], "images": images, **shown}


def data_url(content: bytes) -> str:
    """Returns an image as a data URL of at most `IMAGE_SIDE_PIXELS` a side and about `IMAGE_BYTES`.

    One that cannot be decoded becomes a picture that says so.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > _MAX_SOURCE_PIXELS:
                return _sign("image too large to be shown")
            image.draft("RGB", (2 * IMAGE_SIDE_PIXELS, 2 * IMAGE_SIDE_PIXELS))
            full = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return _sign("image cannot be decoded")
    full.thumbnail((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS))
    flat = Image.new("RGB", full.size, "white")
    flat.paste(full, mask=full)
    encoded = _encoded(flat, "PNG")
    for quality in (90, 75, 50):
        if len(encoded) <= IMAGE_BYTES:
            break
        encoded = _encoded(flat, "JPEG", quality=quality)
    kind = "png" if encoded.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"


def _encoded(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _sign(text: str) -> str:
    image = Image.new("RGB", (280, 40), "white")
    ImageDraw.Draw(image).text((10, 14), text, fill="gray")
    return f"data:image/png;base64,{base64.b64encode(_encoded(image, 'PNG')).decode('ascii')}"


def read_export(path: Path) -> tuple[list[GivenMark], Problems]:
    """Returns the marks in a JSON export, of every annotator, and what is none: skipped, empty or foreign annotations.

    Raises SourceError: it is no such export (the formats JSON-MIN and CSV leave out who skipped). StorageError: it
    cannot be read.
    """
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        tasks = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON: {error}") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise SourceError(f"{path} is no export of Label Studio: export as JSON, which is a list of tasks")
    if tasks and not any("annotations" in task for task in tasks):
        raise SourceError(f"{path} holds no annotations: export as JSON, not as JSON-MIN, and after people marked it")
    problems = Problems()
    return [mark for number, task in enumerate(tasks, 1) for mark in _task_marks(task, number, problems)], problems


def _task_marks(task: Mapping[str, Any], number: int, problems: Problems) -> Iterator[GivenMark]:
    data, annotations = task.get("data"), task.get("annotations")
    item = data.get("item") if isinstance(data, dict) else None
    place = f"task {task.get('id', number)}"
    if not isinstance(item, str) or not item:
        problems.note("no item", place)
        return
    given = [annotation for annotation in annotations or [] if isinstance(annotation, dict)]
    if not given:
        problems.note("no mark", f"{place}: {item[:80]}")
    for annotation in given:
        if annotation.get("was_cancelled"):
            problems.note("skipped", f"{place}: {item[:80]} by {_annotator(annotation)}")
            continue
        said = _said(annotation, "mark", "choices")
        mark = read_mark(said[0]) if len(said) == 1 else None
        if not said:
            problems.note("no mark", f"{place}: {item[:80]} by {_annotator(annotation)}")
        elif mark is None:
            problems.note("mark that cannot be read", f"{place}: {', '.join(said)[:40]!r}")
        else:
            comment = " ".join(_said(annotation, "comment", "text"))
            yield GivenMark(item, _annotator(annotation), mark, comment, place)


def _said(annotation: Mapping[str, Any], name: str, kind: str) -> list[str]:
    """Returns what an annotation says in the control of a name."""
    result = annotation.get("result")
    said: list[str] = []
    for region in result if isinstance(result, list) else []:
        value = region.get("value") if isinstance(region, dict) and region.get("from_name") == name else None
        values = value.get(kind) if isinstance(value, dict) else None
        # A single text may stand without its list.
        said += [values] if isinstance(values, str) else [v for v in values or [] if isinstance(v, str)]
    return said


def _annotator(annotation: Mapping[str, Any]) -> str:
    """Returns who made an annotation: an e-mail address where the export has it, else the number of the user."""
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return plain_text(str(who), 100).text if who not in (None, "") else "unknown"
