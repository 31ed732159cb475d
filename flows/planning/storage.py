"""What a run leaves on the disk, and what its driver holds in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flows.planning.assumptions import Values
from flows.planning.demand import CORPUS, DUPLICATES, SOURCES, TRACES, StageDemand
from flows.planning.request import Request

FILES_PER_SHARD = 3
"""Of a stage: rows, fates, marker."""
JOURNAL_ENTRIES_PER_SHARD = 2
"""Of a stage that asks: a folder, and the file of compacted replies in it."""
MAX_FOLDER_FILES = 1_000_000
"""Files in one folder: beyond, listing or copying it takes minutes on usual file systems, and backups hours."""
_TRACE_BYTES = 172
"""Of a row's features in `filters.traces`, beside eight for each word of its trace."""
_WORDS_PER_TOKEN = 0.75


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes on the disk, files, and the driver's memory in bytes; arrays are [1 + draws].

    compared_memory: for comparing rows. traces_memory: for comparing traces. markers_memory: of all shards' records.
    """

    images: Values
    journals: Values
    stages: Values
    corpus: Values
    image_files: Values
    other_files: int
    compared_memory: Values
    traces_memory: Values
    markers_memory: Values

    @property
    def total(self) -> Values:
        return self.images + self.journals + self.stages + self.corpus


def storage_of(request: Request, stages: Sequence[StageDemand]) -> Storage:
    """Returns what a run with these stages leaves."""
    a, config, num_shards = request.assumptions, request.config, request.num_shards
    by_name = {stage.stage: stage for stage in stages}
    nothing = np.zeros_like(stages[0].rows)
    passing = [stage for stage in stages if stage.stage != CORPUS]
    asked = [asked for stage in stages for asked in stage.asked]
    per_row = (1 - a.text_only_share.drawn()) * a.images_per_row.drawn()
    stored_images = by_name[SOURCES].kept * per_row * a.distinct_image_share.drawn()
    replies = sum((each.samples for each in asked), nothing)
    tokens = sum((each.completion_tokens for each in asked), nothing)
    kept, traces = by_name[CORPUS].rows, by_name[TRACES].looked_at
    trace_tokens = np.minimum(a.trace_tokens.drawn(), config.reasoning.max_tokens)
    texts = kept * a.question_tokens.drawn() + traces * trace_tokens
    trace_words = traces * _WORDS_PER_TOKEN * trace_tokens
    compared = a.partitioned_bytes if request.is_ray else a.compared_bytes
    files_per_shard = FILES_PER_SHARD * len(passing)
    files_per_shard += JOURNAL_ENTRIES_PER_SHARD * sum(1 for stage in passing if stage.asked)
    return Storage(
        images=stored_images * a.image_bytes.drawn(),
        journals=replies * a.reply_bytes.drawn() + tokens * a.text_bytes.drawn(),
        stages=sum((stage.kept for stage in passing), nothing) * a.stage_row_bytes.drawn()
        + by_name[DUPLICATES].kept * a.feature_bytes.drawn(),
        corpus=kept * per_row * a.image_bytes.drawn() + texts * a.text_bytes.drawn(),
        image_files=stored_images,
        other_files=num_shards * files_per_shard + math.ceil(float(kept[0]) / config.corpus.shard_rows),
        compared_memory=by_name[DUPLICATES].rows * compared.drawn(),
        traces_memory=nothing if request.is_ray else by_name[TRACES].rows * _TRACE_BYTES + 8 * trace_words,
        markers_memory=nothing + num_shards * len(passing) * a.marker_bytes.drawn(),
    )
