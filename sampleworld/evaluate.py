"""Asks a served teacher about scenes it has never seen, through the pipeline's own client, judges and verification.

Reports accuracy with and without thinking by family, and how often the judges' verdicts are true. Greedy decoding.

    python -m sampleworld.evaluate --url http://127.0.0.1:8123/v1 --model bimode-sampleworld --json figures.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from judges import difficulty, performance, reasoning, routing
from judges.answers import VerifierPool
from sampleworld.world import GLANCE, OPEN, STEPS, Task, draw_scene, render_scene
from schemas.config import DifficultyConfig, EndpointConfig, ImageLimits, PerformanceConfig, VerificationConfig
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import ImageRef, Kind, Sample, content_id
from schemas.template import Completion, ThinkingMode
from schemas.verdicts import Mode
from sources import ImageStore
from teacher.client import Teacher
from teacher.journal import Journal
from training.measures import Rate

EVALUATION_SEED = 7_000_000
Ask = Callable[[TeacherRequest], Awaitable[Reply | CallFailure]]


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its sample: what the pipeline would see of it."""

    task: Task
    sample: Sample


def draw_questions(store: ImageStore, num_per_family: int) -> list[Question]:
    """Returns questions of every family about new scenes; their stream of scenes is none that training draws from."""
    rng = random.Random(2 * EVALUATION_SEED)
    questions = []
    for ask in [*GLANCE.values(), *STEPS.values(), *OPEN.values()]:
        for _ in range(num_per_family):
            scene = draw_scene(rng)
            task = ask(scene, rng)
            questions.append(Question(task, sample_of(task, store.put(render_scene(scene)))))
    return questions


def sample_of(task: Task, image: ImageRef) -> Sample:
    """Returns the task as the sample that a source would make of it, fully routed."""
    name = content_id("evaluation", task.question, [image.sha256], task.choices, task.answer, None)
    return Sample(
        name,
        "evaluation",
        f"evaluation#{name}",
        task.question,
        (image,),
        task.choices,
        task.answer,
        topic=task.topic,
        kind=task.kind,
        answer_type=task.answer_type,
    )


async def ask_all(requests: Iterable[TeacherRequest], ask: Ask) -> list[Reply]:
    """Returns the replies in order. Raises RuntimeError: a call got none."""
    replies = []
    for reply in await asyncio.gather(*(ask(request) for request in requests)):
        if isinstance(reply, CallFailure):
            raise RuntimeError(f"a call failed: {reply.reason}: {reply.detail}")
        replies.append(reply)
    return replies


async def measure_answers(questions: list[Question], ask: Ask, verifiers: VerifierPool) -> dict[str, Rate]:
    """Returns the accuracy by family of the checkable questions."""
    checkable = [question for question in questions if question.task.kind is Kind.OBJECTIVE]
    settings = PerformanceConfig(temperature=0.0, max_tokens=256)
    requests = [performance.performance_request(q.sample, 0, settings, seed=0) for q in checkable]
    right: dict[str, list[bool]] = defaultdict(list)
    for question, reply in zip(checkable, await ask_all(requests, ask), strict=True):
        verdict = await verifiers.verify_async(reply.text, question.sample, is_truncated=reply.is_truncated)
        right[question.task.family].append(verdict.is_correct)
    return {family: Rate(sum(marks), len(marks)) for family, marks in right.items()}


async def measure_judges(questions: list[Question], ask: Ask) -> dict[str, Rate]:
    """Returns how often each judge's verdict is true."""
    marks: dict[str, list[bool]] = defaultdict(list)
    for question, reply in zip(
        questions, await ask_all([difficulty.difficulty_request(q.sample) for q in questions], ask), strict=True
    ):
        decision = difficulty.difficulty_decision(reply, DifficultyConfig())
        marks["difficulty"].append(decision is not None and (decision.mode is Mode.THINK) == question.task.needs_steps)
    for question, reply in zip(
        questions, await ask_all([routing.kind_request(q.sample) for q in questions], ask), strict=True
    ):
        routed = routing.with_kind(question.sample, reply)
        marks["routing"].append(routed is not None and routed.kind is question.task.kind)
    for question, reply in zip(
        questions, await ask_all([routing.topic_request(q.sample) for q in questions], ask), strict=True
    ):
        routed = routing.with_topic(question.sample, reply)
        marks["topic"].append(routed is not None and routed.topic is question.task.topic)
    explained = [q for q in questions if q.task.family == "explain"]
    shifted = explained[1:] + explained[:1]
    for answers, truth in ((explained, True), (shifted, False)):
        traces = [Completion(q.task.steps, a.task.answer) for q, a in zip(explained, answers, strict=True)]
        requests = [reasoning.consistency_request(q.sample, t) for q, t in zip(explained, traces, strict=True)]
        marks["consistency"] += [reasoning.is_consistent(reply) is truth for reply in await ask_all(requests, ask)]
    return {judge: Rate(sum(values), len(values)) for judge, values in marks.items()}


async def evaluate(endpoint: EndpointConfig, *, num_per_family: int) -> dict[str, dict[str, Rate]]:
    """Returns rates by family: `direct`, `thinking`, and by judge: `judges`."""
    with tempfile.TemporaryDirectory() as folder, VerifierPool(VerificationConfig()) as verifiers:
        store = ImageStore(Path(folder) / "images", ImageLimits())
        questions = draw_questions(store, num_per_family)
        figures: dict[str, dict[str, Rate]] = {}
        with Journal(Path(folder) / "replies") as journal:
            for name, mode in (("direct", ThinkingMode.SHORT), ("thinking", ThinkingMode.LONG)):
                body = {"chat_template_kwargs": {"thinking_mode": str(mode)}}
                asked = endpoint.model_copy(update={"extra_body": body})
                async with Teacher(asked, journal, store.resized_bytes, store.resized_path) as teacher:
                    await teacher.check()
                    figures[name] = await measure_answers(questions, teacher.ask, verifiers)
                    if mode is ThinkingMode.SHORT:
                        figures["judges"] = await measure_judges(questions, teacher.ask)
    return figures


def pooled(rates: dict[str, Rate], families: Iterable[str]) -> Rate:
    """Returns the rate over several families together."""
    chosen = [rates[family] for family in families]
    return Rate(sum(rate.num for rate in chosen), sum(rate.total for rate in chosen))


def render(figures: dict[str, dict[str, Rate]]) -> str:
    """Returns the figures as a table in Markdown."""
    lines = ["| questions | answered at once | with thinking |", "|---|---|---|"]
    groups = [("all glance questions", list(GLANCE)), ("all step questions", list(STEPS))]
    rows = [*groups, *((family, [family]) for family in [*GLANCE, *STEPS])]
    for name, families in rows:
        cells = [_cell(pooled(figures[mode], families)) for mode in ("direct", "thinking")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += ["", "| judge | verdicts that are true |", "|---|---|"]
    lines += [f"| {judge} | {_cell(rate)} |" for judge, rate in figures["judges"].items()]
    return "\n".join(lines)


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.share or 0.0:.1%} ({low:.0%} to {high:.0%}, n = {rate.total})"


def _record(rate: Rate) -> dict[str, object]:
    low, high = rate.interval
    return {"right": rate.num, "asked": rate.total, "share": rate.share or 0.0, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8123/v1", help="address of the served teacher")
    parser.add_argument("--model", default="bimode-sampleworld", help="its name")
    parser.add_argument("--questions", type=int, default=100, help="questions per family")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    endpoint = EndpointConfig(model=arguments.model, url=arguments.url, max_image_pixels=12544)
    figures = asyncio.run(evaluate(endpoint, num_per_family=arguments.questions))
    if arguments.json:
        records = {name: {key: _record(rate) for key, rate in rates.items()} for name, rates in figures.items()}
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    print(render(figures))


if __name__ == "__main__":
    main()
