"""The bundled teacher on a real vLLM, asked by the program `evaluate` and compared with the checkpoint itself."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import TeacherMisconfigured, TrainingError
from schemas.requests import CallFailure, Message, Sampling, TeacherRequest
from sources import ImageStore
from teacher.client import Teacher
from teacher.journal import Journal
from teacher.serving import start_server
from training.evaluate import EvaluationConfig, evaluate

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "sampleworld" / "teacher"
IMAGES = ROOT / "sampleworld" / "data" / "images"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu_side,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="NO REAL vLLM WAS ASKED: this Python does not have it; run the GPU-side tests with .venv-gpu",
    ),
]


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EndpointConfig]:
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = EndpointConfig(model="world", url=f"http://127.0.0.1:{port}/v1", timeout_seconds=300, max_retries=0)
    serve = ServeConfig(model_path=str(TEACHER), python=sys.executable, port=port, start_timeout_seconds=3600)
    handle = start_server(endpoint, serve, log_path=folder / "vllm.log", pid_path=folder / "vllm.pid")
    yield endpoint
    handle.stop()


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about each of eight scenes: two at a glance and one that takes steps."""
    asked = [
        ("What number is in the red cell?", "1"),
        ("What colour is the dot in the blue cell?", "red"),
        ("What do the numbers of the top row add up to?", "7"),
    ]
    path = tmp_path_factory.mktemp("bench") / "scenes.jsonl"
    rows = [
        {"question": question, "answer": answer, "images": f"talk-{scene:03d}.png"}
        for scene in range(8)
        for question, answer in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(output: Path, questions: Path, **settings: Any) -> EvaluationConfig:
    benchmark = {"name": "scenes", "path": str(questions), "format": "samples", "image_root": str(IMAGES)}
    fixed = {"output": str(output), "benchmarks": [benchmark], "max_new_tokens": 200}
    return EvaluationConfig.model_validate({**fixed, **settings})


def replies(output: Path) -> dict[tuple[str, str], tuple[str, int, str]]:
    lines = [json.loads(line) for line in (output / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        (line["origin"], line["mode"]): (line["completion"], line["output_tokens"], line["outcome"]) for line in lines
    }


def test_a_served_checkpoint_gives_the_replies_token_counts_and_verdicts_of_the_checkpoint(
    endpoint: EndpointConfig, questions: Path, tmp_path: Path
) -> None:
    evaluate(config(tmp_path / "served", questions, model="world", url=endpoint.url))
    evaluate(config(tmp_path / "loaded", questions, model=str(TEACHER)))
    served, loaded = replies(tmp_path / "served"), replies(tmp_path / "loaded")
    assert served.keys() == loaded.keys()
    # Two implementations add up floating point numbers in different orders, so a rare near tie may fall differently.
    num_equal = sum(served[key] == loaded[key] for key in served)
    assert num_equal >= 0.97 * len(served)


def test_the_template_saved_with_the_checkpoint_offers_the_modes_to_any_client(
    endpoint: EndpointConfig, questions: Path, tmp_path: Path
) -> None:
    result = evaluate(config(tmp_path / "run", questions, model="world", url=endpoint.url))
    modes = result["benchmarks"]["scenes"]["modes"]
    assert modes["long"]["thinking_rate"]["share"] == 1
    assert modes["short"]["thinking_rate"]["share"] == 0
    assert 0 < modes["auto"]["thinking_rate"]["share"] < 1


async def test_a_mode_that_does_not_exist_is_refused_by_the_server(endpoint: EndpointConfig, tmp_path: Path) -> None:
    loud = endpoint.model_copy(update={"extra_body": {"chat_template_kwargs": {"thinking_mode": "loud"}}})
    store = ImageStore(tmp_path / "images", EvaluationConfig.model_fields["images"].default)
    with Journal(tmp_path / "j") as journal:
        async with Teacher(loud, journal, store.resized_bytes) as teacher:
            reply = await teacher.ask(TeacherRequest("s", "test", (Message("user", "Hello"),), Sampling(max_tokens=4)))
    assert isinstance(reply, CallFailure)
    assert "thinking_mode must be auto, long or short, not loud" in reply.detail


def test_another_model_name_is_a_clear_error(endpoint: EndpointConfig, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherMisconfigured, match="it serves 'world'"):
        evaluate(config(tmp_path / "run", questions, model="other", url=endpoint.url))


def test_more_tokens_than_the_servers_context_is_an_error_that_names_both(
    endpoint: EndpointConfig, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises((TeacherMisconfigured, TrainingError), match="8192 cannot be greater than max_model_len=2048"):
        evaluate(config(tmp_path / "run", questions, model="world", url=endpoint.url, max_new_tokens=8192))
