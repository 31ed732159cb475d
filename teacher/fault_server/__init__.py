"""An OpenAI-compatible teacher that fails on purpose: latency, errors, hangs, half replies and restarts by seed.

A tool to test and measure clients with; nothing of a curation needs it. In a program:
`with FaultServer(answer, faults=FaultSchedule(share=0.2)) as server: ... server.url ... server.calls`. As a command,
which says where it listens in one JSON line and ends on SIGTERM or SIGINT:
`python -m teacher.fault_server --port 8009 --latency 0.05 --faults 0.2 --kinds reset,429,500 --seed 1`.

What befalls a call depends on the seed, on what the call asks, and on how often that has been asked, never on the
order in which calls arrive: runs of different clients meet the same faults. HTTP/1.1 is parsed here, because a server
that is to measure clients must be faster than they are. Left out on purpose: TLS, streamed answers, chunked requests.
"""

from __future__ import annotations

from teacher.fault_server.answers import (
    Answer,
    Body,
    completion,
    constrained_completion,
    hashed_answer,
    image_urls,
    question_text,
)
from teacher.fault_server.engine import EngineModel
from teacher.fault_server.schedule import PASSING_FAULTS, Fault, FaultSchedule, Restarts
from teacher.fault_server.server import Call, FaultServer

__all__ = [
    "PASSING_FAULTS",
    "Answer",
    "Body",
    "Call",
    "EngineModel",
    "Fault",
    "FaultSchedule",
    "FaultServer",
    "Restarts",
    "completion",
    "constrained_completion",
    "hashed_answer",
    "image_urls",
    "question_text",
]
