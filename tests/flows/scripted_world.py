"""A scripted teacher that answers every judge of the pipeline deterministically, and small inputs to curate with it.

What it says depends on the request alone (the text, and the sample index where answers are drawn), so a run that is
killed and started again must end with the identical corpus.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from judges.prompts import prompt
from tests.replay_teacher import completion, constrained_completion

Body = dict[str, Any]


def texts_of(body: Body) -> tuple[str, str]:
    """Returns the system text and the user text of a request."""
    system = user = ""
    for message in body["messages"]:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if message["role"] == "system":
            system = text
        else:
            user = text
    return system, user


def scripted_answer(body: Body) -> str | Body:
    """Answers as a teacher that knows sums below 100, is right on a third of the others, and thinks well."""
    system, user = texts_of(body)
    if system == prompt("difficulty"):
        needs = "explain" in user.lower()
        return constrained_completion({"yes": 0.9 if needs else 0.2, "no": 0.1 if needs else 0.8}, body)
    if system == prompt("routing"):
        return constrained_completion({"objective": 0.9, "subjective": 0.1}, body)
    if system == prompt("topic"):
        return constrained_completion({"math": 0.8, "general": 0.2}, body)
    if system == prompt("consistency"):
        return constrained_completion({"consistent": 0.9, "inconsistent": 0.1}, body)
    if system == prompt("think_tags"):
        return _thought(user)
    if "Answer:" in user:
        return f"Answer: {_sum_of(user) if _knows(user, body) else 'zebra'}"
    return f"A picture of something, number {hashlib.sha256(user.encode()).hexdigest()[:6]}."


def _thought(user: str) -> str:
    if "sum" in user:
        total = _sum_of(user)
        return f"<think>I add the numbers of the question one after the other to get {total}.</think>Answer: {total}"
    return f"<think>I consider the question in several steps and find {len(user)} facts.</think>Because of {len(user)}."


def _sum_of(user: str) -> int:
    words = user.replace("?", " ").replace(".", " ").split()
    return sum(int(word) for word in words if word.isdigit())


def _knows(user: str, body: Body) -> bool:
    if "sum" in user and _sum_of(user) >= 100:
        return False
    return "sum" not in user or body.get("_index", 0) >= _sum_of(user) % 3


def write_questions(folder: Path, num_rows: int = 60) -> Path:
    """Writes checkable sums and open questions with a few images, and returns the JSON Lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_rows):
        name = f"{number % 7}.png"
        if not (folder / name).exists():
            stream = io.BytesIO()
            Image.new("RGB", (40, 30), (number * 30 % 256, 90, 200)).save(stream, format="PNG")
            (folder / name).write_bytes(stream.getvalue())
        if number % 5 == 4:
            verb = "Explain" if number % 2 else "Describe"
            row: Body = {"id": str(number), "question": f"{verb} the thing number {number} here.", "image": name}
        else:
            one, two = number * 3 % 90, number * 7 % 80
            row = {"id": str(number), "question": f"What is the sum of {one} and {two}?", "answer": str(one + two)}
            if number % 2:
                row["image"] = name
        lines.append(json.dumps(row))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_config(folder: Path, questions: Path, url: str, **settings: Any) -> Path:
    """Writes a run configuration for the questions and the teacher at an address, and returns its path."""
    config: Body = {
        "name": "scripted",
        "workdir": str(folder / "work"),
        "shard_rows": 20,
        "sources": [
            {
                "name": "sums",
                "format": "jsonl",
                "path": str(questions),
                "columns": {"images": "image", "answer": "answer", "id": "id"},
            }
        ],
        "teacher": {"model": "scripted", "url": url, "unreachable_seconds": 3},
        "performance": {"audit_share": 0.2},
        **settings,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


__all__ = ["completion", "scripted_answer", "texts_of", "write_config", "write_questions"]
