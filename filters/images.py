"""Which images are the same picture: equal pixels in different files, and near copies.

Each image becomes a **fingerprint**: a digest of its pixels, a 64-bit perceptual hash (phash of the `imagehash`
library), a thumbnail of 16 x 16 colours, and its size. Two images are one picture if

- their pixels are equal, or
- their hashes differ in at most `MAX_DISTANCE` bits, their aspect ratios agree (`MAX_ASPECT_DIFFERENCE`), no value of
  their thumbnails differs by more than `MAX_DIFFERENCE`, and a look at them in full (`is_same_picture`) finds no place
  where they differ. The hash is grey and only finds candidates: scenes of the sample world with one digit, one dot or
  one cell changed are within 4 bits in 49 to 73 % of cases. The thumbnail does not see one digit in a page of text.

Clusters are **stars** as in `filters.duplicates`: images are visited in a total order, those published before first,
then more pixels, then the smaller sha256; an image joins the first representative that it equals or resembles, and else
is one. So a chain A ~ B ~ C never joins A and C, and neither the order of the input nor the number of threads matters.

Thresholds of the thumbnail were measured on 28 photographs and textures (of scikit-image and scikit-learn), 60 scenes
and 40 bar charts of 480 x 360, as largest difference of a thumbnail value:

| must merge | largest | | must not merge | smallest |
|---|---|---|---|---|
| photographs: JPEG of quality 30 to 95 | 6 | | scenes: one digit | 37 |
| photographs: scaled by 0.5 to 2 | 8 | | scenes: colour of one cell or dot | 92 |
| photographs: half size and quality 50 | 8 | | charts: one bar 3 pixels longer | 9 |
| charts: all of these | 7 | | charts: one bar 10 pixels longer | 30 |
| all: brightness by 3 % | 8 | | | |

What 16 x 16 values cannot do:

- Small saturated drawings (scenes of 84 x 84) saved as JPEG differ by 19 to 49, their colours being halved, and some
  scaled copies by up to 14; they stay apart. So does much of what was brightened by 5 % (up to 13).
- A difference too small for a sixteenth of the side is not seen: one digit in a page of text, a bar longer by 1 or 2
  pixels. The look in full sees it: blocks of 8 x 8 pixels differ by 13 to 38 where a digit of 10 to 24 pixels is
  another, by 24 where a bar is one pixel longer, and by 2 to 7 between a page or photograph and its JPEG of quality 75
  to 95. It also keeps apart scaled copies of text (12 to 22) and small saturated drawings saved as JPEG: what is not
  shown to be a copy stays.
- The hash misses some copies: 89 to 100 % of the photographs' copies, by kind, are within 4 bits.
- A uniform picture has no frequencies, so its hash says nothing (one bit, or none if black); its thumbnail decides, so
  that blank pictures merge if colour and aspect agree. With structure in one direction only, rounding sets bits of the
  hash: copies may be missed, and nothing is merged that the thumbnails keep apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import combinations, pairwise
from math import comb
from typing import Final, TypeVar, cast

import imagehash
import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray
from PIL import Image, ImageOps

from schemas.errors import BimodeError, RowError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded, as in the image store. EPS would start another program."""

THUMBNAIL_SIDE: Final = 16
THUMBNAIL_BYTES: Final = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3

MAX_DISTANCE: Final = 4
"""Bits of 64 in which the hashes of one picture may differ."""

MAX_DIFFERENCE: Final = 8
"""Largest difference of a thumbnail value, of 255, within one picture; see the module for its measurement."""

MAX_ASPECT_DIFFERENCE: Final = 0.03
"""Relative difference of width / height within one picture. Chosen: a side of 17 may be rounded by half a pixel."""

MAX_BLOCK_DIFFERENCE: Final = 8.0
"""Largest mean difference of a block of 8 x 8 pixels, of 255, within one picture; see the module for its measure."""

_BLOCK_SIDE: Final = 8
_LOOK_SIDE: Final = 1536
"""Sides beyond which a look in full reduces both pictures: a page at 150 dots per inch is seen as it is."""

_MAX_ROUNDS: Final = 4
"""Rounds in which images that a look in full kept out of a cluster look for another one."""

_HASH_SIDE: Final = 32
_REDUCED_SIDE: Final = 128
"""Sides down to which whole blocks of pixels are averaged first, for speed. At 64, scaled copies differ by up to 12."""

_HASH_BITS: Final = 64
_MAX_SEARCH_DISTANCE: Final = 8
_MAX_PREFIX_BITS: Final = 22
"""Longest prefix with a table of bucket starts: 2^22 starts take 32 MiB."""

_IMAGES_PER_TASK: Final = 32
_ORIENTATION: Final = 0x0112

_Function = TypeVar("_Function", bound=Callable[..., object])


def _compiled(function: _Function) -> _Function:
    """Returns the function compiled by Numba. It releases the GIL and runs in our own threads: Numba's `parallel` would
    bring OpenMP, which kills a process that forks later, or a layer that two threads may not enter at once."""
    return cast(_Function, njit(cache=True, nogil=True)(function))


@dataclass(frozen=True, slots=True)
class ImageFingerprint:
    """width, height: in pixels, upright. pixels: 16-byte digest of size and RGB pixels. perceptual: 64-bit hash.

    thumbnail: uint8 [16, 16, 3] as bytes, RGB.
    """

    width: int
    height: int
    pixels: bytes
    perceptual: int
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class FingerprintTable:
    """The fingerprints of n images as arrays, about 870 bytes an image.

    sha256s: bytes [n] of 64 hex digits. width, height: int32 [n]. pixels: uint64 [n, 2]. perceptual: uint64 [n].
    thumbnail: uint8 [n, 768]. is_valid: bool [n]; where false, the image could not be read and the others are zero.
    """

    sha256s: NDArray[np.bytes_]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    pixels: NDArray[np.uint64]
    perceptual: NDArray[np.uint64]
    thumbnail: NDArray[np.uint8]
    is_valid: NDArray[np.bool_]

    @classmethod
    def empty(cls, sha256s: Sequence[str]) -> FingerprintTable:
        """Returns a table in which no image has been read yet. Raises ValueError: if a key is no sha256."""
        for sha256 in sha256s:
            if len(sha256) != 64:
                raise ValueError(f"{sha256[:80]!r} is not the sha256 of an image: it must have 64 hex digits")
        num = len(sha256s)
        return cls(
            sha256s=np.array(sha256s, dtype="S64"),
            width=np.zeros(num, np.int32),
            height=np.zeros(num, np.int32),
            pixels=np.zeros((num, 2), np.uint64),
            perceptual=np.zeros(num, np.uint64),
            thumbnail=np.zeros((num, THUMBNAIL_BYTES), np.uint8),
            is_valid=np.zeros(num, np.bool_),
        )

    @classmethod
    def concatenated(cls, tables: Sequence[FingerprintTable]) -> FingerprintTable:
        """Returns the images of several tables, at least one, one table after the other."""
        return cls(*(np.concatenate([getattr(table, field.name) for table in tables]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.sha256s)

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> FingerprintTable:
        """Returns the rows at these places, or where the mask is true."""
        return FingerprintTable(*(getattr(self, field.name)[places] for field in fields(self)))

    def put(self, place: int, found: ImageFingerprint) -> None:
        """Writes one fingerprint into its row, which becomes valid."""
        self.width[place], self.height[place] = found.width, found.height
        self.pixels[place] = np.frombuffer(found.pixels, np.uint64)
        self.perceptual[place] = found.perceptual
        self.thumbnail[place] = np.frombuffer(found.thumbnail, np.uint8)
        self.is_valid[place] = True

    def to_table(self) -> pa.Table:
        """Returns the table for storage: a column per array, `sha256` the key, digests and thumbnails as bytes."""
        return pa.table(
            {
                "sha256": _fixed_bytes(self.sha256s, 64).cast(pa.binary()).cast(pa.string()),
                "width": self.width,
                "height": self.height,
                "pixels": _fixed_bytes(self.pixels, 16),
                "perceptual": self.perceptual,
                "thumbnail": _fixed_bytes(self.thumbnail, THUMBNAIL_BYTES),
                "is_valid": self.is_valid,
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> FingerprintTable:
        """Returns the fingerprints of a stored table, views of its buffers where they can be.

        Raises ValueError: if a column is missing, holds nulls or has another width.
        """
        return cls(
            sha256s=np.array(_column(table, "sha256").to_pylist(), dtype="S64"),
            width=_column(table, "width").to_numpy(),
            height=_column(table, "height").to_numpy(),
            pixels=_flat_bytes(_column(table, "pixels"), 16).view(np.uint64),
            perceptual=_column(table, "perceptual").to_numpy(),
            thumbnail=_flat_bytes(_column(table, "thumbnail"), THUMBNAIL_BYTES),
            is_valid=_column(table, "is_valid").to_numpy(zero_copy_only=False),
        )


def fingerprint(encoded: bytes) -> ImageFingerprint:
    """Returns the fingerprint of an encoded image.

    The picture is what the store would keep: the first frame, upright, transparent parts on white, 16 bits scaled to 8.
    It is decoded once and in full: JPEG's reduced decoding (`Image.draft`) would be faster, but other pixels than those
    of the same picture as PNG, and another hash than that of the same picture at another size.

    Raises RowError: `image_unreadable`, whatever the decoder says, also beyond Pillow's own limit of pixels.
    """
    return _fingerprint(_decoded(encoded))


def fingerprints(read: Callable[[str], bytes], sha256s: Sequence[str], *, num_workers: int = 2) -> FingerprintTable:
    """Returns the fingerprints of images, in order, computed in `num_workers` threads (decoding releases the GIL).

    read: returns the stored bytes of an image, from several threads at once. An image that cannot be read or decoded
    (RowError, BimodeError, OSError) is marked as not valid.

    Raises ValueError: if a key has not 64 digits.
    """
    table = FingerprintTable.empty(sha256s)

    def fill(start: int) -> None:
        for place in range(start, min(start + _IMAGES_PER_TASK, len(sha256s))):
            with contextlib.suppress(RowError, BimodeError, OSError):  # is_valid stays false
                table.put(place, fingerprint(read(sha256s[place])))

    with ThreadPoolExecutor(num_workers) as pool:
        for _ in pool.map(fill, range(0, len(sha256s), _IMAGES_PER_TASK)):
            pass
    return table


def near_pairs(
    hashes: NDArray[np.uint64], distance: int, *, num_workers: int = 2
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns all pairs of different hashes that differ in at most `distance` bits (0 to 8), as two arrays of places.

    Each pair comes once, the smaller place first, ordered by the first and then the second. A hash that occurs several
    times stands at its first place (see `first_places`): 100,000 blank images are one hash, not five thousand million
    pairs. Exact; see `_find_matches`.
    """
    first, second = near_matches(hashes, hashes, distance, num_workers=num_workers)
    is_pair = first < second
    return first[is_pair], second[is_pair]


def near_matches(
    new: NDArray[np.uint64], old: NDArray[np.uint64], distance: int, *, num_workers: int = 2
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns all pairs of a new and an old hash that differ in at most `distance` bits (0 to 8): places in either.

    Equal hashes are pairs too; a hash that occurs several times on one side stands at its first place there. Ordered by
    the new place, then the old one. The smaller side is indexed, the larger one only passed through.
    """
    if not 0 <= distance <= _MAX_SEARCH_DISTANCE:
        raise ValueError(f"distance must be from 0 to {_MAX_SEARCH_DISTANCE}, not {distance}")
    new_values, new_places = np.unique(new, return_index=True)
    old_values, old_places = (new_values, new_places) if old is new else np.unique(old, return_index=True)
    if len(new_values) <= len(old_values):
        new_found, old_found = _find_matches(new_values, old_values, distance, num_workers)
    else:
        old_found, new_found = _find_matches(old_values, new_values, distance, num_workers)
    first = new_places[np.searchsorted(new_values, new_found)]
    second = old_places[np.searchsorted(old_values, old_found)]
    order = np.lexsort((second, first))
    return first[order], second[order]


def first_places(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns for each place the first place with the same hash."""
    return _first_equal(hashes)


def image_clusters(
    table: FingerprintTable,
    *,
    published: NDArray[np.bool_] | None = None,
    max_distance: int | None = MAX_DISTANCE,
    max_difference: int = MAX_DIFFERENCE,
    num_workers: int = 2,
) -> NDArray[np.int64]:
    """Returns for each image [n] the place of its cluster's representative; see the module for what a cluster is.

    published: mask of the representatives of earlier runs. They stay representatives, whatever they resemble, and are
    not compared with each other, so the cost is set by the other images. Earlier images that were not representatives
    may be left out; where they are kept, unmarked, they join again. max_distance: None for equal pixels only.

    Images that could not be read are clusters of one. Equal pixels come first: such an image joins the best of its
    copies even where a better representative resembles it. Time is linear in the images but for those whose hashes and
    brightness agree with many representatives that their thumbnails keep apart.
    """
    order = _visiting_order(table, published)
    is_published = np.zeros(len(order), np.bool_) if published is None else published[order]
    twin = _first_equal(table.pixels[order, 0], table.pixels[order, 1])
    is_compared = is_published | (twin == np.arange(len(order)))
    head = np.where(is_published, np.arange(len(order)), twin)
    if max_distance is not None:
        ranks = np.flatnonzero(is_compared)
        compared = table.take(order[ranks])
        joined = _stars(compared, is_published[ranks], max_distance, max_difference, num_workers)
        head[ranks] = ranks[joined]
        head = np.where(is_compared, head, head[twin])
    representative = np.arange(len(table))
    representative[order] = order[head]
    return representative


def looked_at_clusters(
    table: FingerprintTable,
    read: Callable[[str], bytes],
    *,
    published: NDArray[np.bool_] | None = None,
    num_workers: int = 2,
) -> NDArray[np.int64]:
    """Returns the clusters of `image_clusters`, without the images that a look in full finds to be other pictures.

    read: returns the stored bytes of an image, from several threads at once; one that cannot be read is kept out. An
    image that is kept out looks for another cluster among those kept out like it, a few times, and then stays alone.
    """
    marked = np.zeros(len(table), np.bool_) if published is None else published
    representative = np.arange(len(table))
    places = np.arange(len(table))
    for _ in range(_MAX_ROUNDS):
        found = places[image_clusters(table.take(places), published=marked[places], num_workers=num_workers)]
        is_kept_out = ~_looked_alike(table, read, places, found, num_workers)
        representative[places] = np.where(is_kept_out, places, found)
        places = places[is_kept_out]
    representative[places] = places[image_clusters(table.take(places), max_distance=None)]
    return representative


def _looked_alike(
    table: FingerprintTable,
    read: Callable[[str], bytes],
    images: NDArray[np.int64],
    others: NDArray[np.int64],
    num_workers: int,
) -> NDArray[np.bool_]:
    """Says of each image and its other whether they are one picture: by their pixels, or by a look at them in full."""
    alike = np.all(table.pixels[images] == table.pixels[others], axis=1) | (images == others)

    def look(place: int) -> bool:
        names = (table.sha256s[images[place]].decode(), table.sha256s[others[place]].decode())
        try:
            return is_same_picture(read(names[0]), read(names[1]))
        except (RowError, BimodeError, OSError):
            return False

    wanted = np.flatnonzero(~alike)
    with ThreadPoolExecutor(num_workers) as pool:
        alike[wanted] = list(pool.map(look, wanted.tolist()))
    return np.asarray(alike)


def is_same_picture(first: bytes, second: bytes) -> bool:
    """Says whether two encoded images, put to one size, differ nowhere by more than `MAX_BLOCK_DIFFERENCE`.

    Raises RowError: `image_unreadable`.
    """
    return _largest_block_difference(_decoded(first), _decoded(second)) <= MAX_BLOCK_DIFFERENCE


def _largest_block_difference(one: Image.Image, two: Image.Image) -> float:
    """Returns the largest mean over a block of the largest difference of a pixel's channels."""
    width, height = min(one.width, two.width), min(one.height, two.height)
    scale = min(1.0, _LOOK_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    first, second = (np.asarray(_scaled(image, size)).astype(np.int16) for image in (one, two))
    differences = np.abs(first - second).max(axis=2).astype(np.float32)
    padding = [(0, -side % _BLOCK_SIDE) for side in differences.shape]
    padded = np.pad(differences, padding)
    rows, columns = padded.shape[0] // _BLOCK_SIDE, padded.shape[1] // _BLOCK_SIDE
    blocks = padded.reshape(rows, _BLOCK_SIDE, columns, _BLOCK_SIDE)
    return float(blocks.mean(axis=(1, 3)).max())


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    is_much_larger = image.width >= 2 * size[0]
    return image.resize(size, Image.Resampling.BOX if is_much_larger else Image.Resampling.BILINEAR)


def _decoded(encoded: bytes) -> Image.Image:
    """Returns the picture in full as the store keeps it. Raises RowError: `image_unreadable`."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            image.load()
            return _as_rgb(image)
    except Exception as error:  # decoders raise anything on damaged input; the row records it
        detail = f"{len(encoded):,} bytes that begin {encoded[:12]!r} are no readable image: {error}"
        raise RowError("image_unreadable", detail[:400]) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Returns the picture as the image store keeps it (`sources.images`), which this level may not import."""
    with contextlib.suppress(Exception):  # damaged metadata beside sound pixels rotates nothing
        if image.getexif().get(_ORIENTATION, 1) != 1:  # else it would copy the image
            image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to white
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("images of floating point numbers have no defined white")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _fingerprint(rgb: Image.Image) -> ImageFingerprint:
    """Thumbnails are averages under a tent (Pillow's BILINEAR): its BOX takes whole pixels only, so that copies of a
    chart at another size differ by up to 10 there and by 3 here, and scenes by 56 and 14."""
    width, height = rgb.size
    digest = hashlib.sha256(width.to_bytes(4, "little") + height.to_bytes(4, "little"))
    digest.update(rgb.tobytes())
    blocks = max(1, width // _REDUCED_SIDE), max(1, height // _REDUCED_SIDE)
    reduced = rgb.reduce(blocks)
    box = (0, 0, width / blocks[0], height / blocks[1])  # the last block may be a part of one
    thumbnail = reduced.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR, box)
    small = reduced.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS, box)
    bits = np.packbits(imagehash.phash(small, hash_size=8).hash.reshape(-1))
    return ImageFingerprint(
        width=width,
        height=height,
        pixels=digest.digest()[:16],
        perceptual=int.from_bytes(bits.tobytes(), "big"),
        thumbnail=thumbnail.tobytes(),
    )


def _fixed_bytes(values: NDArray[np.generic], num_bytes: int) -> pa.Array:
    content = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.binary(num_bytes), len(values), [None, content])


def _column(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        raise ValueError(f"the table of fingerprints has no column {name!r}, only {table.column_names}")
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps a chunked array where there is no chunk
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError(f"the column {name!r} of the fingerprints holds {column.null_count} nulls")
    return column


def _flat_bytes(column: pa.Array, num_bytes: int) -> NDArray[np.uint8]:
    if column.type != pa.binary(num_bytes):
        raise ValueError(f"fingerprints of {num_bytes} bytes were expected, not {column.type}")
    if len(column) == 0:
        return np.zeros((0, num_bytes), np.uint8)
    start = column.offset * num_bytes
    content = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * num_bytes]
    return content.reshape(-1, num_bytes)


def _first_equal(*columns: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns for each row the first row with the same values in all columns."""
    order = np.lexsort(columns)  # stable, so a group begins with its first row
    is_start = np.ones(len(order), np.bool_)
    is_start[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_start][np.cumsum(is_start) - 1]
    return first


def _visiting_order(table: FingerprintTable, published: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Returns the places of the valid images, best first."""
    if published is not None and published.shape != (len(table),):
        raise ValueError(f"published must be a mask of {len(table)} images, not of shape {published.shape}")
    places = np.flatnonzero(table.is_valid)
    keys = [table.sha256s[places], -table.width[places].astype(np.int64) * table.height[places]]
    if published is not None:
        keys.append(~published[places])
    return places[np.lexsort(keys)]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Another order of the 64 bits of a hash, as parts from the highest bit down: their places and lengths."""

    shifts: NDArray[np.uint64]
    widths: NDArray[np.uint64]

    def __call__(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return _rearranged(hashes, self.shifts, self.widths)


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """One table of a search: hashes are cut so that the `num_bits` bits that must agree come first.

    restore undoes the cut. earlier_masks: the bits that agree in the tables before this one, in the place that this
    table's cut gives them.
    """

    cut: _Cut
    restore: _Cut
    num_bits: int
    earlier_masks: NDArray[np.uint64]


def _prefix_tables(num_indexed: int, num_passed: int, distance: int) -> list[_Prefixes]:
    """Returns the tables of a search by the pigeonhole principle (multi-index hashing, Norouzi et al., 2012).

    Cut a hash into m parts: two hashes that differ in at most d bits agree in at least m - d parts. One table for each
    choice of m - d parts therefore finds all pairs by equal prefixes. More parts mean more tables and smaller buckets;
    m is chosen for the least work, a look-up counted as 16 comparisons.
    """

    def work(num_parts: int) -> float:
        num_bits = min(_MAX_PREFIX_BITS, _HASH_BITS // num_parts * (num_parts - distance))
        return comb(num_parts, distance) * (num_passed + num_indexed) * (16.0 + num_indexed / (1 << num_bits))

    num_parts = min(range(distance + 1, distance + 4), key=work)
    edges = [_HASH_BITS * part // num_parts for part in range(num_parts + 1)]
    spans = list(pairwise(edges))
    tables: list[_Prefixes] = []
    masks: list[int] = []
    for chosen in combinations(range(num_parts), num_parts - distance):
        order = [*chosen, *(part for part in range(num_parts) if part not in chosen)]
        cut = _cut([spans[part] for part in order])
        ends = np.cumsum([spans[part][1] - spans[part][0] for part in order])
        placed = {
            part: (_HASH_BITS - int(end), _HASH_BITS - int(end) + spans[part][1] - spans[part][0])
            for part, end in zip(order, ends, strict=True)
        }
        restore = _cut([placed[part] for part in reversed(range(num_parts))])
        num_bits = min(_MAX_PREFIX_BITS, sum(spans[part][1] - spans[part][0] for part in chosen))
        tables.append(_Prefixes(cut, restore, num_bits, cut(np.array(masks, np.uint64))))
        masks.append(int(restore(np.array([((1 << num_bits) - 1) << (_HASH_BITS - num_bits)], np.uint64))[0]))
    return tables


def _cut(spans: Sequence[tuple[int, int]]) -> _Cut:
    return _Cut(
        np.array([start for start, _ in spans], np.uint64), np.array([end - start for start, end in spans], np.uint64)
    )


def _find_matches(
    indexed: NDArray[np.uint64], passed: NDArray[np.uint64], distance: int, num_workers: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the pairs of values within the distance, each once; both sides must be free of repeats.

    One table is one task, and tables are joined in order: the number of threads changes nothing.
    """
    if not len(indexed) or not len(passed):
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def search(table: _Prefixes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        cut = np.sort(table.cut(indexed))
        passed_cut = cut if passed is indexed else table.cut(passed)  # in sorted order the buckets stay in the cache
        starts = _bucket_starts(cut, table.num_bits)
        first, second = _matches(cut, starts, passed_cut, table.num_bits, table.earlier_masks, distance)
        return table.restore(first), table.restore(second)

    with ThreadPoolExecutor(num_workers) as pool:
        found = list(pool.map(search, _prefix_tables(len(indexed), len(passed), distance)))
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])


@_compiled
def _rearranged(
    hashes: NDArray[np.uint64], shifts: NDArray[np.uint64], widths: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Returns the hashes with their parts in another order, the first part in the highest bits."""
    cut = np.zeros_like(hashes)
    for place in range(len(hashes)):
        value = np.uint64(0)
        for part in range(len(shifts)):
            if widths[part] == np.uint64(64):  # a shift by 64 is not defined
                value = hashes[place]
            else:
                bits = (hashes[place] >> shifts[part]) & ((np.uint64(1) << widths[part]) - np.uint64(1))
                value = (value << widths[part]) | bits
        cut[place] = value
    return cut


@_compiled
def _bucket_starts(cut: NDArray[np.uint64], num_bits: int) -> NDArray[np.int64]:
    """Returns where each prefix begins among the sorted hashes [2^num_bits + 1]."""
    starts = np.zeros((1 << num_bits) + 1, np.int64)
    for place in range(len(cut)):
        starts[np.int64(cut[place] >> np.uint64(64 - num_bits)) + 1] += 1
    for bucket in range(1, len(starts)):
        starts[bucket] += starts[bucket - 1]
    return starts


@_compiled
def _num_different_bits(first: np.uint64, second: np.uint64) -> np.uint64:
    """The usual population count, which LLVM turns into one instruction."""
    bits = first ^ second
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)


@_compiled
def _matches(
    indexed: NDArray[np.uint64],
    starts: NDArray[np.int64],
    passed: NDArray[np.uint64],
    num_bits: int,
    earlier_masks: NDArray[np.uint64],
    distance: int,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the pairs of one table that no earlier table shows: those that differ in every earlier mask."""
    found, first, second = 0, np.empty(1024, np.uint64), np.empty(1024, np.uint64)
    for place in range(len(passed)):
        bucket = np.int64(passed[place] >> np.uint64(64 - num_bits))
        for candidate in range(starts[bucket], starts[bucket + 1]):
            if _num_different_bits(indexed[candidate], passed[place]) > np.uint64(distance):
                continue
            if np.any(earlier_masks & (indexed[candidate] ^ passed[place]) == np.uint64(0)):
                continue
            if found == len(first):
                first, second = np.append(first, np.empty_like(first)), np.append(second, np.empty_like(second))
            first[found], second[found] = indexed[candidate], passed[place]
            found += 1
    return first[:found].copy(), second[:found].copy()


def _stars(
    table: FingerprintTable, is_published: NDArray[np.bool_], max_distance: int, max_difference: int, num_workers: int
) -> NDArray[np.int64]:
    """Returns for each image the place of its representative; the images are all valid and in visiting order.

    Representatives are held by hash and brightness: thumbnails within the difference have sums in the same or an
    adjacent class of that width, which keeps uniform pictures of many colours, all of one hash, from being compared
    each with each.
    """
    hashes, hash_of = np.unique(table.perceptual, return_inverse=True)
    neighbours, offsets = _neighbours(hashes, table.perceptual, is_published, max_distance, num_workers)
    class_width = max(1, max_difference * THUMBNAIL_BYTES)
    num_classes = 255 * THUMBNAIL_BYTES // class_width + 1
    brightness = table.thumbnail.sum(axis=1, dtype=np.int64) // class_width
    shelves, shelf_of = np.unique(hash_of * num_classes + brightness, return_inverse=True)
    return _visit(
        np.ascontiguousarray(table.thumbnail),
        np.stack((table.width, table.height), axis=1).astype(np.int64),
        is_published,
        (hash_of, brightness, num_classes),
        (neighbours, offsets),
        (shelves, shelf_of),
        max_difference,
        MAX_ASPECT_DIFFERENCE,
    )


def _neighbours(
    hashes: NDArray[np.uint64],
    perceptual: NDArray[np.uint64],
    is_published: NDArray[np.bool_],
    max_distance: int,
    num_workers: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the places in `hashes` near to each hash of a new image, itself first, and the offsets of each hash."""
    new = np.unique(perceptual[~is_published])
    old = np.setdiff1d(perceptual[is_published], new)
    first, second = near_pairs(new, max_distance, num_workers=num_workers)
    near, far = near_matches(new, old, max_distance, num_workers=num_workers)
    new_places, old_places = np.searchsorted(hashes, new), np.searchsorted(hashes, old)
    sources = np.concatenate((new_places, new_places[first], new_places[second], new_places[near]))
    targets = np.concatenate((new_places, new_places[second], new_places[first], old_places[far]))
    order = np.argsort(sources, kind="stable")
    offsets = np.searchsorted(sources[order], np.arange(len(hashes) + 1))
    return targets[order], offsets


@_compiled
def _visit(
    thumbnails: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    is_published: NDArray[np.bool_],
    classes: tuple[NDArray[np.int64], NDArray[np.int64], int],
    near: tuple[NDArray[np.int64], NDArray[np.int64]],
    shelving: tuple[NDArray[np.int64], NDArray[np.int64]],
    max_difference: int,
    max_aspect_difference: float,
) -> NDArray[np.int64]:
    """Returns the representatives of the images, visited in order. A shelf lists its representatives, best first."""
    hash_of, brightness, num_classes = classes
    neighbours, offsets = near
    shelves, shelf_of = shelving
    first, last = np.full(len(shelves), -1), np.full(len(shelves), -1)
    following = np.full(len(sizes), -1)
    joined = np.arange(len(sizes))
    for image in range(len(sizes)):
        best = image
        if not is_published[image]:
            for near_hash in neighbours[offsets[hash_of[image]] : offsets[hash_of[image] + 1]]:
                lowest = near_hash * num_classes + max(0, brightness[image] - 1)
                highest = near_hash * num_classes + min(num_classes - 1, brightness[image] + 1)
                shelf = np.searchsorted(shelves, lowest)
                while shelf < len(shelves) and shelves[shelf] <= highest:
                    kept = first[shelf]
                    while kept != -1 and kept < best:
                        if _is_alike(thumbnails, sizes, image, kept, max_difference, max_aspect_difference):
                            best = kept
                        kept = following[kept]
                    shelf += 1
        joined[image] = best
        if best == image:
            shelf = shelf_of[image]
            if first[shelf] == -1:
                first[shelf] = image
            else:
                following[last[shelf]] = image
            last[shelf] = image
    return joined


@_compiled
def _is_alike(
    thumbnails: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    image: int,
    kept: int,
    max_difference: int,
    max_aspect_difference: float,
) -> bool:
    one, two = sizes[image, 0] * sizes[kept, 1], sizes[kept, 0] * sizes[image, 1]
    if abs(one - two) > max_aspect_difference * max(one, two):
        return False
    for value in range(thumbnails.shape[1]):
        if abs(np.int32(thumbnails[image, value]) - np.int32(thumbnails[kept, value])) > max_difference:
            return False
    return True
