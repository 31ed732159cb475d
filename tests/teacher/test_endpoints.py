"""Several addresses of one model: who gets which call, who gets none, who joins."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import teacher.endpoints as endpoints_module
from schemas.config import EndpointConfig
from schemas.errors import ServingError, TeacherMisconfigured
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from teacher import fault_server
from teacher.admission import Window
from teacher.client import Teacher
from teacher.endpoints import Address, Revive, Wish, home_of
from teacher.fault_server import EngineModel, FaultServer, Restarts
from teacher.fault_server import FaultSchedule as FaultsByRequest
from teacher.journal import Journal
from teacher.transport import Transport
from tests.replay_teacher import Body, Fault, FaultSchedule, ReplayTeacher


def question(number: int, image: str = "") -> TeacherRequest:
    message = Message("user", f"question {number}", (image,) if image else ())
    return TeacherRequest(f"s{number}", "performance", (message,), Sampling(max_tokens=8), seed=7)


def echo(body: Body) -> str:
    return "ok"


@asynccontextmanager
async def asking(
    folder: Path, servers: Sequence[ReplayTeacher | FaultServer], *, revive: Revive | None = None, **settings: Any
) -> AsyncIterator[Teacher]:
    """Yields a teacher with an address for each server; they are stopped afterwards."""
    urls = [server.url for server in servers]
    endpoint = EndpointConfig(**{"model": "teacher", "url": urls[0], "more_urls": urls[1:], **settings})
    with Journal(folder / "journal") as journal, contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        async with Teacher(
            endpoint, journal, lambda sha256, pixels: (b"x", "image/png"), first_backoff_seconds=0.01, revive=revive
        ) as teacher:
            yield teacher


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (what is waited for has no event)
        await asyncio.sleep(0.01)


def started(**settings: Any) -> ReplayTeacher:
    return ReplayTeacher(echo, **settings).start()


async def test_all_questions_about_an_image_go_to_one_address(tmp_path: Path) -> None:
    servers = [started() for _ in range(3)]
    async with asking(tmp_path, servers) as teacher:
        for number in range(60):
            await teacher.ask(question(number, image=f"image{number % 12}"))
    homes: dict[str, set[int]] = {}
    for at, server in enumerate(servers):
        for call in server.calls:
            homes.setdefault(f"image{int(call.text.split()[-1]) % 12}", set()).add(at)
    assert len(homes) == 12 and all(len(addresses) == 1 for addresses in homes.values())
    assert len({next(iter(addresses)) for addresses in homes.values()}) > 1


def test_images_are_spread_evenly_and_few_move_when_an_address_joins() -> None:
    addresses = [Address(Transport(f"http://gpu-{n}:8000/v1", api_key_env="NONE"), Window(1)) for n in range(5)]
    wishes = [Wish(f"{n:064x}") for n in range(2000)]
    before = [home_of(wish, addresses[:4]) for wish in wishes]
    after = [home_of(wish, addresses) for wish in wishes]
    assert all(400 <= count <= 600 for count in Counter(map(id, before)).values())
    moved = [new for old, new in zip(before, after, strict=True) if new is not old]
    assert 300 <= len(moved) <= 500 and all(new is addresses[4] for new in moved)


async def test_work_spills_to_an_address_with_room(tmp_path: Path) -> None:
    servers = [started(delay_seconds=0.05) for _ in range(2)]
    async with asking(tmp_path, servers, concurrency=2) as teacher:
        replies = await asyncio.gather(*(teacher.ask(question(number, image="same")) for number in range(20)))
    assert all(isinstance(reply, Reply) for reply in replies)
    assert all(server.max_in_flight == 2 and len(server.calls) >= 6 for server in servers)


async def test_an_address_that_dies_costs_no_row_and_gets_no_calls_until_it_is_back(tmp_path: Path) -> None:
    first, second = started(), started()
    port = first.port
    async with asking(tmp_path, [first, second], max_retries=0) as teacher:
        await asyncio.gather(*(teacher.ask(question(number)) for number in range(20)))
        first.stop()
        replies = await asyncio.gather(*(teacher.ask(question(number)) for number in range(20, 60)))
        assert all(isinstance(reply, Reply) for reply in replies)
        assert len(first.calls) + len(second.calls) == 60
        again = ReplayTeacher(echo, port=port).start()
        try:
            await until(lambda: len(teacher.group.addresses.up) == 2)
            await asyncio.gather(*(teacher.ask(question(number)) for number in range(60, 100)))
            assert again.calls
        finally:
            again.stop()


async def test_a_failed_call_goes_elsewhere_at_once(tmp_path: Path) -> None:
    good, bad = started(), started(faults=FaultSchedule(always=Fault.SERVER_ERROR))
    async with asking(tmp_path, [bad, good], max_retries=1) as teacher:
        teacher.group._first_backoff_seconds = 1000.0
        replies = await asyncio.gather(*(teacher.ask(question(number)) for number in range(20)))
    assert all(isinstance(reply, Reply) for reply in replies) and bad.calls


@pytest.mark.parametrize("fault", [Fault.NOT_FOUND, Fault.UNAUTHORISED])
async def test_an_address_that_is_set_up_wrongly_is_left_out_and_the_others_go_on(tmp_path: Path, fault: Fault) -> None:
    good, bad = started(), started(faults=FaultSchedule(always=fault))
    async with asking(tmp_path, [bad, good]) as teacher:
        replies = [await teacher.ask(question(number)) for number in range(20)]
        assert all(isinstance(reply, Reply) for reply in replies) and len(bad.calls) == 1
        bad.faults, good.faults = FaultSchedule(), FaultSchedule(always=fault)
        with pytest.raises(TeacherMisconfigured, match=f"HTTP {fault}"):
            await teacher.ask(question(20))


async def test_a_check_leaves_out_who_serves_another_model(tmp_path: Path) -> None:
    good, other = started(), started(models=["another"])
    async with asking(tmp_path, [other, good]) as teacher:
        await teacher.check()
        await asyncio.gather(*(teacher.ask(question(number)) for number in range(10)))
        assert len(good.calls) == 10 and other.calls == []


async def test_an_address_joins_and_leaves_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints_module, "WATCH_SECONDS", 0.02)
    listed = tmp_path / "urls"
    first, second, wrong = started(), started(), started(models=["another"])
    async with asking(tmp_path, [first], urls_file=str(listed)) as teacher:
        await teacher.ask(question(0))
        listed.write_text(f"# more\n{second.url}/  # the second\n{wrong.url}\nnonsense\n")
        await until(lambda: len(teacher.group.addresses.up) == 2)
        await asyncio.gather(*(teacher.ask(question(number)) for number in range(1, 40)))
        assert second.calls and first.calls and wrong.calls == []
        listed.write_text("")
        await until(lambda: len(teacher.group.addresses.up) == 1)
        num_calls = len(second.calls)
        await asyncio.gather(*(teacher.ask(question(number)) for number in range(40, 60)))
        assert len(second.calls) == num_calls
    second.stop()
    wrong.stop()


async def test_an_overloaded_address_gets_fewer_at_once_and_a_pause(tmp_path: Path) -> None:
    faults = FaultSchedule(first=[None, Fault.RATE_LIMIT, Fault.RATE_LIMIT], retry_after="0.2")
    server = started(faults=faults)
    async with asking(tmp_path, [server]) as teacher:
        await teacher.ask(question(0))
        [address] = teacher.group.addresses.all
        before = address.window.limit
        replies = await asyncio.gather(*(teacher.ask(question(number)) for number in range(1, 9)))
        assert all(isinstance(reply, Reply) for reply in replies)
        assert address.window.limit == before // 2
        refused = [call.began for call in server.calls if call.fault]
        assert all(call.began >= min(refused) + 0.2 for call in server.calls[9:])


async def test_samples_that_follow_one_another_are_one_call(tmp_path: Path) -> None:
    def number_choices(body: Body) -> Body:
        choices = [
            {"index": at, "message": {"content": f"sample {body['seed'] + at}"}, "finish_reason": "stop"}
            for at in range(body.get("n", 1))
        ]
        return {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": 8}}

    server = ReplayTeacher(number_choices).start()
    async with asking(tmp_path, [server]) as teacher:
        samples = [question(1).sample(index) for index in range(8)]
        alone = await teacher.ask(samples[3])
        together = await teacher.ask_samples(samples)
        assert [reply.text for reply in together if isinstance(reply, Reply)] == [f"sample {7 + i}" for i in range(8)]
        assert together[3] == alone
        assert [call.body.get("n", 1) for call in server.calls] == [1, 3, 4]
        usage = teacher.usage["performance"]
        assert (usage.num_calls, usage.num_replies, usage.num_reused) == (3, 8, 1)
        assert (usage.prompt_tokens, usage.completion_tokens) == (15, 24)
        assert len(teacher.journal) == 8


async def test_samples_across_the_end_of_the_seeds_are_asked_for_apart(tmp_path: Path) -> None:
    server = started()
    first = TeacherRequest("s", "p", (Message("user", "q"),), Sampling(), seed=2**31 - 2)
    async with asking(tmp_path, [server]) as teacher:
        await teacher.ask_samples([first.sample(index) for index in range(4)])
        asked = [(call.seed, call.body.get("n", 1)) for call in server.calls]
    # The server gives one choice to each call: what is missing is asked for again.
    assert sorted(asked) == [(0, 2), (1, 1), (2**31 - 2, 2), (2**31 - 1, 1)]


async def test_an_endpoint_that_knows_no_n_is_asked_for_one_at_a_time_from_then_on(tmp_path: Path) -> None:
    server = started(unknown_fields=["n"])
    async with asking(tmp_path, [server]) as teacher:
        for number in range(2):
            replies = await teacher.ask_samples([question(number).sample(index) for index in range(4)])
            assert all(isinstance(reply, Reply) for reply in replies)
        assert Counter(call.body.get("n", 1) for call in server.calls) == {4: 1, 1: 8}


def killing(body: Body) -> fault_server.Fault | None:
    return fault_server.Fault.KILL if "question 3" in fault_server.question_text(body) else None


@pytest.mark.parametrize("tells_load", [True, False])
async def test_a_row_that_kills_engines_is_tried_alone_and_given_up_and_the_others_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells_load: bool
) -> None:
    # Without vLLM's word on its start, a death is known only by an address that is silent when it is probed.
    if not tells_load:
        monkeypatch.setattr(endpoints_module, "parse_load", lambda text: None)
    server = FaultServer(
        faults=FaultsByRequest(persistent=killing),
        engine=EngineModel(latency_seconds=0.02),
        restarts=Restarts(down_seconds=0.2 if tells_load else 2.0),
    ).start()
    async with asking(tmp_path, [server], max_retries=0, unreachable_seconds=60) as teacher:
        outcomes = await asyncio.gather(*(teacher.ask(question(number)) for number in range(20)))
    failed = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, CallFailure)]
    assert failed == [3] and isinstance(outcomes[3], CallFailure) and outcomes[3].reason == "teacher_crashed"
    assert "3 engines died" in outcomes[3].detail and server.num_deaths == 3


async def test_an_engine_that_died_and_is_back_before_anybody_looked_is_known_by_its_start(tmp_path: Path) -> None:
    server = FaultServer(
        faults=FaultsByRequest(persistent=killing),
        engine=EngineModel(latency_seconds=0.02),
        restarts=Restarts(down_seconds=0.0),
    ).start()
    async with asking(tmp_path, [server], max_retries=0, unreachable_seconds=30) as teacher:
        await teacher.ask(question(0))
        await until(lambda: teacher.group.addresses.all[0].started is not None)
        outcomes = await asyncio.gather(*(teacher.ask(question(number)) for number in range(10)))
    assert [at for at, outcome in enumerate(outcomes) if isinstance(outcome, CallFailure)] == [3]


async def test_a_server_that_cannot_be_started_again_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    async def give_up(url: str) -> None:
        raise ServingError("vLLM died five times; the end of its log: out of memory")

    server = started()
    async with asking(tmp_path, [server], revive=give_up, unreachable_seconds=60) as teacher:
        await teacher.ask(question(0))
        server.stop()
        with pytest.raises(ServingError, match="out of memory"):
            await teacher.ask(question(1))


async def test_an_endpoint_that_ignores_n_is_asked_for_one_at_a_time_after_three_times(tmp_path: Path) -> None:
    server = started()
    async with asking(tmp_path, [server]) as teacher:
        for number in range(6):
            replies = await teacher.ask_samples([question(number).sample(index) for index in range(3)])
            assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["ok"] * 3
        assert not teacher.group.takes_several_choices
        assert [call.body.get("n", 1) for call in server.calls][-3:] == [1, 1, 1] and len(server.calls) == 18
