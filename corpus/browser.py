"""The rows of a report's browser: rows of the corpus and rows that left, as one kind of thing to filter and search."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corpus.excerpts import ShownFate, ShownReply, ShownRow
from corpus.report_inputs import TOPIC_NAMES, ReportInputs
from corpus.shown_text import in_words, plain_text

GROUPS: Mapping[str, str] = {
    "think": "Thinking",
    "direct": "Direct",
    "dropped": "Dropped",
    "quarantined": "Quarantined",
}
"""The four groups of rows and their names, in order."""

FACETS: Mapping[str, str] = {
    "group": "Group",
    "topic": "Topic",
    "source": "Source",
    "kind": "Kind",
    "answer_type": "Answer type",
    "stage": "Stage",
    "reason": "Reason",
    "verdict": "Verdicts",
}
"""What rows can be filtered by, and the names of that."""

_LABEL_CHARACTERS = 80
_SAFE_ID = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True)
class BrowserRow:
    """One row of the browser.

    anchor: id of its element, to link to: the sample's id where it has one, else made from its origin. facets: its
    value of each of `FACETS`, "" for none; all of them short and free of control characters. evidence: of a row of the
    corpus. detail: why a row left. notes: further facts, name and value.
    """

    anchor: str
    group: str
    facets: Mapping[str, str]
    id: str
    origin: str
    question: str
    choices: Sequence[str]
    reference: str | None
    images: Sequence[str | None]
    num_images: int
    replies: Sequence[ShownReply]
    reasoning: str = ""
    answer: str = ""
    evidence: str = ""
    detail: str = ""
    notes: Sequence[tuple[str, str]] = ()


def browser_rows(inputs: ReportInputs) -> list[BrowserRow]:
    """Returns the rows of a report in order of their groups; no two have one anchor."""
    taken: Counter[str] = Counter()
    rows = [_corpus_row(row, inputs.replies.get(row.id, ()), taken) for row in inputs.rows]
    rows += [_left_row(shown, inputs.replies.get(shown.fate.id or "", ()), taken) for shown in inputs.fates]
    places = list(GROUPS)
    return sorted(rows, key=lambda row: places.index(row.group) if row.group in places else len(places))


def facet_values(rows: Sequence[BrowserRow]) -> dict[str, list[tuple[str, str]]]:
    """Returns the values of each facet with their names, for those facets that tell rows apart."""
    values: dict[str, list[tuple[str, str]]] = {}
    for facet in FACETS:
        present = {row.facets[facet] for row in rows} - {""}
        order = list(GROUPS) if facet == "group" else sorted(present)
        listed = [value for value in order if value in present]
        if listed and (len(listed) > 1 or any(not row.facets[facet] for row in rows)):
            values[facet] = [(value, facet_name(facet, value)) for value in listed]
    return values


def facet_name(facet: str, value: str) -> str:
    """Returns a value of a facet in words."""
    known = {"group": GROUPS, "topic": TOPIC_NAMES}.get(facet, {}).get(value)
    if known is not None:
        return known
    return value if facet == "source" else in_words(value, _LABEL_CHARACTERS)


def _corpus_row(row: ShownRow, replies: Sequence[ShownReply], taken: Counter[str]) -> BrowserRow:
    facets = {"topic": row.topic, "source": row.source, "kind": row.kind, "answer_type": row.answer_type}
    group = "think" if row.mode == "think" else "direct"
    notes = [("Licence", row.licence), ("Labelled by", row.teacher), ("Written by", row.reasoner)]
    return BrowserRow(
        anchor=_anchor(row.id, row.origin, taken),
        group=group,
        facets=_facets(facets | {"group": group, "verdict": _verdicts(replies)}),
        id=row.id,
        origin=row.origin,
        question=row.question,
        choices=row.choices,
        reference=row.reference,
        images=row.images,
        num_images=row.num_images,
        replies=replies,
        reasoning=row.reasoning,
        answer=row.answer,
        evidence=row.evidence,
        notes=[(name, value) for name, value in notes if value],
    )


def _left_row(shown: ShownFate, replies: Sequence[ShownReply], taken: Counter[str]) -> BrowserRow:
    fate = shown.fate
    facets = {"topic": shown.topic, "source": fate.source, "kind": shown.kind, "answer_type": shown.answer_type}
    facets |= {"group": str(fate.exit), "stage": fate.stage, "reason": fate.reason, "verdict": _verdicts(replies)}
    resembles = [("Resembles", fate.resembles)] if fate.resembles else []
    return BrowserRow(
        anchor=_anchor(fate.id or "", fate.origin, taken),
        group=str(fate.exit),
        facets=_facets(facets),
        id=fate.id or "",
        origin=fate.origin,
        question=shown.question or fate.question,
        choices=shown.choices,
        reference=shown.reference,
        images=shown.images,
        num_images=len(fate.images),
        replies=replies,
        detail=fate.detail,
        notes=[
            *resembles,
            *([("Similarity", f"{fate.similarity:.3f}")] if fate.similarity is not None else []),
        ],
    )


def _facets(values: Mapping[str, str]) -> dict[str, str]:
    return {name: plain_text(values.get(name, ""), _LABEL_CHARACTERS).text for name in FACETS}


def _verdicts(replies: Sequence[ShownReply]) -> str:
    """Returns the outcomes of a row's answers in a word: "all wrong", "mixed" and so on, "" if none was compared."""
    outcomes = {reply.outcome for reply in replies if reply.is_counted} & {"correct", "wrong", "unscored"}
    if not outcomes:
        return ""
    return f"all_{outcomes.pop()}" if len(outcomes) == 1 else "mixed"


def _anchor(sample_id: str, origin: str, taken: Counter[str]) -> str:
    name = sample_id
    if not _SAFE_ID.fullmatch(name):
        name = "row-" + hashlib.sha256(f"{sample_id} {origin}".encode("utf-8", "replace")).hexdigest()[:16]
    taken[name] += 1
    # A duplicate of the very same content has the id of the row that was kept.
    return name if taken[name] == 1 else f"{name}-{taken[name]}"
