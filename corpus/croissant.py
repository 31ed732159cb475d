"""The Croissant description of a version: `croissant.json`, by which dataset search and `mlcroissant` know a corpus.

It is JSON-LD of MLCommons Croissant 1.0 (docs.mlcommons.org/croissant/docs/croissant-spec.html): what the corpus is,
every shard with its checksum, and its columns as one set of records. The columns `prompt` and `completion`, lists of
messages of lists of parts, are left out: the format of records has no place for them, and `question`, `choices`,
`reasoning` and `answer` say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from corpus.writer import ShardInfo
from schemas.rows import CORPUS_SCHEMA

CROISSANT = "croissant.json"
"""Its name in a version's folder."""

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_PARQUET = "application/x-parquet"
_SHARDS = "shards"
_RECORDS = "rows"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification gives, word for word."""

_TEXT, _INTEGER, _FLOAT, _BOOLEAN, _IMAGE = "sc:Text", "sc:Integer", "sc:Float", "sc:Boolean", "sc:ImageObject"

_DESCRIPTIONS = {
    "id": "Stable id of the row, from its content.",
    "mode": "think, or direct: whether the completion holds a chain of thought.",
    "question": "The question, without its options.",
    "choices": "The options of a multiple-choice question.",
    "answer": "The answer that follows the think block.",
    "reference": "The reference answer of the source, if it has one.",
    "reasoning": "The chain of thought; empty in direct rows.",
    "images": "The images of the question, in order.",
    "heuristic": "What decided the mode: difficulty or performance.",
    "num_right": "Of the scored answers of the teacher, those that were right.",
    "num_scored": "Of the sampled answers of the teacher, those that could be scored.",
    "num_sampled": "Answers sampled from the teacher.",
    "probability": "The teacher's probability that reasoning is needed.",
    "is_audit": "Whether the row belongs to the audit slice, of which all samples are drawn.",
    "teacher": "The model that labelled the row.",
    "reasoner": "The model that wrote its text, if one did.",
    "recipe": "Digest of the configuration that made the row.",
    "source": "Name of the source.",
    "source_id": "The id that the source gave the row.",
    "origin": "The place of the row in its source.",
    "licence": "The licence of the source.",
}


@dataclass(frozen=True, slots=True)
class CroissantInputs:
    """What a description is made of.

    version: the name of its folder, v0007. created: ISO 8601 time. licence: of the corpus as a whole. shards: with
    paths relative to `folder`, or inside it. folder: of the version.
    """

    name: str
    version: str
    created: str
    licence: str
    shards: Sequence[ShardInfo]
    folder: Path


def croissant_record(inputs: CroissantInputs) -> dict[str, Any]:
    """Returns the description as plain JSON-able values."""
    num_think = sum(shard.num_think for shard in inputs.shards)
    num_direct = sum(shard.num_direct for shard in inputs.shards)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": inputs.name,
        "description": (
            f"A bi-mode corpus of questions with images, made with bimode: {num_think:,} rows are answered after a"
            f" chain of thought, {num_direct:,} at once."
        ),
        "conformsTo": CONFORMS_TO,
        "license": inputs.licence,
        "version": f"{int(inputs.version.removeprefix('v'))}.0.0",
        "datePublished": inputs.created,
        "citeAs": f"{inputs.name} {inputs.version}, a corpus made with bimode after R-4B (arXiv 2508.21113)",
        "keywords": ["multimodal", "reasoning", "auto-thinking", "bi-mode"],
        "distribution": [
            {
                "@type": "cr:FileSet",
                "@id": _SHARDS,
                "name": _SHARDS,
                "description": "All shards, one folder for each mode.",
                "encodingFormat": _PARQUET,
                "includes": "data/*/*.parquet",
            },
            *_file_objects(inputs),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": _RECORDS,
                "name": _RECORDS,
                "description": "The rows of both modes.",
                "key": {"@id": f"{_RECORDS}/id"},
                "field": list(_fields()),
            }
        ],
    }


def _file_objects(inputs: CroissantInputs) -> Iterable[dict[str, Any]]:
    by_path = {_relative(shard.path, inputs.folder): shard for shard in inputs.shards}
    for path, shard in sorted(by_path.items()):
        yield {
            "@type": "cr:FileObject",
            "@id": path,
            "name": path,
            "contentUrl": path,
            "contentSize": f"{shard.num_bytes} B",
            "encodingFormat": _PARQUET,
            "sha256": shard.sha256,
        }


def _relative(path: str, folder: Path) -> str:
    inside = Path(path)
    return PurePosixPath(inside.relative_to(folder) if inside.is_relative_to(folder) else inside).as_posix()


def _fields() -> Iterable[dict[str, Any]]:
    for column in CORPUS_SCHEMA:
        if column.name in ("prompt", "completion"):
            continue
        source: dict[str, Any] = {"fileSet": {"@id": _SHARDS}, "extract": {"column": column.name}}
        if column.name == "images":
            source["transform"] = {"jsonPath": "bytes"}
        field = {
            "@type": "cr:Field",
            "@id": f"{_RECORDS}/{column.name}",
            "name": column.name,
            "description": _DESCRIPTIONS.get(column.name, column.name.replace("_", " ").capitalize() + "."),
            "dataType": _data_type(column),
            "source": source,
        }
        yield {**field, "repeated": True} if pa.types.is_list(column.type) else field


def _data_type(column: pa.Field) -> str:
    if column.name == "images":
        return _IMAGE
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    if pa.types.is_integer(kind):
        return _INTEGER
    if pa.types.is_floating(kind):
        return _FLOAT
    return _BOOLEAN if pa.types.is_boolean(kind) else _TEXT
