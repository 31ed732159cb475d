"""The image files of an export: each image once, under the sha256 of its bytes."""

from __future__ import annotations

import hashlib

from corpus.exports.formats import image_extension
from corpus.places import Place

IMAGES = "images"
"""The folder of the images in an export."""

_WAITING_BYTES = 32 * 2**20
_WAITING_IMAGES = 64
"""Images are written so many at a time, since an object store takes many at once."""

_KNOWN_IMAGES = 100_000
"""Names remembered as written. An image of an earlier row is looked up again, or on an object store written again."""


class ImageFiles:
    """Writes images below a folder, several at once; `flush` writes those that still wait."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._known: dict[str, None] = {}
        self._waiting: dict[str, bytes] = {}
        self._num_waiting_bytes = 0

    def add(self, content: bytes) -> str:
        """Returns the name of an image and sees to it that it is written. Raises RowError, StorageError."""
        digest = hashlib.sha256(content).hexdigest()
        name = f"{IMAGES}/{digest[:2]}/{digest}.{image_extension(content)}"
        if name not in self._known:
            if len(self._known) >= _KNOWN_IMAGES:
                del self._known[next(iter(self._known))]
            self._known[name] = None
            self._waiting[name] = content
            self._num_waiting_bytes += len(content)
            if len(self._waiting) >= _WAITING_IMAGES or self._num_waiting_bytes >= _WAITING_BYTES:
                self.flush()
        return name

    def flush(self) -> None:
        """Raises StorageError."""
        self._place.add_missing(self._waiting)
        self._waiting, self._num_waiting_bytes = {}, 0
