"""The figures of a corpus, counted in its shards themselves: what the report and the card say is what the files hold.

Only the columns needed are read, never the images, and polars streams them: memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import polars as pl

from corpus.storage import storage_errors
from schemas.errors import CorpusError
from schemas.verdicts import Heuristic, Mode

NOT_GIVEN = "(not given)"
"""Stands for a missing topic, kind, answer type or licence."""

PROBABILITY_EDGES = tuple(i / 10 for i in range(11))
TRACE_EDGES = (0, 25, 50, 100, 200, 400, 800, 1600)
"""Edges in words; the last bin is open. They double, as lengths of traces do."""


@dataclass(frozen=True, slots=True)
class ModeCount:
    """Rows of one group by mode."""

    think: int = 0
    direct: int = 0

    @property
    def total(self) -> int:
        return self.think + self.direct

    @property
    def share_think(self) -> float:
        """Share of thinking rows in [0, 1]; 0 for an empty group."""
        return self.think / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class SourceLicence:
    """How many rows of a source state a licence."""

    source: str
    licence: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class TraceLengths:
    """Lengths of the chains of thought in words. bins: rows per bin of `TRACE_EDGES`, the last one open.

    median, p90 (nearest rank) and longest are 0 when there is no trace.
    """

    bins: tuple[int, ...] = (0,) * len(TRACE_EDGES)
    median: int = 0
    p90: int = 0
    longest: int = 0


@dataclass(frozen=True, slots=True)
class CorpusTally:
    """The figures of a corpus.

    by_topic ... by_heuristic: rows by mode for each value that occurs. audit: rows of the audit slice by
    (num_right, num_scored). samples_drawn: rows labelled by the performance heuristic by num_sampled.
    probabilities: rows labelled by the difficulty heuristic by mode, per bin of `PROBABILITY_EDGES`.
    """

    rows: ModeCount = ModeCount()
    by_topic: Mapping[str, ModeCount] = field(default_factory=dict)
    by_source: Mapping[str, ModeCount] = field(default_factory=dict)
    by_kind: Mapping[str, ModeCount] = field(default_factory=dict)
    by_answer_type: Mapping[str, ModeCount] = field(default_factory=dict)
    by_heuristic: Mapping[str, ModeCount] = field(default_factory=dict)
    licences: tuple[SourceLicence, ...] = ()
    num_images: int = 0
    num_text_only: int = 0
    audit: Mapping[tuple[int, int], int] = field(default_factory=dict)
    samples_drawn: Mapping[int, int] = field(default_factory=dict)
    probabilities: tuple[ModeCount, ...] = (ModeCount(),) * (len(PROBABILITY_EDGES) - 1)
    traces: TraceLengths = TraceLengths()


def corpus_shards(version_folder: str | Path) -> list[Path]:
    """Returns the shards of a version, finished or being built, in order of path."""
    return sorted((Path(version_folder) / "data").glob("*/*.parquet"))


def tally_corpus(version_folder: str | Path) -> CorpusTally:
    """Returns the figures of all shards in a version's folder, whether it is finished or still being built.

    Raises CorpusError: a shard is no corpus shard. StorageError: it cannot be read.
    """
    folder = Path(version_folder)
    shards = corpus_shards(folder)
    if not shards:
        return CorpusTally()
    rows = pl.scan_parquet(shards).select(_needed_columns())
    groups = ["topic", "source", "kind", "answer_type", "heuristic"]
    queries = [
        *(_count_by(rows, [column]) for column in groups),
        rows.group_by(pl.col("source"), pl.col("licence").fill_null(NOT_GIVEN)).len(),
        rows.select(pl.col("num_images").sum(), (pl.col("num_images") == 0).sum().alias("num_text_only")),
        rows.filter(pl.col("is_audit") & (pl.col("heuristic") == str(Heuristic.PERFORMANCE)))
        .group_by("num_right", "num_scored")
        .len(),
        rows.filter(pl.col("heuristic") == str(Heuristic.PERFORMANCE)).group_by("num_sampled").len(),
        _count_by(rows.filter(pl.col("probability").is_not_null()), ["probability_bin"]),
        rows.filter(pl.col("mode") == str(Mode.THINK)).group_by("words").len().sort("words"),
    ]
    try:
        with storage_errors(folder, "count the rows in"):
            frames = pl.collect_all(queries, engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise CorpusError(f"the shards in {folder} cannot be counted: {error}") from error
    topics, sources, kinds, answer_types, heuristics, licences, images, audit, drawn, probabilities, words = frames
    by_topic, bins = _mode_counts(topics), _mode_counts(probabilities)
    return CorpusTally(
        rows=ModeCount(sum(c.think for c in by_topic.values()), sum(c.direct for c in by_topic.values())),
        by_topic=by_topic,
        by_source=_mode_counts(sources),
        by_kind=_mode_counts(kinds),
        by_answer_type=_mode_counts(answer_types),
        by_heuristic=_mode_counts(heuristics),
        licences=tuple(SourceLicence(*row) for row in sorted(licences.iter_rows())),
        num_images=int(images["num_images"][0]),
        num_text_only=int(images["num_text_only"][0]),
        audit={(right, scored): n for right, scored, n in sorted(audit.iter_rows())},
        samples_drawn=dict(sorted(drawn.iter_rows())),
        probabilities=tuple(bins.get(str(i), ModeCount()) for i in range(len(PROBABILITY_EDGES) - 1)),
        traces=trace_lengths(list(words.iter_rows())),
    )


def trace_lengths(rows_by_words: Sequence[tuple[int, int]]) -> TraceLengths:
    """Returns the distribution of lengths from pairs (words, rows), sorted by words."""
    bins = [0] * len(TRACE_EDGES)
    for words, num_rows in rows_by_words:
        bins[max(i for i, edge in enumerate(TRACE_EDGES) if words >= edge)] += num_rows
    longest = rows_by_words[-1][0] if rows_by_words else 0
    return TraceLengths(tuple(bins), _quantile(rows_by_words, 0.5), _quantile(rows_by_words, 0.9), longest)


def bin_labels(edges: Sequence[float], *, is_last_open: bool) -> list[str]:
    """Returns "0 to 25" for each bin, and "1600 and more" for an open last one."""
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [*labels, f"{edges[-1]:g} and more"] if is_last_open else labels


def _needed_columns() -> list[pl.Expr | str]:
    parts = pl.col("prompt").list.first().struct.field("content")
    num_bins = len(PROBABILITY_EDGES) - 1
    # Probabilities are stored as float32: without the small term 0.7 (0.69999999) would fall into the bin below.
    probability_bin = (pl.col("probability").cast(pl.Float64) * num_bins + 1e-6).floor().clip(0, num_bins - 1)
    return [
        "mode",
        "source",
        "heuristic",
        "licence",
        "is_audit",
        "num_right",
        "num_scored",
        "num_sampled",
        "probability",
        *(pl.col(column).fill_null(NOT_GIVEN) for column in ("topic", "kind", "answer_type")),
        (parts.list.len() - 1).cast(pl.Int64).alias("num_images"),
        probability_bin.cast(pl.Int64).alias("probability_bin"),
        pl.col("reasoning").str.count_matches(r"\S+").cast(pl.Int64).alias("words"),
    ]


def _count_by(rows: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    is_think = pl.col("mode") == str(Mode.THINK)
    return rows.group_by(columns).agg(is_think.sum().alias("think"), (~is_think).sum().alias("direct"))


def _mode_counts(frame: pl.DataFrame) -> dict[str, ModeCount]:
    counts = {str(value): ModeCount(think, direct) for value, think, direct in frame.iter_rows()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1].total, item[0])))


def _quantile(rows_by_words: Sequence[tuple[int, int]], share: float) -> int:
    """Returns the nearest-rank quantile of the lengths."""
    total = sum(num_rows for _, num_rows in rows_by_words)
    seen = 0
    for words, num_rows in rows_by_words:
        seen += num_rows
        if seen >= share * total:
            return words
    return 0
