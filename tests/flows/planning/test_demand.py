"""How many rows each stage sees and what it asks, held to sums worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.assumptions import Assumptions
from flows.planning.demand import StageDemand, demand, known_from_sources, sampling_cost, survival
from flows.planning.request import DEFAULT_CONFIG
from judges.sampling_plan import CallCosts, prior_survival
from schemas.config import PerformanceConfig, RunConfig, parse_config

COSTS = CallCosts(100.0, 10.0, 200.0)
KNOWN = {
    "quarantined_share": 0.1,
    "duplicate_share": 0.2,
    "asks_kind_share": 0.5,
    "asks_topic_share": 0.25,
    "objective_share": 0.75,
    "thinking_objective_share": 0.5,
    "thinking_subjective_share": 0.25,
    "trace_right_share": 0.5,
    "trace_consistent_share": 1.0,
    "repeated_trace_share": 0.0,
    "unanswered_share": 0.5,
    "answer_tokens": 100.0,
    "trace_tokens": 1000.0,
    "direct_tokens": 50.0,
    "text_only_share": 0.5,
    "images_per_row": 2.0,
    "image_tokens": 300.0,
}


def demand_of(num_rows: int, config: RunConfig = DEFAULT_CONFIG, **known: float) -> dict[str, StageDemand]:
    assumptions = Assumptions().expected().known("the test", **{**KNOWN, **known})
    return {stage.stage: stage for stage in demand(num_rows, config, assumptions)}


def settings(**sections: object) -> RunConfig:
    source = {"name": "rows", "format": "jsonl", "path": "rows.jsonl"}
    return parse_config({"sources": [source], **sections})


def test_rows_flow_from_stage_to_stage_and_leave_where_they_must() -> None:
    stages = demand_of(10_000)
    assert list(stages) == [
        *("sources", "duplicates", "routing", "difficulty", "performance", "reasoning", "traces", "answers", "corpus")
    ]
    assert stages["duplicates"].rows[0] == 9000 and stages["routing"].rows[0] == 7200
    assert stages["difficulty"].looked_at[0] == 1800 and stages["performance"].looked_at[0] == 5400
    # 2,700 objective and 450 subjective rows think; a sixteenth of the former fails four times.
    assert stages["reasoning"].looked_at[0] == 3150
    assert stages["traces"].looked_at[0] == pytest.approx(3150 - 2700 / 16)
    assert stages["answers"].looked_at[0] == pytest.approx((1800 - 450) / 2)
    assert stages["corpus"].rows[0] == pytest.approx(7200 - 2700 / 16)


def test_calls_and_tokens_are_those_of_the_rows() -> None:
    stages = demand_of(10_000, settings(performance={"waves": [1, 7], "audit_share": 0.0}))
    kind, topic = stages["routing"].asked
    assert (kind.calls[0], topic.calls[0]) == (3600, 1800)
    (performance,) = stages["performance"].asked
    # Half of the rows never get a right answer; of the others half get one at once: S(1) = 7/16 + 9/16 * 1/2 ...
    never = (0.5 - 1 / 9) / (1 - 1 / 9)
    second = never + (1 - never) / 2
    assert performance.calls[0] == pytest.approx(5400 * (1 + second))
    assert performance.samples[0] == pytest.approx(5400 * (1 + 7 * second))
    assert performance.completion_tokens[0] == pytest.approx(performance.samples[0] * 100)
    # A row's prompt is computed once: half of the rows have two images of 300 tokens.
    assert performance.new_image_tokens[0] == pytest.approx(5400 * 300)
    trace, consistency = stages["reasoning"].asked
    tries = (1 - 0.5**4) / 0.5
    assert trace.calls[0] == pytest.approx(2700 * tries + 450)
    assert consistency.calls[0] == 450 and trace.longest_chain == 4
    # Cached tokens count as prompt tokens, too.
    assert trace.prompt_tokens[0] > trace.new_text_tokens[0] + trace.new_image_tokens[0]


def test_a_panel_multiplies_the_calls_of_the_difficulty_stage() -> None:
    panel = [{"model": "other/model", "url": "http://127.0.0.1:9/v1"}]
    stages = demand_of(1000, settings(difficulty={"panel": panel}))
    assert [asked.model for asked in stages["difficulty"].asked] == ["Qwen/Qwen2.5-VL-32B-Instruct", "other/model"]
    assert stages["difficulty"].asked[0].calls[0] == stages["difficulty"].asked[1].calls[0] == 180


def test_lengths_end_where_the_settings_end_them() -> None:
    stages = demand_of(1000, settings(performance={"max_tokens": 40}, reasoning={"max_tokens": 300}))
    (performance,), (trace, _) = stages["performance"].asked, stages["reasoning"].asked
    assert performance.completion_tokens[0] == pytest.approx(40 * performance.samples[0])
    assert trace.completion_tokens[0] == pytest.approx(300 * trace.samples[0])


def test_benchmarks_bring_a_stage() -> None:
    benchmark = {"name": "test", "format": "jsonl", "path": "test.jsonl"}
    stages = demand_of(1000, settings(decontamination={"benchmarks": [benchmark]}), leaked_share=0.5)
    assert stages["duplicates"].rows[0] == 450


def test_survival_agrees_with_the_plans_prior_where_shares_do() -> None:
    share = prior_survival(8)
    assert survival(share, 8) == pytest.approx([prior_survival(k) for k in range(9)])


@given(st.floats(0, 1), st.integers(1, 16))
def test_survival_falls_from_one_to_the_share_of_thinking_rows(share: float, num_samples: int) -> None:
    shares = survival(share, num_samples)
    assert shares[0] == pytest.approx(1.0) and shares[-1] == pytest.approx(max(share, 1e-9), abs=1e-8)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares))


@given(
    st.floats(0, 1),
    st.integers(1, 16),
    st.floats(0, 1),
    st.one_of(st.just("auto"), st.just([1, 1, 2, 4, 8])),
    st.booleans(),
)
def test_a_row_costs_between_one_sample_and_all(
    share: float, num_samples: int, audit: float, waves: object, exhaustive: bool
) -> None:
    config = PerformanceConfig.model_validate(
        {"num_samples": num_samples, "audit_share": audit, "waves": waves, "exhaustive": exhaustive}
    )
    cost = sampling_cost(config, share, COSTS)
    least = 1 if num_samples == 1 or not exhaustive else num_samples
    assert least * (1 - 1e-9) <= cost.samples <= num_samples * (1 + 1e-9)
    assert 1 - 1e-9 <= cost.calls <= cost.samples * (1 + 1e-9) and 1 <= cost.longest_chain <= num_samples


def test_all_rows_wrong_or_all_samples_drawn_cost_the_same_samples() -> None:
    exhaustive = sampling_cost(PerformanceConfig(exhaustive=True), 0.3, COSTS)
    hopeless = sampling_cost(PerformanceConfig(waves=[1, 1, 2, 4]), 1.0, COSTS)
    assert exhaustive.samples == hopeless.samples == 8
    assert (exhaustive.calls, exhaustive.longest_chain) == (1, 1)
    assert hopeless.calls == pytest.approx(0.02 + 0.98 * 4) and hopeless.longest_chain == 4


def test_what_the_sources_say_is_not_asked() -> None:
    said = settings(
        sources=[
            {
                "name": "rows",
                "format": "jsonl",
                "path": "rows.jsonl",
                "kind": "objective",
                "topic": "math",
                "columns": {"answer": "answer"},
            }
        ]
    )
    known = known_from_sources(Assumptions(), said)
    assert (known.asks_kind_share.high, known.asks_topic_share.high) == (0, 0)
    assert (known.objective_share.low, known.text_only_share.low) == (1, 1)
    silent = settings(sources=[{"name": "a", "format": "jsonl", "path": "a", "columns": {"images": "image"}}])
    assert known_from_sources(Assumptions(), silent) == Assumptions()
    unasked = settings(routing={"ask_teacher": False})
    assert known_from_sources(Assumptions(), unasked).asks_topic_share.high == 0


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_demand_grows_in_step_with_the_rows(one: int, other: int) -> None:
    first, second = demand_of(one), demand_of(other)
    for stage in first:
        assert np.allclose(first[stage].rows * (other / one), second[stage].rows)
        for here, there in zip(first[stage].asked, second[stage].asked, strict=True):
            assert np.allclose(here.completion_tokens * (other / one), there.completion_tokens)
