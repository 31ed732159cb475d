"""Routing: is a question objective (checkable) or subjective, what type is its answer, and which topic is it?

Rules decide from the row's own fields; the teacher is asked only where they cannot tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from judges.answers import infer_answer_type
from judges.prompts import fence, judge_messages
from judges.verdict_words import read_word
from schemas.question import render_question
from schemas.requests import Reply, Sampling, TeacherRequest
from schemas.samples import AnswerType, Kind, Sample, Topic

ROUTING = "routing"
TOPIC = "topic"

LONG_ANSWER_WORDS = 40
"""A reference of more words is a text of its own; no short comparison can check a reply against it."""

_OPEN_QUESTION = re.compile(
    r"^\W*(please\s+)?(can you\s+|could you\s+)?"
    r"(describe|explain|discuss|write|compose|summari[sz]e|caption|imagine|tell me (about|a story)|elaborate|comment on"
    r"|what do you think|why do you think"
    r"|give (me )?(a|an) (detailed|short|brief)? ?(description|caption|summary))\b",
    re.IGNORECASE,
)
_CAPTION_QUESTION = re.compile(
    r"^\W*(please\s+)?"
    r"(describe|caption|(give|write|provide|generate) (me )?(a|an) ([\w-]+ ){0,2}(description|caption))\b",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"```|#include\s*<|\bdef \w+\(|\bclass \w+[(:{]|\bconsole\.log\(|\bpublic static void\b|\bSELECT\b.+\bFROM\b"
)


@dataclass(frozen=True, slots=True)
class Route:
    """What the rules know of a row: the row itself, completed, and what is still open."""

    sample: Sample
    needs_kind: bool
    needs_topic: bool


def route_by_rules(sample: Sample) -> Route:
    """Returns the row with kind, answer type and topic as far as rules can tell.

    Rules for the kind, in order: the row says it; options with a reference are a choice; a row without a reference
    cannot be checked and counts as subjective; a question that opens with "describe", "explain" and the like is
    subjective, as is a reference of more than 40 words; a reference that reads as number, formula, boolean, list, box
    or short text is objective. What is left goes to the teacher.
    Rules for the topic: the row says it; no image is `text`, unless it holds code; a box is `grounding`; a request for
    a description is `caption`.
    """
    answer_type = sample.answer_type or infer_answer_type(sample.answer, sample.choices, sample.question)
    kind = _kind_by_rules(sample, answer_type)
    if kind is Kind.SUBJECTIVE:
        answer_type = AnswerType.OPEN
    elif kind is Kind.OBJECTIVE and answer_type in {None, AnswerType.OPEN}:
        answer_type = AnswerType.TEXT
    topic = sample.topic or _topic_by_rules(sample, answer_type)
    routed = replace(sample, kind=kind, answer_type=answer_type, topic=topic)
    return Route(routed, needs_kind=kind is None, needs_topic=topic is None)


def _kind_by_rules(sample: Sample, answer_type: AnswerType | None) -> Kind | None:
    if sample.answer is None:
        return Kind.SUBJECTIVE
    if sample.kind is not None:
        return sample.kind
    if sample.answer_type is not None:
        return Kind.SUBJECTIVE if sample.answer_type is AnswerType.OPEN else Kind.OBJECTIVE
    if sample.choices:
        return Kind.OBJECTIVE
    if _OPEN_QUESTION.match(sample.question) or len(sample.answer.split()) > LONG_ANSWER_WORDS:
        return Kind.SUBJECTIVE
    return Kind.OBJECTIVE if answer_type not in {None, AnswerType.OPEN} else None


def _topic_by_rules(sample: Sample, answer_type: AnswerType | None) -> Topic | None:
    if _CODE.search(sample.question):
        return Topic.CODE
    if not sample.images:
        return Topic.TEXT
    if answer_type is AnswerType.BOX:
        return Topic.GROUNDING
    if _CAPTION_QUESTION.match(sample.question):
        return Topic.CAPTION
    return None


def kind_request(sample: Sample) -> TeacherRequest:
    """Returns the request whether a question is objective or subjective."""
    messages = judge_messages("routing", fence("question", render_question(sample)), sample)
    return TeacherRequest(sample.id, ROUTING, messages, Sampling(max_tokens=8), choices=tuple(map(str, Kind)))


def topic_request(sample: Sample) -> TeacherRequest:
    """Returns the request which of the paper's nine topics a question belongs to."""
    messages = judge_messages("topic", fence("question", render_question(sample)), sample)
    return TeacherRequest(sample.id, TOPIC, messages, Sampling(max_tokens=8), choices=tuple(map(str, Topic)))


def with_kind(sample: Sample, reply: Reply) -> Sample | None:
    """Returns the row with the teacher's kind, or None if the reply is unreadable. Objective rows become `text`."""
    word = read_word(reply, tuple(map(str, Kind)))
    if word is None:
        return None
    kind = Kind(word)
    return replace(sample, kind=kind, answer_type=AnswerType.TEXT if kind is Kind.OBJECTIVE else AnswerType.OPEN)


def with_topic(sample: Sample, reply: Reply) -> Sample | None:
    """Returns the row with the teacher's topic, or None if the reply is unreadable."""
    word = read_word(reply, tuple(map(str, Topic)))
    return None if word is None else replace(sample, topic=Topic(word))


def with_fallbacks(sample: Sample) -> Sample:
    """Returns the row as it is routed without asking: subjective and general where the rules cannot tell."""
    kind = sample.kind or Kind.SUBJECTIVE
    answer_type = sample.answer_type or AnswerType.OPEN
    return replace(sample, kind=kind, answer_type=answer_type, topic=sample.topic or Topic.GENERAL)
