"""A small curation to be disturbed and measured: numbered cards, a teacher that answers them, the stages of the flow.

Cards are questions of every kind that the pipeline treats differently, with and without images. What the teacher says
depends on card and seed alone, so that every run of the same cards must end with the same corpus, whatever befalls it.
The stages are those of `flows.curate`, in threads instead of Prefect's tasks: Prefect sees shards and never a row, and
its start takes longer than such a curation.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from flows import telemetry
from flows.crew import in_threads
from flows.curate import Curation
from flows.publishing import Published
from flows.runtime import Runtime
from flows.shard_calls import Call, Spread, Work
from flows.stages import Progress, check_quarantine
from judges import difficulty, reasoning, routing
from schemas.config import RunConfig, parse_config
from sources import plan_units
from teacher.fault_server import Body, completion, constrained_completion, question_text

_Result = TypeVar("_Result")

MODEL = "cards"
NUM_PICTURES = 24
NUM_BROKEN_ROWS = 3
"""Rows beside the cards that leave before the teacher is asked: no question, no image file, a duplicate."""
_CUT_SHARE = 0.03
"""Share of the teacher's free answers that its length limit cuts: unscored, and replaced by further samples."""
_FAILED_TRACE_SHARE = 0.2
_NUMBER = re.compile(r"Card (\d+)\b")


@dataclass(frozen=True, slots=True)
class Card:
    """One question. right_share: of the teacher's samples that are right. reference: None for open questions."""

    number: int
    question: str
    reference: str | None
    right_share: float = 1.0
    said: str = ""
    """How the teacher writes the right answer."""
    choices: tuple[str, ...] = ()
    has_picture: bool = False


def card(number: int) -> Card:
    """Returns the card of a number; every tenth is of the same kind."""
    one, two = number * 3 % 90, number * 7 % 80
    total, kind, has_picture = str(one + two), number % 10, (number + number // 10) % 2 == 1
    plain = f"Card {number} shows {one} and {two}. What is their sum?"
    if kind < 5:
        right_share = (1.0, 1.0, 0.0, 0.5, 0.25)[kind]
        return Card(number, plain, total, right_share, total, has_picture=has_picture)
    if kind == 5:
        choices = tuple(str(one + two + shift) for shift in (1, 0, 2))
        question = f"Card {number} shows {one} and {two}. Which is their sum?"
        return Card(number, question, "B", 0.5, "B", choices, has_picture=has_picture)
    if kind == 6:
        part = Fraction(one + 1, one + two + 2)
        question = f"Card {number}: what part of {one + two + 2} is {one + 1}?"
        reference, said = (rf"\frac{{{n * part.numerator}}}{{{n * part.denominator}}}" for n in (1, 3))
        return Card(number, question, reference, 1.0, said, has_picture=has_picture)
    if kind == 7:
        thing = f"the long red stick beside the {one + 2} small green ones near the left side"
        return Card(number, f"Card {number}: which thing is meant?", thing, 0.5, thing, has_picture=has_picture)
    question = (
        f"Card {number}: explain why {one} is not {two}." if kind == 8 else f"Card {number}: describe what is here."
    )
    return Card(number, question, None, has_picture=has_picture)


def card_number(text: str) -> int | None:
    """Returns the number of the first card that a text speaks of."""
    found = _NUMBER.search(text)
    return int(found[1]) if found else None


def picture(number: int) -> bytes:
    """Returns an image as PNG. Some have more pixels than `configuration` lets through, and are reduced."""
    stream = io.BytesIO()
    side = 40 + 4 * (number % 6)
    Image.new("RGB", (side, 30), (number * 37 % 256, 90, 200)).save(stream, format="PNG")
    return stream.getvalue()


def write_cards(folder: Path, num_rows: int) -> Path:
    """Writes cards 0 to num_rows - 1, images and the broken rows; returns the JSON Lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = [_row(card(number)) for number in range(num_rows)]
    rows += [
        {"id": "empty", "question": ""},
        {"id": "lost", "question": "Card: whose is this?", "image": "lost.png"},
        {**rows[0], "id": "again"},
    ]
    path = folder / "cards.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(shown: Card) -> Body:
    row: Body = {"id": str(shown.number), "question": shown.question}
    if shown.reference is not None:
        row["answer"] = shown.reference
    if shown.choices:
        row["choices"] = shown.choices
    if shown.has_picture:
        row["image"] = f"{shown.number % NUM_PICTURES}.png"
    return row


def configuration(cards: Path, workdir: Path, url: str, **settings: Any) -> RunConfig:
    """Returns the configuration of a curation of cards. settings: replace sections; `teacher` is completed."""
    columns = {"images": "image", "answer": "answer", "id": "id", "choices": "choices"}
    teacher = {"model": MODEL, "url": url, "unreachable_seconds": 60, "max_image_pixels": 1600}
    return parse_config(
        {
            "name": "cards",
            "workdir": str(workdir),
            "shard_rows": 40,
            "parallel_shards": 3,
            "sources": [{"name": "cards", "format": "jsonl", "path": str(cards), "columns": columns}],
            "performance": {"audit_share": 0.1},
            "verification": {"num_workers": 1},
            **settings,
            "teacher": teacher | settings.get("teacher", {}),
        }
    )


def teacher_answer(body: Body, choice: int) -> str | Body:
    """Answers any judge's question about a card: the `Answer` of a fault server.

    Verdicts depend on the card; what is drawn (performance, reasoning) on card and seed. Raises LookupError: the call
    is about no card.
    """
    number = card_number(question_text(body))
    if number is None:
        raise LookupError("the question is about no card")
    shown, purpose = card(number), body["_purpose"]
    if purpose in _VERDICTS:
        return constrained_completion(_VERDICTS[purpose](shown), body)
    seed = (body.get("seed") or 0) + choice
    if purpose == reasoning.DIRECT:
        return f"It is what card {shown.number} shows."
    if purpose == reasoning.PURPOSE:
        return _trace(shown, seed)
    text = f"I look at it.\nAnswer: {shown.said if _drawn(shown, seed, 'right') < shown.right_share else 'zebra'}"
    if _drawn(shown, seed, "cut") < _CUT_SHARE:
        return completion(text[:12], body, finish_reason="length")
    return text


_VERDICTS: dict[str, Callable[[Card], dict[str, float]]] = {
    difficulty.PURPOSE: lambda shown: (
        {"yes": 0.9, "no": 0.1} if "explain" in shown.question else {"yes": 0.2, "no": 0.7}
    ),
    routing.ROUTING: lambda shown: {"objective": 0.9, "subjective": 0.1},
    routing.TOPIC: lambda shown: (
        {"math": 0.8, "general": 0.2} if shown.number % 20 < 10 else {"ocr": 0.6, "chart": 0.4}
    ),
    reasoning.CONSISTENCY: lambda shown: (
        {"consistent": 0.9, "inconsistent": 0.1}
        if _drawn(shown, 0, "consistent") >= _FAILED_TRACE_SHARE
        else {"inconsistent": 0.9, "consistent": 0.1}
    ),
}


def _trace(shown: Card, seed: int) -> str:
    is_right = shown.reference is None or _drawn(shown, seed, "trace") >= _FAILED_TRACE_SHARE
    answer = shown.said or f"Because it is card {shown.number}."
    thought = f"I take card {shown.number} and look at each of its {seed % 97 + 2} parts, one after the other."
    return f"<think>{thought}</think>Answer: {answer if is_right else 'zebra'}"


def _drawn(shown: Card, seed: int, what: str) -> float:
    """Returns a number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256(f"{shown.number}:{seed}:{what}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class PlainCuration(Curation):
    """The stages of the flow, planned, run, checked and published by its own code; shards in threads, not in tasks."""

    def _stage(self, stage: str, num_rows: int, plan: Callable[[Spread], Work]) -> None:
        progress = Progress(num_rows)

        def spread(what: str, calls: Mapping[str, Call[_Result]]) -> dict[str, _Result]:
            watched = telemetry.watched(calls, what)
            return dict(zip(watched, in_threads(self.runtime, progress, watched.values()), strict=True))

        with telemetry.stage(stage, progress) as seen:
            self.markers[stage] = list(spread("", plan(spread)).values())
            seen.count(self.markers[stage])
        folder = self.runtime.workspace.root
        check_quarantine(self.config, self.markers, stage, num_rows=self.num_rows, folder=folder)


def curate_plainly(config: RunConfig) -> Published:
    """Runs a curation from its sources to the published corpus; goes on where an earlier run was ended."""
    runtime = Runtime(config)
    try:
        with runtime.workspace.locked():
            return PlainCuration(runtime, plan_units(config)).run()
    finally:
        runtime.close()


def table_lines(rows: Sequence[tuple[str, object]]) -> list[str]:
    """Returns a table of two columns; whole numbers get separators."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value!s:>12}" for name, value in rows]
