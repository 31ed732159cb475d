"""The content-addressed image store: every image of a run once, as plain RGB, under the sha256 of its stored bytes.

An image that is already a plain RGB JPEG or PNG keeps its bytes. Any other (palette, alpha, CMYK, 16 bits, grey, EXIF
rotation, animation, other formats) is decoded, put upright and on white, and stored as PNG, which is deterministic for
one Pillow build. Limits are checked on the header, before pixels are decoded. Written files are not flushed to the disk
one by one: a file whose size or digest is not what was stored is written or reported anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from schemas.config import ImageLimits
from schemas.errors import RowError, StorageError
from schemas.samples import ImageRef

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded. Formats that start other programs (EPS) or need rare decoders are left out on purpose."""

MAX_CACHED_BYTES: Final = 64 * 2**20
"""Reduced images kept in memory, in bytes: the eight samples of a question send the same one."""

MAX_KNOWN_IMAGES: Final = 20_000
"""Encoded images whose stored form is remembered, so that a picture with many questions is decoded once."""

_PNG_BIT_DEPTH: Final = 24
"""Byte offset of the bit depth in a PNG: 8 of signature, 8 of chunk head, 8 of width and height."""

_ORIENTATION: Final = 0x0112
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ImageStore:
    """Images below a folder, safe under concurrent writers, threads and processes. Pickled as folder and limits."""

    def __init__(self, root: Path, limits: ImageLimits) -> None:
        self.root = Path(root)
        self.limits = limits
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, ImageRef] = OrderedDict()
        self._reduced: OrderedDict[tuple[str, int], tuple[bytes, str]] = OrderedDict()
        self._num_reduced_bytes = 0

    def __reduce__(self) -> tuple[type[ImageStore], tuple[Path, ImageLimits]]:
        return ImageStore, (self.root, self.limits)

    def path(self, sha256: str) -> Path:
        """Returns where the image lies or would lie: one of 4,096 folders, named by the first three hex digits.

        Raises StorageError: if it is not 64 lower-case hex digits, so that no name leads out of the store.
        """
        return Path(self._name(sha256))

    def _name(self, sha256: str) -> str:
        """Does what `path` does in a tenth of the time."""
        if not _SHA256.fullmatch(sha256):
            raise StorageError(f"{sha256[:80]!r} is not the sha256 of an image")
        return f"{self.root}{os.sep}{sha256[:3]}{os.sep}{sha256}.img"

    def put(self, encoded: bytes) -> ImageRef:
        """Stores an image and returns its reference; storing it again changes nothing.

        Raises RowError: `image_too_large_bytes`, `image_too_large_pixels`, `image_too_small`, `image_unreadable`.
        Raises StorageError: if the file cannot be written.
        """
        if len(encoded) > self.limits.max_bytes:
            detail = f"the image has {len(encoded):,} bytes, more than {self.limits.max_bytes:,}"
            raise RowError("image_too_large_bytes", detail)
        key = hashlib.sha256(encoded).digest()
        with self._lock:
            known = self._known.get(key)
        if known is not None and self.path(known.sha256).exists():
            return known
        stored, width, height = normalised_image(encoded, self.limits)
        ref = ImageRef(hashlib.sha256(stored).hexdigest(), width, height)
        self._write(self.path(ref.sha256), stored)
        with self._lock:
            self._known[key] = ref
            if len(self._known) > MAX_KNOWN_IMAGES:
                self._known.popitem(last=False)
        return ref

    def read(self, sha256: str) -> bytes:
        """Returns the stored bytes. Raises StorageError: if the image is missing or damaged."""
        path = self._name(sha256)
        try:
            with open(path, "rb", buffering=0) as file:
                stored = file.read()
        except FileNotFoundError as error:
            detail = "the store was moved or cleaned; run the stage `sources` again"
            raise StorageError(f"image {sha256} is not in the store {self.root}: {detail}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(stored).hexdigest() != sha256:
            raise StorageError(
                f"{path} is damaged ({len(stored):,} bytes); delete it and run the stage `sources` again"
            )
        return stored

    def resized_bytes(self, sha256: str, max_pixels: int) -> tuple[bytes, str]:
        """Returns encoded bytes of at most `max_pixels` pixels and their MIME type, the aspect kept.

        A small enough image comes back as it is stored. Otherwise Lanczos, then JPEG (quality 95, no chroma
        subsampling) if it was stored as JPEG, else PNG: the same bytes for the same image.

        Raises StorageError: as `read`.
        """
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, not {max_pixels}")
        key = (sha256, max_pixels)
        with self._lock:
            cached = self._reduced.get(key)
            if cached is not None:
                self._reduced.move_to_end(key)
                return cached
        stored = self.read(sha256)
        try:
            reduced = _reduced_image(stored, max_pixels)
        except Exception as error:  # decoders raise anything; the digest matched, so the store holds what was put
            raise StorageError(f"{self.path(sha256)} cannot be decoded: {error}") from error
        if reduced[0] is not stored:
            self._remember(key, reduced)
        return reduced

    def resized_path(self, sha256: str, max_pixels: int) -> Path:
        """Returns a file with at most `max_pixels` pixels of the image: the stored one, or one reduced once and kept.

        Raises StorageError: as `resized_bytes`, or if the file cannot be written.
        """
        path = self.path(sha256)
        try:
            with Image.open(path, formats=FORMATS) as image:
                is_small = image.width * image.height <= max_pixels
        except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            is_small = False
        if is_small:
            return path
        reduced = self.root / f"reduced-{max_pixels}" / sha256[:3] / path.name
        if not reduced.exists():
            self._write(reduced, self.resized_bytes(sha256, max_pixels)[0])
        return reduced

    def _remember(self, key: tuple[str, int], reduced: tuple[bytes, str]) -> None:
        with self._lock:
            if key in self._reduced:
                return
            self._reduced[key] = reduced
            self._num_reduced_bytes += len(reduced[0])
            while self._num_reduced_bytes > MAX_CACHED_BYTES:
                _, (dropped, _) = self._reduced.popitem(last=False)
                self._num_reduced_bytes -= len(dropped)

    def _write(self, path: Path, stored: bytes) -> None:
        """Writes by rename: a reader sees all of the file or none, and the last of two writers changes nothing."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if path.exists() and path.stat().st_size == len(stored):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(stored)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot store an image in {path}: {error.strerror or error}") from error


def normalised_image(encoded: bytes, limits: ImageLimits) -> tuple[bytes, int, int]:
    """Returns the bytes to store, with width and height in pixels. See the module's description.

    Raises RowError: `image_too_large_pixels`, `image_too_small`, `image_unreadable`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_pixels(image.width, image.height, limits)
            image.load()
            # A frame may turn out larger than the header said.
            _check_pixels(image.width, image.height, limits)
            if _is_plain(image, encoded):
                return encoded, image.width, image.height
            upright = _as_rgb(_upright(image))
            upright.info = {}  # a colour profile or a transparent colour of the old form would be written along
            buffer = io.BytesIO()
            upright.save(buffer, "PNG", compress_level=6)
            return buffer.getvalue(), upright.width, upright.height
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image_too_large_pixels", str(error)) from error
    except Exception as error:  # decoders raise anything on damaged input; the row records it
        detail = f"{len(encoded):,} bytes that begin {encoded[:12]!r} are no readable image: {error}"
        raise RowError("image_unreadable", detail[:400]) from error


def _check_pixels(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        detail = f"the image has {width} x {height} pixels, more than {limits.max_pixels:,}"
        raise RowError("image_too_large_pixels", detail)
    if min(width, height) < limits.min_side:
        raise RowError("image_too_small", f"the image has {width} x {height} pixels, a side below {limits.min_side}")


def _is_plain(image: Image.Image, encoded: bytes) -> bool:
    """Whether every reader shows the same from these bytes: RGB of 8 bits, one frame, upright, nothing transparent."""
    if image.mode != "RGB" or image.format not in {"JPEG", "PNG"} or getattr(image, "n_frames", 1) != 1:
        return False
    if "transparency" in image.info or (image.format == "PNG" and encoded[_PNG_BIT_DEPTH] != 8):
        return False
    return _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) to 8. Unreadable or senseless EXIF data rotates nothing."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged metadata beside sound pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as RGB: transparent parts on white, 16 bits scaled (Pillow alone would clip them to white)."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise RowError("image_unreadable", "images of floating point numbers have no defined white")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _reduced_image(stored: bytes, max_pixels: int) -> tuple[bytes, str]:
    with Image.open(io.BytesIO(stored), formats=("JPEG", "PNG")) as image:
        mime = "image/jpeg" if image.format == "JPEG" else "image/png"
        width, height = image.size
        if width * height <= max_pixels:
            return stored, mime
        smaller = image.convert("RGB").resize(reduced_size(width, height, max_pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if mime == "image/jpeg":
        smaller.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        smaller.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue(), mime


def reduced_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Returns width and height, each at least 1, of at most `max_pixels` pixels in all, the aspect kept if it fits."""
    scale = (max_pixels / (width * height)) ** 0.5
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    if new_width * new_height > max_pixels:  # a side was raised to 1
        new_width, new_height = min(new_width, max_pixels), min(new_height, max_pixels)
    return new_width, new_height
