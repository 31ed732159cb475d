"""Evaluation: benchmarks asked in the three modes, on a checkpoint or an OpenAI-compatible endpoint.

The file contract is that of `training.programs`. Written are `table.md`, `accuracy.{png,svg}` (over mean output tokens)
and `thinking_rate.{png,svg}` (by benchmark), `replies.jsonl` (every reply with its verdict), `quarantined.jsonl` (rows
that could not be asked, with reasons) and, last, `result.json`. Every reply is in the journal `replies` before it
counts, under a key of all that shaped it (the checkpoint's bytes, question, images, mode, settings): a run started
again asks only what is missing, and a changed verifier scores anew without a question asked.

    python -m training.evaluate --config evaluate.yaml
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from pydantic import Field, model_validator

from corpus.storage import append_json_line, replacing, storage_errors, write_text
from judges.answers import VerifierPool
from schemas.config import EndpointConfig, ImageLimits, VerificationConfig
from schemas.errors import Interrupted, TrainingError
from schemas.requests import CallFailure, ModelIdentity, Reply, request_key
from schemas.template import ThinkingMode
from schemas.verdicts import Verdict
from sources import ImageStore
from teacher.journal import Journal
from training.answering import (
    MAX_NEW_TOKENS,
    Generation,
    answer_of,
    checkpoint_digest,
    checkpoint_replies,
    endpoint_prefixes,
    endpoint_replies,
    question_request,
    template_prefixes,
)
from training.benchmark_questions import Benchmark, BenchmarkConfig, Question, read_benchmark
from training.checkpoints import load_checkpoint
from training.evaluation_report import (
    ByMode,
    Figures,
    mean_over_benchmarks,
    plot_accuracy,
    plot_thinking_rate,
    render_table,
    write_plot,
)
from training.measures import Answer, Measures, Scored, judge_answers, measure, measure_by
from training.programs import ProgramConfig, Result, RunFolder, StopOnSignal, run_program

NO_TOPIC = "no topic"
_LOG_SECONDS = 10.0


class EvaluationConfig(ProgramConfig):
    """Settings of one evaluation."""

    model: str = Field(description="Folder or hub name of the checkpoint; with `url`, the name it is served under.")
    batch_size: int = Field(16, ge=1, description="Questions a checkpoint is asked at once.")
    bf16: bool = Field(False, description="Run a checkpoint in bfloat16.")
    url: str | None = Field(
        None,
        description="Address of an OpenAI-compatible endpoint (.../v1) to be asked in place of a checkpoint. What "
        "a call leaves open is its own: vLLM takes a checkpoint's repetition penalty unless it is served with "
        "`--generation-config vllm`.",
    )
    revision: str = Field("", description="What tells the served weights from others of the same name.")
    api_key_env: str = Field("BIMODE_API_KEY", description="Environment variable of the endpoint's key, if it has one.")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="Sent to the endpoint with every call.")
    concurrency: int = Field(64, ge=1, description="Calls to the endpoint in flight at once.")
    timeout_seconds: float = Field(1800.0, gt=0, description="Longest wait for one call.")
    max_retries: int = Field(6, ge=0, description="Retries of a call that failed for a passing reason.")
    unreachable_seconds: float = Field(120.0, ge=0, description="Give up when nothing has answered for so long.")
    max_image_pixels: int = Field(
        16384 * 28 * 28, ge=1, description="Images are reduced to so many pixels for an endpoint (Qwen2.5-VL's limit)."
    )
    benchmarks: list[BenchmarkConfig] = Field(
        description="The benchmarks, each {name, path, format, topic}; format is corpus, samples or vlmevalkit.",
        min_length=1,
    )
    modes: list[ThinkingMode] = Field(list(ThinkingMode), description="The modes: auto, long, short.", min_length=1)
    max_new_tokens: int = Field(MAX_NEW_TOKENS, ge=1, description="Longest reply in tokens (the paper's 8,192).")
    max_questions: int | None = Field(None, ge=1, description="Rows drawn at random from each benchmark; None: all.")
    seed: int = Field(0, description="Seed of that draw.")
    with_instruction: bool = Field(
        False,
        description="End each question with the pipeline's sentence on where the final answer goes; for models that "
        "were not trained on a corpus, whose questions do not have it.",
    )
    verification: VerificationConfig = Field(VerificationConfig(), description="How replies are compared.")
    images: ImageLimits = Field(ImageLimits(), description="Bounds checked before an image is decoded.")

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationConfig:
        for what, names in (("benchmark names", [b.name for b in self.benchmarks]), ("modes", self.modes)):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} must differ, got {', '.join(names)}")
        return self

    @property
    def generation(self) -> Generation:
        return Generation(self.max_new_tokens, self.with_instruction)

    def endpoint(self, url: str) -> EndpointConfig:
        """Returns the endpoint at an address, with the settings of this evaluation."""
        return EndpointConfig(
            model=self.model,
            url=url,
            revision=self.revision,
            api_key_env=self.api_key_env,
            extra_body=self.extra_body,
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            unreachable_seconds=self.unreachable_seconds,
            max_image_pixels=self.max_image_pixels,
        )


@dataclass(slots=True)
class Progress:
    """Counts replies over all benchmarks and modes, and says so on stderr and in metrics.jsonl.

    num_steps: replies that will have come at the end. num_stored: those that an earlier run had left. num_tokens: what
    the model generated in this run.
    """

    path: Path
    num_steps: int
    what: str = ""
    step: int = 0
    num_stored: int = 0
    num_failures: int = 0
    num_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    last_logged: float = field(default_factory=time.monotonic)

    def add(self, reply: Reply | CallFailure, is_stored: bool) -> None:
        """Counts a reply; is_stored: it was there from an earlier run. Raises StorageError."""
        self.step += 1
        self.num_stored += is_stored
        if isinstance(reply, CallFailure):
            self.num_failures += 1
        elif not is_stored:
            self.num_tokens += reply.completion_tokens
        if time.monotonic() - self.last_logged >= _LOG_SECONDS:
            self.log({})

    def log(self, values: Mapping[str, float | None]) -> None:
        """Writes a line of metrics.jsonl with these values beside the counts. Raises StorageError."""
        self.last_logged = time.monotonic()
        seconds = self.last_logged - self.started
        line = {
            "step": self.step,
            "num_steps": self.num_steps,
            "seconds": round(seconds, 3),
            "num_stored": self.num_stored,
            "num_failures": self.num_failures,
            "output_tokens": self.num_tokens,
            "tokens_per_second": self.num_tokens / seconds if seconds else 0.0,
            **values,
        }
        append_json_line(self.path, line)
        print(f"{self.what} reply {self.step}/{self.num_steps} {seconds:.0f} s", file=sys.stderr, flush=True)


class Answerer(Protocol):
    """Whoever answers: a checkpoint or an endpoint."""

    def answers(self, questions: Sequence[Question], mode: ThinkingMode, progress: Progress) -> list[Answer] | None:
        """Returns the answers in order, from the journal where it has them; None if a signal asked to stop."""


class CheckpointAnswerer:
    """Answers with a checkpoint. Raises TrainingError: it is missing, or its template does not know the modes."""

    def __init__(self, config: EvaluationConfig, journal: Journal, stop: StopOnSignal) -> None:
        self._model, self._processor = load_checkpoint(config.model, bf16=config.bf16)
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._prefixes = template_prefixes(self._processor, config.modes)
        self._generation, self._batch_size = config.generation, config.batch_size
        self._journal, self._stop = journal, stop
        self._digest, self._is_bf16 = checkpoint_digest(config.model), config.bf16

    def _key(self, question: Question, mode: ThinkingMode) -> str:
        shaped_by = {"thinking_mode": str(mode), "bf16": self._is_bf16}
        request = question_request(question.sample, self._generation)
        return request_key(request, ModelIdentity("checkpoint", self._digest, shaped_by))

    def answers(self, questions: Sequence[Question], mode: ThinkingMode, progress: Progress) -> list[Answer] | None:
        replies: dict[int, Reply | CallFailure] = {}
        for index, question in enumerate(questions):
            stored = self._journal.lookup(self._key(question, mode))
            if stored is not None:
                replies[index] = stored
                progress.add(stored, True)
        missing = [index for index in range(len(questions)) if index not in replies]
        asked = checkpoint_replies(
            self._model,
            self._processor,
            [questions[index] for index in missing],
            mode,
            generation=self._generation,
            batch_size=self._batch_size,
            should_stop=lambda: self._stop.received is not None,
        )
        for place, reply in asked:
            question = questions[missing[place]]
            if isinstance(reply, Reply):
                request = question_request(question.sample, self._generation)
                self._journal.append(self._key(question, mode), request, reply)
            replies[missing[place]] = reply
            progress.add(reply, False)
        if len(replies) < len(questions):
            return None
        return [answer_of(replies[index], self._prefixes[mode]) for index in range(len(questions))]


class EndpointAnswerer:
    """Answers through an endpoint. Raises TeacherError: it does not answer, lacks the model, or ignores the modes."""

    def __init__(
        self,
        config: EvaluationConfig,
        endpoint: EndpointConfig,
        journal: Journal,
        stop: StopOnSignal,
        store: ImageStore,
    ):
        self._prefixes = asyncio.run(endpoint_prefixes(endpoint, config.modes))
        self._endpoint, self._generation = endpoint, config.generation
        self._journal, self._stop, self._store = journal, stop, store

    def answers(self, questions: Sequence[Question], mode: ThinkingMode, progress: Progress) -> list[Answer] | None:
        replies = asyncio.run(
            endpoint_replies(
                self._endpoint,
                self._journal,
                self._store,
                questions,
                mode,
                generation=self._generation,
                on_reply=progress.add,
                should_stop=lambda: self._stop.received is not None,
            )
        )
        return None if replies is None else [answer_of(reply, self._prefixes[mode]) for reply in replies]


@dataclass(frozen=True, slots=True)
class Row:
    """What counts of one reply, and the groups it belongs to."""

    benchmark: str
    topic: str
    category: str | None
    mode: ThinkingMode
    scored: Scored


def evaluate(config: EvaluationConfig) -> Result:
    """Evaluates as configured and returns the content of result.json.

    Raises SourceError: a benchmark cannot be read or has no question that can be asked. TrainingError: the checkpoint
    is missing or does not know the modes. TeacherError: the endpoint cannot be used. StorageError: the disk fails.
    Interrupted: a signal asked to stop; what was answered stays.
    """
    folder = RunFolder(config.output)
    finished = folder.result()
    if finished is not None and finished["config"] == json.loads(config.model_dump_json()):
        return finished  # with other settings it is made anew; what was asked before is in the journal
    with storage_errors(folder.path, "write to"):
        folder.path.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    store = ImageStore(folder.path / "images", config.images)
    benchmarks = [
        read_benchmark(benchmark, store=store, max_questions=config.max_questions, seed=config.seed)
        for benchmark in config.benchmarks
    ]
    _write_lines(
        folder.path / "quarantined.jsonl",
        ({**asdict(fate), "exit": str(fate.exit)} for benchmark in benchmarks for fate in benchmark.quarantined),
    )
    stop = StopOnSignal()
    rows: list[Row] = []
    with (
        stop.listening(),
        Journal(folder.path / "replies") as journal,
        VerifierPool(config.verification) as verifiers,
        replacing(folder.path / "replies.jsonl") as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        answerer = _answerer(config, journal, stop, store)
        num_steps = len(config.modes) * sum(len(benchmark.questions) for benchmark in benchmarks)
        progress = Progress(folder.metrics, num_steps)
        for benchmark in benchmarks:
            for mode in config.modes:
                rows += _ask(benchmark, mode, answerer, verifiers, progress, file)
    return _finish(folder, config, benchmarks, rows, seconds=time.monotonic() - started)


def _answerer(config: EvaluationConfig, journal: Journal, stop: StopOnSignal, store: ImageStore) -> Answerer:
    if config.url is None:
        return CheckpointAnswerer(config, journal, stop)
    return EndpointAnswerer(config, config.endpoint(config.url), journal, stop, store)


def _ask(
    benchmark: Benchmark,
    mode: ThinkingMode,
    answerer: Answerer,
    verifiers: VerifierPool,
    progress: Progress,
    file: IO[str],
) -> list[Row]:
    """Returns what counts of the answers to a benchmark in a mode, and writes them.

    Raises Interrupted: a signal asked to stop. TrainingError: no question got a reply, so there is nothing to measure.
    """
    progress.what = f"{benchmark.name} {mode}"
    answers = answerer.answers(benchmark.questions, mode, progress)
    if answers is None:
        progress.log({})
        raise Interrupted("stopped by a signal; the replies so far are kept, and the same command goes on from there")
    if all(answer.failure is not None for answer in answers):
        reason = answers[0].failure
        raise TrainingError(f"{progress.what}: none of {len(answers)} questions got a reply; the first: {reason}")
    rows = []
    judged = judge_answers(benchmark.questions, answers, verifiers)
    for question, answer, (scored, verdict) in zip(benchmark.questions, answers, judged, strict=True):
        file.write(json.dumps(_reply_record(question, mode, answer, scored, verdict)) + "\n")
        topic = str(question.sample.topic) if question.sample.topic else NO_TOPIC
        rows.append(Row(benchmark.name, topic, question.category, mode, scored))
    measures = measure(row.scored for row in rows)
    progress.log(
        {
            f"{benchmark.name}/{mode}/accuracy": measures.accuracy.share,
            f"{benchmark.name}/{mode}/thinking_rate": measures.thinking_rate.share,
        }
    )
    return rows


def _reply_record(
    question: Question, mode: ThinkingMode, answer: Answer, scored: Scored, verdict: Verdict
) -> dict[str, Any]:
    sample = question.sample
    return {
        "benchmark": sample.source,
        "id": sample.id,
        "source_id": sample.source_id,
        "origin": sample.origin,
        "mode": str(mode),
        "topic": sample.topic and str(sample.topic),
        "category": question.category,
        "question": sample.question,
        "choices": list(sample.choices),
        "references": [answer for answer in (sample.answer, *question.other_answers) if answer is not None],
        "completion": answer.completion,
        "output_tokens": answer.num_tokens,
        "is_truncated": answer.is_truncated,
        "has_thought": scored.has_thought,
        "has_reference": scored.has_reference,
        "outcome": str(verdict.outcome),
        "extracted": verdict.extracted,
        "failure": verdict.failure and str(verdict.failure),
        "detail": verdict.detail,
    }


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _finish(
    folder: RunFolder, config: EvaluationConfig, benchmarks: Sequence[Benchmark], rows: Sequence[Row], *, seconds: float
) -> Result:
    """Writes table, plots and, last, the result."""
    figures = Figures(
        benchmarks=_by_mode((row.benchmark, row) for row in rows),
        topics=_by_mode((row.topic, row) for row in rows),
        overall={mode: measure(row.scored for row in rows if row.mode is mode) for mode in config.modes},
    )
    write_text(folder.path / "table.md", render_table(figures))
    write_plot(plot_accuracy(figures), folder.path, "accuracy")
    write_plot(plot_thinking_rate(figures), folder.path, "thinking_rate")
    return folder.finish(
        {
            "program": "evaluate",
            "benchmarks": {benchmark.name: _benchmark_record(benchmark, figures, rows) for benchmark in benchmarks},
            "topics": {name: _records(by_mode) for name, by_mode in figures.topics.items()},
            "overall": _records(figures.overall),
            "mean_over_benchmarks": {str(mode): asdict(mean_over_benchmarks(figures, mode)) for mode in config.modes},
            "seconds": seconds,
            "config": config.model_dump(mode="json"),
        }
    )


def _benchmark_record(benchmark: Benchmark, figures: Figures, rows: Sequence[Row]) -> dict[str, Any]:
    categories = _by_mode(
        (row.category, row) for row in rows if row.benchmark == benchmark.name and row.category is not None
    )
    return {
        "num_rows": benchmark.num_rows,
        "num_questions": len(benchmark.questions),
        "num_not_drawn": benchmark.num_not_drawn,
        "num_quarantined": len(benchmark.quarantined),
        "quarantined": benchmark.reasons,
        "modes": _records(figures.benchmarks[benchmark.name]),
        "categories": {name: _records(by_mode) for name, by_mode in categories.items()},
    }


def _by_mode(named: Iterable[tuple[str, Row]]) -> dict[str, ByMode]:
    """Returns the measures of rows by name and mode."""
    groups: dict[str, dict[ThinkingMode, Measures]] = {}
    for (name, mode), measures in measure_by(((name, row.mode), row.scored) for name, row in named).items():
        groups.setdefault(name, {})[mode] = measures
    return dict(groups)


def _records(by_mode: ByMode) -> dict[str, Any]:
    return {str(mode): measures.to_record() for mode, measures in by_mode.items()}


def main() -> None:
    run_program(__doc__, EvaluationConfig, evaluate)


if __name__ == "__main__":
    main()
