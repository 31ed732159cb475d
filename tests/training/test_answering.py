"""Answering with the bundled teacher: a real checkpoint whose replies mean something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from judges.answers import VerifierPool
from judges.prompts import ANSWER_INSTRUCTION
from schemas.config import EndpointConfig, ImageLimits, VerificationConfig
from schemas.errors import TeacherMisconfigured, TeacherUnreachable, TrainingError
from schemas.requests import CallFailure, Reply
from schemas.samples import Sample
from schemas.template import FORCED_PREFIX, ThinkingMode
from sources import ImageStore
from teacher.journal import Journal
from tests.replay_teacher import Body, ReplayTeacher, completion
from training import answering
from training.answering import (
    Generation,
    answer_of,
    answer_questions,
    checkpoint_digest,
    checkpoint_replies,
    endpoint_prefixes,
    endpoint_replies,
    prompt_text,
    template_prefixes,
)
from training.benchmark_questions import BenchmarkConfig, Question, read_benchmark
from training.checkpoints import load_checkpoint
from training.measures import score

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "sampleworld" / "teacher"
SHORT = Generation(max_new_tokens=200)

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    return load_checkpoint(str(TEACHER), bf16=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("store"), ImageLimits())


@pytest.fixture(scope="module")
def questions(store: ImageStore, tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Twelve questions about the sample world, of very different lengths."""
    table = pq.read_table(ROOT / "sampleworld" / "data" / "checkable.parquet")
    path = tmp_path_factory.mktemp("bench") / "world.parquet"
    pq.write_table(table.rename_columns({"image": "images"}), path)
    config = BenchmarkConfig(name="world", path=str(path), format="samples")
    return list(read_benchmark(config, store=store, max_questions=12).questions)


@pytest.fixture
def short_context(teacher: Loaded) -> Iterator[Callable[[int], None]]:
    config = teacher[0].config.get_text_config()
    whole = config.max_position_embeddings

    def shorten(num_tokens: int) -> None:
        config.max_position_embeddings = num_tokens

    yield shorten
    config.max_position_embeddings = whole


def text_question(text: str) -> Question:
    return Question(Sample(text, "s", "s#0", text, answer="7"))


def drawn(colour: str, size: tuple[int, int]) -> Question:
    question = text_question("What number is in the red cell?")
    return replace(question, load_images=lambda: [Image.new("RGB", size, colour)])


# --- A checkpoint


@pytest.mark.parametrize("mode", list(ThinkingMode))
def test_a_batch_padded_on_the_left_answers_as_its_rows_do_alone(
    teacher: Loaded, questions: list[Question], mode: ThinkingMode
) -> None:
    mixed = [*questions, text_question("Hello")]
    together = answer_questions(*teacher, mixed, mode, generation=SHORT, batch_size=5)
    alone = answer_questions(*teacher, mixed, mode, generation=SHORT, batch_size=1)
    assert together == alone


def test_a_mode_forces_its_prefix_and_the_trained_model_keeps_to_it(teacher: Loaded, questions: list[Question]) -> None:
    answers = {mode: answer_questions(*teacher, questions, mode, generation=SHORT) for mode in ThinkingMode}
    for mode, of_mode in answers.items():
        assert all(answer.completion.startswith(FORCED_PREFIX[mode]) for answer in of_mode)
    assert all(answer.has_thought for answer in answers[ThinkingMode.LONG])
    assert not any(answer.has_thought for answer in answers[ThinkingMode.SHORT])
    with VerifierPool(VerificationConfig(num_workers=1)) as verifiers:
        accuracy = score(questions, answers[ThinkingMode.LONG], verifiers).accuracy
    assert accuracy.num >= 10  # of twelve


def test_output_tokens_are_those_after_the_prefix_with_the_end_of_the_turn(teacher: Loaded) -> None:
    tokenizer = teacher[1].tokenizer
    (answer,) = answer_questions(*teacher, [drawn("red", (84, 84))], ThinkingMode.LONG, generation=SHORT)
    said = answer.completion.removeprefix(FORCED_PREFIX[ThinkingMode.LONG])
    assert answer.num_tokens == len(tokenizer.encode(said, add_special_tokens=False)) + 1
    assert not answer.is_truncated


def test_a_reply_at_the_length_limit_is_truncated_and_holds_so_many_tokens(
    teacher: Loaded, questions: list[Question]
) -> None:
    generation = Generation(max_new_tokens=4)
    for answer in answer_questions(*teacher, questions, ThinkingMode.LONG, generation=generation):
        assert (answer.num_tokens, answer.is_truncated) == (4, True)


def test_a_penalty_that_came_with_the_checkpoint_does_not_bend_greedy_decoding(
    teacher: Loaded, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answer_questions(*teacher, questions, ThinkingMode.LONG, generation=SHORT)
    for name, value in (("repetition_penalty", 5.0), ("do_sample", True), ("temperature", 3.0)):
        monkeypatch.setattr(teacher[0].generation_config, name, value)
    assert answer_questions(*teacher, questions, ThinkingMode.LONG, generation=SHORT) == plain


def test_an_image_whose_tokens_exceed_the_context_is_a_counted_failure_and_its_neighbours_are_answered(
    teacher: Loaded, short_context: Callable[[int], None]
) -> None:
    long, short = drawn("red", (112, 112)), text_question("Hello")
    expected = answer_questions(*teacher, [short], ThinkingMode.SHORT, generation=SHORT)
    short_context(25)
    answers = answer_questions(*teacher, [long, short], ThinkingMode.SHORT, generation=SHORT)
    assert answers[0].failure is not None
    assert answers[0].failure.reason == "prompt_too_long"
    assert "the model's context 25" in answers[0].failure.detail
    assert answers[1:] == expected


def test_a_reply_ends_where_the_context_does_and_is_truncated(
    teacher: Loaded, short_context: Callable[[int], None]
) -> None:
    short = drawn("red", (84, 84))
    pair = [replace(short, sample=replace(short.sample, question="Please: what number is in the red cell?")), short]
    prompts = [teacher[1].tokenizer.encode(prompt_text(teacher[1], q, ThinkingMode.LONG, SHORT)) for q in pair]
    num_prompt = [len(prompt) + 8 for prompt in prompts]  # one mark stands for nine tokens of image
    assert num_prompt[0] > num_prompt[1]
    short_context(num_prompt[0] + 2)
    answers = answer_questions(*teacher, pair, ThinkingMode.LONG, generation=SHORT)
    assert [answer.is_truncated for answer in answers] == [True, True]
    assert [answer.num_tokens for answer in answers] == [2, num_prompt[0] + 2 - num_prompt[1]]


def test_an_image_that_the_processor_refuses_costs_its_own_question_alone(teacher: Loaded) -> None:
    good, thin = drawn("red", (84, 84)), drawn("blue", (2, 900))
    expected = answer_questions(*teacher, [good], ThinkingMode.SHORT, generation=SHORT)
    answers = answer_questions(*teacher, [thin, good], ThinkingMode.SHORT, generation=SHORT)
    assert answers[0].failure is not None
    assert answers[0].failure.reason == "prompt_refused"
    assert answers[1:] == expected


def test_memory_that_does_not_hold_a_batch_is_a_clear_error(
    teacher: Loaded, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher[0], "generate", full)
    with pytest.raises(TrainingError, match="lower batch_size"):
        answer_questions(*teacher, questions, ThinkingMode.AUTO)


def test_a_stopped_run_gives_up_the_batch_under_way_and_keeps_those_before_it(
    teacher: Loaded, questions: list[Question]
) -> None:
    replies: dict[int, Reply | CallFailure] = {}
    for index, reply in checkpoint_replies(
        *teacher,
        questions,
        ThinkingMode.LONG,
        generation=SHORT,
        batch_size=4,
        should_stop=lambda: len(replies) >= 4,
    ):
        replies[index] = reply
    assert len(replies) == 4
    whole = dict(checkpoint_replies(*teacher, questions, ThinkingMode.LONG, generation=SHORT, batch_size=4))
    assert replies.items() <= whole.items()


def test_a_question_is_worded_and_tokenised_as_in_the_corpus(teacher: Loaded, questions: list[Question]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor, question = teacher[1], questions[0]
    row = {
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.sample.question}]}
        ],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "<think>\nHm.\n</think>7"}]}],
        "images": question.load_images(),
    }
    trained = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([row])["input_ids"][
        0
    ].tolist()
    for mode in (ThinkingMode.AUTO, ThinkingMode.LONG):
        text = prompt_text(processor, question, mode, SHORT)
        asked = processor(text=[text], images=question.load_images(), return_tensors="pt")["input_ids"][0].tolist()
        assert trained[: len(asked)] == asked


def test_the_instruction_is_the_pipelines_own_and_comes_only_if_asked_for(
    teacher: Loaded, questions: list[Question]
) -> None:
    plain, instructed = (
        prompt_text(teacher[1], questions[0], ThinkingMode.AUTO, Generation(with_instruction=wanted))
        for wanted in (False, True)
    )
    assert ANSWER_INSTRUCTION not in plain
    assert ANSWER_INSTRUCTION in instructed


def test_a_template_that_does_not_force_modes_can_be_asked_in_auto_alone(teacher: Loaded) -> None:
    class Plain:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "<|im_start|>assistant\n"

    class Silent:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise ValueError("this processor does not have a chat template")

    assert template_prefixes(teacher[1], list(ThinkingMode)) == FORCED_PREFIX
    assert template_prefixes(Plain(), [ThinkingMode.AUTO]) == {ThinkingMode.AUTO: ""}
    with pytest.raises(TrainingError, match="does not know thinking_mode"):
        template_prefixes(Plain(), list(ThinkingMode))
    with pytest.raises(TrainingError, match="no chat template"):
        template_prefixes(Silent(), list(ThinkingMode))


def test_a_checkpoint_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    digests = [checkpoint_digest(str(tmp_path / name)) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert checkpoint_digest("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_thought_that_a_server_split_off_is_put_back() -> None:
    reply = Reply("7", "stop", "m", reasoning="Three and four.", completion_tokens=9)
    answer = answer_of(reply, FORCED_PREFIX[ThinkingMode.AUTO])
    assert answer.completion == "<think>\nThree and four.\n</think>7"
    assert (answer.has_thought, answer.num_tokens) == (True, 9)


# --- An endpoint (the real server is asked in test_evaluate_vllm.py)


PREFIX_TOKENS = {"auto": 1, "long": 2, "short": 3}


def bimode(body: Body) -> Body:
    """Answers as a server with the bi-mode template does; the prompt's length tells the mode."""
    mode = body["chat_template_kwargs"]["thinking_mode"]
    answer = completion({"auto": "\n\n</think>7", "long": "Hm.\n</think>7", "short": "7"}[mode], body)
    answer["usage"]["prompt_tokens"] = 10 + PREFIX_TOKENS[mode]
    return answer


def ignorant(body: Body) -> Body:
    """Answers as a server whose template has no modes."""
    answer = completion("The answer is 7.", body)
    answer["usage"]["prompt_tokens"] = 10
    return answer


async def test_an_endpoint_that_honours_the_modes_continues_their_prefixes() -> None:
    with ReplayTeacher(bimode, models=["m"]) as server:
        endpoint = EndpointConfig(model="m", url=server.url)
        assert await endpoint_prefixes(endpoint, list(ThinkingMode)) == FORCED_PREFIX


async def test_an_endpoint_that_ignores_the_modes_is_refused_or_asked_in_auto_alone() -> None:
    with ReplayTeacher(ignorant, models=["m"]) as server:
        endpoint = EndpointConfig(model="m", url=server.url)
        with pytest.raises(TeacherMisconfigured, match=r"ignores thinking_mode.*set modes: \[auto\]"):
            await endpoint_prefixes(endpoint, list(ThinkingMode))
        prefixes = await endpoint_prefixes(endpoint, [ThinkingMode.AUTO])
        assert prefixes[ThinkingMode.AUTO] == ""


async def test_an_endpoint_with_another_model_or_none_at_all_is_a_clear_error() -> None:
    with ReplayTeacher(bimode, models=["other"]) as server, pytest.raises(TeacherMisconfigured, match="serves 'other'"):
        await endpoint_prefixes(EndpointConfig(model="m", url=server.url), list(ThinkingMode))
    gone = EndpointConfig(model="m", url=server.url, unreachable_seconds=0.2)
    with pytest.raises(TeacherUnreachable, match="has not answered"):
        await endpoint_prefixes(gone, list(ThinkingMode))


async def test_the_mode_travels_beside_the_settings_of_the_user(
    questions: list[Question], store: ImageStore, tmp_path: Path
) -> None:
    seen: list[Body] = []

    def note(body: Body) -> Body:
        seen.append(body)
        return bimode(body)

    own = {"chat_template_kwargs": {"add_vision_id": False}, "repetition_penalty": 1.0}
    with ReplayTeacher(note, models=["m"]) as server, Journal(tmp_path / "j") as journal:
        endpoint = EndpointConfig(model="m", url=server.url, extra_body=own)
        await endpoint_replies(endpoint, journal, store, questions[:1], ThinkingMode.LONG, generation=SHORT)
    assert seen[0]["chat_template_kwargs"] == {"add_vision_id": False, "thinking_mode": "long"}
    assert (seen[0]["repetition_penalty"], seen[0]["temperature"]) == (1.0, 0.0)
    assert seen[0]["max_completion_tokens"] == 200


async def test_a_stopped_run_leaves_the_endpoint_and_what_was_answered_is_not_asked_again(
    questions: list[Question], store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_CHECK_SECONDS", 0.05)
    told: list[bool] = []

    def note(_reply: Reply | CallFailure, is_stored: bool) -> None:
        told.append(is_stored)

    with ReplayTeacher(bimode, models=["m"], delay_seconds=0.1) as server, Journal(tmp_path / "j") as journal:
        endpoint = EndpointConfig(model="m", url=server.url, concurrency=2)

        async def ask(should_stop: Callable[[], bool]) -> list[Reply | CallFailure] | None:
            return await endpoint_replies(
                endpoint,
                journal,
                store,
                questions,
                ThinkingMode.AUTO,
                generation=SHORT,
                on_reply=note,
                should_stop=should_stop,
            )

        assert await ask(lambda: len(told) >= 4) is None
        num_stored = len(journal)
        assert 4 <= num_stored < len(questions)
        told.clear()
        replies = await ask(lambda: False)
    assert replies is not None
    assert [type(reply) for reply in replies] == [Reply] * len(questions)
    assert told.count(True) == num_stored
