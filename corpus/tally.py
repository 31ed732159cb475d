"""The figures of a corpus, counted in its shards themselves: what the report and the card say is what the files hold.

Only the columns needed are read, never the images, and polars streams them: memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from corpus.storage import storage_errors
from schemas.errors import CorpusError
from schemas.verdicts import Heuristic, Mode

NOT_GIVEN = "(not given)"
"""Stands for a missing topic, kind, answer type or licence."""

PROBABILITY_EDGES = tuple(i / 10 for i in range(11))
SIMILARITY_EDGES = tuple(i / 20 for i in range(21))
TRACE_EDGES = (0, 25, 50, 100, 200, 400, 800, 1600)
"""Edges in words; the last bin is open. They double, as lengths of traces do."""


_SHARDS_AT_ONCE = 32
_CELL = [
    *("mode", "source", "topic", "kind", "answer_type", "licence", "heuristic"),
    *("is_audit", "num_right", "num_scored", "num_sampled", "probability_bin"),
]
"""What rows are told apart by. So many different rows are kept in memory, however many there are of each."""


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


@dataclass(frozen=True, slots=True)
class SimilarityCount:
    """How alike the rows that left for one reason are to what they resemble.

    num_rows: those with a similarity. num_equal: of them, those of similarity 1. bins: rows per bin of
    `SIMILARITY_EDGES`; 1 is in the last one.
    """

    stage: str
    reason: str
    num_rows: int
    num_equal: int
    bins: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FatesTally:
    """The figures of the rows that left. by_source: rows by (source, exit). similarities: in order of stage, reason."""

    by_source: Mapping[tuple[str, str], int] = field(default_factory=dict)
    similarities: tuple[SimilarityCount, ...] = ()


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
    cells, words = _count_shards(folder, shards)
    by_topic, bins = _mode_counts(cells, "topic"), _mode_counts(cells, "probability_bin")
    tried = cells.filter(pl.col("heuristic") == str(Heuristic.PERFORMANCE))
    images = cells.select(pl.col("num_images").sum(), pl.col("text_only").sum())
    return CorpusTally(
        rows=ModeCount(sum(c.think for c in by_topic.values()), sum(c.direct for c in by_topic.values())),
        by_topic=by_topic,
        by_source=_mode_counts(cells, "source"),
        by_kind=_mode_counts(cells, "kind"),
        by_answer_type=_mode_counts(cells, "answer_type"),
        by_heuristic=_mode_counts(cells, "heuristic"),
        licences=tuple(SourceLicence(*row) for row in _summed(cells, "source", "licence")),
        num_images=int(images["num_images"][0]),
        num_text_only=int(images["text_only"][0]),
        audit={(right, of): n for right, of, n in _summed(tried.filter("is_audit"), "num_right", "num_scored")},
        samples_drawn=dict(_summed(tried, "num_sampled")),
        probabilities=tuple(bins.get(str(i), ModeCount()) for i in range(len(PROBABILITY_EDGES) - 1)),
        traces=trace_lengths(_summed(words, "words")),
    )


def _count_shards(folder: Path, shards: Sequence[Path]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Returns the rows counted by all that they are told apart by, and thinking rows by the words of their traces.

    A few shards at a time: what polars maps and keeps of them is let go before the next ones.
    """
    cells, words = pl.DataFrame(), pl.DataFrame()
    for start in range(0, len(shards), _SHARDS_AT_ONCE):
        scanned = pl.scan_parquet(list(shards[start : start + _SHARDS_AT_ONCE]), glob=False, hive_partitioning=False)
        rows = scanned.select(_needed_columns())
        thinking = rows.filter(pl.col("mode") == str(Mode.THINK))
        sums = [
            pl.len().alias("rows"),
            pl.col("num_images").sum(),
            (pl.col("num_images") == 0).sum().alias("text_only"),
        ]
        queries = [rows.group_by(_CELL).agg(sums), thinking.group_by("words").agg(pl.len().alias("rows"))]
        try:
            with storage_errors(folder, "count the rows in"):
                new_cells, new_words = pl.collect_all(queries, engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise CorpusError(f"the shards in {folder} cannot be counted: {error}") from error
        cells = pl.concat([cells, new_cells]).group_by(_CELL).sum() if cells.width else new_cells
        words = pl.concat([words, new_words]).group_by("words").sum() if words.width else new_words
    return cells, words


def tally_fates(fates_path: str | Path) -> FatesTally:
    """Returns the figures of the rows that left a run.

    Raises CorpusError: the file holds no fates. StorageError: it cannot be read.
    """
    rows = pl.scan_parquet(fates_path)
    alike = rows.filter(pl.col("similarity").is_not_null()).with_columns(
        bin=_bin(pl.col("similarity"), len(SIMILARITY_EDGES) - 1), is_equal=pl.col("similarity") >= 1
    )
    queries = [
        rows.group_by("source", "exit").len().sort("source", "exit"),
        alike.group_by("stage", "reason", "bin").agg(pl.len(), pl.col("is_equal").sum()).sort("stage", "reason"),
    ]
    try:
        with storage_errors(Path(fates_path), "count the rows in"):
            by_source, bins = pl.collect_all(queries, engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise CorpusError(f"the rows that left cannot be counted in {fates_path}: {error}") from error
    similarities = []
    for (stage, reason), group in bins.group_by("stage", "reason", maintain_order=True):
        by_bin = dict(group.select("bin", "len").iter_rows())
        numbers = tuple(int(by_bin.get(i, 0)) for i in range(len(SIMILARITY_EDGES) - 1))
        similarities.append(
            SimilarityCount(str(stage), str(reason), sum(numbers), int(group["is_equal"].sum()), numbers)
        )
    return FatesTally({(source, exit_): n for source, exit_, n in by_source.iter_rows()}, tuple(similarities))


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
    return [
        "mode",
        "source",
        "heuristic",
        "is_audit",
        "num_right",
        "num_scored",
        "num_sampled",
        *(pl.col(column).fill_null(NOT_GIVEN) for column in ("topic", "kind", "answer_type", "licence")),
        (parts.list.len() - 1).cast(pl.Int64).alias("num_images"),
        _bin(pl.col("probability"), len(PROBABILITY_EDGES) - 1).alias("probability_bin"),
        pl.col("reasoning").str.count_matches(r"\S+").cast(pl.Int64).alias("words"),
    ]


def _bin(share: pl.Expr, num_bins: int) -> pl.Expr:
    """Returns the number of the bin in which a share in [0, 1] lies; 1 lies in the last one."""
    # Shares are stored as float32: without the small term 0.7 (0.69999999) would fall into the bin below.
    return (share.cast(pl.Float64) * num_bins + 1e-6).floor().clip(0, num_bins - 1).cast(pl.Int64)


def _mode_counts(cells: pl.DataFrame, column: str) -> dict[str, ModeCount]:
    """Returns the rows of each value of a column by mode, the most frequent value first."""
    counts: dict[str, ModeCount] = {}
    for value, mode, rows in _summed(cells, column, "mode"):
        before = counts.get(str(value), ModeCount())
        is_think = mode == Mode.THINK
        counts[str(value)] = ModeCount(before.think + rows * is_think, before.direct + rows * (not is_think))
    return dict(sorted(counts.items(), key=lambda item: (-item[1].total, item[0])))


def _summed(cells: pl.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """Returns the rows of each combination of values, in order of these; rows without a value do not count."""
    present = cells.drop_nulls(columns)
    return sorted(present.group_by(columns).agg(pl.col("rows").sum()).iter_rows())


def _quantile(rows_by_words: Sequence[tuple[int, int]], share: float) -> int:
    """Returns the nearest-rank quantile of the lengths."""
    total = sum(num_rows for _, num_rows in rows_by_words)
    seen = 0
    for words, num_rows in rows_by_words:
        seen += num_rows
        if seen >= share * total:
            return words
    return 0
