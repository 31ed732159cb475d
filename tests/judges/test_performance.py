from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.performance import evidence, is_audited, num_needed, performance_decision, performance_request
from schemas.config import PerformanceConfig
from schemas.samples import ImageRef, Sample
from schemas.verdicts import Decision, Failure, Mode, Verdict, correct, unscored, wrong

CONFIG = PerformanceConfig()
SAMPLE = Sample("0" * 32, "s", "s:f#0", "How many?", (ImageRef("ab" * 32, 10, 10),), answer="3")
CUT = unscored(Failure.TRUNCATED)
sixteen_verdicts = st.lists(st.sampled_from([correct(), wrong(), CUT]), min_size=16, max_size=16)
wave_sizes = st.lists(st.integers(1, 8), min_size=16, max_size=16)
ALL_AT_ONCE = [8] * 16
SINGLY = [1] * 16


def draw(answers: list[Verdict], sizes: list[int], *, is_audit: bool = False) -> list[Verdict]:
    """Returns the verdicts that sampling ends with when the samples' verdicts are `answers` in order."""
    drawn: list[Verdict] = []
    for size in sizes:
        most = num_needed(drawn, CONFIG, is_audit=is_audit)
        drawn += answers[len(drawn) : len(drawn) + min(size, most)]
    assert num_needed(drawn, CONFIG, is_audit=is_audit) == 0
    return drawn


def decide(answers: list[Verdict], sizes: list[int], *, is_audit: bool = False) -> Decision | None:
    return performance_decision(draw(answers, sizes, is_audit=is_audit), CONFIG, is_audit=is_audit)


def counts(decision: Decision | None) -> tuple[Mode, int, int, int]:
    """Returns mode, num_right, num_scored and num_sampled."""
    assert decision is not None
    return decision.mode, decision.num_right, decision.num_scored, decision.num_sampled


def test_sampling_stops_at_the_first_right_answer() -> None:
    assert len(draw([correct()] * 16, SINGLY)) == 1


def test_eight_wrong_answers_mean_reasoning() -> None:
    assert counts(decide([wrong()] * 16, ALL_AT_ONCE)) == (Mode.THINK, 0, 8, 8)


def test_one_right_answer_among_eight_means_direct() -> None:
    assert counts(decide([wrong()] * 7 + [correct()] * 9, ALL_AT_ONCE)) == (Mode.DIRECT, 1, 8, 8)


@pytest.mark.parametrize("sizes", [ALL_AT_ONCE, SINGLY, [1, 1, 2, 4] * 4])
def test_what_was_drawn_beyond_the_first_right_answer_is_not_counted(sizes: list[int]) -> None:
    answers = [wrong(), CUT, wrong(), correct(), correct(), wrong(), correct(), correct(), *[wrong()] * 8]
    assert counts(decide(answers, sizes)) == (Mode.DIRECT, 1, 3, 4)


def test_an_unscored_answer_is_replaced_and_never_counts_as_wrong() -> None:
    assert counts(decide([CUT, *[wrong()] * 15], ALL_AT_ONCE)) == (Mode.THINK, 0, 8, 9)


def test_seven_scored_wrong_answers_are_not_enough() -> None:
    answers = [wrong()] * 7 + [CUT] * 9
    assert len(draw(answers, ALL_AT_ONCE)) == 16
    assert decide(answers, ALL_AT_ONCE) is None


def test_no_more_than_twice_the_samples_are_drawn() -> None:
    assert len(draw([CUT] * 99, SINGLY)) == 16


def test_an_audited_row_draws_all_samples_whatever_comes() -> None:
    decision = decide([correct()] * 16, ALL_AT_ONCE, is_audit=True)
    assert counts(decision) == (Mode.DIRECT, 8, 8, 8)
    assert decision is not None and decision.is_audit


def test_an_audited_row_with_a_right_answer_has_no_sample_replaced() -> None:
    answers = [CUT, *[wrong()] * 6, correct(), *[correct()] * 8]
    assert counts(decide(answers, ALL_AT_ONCE, is_audit=True)) == (Mode.DIRECT, 1, 7, 8)


def test_an_audited_row_without_one_has_samples_replaced_until_all_are_scored() -> None:
    answers = [CUT, CUT, *[wrong()] * 6, correct(), CUT, wrong(), *[correct()] * 5]
    assert counts(decide(answers, ALL_AT_ONCE, is_audit=True)) == (Mode.DIRECT, 1, 8, 11)


def test_exhaustive_sampling_counts_all_samples_of_rows_outside_the_audit_too() -> None:
    config = PerformanceConfig(exhaustive=True)
    assert num_needed([correct()], config, is_audit=False) == 7
    assert counts(performance_decision([correct()] * 8, config, is_audit=False)) == (Mode.DIRECT, 8, 8, 8)


@given(sixteen_verdicts, wave_sizes, wave_sizes, st.booleans())
def test_the_decision_does_not_depend_on_how_samples_are_grouped(
    answers: list[Verdict], sizes: list[int], others: list[int], is_audit: bool
) -> None:
    by_sizes = decide(answers, sizes, is_audit=is_audit)
    assert by_sizes == decide(answers, others, is_audit=is_audit)
    assert by_sizes == decide(answers, ALL_AT_ONCE, is_audit=is_audit)
    assert by_sizes == performance_decision(answers, CONFIG, is_audit=is_audit)


@given(sixteen_verdicts)
def test_an_audited_row_gets_the_mode_that_it_would_get_without(answers: list[Verdict]) -> None:
    plain = decide(answers, SINGLY)
    audited = decide(answers, SINGLY, is_audit=True)
    assert (plain and plain.mode) == (audited and audited.mode)


@given(sixteen_verdicts, st.booleans())
def test_one_at_a_time_no_sample_is_drawn_that_is_no_evidence(answers: list[Verdict], is_audit: bool) -> None:
    drawn = draw(answers, SINGLY, is_audit=is_audit)
    assert list(evidence(answers, CONFIG, is_audit=is_audit)) == drawn


@given(sixteen_verdicts)
def test_reasoning_needs_as_many_scored_wrong_answers_as_configured(answers: list[Verdict]) -> None:
    decision = decide(answers, SINGLY)
    if decision is not None and decision.mode is Mode.THINK:
        assert (decision.num_right, decision.num_scored) == (0, 8)


def test_each_sample_has_a_seed_of_its_own_that_the_run_seed_sets() -> None:
    seeds = {performance_request(SAMPLE, index, CONFIG, seed=0).seed for index in range(8)}
    assert len(seeds) == 8
    assert performance_request(SAMPLE, 0, CONFIG, seed=1).seed not in seeds


def test_samples_follow_each_other_by_seed_so_that_one_call_can_draw_several() -> None:
    first = performance_request(SAMPLE, 0, CONFIG, seed=0)
    for index in range(16):
        request = performance_request(SAMPLE, index, CONFIG, seed=0)
        assert request == first.sample(index)
        assert (request.index, request.seed) == (index, (first.seed + index) % 2**31)


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
