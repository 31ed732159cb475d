"""Which training rows leak an evaluation benchmark: shared word n-grams, equal short questions, equal images.

Pure, over flat arrays. `BenchmarkIndex.build` reads the benchmarks once; `BenchmarkIndex.find` takes one shard of
training rows after the other. A row's result depends on the row and the benchmarks alone, so neither the order of the
rows, nor shards, nor threads can change it. A hash only proposes: every n-gram and text is then compared byte by byte.

Words are those of `filters.normalise.tokens`. A training row leaks a benchmark question if one of these holds:
- **ngram**: they share n words in a row, n = 13, or the whole benchmark question if it has 8 to 12 words. Case is
  ignored (of A to Z; `normalise_text` has folded the rest where it is prose): what decides between two questions does
  not hide a leak in so long a run. Images do not matter: a copied text is a leak on whatever picture it was pasted.
- **exact**: the benchmark question is shorter than that, or holds boilerplate only (below), and both have the same
  words in the same case. "What is shown in the image?" is asked of a million images, so both must also share an image,
  or both have none.
- **image**: they share an image. A test image is a leak with any question; a switch turns this off.
Answers and options are not compared: a question with its options written out still holds the question's n-grams.

**Boilerplate**, such as "Answer the question using a single word or phrase", is no evidence. A word is boilerplate
where it lies in an 8-gram that more than 10 different benchmark questions hold, and an n-gram counts only if 8 of its
words are not. To judge whole 13-grams by how often they occur is not enough: "colour is the car" + those nine words is
a rare 13-gram, and would remove every training row that asks for the colour of a car. Questions count as different as
DESIGN.md has it, by (images, question, options): one question listed by two benchmarks is not boilerplate, one template
on eleven images is.

Sources of the bounds: GPT-3 (arXiv 2005.14165, appendix C) takes n from 8 to 13, the fifth percentile of a benchmark's
lengths; we take n by question, as visual benchmarks mix short and long ones. It ignores 13-grams that match more than
10 *training* documents; we count benchmark questions, since a count over the training rows is known only after all
shards, and would spare a leak that was copied eleven times. In scripts written without spaces a word is one character
(`normalise`), so 13 of them are a clause rather than a sentence.

Left out on purpose: paraphrases and translations (no n-gram finds them), similar but not identical images (whoever
makes the image keys decides what one image is, see `image_keys`), and cutting a match out of a row as GPT-3 does: rows
are short, so they go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from filters.flat_texts import FlatTexts
from filters.hashing import FOLD_BASE, avalanche64
from filters.text_columns import read_tokens
from filters.token_table import TokenTable

How = Literal["exact", "ngram", "image"]
HOWS: tuple[How, ...] = ("exact", "ngram", "image")
"""The kinds of evidence, the most telling first; the order in which matches of one share are preferred."""

_MAX_EXCERPT = 200
"""Characters of an excerpt: a leaked run of a hundred words need not fill a report."""

_Scalar = TypeVar("_Scalar", bound=np.generic)
_compiled = numba.njit(cache=True, nogil=True)

_SPACE = 32
_SEED, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
"""FNV-1a with 64 bits (http://www.isthe.com/chongo/tech/comp/fnv): words are too short for a block hash to pay."""

_FILTER_BITS = 16
"""Bits per n-gram of the Bloom filter, three of them set, within one 64-bit word: about one false positive in 150."""

_BLOCKS_PER_THREAD = 4
"""Blocks of rows that a thread takes in turn, so that one long row does not leave the others idle."""


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """What of a benchmark question matters here. id: unique in its benchmark. images: keys, see `image_keys`.

    choices: options given apart from the question. They are not compared; they tell different questions apart where
    boilerplate is counted.
    """

    id: str
    question: str
    choices: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A named set of questions that must not be trained on."""

    name: str
    questions: Sequence[BenchmarkQuestion]


@dataclass(frozen=True, slots=True)
class Contamination:
    """A training row and the question of one benchmark that it leaks most.

    row: its place in the shard. origin: as given to `BenchmarkIndex.find`. how: the evidence. share: of the benchmark
    question's words, those in shared n-grams, in (0, 1]; 1.0 for exact and image. excerpt: the longest run of words in
    shared n-grams, as normalised, at most 200 characters, "" unless how is "ngram"; lone surrogates are "?" in it, so
    that it can be written.
    """

    row: int
    origin: str
    benchmark: str
    question: str
    how: How
    share: float
    excerpt: str = ""

    @property
    def reason(self) -> str:
        """The stable code of why the row leaves."""
        return f"contaminated_{self.how}"

    @property
    def detail(self) -> str:
        """One sentence for a person."""
        named = f"question {self.question!r:.80} of {self.benchmark}"
        if self.how == "ngram":
            return f"shares {self.share:.0%} of {named}: {self.excerpt!r}"
        return f"asks {named}" if self.how == "exact" else f"holds an image of {named}"


@dataclass(frozen=True, slots=True)
class ShardContamination:
    """What one shard leaks.

    matches: the best match of each row with each benchmark, by row, its best benchmark first. hit_questions: bool
    [num_questions of all benchmarks], the benchmark questions that some row of the shard matches, best match or not.
    """

    matches: tuple[Contamination, ...]
    hit_questions: NDArray[np.bool_]

    @property
    def rows(self) -> list[Contamination]:
        """One match per contaminated row, its best: the rows that go."""
        firsts: dict[int, Contamination] = {}
        for match in self.matches:
            firsts.setdefault(match.row, match)
        return list(firsts.values())


@dataclass(frozen=True, slots=True)
class BenchmarkOverlap:
    """How far one benchmark leaks into the training rows.

    num_matched_questions: different questions of it that some row matches. num_rows: training rows that match it; a row
    that leaks two benchmarks counts in both. pairs: its matches, the largest share first, cut to the number asked for.
    """

    name: str
    num_questions: int
    num_matched_questions: int
    num_rows: int
    pairs: tuple[Contamination, ...]


class _Dictionary(NamedTuple):
    """Byte ranges of the benchmark text, numbered, by open addressing with linear probing.

    slots: int32 [power of two], the number of a range or -1, at most half of them taken. hashes: uint64 [num_ranges].
    starts, stops: int64 [num_ranges].
    """

    slots: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


class _Scanner(NamedTuple):
    """All that the kernel needs to know of the benchmarks.

    text: uint8, their token table. sizes: int64, the lengths of n-grams, rising. shortest: the first of them, or more
    than any row has words. filter_words: uint64 [power of two], a Bloom filter of the last `shortest` words of every
    n-gram. powers: uint64 [max_ngram + 1], of `FOLD_BASE`. texts: the questions that are compared as a whole.
    """

    text: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    shortest: int
    filter_words: NDArray[np.uint64]
    powers: NDArray[np.uint64]
    ngrams: _Dictionary
    texts: _Dictionary


class _Units(NamedTuple):
    """The different benchmark questions, by (question, images, options).

    table: num_units rows. words: int64 [num_units + 1], the number of words before each unit. images: the keys of each.
    """

    table: TokenTable
    words: NDArray[np.int64]
    images: list[tuple[int, ...]]


class _Questions(NamedTuple):
    """All benchmark questions, numbered by benchmark and then by id, so that the smaller number wins a tie.

    ids: their ids. benchmarks: int64 [num_questions], the place of each one's benchmark. units: int64 [num_questions].
    """

    ids: list[str]
    benchmarks: NDArray[np.int64]
    units: NDArray[np.int64]


class _Groups(NamedTuple):
    """Rising keys with the members of each: those of keys[i] are members[offsets[i]:offsets[i + 1]]. All int64."""

    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]
    members: NDArray[np.int64]

    @classmethod
    def of(cls, keys: NDArray[np.int64], members: NDArray[np.int64]) -> _Groups:
        order = np.argsort(keys, kind="stable")
        found, starts = np.unique(keys[order], return_index=True)
        return cls(found, np.append(starts, len(keys)), members[order])

    def at(self, place: int) -> NDArray[np.int64]:
        return self.members[self.offsets[place] : self.offsets[place + 1]]


class _Windows(NamedTuple):
    """The n-grams of all units, window by window. The dictionary numbers the different ones.

    before: int64 [num_units + 1], windows before each unit. ngrams: int32 [num_windows], -1 for one that is no
    evidence. num_units: int32 [num_ngrams], units that hold each. suffixes: uint64 [num_ngrams], the hash of the last
    `shortest` words of each, see `_Scanner`.
    """

    before: NDArray[np.int64]
    ngrams: NDArray[np.int32]
    num_units: NDArray[np.int32]
    suffixes: NDArray[np.uint64]
    dictionary: _Dictionary

    def units(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the unit of each window."""
        return np.searchsorted(self.before, windows, side="right") - 1


class _Evidence(NamedTuple):
    """One match of a row with a question; the smallest is the best.

    how: place in `HOWS`. first, last: the longest covered run of words, last excluded.
    """

    negative_share: float
    how: int
    question: int
    first: int = 0
    last: int = 0


def image_keys(names: Iterable[str]) -> NDArray[np.uint64]:
    """Returns the keys that `BenchmarkIndex.find` compares: 64 bits of blake2b for each name of an image, in order.

    A name is the sha256 of an image, or of its cluster's representative where images count as one by their look; both
    sides must use the same. Keys are not checked against names: with 10^7 training and 10^5 benchmark images the
    probability of one false match is 10^7 * 10^5 / 2^64 = 5e-8.
    """
    digests = [blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), np.dtype("<u8")).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class BenchmarkIndex:
    """The benchmarks, ready to be compared with training rows; made by `build`. Threads may share it.

    names, num_questions: of the benchmarks, in their order.
    """

    names: tuple[str, ...]
    num_questions: tuple[int, ...]
    _questions: _Questions
    _units: _Units
    _windows: _Windows
    _scanner: _Scanner
    _questions_of_unit: _Groups
    _windows_of_ngram: _Groups
    _units_of_image: _Groups
    _units_of_text: _Groups
    _known_images: NDArray[np.uint64]
    _max_ngram: int
    _images_count: bool

    @classmethod
    def build(
        cls,
        benchmarks: Sequence[Benchmark],
        *,
        max_ngram: int = 13,
        min_ngram: int = 8,
        max_benchmark_questions: int = 10,
        images: bool = True,
    ) -> BenchmarkIndex:
        """Returns the index of the benchmarks; their order settles ties.

        max_ngram, min_ngram: words of the longest and the shortest n-gram. max_benchmark_questions: different questions
        that may hold an n-gram before it is boilerplate. images: whether a shared image counts by itself.
        Time and memory are linear in the words of the benchmarks, about 100 bytes each.

        Raises ValueError: two benchmarks have one name, two questions of a benchmark one id, or a bound is impossible.
        """
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram must lie between 1 and max_ngram, got {min_ngram} and {max_ngram}")
        if max_benchmark_questions < 1:
            raise ValueError(f"max_benchmark_questions must be at least 1, got {max_benchmark_questions}")
        _check_names(benchmarks)
        questions, units = _questions_and_units(benchmarks)
        boilerplate = _boilerplate_before(units, min_ngram, max_benchmark_questions)
        windows = _collected_windows(units, boilerplate, min_ngram, max_ngram)
        text_of_unit, texts = _whole_texts(units, windows)
        evident = np.flatnonzero(windows.ngrams >= 0)
        known_images, image_units, image_places = _known_images(units)
        return cls(
            names=tuple(benchmark.name for benchmark in benchmarks),
            num_questions=tuple(len(benchmark.questions) for benchmark in benchmarks),
            _questions=questions,
            _units=units,
            _windows=windows,
            _scanner=_scanner(units, windows, texts, min_ngram, max_ngram),
            _questions_of_unit=_Groups.of(questions.units, np.arange(len(questions.units))),
            _windows_of_ngram=_Groups.of(windows.ngrams[evident].astype(np.int64), evident),
            _units_of_image=_Groups.of(image_places, image_units),
            _units_of_text=_text_groups(text_of_unit, image_units, image_places, len(known_images)),
            _known_images=known_images,
            _max_ngram=max_ngram,
            _images_count=images,
        )

    def find(
        self,
        table: TokenTable,
        image_keys: NDArray[np.uint64],
        image_offsets: NDArray[np.int64],
        *,
        origins: Sequence[str],
        num_threads: int = 1,
    ) -> ShardContamination:
        """Returns what the rows of one shard leak.

        table: the questions, num_rows of them. image_keys: uint64, of all images (see the function `image_keys`); those
        of row i are image_keys[image_offsets[i]:image_offsets[i + 1]]. image_offsets: int64 [num_rows + 1]. origins: a
        name for each row. num_threads: cores to use; the result is the same for any.

        Raises ValueError: the arguments differ in their number of rows.
        """
        _check_shard(table, image_keys, image_offsets, origins)
        findings = _Findings(self)
        text_of_row, ngram_rows, ngrams = _scanned(table, self._scanner, num_threads)
        findings.add_ngrams(ngram_rows, ngrams)
        num_images = np.diff(image_offsets)
        image_rows, images = np.repeat(np.arange(len(table)), num_images), _places(self._known_images, image_keys)
        image_rows, images = image_rows[images >= 0], images[images >= 0]
        if self._images_count:
            findings.add_group("image", image_rows, images, self._units_of_image)
        plain_rows = np.flatnonzero((num_images == 0) & (text_of_row >= 0))
        shown = text_of_row[image_rows] >= 0
        rows = np.concatenate([plain_rows, image_rows[shown]])
        seen_with = np.concatenate([np.full(len(plain_rows), -1), images[shown]])
        places = _places(self._units_of_text.keys, _text_keys(text_of_row[rows], seen_with, len(self._known_images)))
        findings.add_group("exact", rows[places >= 0], places[places >= 0], self._units_of_text)
        return findings.result(origins)

    def overlaps(self, shards: Iterable[ShardContamination], *, max_pairs: int | None = 1000) -> list[BenchmarkOverlap]:
        """Returns how far each benchmark leaks into the shards, in the order of the benchmarks.

        max_pairs: pairs kept of each benchmark, those with the largest share, then by benchmark question and origin;
        None keeps all. Neither the order of the shards nor their layout changes the result but for `Contamination.row`.
        """
        hits = np.zeros(len(self._questions.ids), np.bool_)
        num_rows: Counter[str] = Counter()
        pairs: dict[str, list[Contamination]] = {name: [] for name in self.names}
        for shard in shards:
            hits |= shard.hit_questions
            for match in shard.matches:
                num_rows[match.benchmark] += 1
                pairs[match.benchmark].append(match)
            if max_pairs is not None:
                pairs = {name: sorted(found, key=_pair_order)[:max_pairs] for name, found in pairs.items()}
        num_hit = np.bincount(self._questions.benchmarks[hits], minlength=len(self.names)).tolist()
        return [
            BenchmarkOverlap(
                name,
                self.num_questions[place],
                num_hit[place],
                num_rows[name],
                tuple(sorted(pairs[name], key=_pair_order)),
            )
            for place, name in enumerate(self.names)
        ]


class _Findings:
    """The best evidence for each (row, benchmark), and the questions hit, while a shard is looked through.

    Rows with equal evidence are worked out once, so that a million equal rows cost a million look-ups and no more.
    """

    def __init__(self, index: BenchmarkIndex) -> None:
        self._index = index
        self._best: dict[tuple[int, int], _Evidence] = {}
        self._excerpts: dict[_Evidence, str] = {}
        self._hits = np.zeros(len(index._questions.ids), np.bool_)

    def add_ngrams(self, rows: NDArray[np.int64], ngrams: NDArray[np.int64]) -> None:
        """Adds n-grams that rows hold. rows: rising, one for each n-gram; ngrams: rising within a row."""
        known: dict[bytes, list[_Evidence]] = {}
        starts, stops = np.flatnonzero(np.diff(rows, prepend=-1)), np.flatnonzero(np.diff(rows, append=-1)) + 1
        for row, start, stop in zip(rows[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
            held = ngrams[start:stop]
            key = held.tobytes()
            if key not in known:
                known[key] = self._ngram_evidence(held)
            self._offer(row, known[key])

    def add_group(self, how: How, rows: NDArray[np.int64], places: NDArray[np.int64], groups: _Groups) -> None:
        """Adds rows that match all units of a group. places: one place in the groups for each row."""
        known: dict[int, list[_Evidence]] = {}
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            if place not in known:
                firsts = self._hit(groups.at(place))
                known[place] = [_Evidence(-1.0, HOWS.index(how), question) for question in firsts]
            self._offer(row, known[place])

    def result(self, origins: Sequence[str]) -> ShardContamination:
        ordered = sorted((row, evidence) for (row, _), evidence in self._best.items())
        return ShardContamination(tuple(self._match(row, origins[row], best) for row, best in ordered), self._hits)

    def _offer(self, row: int, evidence: Iterable[_Evidence]) -> None:
        for item in evidence:
            key = row, int(self._index._questions.benchmarks[item.question])
            if key not in self._best or item < self._best[key]:
                self._best[key] = item

    def _hit(self, units: NDArray[np.int64]) -> list[int]:
        """Marks the questions of the units, and returns the first of each benchmark."""
        groups, benchmarks = self._index._questions_of_unit, self._index._questions.benchmarks
        questions = np.sort(np.concatenate([groups.at(unit) for unit in units.tolist()]))
        self._hits[questions] = True
        _, firsts = np.unique(benchmarks[questions], return_index=True)
        return [int(question) for question in questions[firsts]]

    def _ngram_evidence(self, ngrams: NDArray[np.int64]) -> list[_Evidence]:
        """Returns the evidence of a set of n-grams, for each unit that holds any of them."""
        index = self._index
        windows = np.unique(np.concatenate([index._windows_of_ngram.at(ngram) for ngram in ngrams.tolist()]))
        units = index._windows.units(windows)
        evidence = []
        for held in np.split(windows, np.flatnonzero(np.diff(units)) + 1):
            unit = int(index._windows.units(held[:1])[0])
            length = int(index._units.words[unit + 1] - index._units.words[unit])
            starts = held - index._windows.before[unit]
            num_covered, first, last = _covered(starts, min(length, index._max_ngram))
            for question in self._hit(np.array([unit])):
                evidence.append(_Evidence(-num_covered / length, HOWS.index("ngram"), question, first, last))
        return evidence

    def _match(self, row: int, origin: str, best: _Evidence) -> Contamination:
        questions = self._index._questions
        if best not in self._excerpts:
            self._excerpts[best] = self._excerpt(int(questions.units[best.question]), best.first, best.last)
        return Contamination(
            row=row,
            origin=origin,
            benchmark=self._index.names[questions.benchmarks[best.question]],
            question=questions.ids[best.question],
            how=HOWS[best.how],
            share=-best.negative_share,
            excerpt=self._excerpts[best],
        )

    def _excerpt(self, unit: int, first: int, last: int) -> str:
        if first == last:
            return ""
        words = " ".join(self._index._units.table.row(unit)[first:last])[:_MAX_EXCERPT]
        return words.encode("utf-8", "replace").decode("utf-8")


def _covered(starts: NDArray[np.int64], size: int) -> tuple[int, int, int]:
    """Returns how many words n-grams of one size cover, and the longest covered run (the first of equals).

    starts: int64, rising, the first word of each n-gram.
    """
    gaps = np.diff(starts)
    firsts = np.concatenate([starts[:1], starts[1:][gaps > size]])
    lasts = np.concatenate([starts[:-1][gaps > size], starts[-1:]]) + size
    longest = int(np.argmax(lasts - firsts))
    return int((lasts - firsts).sum()), int(firsts[longest]), int(lasts[longest])


def _pair_order(match: Contamination) -> tuple[float, int, str, str]:
    return -match.share, HOWS.index(match.how), match.question, match.origin


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    for name, count in Counter(benchmark.name for benchmark in benchmarks).items():
        if count > 1:
            raise ValueError(f"{count} benchmarks are named {name!r}; names must be unique")
    for benchmark in benchmarks:
        for question, count in Counter(question.id for question in benchmark.questions).items():
            if count > 1:
                raise ValueError(
                    f"benchmark {benchmark.name!r} has {count} questions with the id {question!r}; "
                    "ids must be unique, so that a leak can be looked up"
                )


def _check_shard(
    table: TokenTable, keys: NDArray[np.uint64], offsets: NDArray[np.int64], origins: Sequence[str]
) -> None:
    if len(offsets) != len(table) + 1 or len(origins) != len(table):
        raise ValueError(
            f"a shard of {len(table)} questions needs {len(table) + 1} image offsets and {len(table)} origins, "
            f"got {len(offsets)} and {len(origins)}"
        )
    if offsets[0] != 0 or offsets[-1] != len(keys):
        raise ValueError(f"image offsets must go from 0 to {len(keys)} images, got {offsets[0]} to {offsets[-1]}")


def _questions_and_units(benchmarks: Sequence[Benchmark]) -> tuple[_Questions, _Units]:
    """Returns the questions in their order of preference, and what is different among them."""
    ordered = [
        (place, question)
        for place, benchmark in enumerate(benchmarks)
        for question in sorted(benchmark.questions, key=lambda question: question.id)
    ]
    table = read_tokens(FlatTexts.of_strings([question.question for _, question in ordered]))
    content = table.text.tobytes()
    unit_of = []
    numbers: dict[tuple[bytes, tuple[str, ...], tuple[str, ...]], int] = {}
    for number, (_, question) in enumerate(ordered):
        text = content[table.offsets[number] : table.offsets[number + 1]]
        unit = numbers.setdefault((text, tuple(sorted(set(question.images))), tuple(question.choices)), len(numbers))
        unit_of.append(unit)
    texts = [text for text, _, _ in numbers]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    unit_table = TokenTable(np.frombuffer(b"".join(texts), np.uint8), offsets)
    questions = _Questions(
        [question.id for _, question in ordered],
        np.array([place for place, _ in ordered], np.int64),
        np.array(unit_of, np.int64),
    )
    images = [tuple(image_keys(names).tolist()) for _, names, _ in numbers]
    return questions, _Units(unit_table, _words_before(unit_table), images)


def _words_before(table: TokenTable) -> NDArray[np.int64]:
    """Returns the number of words before each row. int64 [num_rows + 1]."""
    spaces = np.concatenate([[0], np.cumsum(table.text == _SPACE)])[table.offsets]
    return np.concatenate([[0], np.cumsum(np.diff(spaces) + (np.diff(table.offsets) > 0))])


def _known_images(units: _Units) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rising keys of all benchmark images, and for each (unit, image) the unit and the image's place."""
    keys = np.array([key for held in units.images for key in held], np.uint64)
    known, places = np.unique(keys, return_inverse=True)
    return known, np.repeat(np.arange(len(units.images)), [len(held) for held in units.images]), places


def _boilerplate_before(units: _Units, min_ngram: int, limit: int) -> NDArray[np.int64]:
    """Returns the number of boilerplate words before each word of the units, see the module. int64 [num_words + 1]."""
    num_words = int(units.words[-1])
    windows = _collected_windows(units, np.zeros(num_words + 1, np.int64), min_ngram, min_ngram)
    frequent = np.flatnonzero(windows.num_units[windows.ngrams] > limit)
    unit_of = windows.units(frequent)
    starts = units.words[unit_of] + frequent - windows.before[unit_of]
    depth = np.bincount(starts, minlength=num_words + 1) - np.bincount(starts + min_ngram, minlength=num_words + 1)
    return np.concatenate([[0], np.cumsum(np.cumsum(depth)[:num_words] > 0)])


def _collected_windows(units: _Units, boilerplate: NDArray[np.int64], min_ngram: int, max_ngram: int) -> _Windows:
    """Returns the n-grams of the units that have at least `min_ngram` words outside boilerplate."""
    lengths = np.diff(units.words)
    sizes = np.minimum(lengths, max_ngram)
    before = np.concatenate([[0], np.cumsum(np.where(lengths >= min_ngram, lengths - sizes + 1, 0))])
    num_windows = int(before[-1])
    dictionary = _empty_dictionary(num_windows)
    num_units, suffixes = np.zeros(num_windows, np.int32), np.zeros(num_windows, np.uint64)
    ngrams = np.full(num_windows, -1, np.int32)
    num_ngrams = _collect_windows(
        _read_only(units.table.text),
        _read_only(units.table.offsets),
        units.words,
        before,
        boilerplate,
        (min_ngram, max_ngram, _shortest(units, min_ngram, max_ngram)),
        _powers(sizes),
        dictionary,
        ngrams,
        num_units,
        suffixes,
    )
    trimmed = _trimmed(dictionary, num_ngrams)
    return _Windows(before, ngrams, num_units[:num_ngrams].copy(), suffixes[:num_ngrams].copy(), trimmed)


def _whole_texts(units: _Units, windows: _Windows) -> tuple[NDArray[np.int64], _Dictionary]:
    """Returns, for each unit that can be matched as a whole only, the number of its text (else -1), and the texts."""
    has_ngram = np.zeros(len(units.images), np.bool_)
    has_ngram[windows.units(np.flatnonzero(windows.ngrams >= 0))] = True
    whole = ~has_ngram & (np.diff(units.words) > 0)
    dictionary = _empty_dictionary(int(whole.sum()))
    text_of_unit = np.full(len(whole), -1, np.int64)
    num_texts = _collect_texts(
        _read_only(units.table.text), _read_only(units.table.offsets), whole, dictionary, text_of_unit
    )
    return text_of_unit, _trimmed(dictionary, num_texts)


def _text_groups(
    text_of_unit: NDArray[np.int64], image_units: NDArray[np.int64], image_places: NDArray[np.int64], num_images: int
) -> _Groups:
    """Returns the units compared as a whole, by their text and one of their images, or none."""
    plain = text_of_unit >= 0
    plain[image_units] = False
    shown = text_of_unit[image_units] >= 0
    members = np.concatenate([np.flatnonzero(plain), image_units[shown]])
    seen_with = np.concatenate([np.full(int(plain.sum()), -1), image_places[shown]])
    return _Groups.of(_text_keys(text_of_unit[members], seen_with, num_images), members)


def _text_keys(texts: NDArray[np.int64], images: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """Returns one number for each pair of a text and an image's place, -1 for no image."""
    return texts * (num_images + 1) + images + 1


def _places(rising: NDArray[np.generic], keys: NDArray[np.generic]) -> NDArray[np.int64]:
    """Returns the place of each key in a rising array, -1 where it is not there."""
    if not len(rising):
        return np.full(len(keys), -1, np.int64)
    places = np.minimum(np.searchsorted(rising, keys), len(rising) - 1)
    return np.where(rising[places] == keys, places, -1)


def _scanner(units: _Units, windows: _Windows, texts: _Dictionary, min_ngram: int, max_ngram: int) -> _Scanner:
    lengths = np.diff(units.words)
    sizes = np.unique(np.minimum(lengths[lengths >= min_ngram], max_ngram))
    num_words = _power_of_two(max(1, len(windows.suffixes) * _FILTER_BITS // 64))
    filter_words = np.zeros(num_words, np.uint64)
    _fill_filter(filter_words, windows.suffixes)
    return _Scanner(
        text=_read_only(units.table.text),
        sizes=sizes,
        shortest=_shortest(units, min_ngram, max_ngram),
        filter_words=filter_words,
        powers=_powers(sizes),
        ngrams=windows.dictionary,
        texts=texts,
    )


def _shortest(units: _Units, min_ngram: int, max_ngram: int) -> int:
    """Returns the size of the shortest n-gram of any unit, or more than any row has words."""
    lengths = np.diff(units.words)
    return int(np.minimum(lengths, max_ngram)[lengths >= min_ngram].min(initial=np.iinfo(np.int64).max))


def _powers(sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    largest = int(sizes.max(initial=1))
    return np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(largest, FOLD_BASE))])


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _empty_dictionary(capacity: int) -> _Dictionary:
    slots = np.full(_power_of_two(2 * capacity + 2), -1, np.int32)
    return _Dictionary(slots, np.empty(capacity, np.uint64), np.empty(capacity, np.int64), np.empty(capacity, np.int64))


def _trimmed(dictionary: _Dictionary, size: int) -> _Dictionary:
    slots, hashes, starts, stops = dictionary
    return _Dictionary(slots, hashes[:size].copy(), starts[:size].copy(), stops[:size].copy())


def _read_only(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """Returns a contiguous view that cannot be written to, so that the kernels are compiled for one type."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _scanned(
    table: TokenTable, scanner: _Scanner, num_threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the whole text that each row equals (-1 for none), and the pairs (row, n-gram), rising, each once."""
    text, offsets = _read_only(table.text), _read_only(table.offsets)
    num_hits, text_of_row = np.zeros(len(table), np.int64), np.full(len(table), -1, np.int64)
    blocks = np.linspace(0, offsets[-1], _BLOCKS_PER_THREAD * num_threads + 1)[1:-1]
    bounds = np.unique(np.concatenate([[0], np.searchsorted(offsets[:-1], blocks), [len(table)]])).tolist()

    def count(first: int, last: int) -> None:
        _count_hits(text, offsets, first, last, scanner, num_hits, text_of_row)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(count, bounds[:-1], bounds[1:]))
    rows = np.flatnonzero(num_hits)
    begins = np.concatenate([[0], np.cumsum(num_hits[rows])])
    hits = np.empty(begins[-1], np.int64)
    _fill_hits(text, offsets, rows, begins, scanner, hits)
    num_ngrams = max(1, len(scanner.ngrams.hashes))
    pairs = np.unique(np.repeat(rows, num_hits[rows]) * num_ngrams + hits)
    return text_of_row, pairs // num_ngrams, pairs % num_ngrams


@_compiled
def _read_words(
    text: NDArray[np.uint8], start: int, stop: int, prefixes: NDArray[np.uint64], starts: NDArray[np.int64]
) -> int:
    """Returns the number of words of text[start:stop], and fills the last two arguments.

    prefixes: uint64 [num_bytes + 1 at least], at i the polynomial over the hashes of the first i words, each without
    the case of A to Z. starts: int64 [as long], where each word starts, and last where one more would. All words are
    hashed before the first n-gram is looked up, so that the processor can wait for many look-ups at once.
    """
    count, place = 0, start
    prefixes[0] = 0
    while place < stop:
        starts[count] = place
        state = _SEED
        while place < stop and text[place] != _SPACE:
            state = (state ^ np.uint64(_lower(text[place]))) * _PRIME
            place += 1
        prefixes[count + 1] = prefixes[count] * FOLD_BASE + avalanche64(state)
        count, place = count + 1, place + 1
    starts[count] = stop + 1
    return count


@_compiled
def _lower(byte: int) -> int:
    return byte + 32 if 65 <= byte <= 90 else byte


@_compiled
def _run_hash(prefixes: NDArray[np.uint64], count: int, size: int, power: np.uint64) -> np.uint64:
    """Returns the hash of the last `size` of `count` words. prefixes: see `_read_words`. power: `FOLD_BASE` ** size."""
    return np.uint64(avalanche64(prefixes[count] - prefixes[count - size] * power + np.uint64(size)))


@_compiled
def _longest(offsets: NDArray[np.int64], first: int, last: int) -> int:
    """Returns the bytes of the longest row from first to last, last excluded."""
    longest = 0
    for row in range(first, last):
        longest = max(longest, offsets[row + 1] - offsets[row])
    return longest


@_compiled
def _same_bytes(
    first: NDArray[np.uint8], start: int, second: NDArray[np.uint8], begin: int, length: int, folded: bool
) -> bool:
    for place in range(length):
        one, other = first[start + place], second[begin + place]
        if one != other and not (folded and _lower(one) == _lower(other)):
            return False
    return True


@_compiled
def _slot(
    dictionary: _Dictionary,
    known: NDArray[np.uint8],
    key: np.uint64,
    text: NDArray[np.uint8],
    start: int,
    stop: int,
    folded: bool,
) -> np.uint64:
    """Returns the slot of the range that equals text[start:stop], byte for byte (folded: but for the case of A to Z).

    If there is none, it is the free slot where it would be. known: what the ranges of the dictionary lie in.
    """
    mask = np.uint64(len(dictionary.slots) - 1)
    slot = key & mask
    while True:
        entry = dictionary.slots[slot]
        if entry < 0:
            return slot
        begin, length = dictionary.starts[entry], stop - start
        is_likely = dictionary.hashes[entry] == key and dictionary.stops[entry] - begin == length
        if is_likely and _same_bytes(known, begin, text, start, length, folded):
            return slot
        slot = (slot + np.uint64(1)) & mask


@_compiled
def _number(
    dictionary: _Dictionary, size: int, text: NDArray[np.uint8], key: np.uint64, start: int, stop: int, folded: bool
) -> int:
    """Returns the number of a range of the dictionary's own text; a new one gets the number `size`."""
    slot = _slot(dictionary, text, key, text, start, stop, folded)
    if dictionary.slots[slot] < 0:
        dictionary.slots[slot] = size
        dictionary.hashes[size] = key
        dictionary.starts[size], dictionary.stops[size] = start, stop
    return int(dictionary.slots[slot])


@_compiled
def _filter_bits(key: np.uint64) -> np.uint64:
    six = np.uint64(63)
    low, middle, high = key & six, (key >> np.uint64(6)) & six, (key >> np.uint64(12)) & six
    return (np.uint64(1) << low) | (np.uint64(1) << middle) | (np.uint64(1) << high)


@_compiled
def _filter_place(filter_words: NDArray[np.uint64], key: np.uint64) -> np.uint64:
    return (key >> np.uint64(20)) & np.uint64(len(filter_words) - 1)


@_compiled
def _fill_filter(filter_words: NDArray[np.uint64], keys: NDArray[np.uint64]) -> None:
    for key in keys:
        filter_words[_filter_place(filter_words, key)] |= _filter_bits(key)


@_compiled
def _collect_windows(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    words: NDArray[np.int64],
    before: NDArray[np.int64],
    boilerplate: NDArray[np.int64],
    bounds: tuple[int, int, int],
    powers: NDArray[np.uint64],
    dictionary: _Dictionary,
    ngrams: NDArray[np.int32],
    num_units: NDArray[np.int32],
    suffixes: NDArray[np.uint64],
) -> int:
    """Fills the last four arguments (see `_Windows`) and returns the number of different n-grams.

    bounds: least words, most words, and the words of the suffixes.
    """
    least, most, shortest = bounds
    room = _longest(offsets, 0, len(offsets) - 1) + 1
    prefixes, starts = np.empty(room, np.uint64), np.empty(room, np.int64)
    last_unit, num_ngrams = np.full(len(num_units), -1, np.int32), 0
    for unit in range(len(offsets) - 1):
        length = words[unit + 1] - words[unit]
        if length < least:
            continue
        size = min(length, most)
        _read_words(text, offsets[unit], offsets[unit + 1], prefixes, starts)
        for count in range(size, length + 1):
            seen = words[unit] + count
            if size - (boilerplate[seen] - boilerplate[seen - size]) < least:
                continue
            key = _run_hash(prefixes, count, size, powers[size])
            ngram = _number(dictionary, num_ngrams, text, key, starts[count - size], starts[count] - 1, True)
            if ngram == num_ngrams:
                num_ngrams += 1
                suffixes[ngram] = _run_hash(prefixes, count, shortest, powers[shortest])
            if last_unit[ngram] != unit:
                last_unit[ngram] = unit
                num_units[ngram] += 1
            ngrams[before[unit] + count - size] = ngram
    return num_ngrams


@_compiled
def _collect_texts(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    whole: NDArray[np.bool_],
    dictionary: _Dictionary,
    text_of_unit: NDArray[np.int64],
) -> int:
    """Fills the last two arguments for the units marked in `whole`, and returns the number of different texts."""
    room = _longest(offsets, 0, len(offsets) - 1) + 1
    prefixes, starts, num_texts = np.empty(room, np.uint64), np.empty(room, np.int64), 0
    for unit in range(len(whole)):
        if whole[unit]:
            count = _read_words(text, offsets[unit], offsets[unit + 1], prefixes, starts)
            key = avalanche64(prefixes[count] + np.uint64(count))
            number = _number(dictionary, num_texts, text, key, offsets[unit], offsets[unit + 1], False)
            num_texts += number == num_texts
            text_of_unit[unit] = number
    return num_texts


@_compiled
def _scan_row(
    text: NDArray[np.uint8],
    row_start: int,
    row_stop: int,
    scanner: _Scanner,
    prefixes: NDArray[np.uint64],
    starts: NDArray[np.int64],
    hits: NDArray[np.int64],
) -> tuple[int, int]:
    """Returns how many n-grams of a row are a benchmark's, and the number of the whole text that it equals, or -1.

    hits: the n-grams are written to it as far as it goes. prefixes, starts: room for `_read_words`.
    """
    num_hits, num_words = 0, _read_words(text, row_start, row_stop, prefixes, starts)
    if num_words == 0:
        return 0, -1
    for count in range(scanner.shortest, num_words + 1):
        suffix = _run_hash(prefixes, count, scanner.shortest, scanner.powers[scanner.shortest])
        bits = _filter_bits(suffix)
        if scanner.filter_words[_filter_place(scanner.filter_words, suffix)] & bits != bits:
            continue
        for size in scanner.sizes:
            if size <= count:
                key = _run_hash(prefixes, count, size, scanner.powers[size])
                start, stop = starts[count - size], starts[count] - 1
                ngram = scanner.ngrams.slots[_slot(scanner.ngrams, scanner.text, key, text, start, stop, True)]
                if ngram >= 0:
                    if num_hits < len(hits):
                        hits[num_hits] = ngram
                    num_hits += 1
    key = avalanche64(prefixes[num_words] + np.uint64(num_words))
    return num_hits, scanner.texts.slots[_slot(scanner.texts, scanner.text, key, text, row_start, row_stop, False)]


@_compiled
def _count_hits(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    first: int,
    last: int,
    scanner: _Scanner,
    num_hits: NDArray[np.int64],
    text_of_row: NDArray[np.int64],
) -> None:
    """Fills the last two arguments for the rows from first to last, last excluded."""
    room = _longest(offsets, first, last) + 1
    prefixes, starts = np.empty(room, np.uint64), np.empty(room, np.int64)
    nothing = np.empty(0, np.int64)
    for row in range(first, last):
        found = _scan_row(text, offsets[row], offsets[row + 1], scanner, prefixes, starts, nothing)
        num_hits[row], text_of_row[row] = found


@_compiled
def _fill_hits(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    begins: NDArray[np.int64],
    scanner: _Scanner,
    hits: NDArray[np.int64],
) -> None:
    """Writes the n-grams of rows[i] to hits[begins[i]:begins[i + 1]]."""
    room = _longest(offsets, 0, len(offsets) - 1) + 1
    prefixes, starts = np.empty(room, np.uint64), np.empty(room, np.int64)
    for place, row in enumerate(rows):
        _scan_row(
            text, offsets[row], offsets[row + 1], scanner, prefixes, starts, hits[begins[place] : begins[place + 1]]
        )
