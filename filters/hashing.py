"""xxHash over slices of a flat byte array, compiled: the 32- and 64-bit variants, equal to the `xxhash` package.

Source: the xxHash specification (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md). Written here because
a kernel that hashes millions of shingles cannot call a Python function for each. Numba caches compiled callers without
looking at this file: whoever changes a function here must delete `filters/__pycache__`.
"""

from __future__ import annotations

import numba
import numpy as np

_P32 = (2654435761, 2246822519, 3266489917, 668265263, 374761393)
_A1, _A2, _A3, _A4, _A5 = (np.uint32(prime) for prime in _P32)
_P64 = (11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)
_B1, _B2, _B3, _B4, _B5 = (np.uint64(prime) for prime in _P64)
FOLD_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Base of the polynomial of `folded64`; odd: 2**64 divided by the golden ratio."""


@numba.njit(cache=True, nogil=True, inline="always")
def _rotated32(value, bits):  # type: ignore[no-untyped-def]
    return np.uint32((value << np.uint32(bits)) | (value >> np.uint32(32 - bits)))


@numba.njit(cache=True, nogil=True, inline="always")
def _rotated64(value, bits):  # type: ignore[no-untyped-def]
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True, nogil=True, inline="always")
def _read32(data, place):  # type: ignore[no-untyped-def]
    at = np.uintp(place)  # an unsigned index is taken as it is; a signed one may count from the end, and is slower
    return np.uint32(
        np.uint32(data[at])
        | (np.uint32(data[at + np.uintp(1)]) << np.uint32(8))
        | (np.uint32(data[at + np.uintp(2)]) << np.uint32(16))
        | (np.uint32(data[at + np.uintp(3)]) << np.uint32(24))
    )


@numba.njit(cache=True, nogil=True, inline="always")
def _read64(data, place):  # type: ignore[no-untyped-def]
    return np.uint64(_read32(data, place)) | (np.uint64(_read32(data, place + 4)) << np.uint64(32))


@numba.njit(cache=True, nogil=True)
def xxh32(data, start, end, seed):  # type: ignore[no-untyped-def]
    """Returns XXH32 (uint32) of data[start:end]. data: uint8 [any]. seed: uint32."""
    place, length = start, end - start
    seed = np.uint32(seed)
    if length >= 16:
        v1, v2 = np.uint32(np.uint32(seed + _A1) + _A2), np.uint32(seed + _A2)
        v3, v4 = seed, np.uint32(seed - _A1)
        while place + 16 <= end:
            v1 = np.uint32(_rotated32(np.uint32(v1 + np.uint32(_read32(data, place) * _A2)), 13) * _A1)
            v2 = np.uint32(_rotated32(np.uint32(v2 + np.uint32(_read32(data, place + 4) * _A2)), 13) * _A1)
            v3 = np.uint32(_rotated32(np.uint32(v3 + np.uint32(_read32(data, place + 8) * _A2)), 13) * _A1)
            v4 = np.uint32(_rotated32(np.uint32(v4 + np.uint32(_read32(data, place + 12) * _A2)), 13) * _A1)
            place += 16
        mixed = np.uint32(_rotated32(v1, 1) + _rotated32(v2, 7))
        mixed = np.uint32(mixed + np.uint32(_rotated32(v3, 12) + _rotated32(v4, 18)))
    else:
        mixed = np.uint32(seed + _A5)
    mixed = np.uint32(mixed + np.uint32(length))
    while place + 4 <= end:
        mixed = np.uint32(_rotated32(np.uint32(mixed + np.uint32(_read32(data, place) * _A3)), 17) * _A4)
        place += 4
    while place < end:
        mixed = np.uint32(_rotated32(np.uint32(mixed + np.uint32(np.uint32(data[place]) * _A5)), 11) * _A1)
        place += 1
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(15))) * _A2)
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * _A3)
    return np.uint32(mixed ^ (mixed >> np.uint32(16)))


@numba.njit(cache=True, nogil=True, inline="always")
def _round64(state, value):  # type: ignore[no-untyped-def]
    return _rotated64(state + value * _B2, 31) * _B1


@numba.njit(cache=True, nogil=True)
def xxh64(data, start, end, seed):  # type: ignore[no-untyped-def]
    """Returns XXH64 (uint64) of data[start:end]. data: uint8 [any]. seed: uint64."""
    place, length = start, end - start
    seed = np.uint64(seed)
    if length >= 32:
        v1, v2, v3, v4 = seed + _B1 + _B2, seed + _B2, seed, seed - _B1
        while place + 32 <= end:
            v1 = _round64(v1, _read64(data, place))
            v2 = _round64(v2, _read64(data, place + 8))
            v3 = _round64(v3, _read64(data, place + 16))
            v4 = _round64(v4, _read64(data, place + 24))
            place += 32
        mixed = _rotated64(v1, 1) + _rotated64(v2, 7) + _rotated64(v3, 12) + _rotated64(v4, 18)
        for state in (v1, v2, v3, v4):
            mixed = (mixed ^ _round64(np.uint64(0), state)) * _B1 + _B4
    else:
        mixed = seed + _B5
    mixed += np.uint64(length)
    while place + 8 <= end:
        mixed = _rotated64(mixed ^ _round64(np.uint64(0), _read64(data, place)), 27) * _B1 + _B4
        place += 8
    if place + 4 <= end:
        mixed = _rotated64(mixed ^ (np.uint64(_read32(data, place)) * _B1), 23) * _B2 + _B3
        place += 4
    while place < end:
        mixed = _rotated64(mixed ^ (np.uint64(data[place]) * _B5), 11) * _B1
        place += 1
    return avalanche64(mixed)


@numba.njit(cache=True, nogil=True, inline="always")
def avalanche64(mixed):  # type: ignore[no-untyped-def]
    """Returns the final mixing of XXH64: a bijection of uint64 in which every bit depends on every other."""
    mixed = (mixed ^ (mixed >> np.uint64(33))) * _B2
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _B3
    return mixed ^ (mixed >> np.uint64(32))


@numba.njit(cache=True, nogil=True, inline="always")
def joined64(state, value):  # type: ignore[no-untyped-def]
    """Returns a state (uint64) that depends on a state and a value in their order, to fold a list of hashes."""
    return avalanche64(_rotated64(state ^ _round64(np.uint64(0), value), 27) * _B1 + _B4)


@numba.njit(cache=True, nogil=True, inline="always")
def folded64(state, value):  # type: ignore[no-untyped-def]
    """Returns the next state of a polynomial over hashes, modulo 2**64: a fold that costs one multiplication."""
    return state * FOLD_BASE + value


@numba.njit(cache=True, nogil=True, inline="always")
def folding_end64(state, length):  # type: ignore[no-untyped-def]
    """Returns the digest of a fold of `length` hashes that began with 0."""
    return avalanche64(state + length * _B4)


@numba.njit(cache=True, nogil=True)
def fold64(hashes):  # type: ignore[no-untyped-def]
    """Returns the digest (uint64) of hashes, uint64 [any], in their order."""
    state = np.uint64(0)
    for value in hashes:
        state = folded64(state, value)
    return folding_end64(state, np.uint64(len(hashes)))


@numba.njit(cache=True, nogil=True, inline="always")
def word64(data, start, end):  # type: ignore[no-untyped-def]
    """Returns the hash (uint64) of a word, data[start:end], of one byte or more; data goes on for 8 bytes more.

    Most words have at most eight bytes, where the general hash spends its time on telling lengths apart: here they are
    one load. Of words of one length up to eight bytes no two have the same hash, as every step can be undone.
    """
    at, left = np.uintp(start), np.uint64(end - start)
    state = left * _B5
    while left > np.uint64(8):
        state = (state ^ _read64(data, at)) * _B1
        state ^= state >> np.uint64(32)
        at += np.uintp(8)
        left -= np.uint64(8)
    last = _read64(data, at) & (np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - np.uint64(8) * left))
    return avalanche64((state ^ last) * _B1)


@numba.njit(cache=True, nogil=True)
def word_hash64(data, end):  # type: ignore[no-untyped-def]
    """Returns `word64` of data[:end]: for calls from Python."""
    return word64(data, 0, end)
