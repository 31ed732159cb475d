"""The image store: one file per picture, plain RGB, limits before decoding."""

from __future__ import annotations

import hashlib
import io
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from schemas.config import ImageLimits
from schemas.errors import RowError, StorageError
from sources.images import ImageStore, reduced_size


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(store: ImageStore, sha256: str) -> Image.Image:
    with Image.open(io.BytesIO(store.read(sha256))) as image:
        image.load()
        assert image.mode == "RGB"
        return image


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", ImageLimits(max_bytes=200_000, max_pixels=10_000, min_side=2))


def reason(store: ImageStore, encoded: bytes) -> str:
    with pytest.raises(RowError) as caught:
        store.put(encoded)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_plain_rgb_image_keeps_its_bytes(store: ImageStore, kind: str) -> None:
    encoded = encode(noise(20, 10), kind)
    ref = store.put(encoded)
    assert (ref.width, ref.height) == (20, 10)
    assert ref.sha256 == hashlib.sha256(encoded).hexdigest()
    assert store.read(ref.sha256) == encoded


def test_one_image_is_stored_once(store: ImageStore) -> None:
    first = store.put(encode(Image.new("P", (5, 5))))
    assert store.put(encode(Image.new("P", (5, 5)))) == first
    assert len([path for path in store.root.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 128), "PNG", (128, 128, 128)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("P", (4, 4), 0), "GIF", (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF", (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)), "PNG", (100, 100, 100)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "BMP", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "PPM", (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb_on_white(
    store: ImageStore, image: Image.Image, kind: str, expected: tuple[int, int, int]
) -> None:
    ref = store.put(encode(image, kind))
    assert pixels(store, ref.sha256).getpixel((1, 1)) == expected


def test_a_transparent_colour_of_an_rgb_png_becomes_white(store: ImageStore) -> None:
    encoded = encode(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9))
    assert pixels(store, store.put(encoded).sha256).getpixel((0, 0)) == (255, 255, 255)


def test_a_cmyk_jpeg_loses_its_profile_and_becomes_rgb(store: ImageStore) -> None:
    encoded = encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", icc_profile=b"profile of cmyk")
    image = pixels(store, store.put(encoded).sha256)
    assert image.getpixel((4, 4)) == (255, 255, 255)
    assert "icc_profile" not in image.info


def test_an_image_is_put_upright(store: ImageStore) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    ref = store.put(encode(noise(20, 10), "JPEG", exif=exif))
    assert (ref.width, ref.height) == (10, 20)
    assert pixels(store, ref.sha256).getexif().get(0x0112, 1) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_does_not_cost_the_image(store: ImageStore) -> None:
    encoded = encode(noise(20, 10), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff nonsense")
    assert store.put(encoded).width == 20


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_kept(store: ImageStore, kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    encoded = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pixels(store, store.put(encoded).sha256).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_a_truncated_image_is_refused(store: ImageStore, kind: str) -> None:
    encoded = encode(noise(40, 40), kind)
    for length in (len(encoded) // 2, 30, 5):
        assert reason(store, encoded[:length]) == "image_unreadable"


@pytest.mark.parametrize("encoded", [b"", b"x", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x00" * 100])
def test_what_is_no_image_is_refused(store: ImageStore, encoded: bytes) -> None:
    assert reason(store, encoded) == "image_unreadable"


def test_limits_are_exact(store: ImageStore) -> None:
    assert store.put(encode(Image.new("RGB", (100, 100)))).num_pixels == 10_000
    assert reason(store, encode(Image.new("RGB", (101, 100)))) == "image_too_large_pixels"
    assert store.put(encode(Image.new("RGB", (2, 2)))).num_pixels == 4
    assert reason(store, encode(Image.new("RGB", (1, 50)))) == "image_too_small"
    assert reason(store, bytes(200_001)) == "image_too_large_bytes"


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(store: ImageStore, side: int) -> None:
    head = bytearray(encode(Image.new("RGB", (1, 1))))
    head[16:24] = side.to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    assert reason(store, bytes(head)) == "image_too_large_pixels"


def test_sixteen_bit_colour_is_stored_with_eight(store: ImageStore) -> None:
    rows = b"".join(b"\x00" + b"\xff\xff\x80\x80\x00\x00" * 4 for _ in range(4))
    chunks = [
        (b"IHDR", (4).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    encoded = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    )
    stored = store.read(store.put(encoded).sha256)
    assert stored != encoded
    assert pixels(store, hashlib.sha256(stored).hexdigest()).getpixel((0, 0)) == (255, 128, 0)


def test_concurrent_writers_leave_one_sound_file(tmp_path: Path) -> None:
    encoded = encode(noise(64, 64).convert("RGBA"))
    stores = [ImageStore(tmp_path, ImageLimits()) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        refs = set(pool.map(lambda store: store.put(encoded), stores))
    (ref,) = refs
    assert hashlib.sha256(stores[0].read(ref.sha256)).hexdigest() == ref.sha256
    assert [path.name for path in tmp_path.rglob("*.img")] == [f"{ref.sha256}.img"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_vanished_is_stored_again(store: ImageStore) -> None:
    encoded = encode(noise(8, 8))
    ref = store.put(encoded)
    store.path(ref.sha256).unlink()
    store.put(encoded)
    assert store.read(ref.sha256) == encoded


def test_a_file_cut_short_by_a_power_failure_is_written_again(store: ImageStore) -> None:
    encoded = encode(noise(8, 8))
    ref = store.put(encoded)
    store.path(ref.sha256).write_bytes(b"")
    ImageStore(store.root, store.limits).put(encoded)
    assert store.read(ref.sha256) == encoded


def test_a_missing_or_damaged_image_is_a_storage_error(store: ImageStore) -> None:
    ref = store.put(encode(noise(8, 8)))
    with pytest.raises(StorageError, match="not in the store"):
        store.read("0" * 64)
    store.path(ref.sha256).write_bytes(b"rot")
    with pytest.raises(StorageError, match="damaged"):
        store.read(ref.sha256)


@pytest.mark.parametrize("sha256", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_no_name_leads_out_of_the_store(store: ImageStore, sha256: str) -> None:
    with pytest.raises(StorageError, match="not the sha256"):
        store.path(sha256)


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot store"):
        ImageStore(tmp_path / "file", ImageLimits()).put(encode(noise(8, 8)))


def test_a_store_travels_to_other_processes(store: ImageStore) -> None:
    ref = store.put(encode(noise(8, 8)))
    assert pickle.loads(pickle.dumps(store)).read(ref.sha256) == store.read(ref.sha256)


def test_a_small_image_is_sent_as_it_is_stored(store: ImageStore) -> None:
    for kind, mime in (("JPEG", "image/jpeg"), ("PNG", "image/png")):
        encoded = encode(noise(20, 20), kind)
        assert store.resized_bytes(store.put(encoded).sha256, 400) == (encoded, mime)


@pytest.mark.parametrize(("kind", "mime"), [("JPEG", "image/jpeg"), ("PNG", "image/png")])
def test_a_large_image_is_reduced_with_its_aspect(store: ImageStore, kind: str, mime: str) -> None:
    sha256 = store.put(encode(noise(100, 50), kind)).sha256
    reduced, sent_as = store.resized_bytes(sha256, 450)
    with Image.open(io.BytesIO(reduced)) as image:
        assert image.size == (30, 15)
    assert sent_as == mime
    assert store.resized_bytes(sha256, 450)[0] is reduced
    assert ImageStore(store.root, store.limits).resized_bytes(sha256, 450)[0] == reduced


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 2_000_000))
def test_a_reduced_size_fits_and_has_no_empty_side(width: int, height: int, max_pixels: int) -> None:
    if width * height <= max_pixels:
        return
    new_width, new_height = reduced_size(width, height, max_pixels)
    assert 1 <= new_width * new_height <= max_pixels
    assert new_width <= width and new_height <= height
