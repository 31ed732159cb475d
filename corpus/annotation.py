"""What people are asked about a corpus, and of which rows: a stratified sample that keeps its weights.

Two judges are checked. Of an open question a person says whether it needs reasoning, of a stored reply to a checkable
one whether it is right. Neither sees what the judge said: that stays in the key, with the weight of each item.

Rows are drawn by stratum (verdict, kind, topic, source and, if wanted, nearness to the threshold), by a hash of their
ids, so that a larger sample holds the smaller one while the strata are the same. Rare strata get more than their
share: in proportion to the square root of their size (power allocation, Bankier 1988), and two rows at least, so that
each has a variance.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from corpus.storage import corpus_file_errors
from corpus.tally import corpus_shards
from schemas.verdicts import Heuristic, Mode

ROWS_PER_STRATUM = 4
"""A sample has at most a quarter as many strata as rows; the smallest ones of a verdict are joined until it has."""
MIN_STRATUM_ROWS = 2
REST = "others"
_COLUMNS = ("id", "mode", "heuristic", "kind", "topic", "source", "probability", "num_right", "num_scored")


class Check(StrEnum):
    """Which judge a person checks."""

    DIFFICULTY = "difficulty"
    VERIFIER = "verifier"


class Mark(StrEnum):
    """What a person, or the judge, says. A judge never says that it cannot tell: such rows are not in the corpus."""

    YES = "yes"
    NO = "no"
    CANT_TELL = "can't tell"


ASKED: Mapping[Check, str] = {
    Check.DIFFICULTY: "Does this question need reasoning, that is several steps before it can be answered?",
    Check.VERIFIER: "Is the reply right, given the reference?",
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row, or one reply to it, that people shall mark.

    verdict: the judge's. turn: which of the row's replies with that verdict is meant, from 0; always 0 for difficulty.
    stratum: in words. num_in_stratum, num_drawn: its size in the corpus and in the sample. path, row_group, index:
    where the row lies.
    """

    check: Check
    row_id: str
    verdict: Mark
    turn: int
    stratum: str
    num_in_stratum: int
    num_drawn: int
    path: Path
    row_group: int
    index: int


@dataclass(frozen=True, slots=True)
class AnnotationItem:
    """What a person gets to see. question: with its options. reference, reply: "" for difficulty."""

    id: str
    check: Check
    question: str
    reference: str
    reply: str
    images: tuple[bytes, ...]


def item_id(check: Check, row_id: str, reply: str) -> str:
    """Returns the name of an item. It depends on what is judged alone, so it tells nothing of the verdict."""
    judged = "\x1f".join([check, row_id, reply])
    return hashlib.sha256(judged.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True, order=True)
class _Stratum:
    check: Check
    verdict: Mark
    kind: str
    topic: str
    source: str
    is_near: bool = False

    @property
    def words(self) -> str:
        near = ["near the threshold"] if self.is_near else []
        return "; ".join([self.check, self.verdict, *filter(None, [self.kind, self.topic, self.source]), *near])

    @property
    def rest(self) -> _Stratum:
        """The stratum that it joins where there are too many."""
        return _Stratum(self.check, self.verdict, "", "", REST)


def draw_rows(
    version_folder: str | Path,
    *,
    num_rows: int,
    checks: Sequence[Check],
    seed: int,
    threshold: float,
    near: float = 0.0,
) -> list[Drawn]:
    """Returns the rows and replies to be marked, those of a check in the order of their hash.

    num_rows: in all, halved between two checks as far as each has so many. threshold: of the difficulty judge; rows
    whose probability is within `near` of it are strata of their own, none if it is 0. Memory grows with `num_rows` and
    the number of strata, not with the corpus.

    Raises CorpusError: a shard is damaged. StorageError: it cannot be read.
    """
    rows = _Rows(corpus_shards(version_folder), frozenset(checks), threshold, near)
    sizes: Counter[_Stratum] = Counter()
    for stratum, num_units, _, _ in rows.units():
        sizes[stratum] += num_units
    plan = _plan(sizes, num_rows)
    heaps: dict[_Stratum, list[tuple[int, str, int, tuple[Path, int, int]]]] = {name: [] for name in plan.num_drawn}
    for stratum, num_units, row_id, place in rows.units():
        name = plan.names[stratum]
        heap, most = heaps[name], plan.num_drawn[name]
        for turn in range(num_units):
            # Negated, so that the heap's first is the largest rank kept.
            item = (-_rank(seed, stratum, row_id, turn), row_id, turn, place)
            if len(heap) < most:
                heapq.heappush(heap, item)
            elif heap and item > heap[0]:
                heapq.heapreplace(heap, item)
    return [
        Drawn(name.check, row_id, name.verdict, turn, name.words, plan.sizes[name], len(heap), *place)
        for name, heap in sorted(heaps.items())
        for _, row_id, turn, place in sorted(heap, reverse=True)
    ]


def _rank(seed: int, stratum: _Stratum, row_id: str, turn: int) -> int:
    # Hashed anew: the audit slice is chosen by id as well, and must not fill the sample.
    text = f"annotation:{seed}:{stratum.check}:{stratum.verdict}:{turn}:{row_id}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class _Rows:
    """All that could be marked in some shards: for each row and verdict its stratum, how many units it has there (the
    question itself, or its replies with that verdict), its id and its place."""

    shards: Sequence[Path]
    checks: frozenset[Check]
    threshold: float
    near: float

    def units(self) -> Iterator[tuple[_Stratum, int, str, tuple[Path, int, int]]]:
        for path in self.shards:
            with corpus_file_errors(path), pq.ParquetFile(path) as file:
                for row_group in range(file.num_row_groups):
                    table = file.read_row_group(row_group, columns=list(_COLUMNS))
                    for index, values in enumerate(zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True)):
                        for stratum, num_units in self._strata(dict(zip(_COLUMNS, values, strict=True))):
                            yield stratum, num_units, values[0], (path, row_group, index)

    def _strata(self, row: Mapping[str, Any]) -> Iterator[tuple[_Stratum, int]]:
        kind, topic, source = row["kind"] or "", row["topic"] or "", row["source"]
        if row["heuristic"] == Heuristic.DIFFICULTY and Check.DIFFICULTY in self.checks:
            verdict = Mark.YES if row["mode"] == Mode.THINK else Mark.NO
            probability = row["probability"]
            is_near = bool(self.near) and probability is not None and abs(probability - self.threshold) <= self.near
            yield _Stratum(Check.DIFFICULTY, verdict, kind, topic, source, is_near), 1
        elif row["heuristic"] == Heuristic.PERFORMANCE and Check.VERIFIER in self.checks:
            num_right, num_wrong = row["num_right"], row["num_scored"] - row["num_right"]
            for verdict, number in ((Mark.YES, num_right), (Mark.NO, num_wrong)):
                if number:
                    yield _Stratum(Check.VERIFIER, verdict, kind, topic, source), number


@dataclass(frozen=True, slots=True)
class _Plan:
    """names: by stratum the one that it is counted under. sizes, num_drawn: of those."""

    names: Mapping[_Stratum, _Stratum]
    sizes: Mapping[_Stratum, int]
    num_drawn: Mapping[_Stratum, int]


def _plan(sizes: Mapping[_Stratum, int], num_rows: int) -> _Plan:
    totals = {check: sum(size for s, size in sizes.items() if s.check is check) for check in Check}
    names: dict[_Stratum, _Stratum] = {}
    joined: Counter[_Stratum] = Counter()
    num_drawn: dict[_Stratum, int] = {}
    for check, num_of_check in _shares(totals, num_rows).items():
        own = {stratum: size for stratum, size in sizes.items() if stratum.check is check}
        named = _joined(own, max(len(Mark), num_of_check // ROWS_PER_STRATUM))
        names |= named
        of_check: Counter[_Stratum] = Counter()
        for stratum, name in named.items():
            of_check[name] += own[stratum]
        joined += of_check
        num_drawn |= allocate(of_check, num_of_check)
    return _Plan(names, joined, num_drawn)


def _shares(totals: Mapping[Check, int], num_rows: int) -> dict[Check, int]:
    """Returns how many rows each check gets: half, and what the other one does not have."""
    difficulty, verifier = totals[Check.DIFFICULTY], totals[Check.VERIFIER]
    num_difficulty = min(difficulty, max(num_rows - num_rows // 2, num_rows - verifier))
    return {Check.DIFFICULTY: num_difficulty, Check.VERIFIER: min(verifier, num_rows - num_difficulty)}


def _joined(sizes: Mapping[_Stratum, int], most: int) -> dict[_Stratum, _Stratum]:
    """Returns the name of each stratum: its own, or that of the rest of its verdict if it is one too many."""
    if len(sizes) <= most:
        return {stratum: stratum for stratum in sizes}
    # Two places are for the rests of both verdicts.
    largest = set(sorted(sizes, key=lambda stratum: (-sizes[stratum], stratum))[: max(0, most - 2)])
    return {stratum: stratum if stratum in largest else stratum.rest for stratum in sizes}


def allocate(sizes: Mapping[Any, int], num_rows: int) -> dict[Any, int]:
    """Returns how many rows are drawn of each stratum: by the square root of its size, but at least two.

    A stratum that has fewer gives all. In all `num_rows`, or all there are. The places go one by one to the stratum
    that has most claim to another (Jefferson's divisor method), so a larger sample takes away from none.
    """
    drawn = dict.fromkeys(sizes, 0)
    # (has its two, claim per row, ...): those that lack their two rows come first, the largest of them before others.
    claims = [(0, -math.sqrt(size), str(name), name) for name, size in sizes.items() if size]
    heapq.heapify(claims)
    for _ in range(min(num_rows, sum(sizes.values()))):
        _, _, text, name = heapq.heappop(claims)
        drawn[name] += 1
        if drawn[name] < sizes[name]:
            is_served = drawn[name] >= MIN_STRATUM_ROWS
            heapq.heappush(claims, (int(is_served), -math.sqrt(sizes[name]) / (drawn[name] + 1), text, name))
    return drawn


def read_drawn(drawn: Sequence[Drawn]) -> Iterator[tuple[Drawn, dict[str, Any]]]:
    """Yields each drawn row as its whole corpus record, images and all; each row group is read once, one at a time.

    Raises CorpusError: a shard is damaged. StorageError: it cannot be read.
    """
    groups: dict[tuple[Path, int], list[Drawn]] = {}
    for row in drawn:
        groups.setdefault((row.path, row.row_group), []).append(row)
    for (path, row_group), rows in groups.items():
        with corpus_file_errors(path), pq.ParquetFile(path) as file:
            table = file.read_row_group(row_group)
        for row in rows:
            yield row, table.slice(row.index, 1).to_pylist()[0]
