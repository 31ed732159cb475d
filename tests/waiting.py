"""Waiting in tests for what happens in another process or thread, and a port that is free for it."""

import socket
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found | None], seconds: float = 300.0, *, every: float = 0.1) -> Found:
    """Returns the first true value of the condition, looked at again and again.

    seconds: for how long; raises AssertionError after. It bounds a test that hangs, and says nothing about speed.
    every: seconds from one look to the next.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} seconds"
        time.sleep(every)
    return found


def free_port() -> int:
    """Returns a port that nobody listens at right now, on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
