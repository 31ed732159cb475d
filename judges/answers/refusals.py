"""Words that decline to answer or ask back ("I cannot see the image", "please provide the figure").

Read only at the end of a reply in which nothing is marked as the answer. The patterns name who cannot do what, because
"6 bricks are missing" and "Ralph was not able to hit 110 balls" are answers.
"""

from __future__ import annotations

import re

_SEEN = r"(?:images?|pictures?|diagrams?|figures?|graphs?|charts?|photos?|illustrations?|visuals?)"
_TOLD = r"(?:information|data|details?|context|descriptions?|options|choices)"
_SHOWN = rf"(?:{_SEEN}|{_TOLD})"
_GIVEN = r"(?:provided|included|attached|given|available|visible|shared|uploaded|supplied|shown)"
_SOLVE = (
    r"(?:determine|solve|answer|calculate|see|provide|give|process|analy[sz]e|identify|view|tell|say|interpret|access"
    r"|know|reach|find|assist|help)"
)
_PATTERNS = (
    r"\b(?:i|we|one|you|ai|model)(?:\s+am|\s+are|'m|'re)?\s+(?:\w+\s+)?"
    r"(?:(?:can|could)\s?not|can't|couldn't|unable|not\s+able|do(?:n't|\s+not)\s+(?:know|have|see))\b",
    r"\b(?:can|could)(?:\s?not|n't|'t)\s+(?:\w+ly\s+)?be\s+(?:\w+ly\s+)?(?:determined|solved|answered|calculated|found)\b",
    rf"\b(?:(?:can|could)(?:\s?not|n't|'t)|unable\s+to)\s+(?:\w+ly\s+)?{_SOLVE}\s+(?:the|this|that|your|any|an?|it)\b",
    rf"\b(?:impossible|not\s+possible|isn't\s+possible|no\s+way)\s+to\s+(?:\w+ly\s+)?{_SOLVE}\b",
    rf"\b{_SHOWN}\s+(?:that\s+)?(?:\w+\s+)?(?:is|are|was|were|has|have|seems?)(?:\s+to\s+be|\s+been)?\s+(?:\w+\s+)?"
    rf"(?:missing|not\s+(?:\w+\s+)?{_GIVEN})\b",
    r"\b(?:not|n't)\s+(?:\w+\s+){0,2}(?:provided?|include[ds]?|attach(?:ed)?|given?|have|specif\w+|contain)\s+"
    rf"(?:\w+\s+){{0,4}}{_SHOWN}\b",
    rf"\b(?:missing|without|insufficient|not\s+enough|needs?\s+more|requires?\s+more)\s+(?:\w+\s+){{0,3}}{_SHOWN}\b",
    rf"\b(?:need|require)s?\s+(?:to\s+(?:see|know)\s+)?(?:further|additional|the)\s+(?:\w+\s+){{0,2}}{_SHOWN}\b",
    rf"\bno\s+(?:\w+\s+)?{_SHOWN}\s+(?:\w+\s+)?(?:{_GIVEN}|to)\b",
    r"\bplease\s+(?:\w+\s+)?(?:provide|include|upload|share|specify|give|supply|update|attach|check|rewrite|repost"
    r"|describe|clarify|add)\b",
    r"\bcould\s+you\b|\bsorry\b(?=\s*(?:,|but|\.|for|that|i))|\bno\s+idea\b|\bdon't\s+know\b",
)
_REFUSAL = re.compile("|".join(_PATTERNS), re.IGNORECASE)


def declines(text: str) -> bool:
    """Whether a text says that no answer can be given."""
    return _REFUSAL.search(text) is not None
