"""Labels under faults: the same curation with a teacher that answers, and with one of whose calls a fifth goes wrong.

    python -m benchmarks.faults [--rows 300] [--share 0.2] [--seed 0]

The calls go wrong in every way of the fault server's, in equal parts: refused and reset connections, hangs, bodies that
never end, statuses, damaged and missing JSON, answers cut by their length or outside of the schema. Besides, the engine
is restarted again and again, and one card kills it whenever it is asked. Left out are 401, 403 and 404: they mean that
the set-up is wrong and stop the run, as they should. Three claims are tested:

- Every stored reply is the teacher's own word. A server may cut an answer or leave the schema, which nobody can tell
  from a teacher that does so; such replies are counted, and they may only be unscored or asked for once more.
- A row none of whose calls met a fault that lasts (`LASTING`) ends as in the faultless run, evidence included. One that
  did has the same label, though other samples may speak for it, or is quarantined for one of `REASONS`.
- No row is dropped for a failed call: a drop is a decision, and a failure decides nothing.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.cards import (
    MODEL,
    card_number,
    configuration,
    curate_plainly,
    table_lines,
    teacher_answer,
    write_cards,
)
from schemas.config import RunConfig
from schemas.fates import Exit
from teacher.fault_server import (
    Body,
    Call,
    EngineModel,
    Fault,
    FaultSchedule,
    FaultServer,
    Restarts,
    completion,
    question_text,
)
from teacher.journal import JournalRecord, read_journal

SET_UP_FAULTS = frozenset({Fault.UNAUTHORISED, Fault.FORBIDDEN, Fault.NOT_FOUND})
KINDS = tuple(kind for kind in Fault if kind not in SET_UP_FAULTS | {Fault.KILL})
LASTING = frozenset(
    {Fault.BAD_REQUEST, Fault.TOO_LARGE, Fault.UNPROCESSABLE, Fault.LENGTH, Fault.OFF_SCHEMA, Fault.KILL}
)
"""What a retry of the same call does not undo: the server refuses it, or says something else, or dies of it."""
UNREADABLE = frozenset({"routing_unreadable", "topic_unreadable", "difficulty_unreadable"})
REASONS = frozenset({"teacher_rejected", "teacher_crashed"}) | UNREADABLE
"""Why faults may quarantine a row: the server refused it, its engine died of it, or left the schema twice.

Passing faults leave no row behind, as each request meets fewer of them than it has retries.
"""
POISON_CARD = 13
LABEL_COLUMNS = (
    "mode", "heuristic", "num_right", "num_scored", "num_sampled", "probability", "is_audit", "answer", "reasoning",
)  # fmt: skip
EVIDENCE_COLUMNS = frozenset({"num_right", "num_scored", "num_sampled", "reasoning"})
"""What may rest on other samples where a fault lasted."""

AS_SAID, CUT, OFF_SCHEMA, FOREIGN = "as said", "cut by its length", "outside of the schema", "not the teacher's"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run made of its rows, by origin. labels: of rows in the corpus; fates: (exit, reason) of the others."""

    labels: Mapping[str, Mapping[str, Any]]
    fates: Mapping[str, tuple[str, str]]


@dataclass(slots=True)
class Comparison:
    """The rows of the faulty run beside those of the faultless one, by what became of them.

    num_touched: rows that met a fault that lasts. num_other_evidence: of those, rows with the same label on other
    samples. quarantined: by reason. replies, faults: by kind. wrong: what must not happen, in words.
    """

    num_rows: int = 0
    num_touched: int = 0
    num_same: int = 0
    num_other_evidence: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0
    num_deaths: int = 0
    num_poisoned_calls: int = 0
    wrong: list[str] = field(default_factory=list)


def poison(body: Body) -> Fault | None:
    """Returns the fault of the card that kills the engine."""
    return Fault.KILL if card_number(question_text(body)) == POISON_CARD else None


RESTART_CALLS = range(100, 10_000, 200)


def compare_runs(
    folder: Path,
    *,
    num_rows: int,
    share: float,
    seed: int,
    timeout_seconds: float = 2.0,
    restart_calls: Sequence[int] = RESTART_CALLS,
) -> Comparison:
    """Curates the same cards without and with faults, below a folder, and compares what became of every row.

    restart_calls: numbers of the calls at which the engine is restarted.
    """
    cards = write_cards(folder / "cards", num_rows)
    with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
        faultless = _outcome(configuration(cards, folder / "faultless", server.url))
    schedule = FaultSchedule(share, KINDS, seed, persistent=poison, drip_seconds=0.004)
    with FaultServer(
        teacher_answer,
        models=[MODEL],
        faults=schedule,
        engine=EngineModel(latency_seconds=0.02),
        restarts=Restarts(at_calls=restart_calls, down_seconds=0.3),
    ) as server:
        config = configuration(
            cards,
            folder / "faulty",
            server.url,
            teacher={"timeout_seconds": timeout_seconds},
            max_quarantine_share=1.0,
        )
        faulty = _outcome(config)
    compared = Comparison(num_calls=server.num_calls, num_deaths=server.num_deaths)
    compared.faults.update(str(call.fault) for call in server.calls if call.fault is not None)
    compared.num_poisoned_calls = sum(poison(call.body) is not None for call in server.calls)
    touched = {_origin(call) for call in server.calls if call.fault in LASTING}
    _look_at_replies(config, compared)
    compare_rows(faultless, faulty, touched, compared)
    return compared


def _origin(call: Call) -> str:
    """Returns the origin of the row that a call is about."""
    number = card_number(question_text(call.body))
    assert number is not None, call
    return f"cards:cards.jsonl#{number}"


def _outcome(config: RunConfig) -> Outcome:
    published = curate_plainly(config)
    rows: list[dict[str, Any]] = []
    for path in sorted((published.folder / "data").rglob("*.parquet")):
        rows += pq.read_table(path, columns=["origin", *LABEL_COLUMNS]).to_pylist()
    fates = pq.read_table(published.folder / "fates.parquet").to_pylist()
    return Outcome(
        {row["origin"]: {name: row[name] for name in LABEL_COLUMNS} for row in rows},
        {fate["origin"]: (fate["exit"], fate["reason"]) for fate in fates},
    )


def _look_at_replies(config: RunConfig, compared: Comparison) -> None:
    """Counts the stored replies by what they are."""
    for folder in sorted((Path(config.workdir) / "journals").glob("*/*")):
        for record in read_journal(folder):
            kind = reply_kind(record)
            compared.replies[kind] += 1
            if kind == FOREIGN:
                compared.wrong.append(f"a reply to {record.purpose} is not the teacher's: {record.reply.text!r:.200}")


def reply_kind(record: JournalRecord) -> str:
    """Returns what a stored reply is, beside what the teacher says to this question and seed."""
    body: Body = {
        "model": MODEL,
        "messages": [{"role": message.role, "content": message.text} for message in record.messages],
        "seed": record.seed,
        "_purpose": record.purpose,
    }
    said = teacher_answer(body, 0)
    choice = (completion(said, body) if isinstance(said, str) else said)["choices"][0]
    text, finish_reason, reply = choice["message"]["content"], choice["finish_reason"], record.reply
    if (reply.text, reply.finish_reason) == (text, finish_reason):
        return AS_SAID
    if reply.finish_reason == "length" and text.startswith(reply.text):
        return CUT
    is_off_schema = reply.text == "neither " + " nor ".join(record.choices)
    return OFF_SCHEMA if record.choices and is_off_schema else FOREIGN


def compare_rows(faultless: Outcome, faulty: Outcome, touched: set[str], compared: Comparison) -> None:
    """Counts what became of the rows. touched: origins of those that met a fault that lasts."""
    origins = [*faultless.labels, *faultless.fates]
    compared.num_rows, compared.num_touched = len(origins), len(touched)
    lost = set(origins) ^ {*faulty.labels, *faulty.fates}
    compared.wrong += [f"{origin} is in one of the runs only" for origin in sorted(lost)]
    for origin in sorted(set(origins) - lost):
        before = faultless.labels.get(origin) or faultless.fates[origin]
        after = faulty.labels.get(origin) or faulty.fates[origin]
        if before == after:
            compared.num_same += 1
        elif isinstance(after, tuple) and after[0] == Exit.QUARANTINED and after[1] in REASONS:
            compared.quarantined[after[1]] += 1
        elif origin in touched and _differs_in_evidence_alone(before, after):
            compared.num_other_evidence += 1
        else:
            cause = "a fault lasted" if origin in touched else "no fault lasted"
            compared.wrong.append(f"{origin} ({cause}) was {before}, is {after}")


def _differs_in_evidence_alone(before: Any, after: Any) -> bool:
    if isinstance(before, tuple) or isinstance(after, tuple):
        return False
    return {name for name in LABEL_COLUMNS if before[name] != after[name]} <= EVIDENCE_COLUMNS


def render(compared: Comparison) -> str:
    """Returns the comparison as text for a terminal."""
    num_faults = compared.faults.total()
    rows: list[tuple[str, object]] = [
        ("calls to the faulty server", compared.num_calls),
        ("  that went wrong", f"{num_faults:,} ({num_faults / compared.num_calls:.1%})"),
        *((f"    {kind}", number) for kind, number in sorted(compared.faults.items())),
        ("deaths of the engine", compared.num_deaths),
        ("  calls for the card that kills it", compared.num_poisoned_calls),
        ("stored replies", compared.replies.total()),
        *((f"  {kind}", compared.replies[kind]) for kind in (AS_SAID, CUT, OFF_SCHEMA, FOREIGN)),
        ("rows", compared.num_rows),
        ("  that met a fault that lasts", compared.num_touched),
        ("  as in the faultless run, evidence included", compared.num_same),
        ("  with the same label on other samples", compared.num_other_evidence),
        *((f"  quarantined: {reason}", number) for reason, number in sorted(compared.quarantined.items())),
        ("violations", len(compared.wrong)),
    ]
    return "\n".join([*table_lines(rows), *compared.wrong[:20]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a failure became a label, a drop or a reply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="cards in each curation")
    parser.add_argument("--share", type=float, default=0.2, help="share of the calls that go wrong")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args(arguments)
    logging.getLogger("teacher").setLevel(logging.ERROR)  # that the server went away, again and again
    with tempfile.TemporaryDirectory(prefix="bimode-faults-") as folder:
        compared = compare_runs(Path(folder), num_rows=options.rows, share=options.share, seed=options.seed)
    print(render(compared))
    return 1 if compared.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
