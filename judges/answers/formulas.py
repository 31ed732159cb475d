"""Formulas as text: recognising them, cutting them out of a statement, and writing them as LaTeX for the parser.

Nothing here evaluates anything; `judges.answers.parser` does, in a process that can be killed.
"""

from __future__ import annotations

import re
from functools import lru_cache

from judges.answers.statements import Statement
from judges.answers.text import unify_characters

MAX_FORMULA_CHARS = 600
"""Longer formulas are no final answers; refusing them keeps the parser's work bounded."""

_MAX_NESTING = 40

_MATH_SEGMENT = re.compile(
    r"\$\$([^$]{1,600})\$\$|\$([^$]{1,600})\$|\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]", re.DOTALL
)
_COMMAND = re.compile(
    r"\\(?:d?frac|tfrac|sqrt|pi|theta|alpha|beta|gamma|cdot|times|div|infty|pm|leq?|geq?|neq?|in|cup|cap|sin|cos|tan|log|ln"
    r"|begin|left|binom|emptyset|varnothing|overline|angle|lambda|phi|varphi|mu|sigma|omega)(?![a-zA-Z])"
)
_FUNCTION = r"(?:sqrt|cbrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|abs|min|max|gcd|lcm)"
_PLAIN_ATOM = (
    rf"(?:\d+(?:\.\d+)?|{_FUNCTION}(?![a-z])|(?:pi|infinity|infty|theta|alpha|beta|gamma|oo)(?![a-z])"
    r"|[a-zA-Z](?![a-zA-Z]{2})|[πθαβγλφ∞√∅])"
)
_PLAIN_FORMULA = re.compile(rf"(?:{_PLAIN_ATOM}|[-+*/^=<>≤≥≠±×·÷!|(){{}}\[\],;:%_\s∪∩∈]|\\.)+")
_OPERATOR = re.compile(
    r"[-+*/^=<>≤≥≠±×·÷√π∞∪∩∈∅|!]|\\|\d\s?[a-zA-Z]|[a-zA-Z]\s?\d|[\[({].*,.*[\])}]|\d\s?:\s?\d|\bpi\b|\bsqrt\b"
)
_TAIL = re.compile(
    r"\s(?:because|since|as|where|which|when|so|with|for|after|by|if|using|from|that|and\s+(?:the|so|thus))\b.*$"
    r"|(?<!\d)[.;]\s.*$|\.\s*$|,\s+(?:because|since|as|where|which|so|with|for|and|the)\b.*$",
    re.DOTALL | re.IGNORECASE,
)
_COPULA = re.compile(
    r"(?:.*\b(?:is|are|equals|be|was|were|becomes|get|gives|obtain|have)\b|.*:)\s*(?:therefore|thus|then|simply|just|equal\s+to|given\s+by)?\s*(?=\S)",
    re.DOTALL | re.IGNORECASE,
)
_UNIT_TAIL = re.compile(
    r"(?:\\?\s|(?<=\d)|(?<=\})|(?<=\)))\s*(?:\\?(?:text|mathrm)\s?\{\s*)?(?:square|cubic|sq\.?)?\s*"
    r"(?:km|cm|mm|dm|meters?|metres?|inch(?:es)?|feet|ft|units?|degrees?|°|\^?\{?\\circ\}?|kg|grams?|litres?|liters?|hours?|minutes?|seconds?)"
    r"(?:\s?\^?\{?[23]\}?)?\s*\}?\s*\.?$"
)
_NAMED_VALUE = re.compile(
    r"^\s*(?:[a-zA-Z]\w{0,2}(?:_\{?\w{1,5}\}?)?(?:\s?\(\s?[a-z](?:\s?,\s?[a-z])*\s?\))?|\\[a-z]+)\s*(?:=|≈|\\approx)\s*(?=\S)"
)
_GREEK = {
    "π": r"\pi ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "λ": r"\lambda ",
    "φ": r"\varphi ",
    "∞": r"\infty ",
    "∅": r"\emptyset ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "°": r"^{\circ}",
}
_TEXT_WORD = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|operatorname\*?|mbox|textit|mathit|boldsymbol|bm)\s*\{([^{}]*)\}"
)


def looks_like_formula(text: str) -> bool:
    """Whether a text without prose is a formula: numbers, single letters, functions and at least one operator."""
    text = text.strip().rstrip(".")
    if not text or len(text) > MAX_FORMULA_CHARS:
        return False
    if _COMMAND.search(text):
        return not re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+|\{[^{}]*\}", " ", text))
    return _PLAIN_FORMULA.fullmatch(text) is not None and _OPERATOR.search(text) is not None


def is_too_complex(text: str) -> bool:
    """Whether a formula is too long or too deeply nested to be handed to the parser."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return len(text) > MAX_FORMULA_CHARS or deepest > _MAX_NESTING


def formula_of(statement: Statement) -> str | None:
    """Returns the formula that a statement gives as its answer, or None if it holds none.

    A box is its content. Elsewhere the math segment that the statement begins with or consists of counts, else, in a
    sentence, the last one; without segments, what follows the verb, if it looks like a formula.
    """
    if statement.origin.value == "boxed":
        return clean_formula(statement.raw)
    raw = statement.raw.strip().strip("*_`").strip()
    segments = [(m.start(), m.end(), next(filter(None, m.groups()), "")) for m in _MATH_SEGMENT.finditer(raw)]
    if segments:
        joined = _joined_segments(raw, segments)
        if joined is not None:
            return clean_formula(joined)
        chosen = segments[0] if statement.origin.is_explicit and segments[0][0] <= 25 else segments[-1]
        return clean_formula(chosen[2])
    text = _TAIL.sub("", statement.text).strip()
    for candidate in (text, _COPULA.sub("", text, count=1).strip()):
        if candidate and (looks_like_formula(candidate) or re.fullmatch(r"[-+]?[\d.,/]+|[a-zA-Z]", candidate)):
            return clean_formula(candidate)
    return None


def _joined_segments(raw: str, segments: list[tuple[int, int, str]]) -> str | None:
    """Returns the segments joined with their connecting words if there is nothing else in the statement."""
    outside, last = [], 0
    for start, end, _ in segments:
        outside.append(raw[last:start])
        last = end
    outside.append(raw[last:])
    if not all(re.fullmatch(r"[\s,.;*]*(?:and|or)?[\s,.;*]*", part, re.IGNORECASE) for part in outside):
        return None
    text = segments[0][2]
    for part, segment in zip(outside[1:], segments[1:], strict=False):
        text += (" or " if re.search(r"\bor\b", part, re.IGNORECASE) else ", ") + segment[2]
    return text


@lru_cache(maxsize=4096)
def clean_formula(text: str) -> str:
    """Returns a formula without fences, trailing stop, outer text wrappers and unit."""
    text = unify_characters(text).strip().strip("$").strip()
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip().rstrip(".").strip()
    grouped = re.fullmatch(r"\{([^{},]*)\}", text)  # a LaTeX group; with a comma it is a set
    text = grouped.group(1).strip() if grouped else text
    return _UNIT_TAIL.sub("", text).strip() or text


def without_name(formula: str) -> str:
    """Returns what a formula such as "x = 3" or "f(x) = x^2" says its name is equal to."""
    return _NAMED_VALUE.sub("", formula, count=1)


@lru_cache(maxsize=4096)
def compact(formula: str) -> str:
    """Returns a formula's spelling without differences that mean nothing, for the comparison of strings."""
    formula = unify_characters(formula)
    formula = _TEXT_WORD.sub(r"\1", formula)
    formula = re.sub(
        r"\\(?:left|right|[bB]ig[lr]?|displaystyle|,|;|!|:|quad|qquad| )(?![a-zA-Z])|\\(?=%)|\$", "", formula
    )
    formula = re.sub(r"\\[dtc]frac", r"\\frac", formula)
    for symbol, command in _GREEK.items():
        formula = formula.replace(symbol, command)
    formula = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", formula)
    formula = formula.replace("\\leq", "\\le").replace("\\geq", "\\ge").replace("\\neq", "\\ne")
    formula = re.sub(r"([\^_])\{(\w)\}", r"\1\2", formula)
    return re.sub(r"\s+", "", formula).rstrip(".")


def to_latex(formula: str) -> str:
    """Returns a formula, plain or LaTeX, as LaTeX: sqrt(2) becomes \\sqrt{2}, 2**3 becomes 2^3, pi becomes \\pi."""
    text = unify_characters(formula)
    text = text.replace("**", "^")
    text = re.sub(r"\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}", ",", text)
    text = re.sub(r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]{4,20})\s*\}", r"W_{\1}", text)  # a name in words
    text = re.sub(
        r"\\(arc|c)?tg(?![a-zA-Z])", lambda m: {"arc": r"\arctan", "c": r"\cot"}.get(m.group(1), r"\tan"), text
    )
    text = re.sub(
        r"√\s*\(([^()]*)\)|√\s*(\d+(?:\.\d+)?|[a-zA-Zπ])", lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text
    )
    text = re.sub(r"√\s*\{", r"\\sqrt{", text)
    text = "".join(_GREEK.get(character, character) for character in text)
    text = _sqrt_calls(text)
    text = re.sub(
        r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|min|max)(?![a-zA-Z])", r"\\\1 ", text
    )
    text = re.sub(r"(?<![\\a-zA-Z])(pi|theta|alpha|beta|gamma|lambda)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:infinity|infty|oo|inf)(?![a-zA-Z])", r"\\infty ", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:or|and)(?![a-zA-Z])", ",", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-?\d{2,}|-\d)", r"^{\1}", text)
    text = re.sub(r"<=|=<", r"\\le ", re.sub(r">=", r"\\ge ", text.replace("!=", r"\ne ")))
    text = re.sub(r"(?<!\\)\*", r" \\cdot ", text)
    return text.replace("$", "")


def _sqrt_calls(text: str) -> str:
    """Returns the text with sqrt(...), whose parentheses may be nested, as \\sqrt{...}."""
    for match in list(re.finditer(r"(?<![\\a-zA-Z])sqrt\s*", text))[:20][::-1]:
        end = match.end()
        if text[end : end + 1] == "(":
            depth = 0
            for index in range(end, len(text)):
                depth += (text[index] == "(") - (text[index] == ")")
                if depth == 0:
                    text = f"{text[: match.start()]}\\sqrt{{{text[end + 1 : index]}}}{text[index + 1 :]}"
                    break
        else:
            token = re.compile(r"\{?(\w+)\}?").match(text, end)
            if token:
                text = f"{text[: match.start()]}\\sqrt{{{token.group(1)}}}{text[token.end() :]}"
    return text
