from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sampleworld.experiment import (
    FULL,
    SMOKE,
    UNSEEN_FAMILY,
    annealing_arms,
    corpus_rows,
    family_shares,
    test_questions,
    write_bpo_prompts,
    write_corpus,
)
from sampleworld.world import GLANCE, STEPS
from schemas.template import parse_completion

test_questions.__test__ = False  # type: ignore[attr-defined]
pytestmark = pytest.mark.filterwarnings("default")


def test_the_mode_of_a_row_says_nothing_about_its_family() -> None:
    rows = [row for row, _ in itertools.islice(corpus_rows(FULL, 0), 12_000)]
    num, thinking = Counter[str](), Counter[str]()
    for row in rows:
        num[row.task.family] += 1
        thinking[row.task.family] += bool(parse_completion(row.completion).reasoning)
    for family in num:  # four standard errors of a share of a third among 1,600 rows
        assert thinking[family] / num[family] == pytest.approx(FULL.reasoning_share, abs=0.05)


def test_the_corpus_holds_every_family_and_bpo_never_asks_the_unseen_one(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.parquet", SMOKE, 0)
    write_bpo_prompts(tmp_path / "prompts.parquet", SMOKE, 0)
    corpus, prompts = (pq.read_table(tmp_path / f"{name}.parquet")["source"] for name in ("corpus", "prompts"))
    assert set(corpus.to_pylist()) == {*GLANCE, *STEPS}
    assert set(prompts.to_pylist()) == {*GLANCE, *STEPS} - {UNSEEN_FAMILY}


def test_the_shares_of_the_families_are_whole() -> None:
    assert sum(family_shares().values()) == pytest.approx(1)
    assert sum(family_shares(without=(UNSEEN_FAMILY,)).values()) == pytest.approx(1)


def test_the_corpus_of_a_seed_is_the_same_every_time_and_another_seeds_is_another(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        write_corpus(tmp_path / name, SMOKE, seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_training_bpo_and_test_questions_share_no_image(tmp_path: Path) -> None:
    write_bpo_prompts(tmp_path / "prompts.parquet", SMOKE, 0)
    trained = {image for _, image in itertools.islice(corpus_rows(FULL, 0), 4000)}
    asked = {row[0]["bytes"] for row in pq.read_table(tmp_path / "prompts.parquet")["images"].to_pylist()}
    tested = {question.load_images()[0].tobytes() for question in test_questions(20)}
    assert not trained & asked
    from io import BytesIO

    from PIL import Image

    assert not tested & {Image.open(BytesIO(image)).tobytes() for image in trained | asked}


def test_every_family_is_tested_alike() -> None:
    families = Counter(question.sample.source for question in test_questions(7))
    assert set(families) == {*GLANCE, *STEPS}
    assert set(families.values()) == {7}


def test_arms_are_matched_by_passes_or_by_steps() -> None:
    arms = annealing_arms(FULL)
    assert arms["reasoning_only"].share_of_steps == FULL.reasoning_share
    assert {arm.share_of_steps for name, arm in arms.items() if name != "reasoning_only"} == {1.0}
