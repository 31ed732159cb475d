"""The fault server, seen from plain clients: a raw socket, http.client and aiohttp."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import ConfigError
from schemas.requests import Message, Reply, Sampling
from teacher.compacted import table_of
from teacher.fault_server import (
    PASSING_FAULTS,
    Body,
    EngineModel,
    Fault,
    FaultSchedule,
    FaultServer,
    Restarts,
    completion,
    constrained_completion,
    hashed_answer,
    image_urls,
    question_text,
)
from teacher.fault_server.engine import Engine, Generation
from teacher.fault_server.schedule import STATUS_FAULTS
from teacher.records import JournalRecord

LONG_SECONDS = 3600.0
PATIENCE_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


def body_of(text: str = "What is it?", **fields: Any) -> Body:
    return {"model": "teacher", "messages": [{"role": "user", "content": text}], "seed": 7, **fields}


def request_bytes(body: Body, *, path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(content), content)


def connect(server: FaultServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), PATIENCE_SECONDS)


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body of the next response, as far as it comes before an orderly end."""
    seen = b""
    while b"\r\n\r\n" not in seen and (piece := connection.recv(2**16)):
        seen += piece
    head, _, content = seen.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(content) < int(headers["content-length"]) and (piece := connection.recv(2**16)):
        content += piece
    return int(status.split()[1]), headers, content


def post(
    server: FaultServer, body: Body | bytes, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Returns status, headers (lower case) and JSON of one call over a connection of its own."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_SECONDS)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", content, headers or {})
        response = connection.getresponse()
        seen = {name.lower(): value for name, value in response.getheaders()}
        return response.status, seen, json.loads(response.read())
    finally:
        connection.close()


def get(server: FaultServer, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def metrics(server: FaultServer) -> dict[str, float]:
    """Returns the samples of /metrics by name; those of the engine must carry its labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(get(server, "/metrics")[1].decode()):
        for sample in family.samples:
            labels = {"engine": "0", "model_name": "teacher"} if sample.name.startswith("vllm:") else {}
            assert sample.labels == labels
            values[sample.name] = sample.value
    return values


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


def texts(reply: Body) -> list[str]:
    return [choice["message"]["content"] for choice in reply["choices"]]


def failing(fault: Fault, **fields: Any) -> FaultServer:
    """Returns a server with which the first time that anything is asked goes wrong."""
    return FaultServer(faults=FaultSchedule(first=[fault], **{"drip_seconds": 0.001, **fields}))


# What each fault looks like


def test_every_fault_is_looked_at_by_a_test() -> None:
    looked_at = set(STATUS_FAULTS) | {Fault(name) for name in DAMAGED} | set(TRANSPORT_FAULTS)
    assert looked_at == set(Fault)


@pytest.mark.parametrize("fault", STATUS_FAULTS)
def test_a_status_comes_with_an_error_in_the_form_of_vllm_and_passes(fault: Fault) -> None:
    with failing(fault, retry_after="3") as server:
        status, headers, reply = post(server, body_of())
        assert status == int(fault) == reply["error"]["code"]
        assert reply["error"]["message"] == f"a scheduled fault: {fault.name.lower()}"
        assert headers.get("retry-after") == ("3" if status in {429, 503} else None)
        assert post(server, body_of())[0] == 200


def none_of_yes_and_no(reply: Body) -> bool:
    return all(text not in {"yes", "no"} for text in texts(reply)) and len(texts(reply)) == 3


DAMAGED: dict[str, Callable[[Body], bool]] = {
    "empty_choices": lambda reply: reply["choices"] == [],
    "fewer_choices": lambda reply: len(reply["choices"]) == 2 and set(texts(reply)) <= {"yes", "no"},
    "null_content": lambda reply: texts(reply) == [None] * 3,
    "length": lambda reply: (
        all(choice["finish_reason"] == "length" for choice in reply["choices"])
        and set(texts(reply)) <= {"y", "n"}  # half of "yes" is "y", of "no" it is "n"
    ),
    "off_schema": none_of_yes_and_no,
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_reply_is_good_json_and_wrong_in_one_way(fault: str) -> None:
    body = body_of(n=3, structured_outputs={"choice": ["yes", "no"]})
    with failing(Fault(fault)) as server:
        status, _, reply = post(server, body)
        assert status == 200 and DAMAGED[fault](reply)
        _, _, good = post(server, body)
        assert set(texts(good)) <= {"yes", "no"} and not DAMAGED[fault](good)


TRANSPORT_FAULTS = [
    Fault.REFUSE, Fault.KILL, Fault.RESET, Fault.RESET_BODY, Fault.HANG, Fault.DRIP, Fault.SLOW_HEADERS,
    Fault.CUT_JSON, Fault.CUT_BODY, Fault.HTML, Fault.EMPTY_BODY, Fault.BAD_ENCODING,
]  # fmt: skip


def test_a_reset_comes_before_any_byte_of_the_answer() -> None:
    with failing(Fault.RESET) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert post(server, body_of())[0] == 200


def test_a_reset_in_the_body_comes_after_half_of_it() -> None:
    with failing(Fault.RESET_BODY) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        seen = bytearray()

        def read_on() -> None:
            while piece := connection.recv(2**16):
                seen.extend(piece)

        with pytest.raises(ConnectionResetError):
            read_on()
        head, _, content = seen.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and content.startswith(b'{"id"') and b"usage" not in content


def test_a_cut_body_ends_in_order_but_short_of_its_length() -> None:
    with failing(Fault.CUT_BODY) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        status, headers, content = read_response(connection)
        assert status == 200 and 0 < len(content) < int(headers["content-length"])


def test_cut_json_fits_its_length_and_is_no_json() -> None:
    with failing(Fault.CUT_JSON) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        status, headers, content = read_response(connection)
        assert (status, len(content)) == (200, int(headers["content-length"])) and content.startswith(b'{"id"')
        with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
            json.loads(content)
        connection.sendall(request_bytes(body_of()))
        assert json.loads(read_response(connection)[2])["choices"], "the connection goes on"


def test_html_and_an_empty_body_come_as_answers() -> None:
    for fault, kind, beginning in (
        (Fault.HTML, "text/html", b"<!DOCTYPE"),
        (Fault.EMPTY_BODY, "application/json", b""),
    ):
        with failing(fault) as server, connect(server) as connection:
            connection.sendall(request_bytes(body_of()))
            status, headers, content = read_response(connection)
            assert (status, headers["content-type"]) == (200, kind)
            assert content.startswith(beginning) and bool(content) == bool(beginning)


def test_a_hang_sends_nothing_and_a_server_with_one_still_stops() -> None:
    with failing(Fault.HANG) as server:
        connection = connect(server)
        connection.sendall(request_bytes(body_of()))
        wait_until(lambda: server.num_in_flight == 1)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    connection.settimeout(PATIENCE_SECONDS)
    with connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_a_dripping_body_goes_on_until_the_client_leaves() -> None:
    with failing(Fault.DRIP) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        seen = b""
        while seen.count(b"1\r\n \r\n") < 20:
            seen += connection.recv(2**16)
        assert b"\r\n0\r\n" not in seen
        connection.close()
        wait_until(lambda: server.num_in_flight == 0)


def test_slow_headers_come_byte_by_byte_before_a_good_answer() -> None:
    with failing(Fault.SLOW_HEADERS, drip_seconds=0.01) as server, connect(server) as connection:
        connection.sendall(request_bytes(body_of()))
        head = connection.recv(2**16)
        assert head.startswith(b"H") and b"\r\n" not in head
        while b"\r\n\r\n" not in head:
            head += connection.recv(1)
        assert json.loads(connection.recv(2**16))["choices"]


async def test_aiohttp_sees_cut_and_misnamed_bodies_as_payload_errors() -> None:
    for fault in (Fault.CUT_BODY, Fault.BAD_ENCODING):
        with failing(fault) as server:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{server.url}/chat/completions", json=body_of()) as response,
            ):
                assert response.status == 200
                assert response.headers.get("Content-Encoding") == ("gzip" if fault is Fault.BAD_ENCODING else None)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()


def refusals_until_back(server: FaultServer) -> int:
    """Returns how many attempts to connect were refused before one was taken."""
    for num_refused in range(10**6):
        try:
            connect(server).close()
        except ConnectionRefusedError:
            time.sleep(0.005)
            continue
        return num_refused
    raise AssertionError("it never came back")


def test_a_refusal_resets_one_call_and_closes_the_address_but_not_the_other_connections() -> None:
    faults = FaultSchedule(
        persistent=lambda body: Fault.REFUSE if "bad" in question_text(body) else None, refuse_seconds=1.0
    )
    with FaultServer(faults=faults) as server, connect(server) as bad, connect(server) as good:
        good.sendall(request_bytes(body_of("first")))
        assert read_response(good)[0] == 200
        bad.sendall(request_bytes(body_of("bad")))
        with pytest.raises(ConnectionResetError):
            bad.recv(1)
        good.sendall(request_bytes(body_of("second")))
        assert read_response(good)[0] == 200
        assert refusals_until_back(server) > 0
        assert (post(server, body_of("third"))[0], server.num_deaths) == (200, 0)


# Which calls go wrong


digests = st.integers(0, 2**64).map(lambda number: f"{number:064x}")


@given(st.integers(0, 2**31), digests, st.floats(0, 1), st.integers(0, 5))
def test_a_drawn_fault_is_a_function_of_seed_request_and_times_asked(
    seed: int, digest: str, share: float, limit: int
) -> None:
    schedule = FaultSchedule(share=share, seed=seed, max_faults_per_request=limit)
    drawn = [schedule.fault_of(digest, times, {}) for times in range(10)]
    again = FaultSchedule(share=share, seed=seed, max_faults_per_request=limit)
    assert drawn == [again.fault_of(digest, times, {}) for times in range(10)]
    assert drawn[limit:] == [None] * (10 - limit)
    assert set(drawn) <= {None, *PASSING_FAULTS} - {Fault.FEWER_CHOICES}


def test_the_share_of_faults_is_what_was_asked_for_and_all_kinds_come() -> None:
    schedule = FaultSchedule(share=0.2, seed=1)
    body = body_of(n=2)
    drawn = Counter(schedule.fault_of(f"{number:064x}", 0, body) for number in range(10_000))
    assert set(drawn) == {None, *PASSING_FAULTS}
    assert 0.19 < 1 - drawn[None] / 10_000 < 0.21  # 2.5 standard deviations
    other = FaultSchedule(share=0.2, seed=2)
    same = sum(schedule.fault_of(f"{n:064x}", 0, body) == other.fault_of(f"{n:064x}", 0, body) for n in range(1000))
    assert same < 900


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 5), max_size=25).flatmap(lambda asked: st.tuples(st.just(asked), st.permutations(asked)))
)
def test_the_order_of_arrival_changes_no_fault(orders: tuple[list[int], list[int]]) -> None:
    def faults_of(order: list[int]) -> dict[tuple[str, int], Fault | None]:
        schedule = FaultSchedule(share=0.5, kinds=[Fault.SERVER_ERROR, Fault.RATE_LIMIT, Fault.HTML], seed=3)
        with FaultServer(faults=schedule) as server, connect(server) as connection:
            for number in order:
                connection.sendall(request_bytes(body_of(f"question {number}")))
                read_response(connection)
            return {(call.digest, call.num_asked): call.fault for call in server.calls}

    assert faults_of(orders[0]) == faults_of(orders[1])


def test_a_request_is_the_same_whatever_the_order_of_its_keys_and_another_with_another_seed() -> None:
    body = body_of(temperature=1.0)
    with FaultServer() as server:
        for sent in (body, dict(reversed(body.items())), {**body, "seed": 8}):
            post(server, sent)
        first, second, third = server.calls
    assert (first.digest, first.num_asked, second.num_asked) == (second.digest, 0, 1)
    assert third.digest != first.digest and third.question == first.question
    assert server.num_repeated == 1


def test_scripted_faults_come_first_then_the_lasting_one_and_chosen_rows_before_both() -> None:
    schedule = FaultSchedule(
        first=[Fault.RESET, None],
        always=Fault.HTML,
        persistent=lambda body: Fault.UNPROCESSABLE if body.get("n") == 2 else None,
    )
    assert [schedule.fault_of("a", times, {}) for times in range(4)] == [Fault.RESET, None, Fault.HTML, Fault.HTML]
    assert [schedule.fault_of("a", times, {"n": 2}) for times in range(2)] == [Fault.UNPROCESSABLE] * 2


def test_faults_are_drawn_among_those_that_the_request_can_show() -> None:
    schedule = FaultSchedule(share=1.0, kinds=[Fault.FEWER_CHOICES, Fault.OFF_SCHEMA])
    constrained = {"structured_outputs": {"choice": ["a"]}}
    assert schedule.fault_of("a", 0, {}) is None
    assert schedule.fault_of("a", 0, {"n": 2}) is Fault.FEWER_CHOICES
    assert schedule.fault_of("a", 0, constrained) is Fault.OFF_SCHEMA


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        FaultSchedule(share=1.5)
    with pytest.raises(ConfigError, match="no kinds"):
        FaultSchedule(kinds=[])
    with pytest.raises(ConfigError, match=r"max_sequences .* is 0"):
        EngineModel(max_sequences=0)
    with pytest.raises(ConfigError, match="below 0"):
        EngineModel(latency_seconds=-1)
    with pytest.raises(ConfigError, match="'normal'"):
        EngineModel(latency_shape="normal")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="times below 0"):
        EngineModel(latency_shape="uniform", latency_spread=1.5)
    with pytest.raises(ConfigError, match="0 tokens"):
        hashed_answer(0)


# What it answers


def test_choice_j_of_a_call_is_the_answer_to_its_seed_plus_j() -> None:
    with FaultServer() as server:
        _, _, together = post(server, body_of(n=8, seed=40))
        singly = [post(server, body_of(seed=40 + j))[2] for j in range(8)]
    assert texts(together) == [text for reply in singly for text in texts(reply)]
    assert len(set(texts(together))) == 8
    assert [choice["index"] for choice in together["choices"]] == list(range(8))
    usage = together["usage"]
    assert usage["prompt_tokens"] == 3  # "What is it?", once
    assert usage["completion_tokens"] == sum(len(text.split()) for text in texts(together))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_text_by_hash_stays_within_the_limit_and_depends_on_messages_and_seed_alone() -> None:
    with FaultServer(hashed_answer(100)) as server:
        long = texts(post(server, body_of())[2])
        assert texts(post(server, body_of(temperature=0.5))[2]) == long != texts(post(server, body_of("Else"))[2])
        [short] = texts(post(server, body_of(max_completion_tokens=2))[2])
    assert len(long[0].split()) > 2 and long[0].split()[:2] == short.split()


def test_a_constrained_answer_is_one_of_the_choices_and_brings_their_logprobs_if_asked() -> None:
    allowed: Any = {"structured_outputs": {"choice": ["a b", "c", "d"]}}
    with FaultServer(lambda body, choice: "c") as server:
        _, _, reply = post(server, body_of(**allowed, logprobs=True, top_logprobs=20))
        _, _, two = post(server, body_of(**allowed, logprobs=True, top_logprobs=2))
        _, _, unasked = post(server, body_of(**allowed))
    [entry] = reply["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("c", [99])
    assert {item["token"]: round(math.exp(item["logprob"]), 6) for item in entry["top_logprobs"]} == {
        "c": 0.9,
        "a b": 0.05,
        "d": 0.05,
    }
    assert len(two["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert unasked["choices"][0]["logprobs"] is None
    with FaultServer() as server:
        said = {text for seed in range(20) for text in texts(post(server, body_of(**allowed, seed=seed))[2])}
    assert said == {"a b", "c", "d"}


def test_an_answer_may_be_a_whole_completion_and_knows_purpose_index_and_choice() -> None:
    def answer(body: Body, choice: int) -> Body:
        if body["_purpose"] == "routing":
            return constrained_completion({"no": 0.25, "yes": 0.75}, body)
        return completion(f"{body['_index'] + choice}", body, reasoning="hm", finish_reason="length", cached_tokens=2)

    headers = {"X-Bimode-Purpose": "caf%C3%A9", "X-Bimode-Sample-Index": "3"}
    with FaultServer(answer) as server:
        _, _, reply = post(server, body_of(n=2), headers)
        _, _, routed = post(server, body_of(logprobs=True), {"X-Bimode-Purpose": "routing"})
        call = server.calls[0]
    assert texts(reply) == ["3", "4"] and reply["choices"][1]["message"]["reasoning"] == "hm"
    assert reply["choices"][1]["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert (call.purpose, call.index, call.n, call.seed) == ("café", 3, 2, 7)
    assert texts(routed) == ["yes"]
    tops = routed["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [(top["token"], top["logprob"]) for top in tops] == [("yes", math.log(0.75)), ("no", math.log(0.25))]


def test_an_answer_that_knows_nothing_is_a_400_and_one_that_breaks_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: Body, choice: int) -> str:
        raise (KeyError if body["seed"] == 1 else ZeroDivisionError)("so")

    for engine in (EngineModel(), EngineModel(latency_seconds=1e-6)):
        with FaultServer(answer, engine=engine) as server:
            assert post(server, body_of(seed=1))[0] == 400
            status, _, reply = post(server, body_of(seed=2))
            assert status == 500 and "ZeroDivisionError('so')" in reply["error"]["message"]
    assert len(caplog.records) == 2


def test_prompt_tokens_are_the_words_of_all_turns_and_64_an_image() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
    ]
    with FaultServer() as server:
        _, _, reply = post(server, {"model": "teacher", "messages": messages})
        [call] = server.calls
    assert reply["usage"]["prompt_tokens"] == 2 + 64 + 3
    assert (question_text(call.body), image_urls(call.body)) == ("What is it?", ["data:image/png;base64,AAAA"])


def test_recorded_replies_answer_the_same_messages_and_seed(tmp_path: Path) -> None:
    def record(seed: int, text: str, **fields: Any) -> JournalRecord:
        return JournalRecord(
            key=f"{seed:064x}",
            sample_id="s",
            purpose="performance",
            index=seed - 5,
            reply=Reply(text, "stop", "teacher", prompt_tokens=9, completion_tokens=4, **fields),
            messages=(Message("user", "What is it?", images=("ab" * 32,)),),
            sampling=Sampling(),
            seed=seed,
        )

    path = tmp_path / "replies.parquet"
    tops = (("yes", -0.5), ("no", -1.0))
    pq.write_table(table_of([record(5, "yes", top_logprobs=tops), record(6, "no", reasoning="because")]), path)
    picture = {"type": "image_url", "image_url": {"url": "file:///x.png"}, "uuid": "ab" * 32 + "-1000"}
    body = body_of()
    body["messages"][0]["content"] = [picture, {"type": "text", "text": "What is it?"}]

    from teacher.fault_server.recorded import recorded_answer

    with FaultServer(recorded_answer([path])) as server:
        _, _, reply = post(server, {**body, "seed": 5, "n": 2, "logprobs": True})
        assert texts(reply) == ["yes", "no"] and reply["choices"][1]["message"]["reasoning"] == "because"
        assert reply["usage"] == {
            "prompt_tokens": 9,
            "completion_tokens": 8,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["token"] == "no"
        assert post(server, {**body, "seed": 7})[0] == 400
        assert post(server, {**body, "messages": body_of()["messages"], "seed": 5})[0] == 400
    with pytest.raises(ConfigError, match=r"absent\.parquet"):
        recorded_answer([tmp_path / "absent.parquet"])


# What it refuses


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"[]", 400, "no messages"),
        (b"{}", 400, "no messages"),
        (body_of(messages=[]), 400, "no messages"),
        (body_of(messages=["hello"]), 400, "no messages"),
        (body_of(n=0), 400, "n is 0"),
        (body_of(n="2"), 400, "n is '2'"),
        (body_of(n=10**6), 400, "n is 1000000"),
        (body_of(seed=1.5), 400, "seed is 1.5"),
        (body_of(model="other"), 404, "The model `other` does not exist."),
        (body_of(uuid="x"), 400, "Unrecognized request argument supplied: uuid"),
        (body_of(messages=[{"role": "user", "content": [{"type": "text", "text": "", "uuid": "x"}]}]), 400, "uuid"),
        (body_of("x" * 5000), 413, "longer than 4096"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_as_vllm_would(body: Body | bytes, status: int, message: str) -> None:
    limit = 200_000 if isinstance(body, bytes) else 4096
    with FaultServer(unknown_fields=["uuid"], max_body_bytes=limit) as server:
        seen, _, reply = post(server, body)
        assert (seen, reply["error"]["code"]) == (status, status) and message in reply["error"]["message"]
        assert post(server, body_of())[0] == 200


def test_a_body_far_beyond_the_limit_is_a_413_and_not_a_reset() -> None:
    with FaultServer(max_body_bytes=1000) as server:
        status, headers, _ = post(server, body_of("x" * 10_000_000))
        assert (status, headers["connection"]) == (413, "close")


def test_a_key_is_demanded_where_there_is_one() -> None:
    with FaultServer(api_key="secret") as server:
        assert post(server, body_of())[0] == 401 == get(server, "/v1/models")[0]
        allowed = {"Authorization": "Bearer secret"}
        assert post(server, body_of(), allowed)[0] == 200 == get(server, "/v1/models", allowed)[0]


def test_models_health_and_unknown_paths() -> None:
    with FaultServer(models=["teacher", "other"]) as server:
        models = json.loads(get(server, "/v1/models")[1])
        assert [model["id"] for model in models["data"]] == ["teacher", "other"]
        assert get(server, "/health") == (200, b"")
        assert (get(server, "/v2")[0], get(server, "/v1/chat/completions")[0]) == (404, 405)


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense",
        b"GET / HTTP/2",
        b"POST / HTTP/1.1\r\nbroken",
        b"POST / HTTP/1.1\r\nContent-Length: -1",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked",
    ],
)
def test_what_is_no_http_is_a_400_and_the_end(head: bytes) -> None:
    with FaultServer() as server, connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        status, headers, _ = read_response(connection)
        assert (status, headers["connection"]) == (400, "close") and connection.recv(1) == b""


def test_headers_without_end_are_a_431() -> None:
    with FaultServer() as server, connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 2**16)
        assert read_response(connection)[0] == 431


@settings(max_examples=30)
@given(st.lists(st.integers(1, 700), max_size=10))
def test_requests_are_read_wherever_their_bytes_are_cut(cuts: list[int]) -> None:
    sent = b"".join(request_bytes(body_of(f"question {number}", seed=number)) for number in range(3))
    with FaultServer(lambda body, choice: f"{body['seed']}") as server, connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        places = [0, *sorted(cuts), len(sent)]
        for start, end in itertools.pairwise(places):
            connection.sendall(sent[start:end])
        seen = b""
        while seen.count(b'"usage"') < 3 or not seen.endswith(b"}}}"):
            seen += connection.recv(2**16)
    contents = [part.partition(b"\r\n\r\n")[2] for part in seen.split(b"HTTP/1.1 200 OK")[1:]]
    assert [texts(json.loads(content)) for content in contents] == [["0"], ["1"], ["2"]]


def test_a_client_that_waits_for_leave_to_send_gets_it() -> None:
    content = json.dumps(body_of()).encode()
    with FaultServer() as server, connect(server) as connection:
        head = b"POST /v1/chat/completions HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(content))
        assert connection.recv(2**16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert read_response(connection)[0] == 200 and connection.recv(1) == b"", "HTTP/1.0 ends with its answer"


# The engine


def finish_times(model: EngineModel, jobs: list[tuple[float, int, int]]) -> tuple[dict[int, float], Engine]:
    """Returns when each job (arrival, prompt tokens, tokens) finished, in exact simulated seconds."""
    engine = Engine(model, 0.0)
    finished: dict[int, float] = {}
    clock = 0.0

    def run_until(now: float) -> None:
        nonlocal clock
        while (at := engine.next_event_at()) is not None and at <= now:
            clock = at
            engine.advance(at)
            check(engine)
        clock = now

    def check(engine: Engine) -> None:
        assert engine.num_running <= (model.max_sequences or math.inf)
        assert engine.num_running + engine.num_waiting + len(finished) <= len(jobs)
        assert not engine.num_waiting or engine.num_running, "work waits for nothing"
        assert 0.0 <= engine.kv_cache_usage <= 1.0

    for number, (arrival, prompt_tokens, num_tokens) in enumerate(jobs):
        run_until(arrival)

        def note(number: int = number) -> None:
            finished[number] = clock

        engine.submit([Generation(prompt_tokens, num_tokens, model.latency_seconds, note)], arrival)
        check(engine)
    run_until(math.inf)
    return finished, engine


def test_a_sequence_takes_its_latency_and_its_tokens() -> None:
    model = EngineModel(latency_seconds=1.0, tokens_per_second=5.0)
    assert finish_times(model, [(0, 3, 10), (10, 3, 20)])[0] == {0: 3.0, 1: 15.0}


def test_sequences_slow_each_other_down() -> None:
    # Alone 10 tokens/s, two at once 5 each: the first 5 tokens take 0.5 s alone, the others 1 s together.
    model = EngineModel(tokens_per_second=10.0, half_speed_sequences=1.0)
    assert finish_times(model, [(0, 1, 10), (0.5, 1, 10)])[0] == pytest.approx({0: 1.5, 1: 2.0})


def test_sequences_beyond_the_capacity_wait_in_order() -> None:
    model = EngineModel(latency_seconds=1.0, max_sequences=2)
    finished, engine = finish_times(model, [(0, 1, 1)] * 5)
    assert finished == {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0, 4: 3.0}
    assert (engine.num_prompt_tokens, engine.num_generated_tokens, engine.num_preemptions) == (5, 5, 0)


def test_an_overfull_cache_preempts_the_last_sequence_which_goes_on_where_it_was() -> None:
    # 20 + 20 tokens of prompts in a cache of 100: full when each has generated 30. The first then needs 10 more
    # (until 4 s); the second starts again with its 30, and needs another 10.
    model = EngineModel(tokens_per_second=10.0, kv_cache_tokens=100)
    finished, engine = finish_times(model, [(0, 20, 40), (0, 20, 40)])
    assert finished == pytest.approx({0: 4.0, 1: 5.0})
    assert (engine.num_preemptions, engine.num_prompt_tokens) == (1, 40)
    assert engine.num_generated_tokens == 80


def test_a_sequence_too_long_for_the_cache_runs_alone() -> None:
    finished, engine = finish_times(EngineModel(tokens_per_second=1.0, kv_cache_tokens=50), [(0, 40, 60), (0, 10, 10)])
    assert finished == pytest.approx({0: 60.0, 1: 70.0}) and engine.num_preemptions == 0


def test_an_aborted_sequence_leaves_its_place_to_the_next_and_its_tokens_to_the_count() -> None:
    finished: list[str] = []
    engine = Engine(EngineModel(tokens_per_second=10.0, kv_cache_tokens=100, max_sequences=2), 0.0)
    a, b, c = (
        Generation(prompt_tokens, 40, 0.0, partial(finished.append, name))
        for name, prompt_tokens in (("a", 20), ("b", 20), ("c", 10))
    )
    engine.submit([a, b, c], 0.0)
    engine.advance(3.5)  # full at 3 s: b waits with its 30 tokens, before c
    assert (engine.num_running, engine.num_waiting, engine.num_preemptions) == (1, 2, 1)
    engine.abort(b, 3.5)
    engine.abort(b, 3.5)
    # 55 tokens of a, 10 of c and a block of 16 for each are below 100, so c is let in; a ends at 4 s.
    assert (engine.num_running, engine.num_waiting, engine.num_generated_tokens) == (2, 0, 30 + 35)
    engine.advance(4.5)
    assert finished == ["a"] and engine.num_generated_tokens == 30 + 40 + 10
    engine.abort(a, 4.5)
    engine.abort(c, 4.5)
    engine.advance(100.0)
    assert (finished, engine.next_event_at(), engine.num_generated_tokens) == (["a"], None, 80)


jobs = st.lists(st.tuples(st.floats(0, 20), st.integers(0, 60), st.integers(0, 60)), max_size=30).map(sorted)


@given(
    jobs,
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 10, 100, 300]),
    st.sampled_from([None, 1.0, 50.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_every_sequence_finishes_with_all_its_tokens_whatever_the_engine(
    jobs: list[tuple[float, int, int]],
    max_sequences: int | None,
    kv_cache_tokens: int | None,
    tokens_per_second: float | None,
    latency_seconds: float,
) -> None:
    model = EngineModel(
        latency_seconds=latency_seconds,
        max_sequences=max_sequences,
        kv_cache_tokens=kv_cache_tokens,
        tokens_per_second=tokens_per_second,
        half_speed_sequences=4.0,
    )
    finished, engine = finish_times(model, jobs)
    assert len(finished) == len(jobs)
    assert engine.num_generated_tokens == sum(tokens for _, _, tokens in jobs)
    assert (engine.num_running, engine.num_waiting, engine.kv_cache_usage) == (0, 0, 0.0)
    fastest = [at + latency_seconds + tokens / (tokens_per_second or math.inf) for at, _, tokens in jobs]
    assert all(finished[number] >= at - 1e-6 for number, at in enumerate(fastest))


@given(st.sampled_from(["fixed", "uniform", "lognormal"]), digests, st.integers(0, 3))
def test_a_latency_depends_on_seed_and_request_alone_and_keeps_its_bounds(
    shape: Any, digest: str, num_asked: int
) -> None:
    model = EngineModel(latency_seconds=2.0, latency_shape=shape, latency_spread=0.25, seed=4)
    drawn = model.latency_of(digest, num_asked)
    assert drawn == EngineModel(2.0, shape, 0.25, seed=4).latency_of(digest, num_asked)
    # Half as much again either way are 1.6 deviations of the logarithm; 32 bits reach 6.4 of them.
    assert {"fixed": drawn == 2.0, "uniform": 1.5 <= drawn <= 2.5, "lognormal": 0.4 < drawn < 10.0}[shape]


def test_the_median_of_lognormal_latencies_is_the_one_asked_for() -> None:
    model = EngineModel(latency_seconds=2.0, latency_shape="lognormal", latency_spread=1.0)
    drawn = sorted(model.latency_of(f"{number}", 0) for number in range(2001))
    assert 1.8 < drawn[1000] < 2.2 and drawn[1683] / drawn[1000] == pytest.approx(math.e, rel=0.1)


def test_metrics_tell_running_and_waiting_sequences_until_their_client_leaves() -> None:
    engine = EngineModel(latency_seconds=LONG_SECONDS, max_sequences=4, kv_cache_tokens=1000)
    with FaultServer(engine=engine) as server:
        assert metrics(server)["vllm:num_requests_running"] == 0
        clients = [connect(server) for _ in range(3)]
        for client in clients:
            client.sendall(request_bytes(body_of(n=3)))
        wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 5)
        seen = metrics(server)
        assert seen["vllm:num_requests_running"] == 4 and seen["vllm:prompt_tokens_total"] == 4 * 3
        assert seen["vllm:kv_cache_usage_perc"] == pytest.approx(4 * 3 / 1000)
        assert (server.num_in_flight, server.max_in_flight) == (3, 3)
        clients[0].close()
        wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 2)
        for client in clients:
            client.close()
        wait_until(lambda: metrics(server)["vllm:num_requests_running"] == 0)
        assert metrics(server)["vllm:kv_cache_usage_perc"] == 0 and server.max_in_flight == 3


def test_metrics_count_tokens_and_preemptions() -> None:
    with FaultServer() as server:
        reply = post(server, body_of(n=2))[2]
        seen = metrics(server)
    assert seen["vllm:prompt_tokens_total"] == 2 * 3, "each sequence has a prompt, as vLLM counts them"
    assert seen["vllm:generation_tokens_total"] == reply["usage"]["completion_tokens"]
    assert seen["vllm:num_preemptions_total"] == 0
    # Two prompts of 20 and 40 tokens of answer each do not fit into 100 (see above).
    text = "w " * 40
    engine = EngineModel(tokens_per_second=2000.0, kv_cache_tokens=100)
    with FaultServer(lambda body, choice: text, engine=engine) as server:
        reply = post(server, body_of("q " * 20, n=2))[2]
        seen = metrics(server)
    assert texts(reply) == [text, text]
    assert (seen["vllm:num_preemptions_total"], seen["vllm:generation_tokens_total"]) == (1, 80)


def test_the_last_prompts_count_as_cached_in_whole_blocks() -> None:
    def cached_tokens(server: FaultServer, text: str) -> int:
        usage = post(server, body_of(text))[2]["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    with FaultServer(engine=EngineModel(cached_prompts=1)) as server:
        one, other = "a " * 32, "b " * 33
        # The last token is always computed, so 32 tokens have one block of 16 to spare, and 33 have two.
        asked = [one, one, other, other, one]
        assert [cached_tokens(server, text) for text in asked] == [0, 16, 0, 32, 0]


# Deaths


def test_a_poisonous_row_kills_the_engine_with_all_that_is_in_flight_and_another_comes_back() -> None:
    faults = FaultSchedule(persistent=lambda body: Fault.KILL if "poison" in question_text(body) else None)
    engine = EngineModel(latency_seconds=0.001)
    with FaultServer(faults=faults, engine=engine, restarts=Restarts(down_seconds=1.0)) as server:
        post(server, body_of("harmless"))
        before = metrics(server)
        server.faults = FaultSchedule(always=Fault.HANG)
        hanging = connect(server)
        hanging.sendall(request_bytes(body_of("in flight")))
        wait_until(lambda: server.num_in_flight == 1)
        server.faults = faults
        with connect(server) as connection:
            connection.sendall(request_bytes(body_of("poison")))
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with hanging, pytest.raises(ConnectionResetError):
            hanging.recv(1)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((server.host, server.port))
        assert refusals_until_back(server) > 0
        after = metrics(server)
        assert after["process_start_time_seconds"] > before["process_start_time_seconds"]
        assert (before["vllm:prompt_tokens_total"], after["vllm:prompt_tokens_total"]) == (1, 0)
        wait_until(lambda: server.num_in_flight == 0)
        with connect(server) as connection:
            connection.sendall(request_bytes(body_of("poison")))
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert server.num_deaths == 2
        refusals_until_back(server)
        assert post(server, body_of("harmless"))[0] == 200


def test_the_engine_dies_at_the_calls_it_is_told_to_and_when_it_is_told_to() -> None:
    with FaultServer(restarts=Restarts(at_calls=[1], down_seconds=0.01)) as server:
        assert post(server, body_of())[0] == 200
        with pytest.raises(ConnectionResetError):
            post(server, body_of())
        refusals_until_back(server)
        assert (post(server, body_of())[0], server.num_deaths, server.num_calls) == (200, 1, 3)
        server.restart()
        wait_until(lambda: server.num_deaths == 2)
        refusals_until_back(server)
        assert post(server, body_of())[0] == 200


def test_the_engine_dies_regularly() -> None:
    with FaultServer(restarts=Restarts(every_seconds=0.02, down_seconds=0.001)) as server:
        wait_until(lambda: server.num_deaths >= 3)


def test_a_server_stops_while_its_engine_is_away() -> None:
    with FaultServer(restarts=Restarts(down_seconds=LONG_SECONDS)) as server:
        server.restart()
        wait_until(lambda: server.num_deaths == 1)
    assert "fault-server" not in {thread.name for thread in threading.enumerate()}


# Many at once, the log, the command


async def test_hundreds_of_calls_at_once_each_get_their_own_answer() -> None:
    engine = EngineModel(latency_seconds=0.005, latency_shape="uniform", max_sequences=32, tokens_per_second=5000.0)
    with FaultServer(lambda body, choice: f"{body['seed']}", engine=engine) as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64)) as session:

            async def ask(seed: int) -> list[str]:
                async with session.post(f"{server.url}/chat/completions", json=body_of(seed=seed)) as response:
                    return texts(await response.json())

            replies = await asyncio.gather(*(ask(seed) for seed in range(400)))
        assert replies == [[f"{seed}"] for seed in range(400)]
        assert 1 < server.max_in_flight <= 64 and server.num_calls == 400


def test_every_call_is_logged_as_it_begins_with_what_it_asked(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with FaultServer(faults=FaultSchedule(first=[Fault.HTML]), log_path=path) as server:
        began = time.time()
        with pytest.raises(ValueError, match="Expecting"):
            post(server, body_of(n=4), {"X-Bimode-Purpose": "performance"})
        post(server, body_of(n=4))
        post(server, b"no JSON")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert records == [call.to_record() for call in server.calls]
    assert [record["fault"] for record in records] == ["html", None, "html"]
    assert [record["number"] for record in records] == [0, 1, 2]
    assert [(record["n"], record["seed"]) for record in records] == [(4, 7), (4, 7), (1, None)]
    assert records[0]["purpose"] == "performance" and began <= records[0]["began"] <= time.time()
    assert records[0]["digest"] == records[1]["digest"] != records[2]["digest"]
    with pytest.raises(ConfigError, match="or log"):
        FaultServer(log_path=tmp_path / "absent" / "calls.jsonl").start()


def test_calls_need_not_be_kept() -> None:
    with FaultServer(keep_calls=False) as server:
        post(server, body_of())
        assert (server.calls, server.num_calls) == ([], 1)


def start_command(*arguments: str) -> tuple[subprocess.Popen[str], Body]:
    command = [sys.executable, "-m", "teacher.fault_server", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


async def ask_all(url: str, num_questions: int) -> list[int]:
    """Returns the status of each question; 0 for a connection that broke."""
    statuses = []
    async with aiohttp.ClientSession() as session:
        for number in range(num_questions):
            try:
                async with session.post(f"{url}/chat/completions", json=body_of(f"question {number}")) as response:
                    statuses.append(response.status)
            except aiohttp.ClientError:
                statuses.append(0)
    return statuses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_says_where_it_listens_and_ends_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    arguments = ["--faults", "0.5", "--kinds", "reset,429,500", "--latency", "0.001", "--log", str(log)]
    process, said = start_command(*arguments, "--seed", str(number), "--model", "teacher", "--poison", "killer")
    try:
        assert said["url"] == f"http://127.0.0.1:{said['port']}/v1" and said["models"] == ["teacher"]
        statuses = await ask_all(said["url"], 40)
        with pytest.raises(ConfigError, match=f"{said['port']}.*in use"):
            FaultServer(port=said["port"]).start()
    finally:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out, err) == (0, "", "")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    expected = {None: 200, "reset": 0, "429": 429, "500": 500}
    assert statuses == [expected[record["fault"]] for record in records] and set(statuses) == set(expected.values())
    # The same seed in a program: the same faults.
    schedule = FaultSchedule(share=0.5, kinds=[Fault.RESET, Fault.RATE_LIMIT, Fault.SERVER_ERROR], seed=number)
    drawn = [schedule.fault_of(record["digest"], record["num_asked"], {}) for record in records]
    assert [record["fault"] for record in records] == drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "reset,melt"], "there is no fault 'melt'"),
        (["--faults", "2"], "must be from 0 to 1"),
        (["--restart-at", "x"], "--restart-at takes numbers"),
        (["--replies", "absent.parquet"], "absent.parquet holds no recorded replies"),
    ],
)
def test_the_command_names_what_is_wrong_with_its_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from teacher.fault_server.__main__ import main

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        assert main(arguments) == 2
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert message in capsys.readouterr().err
