"""Replies to store in tests, and a program that stores them, to be killed.

python -m tests.teacher.stored_replies FOLDER    stores replies 0 to 5, compacting after the third and the last
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from schemas.requests import Message, Reply, Sampling, TeacherRequest
from teacher.journal import Journal, compact

NUM_REPLIES = 6
_BATCHES = (range(3), range(3, NUM_REPLIES))


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def request_of(number: int) -> TeacherRequest:
    messages = (Message("system", "Be brief. \udc80"), Message("user", "What is this? 问", ("a" * 64, "b" * 64)))
    sampling = Sampling(temperature=0.7, max_tokens=64)
    return TeacherRequest(f"sample-{number}", "performance", messages, sampling, seed=7 + number, index=number)


def reply_of(number: int, text: str = "") -> Reply:
    return Reply(
        text or f"reply {number} 🙂 \ud800 \x00",
        "stop",
        "m",
        reasoning="because" if number % 2 else None,
        top_logprobs=(("yes", -0.5), ("no", -1.0)),
        prompt_tokens=number,
        completion_tokens=3,
        cached_tokens=1,
        seconds=0.25,
        choice=number % 3,
        num_attempts=2,
    )


def fill(folder: Path, numbers: Iterable[int]) -> None:
    with Journal(folder) as journal:
        for number in numbers:
            journal.append(key_of(number), request_of(number), reply_of(number))


def _main(folder: Path) -> None:
    for batch in _BATCHES:
        with Journal(folder) as journal:
            for number in batch:
                if key_of(number) not in journal:
                    journal.append(key_of(number), request_of(number), reply_of(number))
                    print(number, flush=True)
        compact(folder)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
