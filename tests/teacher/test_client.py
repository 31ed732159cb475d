"""The client against a real HTTP server that answers, fails and lies on demand."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

import teacher.endpoints as endpoints_module
import teacher.images as images_module
import teacher.transport as transport_module
from schemas.config import EndpointConfig
from schemas.errors import RowError, StorageError, TeacherMisconfigured, TeacherUnreachable
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from schemas.usage import Usage
from teacher.client import Teacher, reply_key
from teacher.failures import EXCEPTION_HANDLING, STATUS_HANDLING, Action, handling_of_status, retry_after_seconds
from teacher.journal import Journal, read_journal
from tests.replay_teacher import (
    Body,
    Fault,
    FaultSchedule,
    ReplayTeacher,
    completion,
    constrained_completion,
    image_urls,
)
from tests.waiting import free_port


def request_of(number: int = 0, **changes: Any) -> TeacherRequest:
    fields: dict[str, Any] = {
        "sample_id": f"s{number}",
        "purpose": "performance",
        "messages": (Message("user", f"question {number}"),),
        "sampling": Sampling(max_tokens=8),
    }
    return TeacherRequest(**{**fields, **changes})


def echo(body: Body) -> str:
    return f"answer to {body['messages'][-1]['content']} #{body['_index']}"


def no_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
    raise AssertionError(f"image {sha256} was not to be read")


class Bench:
    """A teacher and the server it asks."""

    def __init__(self, server: ReplayTeacher, journal: Journal, teacher: Teacher) -> None:
        self.server, self.journal, self.teacher = server, journal, teacher


class bench:  # noqa: N801  (reads as a verb: async with bench(...) as b)
    """Starts server, journal and teacher. Keywords: of the server, or (settings) of the endpoint."""

    def __init__(
        self,
        folder: Path,
        answer: Callable[[Body], str | Body] = echo,
        *,
        read_image: Callable[[str, int], tuple[bytes, str]] = no_image,
        image_path: Callable[[str, int], Path] | None = None,
        settings: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        self.server = ReplayTeacher(answer, **server)
        self.folder, self.read_image, self.image_path = folder, read_image, image_path
        self.settings = {"model": "teacher", "timeout_seconds": 60.0, "max_retries": 2, **(settings or {})}

    async def __aenter__(self) -> Bench:
        self.server.start()
        self.journal = Journal(self.folder / "replies.journal")
        endpoint = EndpointConfig(url=self.server.url, **self.settings)
        self.teacher = Teacher(endpoint, self.journal, self.read_image, self.image_path, first_backoff_seconds=0.01)
        return Bench(self.server, self.journal, await self.teacher.__aenter__())

    async def __aexit__(self, *_: object) -> None:
        await self.teacher.__aexit__(None, None, None)
        self.journal.close()
        self.server.stop()


async def test_a_request_is_asked_once_and_then_read_from_the_journal(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        first = await b.teacher.ask(request_of(1, index=3))
        again = await b.teacher.ask(request_of(1, index=3))
        assert isinstance(first, Reply) and first.text == "answer to question 1 #3"
        assert again == first and len(b.server.calls) == 1
    async with bench(tmp_path) as b:
        assert await b.teacher.ask(request_of(1, index=3)) == first
        assert b.server.calls == []
        assert b.teacher.usage == {"performance": Usage(num_reused=1)}
    [record] = read_journal(tmp_path / "replies.journal")
    assert (record.sample_id, record.purpose, record.index, record.reply) == ("s1", "performance", 3, first)


async def test_equal_requests_under_way_share_one_call(tmp_path: Path) -> None:
    async with bench(tmp_path, delay_seconds=0.1) as b:
        replies = await asyncio.gather(*(b.teacher.ask(request_of(purpose=f"p{n}")) for n in range(5)))
        assert len(set(replies)) == 1 and len(b.server.calls) == 1
        assert sum(b.teacher.usage.values(), Usage()).num_reused == 4


async def test_no_more_calls_than_allowed_are_in_flight(tmp_path: Path) -> None:
    async with bench(tmp_path, delay_seconds=0.02, settings={"concurrency": 3}) as b:
        await asyncio.gather(*(b.teacher.ask(request_of(n)) for n in range(20)))
        assert b.server.max_in_flight == 3 and len(b.server.calls) == 20


async def test_usage_counts_tokens_calls_and_reuse_by_purpose(tmp_path: Path) -> None:
    def answer(body: Body) -> Body:
        return completion("three short words", body, cached_tokens=1)

    async with bench(tmp_path, answer) as b:
        await b.teacher.ask(request_of(1))
        await b.teacher.ask(request_of(2, purpose="difficulty"))
        await b.teacher.ask(request_of(2, purpose="difficulty"))
        usage = b.teacher.usage
    assert usage["performance"].to_record() | {"seconds": 0} == {
        "num_calls": 1,
        "num_replies": 1,
        "num_reused": 0,
        "num_retries": 0,
        "num_failures": 0,
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "cached_tokens": 1,
        "seconds": 0,
        "wall_seconds": 0.0,
        "gpu_seconds": 0.0,
        "num_gpu_calls": 0,
    }
    assert (usage["difficulty"].num_calls, usage["difficulty"].num_reused) == (1, 1)
    total = usage["performance"] + usage["difficulty"]
    assert (total.num_calls, total.completion_tokens) == (2, 6) and total.seconds > 0
    assert Usage.from_record(total.to_record()) == total


async def test_purpose_index_seed_and_extra_body_travel_with_the_call(tmp_path: Path) -> None:
    extra = {"chat_template_kwargs": {"thinking_mode": "short"}}
    async with bench(tmp_path, settings={"extra_body": extra}) as b:
        await b.teacher.ask(request_of(seed=7, index=2, purpose="grün\r\nX-Evil: 1"))
        [call] = b.server.calls
        assert (call.index, call.seed, call.purpose) == (2, 7, "grün\r\nX-Evil: 1")
        assert call.body["chat_template_kwargs"] == {"thinking_mode": "short"}
        assert "X-Evil" not in b.server.headers[0]


async def test_a_constrained_request_brings_its_logprobs(tmp_path: Path) -> None:
    def answer(body: Body) -> Body:
        yes, no = body["structured_outputs"]["choice"]
        return constrained_completion({yes: 0.75, no: 0.25}, body)

    async with bench(tmp_path, answer) as b:
        reply = await b.teacher.ask(request_of(choices=("yes", "no")))
    assert isinstance(reply, Reply) and reply.text == "yes"
    assert reply.top_logprobs == (("yes", math.log(0.75)), ("no", math.log(0.25)))


async def test_an_endpoint_that_knows_no_constraint_is_asked_without_it_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = ["structured_outputs", "top_logprobs", "seed", "max_completion_tokens"]
    async with bench(tmp_path, unknown_fields=unknown, settings={"max_retries": 0}) as b:
        replies = [await b.teacher.ask(request_of(n, choices=("yes", "no"))) for n in range(3)]
        assert all(isinstance(reply, Reply) and reply.top_logprobs == () for reply in replies)
        assert len(b.server.calls) == len(unknown) + 3
        assert not set(unknown) & b.server.calls[-1].body.keys() and b.server.calls[-1].body["max_tokens"] == 8
    assert sum("does not know" in record.message for record in caplog.records) == len(unknown)


async def test_many_calls_at_once_learn_of_an_unknown_field_together(tmp_path: Path) -> None:
    async with bench(
        tmp_path, unknown_fields=["structured_outputs"], settings={"max_retries": 0}, delay_seconds=0.01
    ) as b:
        replies = await asyncio.gather(*(b.teacher.ask(request_of(n, choices=("a", "b"))) for n in range(30)))
        assert all(isinstance(reply, Reply) for reply in replies)


PASSING = {
    Fault.RESET: "teacher_disconnected",
    Fault.TIMEOUT: "teacher_timeout",
    Fault.CONFLICT: "teacher_error",
    Fault.RATE_LIMIT: "teacher_rate_limited",
    Fault.SERVER_ERROR: "teacher_error",
    Fault.BAD_GATEWAY: "teacher_unavailable",
    Fault.UNAVAILABLE: "teacher_unavailable",
    Fault.GATEWAY_TIMEOUT: "teacher_unavailable",
    Fault.CUT_JSON: "teacher_bad_reply",
    Fault.CUT_BODY: "teacher_disconnected",
    Fault.HTML: "teacher_bad_reply",
    Fault.EMPTY_BODY: "teacher_bad_reply",
    Fault.EMPTY_CHOICES: "teacher_bad_reply",
    Fault.NULL_CONTENT: "teacher_bad_reply",
}


@pytest.mark.parametrize("fault", PASSING)
async def test_a_passing_failure_is_retried_until_it_passes(tmp_path: Path, fault: Fault) -> None:
    async with bench(tmp_path, faults=FaultSchedule(first=[fault, fault])) as b:
        reply = await b.teacher.ask(request_of())
        assert isinstance(reply, Reply) and reply.text == "answer to question 0 #0"
        assert len(b.server.calls) == 3 and b.teacher.usage["performance"].num_retries == 2


@pytest.mark.parametrize(("fault", "reason"), PASSING.items())
async def test_a_failure_that_does_not_pass_fails_the_row_and_is_not_stored(
    tmp_path: Path, fault: Fault, reason: str
) -> None:
    async with bench(tmp_path, faults=FaultSchedule(always=fault)) as b:
        failure = await b.teacher.ask(request_of())
        assert isinstance(failure, CallFailure) and failure.reason == reason
        assert "asked 3 times" in failure.detail
        assert len(b.server.calls) == 3 and len(b.journal) == 0
        assert b.teacher.usage["performance"].num_failures == 1
        b.server.faults = FaultSchedule()
        assert isinstance(await b.teacher.ask(request_of()), Reply)


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.DRIP])
async def test_a_body_that_never_ends_is_a_timeout(tmp_path: Path, fault: Fault) -> None:
    faults = FaultSchedule(always=fault)
    async with bench(tmp_path, faults=faults, settings={"timeout_seconds": 0.2, "max_retries": 1}) as b:
        failure = await b.teacher.ask(request_of())
        assert isinstance(failure, CallFailure) and failure.reason == "teacher_timeout"
        assert failure.detail == "asked 2 times: no whole answer within 0.2 s"


async def test_one_endless_generation_does_not_stop_a_run_whose_server_is_there(tmp_path: Path) -> None:
    settings = {"timeout_seconds": 0.1, "max_retries": 2, "unreachable_seconds": 0.0}
    async with bench(tmp_path, faults=FaultSchedule(always=Fault.HANG), settings=settings) as b:
        failure = await b.teacher.ask(request_of())
        assert isinstance(failure, CallFailure) and failure.reason == "teacher_timeout"


async def test_an_answer_without_end_in_sight_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_REPLY_BYTES", 1000)
    async with bench(tmp_path, lambda body: "x" * 2000, settings={"max_retries": 0}) as b:
        failure = await b.teacher.ask(request_of())
        assert isinstance(failure, CallFailure) and failure.reason == "teacher_bad_reply"
        assert "longer than 1000 bytes" in failure.detail


@pytest.mark.parametrize("fault", [Fault.BAD_REQUEST, Fault.TOO_LONG, Fault.UNPROCESSABLE])
async def test_a_refused_row_fails_alone_and_at_once(tmp_path: Path, fault: Fault) -> None:
    async with bench(tmp_path, faults=FaultSchedule(first=[fault])) as b:
        failure = await b.teacher.ask(request_of(1))
        assert isinstance(failure, CallFailure) and failure.reason == "teacher_rejected"
        assert f"HTTP {fault}: a scheduled fault" in failure.detail and len(b.server.calls) == 1
        assert isinstance(await b.teacher.ask(request_of(2)), Reply)


@pytest.mark.parametrize("fault", [Fault.BAD_REQUEST, Fault.HTML])
async def test_twenty_refusals_without_a_success_stop_the_run(tmp_path: Path, fault: Fault) -> None:
    async with bench(tmp_path, faults=FaultSchedule(always=fault), settings={"max_retries": 0}) as b:
        for number in range(19):
            assert isinstance(await b.teacher.ask(request_of(number)), CallFailure)
        with pytest.raises(TeacherMisconfigured, match="refuses every call"):
            await b.teacher.ask(request_of(19))
        with pytest.raises(TeacherMisconfigured):
            await b.teacher.ask(request_of(20))
        assert len(b.server.calls) == 20


async def test_refusals_after_a_success_never_stop_the_run(tmp_path: Path) -> None:
    faults = FaultSchedule(first=[None], always=Fault.BAD_REQUEST)
    async with bench(tmp_path, faults=faults) as b:
        assert isinstance(await b.teacher.ask(request_of(0)), Reply)
        assert all([isinstance(await b.teacher.ask(request_of(n)), CallFailure) for n in range(1, 40)])


@pytest.mark.parametrize("fault", [Fault.UNAUTHORISED, Fault.FORBIDDEN, Fault.NOT_FOUND])
async def test_a_refused_set_up_stops_the_run_and_names_what_is_served(tmp_path: Path, fault: Fault) -> None:
    async with bench(tmp_path, faults=FaultSchedule(always=fault), models=["teacher", "other"]) as b:
        with pytest.raises(TeacherMisconfigured, match=rf"HTTP {fault}.*it serves 'teacher', 'other'"):
            await b.teacher.ask(request_of(1))
        # Nobody asks again, but what is stored stays readable.
        with pytest.raises(TeacherMisconfigured):
            await b.teacher.ask(request_of(2))
        assert len(b.server.calls) == 1


async def test_a_forbidden_prompt_among_answered_ones_is_a_row_until_there_are_twenty(tmp_path: Path) -> None:
    faults = FaultSchedule(first=[None], always=Fault.FORBIDDEN)
    async with bench(tmp_path, faults=faults) as b:
        await b.teacher.ask(request_of(0))
        for number in range(1, 21):
            failure = await b.teacher.ask(request_of(number))
            assert isinstance(failure, CallFailure) and failure.reason == "teacher_rejected"
        with pytest.raises(TeacherMisconfigured, match="HTTP 403"):
            await b.teacher.ask(request_of(21))


async def test_a_wrong_model_name_is_told_with_the_right_ones(tmp_path: Path) -> None:
    async with bench(tmp_path, models=["Qwen/Right"], settings={"model": "Qwen/Wrong"}) as b:
        with pytest.raises(
            TeacherMisconfigured, match=r"does not serve the model 'Qwen/Wrong'; it serves 'Qwen/Right'"
        ):
            await b.teacher.check()
        with pytest.raises(TeacherMisconfigured, match="does not serve"):
            await b.teacher.ask(request_of())
        assert b.server.calls == []
    async with bench(tmp_path, models=["Qwen/Right"], settings={"model": "Qwen/Wrong"}) as b:
        with pytest.raises(TeacherMisconfigured, match=r"`Qwen/Wrong` does not exist.*'Qwen/Right'"):
            await b.teacher.ask(request_of())


async def test_a_check_passes_where_the_model_is_served(tmp_path: Path) -> None:
    async with bench(tmp_path, models=["other", "teacher"]) as b:
        await b.teacher.check()
        assert b.server.calls == []


async def test_the_key_comes_from_the_environment_and_is_never_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", " s3cret\n")
    async with bench(tmp_path, api_key="s3cret", settings={"api_key_env": "MY_KEY"}) as b:
        await b.teacher.check()
        assert isinstance(await b.teacher.ask(request_of()), Reply)
        assert b.server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in caplog.text
    monkeypatch.setenv("MY_KEY", "wrong-one")
    async with bench(tmp_path, api_key="s3cret", settings={"api_key_env": "MY_KEY"}) as b:
        with pytest.raises(TeacherMisconfigured, match="MY_KEY") as caught:
            await b.teacher.check()
        assert "wrong-one" not in str(caught.value)


@contextmanager
def teacher_at(url: str, folder: Path, **settings: Any) -> Iterator[Teacher]:
    endpoint = EndpointConfig(url=url, **{"model": "teacher", "unreachable_seconds": 0.3, **settings})
    with Journal(folder / "replies.journal") as journal:
        yield Teacher(endpoint, journal, no_image, first_backoff_seconds=0.01)


async def test_an_address_where_nobody_listens_is_unreachable_after_the_configured_time(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with teacher_at(url, tmp_path, max_retries=0) as teacher:
        async with teacher:
            began = time.monotonic()
            with pytest.raises(TeacherUnreachable, match=url):
                await teacher.check()
            assert 0.3 <= time.monotonic() - began < 60
            outcomes = await asyncio.gather(*(teacher.ask(request_of(n)) for n in range(100)), return_exceptions=True)
            assert all(isinstance(outcome, TeacherUnreachable) for outcome in outcomes)
            assert "Start it or correct its address" in str(outcomes[0])


async def test_a_server_that_does_not_even_greet_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints_module, "PROBE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with teacher_at(url, tmp_path, timeout_seconds=0.1, max_retries=50) as teacher:
            async with teacher:
                with pytest.raises(TeacherUnreachable):
                    await teacher.ask(request_of())


async def test_a_server_that_restarts_costs_no_row_however_few_the_retries(tmp_path: Path) -> None:
    port = free_port()
    server = ReplayTeacher(echo, port=port)
    starter = threading.Timer(0.5, server.start)
    starter.start()
    with teacher_at(f"http://127.0.0.1:{port}/v1", tmp_path, unreachable_seconds=60, max_retries=0) as teacher:
        async with teacher:
            replies = await asyncio.gather(*(teacher.ask(request_of(n)) for n in range(20)))
            assert all(isinstance(reply, Reply) for reply in replies)
    starter.join()
    server.stop()


async def test_a_check_waits_for_a_server_that_is_starting(tmp_path: Path) -> None:
    port = free_port()
    server = ReplayTeacher(echo, port=port)
    starter = threading.Timer(0.2, server.start)
    starter.start()
    with teacher_at(f"http://127.0.0.1:{port}/v1", tmp_path, unreachable_seconds=60) as teacher:
        async with teacher:
            await teacher.check()
    starter.join()
    server.stop()


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "file:///etc/passwd", "http://", "", "ftp://host/v1"])
async def test_an_address_that_is_none_is_told_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(TeacherMisconfigured, match="no http address"), teacher_at(url, tmp_path):
        pass


async def test_a_host_that_does_not_exist_is_unreachable(tmp_path: Path) -> None:
    with teacher_at("http://no-such-host.invalid/v1", tmp_path) as teacher:
        async with teacher:
            with pytest.raises(TeacherUnreachable, match="no-such-host"):
                await teacher.check()


async def test_an_address_without_the_api_is_told(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        with teacher_at(b.server.url.removesuffix("/v1"), tmp_path / "other") as teacher:
            async with teacher:
                with pytest.raises(TeacherMisconfigured, match="ends in /v1"):
                    await teacher.check()


async def test_retry_after_is_honoured(tmp_path: Path) -> None:
    faults = FaultSchedule(first=[Fault.RATE_LIMIT], retry_after="0.4")
    async with bench(tmp_path, faults=faults) as b:
        assert isinstance(await b.teacher.ask(request_of()), Reply)
        assert b.server.calls[1].began - b.server.calls[0].began >= 0.4


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 1970 00:00:20 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:05 GMT", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, now=10.0) == seconds


async def test_a_spent_budget_is_not_waited_for(tmp_path: Path) -> None:
    error = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    async with bench(tmp_path) as b:

        async def refuse(request: Any) -> aiohttp.web.Response:
            return aiohttp.web.json_response(error, status=429)

        b.server._answer = refuse  # type: ignore[method-assign]
        with pytest.raises(TeacherMisconfigured, match="exceeded your current quota"):
            await b.teacher.ask(request_of())


def test_every_status_has_a_handling_and_the_table_holds_the_promised_ones() -> None:
    actions = {status: handling_of_status(status).action for status in (*range(300, 400), *range(400, 600))}
    assert [s for s, a in actions.items() if a is Action.STOP and s >= 400] == [401, 402, 403, 404, 405, 410, 501]
    assert {400, 413, 422} <= {s for s, a in actions.items() if a is Action.REJECT}
    assert {408, 409, 500, 502, 504} <= {s for s, a in actions.items() if a is Action.ELSEWHERE}
    assert [s for s, a in actions.items() if a is Action.BACK_OFF] == [429, 503, 529]
    assert all(actions[status] is Action.STOP for status in range(300, 400))
    assert set(STATUS_HANDLING) <= set(actions)


def test_no_row_of_the_exception_table_is_shadowed_by_an_earlier_one() -> None:
    kinds = [kind for kind, _ in EXCEPTION_HANDLING]
    shadowed = [
        (late, early)
        for at, late in enumerate(kinds)
        for early in kinds[:at]
        if issubclass(late, early) and dict(EXCEPTION_HANDLING)[late] != dict(EXCEPTION_HANDLING)[early]
    ]
    assert shadowed == []


async def test_plain_http_at_an_https_address_is_a_matter_of_set_up_or_address(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        with teacher_at(b.server.url.replace("http:", "https:"), tmp_path / "other") as teacher:
            async with teacher:
                with pytest.raises((TeacherMisconfigured, TeacherUnreachable)):
                    await teacher.ask(request_of())


async def test_an_asker_that_is_cancelled_leaves_the_reply_to_the_next(tmp_path: Path) -> None:
    async with bench(tmp_path, delay_seconds=0.1) as b:
        asker = asyncio.create_task(b.teacher.ask(request_of()))
        await asyncio.sleep(0.05)
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        assert isinstance(await b.teacher.ask(request_of()), Reply)
        assert len(b.server.calls) == 1


async def test_leaving_the_teacher_ends_calls_under_way(tmp_path: Path) -> None:
    async with bench(tmp_path, faults=FaultSchedule(always=Fault.HANG)) as b:
        asker = asyncio.create_task(b.teacher.ask(request_of()))
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await asker


async def test_a_full_disk_stops_the_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(28, "No space left on device")

    async with bench(tmp_path) as b:
        monkeypatch.setattr("os.fsync", refuse)
        with pytest.raises(StorageError, match="No space left"):
            await b.teacher.ask(request_of(1))
        with pytest.raises(StorageError, match="No space left"):
            await b.teacher.ask(request_of(2))
        assert len(b.server.calls) == 1
        monkeypatch.undo()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_images_travel_as_data_urls_and_are_read_once(tmp_path: Path) -> None:
    reads: list[tuple[str, int]] = []

    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        reads.append((sha256, max_pixels))
        return sha256.encode() * 3, "image/png"

    message = Message("user", "look", images=("aa", "bb", "aa"))
    async with bench(tmp_path, lambda body: "ok", read_image=read_image, settings={"max_image_pixels": 1234}) as b:
        await asyncio.gather(*(b.teacher.ask(request_of(n, index=n, messages=(message,))) for n in range(8)))
        urls = image_urls(b.server.calls[0].body)
    assert sorted(reads) == [("aa", 1234), ("bb", 1234)]
    contents = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
    assert contents == [b"aaaaaa", b"bbbbbb", b"aaaaaa"]


async def test_the_image_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "IMAGE_CACHE_BYTES", 4000)
    reads: list[str] = []

    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        reads.append(sha256)
        return b"x" * 900, "image/png"

    async with bench(tmp_path, lambda body: "ok", read_image=read_image) as b:
        for number, name in enumerate("abcabcda"):
            await b.teacher.ask(request_of(index=number, messages=(Message("user", "look", images=(name,)),)))
        images = b.teacher.group.images
        assert images.num_bytes == 2 * (len("data:image/png;base64,") + 1200 + images_module.ENTRY_BYTES) <= 4000
    # Two fit: with the third the first falls out, and so on.
    assert reads == list("abcabcda")


async def test_images_travel_by_name_where_the_server_can_read_them(tmp_path: Path) -> None:
    message = Message("user", "look", images=("a b",))
    settings = {"images_as": "file_url", "max_image_pixels": 1000}
    async with bench(
        tmp_path,
        lambda body: "ok",
        image_path=lambda sha256, max_pixels: tmp_path / f"{max_pixels}" / f"{sha256}.png",
        settings=settings,
    ) as b:
        await b.teacher.ask(request_of(messages=(message,)))
        [part] = [part for part in b.server.calls[0].body["messages"][0]["content"] if part["type"] == "image_url"]
    assert part["image_url"]["url"] == (tmp_path / "1000" / "a b.png").as_uri() and part["uuid"] == "a b-1000"


async def test_a_server_that_may_not_read_our_files_gets_bytes_from_then_on(tmp_path: Path) -> None:
    def answer(body: Body) -> str:
        if image_urls(body)[0].startswith("file:"):
            raise LookupError("Cannot load local files without `--allowed-local-media-path`.")
        return "ok"

    async with bench(
        tmp_path,
        answer,
        read_image=lambda sha256, max_pixels: (b"x", "image/png"),
        image_path=lambda sha256, max_pixels: tmp_path / sha256,
        settings={"images_as": "file_url", "max_retries": 0},
    ) as b:
        messages = (Message("user", "look", images=("aa",)),)
        replies = await asyncio.gather(*(b.teacher.ask(request_of(n, index=n, messages=messages)) for n in range(9)))
        assert all(isinstance(reply, Reply) for reply in replies)
        assert isinstance(await b.teacher.ask(request_of(10, index=10, messages=messages)), Reply)
        assert len(b.server.calls) == 19


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RowError("image_too_large", "7 bytes"), "image_too_large"),
        (FileNotFoundError("gone"), "image_unreadable"),
        (ValueError("broken"), "image_unreadable"),
    ],
)
async def test_an_image_that_cannot_be_read_fails_its_row_alone(tmp_path: Path, error: Exception, reason: str) -> None:
    def read_image(sha256: str, max_pixels: int) -> tuple[bytes, str]:
        raise error

    async with bench(tmp_path, read_image=read_image) as b:
        failure = await b.teacher.ask(request_of(messages=(Message("user", "look", images=("aa",)),)))
        assert isinstance(failure, CallFailure) and failure.reason == reason
        assert b.server.calls == [] and len(b.journal) == 0


def test_the_key_of_a_request_never_changes() -> None:
    # Golden: a change here orphans every journal ever written.
    endpoint = EndpointConfig(model="m", revision="r", extra_body={"top_k": 1}, max_image_pixels=100)
    plain = request_of(1, seed=3, index=2, choices=("yes", "no"))
    assert reply_key(plain, endpoint) == "fef6864120589fe669603be818cbf8c5f3afbe1c54ed92b2e38b7d3a574b4492"
    with_image = request_of(1, messages=(Message("user", "look", images=("aa",)),))
    assert reply_key(with_image, endpoint) == "dff73a7d30e1b7ddf00c93b6001e7ed9dcab936882efed7bbf2855722b4e9511"


def test_the_key_covers_what_shapes_the_reply_and_nothing_else() -> None:
    endpoint = EndpointConfig(model="m")
    plain, seen = request_of(1), request_of(1, messages=(Message("user", "question 1", images=("aa",)),))
    smaller = endpoint.model_copy(update={"max_image_pixels": 50})
    assert reply_key(plain, endpoint) == reply_key(plain, smaller)
    assert reply_key(seen, endpoint) != reply_key(seen, smaller)
    for same in ({"url": "http://elsewhere/v1"}, {"concurrency": 1}, {"images_as": "file_url"}):
        assert reply_key(seen, endpoint) == reply_key(seen, endpoint.model_copy(update=same))
    for other in ({"model": "n"}, {"revision": "2"}, {"extra_body": {"top_k": 1}}):
        assert reply_key(plain, endpoint) != reply_key(plain, endpoint.model_copy(update=other))
    assert reply_key(plain, endpoint) == reply_key(request_of(1, purpose="other", sample_id="x"), endpoint)


async def test_a_storm_of_random_faults_loses_no_row_and_repeats_no_answered_call(tmp_path: Path) -> None:
    faults = FaultSchedule(share=0.3, seed=11)
    async with bench(tmp_path, faults=faults, settings={"max_retries": 30}) as b:
        replies = await asyncio.gather(*(b.teacher.ask(request_of(n)) for n in range(150)))
        assert [reply.text for reply in replies if isinstance(reply, Reply)] == [
            f"answer to question {n} #0" for n in range(150)
        ]
        num_faults = sum(call.fault is not None for call in b.server.calls)
        assert len(b.server.calls) == 150 + num_faults and num_faults > 20
        assert len(b.journal) == 150
