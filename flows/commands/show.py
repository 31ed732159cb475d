"""`bimode show`: everything known of one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import JsonOption, WorkdirOption, examples, print_json, user_errors
from flows.commands.terminal import TEXT_CHARACTERS, columns, fields, shown_line, shown_text
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from corpus.lookup import FoundRow
    from flows.row_history import RowHistory
    from flows.row_replies import StageReplies, StoredReply
    from schemas.fates import Fate

EXAMPLES = examples(
    "bimode show 5709932436270ff4 --config my.yaml",
    "bimode show 'exams:exams.jsonl#17' --config my.yaml --full",
    "bimode show q-0017 --config my.yaml --images row-images",
    "bimode show 5709932436270ff4 --corpus runs/my-corpus/corpus --json",
)

_NUM_CANDIDATES = 10
_EXTENSIONS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg"}


def show(
    row: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="The row: its id or the first four or more digits of it, its origin (source:file#17), or the id that "
            "it has in its source.",
        ),
    ],
    config: Annotated[Path | None, typer.Option("--config", help="The run configuration, a YAML file.")] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Look at the versions in this corpus folder, or address, alone.")
    ] = None,
    workdir: WorkdirOption = None,
    images: Annotated[Path | None, typer.Option(help="Write the row's images into this folder.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Cut no text.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show everything known of one row: its way through the stages, replies and verdicts, where it is published.

    Verdicts are those that the judges give today, from the stored replies; nothing is asked. Works while a run is under
    way, and after one that was killed.
    """
    with user_errors():
        history = _history(row, config, corpus, workdir)
        written = _write_images(history, images) if images else []
        if as_json:
            print_json({**_record(history), "written_images": [str(path) for path in written]})
            return
        lines = _text(history, None if full else TEXT_CHARACTERS)
        print("\n\n".join("\n".join(section) for section in lines))
        for path in written:
            print(f"wrote {path}")


def _history(name: str, config: Path | None, corpus: str | None, workdir: str | None) -> RowHistory:
    """Returns what is known of the one row that a name means. Raises ConfigError: it means none, or several."""
    from corpus.places import is_address  # noqa: PLC0415 - what reads data takes seconds to import
    from corpus.remote import local_version  # noqa: PLC0415
    from flows.row_history import (  # noqa: PLC0415
        corpus_history,
        find_in_corpus,
        find_in_run,
        run_history,
    )
    from flows.run_config import corpus_folder, load_run  # noqa: PLC0415

    if (config is None) == (corpus is None):
        raise ConfigError("name either a run by --config or a corpus folder by --corpus")
    if config is not None:
        settings = load_run(str(config), workdir=workdir)
        folder = corpus_folder(settings)
        found = find_in_run(settings, name)
        if found:
            return run_history(settings, _one_row(name, found))
    else:
        assert corpus is not None
        folder = local_version(corpus).parent if is_address(corpus) else Path(corpus)
    # Of a row that a source lost long ago, only the versions know.
    found = find_in_corpus(folder, name)
    if not found:
        where = f"in {corpus}" if config is None else f"among the rows that were read, nor in {folder}"
        raise ConfigError(f"there is no row {shown_line(name)} {where}")
    return corpus_history(folder, _one_row(name, found)[0])


def _one_row(name: str, found: Sequence[FoundRow]) -> Sequence[FoundRow]:
    """Returns the rows found if they are one, or several of equal content. Raises ConfigError."""
    if len({row.id or row.origin for row in found}) == 1:
        return found
    listed = [
        f"  {row.id or '(no id)':32}  {shown_line(row.origin, 80)}  {shown_line(row.question, 60)}"
        for row in found[:_NUM_CANDIDATES]
    ]
    more = "" if len(found) <= _NUM_CANDIDATES else "\n  and more"
    raise ConfigError(f"{shown_line(name)} can mean several rows; name one by its id:\n" + "\n".join(listed) + more)


def _write_images(history: RowHistory, folder: Path) -> list[Path]:
    """Writes the images of a row, named by their sha256, and returns the files. Raises StorageError."""
    from corpus.storage import write_bytes  # noqa: PLC0415
    from flows.row_history import read_image  # noqa: PLC0415

    written = []
    for image in history.images:
        content = read_image(history, image)
        extension = next((name for start, name in _EXTENSIONS.items() if content.startswith(start)), "img")
        written.append(folder / f"{image.sha256[:16]}.{extension}")
        write_bytes(written[-1], content)
    return written


def _record(history: RowHistory) -> dict[str, Any]:
    """Returns a history as plain JSON-able values."""
    from schemas.samples import sample_to_record  # noqa: PLC0415

    return {
        "id": history.id,
        "origin": history.origin,
        "same_id": list(history.same_id),
        "sample": history.sample and sample_to_record(history.sample),
        "images": [
            {name: getattr(image, name) for name in ("sha256", "width", "height", "num_bytes")}
            for image in history.images
        ],
        "steps": [
            {
                "stage": step.stage,
                "outcome": step.outcome,
                "said": step.said,
                "file": step.file and str(step.file),
                "row": step.row,
                "is_current": step.is_current,
                "fate": step.fate and asdict(step.fate),
            }
            for step in history.steps
        ],
        "replies": [reply.to_record() for stage in history.replies for reply in stage.replies],
        "recomputed": [_result_record(stage) for stage in history.replies],
        "resembles": history.resembles
        and {name: getattr(history.resembles, name) for name in ("id", "origin", "question")},
        "published": [asdict(publication) for publication in history.published],
        "record": history.record,
        "fates": [{"version": version, **asdict(fate)} for version, fate in history.fates],
        "costs": [{**asdict(key), **usage.to_record()} for key, usage in history.costs.items()],
        "cost": history.cost and asdict(history.cost),
    }


def _result_record(done: StageReplies) -> dict[str, Any]:
    result = done.result
    return {
        "stage": done.stage,
        "problem": done.problem,
        "decision": result and result.decision and asdict(result.decision),
        "reasoning": result and result.reasoning,
        "answer": result and result.answer,
    }


def _text(history: RowHistory, limit: int | None) -> Iterator[list[str]]:
    """Yields the sections of a history, fit for a terminal. limit: characters shown of a text, None for all."""
    yield ["ROW", *fields(list(_row_fields(history, limit)), indent=2)]
    if history.images:
        yield ["IMAGES", *(f"  {line}" for line in _image_lines(history))]
    if history.steps:
        yield ["STAGES", *fields([(step.stage, _step_words(step)) for step in history.steps], indent=2)]
    for version, fate in history.fates:
        yield [f"LEFT, says {shown_line(version)}", *fields(_fate_fields(fate), indent=2)]
    if history.resembles:
        yield ["RESEMBLES", *fields(_other_fields(history.resembles), indent=2)]
    for done in history.replies:
        if done.replies:
            yield [f"REPLIES OF {done.stage}", *_reply_lines(done, limit)]
    if history.record:
        yield ["IN THE CORPUS", *fields(_record_fields(history, limit), indent=2)]
    if history.published:
        header = ["version", "shard", "row", "since", "mark"]
        rows = [
            [
                *map(shown_line, (p.version, p.shard, f"{p.row:,}", p.since)),
                shown_line(f"{p.mark} since {p.marked_since}") if p.mark else "-",
            ]
            for p in history.published
        ]
        yield ["PUBLISHED", *(f"  {line}" for line in columns(header, rows, num_left=2))]
    elif history.id is not None:
        yield ["PUBLISHED", "  in no version"]
    if history.costs:
        yield ["COST OF ITS REPLIES", *(f"  {line}" for line in _cost_lines(history))]


def _row_fields(history: RowHistory, limit: int | None) -> Iterator[tuple[str, str]]:
    yield "id", history.id or "none: it never became a sample"
    yield "origin", shown_line(history.origin)
    if history.same_id:
        others = [shown_line(origin) for origin in history.same_id]
        yield "same content", "\n".join([*others[:10], *(["and more"] if len(others) > 10 else [])])
    sample = history.sample
    if sample is None:
        yield "question", shown_text((history.record or {}).get("question") or history.question, limit)
        return
    yield "source", shown_line(sample.source) + (f", own id {shown_line(sample.source_id)}" if sample.source_id else "")
    yield "licence", shown_line(sample.licence or "not stated")
    yield "kind", f"{sample.kind or 'not routed'}, answer type {sample.answer_type or '-'}, topic {sample.topic or '-'}"
    yield "question", shown_text(sample.question, limit)
    if sample.choices:
        options = [f"{letter}. {shown_line(choice, limit)}" for letter, choice in _lettered(sample.choices)]
        yield "options", "\n".join(options)
    yield "reference", "none" if sample.answer is None else shown_text(sample.answer, limit)


def _lettered(choices: Sequence[str]) -> Iterator[tuple[str, str]]:
    from schemas.question import OPTION_LETTERS  # noqa: PLC0415

    for number, choice in enumerate(choices):
        yield OPTION_LETTERS[number] if number < len(OPTION_LETTERS) else str(number + 1), choice


def _image_lines(history: RowHistory) -> list[str]:
    lines = []
    for image in history.images:
        size = f"{image.width} x {image.height} pixels, " if image.width else ""
        weight = "not in the image store any more" if image.num_bytes is None else f"{image.num_bytes:,} bytes"
        lines.append(f"{shown_line(image.sha256)}  {size}{weight}")
    return lines


def _step_words(step: Any) -> str:
    words = step.outcome + (f": {shown_text(step.said)}" if step.said else "")
    if step.file is not None:
        words += f"\n{step.file.parent.name}/{step.file.name}, row {step.row:,}"
    return words if step.is_current else f"{words}\ndone under other settings than those of now"


def _fate_fields(fate: Fate) -> list[tuple[str, str]]:
    return [
        ("stage", shown_line(fate.stage)),
        ("as", f"{fate.exit}, {shown_line(fate.reason)}"),
        ("detail", shown_text(fate.detail)),
        *([("resembles", shown_line(fate.resembles))] if fate.resembles else []),
    ]


def _other_fields(other: FoundRow) -> list[tuple[str, str]]:
    return [
        ("id", shown_line(str(other.id))),
        ("origin", shown_line(other.origin)),
        ("question", shown_text(other.question)),
    ]


def _reply_lines(done: StageReplies, limit: int | None) -> Iterator[str]:
    """Yields the replies of a stage with what is read in each, and what they come to now."""
    for stored in done.replies:
        reply = stored.reply
        title = f"{stored.purpose} {stored.index}: {_reading(stored)}"
        yield f"  {title}{'' if stored.is_used else '  (not needed under the settings of now)'}"
        tokens = f"{reply.completion_tokens:,} tokens for {reply.prompt_tokens:,}"
        facts = [shown_line(reply.finish_reason), tokens, f"{reply.seconds:.1f} s", shown_line(reply.model)]
        details = [("by", ", ".join([*facts, *([stored.stored_at] if stored.stored_at else [])]))]
        if reply.reasoning:
            details.append(("thought", shown_text(reply.reasoning, limit)))
        details.append(("text", shown_text(reply.text, limit)))
        yield from fields(details, indent=4)
    yield from fields([("now", _result_words(done))], indent=2)


def _reading(stored: StoredReply) -> str:
    verdict = stored.verdict
    if verdict is None:
        return shown_line(stored.finding) if stored.finding else "stored"
    read = f", read as {shown_line(verdict.extracted, 80)!r}" if verdict.extracted is not None else ""
    why = ", ".join(part for part in (verdict.failure, shown_line(verdict.detail)) if part)
    return f"{verdict.outcome}{read}{f' ({why})' if why else ''}"


def _result_words(done: StageReplies) -> str:
    from corpus.excerpts import evidence_sentence  # noqa: PLC0415

    result = done.result
    if result is None:
        return f"leaves: {shown_text(done.problem)}"
    if done.stage in ("difficulty", "performance") and result.decision:
        return f"{result.decision.mode}; {evidence_sentence(asdict(result.decision))}"
    if done.stage == "reasoning" and result.reasoning:
        return f"a chain of thought of {len(result.reasoning.split())} words"
    if done.stage == "answers":
        return f"the answer is {shown_line(result.answer or '')}"
    sample = result.sample
    return f"{sample.kind}, answer type {sample.answer_type}, topic {sample.topic}"


def _record_fields(history: RowHistory, limit: int | None) -> list[tuple[str, str]]:
    from corpus.excerpts import evidence_sentence  # noqa: PLC0415

    record = history.record or {}
    return [
        ("mode", f"{shown_line(str(record['mode']))}; {evidence_sentence(dict(record))}"),
        *([("thought", shown_text(record["reasoning"], limit))] if record["reasoning"] else []),
        ("answer", shown_text(str(record["answer"]), limit)),
        ("teacher", shown_line(str(record["teacher"]))),
        *([("reasoner", shown_line(record["reasoner"]))] if record["reasoner"] else []),
        ("recipe", shown_line(str(record["recipe"]))),
        ("licence", shown_line(record["licence"] or "not stated")),
    ]


def _cost_lines(history: RowHistory) -> list[str]:
    header = ["stage, purpose", "calls", "replies", "prompt tokens", "completion tokens", "seconds"]
    rows = [
        [
            f"{key.stage}, {key.purpose}",
            *(f"{number:,}" for number in (usage.num_calls, usage.num_replies)),
            *(f"{number:,}" for number in (usage.prompt_tokens, usage.completion_tokens)),
            f"{usage.seconds:.1f}",
        ]
        for key, usage in history.costs.items()
    ]
    lines = columns(header, rows)
    if history.cost is not None:
        lines.append(f"at the run's prices: {history.cost.amount:.6g}{'' if history.cost.is_whole else ' or more'}")
    return lines
