from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.performance import is_audited, next_indices, performance_decision, performance_request
from schemas.config import PerformanceConfig
from schemas.samples import ImageRef, Sample
from schemas.verdicts import Failure, Mode, Verdict, correct, unscored, wrong

CONFIG = PerformanceConfig()
SAMPLE = Sample("0" * 32, "s", "s:f#0", "How many?", (ImageRef("ab" * 32, 10, 10),), answer="3")
CUT = unscored(Failure.TRUNCATED)
outcomes = st.sampled_from([correct(), wrong(), CUT])


def draw(answers: list[Verdict], config: PerformanceConfig = CONFIG, *, draw_all: bool = False) -> list[Verdict]:
    """Returns the verdicts that sampling ends with when the samples' verdicts are `answers` in order."""
    drawn: list[Verdict] = []
    while indices := next_indices(drawn, config, draw_all=draw_all):
        assert indices.start == len(drawn)
        drawn += [answers[index] for index in indices]
    return drawn


def test_sampling_stops_at_the_first_right_answer() -> None:
    assert len(draw([correct()] * 16)) == 1


def test_waves_double() -> None:
    drawn: list[Verdict] = []
    sizes = []
    while indices := next_indices(drawn, CONFIG, draw_all=False):
        sizes.append(len(indices))
        drawn += [wrong()] * len(indices)
    assert sizes == [1, 1, 2, 4]


def test_eight_wrong_answers_mean_reasoning() -> None:
    decision = performance_decision(draw([wrong()] * 16), CONFIG, is_audit=False)
    assert decision is not None
    assert (decision.mode, decision.num_right, decision.num_scored, decision.num_sampled) == (Mode.THINK, 0, 8, 8)


def test_one_right_answer_among_eight_means_direct() -> None:
    decision = performance_decision(draw([wrong()] * 7 + [correct()] * 9), CONFIG, is_audit=False)
    assert decision is not None
    assert decision.mode is Mode.DIRECT


def test_an_unscored_answer_is_replaced_and_never_counts_as_wrong() -> None:
    drawn = draw([CUT, *[wrong()] * 15])
    assert len(drawn) == 9
    decision = performance_decision(drawn, CONFIG, is_audit=False)
    assert decision is not None
    assert (decision.mode, decision.num_scored) == (Mode.THINK, 8)


def test_seven_scored_wrong_answers_are_not_enough() -> None:
    drawn = draw([wrong()] * 7 + [CUT] * 9)
    assert len(drawn) == 16
    assert performance_decision(drawn, CONFIG, is_audit=False) is None


def test_no_more_than_twice_the_samples_are_drawn() -> None:
    assert len(draw([CUT] * 99)) == 16


def test_an_audited_row_draws_all_samples_whatever_comes() -> None:
    drawn = draw([correct()] * 16, draw_all=True)
    assert len(drawn) == 8
    decision = performance_decision(drawn, CONFIG, is_audit=True)
    assert decision is not None
    assert (decision.num_right, decision.is_audit) == (8, True)


@given(st.lists(outcomes, min_size=16, max_size=16), st.lists(st.integers(1, 8), min_size=8, max_size=8))
def test_the_mode_does_not_depend_on_how_samples_are_split_into_waves(answers: list[Verdict], waves: list[int]) -> None:
    other = PerformanceConfig(waves=waves)
    by_waves = performance_decision(draw(answers), CONFIG, is_audit=False)
    by_other = performance_decision(draw(answers, other), other, is_audit=False)
    exhaustive = performance_decision(draw(answers, draw_all=True), CONFIG, is_audit=False)
    modes = {decision and decision.mode for decision in (by_waves, by_other, exhaustive)}
    assert len(modes) == 1


@given(st.lists(outcomes, min_size=16, max_size=16))
def test_reasoning_needs_as_many_scored_wrong_answers_as_configured(answers: list[Verdict]) -> None:
    decision = performance_decision(draw(answers), CONFIG, is_audit=False)
    if decision is not None and decision.mode is Mode.THINK:
        assert (decision.num_right, decision.num_scored) == (0, 8)


def test_each_sample_has_a_seed_of_its_own_that_the_run_seed_sets() -> None:
    seeds = {performance_request(SAMPLE, index, CONFIG, seed=0).seed for index in range(8)}
    assert len(seeds) == 8
    assert performance_request(SAMPLE, 0, CONFIG, seed=1).seed not in seeds


def test_the_request_shows_the_images_and_asks_for_a_final_answer() -> None:
    message = performance_request(SAMPLE, 0, CONFIG, seed=0).messages[0]
    assert message.images == ("ab" * 32,)
    assert message.text == "How many?\n\nEnd with a line 'Answer:' and the final answer alone."


def test_options_are_shown_and_a_letter_is_asked_for() -> None:
    sample = Sample("0" * 32, "s", "s:f#0", "Which?", choices=("red", "blue"), answer="A")
    text = performance_request(sample, 0, CONFIG, seed=0).messages[0].text
    assert text.startswith("Which?\nA. red\nB. blue\n")
    assert "letter" in text


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 300)])
def test_the_audit_slice_is_a_share_of_all_rows(share: float, expected: int) -> None:
    config = PerformanceConfig(audit_share=share)
    rows = [Sample(str(number), "s", "o", "q") for number in range(300)]
    assert sum(is_audited(row, config, seed=0) for row in rows) == expected


def test_the_audit_slice_is_about_as_large_as_configured() -> None:
    rows = [Sample(str(number), "s", "o", "q") for number in range(5000)]
    assert 400 < sum(is_audited(row, PerformanceConfig(audit_share=0.1), seed=0) for row in rows) < 600
