"""Columns of raw texts turned into what duplicates are found by, without an object per row.

`read_texts` gives for every row of an Arrow string column what `filters.normalise` says of its text, bit for bit: the
digest and length of the normalised text, its words as a `WordTable`, and the digest of its decisive words;
`read_tokens` gives the words themselves. The rules stand in `filters.normalise` alone; here they are compiled, driven
by tables of code points that are made from the very functions and character classes there. Rows in ASCII are read as
bytes. Rows that hold combining marks, joiners, conjoining Hangul or rarer things, for which a table by code point is
not enough, go through the Python functions one by one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from filters import normalise
from filters.ascii_masks import AsciiRoom, ascii_room, ascii_traits, letter_runs, next_sign, pad_ascii
from filters.flat_texts import FlatTexts
from filters.hashing import fold64, folded64, folding_end64, word64, xxh64
from filters.kernels import inlined, kernel
from filters.normalise import decisive_tokens, normalise_text, tokens
from filters.token_table import TokenTable
from filters.word_table import WordTable, is_in_set, word_hash, word_set

_NUM_CODES = 0x20000
"""Code points with an entry in the tables; rows with higher ones (rare Chinese characters) are read in Python."""

_LOWER, _UPPER, _RUN, _SPACE, _CLOSING, _LEADING, _NUMERIC, _ALPHA, _DIGIT, _ALNUM, _BRACKET, _SLOW = (
    1 << bit for bit in range(12)
)
_EXACT_SEEDS = (0, 0x62696D6F6465)


@dataclass(frozen=True, slots=True)
class TextColumn:
    """What is known of each text of a column.

    exact: uint64 [num_rows, 2], 128-bit digest of the normalised text; equal for texts that are the same. lengths:
    int64 [num_rows], its characters. words: its tokens. decisive: uint64 [num_rows], digest of the tokens that must
    agree. An absent text is like an empty one.
    """

    exact: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    words: WordTable
    decisive: NDArray[np.uint64]

    @property
    def num_words(self) -> NDArray[np.int64]:
        return np.diff(self.words.offsets)


class _CodeTables(NamedTuple):
    """By code point: how it is replaced (codes[starts[c]:starts[c + 1]]), its folded form, kind and flags.

    words: hashes of the decisive words as an open hash table, 0 for an empty slot.
    """

    starts: NDArray[np.int32]
    codes: NDArray[np.int32]
    folds: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    words: NDArray[np.uint64]


def read_texts(column: pa.Array | pa.ChunkedArray) -> TextColumn:
    """Returns what is known of each text of a string column, in order. Releases the interpreter lock while it works."""
    texts = FlatTexts.of(column)
    found, words, _ = _read(texts, with_tokens=False)
    hashes = {}
    for place in np.flatnonzero(found.slow).tolist():
        normal = normalise_text(texts.text(place))
        row = tokens(normal)
        content = normal.encode("utf-8", "surrogatepass")
        found.exact[place] = [xxhash.xxh64_intdigest(content, seed) for seed in _EXACT_SEEDS]
        found.lengths[place] = len(normal)
        found.decisive[place] = fold64(np.array([word_hash(word) for word in decisive_tokens(row)], np.uint64))
        hashes[place] = np.array([word_hash(word) for word in row], np.uint64)
    table = WordTable(*_with_rows(words, np.cumsum(found.num_words), hashes))
    return TextColumn(found.exact, found.lengths, table, found.decisive)


def read_tokens(texts: FlatTexts) -> TokenTable:
    """Returns the tokens of each text, in order."""
    found, _, text = _read(texts, with_tokens=True)
    slow = {}
    for place in np.flatnonzero(found.slow).tolist():
        row = " ".join(tokens(normalise_text(texts.text(place)))).encode("utf-8", "surrogatepass")
        slow[place] = np.frombuffer(row, np.uint8)
    return TokenTable(*_with_rows(text, found.ends, slow))


class _Found(NamedTuple):
    """What the kernel fills for each row. ends: int64, where its tokens end. num_words: int64. slow: left to Python."""

    exact: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    decisive: NDArray[np.uint64]
    num_words: NDArray[np.int64]
    ends: NDArray[np.int64]
    slow: NDArray[np.bool_]


def _read(texts: FlatTexts, *, with_tokens: bool) -> tuple[_Found, NDArray[np.uint64], NDArray[np.uint8]]:
    """Returns what the kernel finds, the hashes of all words, and the text of all tokens if asked for."""
    num_rows = len(texts)
    numbers = [np.zeros(num_rows, np.int64) for _ in range(3)]
    digests, slow = np.zeros((num_rows, 2), np.uint64), np.zeros(num_rows, np.bool_)
    found = _Found(digests, numbers[0], np.zeros(num_rows, np.uint64), numbers[1], numbers[2], slow)
    size = int(texts.offsets[-1] - texts.offsets[0])
    words = np.empty(size + 1, np.uint64)  # as many as characters: pages that stay untouched take no memory
    text = np.empty(2 * size + 8 if with_tokens else 0, np.uint8)
    room = _Room.of(texts.longest)
    num_words = _read_rows(texts.content, texts.offsets, code_tables(), room, words, text, found)
    return found, words[:num_words].copy(), text


_T = TypeVar("_T", bound=np.generic)


def _with_rows(
    values: NDArray[_T], ends: NDArray[np.int64], rows: Mapping[int, NDArray[_T]]
) -> tuple[NDArray[_T], NDArray[np.int64]]:
    """Returns flat values and offsets in which some rows, empty so far, hold values. ends: where each row ends."""
    offsets = np.concatenate([[0], ends])
    values = values[: offsets[-1]]
    if not rows:
        return values, offsets
    sizes = np.diff(offsets)
    pieces, before = [], 0
    for place, row in rows.items():
        pieces += [values[offsets[before] : offsets[place]], row]
        sizes[place], before = len(row), place
    pieces.append(values[offsets[before] :])
    return np.concatenate(pieces), np.concatenate([[0], np.cumsum(sizes)])


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
    return _CodeTables(starts, np.array(codes, np.int32), folds, kinds, flags, word_set(normalise._DECISIVE_WORDS))


def _composing_codes() -> set[int]:
    """Returns the code points that may combine with the one before them under NFC."""
    found = set()
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code))
        if parts and parts[0] != "<" and " " in parts:
            found.add(int(parts.split()[1], 16))
    return found | set(range(0x1100, 0x1200))


class _Room(NamedTuple):
    """Room to work on one text in: ascii for texts in ASCII, codes and content for others, edges for their tokens.

    codes: int32, code points. content: uint8, the same in UTF-8. edges: int64, where each token begins and ends, in
    turn. bounds: int64, the same in `content`.
    """

    ascii: AsciiRoom
    codes: NDArray[np.int32]
    content: NDArray[np.uint8]
    edges: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, longest: int) -> _Room:
        size = longest + 8
        edges, bounds = np.empty(2 * size, np.int64), np.empty(2 * size, np.int64)
        return cls(ascii_room(longest), np.empty(size, np.int32), np.empty(size, np.uint8), edges, bounds)


@kernel
def _read_rows(raw, offsets, tables, room, words, text, found):  # type: ignore[no-untyped-def]
    """Fills `words`, `text` (if it has room) and `found`; returns the number of words. A slow row gets none."""
    num_words, end = 0, 0
    for row in range(len(offsets) - 1):
        size = _plain_ascii(raw, offsets[row], offsets[row + 1], room.ascii)
        if size >= 0:
            content = room.ascii.content
            first, last = _trimmed(content, size, tables.flags)
            start, stop = first, last
            num_edges = _ascii_edges(room.ascii, last, tables.kinds, room.edges)
            new_words, end, found.decisive[row] = _hash_words(
                content, room.edges, content, room.edges, num_edges, tables, words, num_words, text, end
            )
        else:
            codes, content = room.codes, room.content
            size = _plain_codes(raw, offsets[row], offsets[row + 1], tables, codes)
            size = _fold_codes(codes, size, tables) if size >= 0 else size
            if size < 0:
                found.slow[row], found.ends[row] = True, end
                continue
            first, last = _trimmed(codes, size, tables.flags)
            num_edges = _code_edges(codes, first, last, tables.kinds, room.edges)
            start, stop = 0, _encode(codes, first, last, content, room.edges, num_edges, room.bounds)
            new_words, end, found.decisive[row] = _hash_words(
                codes, room.edges, content, room.bounds, num_edges, tables, words, num_words, text, end
            )
        found.exact[row, 0] = xxh64(content, start, stop, np.uint64(_EXACT_SEEDS[0]))
        found.exact[row, 1] = xxh64(content, start, stop, np.uint64(_EXACT_SEEDS[1]))
        found.lengths[row], found.num_words[row], found.ends[row] = last - first, new_words, end
        num_words += new_words
    return num_words


@kernel
def _encode(codes, first, last, content, edges, num_edges, bounds):  # type: ignore[no-untyped-def]
    """Writes code points in UTF-8, and to `bounds` where those at `edges` lie; returns the number of bytes."""
    size, edge = 0, 0
    for place in range(first, last + 1):
        while edge < num_edges and edges[edge] == place:
            bounds[edge] = size
            edge += 1
        if place < last:
            size = _put(content, size, codes[place])
    return size


@inlined
def _plain_ascii(raw, start, end, room):  # type: ignore[no-untyped-def]
    """Writes `plain_text` of a text in ASCII, its case folded, and its masks; returns its size, -1 for other texts."""
    content, size = room.content, end - start
    for place in range(np.uintp(size)):
        content[place] = raw[np.uintp(start) + place]
    pad_ascii(room, size)
    traits = ascii_traits(room, size)
    if not traits.is_ascii:
        return -1
    if not traits.is_tidy:
        size = _single_spaced(raw, start, end, content)
        pad_ascii(room, size)
        ascii_traits(room, size)
    if traits.has_upper:
        _fold_ascii(content, size, not traits.has_lower)
    return size


@kernel
def _single_spaced(raw, start, end, content):  # type: ignore[no-untyped-def]
    """Writes a text in ASCII with single spaces between its words and returns its size. Without branches, so steady."""
    size, wants_space = np.uintp(0), np.uintp(0)
    for place in range(np.uintp(start), np.uintp(end)):
        byte = raw[place]
        is_sign = np.uintp((byte > 0x20) & (byte != 0x7F))
        content[size] = byte if is_sign else np.uint8(0x20)
        size += is_sign | wants_space
        wants_space = is_sign
    return np.int64(size) - (size > np.uintp(0) and wants_space == np.uintp(0))


@kernel
def _fold_ascii(content, size, is_upper):  # type: ignore[no-untyped-def]
    """Folds the case of a text in ASCII in place as `_fold_case` does: only runs with a capital can change."""
    is_shouted = is_upper and _has_long_run(content, size)
    place = 0
    while place < size:
        if not 0x41 <= content[place] <= 0x5A:
            place += 1
            continue
        start, end, num_upper = place, place, 0
        while start and _is_ascii_letter(content[start - 1]):
            start -= 1
        while end < size and _is_ascii_letter(content[end]):
            num_upper += 0x41 <= content[end] <= 0x5A
            end += 1
        is_title = start == place and num_upper == 1
        is_command = start > 0 and content[start - 1] == 0x5C
        if not is_command and end - start >= 2 and (is_title or is_shouted or end - start >= 5):
            for letter in range(start, end):
                content[letter] |= 0x20
        place = end


@kernel
def _has_long_run(content, size):  # type: ignore[no-untyped-def]
    run = 0
    for place in range(size):
        run = run + 1 if _is_ascii_letter(content[place]) else 0
        if run == 4:
            return True
    return False


@inlined
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


@kernel
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


@kernel
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


@inlined
def _is_ascii_letter(code):  # type: ignore[no-untyped-def]
    return 0x41 <= code <= 0x5A or 0x61 <= code <= 0x7A


@kernel
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


@kernel
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


@kernel
def _may_be_factorial(chars, place, flags):  # type: ignore[no-untyped-def]
    if not place:
        return False
    before = flags[chars[place - 1]]
    is_lone_letter = before & _ALPHA and (place < 2 or not flags[chars[place - 2]] & _ALNUM)
    return (before & (_DIGIT | _BRACKET)) != 0 or is_lone_letter


@inlined
def _ascii_edges(room, last, kinds, edges):  # type: ignore[no-untyped-def]
    """Writes where each token of a text in ASCII begins and ends, in turn; returns the number of places.

    Runs of letters are tokens, but for those that a token around a sign takes in: "don't", "\\alpha".
    """
    sign = next_sign(room, 0, last)
    if sign == last:
        return letter_runs(room.letters, last, edges)
    content, runs = room.content, room.runs
    num_runs, run, num, stop = letter_runs(room.letters, last, runs), 0, 0, 0
    while sign < last:
        while run < num_runs and runs[run] < sign:
            edges[num], edges[num + 1] = runs[run], runs[run + 1]
            num += 2 if runs[run] >= stop else 0
            run += 2
        follows_word = num > 0 and edges[num - 1] == sign and _is_letter(kinds[content[edges[num - 2]]])
        if follows_word and kinds[content[sign]] == _QUOTE:
            stop = _word_end(content, edges[num - 2], last, kinds)
            edges[num - 1] = stop
        if stop <= sign:
            stop = _token_end(content, sign, 0, last, kinds)
            edges[num], edges[num + 1] = sign, stop
            num += 2 if stop > sign else 0
        sign = next_sign(room, max(sign + 1, stop), last)
    for place in range(run, num_runs, 2):
        edges[num], edges[num + 1] = runs[place], runs[place + 1]
        num += 2 if runs[place] >= stop else 0
    return num


@kernel
def _code_edges(chars, first, last, kinds, edges):  # type: ignore[no-untyped-def]
    """Writes where each token of code points begins and ends, in turn; returns the number of places."""
    num, place = 0, first
    while place < last:
        stop = place if kinds[chars[place]] == _S else _token_end(chars, place, first, last, kinds)
        if stop <= place:
            place += 1
            continue
        edges[num], edges[num + 1] = place, stop
        num += 2
        place = stop
    return num


@inlined
def _hash_words(chars, edges, content, bounds, num_edges, tables, words, before, text, end):  # type: ignore[no-untyped-def]
    """Writes the hashes of tokens to `words` from `before` on, and the tokens to `text` from `end` on if it has room.

    edges: where the tokens begin and end in chars, in turn. bounds: the same in `content`, the same text in UTF-8.
    Returns the number of tokens, the new end of the text, and the digest of the decisive tokens.
    """
    flags, kinds, slots = tables.flags, tables.kinds, tables.words
    num_decisive, decisive, number = 0, np.uint64(0), np.uintp(before)
    for place in range(np.uintp(0), np.uintp(num_edges), np.uintp(2)):
        start, length = edges[place], edges[place + np.uintp(1)] - edges[place]
        word = word64(content, bounds[place], bounds[place + np.uintp(1)])
        words[number] = word
        number += np.uintp(1)
        if _is_decisive(chars[np.uintp(start)], length, flags, kinds, slots, word):
            decisive = folded64(decisive, word)
            num_decisive += 1
    if len(text):
        for place in range(0, num_edges, 2):
            if place:
                text[end] = 0x20
                end += 1
            for letter in range(bounds[place], bounds[place + 1]):
                text[end] = content[letter]
                end += 1
    return num_edges // 2, end, folding_end64(decisive, np.uint64(num_decisive))


@inlined
def _is_decisive(code, length, flags, kinds, slots, word):  # type: ignore[no-untyped-def]
    """Says whether a token is one that must agree, given its first character, its length and its hash."""
    kind = kinds[code]
    if kind != _A and (flags[code] & _NUMERIC or not flags[code] & _ALPHA):
        return True
    if length == 1 and kind != _U:
        return code not in (0x61, 0x41, 0x49)  # "a", "A", "I"
    return is_in_set(slots, word)


_A, _L, _D, _N, _U, _S, _C, _X = (ord(kind) for kind in "ALDNUSCX")
_BACKSLASH, _DOT, _COMMA, _COLON, _QUOTE, _DOUBLE, _BANG, _MINUS, _LINE = (ord(char) for char in "\\.,:'\"!-_")


@inlined
def _is_letter(kind):  # type: ignore[no-untyped-def]
    return kind == _A or kind == _L  # noqa: PLR1714 - a compiled comparison


@kernel
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


@kernel
def _word_end(chars, place, last, kinds):  # type: ignore[no-untyped-def]
    while place < last and _is_letter(kinds[chars[place]]):
        place += 1
        has_suffix = place + 1 < last and kinds[chars[place]] == _QUOTE and _is_letter(kinds[chars[place + 1]])
        if has_suffix:
            place += 1
    return place


@kernel
def _number_end(chars, place, last, kinds, has_groups=True):  # type: ignore[no-untyped-def]
    """Returns the end of digits, with groups after single points or commas if asked."""
    while place < last and kinds[chars[place]] == _D:
        place += 1
        is_separator = place + 1 < last and kinds[chars[place]] in (_DOT, _COMMA)
        if has_groups and is_separator and kinds[chars[place + 1]] == _D:
            place += 1
    return place
