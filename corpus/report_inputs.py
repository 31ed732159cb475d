"""What a report is made of, and what it is compared with: the paper's table and the version before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corpus.excerpts import ShownFate, ShownPair, ShownReply, ShownRow
from corpus.tally import CorpusTally, FatesTally, ModeCount
from schemas.config import PricesConfig
from schemas.fates import StageCount
from schemas.samples import Topic
from schemas.usage import Ledger

PAPER_TABLE_1: Mapping[Topic, ModeCount] = {
    Topic.GENERAL: ModeCount(think=1_365_693, direct=1_351_060),
    Topic.MATH: ModeCount(think=1_821_412, direct=1_908_486),
    Topic.CODE: ModeCount(think=161_085, direct=643_323),
    Topic.CHART: ModeCount(think=1_088_858, direct=1_351_060),
    Topic.OCR: ModeCount(think=225_146, direct=1_366_849),
    Topic.GROUNDING: ModeCount(think=148_710, direct=280_740),
    Topic.CAPTION: ModeCount(think=133_741, direct=1_166_676),
    Topic.KNOWLEDGE: ModeCount(think=359_778, direct=928_190),
    Topic.TEXT: ModeCount(think=190_787, direct=1_875_174),
}
"""Rows by topic and mode of the R-4B corpus: arXiv 2508.21113v2, Table 1 (reasoning, non-reasoning)."""

TOPIC_NAMES: Mapping[str, str] = {
    Topic.GENERAL: "General",
    Topic.MATH: "Math and K12",
    Topic.CODE: "Code",
    Topic.CHART: "Chart",
    Topic.OCR: "OCR",
    Topic.GROUNDING: "Grounding",
    Topic.CAPTION: "Caption",
    Topic.KNOWLEDGE: "Knowledge",
    Topic.TEXT: "Text-only",
}


@dataclass(frozen=True, slots=True)
class LeakedPair:
    """A row that leaks a benchmark question.

    origin: of the row. question: id in the benchmark. how: ngram, exact or image. share: of the question's words, those
    in shared n-grams. excerpt: the longest run of them. text: the benchmark question itself, if it is known.
    """

    origin: str
    question: str
    how: str
    share: float
    excerpt: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class BenchmarkLeaks:
    """How far a benchmark leaked into the rows read.

    num_leaked_questions: questions of it that some row leaks. num_rows: rows that leak it; a row that leaks two
    benchmarks counts in both. pairs: the worst of them.
    """

    name: str
    num_questions: int
    num_leaked_questions: int
    num_rows: int
    pairs: Sequence[LeakedPair]


@dataclass(frozen=True, slots=True)
class VersionBefore:
    """The version that a report is compared with.

    rows, counts: from its manifest. figures: its `report.json`, which no checksum covers, so nothing in it is relied
    on; None if it cannot be read.
    """

    version: str
    created: str
    recipe: str
    rows: ModeCount
    counts: Mapping[str, StageCount]
    figures: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything a report is made of.

    created: ISO 8601 time. recipe, inputs: digests. stages: the count of each stage, in order; the first one's rows in
    are the rows read. tally: of the shards (`tally_corpus`). num_marked: rows in them that the run no longer has.
    fates_tally: of the rows that left (`tally_fates`). benchmarks: how far each leaked into the rows read, if any were
    given. costs: of every stored reply that the rows asked for, whoever paid. paid: by the run that makes this report.
    rows, fates, pairs: those shown (see `corpus.excerpts`). replies: what the teacher said about them, by sample id.
    leaked_questions: those of the rows in `benchmarks`, by origin.
    audit: rows by (num_right, num_scored) of the whole audit slice, if the caller kept it; by default those of the
    corpus, which miss the rows dropped after labelling.
    before: the version to compare with, None for the first one. agreement: how far judges agree with people or with
    each other, as `agreement["entries"]`, a list of mappings: name, what, num_rows, kappa, low, high, agreement (a
    share), confusion (a list of mappings judge, person, rows), note. missing: sentences that say what could not be
    shown, and why.
    """

    name: str
    version: str
    created: str
    recipe: str
    inputs: str
    teacher: str
    reasoner: str
    stages: Mapping[str, StageCount]
    tally: CorpusTally
    num_marked: int = 0
    fates_tally: FatesTally = field(default_factory=FatesTally)
    costs: Ledger = field(default_factory=dict)
    paid: Ledger = field(default_factory=dict)
    benchmarks: Sequence[BenchmarkLeaks] = ()
    prices: PricesConfig = field(default_factory=PricesConfig)
    rows: Sequence[ShownRow] = ()
    fates: Sequence[ShownFate] = ()
    pairs: Sequence[ShownPair] = ()
    replies: Mapping[str, Sequence[ShownReply]] = field(default_factory=dict)
    leaked_questions: Mapping[str, str] = field(default_factory=dict)
    audit: Mapping[tuple[int, int], int] | None = None
    before: VersionBefore | None = None
    agreement: Mapping[str, Any] | None = None
    missing: Sequence[str] = ()
