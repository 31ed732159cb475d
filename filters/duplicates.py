"""Exact and near duplicates among the rows of a run, and rows of one source that claim one id.

The unit is (images, question, options): the same question on another image is another row, another question on the same
image too. Shards are read once, each by itself, into fixed-width features (`filters.features`); everything that looks
across rows works on those.

Two rows are **exact** duplicates if images (in order, pixel by pixel), normalised question and normalised options (in
order) are equal, whatever their answers: one question cannot be asked twice with two answers, and the better row stays.

Two rows are **near** duplicates if all of these hold; each rule keeps apart what is asked apart:
- The images are near copies of each other, in the same order (`filters.images`).
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

The first three rules are the *block* of a row: only rows of one block are compared at all, which also keeps ten
thousand fillings of one template from being ten thousand squared candidates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.buckets import Keys, Rows, bucket_pairs, has_key, matching_pairs, shared_rows
from filters.feature_files import FeatureTable
from filters.features import Features, PictureNames, joined, sample_features
from filters.likeness import likeness
from filters.signatures import BandShape, MinHashScheme, band_shape
from filters.stars import Edges, kept_rows, no_edges, representatives
from schemas.config import DuplicatesConfig

EXACT = "duplicate_exact"
NEAR = "duplicate_near"
SAME_SOURCE_ID = "duplicate_source_id"

_LEADERS = (4, 32, 256)
"""Best rows of a large bucket that are compared with all its others, raised while large buckets remain whose rows are
not alike. Beyond the last, rows of one bucket of more than 48 that resemble none of its 256 best are not compared with
each other: a bound for buckets that hold thousands of unlike texts, which a band of seven permutations rarely does."""

_CHUNK_PAIRS = 1 << 11

Origins = Callable[[Rows], Sequence[str]]
"""Returns the origins of rows: asked only for rows that are copies of one another, to choose by it which is first."""


@dataclass(frozen=True, slots=True)
class Removals:
    """Rows that go. Rows are numbered through the new ones first, then the published ones.

    rows: int64 [num_removals], ascending. is_near: bool. resembles: int64, the row that stays instead. similarity:
    float64, 1 for exact duplicates, else the Jaccard similarity.
    """

    rows: Rows
    is_near: NDArray[np.bool_]
    resembles: Rows
    similarity: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Clashes:
    """Rows whose source id belongs to another row of their source, with other content. first: that row."""

    rows: Rows
    first: Rows


def scheme_of(config: DuplicatesConfig) -> MinHashScheme:
    return MinHashScheme(config.num_permutations, config.shingle_words, config.seed)


def shape_of(config: DuplicatesConfig) -> BandShape:
    return band_shape(config.threshold, config.num_permutations)


def features_of(samples: pa.Table, config: DuplicatesConfig, pictures: PictureNames | None = None) -> Features:
    """Returns what the rows of a samples table are compared by under a configuration."""
    return sample_features(samples, scheme_of(config), shape_of(config), pictures)


def find_duplicates(
    new: FeatureTable,
    config: DuplicatesConfig,
    *,
    origins: Origins,
    published: FeatureTable | None = None,
    left_out: Rows | None = None,
    num_threads: int = 1,
) -> Removals:
    """Returns the new rows that duplicate a kept row; every other row is kept.

    The kept rows hold no duplicate among themselves, and `resembles` is always a kept row. Near pairs are found with
    the probability that `band_shape` states, equal ones always. Published rows all stay, and are better than new ones:
    the result is that of one run over everything, but that none of them goes. left_out: new rows that take no part.

    Time is linear in the new rows, and in the published ones a single pass over 8 bytes a row and band. Neither the
    order of the rows, nor their division into shards, nor the number of threads changes which rows go.
    """
    active = np.ones(len(new), np.bool_)
    if left_out is not None:
        active[left_out] = False
    with ThreadPoolExecutor(num_threads) as pool:
        search = _Search(new, published or FeatureTable([]), config, pool)
        if config.exact or config.near:
            search.remove_copies(active, origins)
            search.remove_published(active)
        if config.near:
            search.remove_near(active)
    return search.removals()


class _Search:
    """One search for duplicates: what is removed so far, by which row and how alike they are."""

    def __init__(
        self, new: FeatureTable, published: FeatureTable, config: DuplicatesConfig, pool: ThreadPoolExecutor
    ) -> None:
        self.new, self.published, self.config, self._pool = new, published, config, pool
        self.order = new.order()
        self.resembles = np.full(len(new), -1, np.int64)
        self.similarity = np.zeros(len(new), np.float64)
        self.is_near = np.zeros(len(new), np.bool_)

    def removals(self) -> Removals:
        rows = np.flatnonzero(self.resembles >= 0)
        # A copy may name a row that went later for resembling a third: it then resembles that one.
        ends = self.resembles[rows]
        inner = ends < len(self.new)
        through = np.zeros(len(rows), np.bool_)
        through[inner] = self.resembles[ends[inner]] >= 0
        similarity, is_near = self.similarity[rows], self.is_near[rows]
        similarity[through] = self.similarity[ends[through]]
        is_near[through] = self.is_near[ends[through]]
        ends = np.where(through, self.resembles[np.where(inner, ends, 0)], ends)
        return Removals(rows, is_near, ends, similarity)

    def _remove(self, rows: Rows, resembles: Rows, similarity: NDArray[np.float64] | float, *, is_near: bool) -> None:
        self.resembles[rows] = resembles
        self.similarity[rows] = similarity
        self.is_near[rows] = is_near

    def remove_copies(self, active: NDArray[np.bool_], origins: Origins) -> None:
        """Removes exact duplicates among the new rows: all but the best of each group of equal keys."""
        keys, more = self._exact_keys(self.new)
        rows, order = shared_rows(keys, active), self.order
        rows = rows[np.lexsort((order.id_low[rows], order.id_high[rows], order.goodness[rows], more[rows], keys[rows]))]
        if not len(rows):
            return
        is_next = np.zeros(len(rows), np.bool_)
        is_next[1:] = (keys[rows[1:]] == keys[rows[:-1]]) & (more[rows[1:]] == more[rows[:-1]])
        starts = np.append(np.flatnonzero(~is_next), len(rows))
        best, sizes = rows[starts[:-1]].copy(), np.diff(starts)
        is_tied = is_next.copy()
        is_tied[1:] &= np.logical_and.reduce([column[rows[1:]] == column[rows[:-1]] for column in order])
        for group in np.flatnonzero(is_tied[np.minimum(starts[:-1] + 1, len(rows) - 1)] & (sizes > 1)).tolist():
            start, end = starts[group], starts[group + 1]
            num_tied = 1 + int(np.argmin(np.append(is_tied[start + 1 : end], np.False_)))
            tied = rows[start : start + num_tied]
            names = origins(tied)
            best[group] = tied[min(range(len(tied)), key=lambda place: natural_key(names[place]))]
        stays = np.repeat(best, sizes)
        goes = rows != stays
        self._remove(rows[goes], stays[goes], 1.0, is_near=not self.config.exact)
        active[rows[goes]] = False

    def _exact_keys(self, table: FeatureTable) -> tuple[Keys, Keys]:
        names = ("exact", "exact_more") if self.config.exact else ("id_high", "id_low")
        return table.column(names[0]), table.column(names[1])

    def remove_published(self, active: NDArray[np.bool_]) -> None:
        """Removes the new rows that duplicate a published one, exactly or nearly."""
        if not len(self.published):
            return
        rows = np.flatnonzero(active)
        keys, more = self._exact_keys(self.new)
        old_keys, old_more = self._exact_keys(self.published)
        pairs = matching_pairs(keys[rows], old_keys)
        pairs = pairs[more[rows[pairs[:, 0]]] == old_more[pairs[:, 1]]]
        pairs = pairs[::-1]
        self._remove(rows[pairs[:, 0]], pairs[:, 1] + len(self.new), 1.0, is_near=not self.config.exact)
        active[rows[pairs[:, 0]]] = False
        if self.config.near:
            self._remove_near_published(active)

    def _remove_near_published(self, active: NDArray[np.bool_]) -> None:
        rows = self._compared(active)
        codes: list[Keys] = []
        for band in range(self.new.num_bands):
            name = f"band_{band}"
            pairs = matching_pairs(self.new.column(name)[rows], self.published.column(name))
            codes.append(_pair_codes(rows[pairs[:, 0]], pairs[:, 1]))
        pairs = _coded_pairs(_different(np.concatenate(codes))) if codes else np.empty((0, 2), np.int64)
        pairs = self._agreeing(pairs)
        alike = self._likeness(pairs, self.published)
        pairs, alike = pairs[alike >= 0], alike[alike >= 0]
        old = self.published.order()
        ranks = np.lexsort((old.id_low[pairs[:, 1]], old.id_high[pairs[:, 1]], old.goodness[pairs[:, 1]], pairs[:, 0]))[
            ::-1
        ]
        pairs, alike = pairs[ranks], alike[ranks]  # the best comes last and stays
        self._remove(pairs[:, 0], pairs[:, 1] + len(self.new), alike, is_near=True)
        active[pairs[:, 0]] = False

    def _agreeing(self, pairs: Rows) -> Rows:
        """Returns the pairs of a new and a published row of one block whose answers do not contradict each other."""
        answers, old_answers = self.new.column("answer")[pairs[:, 0]], self.published.column("answer")[pairs[:, 1]]
        blocks, old_blocks = self.new.column("block")[pairs[:, 0]], self.published.column("block")[pairs[:, 1]]
        agree = (blocks == old_blocks) & ((answers == old_answers) | (answers == 0) | (old_answers == 0))
        return np.asarray(pairs[agree])

    def _compared(self, active: NDArray[np.bool_]) -> Rows:
        """Returns the active rows long enough for near comparison."""
        return np.flatnonzero(active & (self.new.column("num_compared") > 0))

    def remove_near(self, active: NDArray[np.bool_]) -> None:
        """Removes near duplicates among the new rows."""
        compared = np.zeros(len(self.new), np.bool_)
        compared[self._compared(active)] = True
        found = _NearSearch(self, compared)
        found.run()
        goes = np.flatnonzero(compared & ~found.kept)
        stays, alike = representatives(found.edges, found.kept, self.order)
        self._remove(goes, stays[goes], alike[goes], is_near=True)

    def likeness(self, pairs: Rows) -> NDArray[np.float64]:
        """Returns how alike pairs of new rows are, -1 for not alike."""
        return self._likeness(pairs, self.new)

    def _likeness(self, pairs: Rows, second: FeatureTable) -> NDArray[np.float64]:
        """Returns how alike the pairs are, -1 for not alike; in chunks, so that few texts are in memory at once."""
        chunks = [pairs[start : start + _CHUNK_PAIRS] for start in range(0, len(pairs), _CHUNK_PAIRS)]
        if not chunks:
            return np.empty(0, np.float64)
        return np.concatenate(list(self._pool.map(lambda chunk: self._chunk_likeness(chunk, second), chunks)))

    def _chunk_likeness(self, pairs: Rows, second: FeatureTable) -> NDArray[np.float64]:
        if second is self.new:
            rows, places = np.unique(pairs, return_inverse=True)
            table, context, local = self.new.words(rows), self.new.context(rows), places.reshape(pairs.shape)
        else:
            rows, first_places = np.unique(pairs[:, 0], return_inverse=True)
            others, other_places = np.unique(pairs[:, 1], return_inverse=True)
            table, context = self.new.words(rows) + second.words(others), None
            local = np.stack([first_places, other_places + len(rows)], axis=1)
        return likeness(table, local, self.config.threshold, shingle_words=self.config.shingle_words, context=context)


class _NearSearch:
    """The search for near duplicates among the new rows: pairs found to be alike, and the rows kept by what they say.

    Bands are gone through one at a time with the rows that are kept by what is known so far, so that a cluster shrinks
    to its best row early on. Rows that come back, because what removed them went itself, and rows of buckets too large
    for all their pairs are looked at again, until neither is left. Then the kept rows hold no candidate pair of alike
    rows, and each row that goes has a better kept one: there is one such set only, so the way in which it was found
    does not matter.
    """

    def __init__(self, search: _Search, compared: NDArray[np.bool_]) -> None:
        self._search, self._compared = search, compared
        self._blocks, self._answers = search.new.column("block"), search.new.column("answer")
        self._seen = np.empty(0, np.uint64)
        self.edges, self.kept = no_edges(), compared.copy()

    def run(self) -> None:
        level, wanted = 0, None
        while level < len(_LEADERS):
            num_edges = len(self.edges.better)
            revived, crowded = self._sweep(wanted, _LEADERS[level])
            if not len(revived) and not len(crowded):
                return
            if not len(revived) and len(self.edges.better) == num_edges:
                level += 1
            wanted = np.union1d(revived, crowded)

    def _sweep(self, wanted: Rows | None, num_leaders: int) -> tuple[Rows, Rows]:
        """Goes through all bands, of the rows that share a key with a wanted one, if given.

        Returns the kept rows that some band did not see, and those that a large bucket held.
        """
        table = self._search.new
        was_absent, crowded = np.zeros(len(table), np.bool_), np.zeros(len(table), np.bool_)
        for band in range(table.num_bands):
            was_absent |= self._compared & ~self.kept
            column = table.column(f"band_{band}")
            if wanted is None:
                rows = shared_rows(column, self.kept)
            else:
                rows = np.flatnonzero(self.kept & has_key(column[wanted], column))
                rows = rows[shared_rows(column[rows])]
            found = bucket_pairs(column[rows], rows, self._blocks, self._answers, self._search.order, num_leaders)
            crowded[found.crowded] = True
            self._add(_different(_pair_codes(found.pairs[:, 0], found.pairs[:, 1])))
        return np.flatnonzero(was_absent & self.kept), np.flatnonzero(crowded & self.kept)

    def _add(self, codes: Keys) -> None:
        """Compares the candidate pairs that are new, and decides again which rows are kept if some are alike."""
        places = np.searchsorted(self._seen, codes)
        is_new = np.ones(len(codes), np.bool_)
        if len(self._seen):
            is_new = self._seen[np.minimum(places, len(self._seen) - 1)] != codes
        codes = codes[is_new]
        if not len(codes):
            return
        self._seen = np.insert(self._seen, places[is_new], codes)
        pairs = _coded_pairs(codes)
        alike = self._search.likeness(pairs)
        if np.any(alike >= 0):
            self.edges += Edges.of_pairs(pairs[alike >= 0], alike[alike >= 0], self._search.order)
            self.kept = self._compared & kept_rows(self.edges, len(self._search.new), self._search.order)


def _pair_codes(first: Rows, second: Rows) -> Keys:
    return (first.astype(np.uint64) << np.uint64(32)) | second.astype(np.uint64)


def _coded_pairs(codes: Keys) -> Rows:
    pairs: Rows = np.stack([codes >> np.uint64(32), codes & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)
    return pairs


def _different(codes: Keys) -> Keys:
    """Returns the different codes in order: `np.unique`, which hashes first and takes three times as long."""
    ordered = np.sort(codes)
    is_first = np.ones(len(ordered), np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


def clashing_ids(new: FeatureTable, *, origins: Origins, published: FeatureTable | None = None) -> Clashes:
    """Returns the rows whose source id belongs to a published or an earlier row of the same source with other content.

    Rows are numbered as in `Removals`. Content is what exact duplicates compare, and the normalised answer: rows that
    agree in all of it are one row read twice, which `find_duplicates` deals with. "Earlier" is the order of origins,
    with numbers in them read as numbers. Empty ids are none.
    """
    named = new.column("named")
    rows = np.flatnonzero(named)
    if not len(rows):
        return Clashes(rows, rows)
    content, old = _content(new), published or FeatureTable([])
    pairs = matching_pairs(named[rows], old.column("named"))
    pairs = pairs[content[rows[pairs[:, 0]]] != _content(old)[pairs[:, 1]]]
    clashing, places = np.unique(rows[pairs[:, 0]], return_index=True)
    goes, firsts = [clashing], [pairs[places, 1] + len(new)]
    rows = np.setdiff1d(rows, clashing, assume_unique=True)
    rows = rows[shared_rows(named[rows])]
    rows = rows[np.lexsort((content[rows], named[rows]))]
    bounds = np.flatnonzero(np.diff(named[rows], prepend=0, append=0))
    for start, end in pairwise(bounds.tolist()):
        members = rows[start:end]
        if content[members[0]] == content[members[-1]]:
            continue
        names = origins(members)
        first = members[min(range(len(members)), key=lambda place: natural_key(names[place]))]
        others = members[content[members] != content[first]]
        goes.append(others)
        firsts.append(np.full(len(others), first))
    found, first_rows = np.concatenate(goes), np.concatenate(firsts)
    by_row = np.argsort(found)
    return Clashes(found[by_row], first_rows[by_row])


def _content(table: FeatureTable) -> Keys:
    return joined(joined(table.column("exact"), table.column("exact_more")), table.column("answer"))


def natural_key(origin: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Returns a sort key in which "f#2" comes before "f#10"; digits stay text, as int() refuses very long ones."""
    pieces = re.split(r"([0-9]+)", origin)
    numbers = [piece.lstrip("0") if place % 2 else piece for place, piece in enumerate(pieces)]
    return tuple((len(piece) if place % 2 else 0, piece) for place, piece in enumerate(numbers)), origin
