from __future__ import annotations

from dataclasses import replace

import pytest

from judges.difficulty import difficulty_request
from judges.retry import changed_retry, is_cut_short
from schemas.requests import Reply
from schemas.samples import Sample

REQUEST = difficulty_request(Sample("0" * 32, "s", "s:f#0", "Why?"))


@pytest.mark.parametrize(
    "text", ["y", "", "<think>yes or", "I say yes, as", "**", "yesterday", "The answer is no, wait"]
)
def test_a_cut_reply_that_does_not_begin_with_a_choice_is_not_read(text: str) -> None:
    assert is_cut_short(REQUEST, Reply(text, "length", "m"))


@pytest.mark.parametrize("text", ["yes", "Yes. The question asks", " **No**, because", "no"])
def test_a_cut_reply_that_begins_with_a_choice_has_said_it(text: str) -> None:
    assert not is_cut_short(REQUEST, Reply(text, "length", "m"))


@pytest.mark.parametrize("text", ["yes", "I say yes", ""])
def test_a_reply_that_ended_by_itself_is_not_cut(text: str) -> None:
    assert not is_cut_short(REQUEST, Reply(text, "stop", "m"))


def test_the_retry_is_another_sample_of_the_same_question_drawn_freely() -> None:
    retry = changed_retry(REQUEST, Reply("maybe", "stop", "m"))
    assert (retry.messages, retry.choices, retry.purpose) == (REQUEST.messages, REQUEST.choices, REQUEST.purpose)
    assert (retry.index, retry.seed) == (REQUEST.index + 1, REQUEST.seed + 1)
    assert (retry.sampling.temperature, retry.sampling.max_tokens) == (0.7, 8)


def test_a_cut_reply_may_be_twice_as_long_the_next_time() -> None:
    assert changed_retry(REQUEST, Reply("<think>", "length", "m")).sampling.max_tokens == 16


def test_a_temperature_above_the_least_one_stays() -> None:
    warm = replace(REQUEST, sampling=replace(REQUEST.sampling, temperature=1.0))
    assert changed_retry(warm, Reply("", "stop", "m")).sampling.temperature == 1.0
