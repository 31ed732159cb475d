"""Phrases that no chain of thought may contain, each with the words that herald it.

Most traces hold none, and looking for words takes a tenth of the time of a pattern with many branches: a pattern is
tried only where one of its heralds stands. Every match of it contains one; a test holds that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

_IMAGE = r"(?:image|picture|photo(?:graph)?|figure|diagram|chart|graph|attachment)s?"
_CANNOT = (
    r"(?:can ?not|can't|could ?n[o']t|do(?: not|n't) have (?:the ability|access) to|(?:am|was) (?:not able|unable) to)"
)

_PERSONA = {
    "speaks as a language model": (
        r"\bas an? (?:(?:ai|artificial intelligence)(?: language)?(?: model| assistant)?|(?:large )?language model)\b"
        r"(?=[ ,.;:])(?! (?:engineer|researcher|expert|company|student|developer))"
        r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large |text-based )?language model)\b"
        r"|\bas a text-based (?:ai|model|assistant|platform)|\bthis is a text-based (?:platform|format|model)"
        r"|作为(?:一个|一名|一款)?(?:ai|人工智能|语言模型|大模型)"
    ),
    "refuses": (
        r"\bi(?:'m| am) sorry,? but i (?:can ?not|can't|am (?:unable|not able))\b"
        r"|\bi (?:can ?not|can't|am unable to) (?:assist|help) (?:you )?with (?:this|that|your)\b"
    ),
    "says that it cannot see the image": (
        rf"\bi {_CANNOT} (?:\w+ ){{0,2}}?(?:see|view|access|open|display|load|look at|analy[sz]e) "
        rf"(?:\w+ )?(?:the|this|that|any|your|an|attached|provided|actual)(?: \w+)? ?{_IMAGE}\b(?!')"
        rf"|\bno {_IMAGE} (?:\w+ )?(?:provided|attached|given|uploaded|included)\b"
        rf"|\bthe {_IMAGE} (?:is|was|has)(?: not|n't) (?:been )?(?:provided|attached|uploaded|included|loaded)\b"
        rf"|\bplease (?:provide|upload|share|attach) [^.?!]{{0,60}}\b{_IMAGE}\b[^.?!]{{0,60}} so (?:that )?(?:i|we) can"
        r"|我(?:无法|不能|没法|看不到|看不见)(?:直接)?(?:查看|看到|访问|看见)?(?:这张|该|您的|你的|任何)?(?:图片|图像|照片)"
    ),
}
"""Phrases that neither trace nor answer may contain, matched in plain text, case ignored."""

_LEAKS = {
    "leans on a reference answer": (
        r"\b(?:reference|model|official) answers?\b"
        r"|\bthe (?:given|provided|expected|standard|known) answer (?:is|was|says|states|must|should|of|being|here)\b"
        r"|\b(?:according to|based on|given|match(?:es|ing)?|per|consistent with|agrees? with) the "
        r"(?:(?:provided|reference|expected|official|model) (?:answer|solution)|(?:given|standard|known) answer)\b"
        r"(?!'| (?:choice|option|has|with|contain|of|in|at))"
        r"|\bthe (?:provided|reference|official|given) (?:answer|solution) (?:says|states|claims|confirms|indicates)\b"
        r"|\baccording to the answer key\b|\bthe answer key (?:says|states|gives|confirms)\b"
        r"|\b(?:i|we) (?:was|were|am|are|have been|had been) (?:given|told|provided with) the "
        r"(?:correct |final |right |expected )?answer\b"
        r"|\b(?:i|we) (?:already )?know (?:that )?the (?:correct |final |right |expected )?answer "
        r"(?:is supposed to|should be|must be|in advance|already)\b"
        r"|参考答案|标准答案"
    ),
    "mentions the ground truth": (
        r"\bground[- ]truth\b(?! (?:lines?|curves?|bars?|box(?:es)?|bounding|masks?|labels?|images?|segmentation|"
        r"points?|data|maps?|columns?|rows?|series|plots?|values?|depth|annotations?|trajector\w+|distribution|"
        r"(?:is|are) (?:shown|plotted|drawn|marked|represented|displayed|indicated|in|"
        r"the (?:top|bottom|left|right|first|last|red|green|blue|black|white|gr[ae]y|orange|solid|dashed|dotted)))\b)"
    ),
    "quotes its instructions": (
        r"\bthe system prompt\b|\bthe prompt (?:instructs|tells|asks|requires) (?:me|us)\b"
        r"|\bmy (?:system )?instructions\b|\byou are an? helpful (?:ai )?assistant\b"
    ),
}
"""Phrases that betray what the reasoner was given beside the question; allowed where the question itself uses them."""

_LEFTOVER_MARKUP = (
    r"<[|｜](?:im_start|im_end|im_sep|endoftext|eot_id|eom_id|end|user|assistant|system|tool|pad|image|video|audio|"
    r"[\w▁]{1,40}[_▁][\w▁]{1,40})[|｜]>"
    r"|</?(?:image|video)(?:[ _-]?\d{1,3}|here)?>"
    r"|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>|</s>\s*\Z|\A\s*<s>"
    r"|^#{2,4} ?(?:instruction|response|human|assistant|user|system)s?:"
    r"|</?(?:answer|reasoning|thought|thinking|scratchpad|reflection|tool_call|tool_response)>"
)
_DAMAGED_CHARACTER = (
    "\ufffd|[\ud800-\udfff]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[\ufffe\uffff]"
    "|[ÃÂ][\u00a0-\u00bf]|Ã—(?=\\s?\\d)|â€[™œžŸ˜“”¦¢š›†‡‰]|ï»¿"
)
"""What no text of a corpus may contain, matched as it stands: control tokens break training or serving, and a damaged
character (replacement, lone surrogate, control character such as the form feed of an unescaped "\\frac", UTF-8 read as
Latin-1) would be learned."""

_IMAGES = ("image", "picture", "photo", "figure", "diagram", "chart", "graph", "attachment")
_GIVEN = ("given", "provided", "expected", "standard", "known", "reference", "official", "model")
_HERALDS = {
    "speaks as a language model": (" ai", "artificial intelligence", "language model", "text-based", "作为"),
    "refuses": ("sorry", "assist", "help"),
    "says that it cannot see the image": (
        *("cannot", "can not", "can't", "couldn", "could n", "not have", "n't have", "not able", "unable"),
        *(f"no {image}" for image in _IMAGES),
        *("provided", "attached", "included", "loaded", "please"),
        *("我无法", "我不能", "我没法", "我看不"),
    ),
    "leans on a reference answer": (
        *(f"{given} {what}" for given in _GIVEN for what in ("answer", "solution")),
        *("answer key", "given the ", "told the ", "provided with the ", "know the ", "know that the "),
        *("参考答案", "标准答案"),
    ),
    "mentions the ground truth": ("ground truth", "ground-truth"),
    "quotes its instructions": ("the system prompt", "the prompt", "instructions", "helpful"),
    "contains a leftover template token": ("<", "[", "##"),
}
"""Of each pattern that ignores case."""

_ODD_CASES = {ord("\u0130"): "i", ord("\u0131"): "i", ord("\u017f"): "s", ord("\u212a"): "k"}
"""Letters that a pattern that ignores case takes for ASCII ones, and `str.lower` does not."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """what: a trace does that holds it. heralds: every match, in small letters, contains one of them."""

    what: str
    heralds: tuple[str, ...]
    pattern: re.Pattern[str]

    def is_heralded(self, small: str) -> bool:
        """Says whether a text may hold the phrase. small: the text in small letters, see `small_letters`."""
        return any(map(small.__contains__, self.heralds))


def small_letters(text: str) -> str:
    """Returns a text in small letters, as patterns see it that ignore case."""
    return text.lower() if text.isascii() else text.translate(_ODD_CASES).lower()


@cache
def persona_phrases() -> list[Phrase]:
    """Returns what neither trace nor answer may say, matched in plain text."""
    return _phrases(_PERSONA)


@cache
def leak_phrases() -> list[Phrase]:
    """Returns what betrays what the reasoner was given beside the question, matched in plain text.

    Allowed where the question itself says so.
    """
    return _phrases(_LEAKS)


@cache
def leftover_markup() -> Phrase:
    """Returns what breaks training or serving, matched in the text as it stands."""
    (phrase,) = _phrases({"contains a leftover template token": _LEFTOVER_MARKUP})
    return phrase


def damaged_character(text: str) -> str | None:
    """Returns a character that no text of a corpus may contain, None if there is none."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable():
        return None
    match = _damage().search(text)
    return match[0] if match else None


@cache
def _damage() -> re.Pattern[str]:
    return re.compile(_DAMAGED_CHARACTER)


def _phrases(patterns: Mapping[str, str]) -> list[Phrase]:
    return [
        Phrase(what, _HERALDS[what], re.compile(pattern, re.IGNORECASE | re.MULTILINE))
        for what, pattern in patterns.items()
    ]
