"""Figures are counted in the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corpus import tally as tallying
from corpus.tally import (
    NOT_GIVEN,
    CorpusTally,
    ModeCount,
    SourceLicence,
    bin_labels,
    tally_corpus,
    tally_fates,
    trace_lengths,
)
from corpus.writer import write_fates, write_shards
from schemas.errors import CorpusError
from schemas.rows import labelled_table
from schemas.samples import Topic
from schemas.verdicts import Decision, Heuristic, Mode


def tally(world: Any, rows: list[Any], folder: Path) -> CorpusTally:
    write_shards([labelled_table(rows)], folder, shard_rows=2, read_image=world.read_image, recipe="r")
    return tally_corpus(folder)


def test_rows_are_counted_by_mode_in_every_group(world: Any, tmp_path: Path) -> None:
    rows = [
        world.row(1, reasoning="a b c", topic=Topic.CHART, source="x"),
        world.row(2, topic=Topic.CHART, source="x", licence=None),
        world.row(3, topic=None, source="y", colours=()),
        world.row(4, topic=Topic.OCR, source="y", colours=("red", "blue")),
    ]
    counted = tally(world, rows, tmp_path)
    assert counted.rows == ModeCount(think=1, direct=3)
    assert counted.by_topic == {"chart": ModeCount(1, 1), NOT_GIVEN: ModeCount(0, 1), "ocr": ModeCount(0, 1)}
    assert counted.by_source == {"x": ModeCount(1, 1), "y": ModeCount(0, 2)}
    assert counted.by_kind == {"objective": ModeCount(1, 3)}
    assert counted.by_answer_type == {"count": ModeCount(1, 3)}
    assert counted.licences == (
        SourceLicence("x", NOT_GIVEN, 1),
        SourceLicence("x", "MIT", 1),
        SourceLicence("y", "MIT", 2),
    )
    assert (counted.num_images, counted.num_text_only) == (4, 1)
    assert (counted.traces.median, counted.traces.longest, counted.traces.bins[0]) == (3, 3, 1)


def test_only_audited_rows_of_the_performance_heuristic_give_pass_rates(world: Any, tmp_path: Path) -> None:
    performance = Heuristic.PERFORMANCE
    decisions = [
        Decision(Mode.DIRECT, performance, 3, 8, 8, is_audit=True),
        Decision(Mode.DIRECT, performance, 3, 8, 8, is_audit=True),
        Decision(Mode.DIRECT, performance, 1, 6, 8, is_audit=True),
        Decision(Mode.DIRECT, performance, 1, 1, 1),
        Decision(Mode.DIRECT, Heuristic.DIFFICULTY, probability=0.1, is_audit=True),
    ]
    counted = tally(world, [world.row(n, decision=d) for n, d in enumerate(decisions)], tmp_path)
    assert counted.audit == {(1, 6): 1, (3, 8): 2}
    assert counted.samples_drawn == {1: 1, 8: 3}


def test_a_probability_on_an_edge_belongs_to_the_bin_above_and_one_to_the_last(world: Any, tmp_path: Path) -> None:
    probabilities = [0.0, 0.1, 0.3, 0.5, 0.69, 0.7, 0.9999, 1.0]
    rows = [
        world.row(n, decision=Decision(Mode.DIRECT, Heuristic.DIFFICULTY, probability=probability))
        for n, probability in enumerate(probabilities)
    ]
    assert [count.direct for count in tally(world, rows, tmp_path).probabilities] == [1, 1, 0, 1, 0, 1, 1, 1, 0, 2]


def test_trace_lengths_are_binned_with_nearest_rank_quantiles() -> None:
    lengths = trace_lengths([(10, 5), (24, 1), (25, 3), (2000, 1)])
    assert lengths.bins == (6, 3, 0, 0, 0, 0, 0, 1)
    assert (lengths.median, lengths.p90, lengths.longest) == (10, 25, 2000)
    assert trace_lengths([]).longest == 0


def test_shards_counted_one_after_the_other_make_the_same_figures(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        world.row(n, reasoning="a b" if n % 3 else "", topic=list(Topic)[n % 9], source=f"s{n % 2}") for n in range(25)
    ]
    together = tally(world, rows, tmp_path)
    monkeypatch.setattr(tallying, "_SHARDS_AT_ONCE", 2)
    assert tally_corpus(tmp_path) == together
    assert together.rows == ModeCount(16, 9) and len(list((tmp_path / "data").rglob("*.parquet"))) > 8


def test_rows_that_left_are_counted_by_source_and_by_likeness(tmp_path: Path, dropped_fate: Any) -> None:
    likeness = [0.8, 0.849, 0.85, 1.0, 1.0]
    fates = [dropped_fate(n, similarity=share) for n, share in enumerate(likeness)]
    write_fates([*fates, dropped_fate(9, "trace_too_short")], tmp_path / "f.parquet")
    counted = tally_fates(tmp_path / "f.parquet")
    assert counted.by_source == {("tests", "dropped"): 6}
    (near,) = counted.similarities
    assert (near.reason, near.num_rows, near.num_equal) == ("near_duplicate", 5, 2)
    assert near.bins == (*[0] * 16, 2, 1, 0, 2)


def test_a_run_that_no_row_left_has_nothing_to_count(tmp_path: Path) -> None:
    write_fates([], tmp_path / "f.parquet")
    counted = tally_fates(tmp_path / "f.parquet")
    assert (dict(counted.by_source), counted.similarities) == ({}, ())


def test_bins_are_named_by_their_edges() -> None:
    assert bin_labels((0, 25, 1600), is_last_open=True) == ["0 to 25", "25 to 1600", "1600 and more"]
    assert bin_labels((0, 0.1, 0.2), is_last_open=False) == ["0 to 0.1", "0.1 to 0.2"]


def test_a_folder_without_shards_is_an_empty_corpus(tmp_path: Path) -> None:
    assert tally_corpus(tmp_path) == CorpusTally()
    assert tally_corpus(tmp_path).rows.share_think == 0.0


def test_a_file_that_is_no_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data/think").mkdir(parents=True)
    (tmp_path / "data/think/00000.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CorpusError, match="cannot be counted"):
        tally_corpus(tmp_path)
