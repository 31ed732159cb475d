"""What a shard's rows are compared by: one record of fixed width per row, and its tokens. The form that persists.

Made once when a shard is new, from the Arrow table of its samples, and stored as an uncompressed Arrow file, of which a
later run maps only the columns it needs. Nothing here is a Python object per row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from filters.flat_texts import FlatTexts
from filters.hashing import fold64, joined64, xxh64
from filters.images import FingerprintTable
from filters.kernels import kernel
from filters.signatures import BandShape, MinHashScheme, band_keys
from filters.text_columns import read_texts
from filters.word_table import WordTable

_MAX_PIXELS, _MAX_LENGTH = 2**38 - 1, 2**24 - 1
UNPUBLISHED, _UNANSWERED = np.uint64(2**63), np.uint64(2**62)
_HEX_CHARACTERS = 32

Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Features:
    """The rows of a shard, structure of arrays; all uint64 [num_rows] where nothing else is said.

    exact, exact_more: 128-bit digest of pixels, options and normalised question; equal for exact duplicates.
    block: digest of pictures, options and decisive tokens; rows of different blocks are never near duplicates.
    answer: digest of the normalised reference answer, 0 for none. named: digest of source and source id, 0 for none.
    goodness, id_high, id_low: the order of rows, see `filters.row_order`.
    num_compared: int32, words, or 0 for rows too short for near comparison. bands: [num_bands, num_rows].
    words: of the compared text. context: words of a text whose shingles do not count, if there is one.
    """

    exact: Keys
    exact_more: Keys
    block: Keys
    answer: Keys
    named: Keys
    goodness: Keys
    id_high: Keys
    id_low: Keys
    num_compared: NDArray[np.int32]
    bands: Keys
    words: WordTable
    context: WordTable | None = None

    def __len__(self) -> int:
        return len(self.exact)

    def published(self, rows: NDArray[np.int64]) -> Features:
        """Returns features in which some rows are in the corpus already: better than every row that is not."""
        goodness = self.goodness.copy()
        goodness[rows] &= ~UNPUBLISHED
        return replace(self, goodness=goodness)

    def to_table(self) -> pa.Table:
        """Returns an Arrow table, one column per array and band; `filters.feature_files` reads it."""
        columns = {name: pa.array(getattr(self, name)) for name in COLUMNS}
        columns |= {f"band_{number}": pa.array(keys) for number, keys in enumerate(self.bands)}
        for name, words in (("words", self.words), ("context", self.context)):
            if words is not None:
                columns[name] = pa.LargeListArray.from_arrays(pa.array(words.offsets), pa.array(words.hashes))
        return pa.table(columns)


COLUMNS = tuple(field.name for field in fields(Features) if field.name not in ("bands", "words", "context"))


def stored_words(table: pa.Table, name: str) -> WordTable:
    """Returns the words in a column of a table of features, without a copy where they are one chunk, as in a file."""
    column = table[name]
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return WordTable(array.values.to_numpy(), array.offsets.to_numpy())


@dataclass(frozen=True, slots=True)
class PictureNames:
    """What an image is called where rows are compared; images that are not among `known` by their sha256.

    known: sha256s, 64 hex digits as bytes [num_images], ascending. pixels: uint64 [num_images, 2], digest of what the
    image shows. is_valid: bool, whether it could be decoded. representative: int64, the place in `known` of the image
    that stands for all that are near copies.
    """

    known: NDArray[np.bytes_]
    pixels: Keys
    is_valid: NDArray[np.bool_]
    representative: NDArray[np.int64]

    @classmethod
    def of(cls, table: FingerprintTable, representative: NDArray[np.int64]) -> PictureNames:
        """Returns the names of fingerprinted images. representative: int64 [num_images], see `image_clusters`."""
        order = np.argsort(table.sha256s)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(
            table.sha256s[order], table.pixels[order], table.is_valid[order], rank[np.asarray(representative)[order]]
        )

    @classmethod
    def none(cls) -> PictureNames:
        return cls(np.empty(0, "S64"), np.empty((0, 2), np.uint64), np.empty(0, np.bool_), np.empty(0, np.int64))

    @classmethod
    def from_table(cls, table: pa.Table) -> PictureNames:
        """Inverse of `to_table`."""
        table = table.combine_chunks()
        known = np.frombuffer(table["known"].chunk(0).buffers()[1], "S64", table.num_rows) if len(table) else ()
        columns = {name: table[name].to_numpy() for name in ("high", "low", "is_valid", "representative")}
        pixels = np.stack([columns["high"], columns["low"]], axis=1)
        return cls(np.asarray(known, "S64"), pixels, columns["is_valid"], columns["representative"])

    def to_table(self) -> pa.Table:
        """Returns an Arrow table, for other processes to read."""
        content = pa.py_buffer(np.ascontiguousarray(self.known).tobytes())
        known = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), len(self.known), [None, content])
        return pa.table(
            {
                "known": known,
                "high": self.pixels[:, 0],
                "low": self.pixels[:, 1],
                "is_valid": self.is_valid,
                "representative": self.representative,
            }
        )

    def digest(self, sha256s: pa.Array) -> int:
        """Returns a digest of what these images are called."""
        names = pc.unique(sha256s).sort()
        return int(
            fold64(np.concatenate([string_keys(self.pixel_names(names)), string_keys(self.picture_names(names))]))
        )

    def pixel_names(self, sha256s: pa.Array) -> pa.Array:
        """Returns names that images of equal pixels share."""
        names, places = self._looked_up(sha256s)
        found = np.flatnonzero(places >= 0)
        found = found[self.is_valid[places[found]]]
        for place, pixels in zip(found.tolist(), self.pixels[places[found]], strict=True):
            names[place] = pixels.tobytes().hex()
        return pa.array(names, pa.string())

    def picture_names(self, sha256s: pa.Array) -> pa.Array:
        """Returns names that near copies share: the sha256 of the image that stands for them."""
        names, places = self._looked_up(sha256s)
        found = np.flatnonzero(places >= 0)
        for place, name in zip(found.tolist(), self.known[self.representative[places[found]]].tolist(), strict=True):
            names[place] = name.decode()
        return pa.array(names, pa.string())

    def _looked_up(self, sha256s: pa.Array) -> tuple[list[str], NDArray[np.int64]]:
        """Returns the sha256s, and their places in `known`, -1 for those that are not there."""
        names: list[str] = sha256s.to_pylist()
        if not len(self.known):
            return names, np.full(len(names), -1, np.int64)
        # A longer name would be cut to the width of those known, and found by mistake.
        wanted = np.array([name.encode() if len(name) == 64 else b"" for name in names], "S64")
        places = np.minimum(np.searchsorted(self.known, wanted), len(self.known) - 1)
        return names, np.where(self.known[places] == wanted, places, -1)


def sample_features(
    samples: pa.Table, scheme: MinHashScheme, shape: BandShape, pictures: PictureNames | None = None
) -> Features:
    """Returns the features of a table with the columns of `schemas.samples.SAMPLE_SCHEMA`.

    pictures: what its images are called. Releases the interpreter lock during most of the work.
    """
    question, answer = read_texts(samples["question"]), read_texts(samples["answer"])
    images = _images(samples["images"], pictures or PictureNames.none())
    options = _lists(samples["choices"])
    choices = read_texts(options.values)
    option_keys = folded_lists(choices.exact[:, 0], options.offsets)
    more_option_keys = folded_lists(choices.exact[:, 1], options.offsets)
    pixel_keys, picture_keys = (folded_lists(keys, images.offsets) for keys in (images.pixels, images.pictures))
    block = joined(joined(picture_keys, option_keys), question.decisive)
    ids = hex_ids(samples["id"])
    return Features(
        exact=joined(joined(pixel_keys, option_keys), question.exact[:, 0]),
        exact_more=joined(joined(~pixel_keys, more_option_keys), question.exact[:, 1]),
        block=block,
        answer=np.where(answer.lengths > 0, answer.exact[:, 0] | np.uint64(1), np.uint64(0)),
        named=_named(samples["source"], samples["source_id"]),
        goodness=_goodness(answer.lengths > 0, images.num_pixels, question.lengths),
        id_high=ids[:, 0],
        id_low=ids[:, 1],
        num_compared=np.where(question.num_words >= scheme.shingle_words, question.num_words, 0).astype(np.int32),
        bands=band_keys(question.words, block, scheme, shape),
        words=question.words,
    )


def _goodness(answered: NDArray[np.bool_], pixels: NDArray[np.int64], lengths: NDArray[np.int64]) -> Keys:
    packed = np.where(answered, np.uint64(0), _UNANSWERED) | UNPUBLISHED
    packed |= (np.uint64(_MAX_PIXELS) - np.minimum(pixels, _MAX_PIXELS).astype(np.uint64)) << np.uint64(24)
    return np.asarray(packed | (np.uint64(_MAX_LENGTH) - np.minimum(lengths, _MAX_LENGTH).astype(np.uint64)))


@dataclass(frozen=True, slots=True)
class _Lists:
    """The values of a list column in one array, and offsets int64 [num_rows + 1] into it."""

    values: pa.Array
    offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Images:
    pixels: Keys
    pictures: Keys
    offsets: NDArray[np.int64]
    num_pixels: NDArray[np.int64]


def list_offsets(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Returns where each list of a list column begins among the values of all, and where the last ends."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _lists(column: pa.ChunkedArray) -> _Lists:
    return _Lists(_flat(pc.list_flatten(column)), list_offsets(column))


def image_names(column: pa.ChunkedArray) -> pa.Array:
    """Returns the sha256 of all images of a column of samples, one after the other."""
    return _flat(pc.struct_field(pc.list_flatten(column), "sha256"))


def _flat(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _images(column: pa.ChunkedArray, pictures: PictureNames) -> _Images:
    """Returns digests of what the images are called, and the pixels of each row's images together."""
    lists, names = _lists(column), image_names(column)
    sides = [pc.fill_null(pc.struct_field(lists.values, side), 0).to_numpy() for side in ("width", "height")]
    sums = np.zeros(len(names) + 1, np.int64)
    np.cumsum(sides[0].astype(np.int64) * sides[1], out=sums[1:])
    return _Images(
        string_keys(pictures.pixel_names(names)),
        string_keys(pictures.picture_names(names)),
        lists.offsets,
        sums[lists.offsets[1:]] - sums[lists.offsets[:-1]],
    )


def _named(sources: pa.ChunkedArray, names: pa.ChunkedArray) -> Keys:
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(names, ""))
    is_named = pc.greater(pc.utf8_length(trimmed), 0).to_numpy()
    keys = joined(string_keys(sources), string_keys(trimmed)) | np.uint64(1)
    return np.where(is_named, keys, np.uint64(0))


def hex_ids(column: pa.ChunkedArray) -> Keys:
    """Returns the 128-bit ids as two numbers that order like the text. Raises ValueError: an id has not 32 digits."""
    texts = FlatTexts.of(column)
    keys = np.empty((len(texts), 2), np.uint64)
    if np.any(np.diff(texts.offsets) != _HEX_CHARACTERS) or not _read_hex(
        texts.content, texts.offsets, _hex_values(), keys
    ):
        raise ValueError("a sample's id must have 32 hexadecimal characters")
    return keys


@cache
def _hex_values() -> NDArray[np.uint8]:
    """Returns by byte what it means as a digit in base 16, 0xFF for other bytes."""
    values = np.full(256, 0xFF, np.uint8)
    for digit in "0123456789abcdefABCDEF":
        values[ord(digit)] = int(digit, 16)
    return values


@kernel
def _read_hex(content, offsets, values, keys):  # type: ignore[no-untyped-def]
    """Writes the numbers that 32 digits in base 16 stand for; says whether all were such digits."""
    seen = np.uint8(0)
    for row in range(len(keys)):
        place = np.uintp(offsets[row])
        for half in range(2):
            key = np.uint64(0)
            for _ in range(_HEX_CHARACTERS // 2):
                value = values[content[place]]
                seen |= value
                key = (key << np.uint64(4)) | np.uint64(value)
                place += np.uintp(1)
            keys[row, half] = key
    return seen < 0x10


def string_keys(column: pa.Array | pa.ChunkedArray) -> Keys:
    """Returns a 64-bit digest of each string as it is."""
    texts = FlatTexts.of(column)
    keys = np.empty(len(texts), np.uint64)
    _hash_rows(texts.content, texts.offsets, keys)
    return keys


def joined(first: Keys, second: Keys) -> Keys:
    """Returns digests of pairs in their order."""
    out = np.empty(len(first), np.uint64)
    _join(np.ascontiguousarray(first), np.ascontiguousarray(second), out)
    return out


def folded_lists(keys: Keys, offsets: NDArray[np.int64]) -> Keys:
    """Returns a digest of each list of keys, its length and order included."""
    out = np.empty(len(offsets) - 1, np.uint64)
    _fold(np.ascontiguousarray(keys), offsets, out)
    return out


@kernel
def _hash_rows(content, offsets, out):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        out[row] = xxh64(content, offsets[row], offsets[row + 1], np.uint64(0))


@kernel
def _join(first, second, out):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        out[row] = joined64(first[row], second[row])


@kernel
def _fold(keys, offsets, out):  # type: ignore[no-untyped-def]
    for row in range(len(out)):
        state = np.uint64(offsets[row + 1] - offsets[row])
        for place in range(offsets[row], offsets[row + 1]):
            state = joined64(state, keys[place])
        out[row] = state


@kernel
def copy_rows(values, starts, offsets, out):  # type: ignore[no-untyped-def]
    """Copies rows of flat values, from `starts`, to where `offsets` [num_rows + 1] say in `out`."""
    for row in range(len(starts)):
        for place in range(offsets[row + 1] - offsets[row]):
            out[offsets[row] + place] = values[starts[row] + place]
