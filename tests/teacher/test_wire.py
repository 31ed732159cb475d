"""Bodies and replies of the OpenAI chat format, without any server."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.requests import Message, Reply, Sampling, TeacherRequest
from teacher.images import SentImage
from teacher.wire import BadReply, parse_replies, render_body, served_models


def request_with(**changes: Any) -> TeacherRequest:
    fields: dict[str, Any] = {
        "sample_id": "s",
        "purpose": "p",
        "messages": (Message("system", "Be brief."), Message("user", "What is it?", images=("aa", "bb"))),
        "sampling": Sampling(temperature=0.7, top_p=0.9, max_tokens=12),
        "seed": 5,
    }
    return TeacherRequest(**{**fields, **changes})


IMAGES = {name: SentImage(f"data:image/png;base64,{name.upper()}", f"{name}-100") for name in ("aa", "bb")}


def body_of(request: TeacherRequest, **changes: Any) -> dict[str, Any]:
    return render_body(request, **{"model": "m", "images": IMAGES, "extra_body": {}, **changes})


def parsed(answer: object, *, is_constrained: bool = False) -> Reply:
    [reply] = replies_in(answer, 1, is_constrained=is_constrained)
    return reply


def replies_in(answer: object, num_choices: int, *, is_constrained: bool = False) -> list[Reply]:
    content = json.dumps(answer).encode()
    return parse_replies(content, model="asked", num_choices=num_choices, seconds=1.5, is_constrained=is_constrained)


def answer_with(message: object, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


def test_a_body_has_the_images_before_the_text_and_all_sampling_parameters() -> None:
    assert body_of(request_with()) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": IMAGES["aa"].url}, "uuid": "aa-100"},
                    {"type": "image_url", "image_url": {"url": IMAGES["bb"].url}, "uuid": "bb-100"},
                    {"type": "text", "text": "What is it?"},
                ],
            },
        ],
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "max_completion_tokens": 12,
    }


def test_choices_become_a_structured_output_with_logprobs() -> None:
    body = body_of(request_with(choices=("yes", "no")))
    assert body["structured_outputs"] == {"choice": ["yes", "no"]}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


def test_the_extra_body_wins_and_unknown_fields_are_left_out() -> None:
    request = request_with(choices=("yes", "no"))
    assert body_of(request, extra_body={"temperature": 0.1, "top_k": 3})["temperature"] == 0.1
    assert "max_completion_tokens" not in body_of(request, extra_body={"max_tokens": 99})
    body = body_of(request, without=frozenset({"structured_outputs", "top_logprobs", "seed", "max_completion_tokens"}))
    assert body.keys() == {"model", "messages", "temperature", "top_p", "max_tokens"}
    assert body["max_tokens"] == 12


def test_lone_surrogates_are_replaced_and_everything_else_is_sent_as_it_is() -> None:
    text = "🙂 \ud800 مرحبا \x00 \ud83d\ude42"
    sent = body_of(request_with(messages=(Message("user", text),)))["messages"][0]["content"]
    assert sent == "🙂 \ufffd مرحبا \x00 🙂"
    json.dumps(sent, ensure_ascii=False).encode()


def test_a_whole_answer_is_read() -> None:
    reply = parsed(
        {
            "model": "served",
            "choices": [{"message": {"content": "42", "reasoning": "six times seven"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
        }
    )
    assert reply == Reply("42", "stop", "served", "six times seven", (), 7, 2, 4, 1.5)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_both_names_of_split_off_reasoning_are_known(name: str) -> None:
    assert parsed(answer_with({"content": "a", name: "why"})).reasoning == "why"


@pytest.mark.parametrize(
    ("message", "finish_reason", "text"),
    [
        ({"content": ""}, "stop", ""),
        ({"content": None, "reasoning": "cut off in thou"}, "length", ""),
        ({"content": None, "reasoning": "all was thought"}, "stop", ""),
        ({"content": None}, "length", ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop", "ab"),
        ({"content": None, "refusal": "I cannot."}, "stop", "I cannot."),
    ],
)
def test_odd_but_true_answers_are_replies(message: object, finish_reason: str, text: str) -> None:
    reply = parsed(answer_with(message, finish_reason=finish_reason))
    assert (reply.text, reply.is_truncated) == (text, finish_reason == "length")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"choices": [{"mess',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"choices": []}',
        b'{"choices": null}',
        b'{"choices": [null]}',
        b'{"choices": {"0": 1}}',
        b'{"error": {"message": "overloaded"}}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": []}}]}',
    ],
)
def test_what_is_no_chat_completion_is_a_bad_reply(content: bytes) -> None:
    with pytest.raises(BadReply):
        parse_replies(content, model="m", num_choices=1, seconds=0, is_constrained=True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "usage", "text"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_gives_a_reply_or_a_bad_reply(value: object) -> None:
    for answer in (value, {"choices": [value]}, answer_with({"content": "x"}, logprobs=value)):
        with contextlib.suppress(BadReply):
            assert isinstance(parsed(answer, is_constrained=True).text, str)


def token(text: str, *alternatives: tuple[str, object]) -> dict[str, Any]:
    return {"token": text, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": p} for t, p in alternatives]}


def test_logprobs_are_those_of_the_first_token_of_the_answer() -> None:
    entries = [token("Hm", ("Hm", -0.1)), token("</think>", ("</think>", 0.0)), token("\n\n", ("\n\n", 0.0))]
    entries += [token("yes", ("yes", -0.25), ("no", -1.5)), token("<|im_end|>", ("<|im_end|>", 0.0))]
    reply = parsed(answer_with({"content": "yes"}, logprobs={"content": entries}), is_constrained=True)
    assert reply.top_logprobs == (("yes", -0.25), ("no", -1.5))


def test_fillers_and_nonsense_among_logprobs_are_left_out() -> None:
    entry = token("y", ("y", -0.5), ("", -9999.0), ("z", float("nan")), ("w", "high"), ("v", 10**400), ("u", -1))
    reply = parsed(answer_with({"content": "y"}, logprobs={"content": [entry, None]}), is_constrained=True)
    assert reply.top_logprobs == (("y", -0.5), ("u", -1.0))


def test_an_unconstrained_reply_keeps_no_logprobs() -> None:
    entry = token("y", ("y", -0.5))
    assert parsed(answer_with({"content": "y"}, logprobs={"content": [entry]})).top_logprobs == ()


def test_counts_that_are_no_counts_are_zero() -> None:
    reply = parsed({**answer_with({"content": "y"}), "usage": {"prompt_tokens": -1, "completion_tokens": True}})
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (0, 0, 0)


def test_served_models_are_the_ids() -> None:
    assert served_models(b'{"data": [{"id": "a"}, {"id": 3}, null, {"id": "b"}]}') == ["a", "b"]
    assert served_models(b'{"data": {}}') is None
    assert served_models(b"<html>") is None


def choice_of(text: str | None, index: int) -> dict[str, Any]:
    return {"index": index, "message": {"content": text}, "finish_reason": "stop"}


def test_choices_come_in_order_and_share_out_their_tokens_by_length() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}
    answer = {"choices": [choice_of("ccc", 2), choice_of("", 0), choice_of("bbbb", 1)], "usage": usage}
    replies = replies_in(answer, 3)
    assert [(r.text, r.choice, r.completion_tokens) for r in replies] == [("", 0, 1), ("bbbb", 1, 5), ("ccc", 2, 4)]
    assert all((r.prompt_tokens, r.cached_tokens, r.seconds) == (9, 4, 1.5) for r in replies)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8), st.integers(0, 10_000))
def test_no_token_of_a_call_is_lost_or_counted_twice(texts: list[str], num_tokens: int) -> None:
    choices = [choice_of(text, index) for index, text in enumerate(texts)]
    replies = replies_in({"choices": choices, "usage": {"completion_tokens": num_tokens}}, len(texts))
    assert sum(reply.completion_tokens for reply in replies) == num_tokens


def test_replies_end_before_the_first_choice_that_is_none() -> None:
    answer = {"choices": [choice_of("a", 0), choice_of(None, 1), choice_of("c", 2)], "usage": {"completion_tokens": 9}}
    assert [(r.text, r.completion_tokens) for r in replies_in(answer, 3)] == [("a", 3)]
    with pytest.raises(BadReply, match="no content"):
        replies_in({"choices": [choice_of(None, 0), choice_of("b", 1)]}, 2)


def test_a_server_that_gives_more_choices_than_asked_for_is_not_believed_about_the_rest() -> None:
    answer = {"choices": [choice_of("a", 0), choice_of("b", 1)], "usage": {"completion_tokens": 4}}
    assert [(r.text, r.completion_tokens) for r in replies_in(answer, 1)] == [("a", 2)]


def test_several_samples_are_one_call_with_n_and_one_is_none() -> None:
    assert body_of(request_with(), num_choices=8)["n"] == 8
    assert "n" not in body_of(request_with()) and "n" not in body_of(
        request_with(), num_choices=8, without=frozenset({"n"})
    )


def test_a_server_that_knows_no_uuid_gets_none() -> None:
    parts = body_of(request_with(), without=frozenset({"uuid"}))["messages"][1]["content"]
    assert all("uuid" not in part for part in parts)
