"""The one renderer of the bi-mode template: corpus, annealing, BPO, evaluation and serving all use it, byte for byte.

A completion is `<think>\\n{reasoning}\\n</think>{answer}`; with an empty reasoning, `<think>\\n\\n</think>{answer}`,
the non-thinking form of R-4B (arXiv 2508.21113, sections 2.2 and 4.1). The choice between the modes is the single token
after `<think>`: "\\n" opens a thought, "\\n\\n" none. That holds where `<think>` and `</think>` are tokens of their own
and the pre-tokeniser keeps runs of newlines together (Qwen2, Qwen2.5 and Qwen3 do). They are added as ordinary, not
special, tokens: decoding would strip special ones before a reward or a parser sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schemas.errors import RowError
from schemas.verdicts import Mode

OPEN_THINK = "<think>"
CLOSE_THINK = "</think>"
THINK_TOKENS = (OPEN_THINK, CLOSE_THINK)


class ThinkingMode(StrEnum):
    """What a client asks of a served model, by R-4B's names: its own choice, always thinking, never thinking."""

    AUTO = "auto"
    LONG = "long"
    SHORT = "short"


FORCED_PREFIX = {
    ThinkingMode.AUTO: OPEN_THINK,
    ThinkingMode.LONG: f"{OPEN_THINK}\n",
    ThinkingMode.SHORT: f"{OPEN_THINK}\n\n{CLOSE_THINK}",
}
"""The text placed after the assistant turn opens, by mode; the model continues it."""

BARE_TURN = "bare"
"""Of the chat template: opens the assistant's turn and nothing else. BPO's completions begin with their own prefix."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or part['type'] == 'image_url' or 'image' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- set mode = thinking_mode | default('auto') -%}"
    "{%- if mode == 'long' -%}{{- '<think>\\n' -}}"
    "{%- elif mode == 'short' -%}{{- '<think>\\n\\n</think>' -}}"
    "{%- elif mode == 'auto' -%}{{- '<think>' -}}"
    "{%- elif mode != 'bare' -%}"
    "{{- raise_exception('thinking_mode must be auto, long or short, not ' + mode) -}}{%- endif -%}"
    "{%- endif -%}"
)
"""Jinja chat template saved with every checkpoint: Qwen2.5-VL's turn format, opened by the forced prefix of a mode."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion taken apart. reasoning is "" for a non-thinking one."""

    reasoning: str
    answer: str

    @property
    def mode(self) -> Mode:
        return Mode.THINK if self.reasoning else Mode.DIRECT


def render_completion(answer: str, reasoning: str = "") -> str:
    """Returns the assistant's text for an answer, with its reasoning or with the empty think block.

    Outer white space of both parts is removed: a thought that began with a newline would turn the choice token "\\n"
    into "\\n\\n". `parse_completion` is the inverse on stripped parts.

    Raises RowError: if either part contains a think tag, which would make the completion ambiguous, or if the answer
    is empty.
    """
    reasoning, answer = reasoning.strip(), answer.strip()
    for part, text in (("reasoning", reasoning), ("answer", answer)):
        if any(tag in text for tag in THINK_TOKENS):
            raise RowError("think_tag_in_text", f"the {part} contains a think tag: {text[:80]!r}")
    if not answer:
        raise RowError("answer_empty", "the answer is empty")
    return f"{OPEN_THINK}\n{reasoning}\n{CLOSE_THINK}{answer}"


def parse_completion(text: str) -> Completion:
    """Returns reasoning and answer of an assistant's text; only what follows the last `</think>` is the answer.

    The opening tag may be missing (servers return only what follows a forced prefix). Text without `</think>` is all
    answer, unless it opens a thought: then the thought never ended and the answer is empty.
    """
    before, closing, after = text.rpartition(CLOSE_THINK)
    if closing:
        return Completion(before.replace(OPEN_THINK, "").replace(CLOSE_THINK, "").strip(), after.strip())
    if OPEN_THINK in text:
        return Completion(text.partition(OPEN_THINK)[2].strip(), "")
    return Completion("", text.strip())
