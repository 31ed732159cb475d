"""Framed, checksummed records in an append-only file: what may be believed of it after any damage.

    frame   marker (4 bytes) | length (u32, little endian) | crc32 of length and payload (u32) | payload

A payload is one ASCII JSON object. The marker holds bytes that are not ASCII, so no payload, whatever a hostile reply
put into it, can contain one, and after damage the reader finds the next true record by looking for it: a flipped bit
costs one record and not all that follow. A record is believed only when its checksum agrees.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator

MAX_PAYLOAD_BYTES = 64 * 2**20
"""Longest payload that is written or believed: a damaged length must not make us allocate gigabytes."""
_MARKER = b"\xb1\xf0J\x01"
_FRAME = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
_READ_BYTES = 4096
_SCAN_BYTES = 2**20
_WINDOW_BYTES = 2**20


def framed(payload: bytes) -> bytes:
    """Returns the frame of a payload of at most `MAX_PAYLOAD_BYTES`."""
    return _FRAME.pack(_MARKER, len(payload), _checksum(payload)) + payload


class Window:
    """Reads a file in large pieces, for those who go through it from front to back.

    Reading frame by frame, threads would wait for each other's Python after each of them.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._start = 0
        self._content = b""

    def pread(self, size: int, at: int) -> bytes:
        """Returns the bytes at a place, fewer where the file ends. Raises OSError."""
        begin = at - self._start
        if begin < 0 or begin + size > len(self._content):
            self._content, self._start, begin = os.pread(self._file, max(size, _WINDOW_BYTES), at), at, 0
        return self._content[begin : begin + size]


def scan(file: int, start: int, stop: int) -> Iterator[tuple[int, int, bytes]]:
    """Yields (start, stop, payload) of every believed frame that lies in bytes [start, stop); skips what is damaged.

    Raises OSError.
    """
    window, at = Window(file), start
    while at < stop:
        payload = payload_at(window.pread, at, stop)
        if payload is not None:
            end = at + _FRAME.size + len(payload)
            yield at, end, payload
            at = end
        else:
            at = _next_marker(file, at + 1, stop)


def payload_at(pread: Callable[[int, int], bytes], at: int, stop: int) -> bytes | None:
    """Returns the payload of the frame at a place, None when no believable frame that ends by `stop` begins there.

    pread: returns so many bytes at a place of the file. Raises OSError.
    """
    # Most records are small: one read takes frame and payload together.
    head = pread(max(0, min(_READ_BYTES, stop - at)), at)
    if len(head) < _FRAME.size:
        return None
    marker, length, checksum = _FRAME.unpack_from(head)
    size = _FRAME.size + length
    if marker != _MARKER or length > MAX_PAYLOAD_BYTES or at + size > stop:
        return None
    frame = head[:size] if size <= len(head) else head + pread(size - len(head), at + len(head))
    payload = frame[_FRAME.size :]
    if len(payload) != length or _checksum(payload) != checksum:
        return None
    # A checksum of 32 bits agrees by chance once in four thousand million: look at the shape, too.
    return payload if payload.startswith(b'{"') and payload.endswith(b"}") else None


def _next_marker(file: int, at: int, stop: int) -> int:
    """Returns the first place from `at` on where a marker begins, or `stop`."""
    while at < stop:
        window = os.pread(file, min(_SCAN_BYTES, stop - at), at)
        if not window:
            return stop
        found = window.find(_MARKER)
        if found >= 0:
            return at + found
        # A marker may straddle two windows.
        at += max(1, len(window) - len(_MARKER) + 1)
    return stop


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_LENGTH.pack(len(payload))))
