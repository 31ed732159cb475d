"""Images made in threads, many at a time, for askers in one event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

import teacher.images as images_module
from schemas.config import EndpointConfig
from schemas.errors import RowError, StorageError
from schemas.requests import Message, Sampling, TeacherRequest
from teacher.images import SentImages


def request_for(*images: str) -> TeacherRequest:
    return TeacherRequest("s", "performance", (Message("user", "look", images),), Sampling())


def content_of(sha256: str, max_pixels: int) -> tuple[bytes, str]:
    return sha256.encode(), "image/png"


async def test_many_images_wanted_at_once_are_each_made_once_and_reach_their_askers() -> None:
    made: list[str] = []

    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        made.append(sha256)
        return content_of(sha256, max_pixels)

    images = SentImages(EndpointConfig(), read_image, None)
    names = [f"{number % 300:03}" for number in range(900)]
    sent = await asyncio.gather(*(images.of_request(request_for(name)) for name in names))
    assert [list(each) for each in sent] == [[name] for name in names]
    assert all(each[name].uuid == f"{name}-1003520" for each, name in zip(sent, names, strict=True))
    assert len({each[name].url for each, name in zip(sent, names, strict=True)}) == 300
    assert sorted(made) == sorted(set(names))


async def test_an_image_that_cannot_be_read_fails_its_own_askers_only_and_is_tried_again() -> None:
    failures: list[Exception] = [StorageError("damaged"), OSError("gone"), ValueError("no image")]

    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        if sha256 == "bad" and failures:
            raise failures.pop()
        return content_of(sha256, max_pixels)

    images = SentImages(EndpointConfig(), read_image, None)
    for expected, reason in ((RowError, "no image"), (RowError, "gone"), (StorageError, "damaged")):
        good, bad = await asyncio.gather(
            images.of_request(request_for("good")), images.of_request(request_for("bad")), return_exceptions=True
        )
        assert isinstance(good, dict)
        assert isinstance(bad, expected) and reason in str(bad.detail if isinstance(bad, RowError) else bad)
    assert "bad" in await images.of_request(request_for("bad"))


async def test_an_asker_that_is_cancelled_leaves_the_image_to_the_others() -> None:
    may_go_on = threading.Event()

    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        may_go_on.wait(10)
        return content_of(sha256, max_pixels)

    images = SentImages(EndpointConfig(), read_image, None)
    first, second = (asyncio.create_task(images.of_request(request_for("aa"))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    may_go_on.set()
    assert list(await second) == ["aa"]


async def test_slow_images_are_made_by_several_threads_and_fast_ones_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def num_threads(seconds: float, num_images: int) -> int:
        threads = set()

        def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
            threads.add(threading.get_ident())
            time.sleep(seconds)
            return content_of(sha256, max_pixels)

        images = SentImages(EndpointConfig(), read_image, None)
        await asyncio.gather(*(images.of_request(request_for(f"{number}")) for number in range(num_images)))
        return len(threads)

    assert await num_threads(0.02, 40) > 1
    monkeypatch.setattr(images_module, "HAND_OVER_SECONDS", 60.0)
    assert await num_threads(0.0, 40) == 1


async def test_what_is_being_made_as_a_name_is_not_kept_once_images_go_as_bytes() -> None:
    may_go_on = threading.Event()

    def image_path(sha256: str, max_pixels: int) -> Path:
        may_go_on.wait(10)
        return Path("/images") / sha256

    images = SentImages(EndpointConfig(images_as="file_url"), content_of, image_path)
    named = asyncio.create_task(images.of_request(request_for("aa")))
    await asyncio.sleep(0)
    images.send_bytes()
    may_go_on.set()
    assert (await named)["aa"].url == "file:///images/aa" and images.num_bytes == 0
    assert (await images.of_request(request_for("aa")))["aa"].url.startswith("data:image/png;base64,")
