"""The one changed retry of a judge's question whose reply cannot be read."""

from __future__ import annotations

import re
from dataclasses import replace

from schemas.requests import Reply, TeacherRequest

RETRY_TEMPERATURE = 0.7
"""At temperature 0 a server would only repeat itself."""


def is_cut_short(request: TeacherRequest, reply: Reply) -> bool:
    """Returns whether a reply ended at its token limit before it said one of the request's choices.

    A reply that begins with a choice has said it, whatever would have followed. Words inside a cut text may belong to a
    thought ("yes would be wrong, as ...") and are not taken for a verdict.
    """
    if not reply.is_truncated:
        return False
    words = "|".join(map(re.escape, request.choices))
    return re.match(rf"[\W_]*(?:{words})\b", reply.text, re.IGNORECASE) is None


def changed_retry(request: TeacherRequest, reply: Reply) -> TeacherRequest:
    """Returns the request to make after an unreadable reply: the next sample of the question, drawn more freely.

    The temperature is raised to at least 0.7; a reply that was cut may have twice the tokens.
    """
    sampling = request.sampling
    changed = replace(
        sampling,
        temperature=max(sampling.temperature, RETRY_TEMPERATURE),
        max_tokens=sampling.max_tokens * (2 if reply.is_truncated else 1),
    )
    return replace(request.sample(request.index + 1), sampling=changed)
