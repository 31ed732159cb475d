"""The pool: the same verdicts as in process, at the cost of one verdict for whatever hangs or dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from judges.answers import VerifierPool, verify
from judges.answers.pool import _Worker
from schemas.config import VerificationConfig
from schemas.samples import AnswerType, Sample
from schemas.verdicts import Failure, correct

CONFIG = VerificationConfig(timeout_seconds=1.0, num_workers=2)
EXPRESSION = Sample(
    id="0", source="s", origin="s:0", question="Simplify.", answer="2x+1", answer_type=AnswerType.EXPRESSION
)
NUMBER = Sample(id="1", source="s", origin="s:1", question="?", answer="7", answer_type=AnswerType.NUMBER)
CHOICE = Sample(
    id="2",
    source="s",
    origin="s:2",
    question="?",
    choices=("$x^2$", "$2x+1$"),
    answer="B",
    answer_type=AnswerType.CHOICE,
)


def children() -> list[int]:
    """Returns the process ids of this process's children."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "judges.answers.worker" in line]


def is_running(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(listed.stdout.strip()) and not listed.stdout.strip().startswith("Z")


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(CONFIG) as shared:
        yield shared


def test_the_pool_gives_the_verdicts_of_verify_in_order(pool: VerifierPool) -> None:
    items = [
        ("1+2x", EXPRESSION, False),
        ("2x-1", EXPRESSION, False),
        ("7", NUMBER, False),
        ("7", NUMBER, True),
        ("", NUMBER, False),
        ("$1+2x$", CHOICE, False),
        ("(A)", CHOICE, False),
    ]
    assert pool.verify_many(items) == [verify(text, of, CONFIG, is_truncated=cut) for text, of, cut in items]


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^{9}}}",
        "9**9**9**9",
        "((((9!)!)!)!)!",
        "\\sum_{n=1}^{10000000000} \\frac{1}{n^2}",
        "(x+1)^{99999999}",
    ],
)
def test_an_expression_that_hangs_the_parser_costs_one_verdict(pool: VerifierPool, hostile: str) -> None:
    items = [(f"\\boxed{{{hostile}}}", EXPRESSION, False), ("1+2x", EXPRESSION, False), ("7", NUMBER, False)]
    hanging, after, cheap = pool.verify_many(items)
    assert not hanging.is_correct
    assert hanging.is_scored or hanging.failure in (Failure.TIMEOUT, Failure.CRASHED, Failure.UNREADABLE)
    assert after.is_correct and cheap.is_correct


def test_a_tower_of_powers_is_unscored_with_timeout(pool: VerifierPool) -> None:
    verdict = pool.verify("\\boxed{9^{9^{9^{9}}}+x}", EXPRESSION)
    assert verdict.failure in (Failure.TIMEOUT, Failure.CRASHED)
    assert verdict.extracted == "9^{9^{9^{9}}}+x"


def test_a_comparison_may_take_ten_times_its_processor_time_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def never_answers(worker: _Worker, limit_seconds: float) -> bytes:
        limits.append(limit_seconds)
        raise TimeoutError

    with VerifierPool(VerificationConfig(timeout_seconds=3.0, num_workers=1)) as pool:
        monkeypatch.setattr(_Worker, "_begin", lambda worker, task: None)
        monkeypatch.setattr(_Worker, "_line", never_answers)
        verdict = pool.verify("1+2x", EXPRESSION)
    assert (verdict.failure, limits) == (Failure.TIMEOUT, [30.0])
    assert verdict.detail == "not compared within 3 s of processor time, 30 s on the clock"


def test_enormous_nesting_never_reaches_the_parser(pool: VerifierPool) -> None:
    verdict = pool.verify("\\boxed{" + "{" * 100_000 + "x" + "}" * 100_000 + "}", EXPRESSION)
    assert verdict.failure is Failure.UNREADABLE


def test_a_killed_worker_costs_at_most_the_verdict_in_work() -> None:
    others = set(children())
    with VerifierPool(VerificationConfig(timeout_seconds=20.0, num_workers=1)) as pool:
        assert pool.verify("1+2x", EXPRESSION).is_correct
        (first,) = set(children()) - others
        os.kill(first, signal.SIGKILL)  # idle: nothing is lost
        wait_for_end(first)
        assert pool.verify("1+2x", EXPRESSION) == correct("1+2x")
        (second,) = set(children()) - others
        threading.Timer(0.5, os.kill, (second, signal.SIGKILL)).start()
        lost, kept = pool.verify_many([("\\boxed{9^{9^{9}}+x}", EXPRESSION, False), ("1+2x", EXPRESSION, False)])
        assert lost.failure is Failure.CRASHED
        assert kept.is_correct


def test_closing_leaves_no_process_behind() -> None:
    before = set(children())
    with VerifierPool(CONFIG) as pool:
        pool.verify_many([("1+2x", EXPRESSION, False)] * 4)
        started = set(children()) - before
        assert 1 <= len(started) <= 2
    assert set(children()) <= before


def test_cheap_verdicts_start_no_process() -> None:
    before = children()
    with VerifierPool(CONFIG) as pool:
        assert pool.verify("The answer is 7.", NUMBER).is_correct
        assert pool.verify("(B)", CHOICE).is_correct
        assert children() == before


async def test_many_verdicts_are_awaited_at_once_while_the_loop_goes_on(pool: VerifierPool) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    hanging = pool.verify_async("\\boxed{9^{9^{9^{9}}}+x}", EXPRESSION)
    verdicts = await asyncio.gather(hanging, *(pool.verify_async("1+2x", EXPRESSION) for _ in range(20)))
    ticker.cancel()
    assert [verdict.is_correct for verdict in verdicts] == [False] + [True] * 20
    assert ticks >= 5


def test_threads_share_a_pool(pool: VerifierPool) -> None:
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(pool.verify("1+2x", EXPRESSION).is_correct)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == [True] * 8


def test_a_worker_dies_with_its_parent() -> None:
    program = (
        "import os, sys, signal\n"
        "from judges.answers import VerifierPool\n"
        "from schemas.config import VerificationConfig\n"
        "from schemas.samples import AnswerType, Sample\n"
        "of = Sample('0', 's', 's:0', '?', answer='2x+1', answer_type=AnswerType.EXPRESSION)\n"
        "pool = VerifierPool(VerificationConfig(num_workers=1))\n"
        "assert pool.verify('1+2x', of).is_correct\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    worker = int(ran.stdout)
    wait_for_end(worker)
