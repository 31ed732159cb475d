"""Chains of thought for the rows that need them, the judgement whether they are consistent, and direct answers.

R-4B took its traces from a multimodal reasoning model and checked them by consistency verification, keyword filtering
and duplicate detection (section 2.1). For checkable rows, consistency means that the trace's final answer agrees with
the reference. For open-ended rows the teacher judges whether the trace leads to the answer that follows it.
"""

from __future__ import annotations

from judges.performance import answer_messages
from judges.prompts import fence, judge_messages, prompt
from judges.verdict_words import read_word
from schemas.config import DirectConfig, ReasoningConfig
from schemas.question import render_question
from schemas.requests import Message, Reply, Sampling, TeacherRequest, derived_seed
from schemas.samples import Kind, Sample
from schemas.template import Completion, parse_completion

PURPOSE = "reasoning"
CONSISTENCY = "consistency"
DIRECT = "direct"
_CONSISTENT, _INCONSISTENT = "consistent", "inconsistent"


def reasoning_request(sample: Sample, index: int, config: ReasoningConfig, *, seed: int) -> TeacherRequest:
    """Returns the request for the trace of try `index` (0-based); each try has a seed of its own."""
    messages = answer_messages(sample) if sample.kind is Kind.OBJECTIVE else _plain_messages(sample)
    if config.ask_for_think_tags:
        messages = (Message("system", prompt("think_tags")), *messages)
    sampling = Sampling(config.temperature, config.top_p, config.max_tokens)
    call_seed = derived_seed(seed, sample.id, PURPOSE, index)
    return TeacherRequest(sample.id, PURPOSE, messages, sampling, call_seed, index)


def read_trace(reply: Reply) -> Completion:
    """Returns trace and answer of a reply, whether the server split them (reasoning parser) or the text holds tags.

    A reply without a closed thought has no trace: its reasoning is "".
    """
    if reply.reasoning and reply.reasoning.strip():
        return Completion(parse_completion(reply.reasoning).reasoning or reply.reasoning.strip(), reply.text.strip())
    return parse_completion(reply.text)


def consistency_request(sample: Sample, trace: Completion) -> TeacherRequest:
    """Returns the request whether an open-ended row's trace leads to its answer, to be answered with one word."""
    parts = [
        fence("question", render_question(sample)),
        fence("reasoning", trace.reasoning),
        fence("answer", trace.answer),
    ]
    messages = judge_messages("consistency", "\n".join(parts), sample)
    return TeacherRequest(
        sample.id, CONSISTENCY, messages, Sampling(max_tokens=8), choices=(_CONSISTENT, _INCONSISTENT)
    )


def is_consistent(reply: Reply) -> bool | None:
    """Returns the judgement, or None if the reply is neither word."""
    word = read_word(reply, (_CONSISTENT, _INCONSISTENT))
    return None if word is None else word == _CONSISTENT


def direct_request(sample: Sample, config: DirectConfig, *, seed: int) -> TeacherRequest:
    """Returns the request for the direct answer of an open-ended row that has no reference."""
    sampling = Sampling(config.temperature, 1.0, config.max_tokens)
    return TeacherRequest(
        sample.id, DIRECT, _plain_messages(sample), sampling, derived_seed(seed, sample.id, DIRECT, 0)
    )


def _plain_messages(sample: Sample) -> tuple[Message, ...]:
    return (Message("user", render_question(sample), tuple(image.sha256 for image in sample.images)),)
