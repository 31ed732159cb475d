"""Exact and near duplicates among the rows of a run, and rows of one source that claim one id.

The unit is (images, question, options): the same question on another image is another row, another question on the same
image too. A pure function over light rows; the caller turns its findings into fates.

Two rows are **exact** duplicates if images (in order), normalised question and normalised options (in order) are equal,
whatever their answers: one question cannot be asked twice with two answers, and the better row is kept.

Two rows are **near** duplicates if all of these hold; each rule keeps apart what is asked apart:
- The images are the same, in the same order. (Similar but not identical images are compared elsewhere.)
- The options are the same in the same order: other options make another question, and a letter another answer.
- Numbers, signs, brackets, single letters and decisive words (`normalise.is_decisive`) agree in order: "3 + 4" is not
  "3 - 4", and templates filled with other numbers resemble each other almost perfectly.
- The reference answers do not contradict each other. Two rows with different answers ask different things, or one is
  wrong; a similarity below one cannot tell which.
- The Jaccard similarity of their word shingles reaches the threshold, with the ends padded.
- The content words that both share come in the same order.
A question of fewer words than one shingle is compared exactly only: its few shingles say too little.

Clusters are **stars**: rows are visited from best to worst, and a row goes exactly if it duplicates a row that was
*kept*. In a chain A ~ B ~ C, B goes for resembling A, and C stays unless it resembles A itself. Better means: it has a
reference answer, its images have more pixels, its question is longer, its id is smaller, its origin comes first. That
is a total order, so the order of the input cannot change the result.

The first three rules and the answer are the *block* of a row: only rows of one block are compared at all, which also
keeps ten thousand fillings of one template from being ten thousand squared candidates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from filters.minhash import (
    BandIndex,
    ComparedText,
    band_shape,
    bands,
    block_key,
    shingles,
    signatures,
    similarity,
)
from filters.normalise import decisive_tokens, normalise_text, tokens
from schemas.config import DuplicatesConfig
from schemas.samples import Sample

EXACT = "duplicate_exact"
NEAR = "duplicate_near"
SAME_SOURCE_ID = "duplicate_source_id"

_CACHED_TEXTS = 8192
"""Shingled questions held at once, about 10 KiB each; the others are shingled again where they are candidates."""


@dataclass(frozen=True, slots=True)
class DuplicateRow:
    """What of a sample matters here. images: sha256 in order. num_pixels: of all images together."""

    origin: str
    id: str
    source: str
    question: str
    images: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str | None = None
    num_pixels: int = 0
    source_id: str | None = None

    @classmethod
    def from_sample(cls, sample: Sample) -> DuplicateRow:
        return cls(
            origin=sample.origin,
            id=sample.id,
            source=sample.source,
            question=sample.question,
            images=tuple(image.sha256 for image in sample.images),
            choices=sample.choices,
            answer=sample.answer,
            num_pixels=sum(image.num_pixels for image in sample.images),
            source_id=sample.source_id,
        )


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row that goes. resembles: id of the kept row. similarity: 1 for exact ones, else the Jaccard similarity.

    detail: one sentence for a person; it names the kept row's origin (copies of one row share its id) and says so where
    the two reference answers differ.
    """

    origin: str
    id: str
    reason: str
    resembles: str
    similarity: float
    detail: str


@dataclass(frozen=True, slots=True)
class IdClash:
    """A row whose source_id an earlier row of its source, with other content, already has. first: that row's origin."""

    origin: str
    id: str
    reason: str
    source_id: str
    first: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Keyed:
    """A row with its comparison keys. answer: normalised, "" for none. block: images, options, decisive tokens."""

    row: DuplicateRow
    question: str
    answer: str
    exact: bytes
    block: bytes
    is_long: bool


def find_duplicates(rows: Iterable[DuplicateRow], config: DuplicatesConfig) -> list[Duplicate]:
    """Returns the rows that duplicate a kept row, best row first; every other row is kept.

    The kept rows hold no duplicate among themselves, and every `resembles` is the id of a kept row. Near pairs at the
    threshold are found with a probability of at least 99 % (see `band_shape`), more similar ones almost surely, equal
    ones always. Origins must be unique. Time is linear in the rows but for questions of one block that resemble each
    other just too little.
    """
    keyed = sorted((_keyed(row, config.shingle_words) for row in rows), key=_goodness)
    assert len({item.row.origin for item in keyed}) == len(keyed), "two rows have one origin"
    near = _NearStars(keyed, config) if config.near else None
    exact: dict[bytes, int] = {}
    found = []
    for rank, item in enumerate(keyed):
        if config.exact and item.exact in exact:
            found.append(_duplicate(item, keyed[exact[item.exact]], EXACT, 1.0))
        elif near is not None and (match := near.match(rank)) is not None:
            found.append(_duplicate(item, keyed[match[0]], NEAR, match[1]))
        else:
            exact[item.exact] = rank
            if near is not None:
                near.keep(rank)
    return found


def clashing_ids(rows: Iterable[DuplicateRow]) -> list[IdClash]:
    """Returns the rows whose source_id belongs to an earlier row of the same source with other content, by origin.

    Content is what exact duplicates compare, and the normalised answer: rows that agree in all of it are one row read
    twice, which `find_duplicates` deals with. "Earlier" is the order of origins, with numbers in them read as numbers.
    Empty ids are none.
    """
    first: dict[tuple[str, str], tuple[DuplicateRow, bytes]] = {}
    clashes = []
    for row in sorted(rows, key=lambda row: _natural(row.origin)):
        source_id = (row.source_id or "").strip()
        if not source_id:
            continue
        content = block_key(*_exact_parts(row), [_normalised_answer(row)])
        kept, kept_content = first.setdefault((row.source, source_id), (row, content))
        if content != kept_content:
            detail = f"{row.origin} has the id {source_id!r} of {kept.origin}, but other content"
            clashes.append(IdClash(row.origin, row.id, SAME_SOURCE_ID, source_id, kept.origin, detail))
    return clashes


def _keyed(row: DuplicateRow, shingle_words: int) -> _Keyed:
    question = normalise_text(row.question)
    question_tokens = tokens(question)
    images, options, _ = parts = _exact_parts(row, question)
    return _Keyed(
        row=row,
        question=question,
        answer=_normalised_answer(row),
        exact=block_key(*parts),
        block=block_key(images, options, decisive_tokens(question_tokens)),
        is_long=len(question_tokens) >= shingle_words,
    )


def _exact_parts(row: DuplicateRow, question: str | None = None) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    options = [normalise_text(choice) for choice in row.choices]
    return row.images, options, [normalise_text(row.question) if question is None else question]


def _normalised_answer(row: DuplicateRow) -> str:
    return normalise_text(row.answer) if row.answer else ""


def _goodness(item: _Keyed) -> tuple[bool, int, int, str, tuple[tuple[int, str], ...], str]:
    """Returns a key that sorts better rows first, see the module."""
    row = item.row
    return (not item.answer, -row.num_pixels, -len(item.question), row.id, *_natural(row.origin))


def _natural(origin: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Returns a sort key in which "f#2" comes before "f#10"; digits stay text, as int() refuses very long ones."""
    pieces = re.split(r"([0-9]+)", origin)
    numbers = [piece.lstrip("0") if place % 2 else piece for place, piece in enumerate(pieces)]
    return tuple((len(piece) if place % 2 else 0, piece) for place, piece in enumerate(numbers)), origin


class _NearStars:
    """The kept rows as representatives of near duplicates. A row is named by its rank, 0 for the best."""

    def __init__(self, keyed: Sequence[_Keyed], config: DuplicatesConfig) -> None:
        self._keyed = keyed
        self._threshold = config.threshold
        self._shape = band_shape(config.threshold, config.num_permutations)
        self._index = BandIndex()
        self._signatures = _signatures(keyed, config)
        self._text = lru_cache(_CACHED_TEXTS)(partial(_compared, shingle_words=config.shingle_words))

    def match(self, rank: int) -> tuple[int, float] | None:
        """Returns rank and similarity of the best kept row that the row resembles.

        Rows with an answer come before rows without one, so a row with an answer meets only kept rows that have one,
        and need look only at those with the same; a row without an answer contradicts none.
        """
        if rank not in self._signatures:
            return None
        item = self._keyed[rank]
        block = _answer_block(item) if item.answer else item.block
        for candidate in self._index.candidates(block, bands(self._signatures[rank], self._shape)):
            kept, text = self._text(self._keyed[candidate].question), self._text(item.question)
            likeness = similarity(kept, text, threshold=self._threshold)
            if likeness is not None:
                return candidate, likeness
        return None

    def keep(self, rank: int) -> None:
        """Makes the row a representative."""
        if rank in self._signatures:
            item, row_bands = self._keyed[rank], bands(self._signatures[rank], self._shape)
            self._index.add(rank, item.block, row_bands)
            if item.answer:
                self._index.add(rank, _answer_block(item), row_bands)


def _signatures(keyed: Sequence[_Keyed], config: DuplicatesConfig) -> dict[int, NDArray[np.uint32]]:
    """Returns the signatures by rank, of the rows that share their block with another row to be compared.

    A row alone in its block has nothing to resemble, which is true of most rows with images. Equal questions share
    their signature.
    """
    compared = {(item.block, item.exact if config.exact else item.row.origin) for item in keyed if item.is_long}
    block_sizes = Counter(block for block, _ in compared)
    ranks = [rank for rank, item in enumerate(keyed) if item.is_long and block_sizes[item.block] > 1]
    questions = list({keyed[rank].question: None for rank in ranks})
    shingle_sets = (_compared(question, shingle_words=config.shingle_words).shingles for question in questions)
    computed = signatures(shingle_sets, num_permutations=config.num_permutations, seed=config.seed)
    by_question = dict(zip(questions, computed, strict=True))
    return {rank: by_question[keyed[rank].question] for rank in ranks}


def _compared(question: str, *, shingle_words: int) -> ComparedText:
    question_tokens = tokens(question)
    return ComparedText(tuple(question_tokens), shingles(question_tokens, shingle_words))


def _answer_block(item: _Keyed) -> bytes:
    return block_key([item.answer]) + item.block


def _duplicate(item: _Keyed, kept: _Keyed, reason: str, likeness: float) -> Duplicate:
    how = "equals" if reason == EXACT else f"resembles (Jaccard {likeness:.3f})"
    detail = f"images, question and options: {item.row.origin} {how} {kept.row.origin}"
    if item.answer and kept.answer and item.answer != kept.answer:
        detail += f"; the answers differ: {item.row.answer!r:.80} was dropped, {kept.row.answer!r:.80} kept"
    return Duplicate(item.row.origin, item.row.id, reason, kept.row.id, likeness, detail)
