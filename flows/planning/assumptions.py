"""What a plan assumes, each figure as a range with its source, and how ranges are carried through a calculation.

Multiplying the low ends of twenty assumptions gives a number that nobody will ever see. So every assumption is drawn
many times, the plan is calculated for all draws at once (arrays instead of numbers), and of each result the 5 % and
95 % quantiles are shown. The first entry of every array is no draw but the expected value.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from corpus.report_inputs import PAPER_TABLE_1
from corpus.tally import ModeCount
from schemas.samples import Topic

Values: TypeAlias = NDArray[np.float64]
"""[1 + draws]: the expected value, then the draws."""

NUM_DRAWS = 400
"""The 5 % quantile of so many draws is known to about 1 % in probability: finer than any range assumed here."""

_CHECKABLE_TOPICS = (Topic.MATH, Topic.CODE, Topic.CHART, Topic.OCR, Topic.GROUNDING, Topic.KNOWLEDGE)
_RULED_TOPICS = (Topic.TEXT, Topic.CAPTION, Topic.GROUNDING, Topic.CODE)
"""Those that `judges.routing` tells by rule."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """A figure that is not known exactly. low <= expected <= high; source: where it comes from.

    name: that of the field of `Assumptions` it stands in.
    """

    low: float
    expected: float
    high: float
    unit: str
    source: str
    name: str = ""
    num_draws: int = NUM_DRAWS

    def __post_init__(self) -> None:
        assert 0 <= self.low <= self.expected <= self.high, f"{self.name}: {self.low}, {self.expected}, {self.high}"

    def known(self, value: float, source: str) -> Assumption:
        """Returns it as a known figure."""
        return replace(self, low=value, expected=value, high=value, source=source)

    def drawn(self, seed: int = 0) -> Values:
        """Returns the expected value and the draws.

        Half of the draws lie below the expected value, evenly between low and it, half above. What is drawn depends
        on name and seed, so that one assumption more or less changes no other.
        """
        shares = np.random.default_rng([zlib.crc32(self.name.encode()), seed]).random(self.num_draws)
        draws = np.interp(shares, [0.0, 0.5, 1.0], [self.low, self.expected, self.high])
        return np.concatenate([[self.expected], draws])


@dataclass(frozen=True, slots=True)
class Range:
    """A result: the expected value, and the quantiles between which nine tenths of the draws lie."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, values: Values) -> Range:
        """Returns the range of a result. Few assumptions can all push one way: the expected value is always within."""
        low, high = np.quantile(values[1:], [0.05, 0.95])
        expected = float(values[0])
        return cls(min(float(low), expected), expected, max(float(high), expected))


def _share(topics: tuple[Topic, ...]) -> float:
    return sum(PAPER_TABLE_1[topic].total for topic in topics) / _all_rows().total


def _all_rows() -> ModeCount:
    return ModeCount(
        think=sum(count.think for count in PAPER_TABLE_1.values()),
        direct=sum(count.direct for count in PAPER_TABLE_1.values()),
    )


def _thinking(topics: tuple[Topic, ...]) -> float:
    return sum(PAPER_TABLE_1[topic].think for topic in topics) / sum(PAPER_TABLE_1[topic].total for topic in topics)


_OPEN_TOPICS = tuple(topic for topic in Topic if topic not in _CHECKABLE_TOPICS)
_TABLE_1 = "R-4B (arXiv 2508.21113), Table 1"
_TABLE_4 = "R-4B, Table 4: mean output tokens"
_PUBLISHED = (
    "between what vLLM as it comes was published to reach with Qwen3-32B (docs.gpustack.ai, performance lab: 2,353 "
    "tokens/s in and out on one H100, 1,731 on one A100, ShareGPT) and what well-tuned kernels do"
)
_MACHINE = "on two virtual cores of a shared AMD EPYC server"
_RATES = f"`python -m benchmarks.planning --measure`, {_MACHINE} with other work on it"


@dataclass(frozen=True, slots=True)
class Assumptions:
    """All assumptions of a plan; the defaults are documented by their sources.

    Shares are of the rows that reach the stage, milliseconds are of one core, bytes as stored.
    """

    # --- rows
    quarantined_share: Assumption = Assumption(0.002, 0.01, 0.05, "of rows read", "assumed: one row in a hundred")
    leaked_share: Assumption = Assumption(0.0, 0.001, 0.01, "of rows", "assumed; only where benchmarks are named")
    duplicate_share: Assumption = Assumption(
        0.02, 0.1, 0.3, "of rows", "assumed: the paper is silent; merged public sets overlap by up to a third"
    )
    asks_kind_share: Assumption = Assumption(
        0.0, 0.05, 0.2, "of rows", "assumed: rules tell objective from subjective unless a short answer reads as prose"
    )
    asks_topic_share: Assumption = Assumption(
        0.3,
        1 - _share(_RULED_TOPICS),
        0.9,
        "of rows",
        f"{_TABLE_1}: all topics but text, caption, grounding and code, which rules tell; 0 where sources name topics",
    )
    objective_share: Assumption = Assumption(
        0.4, _share(_CHECKABLE_TOPICS), 0.85, "of rows", f"{_TABLE_1}: the topics whose answers can mostly be checked"
    )
    thinking_objective_share: Assumption = Assumption(
        0.2, _thinking(_CHECKABLE_TOPICS), 0.5, "of objective rows", f"{_TABLE_1}: reasoning rows of those topics"
    )
    thinking_subjective_share: Assumption = Assumption(
        0.15, _thinking(_OPEN_TOPICS), 0.45, "of subjective rows", f"{_TABLE_1}: reasoning rows of the other topics"
    )
    trace_right_share: Assumption = Assumption(
        0.2, 0.5, 0.8, "of tries", "assumed: the row failed eight times; a reasoner that is the teacher is near the low"
    )
    trace_consistent_share: Assumption = Assumption(0.7, 0.9, 0.98, "of tries", "assumed: traces of open-ended rows")
    repeated_trace_share: Assumption = Assumption(0.0, 0.01, 0.05, "of thinking rows", "assumed")
    unanswered_share: Assumption = Assumption(
        0.0, 0.2, 0.6, "of direct subjective rows", "assumed: without a reference, so that the teacher answers"
    )

    # --- tokens
    text_only_share: Assumption = Assumption(0.05, _share((Topic.TEXT,)), 0.3, "of rows", f"{_TABLE_1}: text-only")
    images_per_row: Assumption = Assumption(1.0, 1.05, 1.3, "of a row with any", "assumed: few rows have several")
    image_tokens: Assumption = Assumption(
        390.0, 600.0, 1280.0, "tokens", "Qwen2.5-VL: a token is 28 x 28 pixels; 640 x 480, 800 x 600, and the limit"
    )
    question_tokens: Assumption = Assumption(30.0, 60.0, 150.0, "tokens", "46 words, as in `benchmarks.duplicates`")
    answer_tokens: Assumption = Assumption(
        110.0,
        270.0,
        600.0,
        "tokens",
        f"{_TABLE_4} without thinking on MathVista; low: recorded answers of Gemini Pro to MATH-Vision; high: thinking",
    )
    trace_tokens: Assumption = Assumption(
        530.0, 1136.0, 2500.0, "tokens", f"{_TABLE_4} with thinking: HallusionBench, MathVista; high: assumed"
    )
    direct_tokens: Assumption = Assumption(
        57.0, 166.0, 408.0, "tokens", f"{_TABLE_4} without thinking: least, mean, most"
    )

    # --- GPUs
    prefill_utilisation: Assumption = Assumption(0.25, 0.35, 0.6, "of peak FLOP/s", _PUBLISHED)
    decode_utilisation: Assumption = Assumption(0.28, 0.4, 0.7, "of peak bandwidth", _PUBLISHED)
    busy_share: Assumption = Assumption(
        0.8,
        0.93,
        0.98,
        "of time",
        "0.98 of a bare load generator (`benchmarks.teacher_vllm`), less the tails of stages",
    )

    # --- processors
    read_ms: Assumption = Assumption(1.2, 2.4, 4.0, "ms a row", _RATES)
    picture_ms: Assumption = Assumption(1.0, 2.0, 8.0, "ms an image", f"{_RATES}; 800 x 600 pixels, high: a million")
    pass_ms: Assumption = Assumption(0.005, 0.01, 0.05, "ms a row and stage", _RATES)
    call_ms: Assumption = Assumption(
        0.36,
        1.0,
        2.5,
        "ms a call",
        "2,748 calls/s of one core with images by name (`benchmarks.teacher_client`); "
        "1.0 to 1.6 ms with images as bytes (`benchmarks.planning --measure`)",
    )
    verify_ms: Assumption = Assumption(0.1, 0.25, 0.5, "ms a sample", _RATES)
    publish_ms: Assumption = Assumption(0.8, 1.8, 4.0, "ms a row", _RATES)
    compare_us: Assumption = Assumption(
        5.4, 11.0, 15.0, "us a row", f"16,400,000 rows in 88 to 180 s (`benchmarks.duplicates`), {_MACHINE}"
    )

    prepare_ms: Assumption = Assumption(
        10.0, 20.0, 40.0, "ms an image", "assumed: vLLM decodes and cuts an image into patches on one core per copy"
    )
    task_ms: Assumption = Assumption(
        4.0, 8.0, 20.0, "ms a task run", "Prefect 3.8.8 on SQLite, on a quiet machine and on a busy one (`--measure`)"
    )

    # --- storage and memory
    image_bytes: Assumption = Assumption(
        40e3, 100e3, 300e3, "bytes", "assumed: JPEG of about a bit a pixel; PNG is more"
    )
    distinct_image_share: Assumption = Assumption(
        0.3, 0.7, 1.0, "of images", "assumed: instruction sets ask one image several questions; stored once"
    )
    stage_row_bytes: Assumption = Assumption(
        165.0, 400.0, 1500.0, "bytes a row and stage", f"low: {_RATES}, of short questions; others: longer ones"
    )
    feature_bytes: Assumption = Assumption(
        800.0, 1300.0, 2000.0, "bytes a row", f"{_RATES}: what `duplicates` keeps of each row"
    )
    reply_bytes: Assumption = Assumption(75.0, 170.0, 450.0, "bytes a reply beside its text", _RATES)
    text_bytes: Assumption = Assumption(1.2, 1.6, 3.0, "bytes a token", "assumed: four characters, compressed")
    compared_bytes: Assumption = Assumption(
        200.0, 272.0, 350.0, "bytes of memory a row", "0.9 GiB at 1, 4.8 GiB at 16.4 million (`benchmarks.duplicates`)"
    )
    partitioned_bytes: Assumption = Assumption(
        40.0,
        100.0,
        200.0,
        "bytes of memory a row",
        "assumed, on Ray: ids and fingerprints of images stay with the driver",
    )
    marker_bytes: Assumption = Assumption(
        1000.0, 1300.0, 3000.0, "bytes of memory a shard and stage", "measured: a thousand markers of one purpose each"
    )
    database_bytes: Assumption = Assumption(10e3, 20e3, 40e3, "bytes a task run", _RATES)

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, replace(getattr(self, field.name), name=field.name))

    def __iter__(self) -> Iterator[Assumption]:
        for field in fields(self):
            yield getattr(self, field.name)

    def expected(self) -> Assumptions:
        """Returns the assumptions without draws: a calculation with them gives expected values alone, and quickly."""
        return replace(self, **{each.name: replace(each, num_draws=0) for each in self})

    def known(self, source: str, **values: float) -> Assumptions:
        """Returns the assumptions with some known. values: by name; a name that there is not is our own bug."""
        return replace(self, **{name: getattr(self, name).known(value, source) for name, value in values.items()})
