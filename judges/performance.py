"""The performance heuristic (R-4B, section 2.1): a checkable question needs reasoning when all N = 8 answers are wrong.

Sampling stops at the first right answer, because it settles the label; a random audit slice, chosen by the row's id,
draws all samples, so that its pass rate is unbiased. An unscored reply (truncated, unreadable, timed out) is never
wrong: it is replaced by a further sample, up to N more, and a row that still lacks N scored answers gets no label.
"""

from __future__ import annotations

from collections.abc import Sequence

from judges.prompts import ANSWER_INSTRUCTION, CHOICE_INSTRUCTION
from schemas.config import PerformanceConfig
from schemas.question import render_question
from schemas.requests import Message, Sampling, TeacherRequest, derived_seed
from schemas.samples import Sample
from schemas.verdicts import Decision, Heuristic, Mode, Verdict

PURPOSE = "performance"


def answer_messages(sample: Sample) -> tuple[Message, ...]:
    """Returns the user turn that asks a checkable question and says where the final answer goes."""
    instruction = CHOICE_INSTRUCTION if sample.choices else ANSWER_INSTRUCTION
    text = f"{render_question(sample)}\n\n{instruction}"
    return (Message("user", text, tuple(image.sha256 for image in sample.images)),)


def performance_request(sample: Sample, index: int, config: PerformanceConfig, *, seed: int) -> TeacherRequest:
    """Returns the request for sample number `index`; its seed depends on run seed, row and index alone."""
    sampling = Sampling(config.temperature, config.top_p, config.max_tokens)
    call_seed = derived_seed(seed, sample.id, PURPOSE, index)
    return TeacherRequest(sample.id, PURPOSE, answer_messages(sample), sampling, call_seed, index)


def is_audited(sample: Sample, config: PerformanceConfig, *, seed: int) -> bool:
    """Returns whether the row belongs to the audit slice: a fixed pseudo-random share of all rows."""
    return derived_seed(seed, sample.id, "audit") < config.audit_share * 2**31


def next_indices(verdicts: Sequence[Verdict], config: PerformanceConfig, *, draw_all: bool) -> range:
    """Returns the indices of the samples to draw next, given the verdicts so far; empty when the label is settled.

    draw_all: exhaustive sampling or an audited row; then a right answer does not end it.
    """
    num_drawn = len(verdicts)
    num_scored = sum(verdict.is_scored for verdict in verdicts)
    has_right = any(verdict.is_correct for verdict in verdicts)
    if has_right and not (draw_all and num_drawn < config.num_samples):
        return range(0)
    if num_drawn >= config.num_samples:
        num_missing = min(config.num_samples - num_scored, 2 * config.num_samples - num_drawn)
        return range(num_drawn, num_drawn + max(0, num_missing))
    if draw_all:
        return range(num_drawn, config.num_samples)
    end = 0
    for wave in config.waves:
        end = min(end + wave, config.num_samples)
        if end > num_drawn:
            break
    return range(num_drawn, end)


def performance_decision(verdicts: Sequence[Verdict], config: PerformanceConfig, *, is_audit: bool) -> Decision | None:
    """Returns the mode with its counts, or None when too few answers could be scored to tell.

    The label depends on the verdicts as a set, not on how the samples were split into waves.
    """
    num_right = sum(verdict.is_correct for verdict in verdicts)
    num_scored = sum(verdict.is_scored for verdict in verdicts)
    if num_right == 0 and num_scored < config.num_samples:
        return None
    mode = Mode.DIRECT if num_right else Mode.THINK
    return Decision(mode, Heuristic.PERFORMANCE, num_right, num_scored, len(verdicts), is_audit=is_audit)
