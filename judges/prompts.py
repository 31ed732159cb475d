"""The prompt files beside the judges, and the fence that keeps data from instructing a judge."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from schemas.requests import Message
from schemas.samples import Sample

ANSWER_INSTRUCTION = "End with a line 'Answer:' and the final answer alone."
CHOICE_INSTRUCTION = "End with a line 'Answer:' and the letter of the right option alone."

_MAX_FENCED_CHARACTERS = 20_000


@cache
def prompt(name: str) -> str:
    """Returns the text of the prompt file judges/prompts/{name}.md."""
    return files("judges").joinpath(f"prompts/{name}.md").read_text(encoding="utf-8").strip()


def fence(tag: str, text: str) -> str:
    """Returns the text between <tag> and </tag>, unable to close the fence itself or to open a chat turn.

    Tags that look like the fence lose their angle brackets; engine tokens such as <|im_start|> are broken up. Text
    beyond 20,000 characters is cut and says so.
    """
    text = re.sub(rf"<\s*(/?)\s*{tag}\s*>", rf"(\1{tag})", text, flags=re.IGNORECASE)
    text = text.replace("<|", "< |")
    if len(text) > _MAX_FENCED_CHARACTERS:
        text = text[:_MAX_FENCED_CHARACTERS] + " [cut]"
    return f"<{tag}>\n{text}\n</{tag}>"


def judge_messages(name: str, user_text: str, sample: Sample) -> tuple[Message, ...]:
    """Returns the system prompt of a judge and one user turn that shows the sample's images before the text."""
    return (
        Message("system", prompt(name)),
        Message("user", user_text, tuple(image.sha256 for image in sample.images)),
    )
