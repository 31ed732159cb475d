"""The stages that look across shards: duplicate rows, and duplicate chains of thought. Without Prefect.

What a shard's rows are compared by is made once and lies beside the stage's shards (`{shard}.features`). The comparison
names rows by shard and number; columns, never rows, become Python objects.

A refresh costs what is new. When a corpus is published, its shards are *settled*: their result stands for good, and
what their kept rows are compared by stays (`{shard}.published`, listed in `published.json`). The next run compares
only the rows of other shards, with each other and with all those. Where a source has grown, its last shard is read
anew; rows of it that are published already come before every other row, so they stay too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from corpus.storage import replacing, write_text
from filters.buckets import has_key, rows_with_keys
from filters.duplicates import clashing_ids, features_of, find_duplicates
from filters.feature_files import FeatureTable, stored_digest, write_features
from filters.features import PictureNames, image_names
from filters.traces import trace_features, trace_settings
from flows.pictures import Pictures
from flows.removals import RemovalPlan, ShardRows, ShardTable
from flows.runtime import Runtime
from flows.workspace import Marker, Workspace, digest_of
from schemas.config import DuplicatesConfig

DUPLICATES = "duplicates"
LEDGER = "published.json"

FEATURES_VERSION = 4
"""Raised when features are made in another way, so that stored ones are made again."""


def plan_duplicates(runtime: Runtime, markers: Sequence[Marker], settled: Sequence[Marker] = ()) -> RemovalPlan:
    """Returns the rows to remove: rows that claim another row's id, exact and near duplicates.

    markers: of the stage before. settled: of this stage, see `settled_shards`. Memory grows by about 60 bytes a row;
    texts stay on the disk.
    """
    config, num_threads = runtime.config.duplicates, runtime.config.parallel_shards
    names = pictures_of(runtime, markers).names
    with ThreadPoolExecutor(num_threads + 1) as pool:  # one more, as one or other waits for the disk
        paths = list(pool.map(lambda marker: feature_file(runtime, marker, names), markers))
    published = FeatureTable.open([published_path(runtime.workspace, marker.shard) for marker in settled])
    features = FeatureTable.open(paths)
    rows = shard_rows(runtime, [*markers, *settled], [features, published])
    clashes = clashing_ids(features, origins=rows.origins, published=published)
    found = find_duplicates(
        features,
        config,
        origins=rows.origins,
        published=published,
        left_out=clashes.rows,
        num_threads=num_threads,
    )
    answers = np.concatenate([features.column("answer"), published.column("answer")])
    return rows.by_shard(rows.clashes(clashes), rows.duplicates(found, answers))


def shard_rows(runtime: Runtime, markers: Sequence[Marker], features: Sequence[FeatureTable]) -> ShardRows:
    """Returns the rows of some shards, whose features are these."""
    rows = ShardRows(
        runtime.workspace, [ShardTable.of(marker) for marker in markers], num_threads=runtime.config.parallel_shards
    )
    assert len(rows) == sum(map(len, features)), "a shard's features are not those of its rows"
    return rows


def _features_recipe(config: DuplicatesConfig) -> str:
    settings = config.model_dump(include={"threshold", "num_permutations", "shingle_words", "seed", "images"})
    return digest_of(FEATURES_VERSION, settings)


def published_path(workspace: Workspace, shard: str) -> Path:
    return workspace.root / "stages" / DUPLICATES / f"{shard}.published"


def feature_path(workspace: Workspace, shard: str) -> Path:
    return workspace.root / "stages" / DUPLICATES / f"{shard}.features"


def pictures_of(runtime: Runtime, markers: Sequence[Marker]) -> Pictures:
    """Returns the images of some shards, clustered; none if files are all that is compared."""
    is_near = runtime.config.duplicates.images == "near"
    return Pictures(runtime, runtime.workspace.root / "stages" / DUPLICATES, markers if is_near else [])


def feature_file(runtime: Runtime, marker: Marker, pictures: PictureNames) -> Path:
    """Returns the file of a shard's features, written first if it is not there under this digest."""
    config, workspace = runtime.config.duplicates, runtime.workspace
    rows = workspace.read_rows(marker.stage, marker.shard)
    path = feature_path(workspace, marker.shard)
    earlier = published_path(workspace, marker.shard)
    digest = digest_of(
        _features_recipe(config), marker.output, stored_digest(earlier), pictures.digest(image_names(rows["images"]))
    )
    if stored_digest(path) != digest:
        features = features_of(rows, config, pictures)
        if earlier.exists():
            published = FeatureTable.open([earlier]).column("id_high")
            features = features.published(rows_with_keys(published, features.id_high))
        with replacing(path) as temporary:
            write_features(temporary, features, digest)
    return path


def settled_shards(runtime: Runtime, markers: Sequence[Marker]) -> dict[str, Marker]:
    """Returns the markers of this stage for the shards whose published result stands, by shard.

    markers: of the stage before. A shard that was read anew, or compared under another recipe, is not settled.
    """
    workspace, config = runtime.workspace, runtime.config.duplicates
    recipe, ledger = _features_recipe(config), _read_ledger(workspace)
    if ledger.get("recipe") != digest_of(recipe, config.model_dump()):
        return {}
    settled = {}
    for marker in markers:
        source, digest = ledger["shards"].get(marker.shard, ("", ""))
        found = workspace.find_marker(DUPLICATES, marker.shard, digest) if source == marker.output else None
        if found and stored_digest(published_path(workspace, marker.shard)) == digest_of(recipe, found.output):
            settled[marker.shard] = found
    return settled


def settle(runtime: Runtime, before: Sequence[Marker], markers: Sequence[Marker]) -> None:
    """Records that the result of this stage is published. before: markers of the stage before, of the same shards."""
    workspace, config = runtime.workspace, runtime.config.duplicates
    recipe = _features_recipe(config)
    settled = settled_shards(runtime, before)
    pictures = pictures_of(runtime, [marker for marker in before if marker.shard not in settled])
    for marker in markers:
        path, digest = published_path(workspace, marker.shard), digest_of(recipe, marker.output)
        if stored_digest(path) != digest:
            features = features_of(workspace.read_rows(DUPLICATES, marker.shard), config, pictures.names)
            with replacing(path) as temporary:
                write_features(temporary, features.published(np.arange(len(features))), digest)
        for suffix in (".features", ".pictures"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    pictures.settle()
    shards = {new.shard: [old.output, new.digest] for old, new in zip(before, markers, strict=True)}
    ledger = {"recipe": digest_of(recipe, config.model_dump()), "shards": shards}
    write_text(workspace.root / "stages" / DUPLICATES / LEDGER, json.dumps(ledger, sort_keys=True))


def _read_ledger(workspace: Workspace) -> dict[str, Any]:
    path = workspace.root / "stages" / DUPLICATES / LEDGER
    try:
        ledger: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return ledger


def plan_traces(runtime: Runtime, markers: Sequence[Marker]) -> RemovalPlan:
    """Returns the thinking rows whose chain of thought is another row's; of two, the published one stays."""
    workspace = runtime.workspace
    earlier = [path for marker in markers if (path := published_path(workspace, marker.shard)).exists()]
    published = FeatureTable.open(earlier).column("id_high")
    threshold, num_threads = runtime.config.reasoning.duplicate_threshold, runtime.config.parallel_shards
    features = []
    for marker in markers:
        traces = runtime.workspace.read_columns(marker.stage, marker.shard, ["id", "question", "reasoning"])
        features.append(trace_features(traces, threshold))
    # Looked up at once: the table of the published ids is large, and made anew by each look.
    stays = has_key(published, np.concatenate([np.zeros(0, np.uint64), *(shard.id_high for shard in features)]))
    starts = np.cumsum([0, *map(len, features)])
    tables = [
        shard.published(np.flatnonzero(stays[start : start + len(shard)])).to_table()
        for shard, start in zip(features, starts, strict=False)
    ]
    table = FeatureTable(tables)
    rows = shard_rows(runtime, markers, [table])
    found = find_duplicates(table, trace_settings(threshold), origins=rows.origins, num_threads=num_threads)
    return rows.by_shard(rows.traces(found))
