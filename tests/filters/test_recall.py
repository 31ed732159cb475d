"""Near duplicates against brute force: nothing is removed without a reason, and next to nothing is missed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa

from filters.duplicates import features_of, find_duplicates, shape_of
from filters.feature_files import FeatureTable
from schemas.config import DuplicatesConfig
from schemas.samples import SAMPLE_SCHEMA
from tests.filters.reference import compared, similarity

CONFIG = DuplicatesConfig()
NUM_ORIGINALS, NUM_COPIES, NUM_WORDS = 12_000, 8_000, 46


def questions() -> list[str]:
    """Returns questions of made-up words, of which four in ten are others with one to three words changed."""
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices("bcdfghklmnprstvz", k=rng.randint(4, 8))) for _ in range(5_000)]
    rows = [rng.choices(vocabulary, k=NUM_WORDS) for _ in range(NUM_ORIGINALS)]
    for _ in range(NUM_COPIES):
        words = list(rows[rng.randrange(NUM_ORIGINALS)])
        for _ in range(rng.randint(1, 3)):
            words[rng.randrange(NUM_WORDS)] = rng.choice(vocabulary)
        rows.append(words)
    rng.shuffle(rows)
    return [" ".join(words) for words in rows]


def brute_force(texts: list[str]) -> dict[tuple[int, int], float]:
    """Returns the similarity of every pair of alike texts, found by way of all shingles that two texts share."""
    read = [compared(text, CONFIG.shingle_words) for text in texts]
    holders = defaultdict(list)
    for row, text in enumerate(read):
        for shingle in text.shingles:
            holders[shingle].append(row)
    shared = Counter(pair for rows in holders.values() if len(rows) < 50 for pair in itertools.combinations(rows, 2))
    found = {}
    for (one, other), num_shared in shared.items():
        if num_shared > NUM_WORDS // 2:
            likeness = similarity(read[one], read[other], threshold=CONFIG.threshold)
            if likeness is not None:
                found[one, other] = likeness
    return found


def test_nothing_is_removed_without_reason_and_next_to_nothing_is_missed() -> None:
    texts = questions()
    records = [
        {"id": f"{row:032x}", "source": "s", "origin": f"s:f#{row}", "question": text, "images": [], "choices": []}
        for row, text in enumerate(texts)
    ]
    table = FeatureTable([features_of(pa.Table.from_pylist(records, schema=SAMPLE_SCHEMA), CONFIG).to_table()])
    found = find_duplicates(table, CONFIG, origins=lambda rows: [f"s:f#{row}" for row in rows])
    alike = brute_force(texts)
    for row, kept, likeness in zip(found.rows.tolist(), found.resembles.tolist(), found.similarity, strict=True):
        assert alike[min(row, kept), max(row, kept)] == likeness
    kept_rows = set(range(len(texts))) - set(found.rows.tolist())
    missed = np.array([one in kept_rows and other in kept_rows for one, other in alike])
    likenesses = np.array(list(alike.values()))
    well_above = likenesses >= CONFIG.threshold + 0.05
    assert well_above.sum() > 1_000
    assert missed[well_above].mean() <= 0.01
    near = ~well_above
    expected = 1 - shape_of(CONFIG).candidate_probability(CONFIG.threshold)
    assert missed[near].sum() <= expected * near.sum() + 3 * math.sqrt(expected * near.sum()) + 1
