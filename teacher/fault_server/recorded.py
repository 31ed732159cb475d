"""Answers from recorded replies: the compacted journals of an earlier run, asked again."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ConfigError
from teacher.fault_server.answers import Answer, Body, completion, content_parts

_COLUMNS = [
    "messages",
    "seed",
    "text",
    "finish_reason",
    "reasoning",
    "top_logprobs",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
]


def recorded_answer(paths: Sequence[Path]) -> Answer:
    """Returns an `Answer` that gives the reply recorded for the same messages and the seed of the choice.

    paths: Parquet files with the columns of compacted journals. An image is known by the hash in its part's `uuid`,
    else by that of the bytes in its data URL. What was not recorded is a LookupError. All replies are kept in memory.

    Raises ConfigError: a file that cannot be read, or that lacks columns.
    """
    replies: dict[tuple[bytes, int], Body] = {}
    for path in paths:
        try:
            rows = pq.read_table(path, columns=_COLUMNS).to_pylist()
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ConfigError(f"{path} holds no recorded replies: {error}") from error
        for row in rows:
            if row["messages"] is not None and row["seed"] is not None:
                replies[_digest(json.loads(row.pop("messages"))), row.pop("seed")] = row

    def answer(body: Body, choice: int) -> Body:
        seed = (body.get("seed") or 0) + choice
        row = replies.get((_digest(_sent_messages(body)), seed))
        if row is None:
            raise LookupError(f"no reply was recorded for these messages and the seed {seed}")
        return _completion_of_row(row, body)

    return answer


def _completion_of_row(row: Body, body: Body) -> Body:
    logprobs = [(item["token"], item["logprob"]) for item in row["top_logprobs"] or []]
    reply = completion(
        row["text"],
        body,
        finish_reason=row["finish_reason"],
        reasoning=row["reasoning"],
        top_logprobs=logprobs,
        cached_tokens=row["cached_tokens"],
    )
    counts = {name: row[name] for name in ("prompt_tokens", "completion_tokens")}
    reply["usage"] |= {**counts, "total_tokens": sum(counts.values())}
    return reply


def _sent_messages(body: Body) -> list[Body]:
    """Returns the messages of a call as journals have them: role, text, hashes of images."""
    messages: list[Body] = []
    for message in body["messages"]:
        parts = content_parts(message)
        text = "".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
        images = [_image_sha256(part) for part in parts if part.get("type") == "image_url"]
        messages.append({"role": message.get("role"), "text": text, "images": images})
    return messages


def _image_sha256(part: Body) -> str:
    if part.get("uuid"):
        return str(part["uuid"]).partition("-")[0]  # what follows says how far it was reduced
    _, _, encoded = str(part["image_url"]["url"]).partition(";base64,")
    try:
        return hashlib.sha256(base64.b64decode(encoded)).hexdigest()
    except binascii.Error as error:
        raise LookupError(f"an image is no data URL: {error}") from error


def _digest(messages: Any) -> bytes:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
