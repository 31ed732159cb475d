"""Texts in ASCII read eight bytes at a time: where letters, spaces and other signs stand, as masks of one bit a byte.

A loop over the bytes of a text mispredicts a branch at the end of nearly every word, which costs more than all else
that is done with a word. Here bytes are classified within 64-bit integers, and places are taken from the masks in
groups of eight whether or not as many are left (the flattening of Langdale and Lemire, "Parsing gigabytes of JSON per
second", section 3.1.3). Integers are read as little-endian, as Arrow's buffers are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from filters.kernels import inlined

_BLOCK = 64
"""Bytes that one integer of a mask stands for; texts are padded with spaces to more than their length by up to one."""

_EACH_BYTE = 0x0101010101010101
_TOP, _CASE = np.uint64(0x80 * _EACH_BYTE), np.uint64(0x20 * _EACH_BYTE)
_TO_A, _BEYOND_Z = np.uint64((0x80 - 0x61) * _EACH_BYTE), np.uint64((0x80 - 0x7B) * _EACH_BYTE)
_TO_SIGN, _BEYOND_SIGN = np.uint64((0x80 - 0x21) * _EACH_BYTE), np.uint64((0x80 - 0x7F) * _EACH_BYTE)
_TO_ONE = np.uint64(0x7F * _EACH_BYTE)
_GATHER = np.uint64(0x0102040810204080)
"""Multiplied by it, the lowest bits of eight bytes come together in the highest byte."""


class AsciiRoom(NamedTuple):
    """Room for one text, made by `ascii_room`. content: uint8, the text and its padding. eights: the same as uint64.

    letters, spaces: uint64, masks: bit i % 64 of integer i // 64 is for byte i. letter_bytes, space_bytes: the same as
    uint8. runs: int64, where runs of letters begin and end, see `letter_runs`.
    """

    content: NDArray[np.uint8]
    eights: NDArray[np.uint64]
    letters: NDArray[np.uint64]
    letter_bytes: NDArray[np.uint8]
    spaces: NDArray[np.uint64]
    space_bytes: NDArray[np.uint8]
    runs: NDArray[np.int64]


class AsciiTraits(NamedTuple):
    """is_ascii: if not, nothing else is meant. is_tidy: no white space but single spaces inside, nothing invisible."""

    is_ascii: bool
    is_tidy: bool
    has_lower: bool
    has_upper: bool


def _ctpop(typing: Any, value: Any) -> Any:
    return types.uint64(types.uint64), lambda context, builder, signature, values: builder.ctpop(values[0])


def _cttz(typing: Any, value: Any) -> Any:
    return types.uint64(types.uint64), lambda context, builder, signature, values: builder.cttz(
        values[0], context.get_constant(types.boolean, False)
    )


_num_ones: Any = intrinsic(_ctpop)
"""Returns how many bits of a uint64 are set, in one instruction."""
_lowest_one: Any = intrinsic(_cttz)
"""Returns the place of the lowest bit of a uint64 that is set, 64 if none is, in one instruction."""


def ascii_room(longest: int) -> AsciiRoom:
    """Returns room for texts of up to `longest` bytes."""
    size = (longest // _BLOCK + 2) * _BLOCK
    content, letters, spaces = (np.empty(num, np.uint8) for num in (size, size // 8, size // 8))
    masks = letters.view(np.uint64), letters, spaces.view(np.uint64), spaces
    return AsciiRoom(content, content.view(np.uint64), *masks, np.empty(size, np.int64))


@inlined
def pad_ascii(room, size):  # type: ignore[no-untyped-def]
    """Fills the content with spaces after `size` bytes, as `ascii_traits` wants it."""
    for place in range(np.uintp(size), np.uintp((size // _BLOCK + 1) * _BLOCK)):
        room.content[place] = 0x20


@inlined
def ascii_traits(room, size):  # type: ignore[no-untyped-def]
    """Fills the masks for the first `size` bytes of the content, which are padded; returns `AsciiTraits`.

    Sums stay within their byte because no byte of a text in ASCII is above 0x7F.
    """
    eights, letter_bytes, space_bytes = room.eights, room.letter_bytes, room.space_bytes
    seen, untidy, upper, lower = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for place in range(np.uintp((size // _BLOCK + 1) * (_BLOCK // 8))):
        eight = eights[place]
        small = eight | _CASE
        letter = (small + _TO_A) & ~(small + _BEYOND_Z) & _TOP
        space = ~((eight ^ _CASE) + _TO_ONE) & _TOP
        seen |= eight
        untidy |= ((eight + _TO_SIGN) & ~(eight + _BEYOND_SIGN) & _TOP) ^ space ^ _TOP  # neither a sign nor a space
        upper |= letter & ~(eight << np.uint64(2))  # the bit of the case, moved to the top
        lower |= letter & (eight << np.uint64(2))
        letter_bytes[place] = np.uint8(((letter >> np.uint64(7)) * _GATHER) >> np.uint64(56))
        space_bytes[place] = np.uint8(((space >> np.uint64(7)) * _GATHER) >> np.uint64(56))
    is_tidy = untidy == 0 and not _has_loose_space(room.spaces, size)
    return AsciiTraits((seen & _TOP) == 0, is_tidy, lower != 0, upper != 0)


@inlined
def _has_loose_space(spaces, size):  # type: ignore[no-untyped-def]
    """Says whether a space begins the text, ends it, or follows another."""
    found, before = np.uint64(0), np.uint64(size > 0)
    for block in range(np.uintp(size // _BLOCK + 1)):
        mask = spaces[block]
        if block == np.uintp(size // _BLOCK):
            mask &= (np.uint64(2) << np.uint64(size % _BLOCK)) - np.uint64(1)  # of the padding, one space
        found |= mask & ((mask << np.uint64(1)) | before)
        before = mask >> np.uint64(63)
    return found != 0


@inlined
def letter_runs(letters, size, edges):  # type: ignore[no-untyped-def]
    """Writes where each run of letters begins and ends, in turn; returns the number of places.

    No letter stands at `size` or after it. Up to seven places too many are written after the last.
    """
    num, before = np.uintp(0), np.uint64(0)
    for block in range(np.uintp(size // _BLOCK + 1)):
        mask = letters[block]
        changes = mask ^ ((mask << np.uint64(1)) | before)
        before = mask >> np.uint64(63)
        after = num + np.uintp(_num_ones(changes))
        start = np.uint64(block) * np.uint64(_BLOCK)
        while changes:
            for _ in range(8):
                edges[num] = np.int64(start + _lowest_one(changes))
                changes &= changes - np.uint64(1)
                num += np.uintp(1)
        num = after
    return np.int64(num)


@inlined
def next_sign(room, place, size):  # type: ignore[no-untyped-def]
    """Returns the first place from `place` on that holds neither letter nor space; `size` if none does."""
    first = place // _BLOCK
    for block in range(first, size // _BLOCK + 1):
        signs = ~(room.letters[block] | room.spaces[block])
        if block == first:
            signs &= ~np.uint64(0) << np.uint64(place % _BLOCK)
        if signs:
            return min(size, block * _BLOCK + np.int64(_lowest_one(signs)))
    return size
