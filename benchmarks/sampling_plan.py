"""What the wave plan saves: adaptive beside exhaustive sampling, through the pipeline's own label stage.

Recorded replies stand in for the teacher, so every plan meets the same answers. Two kinds of them are read:

- MATH-Vision's testmini: 15 answers of real models to each of 304 problems, of which each draw takes eight by seed
  (and the rest as replacements). Tokens are counted as a quarter of the characters, and one per 28 x 28 pixels.
- The performance journals of a curation, with the server's own token counts. A row whose label was settled early has
  fewer than eight replies; the missing ones repeat its own, which changes no label. A run with
  `performance: {exhaustive: true}` lacks none.

Printed for each source: how many labels are identical; the tokens saved by difficulty (right answers among eight); and
what the learned plan costs beside the best fixed plan known afterwards (all 128 ways to split eight samples are tried,
and the dynamic programme on the true rates), beside all eight at once and beside waves of 1, 1, 2, 4. The learned plan
starts with nothing but its prior, and all rows are in work at once, as those of a shard are.

    python -m benchmarks.sampling_plan --mathvision ../shared/data/mathvision --run runs/demo
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from flows.labelling import Desk, label_performance
from flows.work_rows import WorkRow, work_rows
from judges.answers import VerifierPool, infer_answer_type
from judges.performance import answer_messages
from judges.sampling_plan import CallCosts, SamplingPlans, best_waves
from schemas.config import PerformanceConfig, RunConfig, parse_config
from schemas.requests import CallFailure, Reply, TeacherRequest
from schemas.samples import Kind, Sample
from schemas.verdicts import Decision, Verdict
from teacher.journal import read_journal

NUM_SAMPLES = 8
SETTINGS = PerformanceConfig()
ONE_BY_ONE = (1,) * NUM_SAMPLES
MIN_ROWS = 100
"""Of fewer rows nothing can be learned in time: their labels are compared, their costs are not."""
CHARACTERS_PER_TOKEN = 4
PIXELS_PER_TOKEN = 28 * 28
MAX_IMAGE_PIXELS = 1280 * PIXELS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """A question with replies to it, by index; beyond the last they begin again. prompt_tokens: of one call."""

    sample: Sample
    prompt_tokens: int
    replies: tuple[Reply, ...]


@dataclass(slots=True)
class Tokens:
    """Tokens of the calls of a row: prompts of the first call and of later ones, and completions."""

    first_prompt: int = 0
    later_prompts: int = 0
    completion: int = 0

    def cost(self, *, caches_prompts: bool) -> float:
        """Returns the cost in completion tokens. caches_prompts: later prompts are found in the prefix cache."""
        later_cost = SETTINGS.cached_token_cost if caches_prompts else SETTINGS.prompt_token_cost
        return self.first_prompt * SETTINGS.prompt_token_cost + self.later_prompts * later_cost + self.completion


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one way of sampling led to: by sample id, the decision (None: no label) and the tokens."""

    decisions: Mapping[str, Decision | None]
    tokens: Mapping[str, Tokens]

    def cost(self, *, caches_prompts: bool) -> float:
        return sum(tokens.cost(caches_prompts=caches_prompts) for tokens in self.tokens.values())


class RecordedTeacher:
    """Answers with recorded replies and counts the tokens that asking a server for them takes.

    caches_prompts: the prompt of a later call of a row is found in the prefix cache, and the reply says so.
    """

    def __init__(self, rows: Sequence[RecordedRow], *, caches_prompts: bool) -> None:
        self._rows = {row.sample.id: row for row in rows}
        self._caches_prompts = caches_prompts
        self.tokens: dict[str, Tokens] = defaultdict(Tokens)

    async def ask_samples(self, requests: Sequence[TeacherRequest]) -> list[Reply | CallFailure]:
        await asyncio.sleep(0)
        return [self._reply(request, choice) for choice, request in enumerate(requests)]

    async def ask(self, request: TeacherRequest) -> Reply | CallFailure:
        return self._reply(request, 0)

    def _reply(self, request: TeacherRequest, choice: int) -> Reply:
        row, tokens = self._rows[request.sample_id], self.tokens[request.sample_id]
        reply = row.replies[request.index % len(row.replies)]
        is_later = request.index > choice
        tokens.completion += reply.completion_tokens
        if choice == 0 and is_later:
            tokens.later_prompts += row.prompt_tokens
        elif choice == 0:
            tokens.first_prompt += row.prompt_tokens
        cached_tokens = row.prompt_tokens if self._caches_prompts and is_later else 0
        return replace(reply, choice=choice, prompt_tokens=row.prompt_tokens, cached_tokens=cached_tokens)


class RememberingPool(VerifierPool):
    """A pool that compares each reply once, however many plans draw it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.verification)
        self._verdicts: dict[tuple[str, str, bool], Verdict] = {}

    async def verify_async(self, reply_text: str, sample: Sample, *, is_truncated: bool = False) -> Verdict:
        key = (sample.id, reply_text, is_truncated)
        if key not in self._verdicts:
            self._verdicts[key] = await super().verify_async(reply_text, sample, is_truncated=is_truncated)
        return self._verdicts[key]


def configuration(**performance: object) -> RunConfig:
    """Returns a run's configuration; audited rows cost the same under every plan and are left out."""
    source = {"name": "recorded", "format": "jsonl", "path": "-"}
    return parse_config({"sources": [source], "performance": {"audit_share": 0.0, **performance}})


def sample_rows(
    rows: Sequence[RecordedRow], verifiers: VerifierPool, *, caches_prompts: bool = True, **performance: object
) -> Sampled:
    """Labels all rows, in work at once, as the shards of a source are."""
    config = configuration(**performance)
    teacher = RecordedTeacher(rows, caches_prompts=caches_prompts)
    desk = Desk(
        config=config,
        ask_teacher=teacher.ask,
        ask_samples=teacher.ask_samples,
        ask_reasoner=teacher.ask,
        verifiers=verifiers,
        plans=SamplingPlans(config.performance),
    )

    async def label_all() -> dict[str, Decision | None]:
        results = await asyncio.gather(*(label_performance(WorkRow(row.sample), desk) for row in rows))
        return {
            row.sample.id: result.decision if isinstance(result, WorkRow) else None
            for row, result in zip(rows, results, strict=True)
        }

    decisions = asyncio.run(label_all())
    return Sampled(decisions, teacher.tokens)


def read_mathvision(folder: Path, *, seed: int) -> list[RecordedRow]:
    """Returns the problems in an order by seed, the 15 recorded answers of each in an order by seed."""
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text("utf-8").splitlines()]
    recorded = [json.loads(line) for line in (folder / "responses.jsonl").read_text("utf-8").splitlines()]
    answers = {record["id"]: [answer["response"] for answer in record["responses"]] for record in recorded}
    rng = random.Random(seed)
    rng.shuffle(problems)
    rows = []
    for problem in problems:
        choices = tuple(problem["options"])
        sample = Sample(
            problem["id"],
            "mathvision",
            f"mathvision:problems.jsonl#{problem['id']}",
            problem["question"],
            choices=choices,
            answer=problem["answer"],
            kind=Kind.OBJECTIVE,
            answer_type=infer_answer_type(problem["answer"], choices, problem["question"]),
        )
        with Image.open(folder / problem["image"]) as image:
            num_pixels = min(image.width * image.height, MAX_IMAGE_PIXELS)
        prompt_tokens = num_tokens(answer_messages(sample)[0].text) + num_pixels // PIXELS_PER_TOKEN
        drawn = rng.sample(answers[problem["id"]], k=len(answers[problem["id"]]))
        replies = tuple(Reply(text, "stop", "recorded", completion_tokens=num_tokens(text)) for text in drawn)
        rows.append(RecordedRow(sample, prompt_tokens, replies))
    return rows


def num_tokens(text: str) -> int:
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


def read_run(workdir: Path) -> dict[str, list[RecordedRow]]:
    """Returns by source the checkable rows of a curation whose replies are in its performance journals."""
    replies: dict[str, dict[int, Reply]] = defaultdict(dict)
    for path in sorted((workdir / "journals" / "performance").iterdir()):
        for record in read_journal(path):
            replies[record.sample_id].setdefault(record.index, record.reply)
    rows = defaultdict(list)
    for path in sorted((workdir / "stages" / "difficulty").glob("*[0-9].parquet")):
        for row in work_rows(pq.read_table(path)):
            known = replies.get(row.sample.id)
            if known and row.sample.kind is Kind.OBJECTIVE:
                drawn = tuple(known[index] for index in sorted(known))
                rows[row.sample.source].append(RecordedRow(row.sample, drawn[0].prompt_tokens, drawn))
    return dict(rows)


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to split so many samples into waves."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield (first, *rest)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ways of sampling one draw of rows.

    learned: by whether prompts are cached, as the plan learns that. fixed: by waves, all 128.
    """

    learned: Mapping[bool, Sampled]
    exhaustive: Sampled
    fixed: Mapping[tuple[int, ...], Sampled]

    def best(self, *, caches_prompts: bool) -> tuple[int, ...]:
        """Returns the waves that cost least."""
        return min(self.fixed, key=lambda waves: self.fixed[waves].cost(caches_prompts=caches_prompts))

    def planned(self, *, caches_prompts: bool) -> tuple[int, ...]:
        """Returns the waves that the dynamic programme finds for the true rates and the mean costs."""
        rows = self.exhaustive.tokens.values()
        prompt_tokens = statistics.mean(row.first_prompt for row in rows)
        costs = CallCosts(
            prompt_tokens * SETTINGS.prompt_token_cost,
            prompt_tokens * (SETTINGS.cached_token_cost if caches_prompts else SETTINGS.prompt_token_cost),
            statistics.mean(row.completion for row in rows) / NUM_SAMPLES,
        )
        sizes = best_waves(self.survival, costs)
        waves: list[int] = []
        while sum(waves) < NUM_SAMPLES:
            waves.append(sizes[sum(waves)])
        return tuple(waves)

    @property
    def survival(self) -> tuple[float, ...]:
        """The share of labelled rows with no right answer among the first k scored samples [N + 1]."""
        decisions = self.fixed[ONE_BY_ONE].decisions.values()
        firsts = [d.num_scored if d.num_right else NUM_SAMPLES + 1 for d in decisions if d is not None]
        return tuple(sum(first > k for first in firsts) / len(firsts) for k in range(NUM_SAMPLES + 1))

    @property
    def num_identical(self) -> int:
        """How many rows have one label (or none) by every way, and one evidence by all ways but the exhaustive."""
        return sum(self._is_identical(name) for name in self.exhaustive.decisions)

    def _is_identical(self, name: str) -> bool:
        truth, first = self.exhaustive.decisions[name], self.fixed[ONE_BY_ONE].decisions[name]
        modes = [decision.mode if decision else None for decision in (truth, first)]
        ways = [*self.learned.values(), *self.fixed.values()]
        return modes[0] == modes[1] and all(way.decisions[name] == first for way in ways)


def compare(rows: Sequence[RecordedRow], verifiers: VerifierPool) -> Comparison:
    """Samples the rows in every way."""
    return Comparison(
        {caches: sample_rows(rows, verifiers, caches_prompts=caches) for caches in (True, False)},
        sample_rows(rows, verifiers, exhaustive=True),
        {waves: sample_rows(rows, verifiers, waves=list(waves)) for waves in compositions(NUM_SAMPLES)},
    )


def print_savings(comparison: Comparison) -> None:
    """Prints the tokens that stopping early saved, by the number of right answers among eight."""
    print("  right of 8   rows   completion tokens: all eight  adaptive  saved   cost saved")
    names_by_bin: dict[str, list[str]] = defaultdict(list)
    for name, decision in comparison.exhaustive.decisions.items():
        names_by_bin["no label" if decision is None else str(decision.num_right)].append(name)
    for label in [*sorted(names_by_bin), "all"]:
        names = list(comparison.exhaustive.tokens) if label == "all" else names_by_bin[label]
        completion, costs = [], []
        for way in (comparison.exhaustive, comparison.learned[True]):
            completion.append(sum(way.tokens[name].completion for name in names))
            costs.append(sum(way.tokens[name].cost(caches_prompts=True) for name in names))
        print(
            f"  {label:>10} {len(names):>6} {completion[0]:>29,} {completion[1]:>9,} "
            f"{1 - completion[1] / completion[0]:>6.1%} {1 - costs[1] / costs[0]:>12.1%}"
        )


def print_ratios(compared: Sequence[Comparison], *, caches_prompts: bool) -> None:
    """Prints what each way costs beside the best fixed waves of its draw, on average and at worst."""
    first = compared[0]
    best, planned = (find(caches_prompts=caches_prompts) for find in (first.best, first.planned))
    print(f"  prompts of later calls are {'in the prefix cache' if caches_prompts else 'computed again'}:")
    print(f"    best waves known afterwards: {best}; by the dynamic programme: {planned}")
    ways = {
        "learned while running": [each.learned[caches_prompts] for each in compared],
        "dynamic programme": [each.fixed[each.planned(caches_prompts=caches_prompts)] for each in compared],
        "8": [each.fixed[8,] for each in compared],
        "1, 1, 2, 4": [each.fixed[1, 1, 2, 4] for each in compared],
        "one by one": [each.fixed[ONE_BY_ONE] for each in compared],
    }
    print("    cost in that of the best waves      mean   worst")
    for title, sampled in ways.items():
        ratios = [
            way.cost(caches_prompts=caches_prompts)
            / each.fixed[each.best(caches_prompts=caches_prompts)].cost(caches_prompts=caches_prompts)
            for each, way in zip(compared, sampled, strict=True)
        ]
        print(f"      {title:<28} {statistics.mean(ratios):>7.3f} {max(ratios):>7.3f}")


def report(name: str, draws: Sequence[Sequence[RecordedRow]], verifiers: VerifierPool) -> None:
    """Prints everything about one source."""
    compared = [compare(rows, verifiers) for rows in draws]
    num_rows, num_identical = sum(map(len, draws)), sum(each.num_identical for each in compared)
    print(f"\n{name}: {len(draws[0])} rows, {len(draws)} draws")
    print(f"  labels identical, adaptive and exhaustive: {num_identical} of {num_rows}")
    if len(draws[0]) < MIN_ROWS:
        print("  too few rows to learn from: costs are not compared")
        return
    print(f"  no right answer among the first k, k = 0 to 8: {', '.join(f'{s:.2f}' for s in compared[0].survival)}")
    print_savings(compared[0])
    for caches_prompts in (True, False):
        print_ratios(compared, caches_prompts=caches_prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mathvision", type=Path, help="folder with problems.jsonl, responses.jsonl and images/")
    parser.add_argument("--run", type=Path, help="work folder of a curation")
    parser.add_argument("--draws", type=int, default=5, help="orders of rows (and answers) tried")
    parsed = parser.parse_args()
    if parsed.mathvision is None and parsed.run is None:
        parser.error("nothing to replay: give --mathvision, --run or both")
    with RememberingPool(configuration()) as verifiers:
        if parsed.mathvision is not None:
            report("MATH-Vision", [read_mathvision(parsed.mathvision, seed=s) for s in range(parsed.draws)], verifiers)
        if parsed.run is not None:
            for source, rows in read_run(parsed.run).items():
                num_whole = sum(len(row.replies) >= NUM_SAMPLES for row in rows)
                draws = [random.Random(seed).sample(rows, k=len(rows)) for seed in range(parsed.draws)]
                report(f"{source} ({num_whole} rows with eight stored replies)", draws, verifiers)


if __name__ == "__main__":
    main()
