"""The images of a request as the server gets them: by name where it can read our files, else as bytes in the call."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from schemas.config import EndpointConfig
from schemas.errors import RowError, TeacherMisconfigured
from schemas.requests import TeacherRequest

IMAGE_CACHE_BYTES = 128 * 2**20
ENTRY_BYTES = 500
"""What a kept image takes besides its URL."""
HAND_OVER_SECONDS = 0.005
"""A thread hands over what it has made after this time at the latest."""
NUM_SLOW = 4
"""A thread that makes no more images than this until it hands them over gets another beside it."""
MAX_READERS = min(32, (os.cpu_count() or 1) + 4)
"""Threads that make images at a time: all that the event loop's own pool has."""

ReadImage = Callable[[str, int], tuple[bytes, str]]
"""(sha256, max_pixels) -> (encoded image reduced to at most so many pixels, MIME type)."""
ImagePath = Callable[[str, int], Path]
"""(sha256, max_pixels) -> file of the image with at most so many pixels."""


@dataclass(frozen=True, slots=True)
class SentImage:
    """url: data or file URL. uuid: names the content, so that a server that has seen it need not look at it again."""

    url: str
    uuid: str

    @property
    def num_bytes(self) -> int:
        """Memory it takes, about."""
        return len(self.url) + ENTRY_BYTES


_Wanted: TypeAlias = tuple[str, ImagePath | None, "asyncio.Future[SentImage]"]
_Made: TypeAlias = tuple[str, "asyncio.Future[SentImage]", SentImage | Exception]


class SentImages:
    """Makes the URLs of images, each once while it is needed: the samples of one question share its images.

    Used in one event loop. read_image, image_path: called in threads; images that are wanted while a thread is at work
    are made by it as well, because handing over each by itself costs more than reading it.
    num_bytes: memory of the URLs that are kept.

    Raises TeacherMisconfigured: names are wanted and there are no files.
    """

    def __init__(self, endpoint: EndpointConfig, read_image: ReadImage, image_path: ImagePath | None) -> None:
        if endpoint.images_as == "file_url" and image_path is None:
            raise TeacherMisconfigured("images_as: file_url needs images in a local folder; use data_url")
        self._max_pixels = endpoint.max_image_pixels
        self._read_image = read_image
        self._image_path = image_path if endpoint.images_as == "file_url" else None
        self._kept: OrderedDict[str, SentImage] = OrderedDict()  # in order of use
        self._under_way: dict[str, asyncio.Future[SentImage]] = {}
        self._wanted: deque[_Wanted] = deque()
        self._num_readers = 0
        self.num_bytes = 0

    @property
    def are_named(self) -> bool:
        """Whether images go by name."""
        return self._image_path is not None

    def send_bytes(self) -> None:
        """Sends images as bytes from now on: the server may not read our files."""
        self._image_path = None
        self._kept.clear()
        self._under_way.clear()
        self.num_bytes = 0

    async def of_request(self, request: TeacherRequest) -> dict[str, SentImage]:
        """Returns each image by its sha256. Raises RowError: an image cannot be read."""
        hashes = {sha256 for message in request.messages for sha256 in message.images}
        return {sha256: await self._sent(sha256) for sha256 in sorted(hashes)}

    async def _sent(self, sha256: str) -> SentImage:
        if sha256 in self._kept:
            self._kept.move_to_end(sha256)
            return self._kept[sha256]
        image = self._under_way.get(sha256)
        if image is None:
            image = self._under_way[sha256] = asyncio.get_running_loop().create_future()
            self._wanted.append((sha256, self._image_path, image))
            if not self._num_readers:
                self._start_reader()
        return await asyncio.shield(image)

    def _start_reader(self) -> None:
        self._num_readers += 1
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, self._read, loop)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes what is wanted until nothing is; runs in a thread."""
        made: list[_Made] = []
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits any more
            while self._wanted:
                try:
                    sha256, path, image = self._wanted.popleft()
                except IndexError:  # another thread took it
                    break
                made.append((sha256, image, self._outcome(sha256, path)))
                if time.monotonic() - began >= HAND_OVER_SECONDS:
                    loop.call_soon_threadsafe(self._hand_over, made)
                    made, began = [], time.monotonic()
            loop.call_soon_threadsafe(self._end_reader, made)

    def _end_reader(self, made: list[_Made]) -> None:
        self._num_readers -= 1
        self._settle(made)
        if self._wanted and not self._num_readers:
            self._start_reader()  # asked for while the thread was ending

    def _hand_over(self, made: list[_Made]) -> None:
        self._settle(made)
        # Slow images are being read from afar or made smaller: several at a time then.
        if self._wanted and len(made) <= NUM_SLOW and self._num_readers < MAX_READERS:
            self._start_reader()

    def _settle(self, made: list[_Made]) -> None:
        for sha256, image, outcome in made:
            is_current = self._under_way.get(sha256) is image
            if is_current:
                del self._under_way[sha256]
            if image.cancelled():
                continue
            if isinstance(outcome, SentImage):
                image.set_result(outcome)
                if is_current:
                    self._keep(sha256, outcome)
            else:
                image.set_exception(outcome)
                # An asker that was cancelled never looks at it; looking here keeps asyncio from complaining.
                image.exception()

    def _keep(self, sha256: str, sent: SentImage) -> None:
        self._kept[sha256] = sent
        self.num_bytes += sent.num_bytes
        while self.num_bytes > IMAGE_CACHE_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def _outcome(self, sha256: str, image_path: ImagePath | None) -> SentImage | Exception:
        """Returns an image, or why there is none."""
        uuid = f"{sha256}-{self._max_pixels}"
        try:
            if image_path is not None:
                return SentImage(image_path(sha256, self._max_pixels).absolute().as_uri(), uuid)
            content, mime = self._read_image(sha256, self._max_pixels)
            return SentImage(f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}", uuid)
        except (OSError, ValueError, KeyError) as error:
            reason = RowError("image_unreadable", f"image {sha256}: {error}")
            reason.__cause__ = error
            return reason
        except Exception as error:  # noqa: BLE001 (handed on to everyone who waits)
            return error
