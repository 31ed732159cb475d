"""The performance heuristic (R-4B, section 2.1): a checkable question needs reasoning when all N = 8 answers are wrong.

Sampling stops at the first right answer, because it settles the label; a random audit slice, chosen by the row's id,
draws all samples, so that its pass rate is unbiased. An unscored reply (truncated, unreadable, timed out) is never
wrong: it is replaced by a further sample, up to N more, and a row that still lacks N scored answers gets no label.

How many samples are asked for at once is a matter of cost (`judges.sampling_plan`). Label and evidence do not depend on
it: they rest on the verdicts in order of index, up to the one that settles the label.
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
    first_seed = derived_seed(seed, sample.id, PURPOSE)
    return TeacherRequest(sample.id, PURPOSE, answer_messages(sample), sampling, first_seed).sample(index)


def is_audited(sample: Sample, config: PerformanceConfig, *, seed: int) -> bool:
    """Returns whether the row belongs to the audit slice: a fixed pseudo-random share of all rows."""
    return derived_seed(seed, sample.id, "audit") < config.audit_share * 2**31


def draws_all(config: PerformanceConfig, *, is_audit: bool) -> bool:
    """Returns whether a row draws all samples although a right answer may have settled its label."""
    return is_audit or config.exhaustive


def num_needed(verdicts: Sequence[Verdict], config: PerformanceConfig, *, is_audit: bool) -> int:
    """Returns how many further samples may be drawn at once without one too many; 0 when the label is settled.

    verdicts: of all samples so far, in order of index. Asking for fewer at a time leads to the same evidence.
    """
    num_samples, num_drawn = config.num_samples, len(verdicts)
    if draws_all(config, is_audit=is_audit):
        if num_drawn < num_samples:
            return num_samples - num_drawn
        verdicts_that_settle = verdicts[:num_samples]
    else:
        verdicts_that_settle = verdicts
    if not verdicts:
        return num_samples
    if any(verdict.is_correct for verdict in verdicts_that_settle):
        return 0
    num_scored = sum(verdict.is_scored for verdict in verdicts)
    return max(0, min(num_samples - num_scored, 2 * num_samples - num_drawn))


def evidence(verdicts: Sequence[Verdict], config: PerformanceConfig, *, is_audit: bool) -> Sequence[Verdict]:
    """Returns the verdicts that count: a prefix that depends on the answers alone, not on how samples were grouped.

    It ends with the first right answer, or when all N answers are scored. A row that draws all samples has its first
    N; if none of them is right and some are unscored, the replacements follow until N are scored. Samples that a wave
    drew beyond that end would not have been drawn by another plan, and are left out.
    """
    num_samples = config.num_samples
    is_exhaustive = draws_all(config, is_audit=is_audit)
    num_scored, has_right = 0, False
    for index, verdict in enumerate(verdicts):
        is_settled = has_right and (index == num_samples or not is_exhaustive)
        if is_settled or num_scored == num_samples or index == 2 * num_samples:
            return verdicts[:index]
        num_scored += verdict.is_scored
        has_right = has_right or verdict.is_correct
    return verdicts


def performance_decision(verdicts: Sequence[Verdict], config: PerformanceConfig, *, is_audit: bool) -> Decision | None:
    """Returns the mode with its counts, or None when too few answers could be scored to tell.

    verdicts: of all samples drawn, in order of index. Mode and counts rest on their `evidence`.
    """
    counted = evidence(verdicts, config, is_audit=is_audit)
    num_right = sum(verdict.is_correct for verdict in counted)
    num_scored = sum(verdict.is_scored for verdict in counted)
    if num_right == 0 and num_scored < config.num_samples:
        return None
    mode = Mode.DIRECT if num_right else Mode.THINK
    return Decision(mode, Heuristic.PERFORMANCE, num_right, num_scored, len(counted), is_audit=is_audit)
