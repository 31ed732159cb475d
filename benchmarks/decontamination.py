"""Decontamination: rows a second against 100,000 benchmark questions, beside sets of n-grams in plain Python.

    .venv/bin/python -m benchmarks.decontamination [--rows 300000] [--threads 2]

Rows are token tables with the frequencies of natural words (Zipf), 46 words each; one in a hundred holds 13 to 46 words
of a benchmark question, and one in two hundred an image of one. Neither side's tokenising is counted, nor compilation.
Both sides answer the same question, which rows leak, and must agree on every row that both look at. Beside the time on
the clock stands the rate by processor time, times the threads: what a machine reaches that does nothing else.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from filters.decontamination import Benchmark, BenchmarkIndex, BenchmarkQuestion, ShardContamination, image_keys
from filters.flat_texts import FlatTexts
from filters.text_columns import read_tokens
from filters.token_table import TokenTable

NUM_WORDS = 46
SHARD_ROWS = 100_000
MIN_NGRAM, MAX_NGRAM, LIMIT = 8, 13, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100_000, help="benchmark questions")
    parser.add_argument("--rows", type=int, default=300_000, help="training rows")
    parser.add_argument("--plain-rows", type=int, default=20_000, help="training rows that plain Python looks at")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    words = np.array([spelled(number) for number in range(30_000)])
    benchmark = questions(rng, words, arguments.questions)
    rows = training_rows(rng, words, benchmark, arguments.rows)
    started = Stopwatch()
    index = BenchmarkIndex.build([benchmark])
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, numpy {np.__version__}")
    print(f"index of {arguments.questions:,} questions, with tokenising and compiling: {started}")
    shards = [shard(rows, start) for start in range(0, arguments.rows, SHARD_ROWS)]
    find(index, shard(rows[:1000], 0), arguments.threads)
    started = Stopwatch()
    found = [find(index, each, arguments.threads) for each in shards]
    clock, busy = started.seconds()
    rate, free_rate = arguments.rows / clock, arguments.threads * arguments.rows / busy
    leaking = [SHARD_ROWS * number + match.row for number, part in enumerate(found) for match in part.rows]
    print(f"bimode:       {rate:9,.0f} rows/s on the clock, {free_rate:9,.0f} by processor time")
    plain_rate, plain_free_rate, plain = plain_python(benchmark, rows[: arguments.plain_rows])
    print(
        f"plain Python: {plain_rate:9,.0f} rows/s on the clock, {plain_free_rate:9,.0f} by processor time, one thread"
    )
    same = plain == [row for row in leaking if row < arguments.plain_rows]
    print(
        f"ratio:        {rate / plain_rate:9,.0f} on the clock, {free_rate / plain_free_rate:9,.0f} by processor time"
    )
    print(f"{len(leaking):,} of {arguments.rows:,} rows leak; both find the same: {same} ({len(plain)} rows)")
    assert same


def spelled(number: int) -> str:
    """Returns a word of letters alone, 2 to 7 of them, its own for each number."""
    syllables = [
        f"{'bcdfglmnprstvz'[number // 70**place % 14]}{'aeiou'[number // 70**place // 14 % 5]}" for place in range(3)
    ]
    return "".join(syllables[: 1 + (number >= 70) + (number >= 4_900)]) + "ns"[number % 2] * (number % 3 > 0)


class Stopwatch:
    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Returns the seconds on the clock, and those that all threads of this process computed."""
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]

    def __str__(self) -> str:
        clock, busy = self.seconds()
        return f"{clock:.1f} s on the clock, {busy:.1f} s of processor time"


def questions(rng: np.random.Generator, words: NDArray[np.str_], size: int) -> Benchmark:
    """Returns questions of which 5 % have 3 to 7 words, 15 % 8 to 12, the others 46; every second has an image."""
    lengths = rng.choice([*range(3, 8), *range(8, 13), NUM_WORDS], size, p=[0.01] * 5 + [0.03] * 5 + [0.8])
    texts = [" ".join(drawn(rng, words, length)) for length in lengths]
    return Benchmark("drawn", [_question(number, text) for number, text in enumerate(texts)])


def _question(number: int, text: str) -> BenchmarkQuestion:
    return BenchmarkQuestion(f"{number:07}", text, images=(f"test-{number}",) if number % 2 else ())


def drawn(rng: np.random.Generator, words: NDArray[np.str_], size: int) -> NDArray[np.str_]:
    """Returns words by Zipf's law."""
    ranks = np.exp(rng.random(size) * np.log(len(words))).astype(np.int64) - 1
    return np.asarray(words[ranks])


def training_rows(
    rng: np.random.Generator, words: NDArray[np.str_], benchmark: Benchmark, size: int
) -> list[tuple[str, str]]:
    """Returns (question, image name): every hundredth row with a piece of a benchmark question, or with its image."""
    texts = drawn(rng, words, (size, NUM_WORDS))  # type: ignore[arg-type]
    rows = []
    for number in range(size):
        row, image = texts[number].tolist(), f"train-{number}"
        leak = benchmark.questions[int(rng.integers(len(benchmark.questions)))]
        if number % 100 == 7:
            length = int(rng.integers(MAX_NGRAM, NUM_WORDS))
            row[:length] = leak.question.split()[:length]
        elif number % 100 == 8 and leak.images:
            image = leak.images[0]
        rows.append((" ".join(row), image))
    return rows


Shard = tuple[TokenTable, NDArray[np.uint64], NDArray[np.int64], list[str]]


def shard(rows: list[tuple[str, str]], start: int) -> Shard:
    """Returns the rows from a place on, at most `SHARD_ROWS`. They are tokens with spaces already."""
    some = rows[start : start + SHARD_ROWS]
    texts = [text.encode() for text, _ in some]
    normal = read_tokens(FlatTexts.of_strings([text for text, _ in some[:100]]))
    assert normal.text.tobytes() == b"".join(texts[:100]), "the texts are not in their normal form"
    table = TokenTable(np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)], dtype=np.int64))
    origins = [str(start + place) for place in range(len(some))]
    return table, image_keys(image for _, image in some), np.arange(len(some) + 1), origins


def find(index: BenchmarkIndex, some: Shard, num_threads: int) -> ShardContamination:
    table, keys, offsets, origins = some
    return index.find(table, keys, offsets, origins=origins, num_threads=num_threads)


def plain_python(benchmark: Benchmark, rows: list[tuple[str, str]]) -> tuple[float, float, list[int]]:
    """Returns rows a second, by clock and by processor, and the places of those that leak, by a set for each n."""
    ngrams, texts, images = plain_index(benchmark)
    started = Stopwatch()
    leaking = []
    for place, (text, image) in enumerate(rows):
        row = text.split()
        leaks = image in images or (text, image) in texts
        for size, known in ngrams.items():
            leaks = leaks or any(" ".join(row[n : n + size]) in known for n in range(len(row) - size + 1))
        if leaks:
            leaking.append(place)
    clock, busy = started.seconds()
    return len(rows) / clock, len(rows) / busy, leaking


def plain_index(benchmark: Benchmark) -> tuple[dict[int, set[str]], set[tuple[str, str]], set[str]]:
    """Returns the n-grams that are evidence by their length, the short questions with their images, and all images."""
    table = read_tokens(FlatTexts.of_strings([question.question for question in benchmark.questions]))
    rows = [table.row(place) for place in range(len(table))]
    counts = Counter(gram for row in set(map(tuple, rows)) for gram in set(grams(row, MIN_NGRAM)))
    ngrams: dict[int, set[str]] = {}
    texts: set[tuple[str, str]] = set()
    images: set[str] = set()
    for row, question in zip(rows, benchmark.questions, strict=True):
        images.update(question.images)
        held = [] if len(row) < MIN_NGRAM else evident(row, counts)
        ngrams.setdefault(min(len(row), MAX_NGRAM), set()).update(held)
        texts.update((" ".join(row), image) for image in question.images if not held)
    return ngrams, texts, images


def grams(row: list[str] | tuple[str, ...], size: int) -> list[str]:
    return [" ".join(row[start : start + size]) for start in range(len(row) - size + 1)]


def evident(row: list[str], counts: Counter[str]) -> list[str]:
    frequent = [counts[gram] > LIMIT for gram in grams(row, MIN_NGRAM)]
    common = [any(frequent[max(0, place - MIN_NGRAM + 1) : place + 1]) for place in range(len(row))]
    size = min(len(row), MAX_NGRAM)
    found = grams(row, size)
    return [gram for start, gram in enumerate(found) if size - sum(common[start : start + size]) >= MIN_NGRAM]


if __name__ == "__main__":
    main()
