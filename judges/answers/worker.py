"""The program of a worker process: reads comparisons as lines of JSON, answers each with "begun" and a line of JSON.

Started by `judges.answers.pool`, never by hand. Two guards hold even if the parent dies: a timer that ends the process
in the middle of an endless comparison, and a bound on its memory. The timer counts processor time, not the clock's: a
busy machine must not change a verdict, and with it a label.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from typing import TextIO

from judges.answers.parser import equal, equality_matrix

MAX_MEMORY_BYTES = 2**30


def main() -> None:
    """Serves until its input ends. argv[1]: processor seconds after which a comparison ends this process."""
    limit_seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    replies = _private_stdout()
    equal("2x+1", "1+2x")  # loads sympy, so that it does not count against the first comparison
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_seconds)  # SIGPROF's default action: the process ends
        print("begun", file=replies, flush=True)
        task = json.loads(line)
        matrix = equality_matrix(tuple(task["candidates"]), tuple(task["references"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(matrix), file=replies, flush=True)


def _private_stdout() -> TextIO:
    """Returns the pipe to the parent, and points standard output elsewhere: a parser that prints must not answer."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


if __name__ == "__main__":
    main()
