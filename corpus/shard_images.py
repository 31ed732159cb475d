"""The images of a shard on their way from the store into a column.

Every image is copied once, right after it was read, into memory that all row groups of a shard use in turn: memory that
is asked for anew for each group, and images kept of which no further row has need, took longer than the reading.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpus.shard_texts import list_offsets
from schemas.errors import RowError, StorageError
from schemas.rows import CORPUS_SCHEMA

_CACHED_BYTES = 64 * 2**20
_FIRST_BYTES = 4 * 2**20
_KEPT_BYTES = 256 * 2**20
"""More memory than this is given back after a row group."""


def image_names(rows: pa.Table) -> list[list[str]]:
    """Returns the sha256 of the images of each row."""
    images = rows["images"].combine_chunks()
    names = images.flatten().field("sha256").to_pylist()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(images), 0).to_numpy(zero_copy_only=False)).tolist()
    return [names[start:end] for start, end in pairwise([0, *ends])]


class SharedImages:
    """Reads images; keeps those that several rows of a shard show. Memory: at most `_CACHED_BYTES` of images."""

    def __init__(self, rows: pa.Table, read_image: Callable[[str], bytes]) -> None:
        self._read_image = read_image
        counts = pc.value_counts(pc.struct_field(pc.list_flatten(rows["images"]), "sha256"))
        self._shared = set(counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist())
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._num_bytes = 0

    def read(self, sha256: str) -> bytes:
        """Returns the bytes of an image. Raises RowError: it is not in the store. StorageError: the store fails."""
        content = self._contents.get(sha256)
        if content is None:
            content = self._read(sha256)
            if sha256 in self._shared:
                self._keep(sha256, content)
        return content

    def _read(self, sha256: str) -> bytes:
        try:
            content = self._read_image(sha256)
        except (KeyError, FileNotFoundError) as error:
            raise RowError("image_missing", f"image {sha256} is not in the image store") from error
        except OSError as error:
            raise StorageError(f"cannot read image {sha256}: {error}") from error
        if not content:
            raise RowError("image_missing", f"image {sha256} is empty in the image store")
        return content

    def _keep(self, sha256: str, content: bytes) -> None:
        self._contents[sha256] = content
        self._num_bytes += len(content)
        while self._num_bytes > _CACHED_BYTES:
            self._num_bytes -= len(self._contents.popitem(last=False)[1])


class GroupImages:
    """The images of the rows of one row group, one behind the other.

    The column is a view of memory that the next group overwrites: it must be written before `clear`.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read
        self._memory = np.empty(_FIRST_BYTES, np.uint8).data
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        if len(self._memory) > _KEPT_BYTES:
            self._memory = np.empty(_FIRST_BYTES, np.uint8).data
        self._names: list[str] = []
        self._ends = [0]
        self._row_ends = [0]

    def add_row(self, names: Sequence[str]) -> int:
        """Reads the images of the next row and returns how many bytes they have.

        Raises RowError: one is missing; the row is not added. StorageError: the store fails.
        """
        before = self._ends[-1]
        try:
            for name in names:
                self._add(name, self._read(name))
        except RowError:
            self._cut(self._row_ends[-1])
            raise
        self._row_ends.append(len(self._names))
        return self._ends[-1] - before

    def drop_row(self) -> None:
        """Takes the last row back."""
        self._row_ends.pop()
        self._cut(self._row_ends[-1])

    def column(self) -> pa.ListArray:
        """Returns the images of each row, as in `CORPUS_SCHEMA`."""
        kind = CORPUS_SCHEMA.field("images").type
        ends = pa.py_buffer(np.array(self._ends, np.int32))
        contents = pa.py_buffer(self._memory[: self._ends[-1]])
        held = pa.BinaryArray.from_buffers(pa.binary(), len(self._names), [None, ends, contents])
        fields = list(kind.value_type)
        images = pa.StructArray.from_arrays([held, pa.array(self._names, pa.string())], fields=fields)
        return pa.ListArray.from_arrays(list_offsets(np.diff(self._row_ends)), images, type=kind)

    def _add(self, name: str, content: bytes) -> None:
        start, end = self._ends[-1], self._ends[-1] + len(content)
        if end > len(self._memory):
            larger = np.empty(max(end, 2 * len(self._memory)), np.uint8).data
            larger[:start] = self._memory[:start]
            self._memory = larger
        self._memory[start:end] = content
        self._names.append(name)
        self._ends.append(end)

    def _cut(self, num_images: int) -> None:
        del self._names[num_images:], self._ends[num_images + 1 :]
