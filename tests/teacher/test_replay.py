"""The replay teacher itself: what the tests of everything else lean on."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from schemas.config import EndpointConfig
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from teacher.client import Teacher
from teacher.journal import Journal
from tests.replay_teacher import Body, Fault, FaultSchedule, MathVisionReplay, ReplayTeacher, question_text

ROOT = Path(__file__).parents[2]
MATHVISION = ROOT.parent / "shared" / "data" / "mathvision"
needs_mathvision = pytest.mark.skipif(
    not (MATHVISION / "problems.jsonl").exists(), reason=f"NO RECORDED ANSWERS WERE TESTED: {MATHVISION} is missing"
)


def body_with(text: str, *, image: Path | None = None, index: int = 0, purpose: str = "performance") -> Body:
    parts: list[Body] = [{"type": "text", "text": text}]
    if image is not None:
        data = base64.b64encode(image.read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return {"messages": [{"role": "user", "content": parts}], "_index": index, "_purpose": purpose}


def test_a_fault_schedule_depends_on_seed_and_number_alone() -> None:
    schedule = FaultSchedule(first=[Fault.RESET, None], share=0.5, seed=3)
    drawn = [schedule.fault_of(number) for number in range(200)]
    assert drawn[:2] == [Fault.RESET, None] and drawn == [schedule.fault_of(number) for number in range(200)]
    assert 60 < sum(fault is not None for fault in drawn) < 140
    assert drawn != [FaultSchedule(share=0.5, seed=4).fault_of(number) for number in range(200)]


def test_the_text_of_a_request_is_that_of_its_user_turns() -> None:
    messages = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    assert question_text({"messages": messages}) == "one\ntwo"


def test_repeated_calls_are_counted() -> None:
    with ReplayTeacher(lambda body: "ok") as server:
        for index in (0, 0, 1):
            request = urllib.request.Request(
                f"{server.url}/chat/completions",
                json.dumps({"model": "teacher", "messages": []}).encode(),
                {"X-Bimode-Sample-Index": str(index)},
            )
            urllib.request.urlopen(request).close()
        assert len(server.calls) == 3 and server.num_repeated == 1


@needs_mathvision
def test_every_problem_is_recognised_inside_a_prompt() -> None:
    replay = MathVisionReplay(MATHVISION)
    assert len(replay.problems) == 304
    for problem in replay.problems:
        question = problem["question"].replace("<image1>", "").strip()
        text = f"Question:\n<<<\n{question}\n>>>\nOptions: {problem['options']}\nPut your answer in \\boxed{{}}."
        body = body_with(text, image=MATHVISION / problem["image"], index=14)
        assert replay.problem_of(body)["id"] == problem["id"]
        assert replay(body) == replay.responses[problem["id"]][14]["response"]


@needs_mathvision
async def test_sample_number_i_gets_recorded_answer_i_through_the_client(tmp_path: Path) -> None:
    replay = MathVisionReplay(MATHVISION)
    problem = replay.problems[0]
    message = Message("user", problem["question"], images=("x",))
    image = (MATHVISION / problem["image"]).read_bytes()
    with ReplayTeacher(replay) as server, Journal(tmp_path / "j") as journal:
        endpoint = EndpointConfig(model="teacher", url=server.url)
        async with Teacher(endpoint, journal, lambda sha256, pixels: (image, "image/jpeg")) as teacher:
            replies = [
                await teacher.ask(TeacherRequest("s", "performance", (message,), Sampling(), index=index))
                for index in range(8)
            ]
            stranger = TeacherRequest("s", "performance", (Message("user", "What is love?"),), Sampling())
            failure = await teacher.ask(stranger)
    texts = [reply.text for reply in replies if isinstance(reply, Reply)]
    assert texts == [answer["response"] for answer in replay.responses[problem["id"]][:8]]
    assert isinstance(failure, CallFailure) and "nothing to replay" in failure.detail


@needs_mathvision
def test_other_purposes_are_answered_by_somebody_else() -> None:
    text = json.loads((MATHVISION / "problems.jsonl").read_text("utf-8").splitlines()[0])["question"]
    assert MathVisionReplay(MATHVISION, otherwise=lambda body: "yes")(body_with(text, purpose="difficulty")) == "yes"
    with pytest.raises(LookupError):
        MathVisionReplay(MATHVISION)(body_with(text, purpose="difficulty"))


def test_it_runs_from_the_command_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "tests/replay_teacher.py", "--port", str(port), "--model", "m", "--text", "hello"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == f"answering at http://127.0.0.1:{port}/v1\n"
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()
        began = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/chat/completions", body) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "hello"
        assert time.monotonic() - began < 10
    finally:
        server.kill()
        server.communicate()
