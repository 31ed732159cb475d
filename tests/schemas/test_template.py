from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.errors import RowError
from schemas.template import CHAT_TEMPLATE, FORCED_PREFIX, ThinkingMode, parse_completion, render_completion
from schemas.verdicts import Mode

plain = st.text(max_size=200).filter(lambda text: "think>" not in text)


def test_a_direct_answer_has_the_empty_think_block() -> None:
    assert render_completion("7") == "<think>\n\n</think>7"


def test_a_thinking_answer_opens_its_thought_with_one_newline() -> None:
    assert render_completion("7", "3 + 4 = 7") == "<think>\n3 + 4 = 7\n</think>7"


def test_a_thought_that_begins_with_a_newline_does_not_change_the_choice_token() -> None:
    assert render_completion("7", "\n\nfirst").startswith("<think>\nfirst")


@given(plain, plain.filter(lambda text: bool(text.strip())))
def test_parsing_takes_a_rendered_completion_apart(reasoning: str, answer: str) -> None:
    completion = parse_completion(render_completion(answer, reasoning))
    assert (completion.reasoning, completion.answer) == (reasoning.strip(), answer.strip())


@given(plain.filter(lambda text: bool(text.strip())), st.sampled_from(list(ThinkingMode)))
def test_every_forced_prefix_begins_a_completion_of_its_mode(answer: str, mode: ThinkingMode) -> None:
    thought = "a thought" if mode is ThinkingMode.LONG else ""
    assert render_completion(answer, thought).startswith(FORCED_PREFIX[mode])


def test_only_what_follows_the_last_closing_tag_is_the_answer() -> None:
    assert parse_completion("<think>a</think>b</think> c ").answer == "c"


def test_a_thought_that_never_ends_has_no_answer() -> None:
    assert parse_completion("<think>\nstill going").answer == ""


def test_a_continuation_of_a_forced_prefix_is_read_without_its_opening_tag() -> None:
    completion = parse_completion("steps\n</think>42")
    assert (completion.reasoning, completion.answer, completion.mode) == ("steps", "42", Mode.THINK)


@pytest.mark.parametrize(("answer", "reasoning"), [("a</think>", ""), ("a", "b<think>")])
def test_a_think_tag_inside_a_part_is_refused(answer: str, reasoning: str) -> None:
    with pytest.raises(RowError) as caught:
        render_completion(answer, reasoning)
    assert caught.value.reason == "think_tag_in_text"


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(RowError) as caught:
        render_completion("  ", "thought")
    assert caught.value.reason == "answer_empty"


@pytest.mark.parametrize("mode", list(ThinkingMode))
def test_the_chat_template_opens_the_turn_with_the_forced_prefix(mode: ThinkingMode) -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = template.render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True, thinking_mode=str(mode)
    )
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    assert text == f"{user}<|im_start|>assistant\n{FORCED_PREFIX[mode]}"


def test_the_chat_template_leaves_the_choice_to_the_model_by_default() -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    text = template.render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n<think>")


def test_the_generation_prompt_begins_the_rendered_completion() -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    opened = template.render(messages=messages, add_generation_prompt=True)
    answered = [*messages, {"role": "assistant", "content": render_completion("7", "3 + 4 = 7")}]
    assert template.render(messages=answered).startswith(opened)
