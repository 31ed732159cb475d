"""The difficulty heuristic (R-4B, section 2.1): does an open-ended question need a non-trivial reasoning process?

The paper does not publish its prompt; ours is prompts/difficulty.md. The verdict carries the probability of "yes" from
the logprobs of the constrained reply, so that the threshold can be changed later without asking again.
"""

from __future__ import annotations

from judges.prompts import fence, judge_messages
from judges.verdict_words import read_word, word_probability
from schemas.config import DifficultyConfig
from schemas.question import render_question
from schemas.requests import Reply, Sampling, TeacherRequest
from schemas.samples import Sample
from schemas.verdicts import Decision, Heuristic, Mode

PURPOSE = "difficulty"
_WORDS = ("yes", "no")


def difficulty_request(sample: Sample) -> TeacherRequest:
    """Returns the request whether the sample's question needs reasoning, to be answered with yes or no."""
    messages = judge_messages("difficulty", fence("question", render_question(sample)), sample)
    return TeacherRequest(sample.id, PURPOSE, messages, Sampling(max_tokens=8), choices=_WORDS)


def reasoning_probability(reply: Reply) -> float | None:
    """Returns the probability that reasoning is needed, or None if the reply is neither yes nor no.

    Where the endpoint gives no logprobs it is 1 or 0.
    """
    word = read_word(reply, _WORDS)
    if word is None:
        return None
    probability = word_probability(reply, "yes", _WORDS)
    return probability if probability is not None else 1.0 if word == "yes" else 0.0


def decision_at(probability: float, config: DifficultyConfig) -> Decision:
    """Returns the mode of a question that needs reasoning with a probability."""
    mode = Mode.THINK if probability >= config.threshold else Mode.DIRECT
    return Decision(mode, Heuristic.DIFFICULTY, probability=probability)


def difficulty_decision(reply: Reply, config: DifficultyConfig) -> Decision | None:
    """Returns the mode with its probability, or None if the reply is neither yes nor no."""
    probability = reasoning_probability(reply)
    return None if probability is None else decision_at(probability, config)
