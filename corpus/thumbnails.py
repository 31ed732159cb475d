"""Small copies of images, as data URLs for a page."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

IMAGE_SIDE_PIXELS = 384
IMAGE_BYTES = 40_000
"""An image is made smaller until it takes no more than so many bytes; base64 adds a third."""

MAX_SOURCE_PIXELS = 64_000_000
"""Larger images are not decoded for the report, whatever the limits of the run were."""

_SIDES = (IMAGE_SIDE_PIXELS, 256, 160, 96, 64)
_FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("PNG", {"optimize": True}),
    ("WEBP", {"quality": 80}),
    ("WEBP", {"quality": 50}),
)


def thumbnail(encoded: bytes, max_bytes: int = IMAGE_BYTES) -> str | None:
    """Returns an image as a data URL of at most `IMAGE_SIDE_PIXELS` a side and `max_bytes` before base64.

    None if it cannot be decoded or made so small. Its transparent parts become white.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_SOURCE_PIXELS:
                return None
            image.draft("RGB", (2 * IMAGE_SIDE_PIXELS, 2 * IMAGE_SIDE_PIXELS))
            small = image.convert("RGB" if image.mode in ("RGB", "L", "YCbCr") else "RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    small.thumbnail((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS), reducing_gap=2.0)
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small if small.mode == "RGBA" else None)
    for side in _SIDES:
        flat.thumbnail((side, side))
        for file_format, options in _FORMATS:
            buffer = io.BytesIO()
            flat.save(buffer, file_format, **options)
            if buffer.tell() <= max_bytes:
                content = base64.b64encode(buffer.getvalue()).decode("ascii")
                return f"data:image/{file_format.lower()};base64,{content}"
    return None
