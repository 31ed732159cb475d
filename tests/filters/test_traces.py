"""Checks of one chain of thought, and duplicates among several."""

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.duplicates import find_duplicates
from filters.feature_files import FeatureTable
from filters.normalise import num_unspaced, spaced_words
from filters.traces import repeated_share, trace_features, trace_problem, trace_settings
from schemas.config import ReasoningConfig
from schemas.errors import ConfigError

CONFIG = ReasoningConfig()
GOOD = "The first row holds 3, 4 and 5. Adding them gives 3 + 4 = 7 and 7 + 5 = 12, so the sum is 12."


def reason(reasoning: str, answer: str = "12", *, is_truncated: bool = False, question: str = "") -> str | None:
    problem = trace_problem(reasoning, answer, is_truncated=is_truncated, config=CONFIG, question=question)
    return problem.reason if problem else None


def test_a_good_trace_has_no_problem() -> None:
    assert reason(GOOD) is None


@pytest.mark.parametrize("nothing", ["", "  \n", "\u200b\ufeff"])
def test_a_missing_part_is_named(nothing: str) -> None:
    assert reason(nothing) == "trace_missing"
    assert reason(nothing, "") == "trace_missing"
    assert reason(GOOD, nothing) == "answer_missing"


def test_truncation_comes_before_its_symptoms() -> None:
    assert reason("", "", is_truncated=True) == "trace_truncated"
    assert reason(GOOD, is_truncated=True) == "trace_truncated"


@pytest.mark.parametrize("tag", ["<think>", "</think>", "</THINK>"])
def test_a_think_tag_in_either_part_is_a_problem(tag: str) -> None:
    assert reason(f"{GOOD} {tag}") == "trace_tagged"
    assert reason(GOOD, f"{tag}12") == "trace_tagged"


def test_the_bounds_on_length_belong_to_what_is_allowed() -> None:
    config = ReasoningConfig(min_words=5, max_words=6)
    reasons = []
    for num_words in (4, 5, 6, 7):
        problem = trace_problem(" ".join("abcdefg"[:num_words]), "1", is_truncated=False, config=config)
        reasons.append(problem and problem.reason)
    assert reasons == ["trace_too_short", None, None, "trace_too_long"]
    problem = trace_problem("one two three", "1", is_truncated=False, config=config)
    assert problem is not None and problem.detail == "3 words, fewer than 5"


def test_characters_of_unspaced_scripts_count_as_words() -> None:
    assert reason("第一行的和是十二", "12") is None
    assert reason("十二", "12") == "trace_too_short"


def test_the_share_of_repeated_grams_counts_the_repetition_alone() -> None:
    words = [f"w{i}" for i in range(20)]
    assert repeated_share(" ".join(words)) == 0
    assert repeated_share(" ".join(words + words)) == 0.5
    assert repeated_share(" ".join(words + words[:8])) == 8 / 28
    assert repeated_share(" ".join(words + words[:7])) == 0
    assert repeated_share(" ".join(words + words[:8] + words[4:14])) == 18 / 38


def shares_by_definition(text: str) -> tuple[float, float, float]:
    """Returns what `repeated_share` is the largest of, each looked for everywhere."""
    words = [word.casefold() for word in spaced_words(text)]
    size = 16 if 2 * num_unspaced(words) > len(words) else 8
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    covered = {start + i for start, gram in enumerate(grams) if gram in grams[:start] for i in range(size)}
    runs = [list(run) for _, run in groupby(words)]
    spelled = [run for run in runs if len(run) >= 4 and len(run[0]) > 1 and any(map(str.isalpha, run[0]))]
    packed = "".join(text.split())
    units = [match[0] for match in re.finditer(r"(.{1,8}?)\1{7,}", packed, re.DOTALL)]
    held = [unit for unit in units if len(unit) > 200 or not set(unit) <= set("-=_|+~*#.:")]
    num_words, num_characters = max(1, len(words)), max(1, len(packed))
    return len(covered) / num_words, sum(map(len, spelled)) / num_words, sum(map(len, held)) / num_characters


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "ab",
                    "a",
                    "no ",
                    "so it is ",
                    "7 ",
                    "-",
                    " ",
                    "三角形",
                    "三",
                    "😀 ",
                    "abcdefgh",
                    "abcdefghi",
                    "\ud800",
                ]
            ),
            st.integers(1, 9),
        ),
        max_size=8,
    )
)
def test_the_repeated_share_is_what_its_definition_says(pieces: list[tuple[str, int]]) -> None:
    text = "".join(piece * times for piece, times in pieces)
    assert repeated_share(text) == pytest.approx(max(shares_by_definition(text)))


def test_the_boundary_of_repetition_belongs_to_what_is_allowed() -> None:
    words = [f"w{i}" for i in range(24)]
    text = " ".join(words + words[:8])  # a quarter
    for limit, expected in ((0.25, None), (0.2499, "trace_repetitive")):
        config = ReasoningConfig(max_repeated_share=limit)
        problem = trace_problem(text, "1", is_truncated=False, config=config)
        assert (problem and problem.reason) == expected


@pytest.mark.parametrize(
    "loop",
    [
        "a" * 100,
        "so the answer is hahahahahahahahahahahahahahahahahaha",
        "wait wait wait wait wait wait",
        "Let me check. " * 30,
        "the sum is 12 and " * 10,
        "7 " * 100,
        "!" * 1000,
        "-" * 1000,
        "三角形的面积等于底乘以高的一半所以" * 5,
        "😀" * 50,
        "ฮา" * 50,
        f"{GOOD} {GOOD}",
    ],
)
def test_loops_are_repetitive(loop: str) -> None:
    assert reason(loop) == "trace_repetitive"


@pytest.mark.parametrize(
    "honest",
    [
        "Row 1: 1 1 1 1 0. Row 2: 0 0 1 0 1. So there are six ones and four zeros.",
        "| colour | count |\n|--------|-------|\n| red | 3 |\n| blue | 4 |\nThe total is 7.",
        "三角形的面积等于底乘以高的一半。底是六，高是四，所以三角形的面积等于十二。",
        "First x^2 + 5x + 6 = 0, hence (x + 2)(x + 3) = 0, hence x = -2 or x = -3, and the larger one is -2.",
        "It costs 100000000 dollars, that is one hundred million, as the sign says.",
        "No no, that is wrong: the answer has to be even, so it is 4.",
    ],
)
def test_honest_traces_are_not_repetitive(honest: str) -> None:
    assert reason(honest) is None


@pytest.mark.parametrize(
    "phrase",
    [
        "As an AI language model, I do not have eyes.",
        "As an AI, my view is limited.",
        "I'm just an AI assistant" + " and so on; I am an AI language model.",
        "Well, I cannot see the image.",
        "I\u2019m unable to; I can\u2019t view any images here.",
        "I am not able to directly analyze the provided image.",
        "There was no picture provided with the question.",
        "The image isn't attached.",
        "I'm sorry, but I can't do that.",
        "The reference answer is 12.",
        "However, the given answer is 12, so we adjust.",
        "According to the provided\nsolution, it is 12.",
        "This matches the expected answer.",
        "The ground truth is 12.",
        "We want to reach the ground-truth answer.",
        "I was told the correct answer, it is 12.",
        "I know the answer should be 12.",
        "The system prompt forbids it.",
        "参考答案是十二。",
        "作为一个AI语言模型，",
        "Done.<|im_end|>",
        "Done.<｜end▁of▁sentence｜>",
        "In <image> there are dogs.",
        "See <image 1> there.",
        "[INST] add [/INST]",
        "<<SYS>> hi",
        "so 12</s>",
        "Fine.\n### Response: 12",
        "<answer>12</answer>",
        "broken \ufffd char",
        "broken \ud83d half",
        "\x0crac{1}{2} of it",
        "esc \x1b[0m",
        "caf\u00c3\u00a9",
        "it\u00e2\u20ac\u2122s",
        "3 \u00c3\u2014 4",
        "5 \u00c2\u00b0C",
    ],
)
def test_forbidden_phrases_are_found(phrase: str) -> None:
    assert reason(f"{GOOD} {phrase}" if not phrase.startswith("#") else f"{GOOD}\n{phrase}") == "trace_forbidden"


@pytest.mark.parametrize(
    "phrase",
    [
        "As an AI researcher would say, that is fine.",
        "The given answer choices are A, B and C.",
        "None of the given answers fits but the second.",
        "The ground truth curve lies above the prediction.",
        "The ground truth is shown in blue.",
        "The given solution contains 3 g of salt.",
        "According to the given solution's concentration it is 5 %.",
        "I cannot see a pattern yet, so I look again.",
        "We cannot see the back of the cube.",
        "No image of a dog is larger.",
        "The correct answer is B.",
        "The expected value is 3.",
        "The user asks for the sum.",
        "If a < b and c > d then <b> is bold.",
        "|x| < 3 and <|x|> is the mean of |x|.",
        "S\u00c3O PAULO and H\u00c2TIF are names.",
        "The table has a tab:\tdone.\r\n",
        "Emoji 👨\u200d👩 and عربي are fine.",
    ],
)
def test_honest_phrases_pass(phrase: str) -> None:
    assert reason(f"{GOOD} {phrase}") is None


def test_a_phrase_of_the_question_is_no_leak_but_a_control_token_always_is() -> None:
    trace = f"{GOOD} The reference answer differs from what the student wrote."
    question = "Does the reference  answer agree with the student's?"
    assert reason(trace) == "trace_forbidden"
    assert reason(trace, question=question) is None
    assert reason(f"{GOOD} <image>", question="<image> What?") == "trace_forbidden"


def test_the_answer_may_quote_but_neither_refuse_nor_be_damaged() -> None:
    assert reason(GOOD, "the ground truth") is None
    for answer in ("I cannot see the image.", "12<|im_end|>", "\ufffd"):
        assert reason(GOOD, answer) == "trace_forbidden"


def test_forbidden_patterns_of_the_user_ignore_case() -> None:
    config = ReasoningConfig(forbidden=[r"THE SUM\b", "q{3}"])
    problem = trace_problem(GOOD, "12", is_truncated=False, config=config)
    assert problem is not None and problem.reason == "trace_forbidden" and "'the sum'" in problem.detail


def test_a_broken_pattern_of_the_user_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"reasoning\.forbidden: '\(' is not a regular expression"):
        trace_problem(GOOD, "12", is_truncated=False, config=ReasoningConfig(forbidden=["("]))


def test_an_open_control_token_takes_linear_time() -> None:
    start = time.process_time()
    assert reason("<|" + "a_" * 200_000) == "trace_repetitive"
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "ab ",
        "i can't ",
        "please provide ",
        "</s> ",
        "<|a_",
        "<|" + "a_" * 20,
        "三",
        "abcdefgh",
        "\u0301",
        "ground truth line ",
        " ",
    ],
)
def test_a_huge_trace_takes_linear_time(unit: str) -> None:
    def seconds(times: int) -> float:
        start = time.process_time()
        trace_problem(unit * times + "end", "1", is_truncated=False, config=CONFIG)
        return time.process_time() - start

    seconds(100)
    assert seconds(10_000) < 20 * max(seconds(1_000), 0.01)


STEPS = (
    "To find the total we look at the table first, then we read the cells one after another from the upper corner, "
    "and finally we put the figures together: 3 + 4 = 7, which settles the matter for good"
)


@dataclass(frozen=True)
class Trace:
    id: str
    question: str
    reasoning: str


@dataclass(frozen=True)
class Found:
    id: str
    resembles: str
    similarity: float


def find(traces: Sequence[Trace], threshold: float, published: Sequence[int] = ()) -> list[Found]:
    ids = [trace.id.encode().ljust(16, b"\0").hex() for trace in traces]
    columns = {"id": ids, **{name: [getattr(trace, name) for trace in traces] for name in ("question", "reasoning")}}
    table = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
    marked = trace_features(table, threshold).published(np.array(published, np.int64))
    features = FeatureTable([marked.to_table()])
    names = [trace.id for trace in traces]
    found = find_duplicates(features, trace_settings(threshold), origins=lambda rows: [names[row] for row in rows])
    return [
        Found(names[row], names[kept], float(similarity))
        for row, kept, similarity in zip(found.rows, found.resembles, found.similarity, strict=True)
    ]


def removed(*traces: tuple[str, str], threshold: float = 0.9) -> list[tuple[str, str]]:
    """Returns (id, resembles) for traces given as (question, reasoning), named a, b, c, ..."""
    named = [Trace("abcdefgh"[place], *trace) for place, trace in enumerate(traces)]
    return [(item.id, item.resembles) for item in find(named, threshold)]


def test_equal_and_nearly_equal_traces_of_other_rows_are_duplicates() -> None:
    texts = ("q", STEPS), ("r", STEPS.upper() + "!"), ("s", "Well, " + STEPS)
    assert removed(*texts, threshold=0.8) == [("b", "a"), ("c", "a")]
    assert removed(*texts, threshold=0.9) == [("b", "a")]  # a word before n others: n / (n + 9), and n is 40


def test_a_published_trace_stays_whatever_comes() -> None:
    traces = [Trace("abc"[place], "q", STEPS) for place in range(3)]
    assert [(item.id, item.resembles) for item in find(traces, 0.9, published=[1])] == [("a", "b"), ("c", "b")]


@pytest.mark.parametrize(("old", "new"), [("3 + 4", "2 + 5"), ("3 + 4", "4 + 3"), ("upper", "left"), ("+", "*")])
def test_other_numbers_or_directions_make_another_trace(old: str, new: str) -> None:
    assert removed(("q", STEPS), ("q", STEPS.replace(old, new)), threshold=0.2) == []


def test_short_traces_are_never_compared() -> None:
    words = [f"w{letter}" for letter in "bcdefghijklmnopqrstuv"]
    assert removed(("q", " ".join(words[:19])), ("r", " ".join(words[:19]))) == []
    assert removed(("q", " ".join(words[:20])), ("r", " ".join(words[:20]))) == [("b", "a")]


def test_what_a_trace_copies_from_its_question_does_not_make_it_a_duplicate() -> None:
    question = " ".join(f"word{letter}{other}" for letter in "bcdefgh" for other in "klmnopq")
    ends = [" ".join(f"{kind}{letter}" for letter in "bcdefghijklmnopqrstuvwx") for kind in ("sea", "land")]
    traces = [(question, f"{question} {question} {end}") for end in ends]
    assert removed(*traces, threshold=0.3) == []
    assert removed(*[("other", reasoning) for _, reasoning in traces], threshold=0.3) == [("b", "a")]


def test_a_chain_of_traces_never_removes_its_end() -> None:
    words = [f"word{letter}{other}" for letter in "abcdefghij" for other in "klmnopqrst"]
    chain = [words, [*words[:50], "extra", *words[50:]], [*words[:25], "more", *words[25:50], "extra", *words[50:]]]
    texts = [("q", " ".join(text)) for text in chain]
    # inserting a word breaks four of 104 shingles and adds five: 100 / 109 = 0.917, twice 96 / 114 = 0.842
    assert removed(*texts) == [("b", "a")]


TEXTS = st.one_of(
    st.sampled_from(["", "short", "é" * 50, "三" * 30, "😀 " * 25]),
    st.builds(
        lambda left_out, number: " ".join(w for i, w in enumerate(STEPS.split()) if i not in left_out) + f" {number}",
        st.sets(st.integers(0, 40), max_size=3),
        st.integers(1, 2),
    ),
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["q", STEPS]), TEXTS), max_size=10),
    st.randoms(use_true_random=False),
    st.sampled_from([0.5, 0.9, 1.0]),
)
def test_the_laws_of_duplicate_traces(texts: list[tuple[str, str]], shuffler: random.Random, threshold: float) -> None:
    traces = [Trace(f"{place:02}", *text) for place, text in enumerate(texts)]
    found = find(traces, threshold)
    shuffled = list(traces)
    shuffler.shuffle(shuffled)
    assert sorted(find(shuffled, threshold), key=repr) == sorted(found, key=repr)
    gone = {item.id for item in found}
    assert len(gone) == len(found)
    assert find([trace for trace in traces if trace.id not in gone], threshold) == []
    for item in found:
        assert item.resembles not in gone and item.resembles < item.id
        assert threshold <= item.similarity <= 1
