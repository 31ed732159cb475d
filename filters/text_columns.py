"""Columns of raw texts turned into what duplicates are found by, a million rows a second and without an object per row.

`read_texts` gives for every row of an Arrow string column what `filters.normalise` says of its text, bit for bit: the
digest and length of the normalised text, its tokens as a `TokenTable`, and the digest of its decisive tokens. The rules
stand in `filters.normalise` alone; here they are compiled, driven by tables of code points that are made from the very
functions and character classes there. Rows that hold combining marks, joiners, conjoining Hangul or rarer things, for
which a table by code point is not enough, go through the Python functions one by one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from filters import normalise
from filters.hashing import xxh64
from filters.normalise import decisive_tokens, normalise_text, tokens
from filters.token_table import TokenTable

_NUM_CODES = 0x20000
"""Code points with an entry in the tables; rows with higher ones (rare Chinese characters) are read in Python."""

_LOWER, _UPPER, _RUN, _SPACE, _CLOSING, _LEADING, _NUMERIC, _ALPHA, _DIGIT, _ALNUM, _BRACKET, _SLOW = (
    1 << bit for bit in range(12)
)
_WORD_SLOTS = 1024
_EXACT_SEEDS = (0, 0x62696D6F6465)


@dataclass(frozen=True, slots=True)
class TextColumn:
    """What is known of each text of a column.

    exact: uint64 [num_rows, 2], 128-bit digest of the normalised text; equal for texts that are the same. lengths:
    int64 [num_rows], its characters. tokens: its tokens. num_tokens: int32 [num_rows]. decisive: uint64 [num_rows],
    digest of the tokens that must agree. An absent text is like an empty one.
    """

    exact: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    tokens: TokenTable
    num_tokens: NDArray[np.int32]
    decisive: NDArray[np.uint64]


class _CodeTables(NamedTuple):
    """By code point: how it is replaced (codes[starts[c]:starts[c + 1]]), its folded form, kind and flags.

    words: digests of the decisive words as an open hash table, 0 for an empty slot. openings: the first two letters
    with which such a word begins, as most words are seen not to be one by those.
    """

    starts: NDArray[np.int32]
    codes: NDArray[np.int32]
    folds: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    words: NDArray[np.uint64]
    openings: NDArray[np.bool_]


def read_texts(column: pa.Array | pa.ChunkedArray) -> TextColumn:
    """Returns what is known of each text of a string column, in order. Releases the interpreter lock while it works."""
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = flat.cast(pa.large_string()).fill_null("")
    num_rows = len(flat)
    buffers = flat.buffers()
    offsets = np.frombuffer(buffers[1], np.int64)[flat.offset : flat.offset + num_rows + 1]
    raw = np.frombuffer(buffers[2], np.uint8) if buffers[2] is not None and buffers[2].size else np.zeros(1, np.uint8)
    longest = int(np.diff(offsets).max(initial=0))
    exact = np.zeros((num_rows, 2), np.uint64)
    lengths, num_tokens = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int32)
    decisive, ends = np.zeros(num_rows, np.uint64), np.zeros(num_rows + 1, np.int64)
    text = np.empty(2 * int(offsets[-1] - offsets[0]) + 8, np.uint8)
    slow = np.zeros(num_rows, np.bool_)
    _read_rows(raw, offsets, code_tables(), longest, text, ends, exact, lengths, num_tokens, decisive, slow)
    table = TokenTable(text[: ends[-1]], ends)
    column_read = TextColumn(exact, lengths, table, num_tokens, decisive)
    places = np.flatnonzero(slow)
    return _with_slow_rows(column_read, flat, places) if len(places) else column_read


def _with_slow_rows(column: TextColumn, texts: pa.Array, places: NDArray[np.int64]) -> TextColumn:
    """Returns the column with the rows that the kernel left empty, read by the functions of `filters.normalise`."""
    filled: list[bytes] = []
    for place in places.tolist():
        text = normalise_text(texts[place].as_py())
        row = tokens(text)
        content = text.encode("utf-8", "surrogatepass")
        column.exact[place] = [xxhash.xxh64_intdigest(content, seed) for seed in _EXACT_SEEDS]
        column.lengths[place] = len(text)
        column.num_tokens[place] = len(row)
        column.decisive[place] = xxhash.xxh64_intdigest(
            " ".join(decisive_tokens(row)).encode("utf-8", "surrogatepass"), 0
        )
        filled.append(" ".join(row).encode("utf-8", "surrogatepass"))
    old = column.tokens
    sizes = np.diff(old.offsets)
    sizes[places] = [len(row) for row in filled]
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    pieces: list[NDArray[np.uint8]] = []
    before = 0
    for place, content in zip(places.tolist(), filled, strict=True):
        pieces += [old.text[old.offsets[before] : old.offsets[place]], np.frombuffer(content, np.uint8)]
        before = place + 1
    pieces.append(old.text[old.offsets[before] : old.offsets[-1]])
    table = TokenTable(np.concatenate(pieces), offsets)
    return TextColumn(column.exact, column.lengths, table, column.num_tokens, column.decisive)


@cache
def code_tables() -> _CodeTables:
    """Returns the tables, made from `filters.normalise` once a process, in about a third of a second."""
    translation = normalise._translation()
    composing = _composing_codes()
    run = re.compile(r"[^\W\d_]")
    starts, codes = np.zeros(_NUM_CODES + 1, np.int32), []
    folds, kinds = np.zeros(_NUM_CODES, np.int32), np.zeros(_NUM_CODES, np.uint8)
    flags = np.zeros(_NUM_CODES, np.uint16)
    for code in range(_NUM_CODES):
        char = chr(code)
        replaced = translation.get(code, char) or ""
        normal = replaced if replaced.isascii() else unicodedata.normalize("NFC", replaced)
        kind = normalise._kind(char)
        is_slow = 0xD800 <= code < 0xE000
        is_slow |= any(normalise._kind(part) == "M" or ord(part) in composing for part in char + normal)
        is_slow |= len(normal.encode("utf-8", "surrogatepass")) > len(char.encode("utf-8", "surrogatepass"))
        is_slow |= any(ord(part) >= _NUM_CODES for part in normal)
        codes += [] if is_slow else [ord(part) for part in normal]
        starts[code + 1] = len(codes)
        folded = unicodedata.normalize("NFC", char.casefold())
        can_fold = len(folded) == 1 and len(folded.encode("utf-8", "surrogatepass")) <= len(
            char.encode("utf-8", "surrogatepass")
        )
        folds[code] = ord(folded) if can_fold else -1
        kinds[code] = ord(kind)
        flags[code] = sum(
            flag
            for flag, holds in (
                (_LOWER, char.islower()),
                (_UPPER, char.isupper() or unicodedata.category(char) == "Lt"),
                (_RUN, run.match(char) is not None),
                (_SPACE, char.isspace()),
                (_CLOSING, char in normalise._CLOSING),
                (_LEADING, char in "¿¡ "),
                (_NUMERIC, char.isnumeric()),
                (_ALPHA, char.isalpha()),
                (_DIGIT, char.isdigit()),
                (_ALNUM, char.isalnum()),
                (_BRACKET, char in ")]}"),
                (_SLOW, is_slow),
            )
            if holds
        )
    return _CodeTables(starts, np.array(codes, np.int32), folds, kinds, flags, _word_table(), _openings())


def _composing_codes() -> set[int]:
    """Returns the code points that may combine with the one before them under NFC."""
    found = set()
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code))
        if parts and parts[0] != "<" and " " in parts:
            found.add(int(parts.split()[1], 16))
    return found | set(range(0x1100, 0x1200))


def _word_table() -> NDArray[np.uint64]:
    slots = np.zeros(_WORD_SLOTS, np.uint64)
    for word in sorted(normalise._DECISIVE_WORDS):
        digest = xxhash.xxh64_intdigest(word.encode(), 0)
        slot = digest % _WORD_SLOTS
        while slots[slot]:
            slot = (slot + 1) % _WORD_SLOTS
        slots[slot] = digest
    return slots


def _openings() -> NDArray[np.bool_]:
    openings = np.zeros((128, 128), np.bool_)
    for word in normalise._DECISIVE_WORDS:
        if word[0].isascii():
            openings[ord(word[0]), ord(word[1])] = True
    return openings


@numba.njit(cache=True, nogil=True)
def _read_rows(raw, offsets, tables, longest, text, ends, exact, lengths, num_tokens, decisive, slow):  # type: ignore[no-untyped-def]
    """Fills the outputs for every row; a row marked slow gets no tokens."""
    chars = np.empty(longest + 4, np.int32)
    content, chosen = np.empty(longest + 8, np.uint8), np.empty(2 * longest + 8, np.uint8)
    end = 0
    for row in range(len(offsets) - 1):
        num_chars = _plain_codes(raw, offsets[row], offsets[row + 1], tables, chars)
        if num_chars >= 0:
            num_chars = _fold_codes(chars, num_chars, tables)
        if num_chars < 0:
            slow[row] = True
            ends[row + 1] = end
            continue
        first, last = _trimmed(chars, num_chars, tables.flags)
        size = 0
        for place in range(first, last):
            size = _put(content, size, chars[place])
        exact[row, 0] = xxh64(content, 0, size, np.uint64(_EXACT_SEEDS[0]))
        exact[row, 1] = xxh64(content, 0, size, np.uint64(_EXACT_SEEDS[1]))
        lengths[row] = last - first
        end, num_tokens[row], decisive[row] = _tokenise(chars, first, last, tables, text, end, chosen)
        ends[row + 1] = end


@numba.njit(cache=True, nogil=True, inline="always")
def _put(content, size, code):  # type: ignore[no-untyped-def]
    """Appends a code point in UTF-8 and returns the new size."""
    if code < 0x80:
        content[size] = code
        return size + 1
    if code < 0x800:
        content[size] = 0xC0 | (code >> 6)
        content[size + 1] = 0x80 | (code & 0x3F)
        return size + 2
    if code < 0x10000:
        content[size] = 0xE0 | (code >> 12)
        content[size + 1] = 0x80 | ((code >> 6) & 0x3F)
        content[size + 2] = 0x80 | (code & 0x3F)
        return size + 3
    content[size] = 0xF0 | (code >> 18)
    content[size + 1] = 0x80 | ((code >> 12) & 0x3F)
    content[size + 2] = 0x80 | ((code >> 6) & 0x3F)
    content[size + 3] = 0x80 | (code & 0x3F)
    return size + 4


@numba.njit(cache=True, nogil=True)
def _plain_codes(raw, start, end, tables, chars):  # type: ignore[no-untyped-def]
    """Writes the code points of `plain_text` and returns their number; -1 for a row that needs Python."""
    size, place = 0, start
    was_space = True
    while place < end:
        byte = raw[place]
        if byte < 0x80:
            place += 1
            if 0x20 < byte < 0x7F:
                chars[size] = byte
                size += 1
                was_space = False
            elif not was_space:
                chars[size] = 0x20
                size += 1
                was_space = True
            continue
        if byte < 0xE0:
            code, step = ((byte & 0x1F) << 6) | (raw[place + 1] & 0x3F), 2
        elif byte < 0xF0:
            code = ((byte & 0x0F) << 12) | ((raw[place + 1] & 0x3F) << 6) | (raw[place + 2] & 0x3F)
            step = 3
        else:
            code = ((byte & 0x07) << 18) | ((raw[place + 1] & 0x3F) << 12)
            code |= ((raw[place + 2] & 0x3F) << 6) | (raw[place + 3] & 0x3F)
            step = 4
        place += step
        if code >= _NUM_CODES or tables.flags[code] & _SLOW:
            return -1
        for part in range(tables.starts[code], tables.starts[code + 1]):
            plain = tables.codes[part]
            if tables.flags[plain] & _SPACE:
                if not was_space:
                    chars[size] = 0x20
                    size += 1
                was_space = True
            else:
                chars[size] = plain
                size += 1
                was_space = False
    return size - 1 if size and was_space else size


@numba.njit(cache=True, nogil=True)
def _fold_codes(chars, size, tables):  # type: ignore[no-untyped-def]
    """Folds the case in place as `_fold_case` does and returns the number; -1 if a letter has no simple folding."""
    flags = tables.flags
    has_lower, has_upper, is_foreign, is_long_run, run = False, False, False, False, 0
    for place in range(size):
        is_foreign |= chars[place] > 0x7F
        flag = flags[chars[place]]
        has_lower |= flag & _LOWER != 0
        has_upper |= flag & _UPPER != 0
        run = run + 1 if flag & _RUN else 0
        is_long_run |= run >= 4
    if not has_upper and not is_foreign:
        return size
    is_lower = has_lower and not has_upper
    is_shouted = not has_lower and is_long_run
    place = 0
    while place < size:
        is_command = chars[place] == 0x5C and place + 1 < size and _is_ascii_letter(chars[place + 1])
        if is_command:
            place += 1
            while place < size and _is_ascii_letter(chars[place]):
                place += 1
            continue
        if not flags[chars[place]] & _RUN:
            place += 1
            continue
        end = place
        while end < size and flags[chars[end]] & _RUN:
            end += 1
        if end - place >= 2 and (is_lower or is_shouted or end - place >= 5 or _is_one_case(chars, place, end, flags)):
            for letter in range(place, end):
                fold = tables.folds[chars[letter]]
                if fold < 0:
                    return -1
                chars[letter] = fold
        place = end
    return size


@numba.njit(cache=True, nogil=True, inline="always")
def _is_ascii_letter(code):  # type: ignore[no-untyped-def]
    return 0x41 <= code <= 0x5A or 0x61 <= code <= 0x7A


@numba.njit(cache=True, nogil=True)
def _is_one_case(chars, start, end, flags):  # type: ignore[no-untyped-def]
    """Says whether str.islower() or str.istitle() holds for a run of letters."""
    has_lower, has_upper, is_title, was_cased = False, False, True, False
    for place in range(start, end):
        flag = flags[chars[place]]
        if flag & _UPPER:
            is_title &= not was_cased
            has_upper, was_cased = True, True
        elif flag & _LOWER:
            is_title &= was_cased
            has_lower, was_cased = True, True
        else:
            was_cased = False
    return (has_lower and not has_upper) or (is_title and (has_lower or has_upper))


@numba.njit(cache=True, nogil=True)
def _trimmed(chars, size, flags):  # type: ignore[no-untyped-def]
    """Returns start and end of the text without closing punctuation; of the whole text, if nothing else is left."""
    end = size
    while end:
        code = chars[end - 1]
        if not flags[code] & _CLOSING and not (code == 0x21 and not _may_be_factorial(chars, end - 1, flags)):
            break
        end -= 1
    start = 0
    while start < end and flags[chars[start]] & _LEADING:
        start += 1
    return (start, end) if start < end else (0, size)


@numba.njit(cache=True, nogil=True)
def _may_be_factorial(chars, place, flags):  # type: ignore[no-untyped-def]
    if not place:
        return False
    before = flags[chars[place - 1]]
    is_lone_letter = before & _ALPHA and (place < 2 or not flags[chars[place - 2]] & _ALNUM)
    return (before & (_DIGIT | _BRACKET)) != 0 or is_lone_letter


@numba.njit(cache=True, nogil=True)
def _tokenise(chars, first, last, tables, text, end, chosen):  # type: ignore[no-untyped-def]
    """Appends the tokens of chars[first:last] to `text`; returns its new end, their number, the decisive digest."""
    num_tokens, num_chosen, place, row_start = 0, 0, first, end
    flags, kinds, words, openings = tables.flags, tables.kinds, tables.words, tables.openings
    while place < last:
        start = end + 1 if end > row_start else end
        stop, free = place, start
        while stop < last and kinds[chars[stop]] == _A:  # most tokens are plain words: read and written in one go
            text[free] = chars[stop]
            stop += 1
            free += 1
        if stop == place or (stop < last and kinds[chars[stop]] in (_L, _QUOTE)):
            stop, free = _token_end(chars, place, first, last, kinds), start
            if stop <= place:
                place += 1
                continue
            for letter in range(place, stop):
                free = _put(text, free, chars[letter])
        if start > end:
            text[end] = 0x20
        end = free
        num_tokens += 1
        if _is_decisive(chars, place, stop, flags, kinds, words, openings, text, start, end):
            if num_chosen:
                chosen[num_chosen] = 0x20
                num_chosen += 1
            for letter in range(start, end):
                chosen[num_chosen] = text[letter]
                num_chosen += 1
        place = stop
    return end, num_tokens, xxh64(chosen, 0, num_chosen, np.uint64(0))


@numba.njit(cache=True, nogil=True, inline="always")
def _is_decisive(chars, place, stop, flags, kinds, words, openings, text, start, end):  # type: ignore[no-untyped-def]
    code = chars[place]
    if flags[code] & _NUMERIC or not flags[code] & _ALPHA:
        return True
    if stop - place == 1 and kinds[code] != _U:
        return code not in (0x61, 0x41, 0x49)  # "a", "A", "I"
    if code < 0x80 and not openings[code & 0x7F, chars[place + 1] & 0x7F]:
        return False
    digest = xxh64(text, start, end, np.uint64(0))
    slot = digest % np.uint64(_WORD_SLOTS)
    while words[slot]:
        if words[slot] == digest:
            return True
        slot = (slot + np.uint64(1)) % np.uint64(_WORD_SLOTS)
    return False


_A, _L, _D, _N, _U, _S, _C, _X = (ord(kind) for kind in "ALDNUSCX")
_BACKSLASH, _DOT, _COMMA, _COLON, _QUOTE, _DOUBLE, _BANG, _MINUS, _LINE = (ord(char) for char in "\\.,:'\"!-_")


@numba.njit(cache=True, nogil=True, inline="always")
def _is_letter(kind):  # type: ignore[no-untyped-def]
    return kind == _A or kind == _L  # noqa: PLR1714 - a compiled comparison


@numba.njit(cache=True, nogil=True)
def _token_end(chars, place, first, last, kinds):  # type: ignore[no-untyped-def] # noqa: PLR0912 - one per kind
    """Returns the end of the token that starts at `place`, or `place` if none does: the pattern `_TOKEN` by hand."""
    kind = kinds[chars[place]]
    if _is_letter(kind):
        return _word_end(chars, place, last, kinds)
    if kind == _D:
        return _number_end(chars, place, last, kinds)
    if kind in (_N, _U, _X, _C):
        return place + 1
    if kind in (_S, ord("P"), _COMMA):
        return place
    before = kinds[chars[place - 1]] if place > first else 0
    second = kinds[chars[place - 2]] if place > first + 1 else 0
    after = kinds[chars[place + 1]] if place + 1 < last else 0
    beyond = kinds[chars[place + 2]] if place + 2 < last else 0
    if kind == _BACKSLASH:
        stop = place + 1
        while stop < last and kinds[chars[stop]] == _A:
            stop += 1
        return stop
    if kind == _DOT:
        is_fraction = after == _D and not (_is_letter(before) or before in (_D, _N, _U))
        return _number_end(chars, place + 1, last, kinds, False) if is_fraction else place
    if kind == _COLON:
        is_ratio = after == _D or (after == _S and beyond == _D)
        return place + 1 if is_ratio and (before == _D or (before == _S and second == _D)) else place
    is_lone_letter = _is_letter(before) and not _is_letter(second)
    if kind == _QUOTE and is_lone_letter:
        stop = place
        while stop < last and kinds[chars[stop]] == _QUOTE:
            stop += 1
        follows = kinds[chars[stop]] if stop < last else 0
        is_open = _is_letter(follows) or follows in (_D, _N, _U)
        return stop - 1 if is_open else stop
    if kind in (_QUOTE, _DOUBLE):
        return place + 1 if before == _D else place
    if kind == _BANG:
        return place + 1 if before in (_D, _C) or is_lone_letter else place
    if kind == _LINE:
        return place if after == _LINE else place + 1
    is_hyphen = _is_letter(before) and _is_letter(second) and _is_letter(after) and _is_letter(beyond)
    return place if is_hyphen else place + 1


@numba.njit(cache=True, nogil=True)
def _word_end(chars, place, last, kinds):  # type: ignore[no-untyped-def]
    while place < last and _is_letter(kinds[chars[place]]):
        place += 1
        has_suffix = place + 1 < last and kinds[chars[place]] == _QUOTE and _is_letter(kinds[chars[place + 1]])
        if has_suffix:
            place += 1
    return place


@numba.njit(cache=True, nogil=True)
def _number_end(chars, place, last, kinds, has_groups=True):  # type: ignore[no-untyped-def]
    """Returns the end of digits, with groups after single points or commas if asked."""
    while place < last and kinds[chars[place]] == _D:
        place += 1
        is_separator = place + 1 < last and kinds[chars[place]] in (_DOT, _COMMA)
        if has_groups and is_separator and kinds[chars[place + 1]] == _D:
            place += 1
    return place
