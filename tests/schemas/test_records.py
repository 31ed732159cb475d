from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.fates import Exit, Fate, StageCount, count_stage, fates_to_table
from schemas.requests import Message, ModelIdentity, Sampling, TeacherRequest, derived_seed, request_key
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, samples_to_table, table_to_samples

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
optional = st.none() | texts
samples = st.builds(
    Sample,
    id=texts,
    source=texts,
    origin=texts,
    question=texts,
    images=st.lists(st.builds(ImageRef, texts, st.integers(1, 9999), st.integers(1, 9999)), max_size=3).map(tuple),
    choices=st.lists(texts, max_size=4).map(tuple),
    answer=optional,
    source_id=optional,
    topic=st.none() | st.sampled_from(Topic),
    kind=st.none() | st.sampled_from(Kind),
    answer_type=st.none() | st.sampled_from(AnswerType),
    licence=optional,
)


@given(st.lists(samples, max_size=5))
def test_samples_survive_the_table_unchanged(drawn: list[Sample]) -> None:
    assert table_to_samples(samples_to_table(drawn)) == drawn


def fate(exit_: Exit, reason: str) -> Fate:
    return Fate("o", "i", "s", "stage", exit_, reason, "why")


def test_a_stage_counts_each_reason() -> None:
    fates = [fate(Exit.DROPPED, "a"), fate(Exit.DROPPED, "a"), fate(Exit.QUARANTINED, "b")]
    count = count_stage(5, 2, fates)
    count.check("stage")
    assert count.to_record() == {"in": 5, "kept": 2, "dropped": {"a": 2}, "quarantined": {"b": 1}}
    assert StageCount.from_record(count.to_record()) == count
    assert fates_to_table(fates).num_rows == 3


def test_a_lost_row_is_noticed() -> None:
    with pytest.raises(AssertionError, match="lost rows"):
        count_stage(5, 3, [fate(Exit.DROPPED, "a")]).check("stage")


REQUEST = TeacherRequest("id", "performance", (Message("user", "How many?", ("ab" * 32,)),), Sampling(1.0), seed=3)
IDENTITY = ModelIdentity("model", "rev", {"k": 1})


def test_the_key_of_a_reply_does_not_change_between_releases() -> None:
    assert request_key(REQUEST, IDENTITY) == request_key(REQUEST, ModelIdentity("model", "rev", {"k": 1}))
    assert len(request_key(REQUEST, IDENTITY)) == 64


@pytest.mark.parametrize(
    "other",
    [
        TeacherRequest("id", "performance", (Message("user", "How many?!", ("ab" * 32,)),), Sampling(1.0), seed=3),
        TeacherRequest("id", "performance", (Message("user", "How many?", ("cd" * 32,)),), Sampling(1.0), seed=3),
        TeacherRequest("id", "performance", (Message("user", "How many?", ("ab" * 32,)),), Sampling(0.9), seed=3),
        TeacherRequest("id", "performance", (Message("user", "How many?", ("ab" * 32,)),), Sampling(1.0), seed=4),
        TeacherRequest(
            "id", "performance", (Message("user", "How many?", ("ab" * 32,)),), Sampling(1.0), seed=3, index=1
        ),
        TeacherRequest(
            "id", "performance", (Message("user", "How many?", ("ab" * 32,)),), Sampling(1.0), seed=3, choices=("a",)
        ),
    ],
)
def test_whatever_shapes_a_reply_changes_its_key(other: TeacherRequest) -> None:
    assert request_key(other, IDENTITY) != request_key(REQUEST, IDENTITY)


@pytest.mark.parametrize(
    "identity",
    [ModelIdentity("m", "rev", {"k": 1}), ModelIdentity("model", "r", {"k": 1}), ModelIdentity("model", "rev")],
)
def test_another_model_is_another_key(identity: ModelIdentity) -> None:
    assert request_key(REQUEST, identity) != request_key(REQUEST, IDENTITY)


def test_who_asks_does_not_change_the_key() -> None:
    asked_by_another = TeacherRequest("other", "audit", REQUEST.messages, REQUEST.sampling, seed=3)
    assert request_key(asked_by_another, IDENTITY) == request_key(REQUEST, IDENTITY)


def test_a_derived_seed_depends_on_every_part_and_fits_the_engine() -> None:
    assert derived_seed(1, "a", 2) == derived_seed(1, "a", 2)
    assert len({derived_seed(1, "a", 2), derived_seed(1, "a", 3), derived_seed(1, "a2"), derived_seed("1a", 2)}) == 4
    assert 0 <= derived_seed("x") < 2**31


def reference_key(request: TeacherRequest, identity: ModelIdentity) -> str:
    """Renders everything at once, as canonical JSON: the definition of the key."""
    shaped_by = {
        "model": identity.model,
        "revision": identity.revision,
        "extra_body": identity.extra_body,
        "messages": [asdict(message) for message in request.messages],
        "sampling": asdict(request.sampling),
        "seed": request.seed,
        "index": request.index,
        "choices": request.choices,
    }
    rendered = json.dumps(shaped_by, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(rendered.encode("utf-8", "surrogatepass")).hexdigest()


@given(
    st.lists(st.builds(Message, st.sampled_from(["user", "system"]), st.text(), st.tuples(st.text())), max_size=3),
    st.builds(Sampling, st.sampled_from([0, 0.0, 1, 1.0]), st.sampled_from([1, 1.0, 0.9]), st.integers(1, 9)),
    st.integers(0, 2**31 - 1),
    st.integers(0, 20),
    st.lists(st.text(), max_size=2),
    st.builds(ModelIdentity, st.text(), st.text(), st.dictionaries(st.text(), st.integers() | st.text(), max_size=2)),
)
def test_the_key_is_that_of_the_whole_request_rendered_at_once(
    messages: list[Message], sampling: Sampling, seed: int, index: int, choices: list[str], identity: ModelIdentity
) -> None:
    request = TeacherRequest("a" * 32, "performance", tuple(messages), sampling, seed, index, tuple(choices))
    assert request_key(request, identity) == reference_key(request, identity)
    assert request_key(request.sample(index + 1), identity) == reference_key(request.sample(index + 1), identity)
