"""Decontamination: what counts as a leak, what does not, and the laws of the result."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.decontamination import (
    HOWS,
    Benchmark,
    BenchmarkIndex,
    BenchmarkQuestion,
    Contamination,
    ShardContamination,
    image_keys,
)
from filters.flat_texts import FlatTexts
from filters.text_columns import read_tokens
from tests.filters.reference import joined_tokens

Row = tuple[str, tuple[str, ...]]
"""A training row: its question and the names of its images."""

FIFTEEN = "alpha beta gamma delta epsilon zeta theta iota kappa lambda omicron sigma upsilon omega rho"
LETTERS = FIFTEEN.split()
TWELVE, THIRTEEN = " ".join(LETTERS[:12]), " ".join(LETTERS[:13])
SUFFIX = "Answer the question using a single word or phrase."
FOURTEEN = "castle river window orange seven mountain pencil doctor garden yellow music winter hammer silver"
DIVERSE = FOURTEEN.split()


def benchmark(*questions: BenchmarkQuestion | str, name: str = "bench") -> Benchmark:
    numbered = enumerate(questions, start=1)
    return Benchmark(name, [BenchmarkQuestion(f"q{i}", q) if isinstance(q, str) else q for i, q in numbered])


def find(index: BenchmarkIndex, rows: Sequence[Row], *, first: int = 0, num_threads: int = 1) -> ShardContamination:
    return index.find(
        read_tokens(FlatTexts.of_strings([question for question, _ in rows])),
        image_keys(name for _, names in rows for name in names),
        np.cumsum([0, *(len(names) for _, names in rows)], dtype=np.int64),
        origins=[f"s:f#{first + place}" for place in range(len(rows))],
        num_threads=num_threads,
    )


def matches(tested: Benchmark | Sequence[Benchmark], *rows: Row | str, **bounds: int) -> list[Contamination]:
    benchmarks = [tested] if isinstance(tested, Benchmark) else tested
    index = BenchmarkIndex.build(benchmarks, **bounds)  # type: ignore[arg-type]
    return list(find(index, [(row, ()) if isinstance(row, str) else row for row in rows]).matches)


def kinds(tested: Benchmark | Sequence[Benchmark], *rows: Row | str) -> list[tuple[int, str, str, float]]:
    return [(found.row, found.question, found.how, found.share) for found in matches(tested, *rows)]


def test_thirteen_shared_words_are_a_leak_and_say_how_much_and_what() -> None:
    row = f"Please read this: {THIRTEEN.upper()} and so on"
    assert matches(benchmark(FIFTEEN), "something else", row) == [
        Contamination(1, "s:f#1", "bench", "q1", "ngram", 13 / 15, THIRTEEN)
    ]


def test_twelve_shared_words_of_a_longer_question_are_no_leak() -> None:
    assert matches(benchmark(FIFTEEN), f"{TWELVE} and so on until the end of the text") == []


@pytest.mark.parametrize("size", [8, 12])
def test_a_question_of_eight_to_twelve_words_is_one_ngram(size: int) -> None:
    question = " ".join(LETTERS[:size])
    found = matches(benchmark(question), f"First: {question}, then", f"First: {question.replace('beta', 'the')}")
    assert found == [Contamination(0, "s:f#0", "bench", "q1", "ngram", 1.0, question)]


def test_a_question_of_seven_words_is_matched_as_a_whole_only() -> None:
    seven = " ".join(LETTERS[:7])
    assert kinds(benchmark(seven), f"{seven} too", f"{seven.title()}?") == [(1, "q1", "exact", 1.0)]


def test_both_ends_of_the_ngram_sizes_can_be_set() -> None:
    tested = benchmark("one fish two fish red fish")
    assert matches(tested, "see one fish two fish swim") == []
    found = matches(tested, "see one fish two fish swim", "see fish two", min_ngram=2, max_ngram=4)
    assert [(item.row, item.share, item.excerpt) for item in found] == [(0, 4 / 6, "one fish two fish")]


def test_case_is_ignored_in_ngrams_but_not_in_short_questions() -> None:
    tested = benchmark(f"{TWELVE} x", "Is x larger?")
    assert kinds(tested, f"{TWELVE} X", "Is X larger?", "is x larger") == [
        (0, "q1", "ngram", 1.0),
        (2, "q2", "exact", 1.0),
    ]


def test_the_share_counts_every_covered_word_once_and_the_excerpt_is_the_longest_run() -> None:
    words = [f"{word}{number}" for number in "ab" for word in DIVERSE]
    question, first, second = " ".join(words), " ".join(words[:13]), " ".join(words[14:28])
    assert matches(benchmark(question), f"{second} | {first} | {first}") == [
        Contamination(0, "s:f#0", "bench", "q1", "ngram", 27 / 28, second)
    ]


def test_a_long_excerpt_is_cut_to_two_hundred_characters() -> None:
    question = " ".join(f"{word}{number}" for number in "abcd" for word in DIVERSE)
    (found,) = matches(benchmark(question), question)
    assert found.share == 1.0
    assert found.excerpt == question[:200]


def test_a_short_question_with_images_needs_a_shared_image() -> None:
    asked = "What is shown in the image?"
    tested = benchmark(BenchmarkQuestion("a", asked, images=("x",)), BenchmarkQuestion("b", asked, images=("y", "z")))
    rows: list[Row] = [(asked, ()), (asked, ("other",)), (asked, ("other", "z")), (asked, ("x",))]
    assert kinds(tested, *rows) == [(2, "b", "exact", 1.0), (3, "a", "exact", 1.0)]


def test_a_short_question_without_images_needs_a_row_without_images() -> None:
    assert kinds(benchmark("What is two plus two?"), ("What is two plus two", ("x",)), "what is two plus two") == [
        (1, "q1", "exact", 1.0)
    ]


def test_a_long_overlap_counts_whatever_the_images() -> None:
    tested = benchmark(BenchmarkQuestion("a", FIFTEEN, images=("x",)))
    assert kinds(tested, (FIFTEEN, ("y",)), FIFTEEN) == [(0, "a", "ngram", 1.0), (1, "a", "ngram", 1.0)]


def test_a_shared_image_counts_by_itself_unless_switched_off() -> None:
    tested = benchmark(
        BenchmarkQuestion("a", "How many?", images=("x",)), BenchmarkQuestion("b", "", images=("x", "y"))
    )
    rows: list[Row] = [("Who?", ("z", "x")), ("Who?", ("y",)), ("How many?", ("x",)), ("Who?", ("z",))]
    assert kinds(tested, *rows) == [(0, "a", "image", 1.0), (1, "b", "image", 1.0), (2, "a", "exact", 1.0)]
    assert [found.row for found in matches(tested, *rows, images=False)] == [2]


def test_options_in_the_question_of_one_side_do_not_hide_a_leak() -> None:
    tested = benchmark(BenchmarkQuestion("a", FIFTEEN, choices=("red", "blue")))
    assert kinds(tested, f"{FIFTEEN}?\n(A) red\n(B) blue") == [(0, "a", "ngram", 1.0)]


def test_words_of_more_than_ten_questions_are_no_evidence() -> None:
    row = f"What colour is the car? {SUFFIX}"
    heads = [f"What {word} colour is the car?" for word in DIVERSE[:10]]
    assert {found.how for found in matches(benchmark(*(f"{head} {SUFFIX}" for head in heads)), row)} == {"ngram"}
    assert matches(benchmark(*(f"{head} {SUFFIX}" for head in [*heads, "And another?"])), row) == []


def test_a_question_beside_boilerplate_is_still_found() -> None:
    tested = benchmark(*(f"{word} {SUFFIX}" for word in DIVERSE), f"{TWELVE} {SUFFIX}")
    (found,) = matches(tested, f"{TWELVE} {SUFFIX}", f"{DIVERSE[0]} {DIVERSE[1]} {SUFFIX}")
    assert (found.row, found.question, found.how) == (0, "q15", "ngram")
    assert found.share == 17 / 21  # the last n-gram that counts has 8 words of its own and 5 of the suffix


def test_a_question_of_boilerplate_alone_is_matched_as_a_whole_and_by_its_image() -> None:
    asked = f"{TWELVE} {SUFFIX}"
    tested = benchmark(*(BenchmarkQuestion(f"{number:02}", asked, images=(f"x{number}",)) for number in range(11)))
    rows: list[Row] = [(asked, ("y",)), (f"{asked} now", ()), (asked, ("x7",))]
    assert kinds(tested, *rows) == [(2, "07", "exact", 1.0)]


def test_boilerplate_counts_different_questions_by_text_images_and_options() -> None:
    copies = [benchmark(BenchmarkQuestion("a", FIFTEEN, images=("x",)), name=f"b{number:02}") for number in range(12)]
    assert [found.benchmark for found in matches(copies, FIFTEEN)] == [copy.name for copy in copies]
    choices = benchmark(*(BenchmarkQuestion(str(number), FIFTEEN, choices=(str(number),)) for number in range(12)))
    assert matches(choices, f"{FIFTEEN} and more") == []


def test_the_best_match_has_the_largest_share_then_the_first_benchmark_then_the_smallest_id() -> None:
    last = BenchmarkQuestion("z", FIFTEEN)
    first = Benchmark("first", [BenchmarkQuestion("m", f"{THIRTEEN} until here"), last, replace(last, id="y")])
    second = Benchmark("second", [BenchmarkQuestion("a", FIFTEEN)])
    index = BenchmarkIndex.build([first, second])
    found = find(index, [(FIFTEEN, ())])
    assert [(item.benchmark, item.question) for item in found.matches] == [("first", "y"), ("second", "a")]
    assert [(item.benchmark, item.question) for item in found.rows] == [("first", "y")]
    assert found.hit_questions.tolist() == [True, True, True, True]


def test_the_overlap_of_a_benchmark_counts_questions_and_rows_over_all_shards() -> None:
    long = BenchmarkQuestion("long", FIFTEEN)
    shown = [BenchmarkQuestion(name, "Who is it?", images=("x",)) for name in ("shown", "also")]
    index = BenchmarkIndex.build([Benchmark("b", [long, *shown]), Benchmark("c", [long]), Benchmark("d", [])])
    shards = [find(index, [(THIRTEEN, ()), (FIFTEEN, ())]), find(index, [("No", ()), ("Where?", ("x",))], first=2)]
    overlaps = index.overlaps(shards)
    assert [(o.name, o.num_questions, o.num_matched_questions, o.num_rows) for o in overlaps] == [
        ("b", 3, 3, 3),
        ("c", 1, 1, 2),
        ("d", 0, 0, 0),
    ]
    pairs = [(pair.origin, pair.question, pair.how) for pair in overlaps[0].pairs]
    assert pairs == [("s:f#1", "long", "ngram"), ("s:f#3", "also", "image"), ("s:f#0", "long", "ngram")]
    assert [len(overlap.pairs) for overlap in index.overlaps(reversed(shards), max_pairs=1)] == [1, 1, 0]
    assert index.overlaps(reversed(shards), max_pairs=1)[0].pairs == overlaps[0].pairs[:1]


def test_reason_and_detail_are_words_for_a_person() -> None:
    tested = benchmark(FIFTEEN, "Who is it?", BenchmarkQuestion("q3", "Where?", images=("x",)))
    found = matches(tested, THIRTEEN, "Who is it?", ("When?", ("x",)))
    assert [(item.reason, item.detail) for item in found] == [
        ("contaminated_ngram", f"shares 87% of question 'q1' of bench: '{THIRTEEN}'"),
        ("contaminated_exact", "asks question 'q2' of bench"),
        ("contaminated_image", "holds an image of question 'q3' of bench"),
    ]


def test_texts_without_words_match_nothing() -> None:
    assert matches(benchmark("", "?", "  "), "", "?", "word", " ") == []


def test_one_word_matches_one_word() -> None:
    assert kinds(benchmark("Why?"), "why", "why not") == [(0, "q1", "exact", 1.0)]


@pytest.mark.parametrize(
    "question",
    [
        "🙂 👨‍👩‍👧 🇫🇷 😀 😁 😂 🤣 😃 😄",
        "ما هو لون السيارة التي تقف أمام البيت الكبير في الشارع",
        "e\u0301te\u0301 de\u0301ja\u0300 vu a\u0300 No\u0308el chez ma me\u0300re et mon pe\u0300re",
        "图中左边的汽车是什么颜色的",
        "one two three \ud800 five six seven eight \udfff ten",
    ],
    ids=["emoji", "right-to-left", "combining", "unspaced", "surrogates"],
)
def test_any_script_can_leak(question: str) -> None:
    (found,) = matches(benchmark(question), "nothing", f"look: {question} !")
    assert (found.row, found.how, found.share) == (1, "ngram", 1.0)
    assert found.excerpt.encode("utf-8")


def test_composed_and_decomposed_letters_are_one_text() -> None:
    assert kinds(benchmark("Où est l'été?"), "Ou\u0300 est l'e\u0301te\u0301") == [(0, "q1", "exact", 1.0)]


@pytest.mark.parametrize("word", ["a" * 2**20, "a " * 2**18])
def test_a_megabyte_of_one_word_is_read_in_linear_time(word: str) -> None:
    started = time.process_time()
    assert matches(benchmark(word), "a b", word, f"{word}b")[0].share == 1.0
    assert time.process_time() - started < 30


def test_a_very_long_benchmark_question_against_equal_rows_is_not_quadratic() -> None:
    index = BenchmarkIndex.build([benchmark("a " * 50_000, *(f"{word} {FIFTEEN}" for word in DIVERSE[:9]))])
    started = time.process_time()
    found = find(index, [("a " * 20, ())] * 10_000 + [(f"{FIFTEEN} {FIFTEEN}", ())] * 10_000)
    assert len(found.matches) == 20_000
    assert time.process_time() - started < 30


def test_an_image_of_every_benchmark_question_is_not_quadratic() -> None:
    same = Benchmark("b", [BenchmarkQuestion(f"{number:05}", "Who?", images=("blank",)) for number in range(5_000)])
    started = time.process_time()
    found = find(BenchmarkIndex.build([same]), [("Who?", ("blank", "blank"))] * 20_000)
    assert len(found.matches) == 20_000 and found.hit_questions.all()
    assert {(item.question, item.how) for item in found.matches} == {("00000", "exact")}
    assert time.process_time() - started < 30


@pytest.mark.parametrize("benchmarks", [[], [Benchmark("empty", [])]])
def test_without_benchmark_questions_nothing_leaks(benchmarks: list[Benchmark]) -> None:
    index = BenchmarkIndex.build(benchmarks)
    assert find(index, [(FIFTEEN, ("x",)), ("", ())]).matches == ()
    assert [overlap.num_rows for overlap in index.overlaps([])] == [0] * len(benchmarks)


def test_a_shard_without_rows_leaks_nothing() -> None:
    assert find(BenchmarkIndex.build([benchmark(FIFTEEN)]), [], num_threads=2).matches == ()


def test_an_id_given_twice_is_named() -> None:
    twice = Benchmark("mmmu", [BenchmarkQuestion("val_7", "Who?"), BenchmarkQuestion("val_7", "Where?")])
    with pytest.raises(ValueError, match="benchmark 'mmmu' has 2 questions with the id 'val_7'"):
        BenchmarkIndex.build([twice])


def test_a_name_given_twice_is_named() -> None:
    with pytest.raises(ValueError, match="2 benchmarks are named 'bench'"):
        BenchmarkIndex.build([benchmark("Who?"), benchmark("Where?")])


@pytest.mark.parametrize("bounds", [{"min_ngram": 0}, {"min_ngram": 14}, {"max_benchmark_questions": 0}])
def test_impossible_bounds_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        BenchmarkIndex.build([], **bounds)  # type: ignore[arg-type]


def test_arguments_of_different_lengths_are_refused() -> None:
    index, table = BenchmarkIndex.build([]), read_tokens(FlatTexts.of_strings(["Who?"]))
    with pytest.raises(ValueError, match="needs 2 image offsets and 1 origins, got 1 and 1"):
        index.find(table, image_keys([]), np.zeros(1, np.int64), origins=["a"])
    with pytest.raises(ValueError, match="must go from 0 to 0 images, got 0 to 1"):
        index.find(table, image_keys([]), np.array([0, 1]), origins=["a"])


def test_image_keys_are_those_of_every_machine_and_run() -> None:
    assert image_keys(["", "ab"]).tolist() == [0xB4B2797457A0A6E4, 0x8810DE87F1B5520E]  # blake2b's, read from the right


# The laws. Short n-grams over few words make chance overlaps, boilerplate and ties frequent.

BOUNDS = {"min_ngram": 2, "max_ngram": 4, "max_benchmark_questions": 2}
WORDS = st.sampled_from(["a", "b", "B", "ß", "🙂", "\ud800", "number", "Number", "7", "字"])
TEXTS = st.lists(WORDS, max_size=9).map(" ".join)
IMAGES = st.lists(st.sampled_from(["x", "y", "z"]), max_size=2).map(tuple)
ROWS = st.lists(st.tuples(TEXTS, IMAGES), max_size=8)
QUESTIONS = st.lists(st.builds(BenchmarkQuestion, st.just(""), TEXTS, st.just(()), IMAGES), max_size=8)
BENCHMARKS = st.lists(QUESTIONS, max_size=3).map(
    lambda drawn: [
        Benchmark(f"b{place}", [replace(q, id=str(number)) for number, q in enumerate(questions)])
        for place, questions in enumerate(drawn)
    ]
)


def naive(
    benchmarks: Sequence[Benchmark], rows: Sequence[Row]
) -> tuple[list[tuple[object, ...]], set[tuple[str, str]]]:
    """Returns (row, share, how, benchmark, question) of the best matches, and the questions hit, by sets and loops."""
    own = {(b.name, q.id): _naive_evidence(benchmarks, q) for b in benchmarks for q in b.questions}
    best: dict[tuple[int, int], tuple[float, int, str]] = {}
    hits = set()
    for number, (text, names) in enumerate(rows):
        for place, tested in enumerate(benchmarks):
            for question in tested.questions:
                grams = own[tested.name, question.id]
                for share, how in _naive_matches(text, names, question, grams):
                    hits.add((tested.name, question.id))
                    found = (-share, HOWS.index(how), question.id)
                    best[number, place] = min(best.get((number, place), found), found)
    ordered = sorted((number, -share, how, place, name) for (number, place), (share, how, name) in best.items())
    ordered.sort(key=lambda item: (item[0], -item[1], item[2], item[3]))
    return [(row, share, HOWS[how], benchmarks[place].name, name) for row, share, how, place, name in ordered], hits


def _naive_evidence(benchmarks: Sequence[Benchmark], question: BenchmarkQuestion) -> dict[int, tuple[bytes, ...]]:
    least, most = BOUNDS["min_ngram"], BOUNDS["max_ngram"]
    different = {(joined_tokens(q.question), frozenset(q.images)) for b in benchmarks for q in b.questions}
    counts = Counter(gram for text, _ in different for gram in set(_grams(text.lower().split(), least)))
    words = joined_tokens(question.question).lower().split()
    frequent: set[int] = set()
    for start, gram in enumerate(_grams(words, least)):
        if counts[gram] > BOUNDS["max_benchmark_questions"]:
            frequent.update(range(start, start + least))
    if len(words) < least:
        return {}
    size = min(len(words), most)
    return {
        start: gram
        for start, gram in enumerate(_grams(words, size))
        if size - len(frequent & set(range(start, start + size))) >= least
    }


def _naive_matches(
    text: str, names: tuple[str, ...], question: BenchmarkQuestion, grams: dict[int, tuple[bytes, ...]]
) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    row, words, tested = joined_tokens(text), joined_tokens(text).lower().split(), joined_tokens(question.question)
    shares_image = bool(set(names) & set(question.images))
    if shares_image:
        found.append((1.0, "image"))
    covered: set[int] = set()
    for start, gram in grams.items():
        if gram in _grams(words, len(gram)):
            covered.update(range(start, start + len(gram)))
    if covered:
        found.append((len(covered) / len(tested.split()), "ngram"))
    if not grams and row and row == tested and (shares_image or not (names or question.images)):
        found.append((1.0, "exact"))
    return found


def _grams(words: list[bytes], size: int) -> list[tuple[bytes, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


@settings(deadline=None, max_examples=200)
@given(BENCHMARKS, ROWS)
def test_the_matches_are_those_of_sets_and_loops(benchmarks: list[Benchmark], rows: list[Row]) -> None:
    found = find(BenchmarkIndex.build(benchmarks, **BOUNDS), rows)  # type: ignore[arg-type]
    expected, hits = naive(benchmarks, rows)
    assert [(item.row, item.share, item.how, item.benchmark, item.question) for item in found.matches] == expected
    names = [(b.name, q.id) for b in benchmarks for q in sorted(b.questions, key=lambda q: q.id)]
    assert {name for name, hit in zip(names, found.hit_questions, strict=True) if hit} == hits


@settings(deadline=None)
@given(BENCHMARKS, ROWS, st.randoms(use_true_random=False), st.integers(0, 8), st.integers(1, 3))
def test_order_shards_and_threads_change_nothing(
    benchmarks: list[Benchmark], rows: list[Row], random: object, cut: int, num_threads: int
) -> None:
    index = BenchmarkIndex.build(benchmarks, **BOUNDS)  # type: ignore[arg-type]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    whole = [(item.row, replace(item, row=0, origin="")) for item in find(index, rows).matches]
    shards = [order[:cut], order[cut:]]
    parts = [find(index, [rows[number] for number in shard], num_threads=num_threads) for shard in shards]
    joined = [
        (shard[item.row], replace(item, row=0, origin=""))
        for shard, part in zip(shards, parts, strict=True)
        for item in part.matches
    ]
    assert sorted(joined, key=lambda pair: pair[0]) == whole


@settings(deadline=None)
@given(BENCHMARKS, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_changes_nothing(benchmarks: list[Benchmark], random: object) -> None:
    rows = [(q.question, q.images) for b in benchmarks for q in b.questions]
    shuffled = [Benchmark(b.name, list(b.questions)) for b in benchmarks]
    for tested in shuffled:
        random.shuffle(tested.questions)  # type: ignore[attr-defined]
    one, other = (find(BenchmarkIndex.build(each, **BOUNDS), rows) for each in (benchmarks, shuffled))  # type: ignore[arg-type]
    assert one.matches == other.matches


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_every_benchmark_question_with_words_finds_itself(texts: list[str]) -> None:
    index = BenchmarkIndex.build([benchmark(*texts)])
    found = find(index, [(text, ()) for text in texts])
    assert {item.row for item in found.rows} == {row for row, text in enumerate(texts) if joined_tokens(text)}
    assert all(item.share == 1.0 for item in found.rows)
