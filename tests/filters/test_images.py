"""Which images are the same picture: fingerprints, the search for near hashes, and the laws of clusters."""

import dataclasses
import hashlib
import io
import random
from collections.abc import Callable, Iterator

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance

from filters.images import (
    FingerprintTable,
    ImageFingerprint,
    fingerprint,
    fingerprints,
    first_places,
    image_clusters,
    is_same_picture,
    looked_at_clusters,
    near_matches,
    near_pairs,
)
from sampleworld.world import COLOURS, Scene, draw_scene, render_scene
from schemas.config import ImageLimits
from schemas.errors import RowError, StorageError
from sources.images import normalised_image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def photo(seed: int = 1, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Returns smooth coloured noise of several scales, which codecs treat like a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 24):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) / cells
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def chart(heights: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGB", (480, 360), "white")
    draw = ImageDraw.Draw(image)
    draw.line((40, 20, 40, 320), fill=0)
    draw.line((40, 320, 460, 320), fill=0)
    for place, height in enumerate(heights):
        draw.rectangle((60 + place * 66, 320 - height, 100 + place * 66, 320), fill=(70, 110, 200))
    return image


def key(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def table_of(images: list[bytes]) -> FingerprintTable:
    by_key = {f"{place:064x}": image for place, image in enumerate(images)}
    return fingerprints(by_key.__getitem__, list(by_key), num_workers=1)


def clusters_of(images: list[bytes], *, max_distance: int | None = 4) -> list[int]:
    found: list[int] = image_clusters(table_of(images), max_distance=max_distance).tolist()
    return found


def same_picture(first: Image.Image | bytes, second: Image.Image | bytes) -> bool:
    one, two = (image if isinstance(image, bytes) else encoded(image) for image in (first, second))
    return len(set(clusters_of([one, two]))) == 1


def test_equal_pixels_in_different_files_have_equal_digests() -> None:
    image = photo()
    png = fingerprint(encoded(image))
    assert png == fingerprint(encoded(image, "BMP")) == fingerprint(encoded(image, "PNG", compress_level=1))
    assert (png.width, png.height, len(png.pixels), len(png.thumbnail)) == (320, 240, 16, 768)
    jpeg = encoded(image, "JPEG")
    with Image.open(io.BytesIO(jpeg)) as decoded:
        assert fingerprint(encoded(decoded.convert("RGB"))) == fingerprint(jpeg)


def test_the_digest_knows_the_size_and_every_pixel() -> None:
    wide, tall = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 4), "red")
    other = wide.copy()
    other.putpixel((3, 1), (254, 0, 0))
    assert len({fingerprint(encoded(image)).pixels for image in (wide, tall, other)}) == 3


def test_the_hash_is_that_of_the_library() -> None:
    image = photo(2, (128, 128))  # not reduced first
    assert fingerprint(encoded(image)).perceptual == int(str(imagehash.phash(image)), 16)
    large = photo(3, (1000, 700))
    difference = fingerprint(encoded(large)).perceptual ^ int(str(imagehash.phash(large)), 16)
    assert difference.bit_count() <= 2


def test_the_thumbnail_of_a_uniform_picture_is_its_colour() -> None:
    assert fingerprint(encoded(Image.new("RGB", (501, 333), (10, 20, 30)))).thumbnail == bytes((10, 20, 30)) * 256


def palette_with_transparency() -> bytes:
    image = Image.new("P", (40, 30), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 20, 30))
    return encoded(image, "PNG", transparency=0)


def animated() -> bytes:
    frames = [photo(4, (60, 40)), photo(5, (60, 40))]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(6, (60, 40)), "JPEG", exif=exif)


STRANGE: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encoded(photo(7, (60, 40)).convert("CMYK"), "JPEG"),
    "grey": lambda: encoded(photo(7, (60, 40)).convert("L")),
    "one bit": lambda: encoded(photo(7, (60, 40)).convert("1")),
    "alpha": lambda: encoded(Image.new("RGBA", (30, 20), (255, 0, 0, 100))),
    "palette with transparency": palette_with_transparency,
    "animated": animated,
    "16 bits": sixteen_bits,
    "rotated": rotated,
    "extreme aspect": lambda: encoded(photo(8, (3000, 2))),
    "two pixels": lambda: encoded(Image.new("RGB", (2, 2), "blue")),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_form_has_the_fingerprint_of_what_the_store_keeps(name: str) -> None:
    raw = STRANGE[name]()
    stored, width, height = normalised_image(raw, ImageLimits())
    assert fingerprint(raw) == fingerprint(stored)
    assert (fingerprint(raw).width, fingerprint(raw).height) == (width, height)


def test_one_pixel_is_a_picture() -> None:
    found = fingerprint(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert (found.width, found.height, found.thumbnail) == (1, 1, bytes((1, 2, 3)) * 256)


UNREADABLE = {
    "empty": b"",
    "text": b"no image",
    "truncated JPEG": encoded(photo(), "JPEG")[:2000],
    "truncated PNG": encoded(photo())[:2000],
    "header only": encoded(photo())[:33],
    "damaged": encoded(photo())[:100] + b"\0" * 500,
    "float": encoded(Image.new("F", (20, 20)), "TIFF"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_a_row_error(name: str) -> None:
    with pytest.raises(RowError, match="image_unreadable") as caught:
        fingerprint(UNREADABLE[name])
    assert caught.value.reason == "image_unreadable"


@pytest.mark.parametrize("limit", [50_000, 20_000])  # beyond it by less than twice Pillow warns, else it raises
def test_a_picture_beyond_pillows_limit_is_a_row_error(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(RowError, match="image_unreadable"):
        fingerprint(encoded(photo()))


def test_unreadable_images_are_invalid_and_clusters_of_one() -> None:
    def read(sha256: str) -> bytes:
        if sha256 == key("missing"):
            raise StorageError("not in the store")
        return {key("a"): b"", key("b"): b"", key("c"): encoded(Image.new("RGB", (9, 9)))}[sha256]

    table = fingerprints(read, [key("a"), key("b"), key("missing"), key("c")])
    assert table.is_valid.tolist() == [False, False, False, True]
    assert image_clusters(table).tolist() == [0, 1, 2, 3]


def test_threads_change_nothing() -> None:
    images = {key(seed): encoded(photo(seed, (40, 30))) for seed in range(100)}
    tables = [fingerprints(images.__getitem__, list(images), num_workers=num).to_table() for num in (1, 4)]
    assert tables[0].equals(tables[1])


def test_a_key_must_be_a_sha256() -> None:
    with pytest.raises(ValueError, match="'short' is not the sha256"):
        fingerprints(lambda _: b"", ["short"])


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_table_comes_back_from_arrow(num: int) -> None:
    table = table_of([encoded(photo(seed, (40, 30))) for seed in range(num)])
    stored = table.to_table()
    assert stored.column_names == ["sha256", "width", "height", "pixels", "perceptual", "thumbnail", "is_valid"]
    for arrow in (stored, pa.concat_tables([stored.slice(0, 1), stored.slice(1)])):
        back = FingerprintTable.from_table(arrow)
        for field in dataclasses.fields(table):
            expected, actual = getattr(table, field.name), getattr(back, field.name)
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)


def test_a_foreign_arrow_table_is_refused() -> None:
    stored = table_of([encoded(photo())]).to_table()
    with pytest.raises(ValueError, match="no column 'pixels'"):
        FingerprintTable.from_table(stored.drop_columns(["pixels"]))
    wide = stored.set_column(3, "pixels", pa.array([b"0" * 32], pa.binary(32)))
    with pytest.raises(ValueError, match="16 bytes were expected"):
        FingerprintTable.from_table(wide)


def distinct_first(hashes: list[int]) -> Iterator[tuple[int, int]]:
    return ((place, value) for place, value in enumerate(hashes) if value not in hashes[:place])


@st.composite
def close_hashes(draw: st.DrawFn) -> NDArray[np.uint64]:
    """Draws hashes of which many differ in few bits, and some are equal."""
    values = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 30))):
        value = draw(st.sampled_from(values))
        for bit in draw(st.lists(st.integers(0, 63), max_size=6)):
            value ^= 1 << bit
        values.append(value)
    return np.array(values, np.uint64)


@settings(max_examples=60, deadline=None)
@given(close_hashes(), st.integers(0, 8))
def test_near_pairs_are_those_of_brute_force(hashes: NDArray[np.uint64], distance: int) -> None:
    found = near_pairs(hashes, distance)
    kept = list(distinct_first(hashes.tolist()))
    expected = [
        (one, two) for at, (one, a) in enumerate(kept) for two, b in kept[at + 1 :] if (a ^ b).bit_count() <= distance
    ]
    assert list(zip(*(side.tolist() for side in found), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(close_hashes(), close_hashes(), st.integers(0, 8))
def test_near_matches_are_those_of_brute_force(new: NDArray[np.uint64], old: NDArray[np.uint64], distance: int) -> None:
    old = np.concatenate((old, new[::2] ^ np.uint64(5)))
    found = near_matches(new, old, distance)
    expected = [
        (one, two)
        for one, a in distinct_first(new.tolist())
        for two, b in distinct_first(old.tolist())
        if (a ^ b).bit_count() <= distance
    ]
    assert list(zip(*(side.tolist() for side in found), strict=True)) == expected


def test_every_choice_of_parts_finds_all_pairs() -> None:
    """Few hashes are searched in few tables; 300,000 at distance 4 in tables by two parts of six."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 150_000, np.uint64)
    copies = hashes.copy()
    for bits in rng.integers(0, 64, (4, len(hashes)), np.uint64):
        copies ^= np.uint64(1) << bits
    for num in (2_000, len(hashes)):
        first, second = near_pairs(np.concatenate((hashes[:num], copies[:num])), 4)
        planted = second - first == num
        assert planted.sum() == num - (hashes[:num] == copies[:num]).sum()


def test_the_number_of_threads_does_not_change_the_pairs() -> None:
    hashes = np.random.default_rng(2).integers(0, 2**14, 500, np.uint64)
    one, four = near_pairs(hashes, 3, num_workers=1), near_pairs(hashes, 3, num_workers=4)
    np.testing.assert_array_equal(one, four)
    assert len(one[0]) > 1000


def test_equal_hashes_are_one_hash() -> None:
    hashes = np.array([7, 7, 3, 7, 3], np.uint64)
    assert first_places(hashes).tolist() == [0, 0, 2, 0, 2]
    assert [side.tolist() for side in near_pairs(hashes, 1)] == [[0], [2]]
    assert [side.tolist() for side in near_matches(hashes, hashes[1:], 0)] == [[0, 2], [0, 1]]
    assert [len(side) for side in near_pairs(np.zeros(100_000, np.uint64), 4)] == [0, 0]


@pytest.mark.parametrize("distance", [-1, 9])
def test_a_distance_that_cannot_be_searched_is_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="distance must be from 0 to 8"):
        near_pairs(np.zeros(1, np.uint64), distance)


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_a_recompressed_photograph_is_the_same_picture(quality: int) -> None:
    for seed in range(3):
        assert same_picture(photo(seed), encoded(photo(seed), "JPEG", quality=quality))
    bars = chart((100, 50, 200, 30))
    assert same_picture(bars, encoded(bars, "JPEG", quality=quality))


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_a_scaled_copy_is_the_same_picture(scale: float) -> None:
    for image in (photo(1), photo(2), chart((100, 50, 200, 30))):
        size = round(image.width * scale), round(image.height * scale)
        assert same_picture(image, image.resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_slightly_brighter_copy_is_the_same_picture(factor: float) -> None:
    assert same_picture(photo(), ImageEnhance.Brightness(photo()).enhance(factor))


def scene_variants(scene: Scene) -> Iterator[Scene]:
    for cell in range(9):
        for digit in set(range(10)) - {scene.digits[cell]}:
            yield dataclasses.replace(scene, digits=(*scene.digits[:cell], digit, *scene.digits[cell + 1 :]))
        for colour in set(COLOURS) - {scene.colours[cell]}:
            yield dataclasses.replace(scene, colours=(*scene.colours[:cell], colour, *scene.colours[cell + 1 :]))
        for colour in set(COLOURS) - {scene.dots[cell]}:
            yield dataclasses.replace(scene, dots=(*scene.dots[:cell], colour, *scene.dots[cell + 1 :]))


def test_scenes_that_differ_in_one_digit_or_colour_stay_apart() -> None:
    scene = draw_scene(random.Random(3))
    images = [render_scene(variant) for variant in (scene, *scene_variants(scene))]
    assert len(images) == 1 + 9 * (9 + 8 + 8)
    assert clusters_of(images) == list(range(len(images)))


def test_charts_that_differ_in_one_bar_stay_apart() -> None:
    bars = (100, 50, 200, 30, 160)
    longer = [(*bars[:at], bars[at] + more, *bars[at + 1 :]) for at in range(5) for more in (5, 10, 40, 100)]
    images = [encoded(chart(heights)) for heights in (bars, *longer)]
    assert clusters_of(images) == list(range(len(images)))


def page_of_text(changed: str = "") -> Image.Image:
    """Returns a page of numbers, one of them changed if asked."""
    page = Image.new("RGB", (800, 1100), "white")
    draw = ImageDraw.Draw(page)
    for line in range(40):
        numbers = [str(line * 137 + place * 7919) for place in range(10)]
        draw.text((40, 40 + 25 * line), " ".join([changed if changed and line == 20 else "31", *numbers]), "black")
    return page


def looked_at(images: list[bytes], published: list[bool] | None = None) -> list[int]:
    by_key = {f"{place:064x}": image for place, image in enumerate(images)}
    table = fingerprints(by_key.__getitem__, list(by_key), num_workers=1)
    mask = None if published is None else np.array(published)
    found: list[int] = looked_at_clusters(table, by_key.__getitem__, published=mask).tolist()
    return found


def test_one_digit_in_a_page_of_text_is_seen_by_a_look_in_full() -> None:
    """A sixteenth of the page hides it from the thumbnail."""
    pages = [encoded(page_of_text()), encoded(page_of_text("37"))]
    assert clusters_of(pages) == [0, 0]
    assert clusters_of(pages, max_distance=None) == [0, 1]
    assert looked_at(pages) == [0, 1]


def test_a_look_in_full_knows_copies() -> None:
    for image in (photo(1), page_of_text()):
        assert is_same_picture(encoded(image), encoded(image, "BMP"))
        assert is_same_picture(encoded(image), encoded(image, "JPEG", quality=85))
    half = photo(1).resize((160, 120), Image.Resampling.LANCZOS)
    assert is_same_picture(encoded(photo(1)), encoded(half))
    assert not is_same_picture(encoded(photo(1)), encoded(photo(2)))


def test_pages_that_are_kept_out_of_a_cluster_still_find_their_own_copies() -> None:
    one, other = page_of_text(), page_of_text("37")
    pages = [encoded(one), encoded(other), encoded(other, "JPEG", quality=90), encoded(other, "BMP")]
    assert looked_at(pages) == [0, 1, 1, 1]
    assert looked_at(pages, [False, False, True, False]) == [0, 2, 2, 2]


def test_many_pages_of_one_form_stay_apart_and_equal_ones_together() -> None:
    """More of them than there are rounds in which an image looks for another cluster."""
    pages = [encoded(page_of_text(str(number))) for number in (37, 41, 52, 68, 73, 86, 94)]
    copies = [encoded(page_of_text(str(number)), "BMP") for number in (86, 94)]
    found = looked_at([*pages, *copies])
    assert found[:7] == list(range(7))
    assert found[7:] == [5, 6]


def test_an_image_that_cannot_be_read_again_stays_alone() -> None:
    images = {f"{place:064x}": encoded(photo(1), "JPEG", quality=90 - 10 * place) for place in range(2)}
    table = fingerprints(images.__getitem__, list(images), num_workers=1)

    def fails(sha256: str) -> bytes:
        raise StorageError(f"{sha256} is gone")

    assert looked_at_clusters(table, images.__getitem__).tolist() == [0, 0]
    assert looked_at_clusters(table, fails).tolist() == [0, 1]


def test_no_images_have_no_clusters() -> None:
    assert looked_at([]) == []


def test_blank_pictures_are_one_picture_if_colour_and_aspect_agree() -> None:
    blanks = [("white", (100, 80)), ("white", (200, 160)), ("red", (100, 80)), ("white", (80, 100)), ("black", (5, 4))]
    images = [encoded(Image.new("RGB", size, colour)) for colour, size in blanks]
    table = table_of([*images, encoded(Image.new("RGB", (50, 40), "black"))])
    assert table.perceptual.tolist() == [1 << 63] * 4 + [0, 0]
    assert image_clusters(table).tolist() == [1, 1, 2, 3, 5, 5]


def artificial(rows: list[tuple[int, int, int, int]]) -> FingerprintTable:
    """Returns images of (content, hash, colour, side): content is what the pixel digest says."""
    table = FingerprintTable.empty([key((place, row)) for place, row in enumerate(rows)])
    for place, (content, perceptual, colour, side) in enumerate(rows):
        pixels = content.to_bytes(8, "little") + side.to_bytes(8, "little")
        table.put(place, ImageFingerprint(side, side, pixels, perceptual, bytes([colour]) * 768))
    return table


def test_a_chain_does_not_join_its_ends() -> None:
    table = artificial([(1, 0b0, 100, 30), (2, 0b1111, 108, 20), (3, 0b11111111, 116, 10)])
    assert image_clusters(table).tolist() == [0, 0, 2]
    middle_first = artificial([(1, 0b0, 100, 30), (2, 0b1111, 108, 40), (3, 0b11111111, 116, 10)])
    assert image_clusters(middle_first).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("distance", "difference", "joined"), [(4, 8, True), (5, 8, False), (4, 9, False)])
def test_both_limits_belong_to_one_picture(distance: int, difference: int, joined: bool) -> None:
    table = artificial([(1, 0, 100, 20), (2, (1 << distance) - 1, 100 + difference, 10)])
    assert (image_clusters(table).tolist() == [0, 0]) is joined


@pytest.mark.parametrize(("width", "joined"), [(97, True), (96, False)])
def test_the_aspect_ratio_must_agree(width: int, joined: bool) -> None:
    table = artificial([(1, 0, 100, 100), (2, 0, 100, width)])
    table.height[:] = 100
    assert (image_clusters(table).tolist() == [0, 0]) is joined


def test_the_best_representative_has_more_pixels_then_the_smaller_sha256() -> None:
    table = artificial([(1, 0, 9, 10), (2, 0, 9, 20), (3, 0, 9, 20)])
    best = min((1, 2), key=lambda place: table.sha256s[place])
    assert image_clusters(table).tolist() == [best] * 3


def test_published_images_stay_representatives() -> None:
    table = artificial([(1, 0, 9, 10), (2, 1, 9, 20), (3, 3, 9, 30), (1, 0, 9, 10), (4, 1 << 40, 200, 5)])
    published = np.array([True, True, False, False, False])
    assert image_clusters(table).tolist() == [2, 2, 2, 2, 4]
    # Image 2 joins the better of the published ones, image 3 the one that it equals.
    assert image_clusters(table, published=published).tolist() == [0, 1, 1, 0, 4]


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask of 1 images"):
        image_clusters(artificial([(1, 0, 9, 10)]), published=np.zeros(2, np.bool_))


rows_of_images = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from([0, 1, 7, 15, 0xFF, 0xF0F, 1 << 63, (1 << 64) - 1]),
        st.sampled_from([0, 7, 8, 15, 16, 24, 200]),
        st.integers(1, 4),
    ),
    max_size=12,
)


def star_clusters(table: FingerprintTable, published: NDArray[np.bool_]) -> list[int]:
    """The definition, image by image."""

    def is_alike(one: int, two: int) -> bool:
        near = (int(table.perceptual[one]) ^ int(table.perceptual[two])).bit_count() <= 4
        return near and bool(abs(table.thumbnail[one].astype(int) - table.thumbnail[two]).max() <= 8)

    order = sorted(
        range(len(table)), key=lambda at: (not published[at], -(int(table.width[at]) ** 2), table.sha256s[at])
    )
    found, kept = list(range(len(table))), list[int]()
    for image in order:
        twins = [other for other in kept if (table.pixels[other] == table.pixels[image]).all()]
        alike = [other for other in kept if is_alike(other, image)]
        if published[image] or not (twins or alike):
            kept.append(image)
        else:
            found[image] = (twins or alike)[0]
    return found


def consistent(rows: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Equal content and side mean equal hash and colour, as with true pixels."""
    first: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    return [first.setdefault((row[0], row[3]), row) for row in rows]


@settings(max_examples=150, deadline=None)
@given(rows_of_images, st.integers(0, 2**12 - 1), st.randoms(use_true_random=False))
def test_clusters_follow_the_definition_in_any_order(
    rows: list[tuple[int, int, int, int]], mask: int, rng: random.Random
) -> None:
    table = artificial(consistent(rows))
    published = np.array([bool(mask >> place & 1) for place in range(len(rows))], np.bool_)
    found = image_clusters(table, published=published)
    assert found.tolist() == star_clusters(table, published)

    shuffled = np.array(rng.sample(range(len(rows)), len(rows)), np.int64)
    again = image_clusters(table.take(shuffled), published=published[shuffled], num_workers=1)
    np.testing.assert_array_equal(shuffled[again], found[shuffled])


@settings(max_examples=60, deadline=None)
@given(rows_of_images)
def test_a_refresh_without_new_images_changes_nothing(rows: list[tuple[int, int, int, int]]) -> None:
    table = artificial(consistent(rows))
    found = image_clusters(table)
    published = found == np.arange(len(rows))
    np.testing.assert_array_equal(image_clusters(table, published=published), found)


def test_very_many_blank_images_are_clustered_at_once() -> None:
    """Of one hash each: 50,000 equal ones, and 50,000 of random colours, which would be 1.25 thousand million pairs."""
    num = 100_000
    table = FingerprintTable.empty([f"{place:064x}" for place in range(num)])
    colours = np.random.default_rng(1).integers(0, 256, (num, 3), np.uint8)
    colours[: num // 2] = 255
    table.thumbnail[:] = np.tile(colours, 256)
    table.pixels[:, 0] = np.arange(num)
    table.perceptual[:] = 1 << 63
    table.width[:] = table.height[:] = 10
    table.is_valid[:] = True
    found = image_clusters(table)
    assert (found[: num // 2] == 0).all()
    assert len(np.unique(found)) < num // 4
