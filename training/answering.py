"""How a model answers questions in the three modes, greedily: a checkpoint with transformers, or an endpoint.

Both go through the bi-mode chat template, so a question has the same tokens as in the corpus, in annealing and in BPO.
The reply to a question is what follows the forced prefix of the mode, as servers return it; an `Answer` is the whole
completion, prefix included.

`answer_questions` is all that another program needs. `checkpoint_replies` and `endpoint_replies` give replies as they
come, so that a caller can store them.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from corpus.storage import file_sha256
from judges.performance import answer_messages
from schemas.config import EndpointConfig
from schemas.errors import TeacherMisconfigured, TrainingError
from schemas.question import render_question
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from schemas.samples import Sample
from schemas.template import CLOSE_THINK, FORCED_PREFIX, OPEN_THINK, ThinkingMode
from sources import ImageStore
from teacher.client import Teacher, reply_key
from teacher.journal import Journal
from training.benchmark_questions import Question
from training.measures import Answer

PURPOSE = "evaluation"
MAX_NEW_TOKENS = 8192
"""The paper's evaluation setting (PAPER: BPO, table 4)."""

_PIXELS_PER_TOKEN = 28 * 28
_CHARS_PER_TOKEN = 3
_CHECK_SECONDS = 0.5

Numbered = tuple[int, Reply | CallFailure]
"""The place of a question in its sequence, and what came back."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are drawn. Always greedy.

    with_instruction: the question ends with the pipeline's sentence on where the final answer goes, as when a teacher
    is sampled. Without it, it is worded as in the corpus, and so for models trained on one.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    with_instruction: bool = False


def question_request(sample: Sample, generation: Generation) -> TeacherRequest:
    """Returns the request that asks a question, as any endpoint takes it."""
    images = tuple(image.sha256 for image in sample.images)
    if generation.with_instruction:
        messages = answer_messages(sample)
    else:
        messages = (Message("user", render_question(sample), images),)
    return TeacherRequest(sample.id, PURPOSE, messages, Sampling(0.0, 1.0, generation.max_new_tokens))


def answer_of(reply: Reply | CallFailure, prefix: str) -> Answer:
    """Returns the answer in a reply that continues a prefix. What a server's reasoning parser split off is put back."""
    if isinstance(reply, CallFailure):
        return Answer(failure=reply)
    if reply.reasoning:
        completion = f"{OPEN_THINK}\n{reply.reasoning}\n{CLOSE_THINK}{reply.text}"
    else:
        completion = prefix + reply.text
    return Answer(completion, reply.completion_tokens, reply.is_truncated)


def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    mode: ThinkingMode,
    *,
    generation: Generation | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Returns the answers of a model, in order.

    Raises TrainingError: the chat template does not know the mode, or the device's memory does not hold a batch.
    """
    generation = generation or Generation()
    prefix = template_prefixes(processor, [mode])[mode]
    replies = dict(checkpoint_replies(model, processor, questions, mode, generation=generation, batch_size=batch_size))
    return [answer_of(replies[index], prefix) for index in range(len(questions))]


# --- A checkpoint


def template_prefixes(processor: Any, modes: Sequence[ThinkingMode]) -> Mapping[ThinkingMode, str]:
    """Returns what a checkpoint's chat template puts before the replies of each mode.

    A checkpoint whose template is not the bi-mode one can be asked in auto mode alone, and its replies are whole.

    Raises TrainingError: there is no chat template, or it does not force the modes.
    """
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    try:
        rendered = {
            mode: processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, thinking_mode=str(mode)
            )
            for mode in modes
        }
    except ValueError as error:
        raise TrainingError(f"the checkpoint has no chat template that can be used: {error}") from error
    if all(text.endswith(f"\n{FORCED_PREFIX[mode]}") for mode, text in rendered.items()):
        return FORCED_PREFIX
    if list(modes) == [ThinkingMode.AUTO]:
        return {ThinkingMode.AUTO: ""}
    raise TrainingError(
        "the checkpoint's chat template does not know thinking_mode: anneal it first, or set modes: [auto]"
    )


class _Stopped(StoppingCriteria):
    """Ends generation for all rows once a caller wants it."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._should_stop(), dtype=torch.bool, device=input_ids.device)


def checkpoint_replies(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    mode: ThinkingMode,
    *,
    generation: Generation,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Numbered]:
    """Yields the reply to each question, batch by batch, the longest prompts first.

    Rows of like length share a batch, padded on the left. A prompt that the processor refuses or that does not fit the
    model's context gets a CallFailure, and its reason is `prompt_refused` or `prompt_too_long`. A reply ends at the
    context's end, if not before. should_stop: once it is true, the batch under way is given up and nothing more comes.

    Raises TrainingError: the device's memory does not hold a batch.
    """
    model.eval()
    texts = [prompt_text(processor, question, mode, generation) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (-_estimated_tokens(questions[i], texts[i]), i))
    for first in range(0, len(order), batch_size):
        if should_stop():
            return
        indices = order[first : first + batch_size]
        encoded = _encode(processor, [texts[i] for i in indices], [questions[i] for i in indices], model)
        yield from ((indices[place], failure) for place, failure in encoded.failures.items())
        if not encoded.places:
            continue
        replies = _generate(model, processor, encoded, generation, should_stop)
        if should_stop():
            return
        yield from zip((indices[place] for place in encoded.places), replies, strict=True)


def prompt_text(processor: Any, question: Question, mode: ThinkingMode, generation: Generation) -> str:
    """Returns the prompt of a question up to and with the forced prefix, one mark for each image."""
    text = question_request(question.sample, generation).messages[0].text
    num_images = len(question.sample.images) or len(question.load_images())
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    rendered: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, thinking_mode=str(mode)
    )
    return rendered


def _estimated_tokens(question: Question, text: str) -> float:
    """Returns about how long a prompt is. It orders the rows; nothing depends on its being right."""
    return sum(image.num_pixels for image in question.sample.images) / _PIXELS_PER_TOKEN + len(text) / _CHARS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The prompts of a batch that can be asked. inputs: of the model, padded on the left, for the rows at `places`.

    num_free [len(places)]: tokens that fit behind each prompt. failures: why the prompt at a place cannot be asked.
    """

    inputs: Any
    places: list[int]
    num_free: list[int]
    failures: dict[int, CallFailure]


def _encode(processor: Any, texts: list[str], questions: list[Question], model: Any) -> _Encoded:
    """Returns a batch without the prompts that the processor refuses or the context does not hold."""
    images = [question.load_images() for question in questions]
    failures: dict[int, CallFailure] = {}
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    places = list(range(len(texts)))
    while places:
        try:
            inputs = _process(processor, [texts[i] for i in places], [images[i] for i in places])
        except ValueError:  # one picture too narrow for the processor must not cost its neighbours their replies
            refused = _refusals(processor, texts, images, places)
            if not refused:
                raise
            failures |= refused
            places = [place for place in places if place not in refused]
            continue
        lengths: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
        num_free = [context - length if context else 2**31 for length in lengths]
        too_long = {place for place, free in zip(places, num_free, strict=True) if free < 1}
        if not too_long:
            return _Encoded(inputs.to(model.device), places, num_free, failures)
        for place, length in zip(places, lengths, strict=True):
            if place in too_long:
                detail = f"the prompt has {length:,} tokens with its images, the model's context {context:,}"
                failures[place] = CallFailure("prompt_too_long", detail)
        places = [place for place in places if place not in too_long]
    return _Encoded(None, [], [], failures)


def _process(processor: Any, texts: list[str], images: list[list[Any]]) -> Any:
    flat = [image for row in images for image in row]
    return processor(text=texts, images=flat or None, padding=True, padding_side="left", return_tensors="pt")


def _refusals(processor: Any, texts: list[str], images: list[list[Any]], places: list[int]) -> dict[int, CallFailure]:
    refused = {}
    for place in places:
        try:
            _process(processor, [texts[place]], [images[place]])
        except ValueError as error:
            refused[place] = CallFailure("prompt_refused", f"the processor refuses the prompt: {error}"[:500])
    return refused


def _generate(
    model: Any, processor: Any, encoded: _Encoded, generation: Generation, should_stop: Callable[[], bool]
) -> list[Reply]:
    """Returns the greedy continuation of each encoded prompt. Raises TrainingError: it does not fit the memory."""
    limits = [min(generation.max_new_tokens, free) for free in encoded.num_free]
    ends = end_tokens(model, processor.tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # checkpoints come with others (Qwen2.5-VL: 1.05), and greedy is greedy
        no_repeat_ngram_size=0,
        max_new_tokens=max(limits),
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    try:
        with torch.inference_mode():
            sequences = model.generate(
                **encoded.inputs,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([_Stopped(should_stop)]),
            )
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device's memory does not hold {len(limits)} prompts of {encoded.inputs['input_ids'].shape[1]} tokens "
            f"with up to {max(limits)} new ones: lower batch_size or max_new_tokens"
        ) from error
    prompt_length = encoded.inputs["input_ids"].shape[1]
    rows: list[list[int]] = sequences[:, prompt_length:].tolist()
    num_prompt_tokens: list[int] = encoded.inputs["attention_mask"].sum(dim=1).tolist()
    return [
        _reply(row[:limit], ends, processor.tokenizer, num_prompt)
        for row, limit, num_prompt in zip(rows, limits, num_prompt_tokens, strict=True)
    ]


def _reply(token_ids: list[int], ends: frozenset[int], tokenizer: Any, num_prompt_tokens: int) -> Reply:
    """Returns the reply in generated tokens. As in vLLM, the token that ends the turn counts and is not shown."""
    stop = next((place for place, token in enumerate(token_ids) if token in ends), None)
    kept = token_ids if stop is None else token_ids[: stop + 1]
    text = tokenizer.decode(kept if stop is None else kept[:-1], skip_special_tokens=True)
    return Reply(
        text,
        "length" if stop is None else "stop",
        "checkpoint",
        prompt_tokens=num_prompt_tokens,
        completion_tokens=len(kept),
    )


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end a reply: the checkpoint's own, the tokenizer's, and the template's end of a turn.

    Raises TrainingError: there is none.
    """
    own = model.generation_config.eos_token_id
    ends = {own} if isinstance(own, int) else set(own or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if isinstance(turn, int) and turn != tokenizer.unk_token_id:
        ends.add(turn)
    if not ends:
        raise TrainingError("neither the checkpoint nor its tokenizer names a token that ends a reply")
    return frozenset(ends)


def checkpoint_digest(path: str) -> str:
    """Returns a digest of a checkpoint's files by content, wherever they lie; of a hub name, the name itself.

    Raises StorageError: a file cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".bin", ".jinja", ".txt", ".model"}:
            digest.update(f"{file.name}\x1f{file_sha256(file)}\n".encode())
    return digest.hexdigest()


# --- An endpoint


def in_mode(endpoint: EndpointConfig, mode: ThinkingMode) -> EndpointConfig:
    """Returns the endpoint asked for a mode of the template, beside what its `extra_body` says already."""
    arguments = {**endpoint.extra_body.get("chat_template_kwargs", {}), "thinking_mode": str(mode)}
    return endpoint.model_copy(update={"extra_body": {**endpoint.extra_body, "chat_template_kwargs": arguments}})


async def endpoint_prefixes(endpoint: EndpointConfig, modes: Sequence[ThinkingMode]) -> Mapping[ThinkingMode, str]:
    """Returns what an endpoint puts before the replies of each mode, after checking that it answers at all.

    Endpoints whose chat template does not know `thinking_mode` ignore it silently, and all modes would measure the
    same. The forced prefixes differ by a token each, so the lengths of one prompt in three modes tell. Such an endpoint
    can still be asked in auto mode: its replies are whole.

    Raises TeacherUnreachable: it does not answer. TeacherMisconfigured: it does not serve the model, or ignores modes
    other than auto.
    """
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "probe") as journal:
        lengths = [await _prompt_length(in_mode(endpoint, mode), journal) for mode in _BY_PREFIX_LENGTH]
    if lengths[0] < lengths[1] < lengths[2]:
        return FORCED_PREFIX
    if list(modes) == [ThinkingMode.AUTO]:
        return dict.fromkeys(ThinkingMode, "")
    raise TeacherMisconfigured(
        f"{endpoint.url} ignores thinking_mode: a prompt has {', '.join(map(str, lengths))} tokens in the modes "
        f"{', '.join(_BY_PREFIX_LENGTH)}. Serve a checkpoint with the bi-mode chat template, or set modes: [auto]"
    )


_BY_PREFIX_LENGTH = (ThinkingMode.AUTO, ThinkingMode.LONG, ThinkingMode.SHORT)


async def _prompt_length(endpoint: EndpointConfig, journal: Journal) -> int:
    request = TeacherRequest("", "probe", (Message("user", "Hello"),), Sampling(max_tokens=1))
    async with Teacher(endpoint, journal, _no_images) as teacher:
        await teacher.check()
        reply = await teacher.ask(request)
    if isinstance(reply, CallFailure):
        raise TeacherMisconfigured(f"{endpoint.url} does not answer a question of one word: {reply.detail}")
    return reply.prompt_tokens


def _no_images(sha256: str, max_pixels: int) -> tuple[bytes, str]:
    raise AssertionError("the probe has no images")


async def endpoint_replies(
    endpoint: EndpointConfig,
    journal: Journal,
    store: ImageStore,
    questions: Sequence[Question],
    mode: ThinkingMode,
    *,
    generation: Generation,
    on_reply: Callable[[Reply | CallFailure, bool], None] = lambda _reply, _is_stored: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Reply | CallFailure] | None:
    """Returns the reply to each question, in order, each on the disk before it counts; None if it was stopped.

    Replies in the journal are not asked for again. on_reply: told each reply as it comes, and whether it was stored.

    Raises TeacherUnreachable, TeacherMisconfigured: asking further is useless. StorageError: the journal fails.
    """
    asked = in_mode(endpoint, mode)
    async with Teacher(asked, journal, store.resized_bytes, store.resized_path) as teacher:

        async def ask(question: Question) -> Reply | CallFailure:
            request = question_request(question.sample, generation)
            is_stored = reply_key(request, asked) in journal
            reply = await teacher.ask(request)
            on_reply(reply, is_stored)
            return reply

        work = asyncio.gather(*(ask(question) for question in questions))
        while not work.done():
            await asyncio.wait({work}, timeout=_CHECK_SECONDS)
            if should_stop() and not work.done():
                work.cancel()
                await asyncio.wait({work})
                return None
        return await work
