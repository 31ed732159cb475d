"""Clock and processor time of one run of a client, and the file its figures go to. Standard library alone.

Used by the clients of `benchmarks.teacher_client`, ours and, under their own Python, its peers.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Stopwatch:
    """Figures of the runs so far, and what the client is. `save` them at the end."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.runs: list[dict[str, float]] = []

    @contextmanager
    def run(self, num_calls: int) -> Iterator[None]:
        """Times a block that makes so many calls. Processor time is that of all threads, and of children that ended."""
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        yield
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
        self.runs.append({"num_calls": num_calls, "seconds": seconds, "cpu_seconds": cpu_seconds})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"client": self.client, "runs": self.runs}), "utf-8")


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def client_parser() -> argparse.ArgumentParser:
    """Returns the arguments that every client takes."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--url", required=True, help="of the server, ending in /v1")
    add("--rows", type=Path, required=True, help="JSON Lines: question, and the image under each name of --column")
    add("--column", choices=["file_url", "data_url"], required=True, help="which of the image's addresses to send")
    add("--warm-up", type=int, required=True, help="as many rows, the first ones, come before the stopwatch")
    add("--runs", type=int, required=True)
    add("--concurrency", type=int, required=True, help="rows in work at once")
    add("--work", type=Path, required=True, help="folder for what the client keeps")
    add("--result", type=Path, required=True, help="file for the figures")
    return parser


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
