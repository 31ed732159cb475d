"""Where the code at work is, known in tasks, threads and the event loop, and not beyond its end."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator

import pytest

from schemas.context import RunContext, current_context, enter_row, outside_shards, within

SHARD = RunContext(run="r", corpus="c", stage="routing", shard="exams-00001")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, as a runtime has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_outside_a_run_nothing_is_known() -> None:
    assert contextvars.Context().run(current_context) == RunContext()


def test_a_context_ends_with_its_block_even_after_an_error() -> None:
    before = current_context()
    with pytest.raises(ValueError, match="x"), within(SHARD):  # noqa: PT012  (the block is what ends it)
        assert current_context() is SHARD
        raise ValueError("x")
    assert current_context() == before


def test_the_event_loop_of_another_thread_knows_who_asked(loop: asyncio.AbstractEventLoop) -> None:
    async def seen() -> list[RunContext]:
        in_task = asyncio.create_task(_current())
        return [current_context(), await in_task, await asyncio.to_thread(current_context)]

    with within(SHARD):
        asked = asyncio.run_coroutine_threadsafe(seen(), loop)
    assert asked.result(10) == [SHARD] * 3


def test_shards_that_share_a_loop_do_not_see_each_other(loop: asyncio.AbstractEventLoop) -> None:
    async def seen_late() -> RunContext:
        await asyncio.sleep(0.01)
        return current_context()

    contexts = [RunContext(shard=str(number)) for number in range(8)]
    asked = []
    for context in contexts:
        with within(context):
            asked.append(asyncio.run_coroutine_threadsafe(seen_late(), loop))
    assert [future.result(10) for future in asked] == contexts


async def test_a_row_is_known_in_its_own_task_alone() -> None:
    async def work(row: str) -> tuple[str, str]:
        enter_row(row)
        await asyncio.sleep(0)
        return current_context().row, (await asyncio.create_task(_current())).row

    with within(SHARD):
        rows = await asyncio.gather(*(work(row) for row in "abc"))
        assert rows == [("a", "a"), ("b", "b"), ("c", "c")]
        assert current_context() == SHARD


async def test_what_outlives_a_shard_keeps_its_run_alone() -> None:
    with within(SHARD):
        enter_row("a")
        lasting = asyncio.create_task(_current(), context=outside_shards())
        assert current_context().row == "a"
    assert await lasting == RunContext(run="r", corpus="c")


async def _current() -> RunContext:
    return current_context()
