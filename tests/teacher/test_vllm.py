"""The client and the serving code against a real vLLM with a tiny random Qwen2.5-VL.

What the model says is noise; that the server takes images, constraints, logprobs and template arguments is not.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from schemas.config import EndpointConfig, ServeConfig
from schemas.errors import TeacherMisconfigured
from schemas.requests import CallFailure, Message, Reply, Sampling, TeacherRequest
from teacher import serving
from teacher.client import Teacher
from teacher.journal import Journal
from teacher.parallelism import Parallelism
from teacher.serving import ServerHandle, start_server
from teacher.vllm_command import find_build, server_command

ROOT = Path(__file__).parents[2]
GPU_PYTHON = Path(os.environ.get("BIMODE_GPU_PYTHON") or ROOT / ".venv-gpu" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu_side,
    pytest.mark.skipif(
        not GPU_PYTHON.exists(),
        reason=f"NO REAL vLLM WAS TESTED: {GPU_PYTHON} is missing; set BIMODE_GPU_PYTHON to a Python that has vLLM",
    ),
]


class Served:
    """The running server, its endpoint and the folder of images it may read."""

    def __init__(self, handle: ServerHandle, endpoint: EndpointConfig, images: Path, environ_marker: bytes) -> None:
        self.handle, self.endpoint, self.images, self.environ_marker = handle, endpoint, images, environ_marker

    def processes(self) -> list[str]:
        """Names of the living processes that were started with the server's environment."""
        names: list[str] = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.environ_marker in (entry / "environ").read_bytes().split(b"\0"):
                    names.append((entry / "comm").read_text().strip())
            except OSError:
                continue
        return names


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    builder = Path(__file__).with_name("build_tiny_teacher.py")
    done = subprocess.run([GPU_PYTHON, builder, folder / "model", ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    images = folder / "images"
    images.mkdir()
    endpoint = EndpointConfig(model="tiny", url=f"http://127.0.0.1:{port}/v1", timeout_seconds=300, max_retries=0)
    serve = ServeConfig(
        model_path=str(folder / "model"),
        python=str(GPU_PYTHON),
        port=port,
        start_timeout_seconds=3600,  # seconds on an idle machine, but tests share theirs
    )
    marker = f"BIMODE_TEST_VLLM={folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*marker.split("=", 1))
        handle = start_server(
            endpoint, serve, log_path=folder / "vllm.log", pid_path=folder / "vllm.pid", media_folder=images
        )
    server = Served(handle, endpoint, images, marker.encode())
    yield server
    # The last test stops it; after a failure this does.
    handle.stop()


def png(sha256: str, max_pixels: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    Image.new("RGB", (84, 56), (255, 0, 0) if sha256 == "red" else (0, 0, 255)).save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


class Asking:
    """Asks one request after another, each through a journal of its own folder."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder

    async def __call__(
        self,
        *,
        images: tuple[str, ...] = (),
        endpoint: dict[str, Any] | None = None,
        image_path: Callable[[str, int], Path] | None = None,
        **changes: Any,
    ) -> Reply | CallFailure:
        fields: dict[str, Any] = {
            "sample_id": "s",
            "purpose": "test",
            "messages": (Message("user", "Is it red?", images=images),),
            "sampling": Sampling(max_tokens=4),
        }
        settings = self.served.endpoint.model_copy(update=endpoint or {})
        with Journal(self.folder / "replies.journal") as journal:
            async with Teacher(settings, journal, png, image_path) as teacher:
                return await teacher.ask(TeacherRequest(**{**fields, **changes}))


@pytest.fixture
def ask(served: Served, tmp_path: Path) -> Asking:
    return Asking(served, tmp_path)


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(arguments)
names = ["tensor_parallel_size", "data_parallel_size", "performance_mode", "max_model_len", "limit_mm_per_prompt",
         "mm_encoder_tp_mode", "allowed_local_media_path", "enable_log_requests", "gpu_memory_utilization"]
print(json.dumps({name: getattr(arguments, name) for name in names}))
"""


def test_the_real_parser_takes_the_command_line_of_the_gpu_build(tmp_path: Path) -> None:
    found = find_build(str(GPU_PYTHON))
    command = server_command(
        EndpointConfig(),
        ServeConfig(max_num_seqs=512),
        python="python",
        build=replace(found, distribution="vllm"),
        parallelism=Parallelism(2, 4),
        media_folder=tmp_path,
    )
    start = command.index("serve") + 1
    # None was left out as unknown: the version here knows them all.
    assert len({word for word in command[start:] if word.startswith("--")}) == 20
    done = subprocess.run(
        [GPU_PYTHON, "-c", PARSE, *command[start:]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": serving.cpu_python_path(None)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "tensor_parallel_size": 2,
        "data_parallel_size": 4,
        "performance_mode": "throughput",
        "max_model_len": -1,
        "limit_mm_per_prompt": {"video": 0, "audio": 0},
        "mm_encoder_tp_mode": "data",
        "allowed_local_media_path": str(tmp_path),
        "enable_log_requests": False,
        "gpu_memory_utilization": 0.92,
    }


async def test_the_served_model_passes_the_check_and_another_does_not(served: Served, tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        async with Teacher(served.endpoint, journal, png) as teacher:
            await teacher.check()
        wrong = served.endpoint.model_copy(update={"model": "Qwen/Wrong"})
        async with Teacher(wrong, journal, png) as teacher:
            with pytest.raises(TeacherMisconfigured, match="it serves 'tiny'"):
                await teacher.check()


async def test_an_image_costs_its_tokens(ask: Asking) -> None:
    without, with_two = await ask(), await ask(images=("red", "blue"))
    assert isinstance(without, Reply) and isinstance(with_two, Reply)
    # 84x56 pixels are 3x2 merged patches of 28 pixels, between two marks.
    assert with_two.prompt_tokens - without.prompt_tokens == 2 * (3 * 2 + 2)
    assert (with_two.completion_tokens, with_two.is_truncated) == (4, True)


async def test_the_same_image_by_data_url_and_by_file_gives_the_same_reply(served: Served, ask: Asking) -> None:
    (served.images / "a b.png").write_bytes(png("red", 0)[0])
    by_data = await ask(images=("red",), sampling=Sampling(max_tokens=8))
    by_file = await ask(
        images=("a b",),
        sampling=Sampling(max_tokens=8),
        endpoint={"images_as": "file_url"},
        image_path=lambda sha256, max_pixels: served.images / f"{sha256}.png",
    )
    assert isinstance(by_data, Reply) and isinstance(by_file, Reply)
    assert by_data.text == by_file.text


async def test_choices_constrain_the_reply_and_bring_masked_logprobs(ask: Asking) -> None:
    reply = await ask(images=("red",), choices=("yes", "no"))
    assert isinstance(reply, Reply) and reply.text in {"yes", "no"} and reply.finish_reason == "stop"
    # All that is allowed begins a choice, and together it is certain: the constraint was applied before.
    assert all("yes".startswith(token) or "no".startswith(token) for token, _ in reply.top_logprobs)
    assert math.isclose(sum(math.exp(logprob) for _, logprob in reply.top_logprobs), 1.0, abs_tol=1e-3)


async def test_choices_may_hold_any_text(ask: Asking) -> None:
    choices = ('say "🙂"', "да\n", "a\\b|c")
    reply = await ask(choices=choices, sampling=Sampling(max_tokens=64))
    assert isinstance(reply, Reply) and reply.text in choices


@pytest.mark.parametrize(("mode", "tokens"), [("auto", 0), ("long", 1), ("short", 2)])
async def test_the_thinking_mode_is_chosen_by_a_template_argument(ask: Asking, mode: str, tokens: int) -> None:
    plain = await ask()
    reply = await ask(endpoint={"extra_body": {"chat_template_kwargs": {"thinking_mode": mode}}})
    assert isinstance(plain, Reply) and isinstance(reply, Reply)
    # After <think> comes nothing, one newline token, or a token of two newlines and </think>.
    assert reply.prompt_tokens - plain.prompt_tokens == tokens


async def test_a_thinking_mode_that_does_not_exist_is_refused_with_the_template_s_words(ask: Asking) -> None:
    failure = await ask(endpoint={"extra_body": {"chat_template_kwargs": {"thinking_mode": "deep"}}})
    assert isinstance(failure, CallFailure) and failure.reason == "teacher_rejected"
    assert "thinking_mode must be auto, long or short, not deep" in failure.detail


async def test_a_prompt_longer_than_the_context_fails_its_row_with_the_reason(ask: Asking) -> None:
    failure = await ask(messages=(Message("user", "word " * 5000),))
    assert isinstance(failure, CallFailure) and failure.reason == "teacher_rejected"
    assert "maximum context length" in failure.detail


async def test_the_seed_decides_what_is_drawn(ask: Asking) -> None:
    warm = Sampling(temperature=1.0, max_tokens=16)
    first, other, again = [await ask(sampling=warm, seed=seed, index=i) for i, seed in enumerate((5, 6, 5))]
    assert isinstance(first, Reply) and isinstance(other, Reply) and isinstance(again, Reply)
    assert first.text == again.text != other.text


def test_the_samples_of_one_call_are_those_of_single_calls_with_the_seeds_that_follow(served: Served) -> None:
    together = texts(served, n=4, seed=40)
    assert together == [text for seed in (40, 41, 42, 43) for text in texts(served, n=1, seed=seed)]
    assert len(set(together)) == 4


def texts(served: Served, *, n: int, seed: int) -> list[str]:
    """What the server answers, past the client: the choices of one call by their index."""
    content = [
        {"type": "text", "text": "What is in the image?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64encode(png("red", 0)[0]).decode()}},
    ]
    body = {
        "model": served.endpoint.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 1.0,
        "max_tokens": 32,
        "n": n,
        "seed": seed,
    }
    url = f"{served.endpoint.url}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        choices = json.load(answer)["choices"]
    return [choice["message"]["content"] for choice in sorted(choices, key=lambda choice: choice["index"])]


async def test_a_shared_prompt_is_read_from_the_cache(ask: Asking) -> None:
    message = Message("user", "What is in the image? " * 40)
    await ask(messages=(message,), index=0)
    second = await ask(messages=(message,), index=1)
    assert isinstance(second, Reply) and second.cached_tokens > 0


def test_the_server_listens_on_the_loopback_alone(served: Served) -> None:
    port = int(served.endpoint.url.rsplit(":", 1)[1].removesuffix("/v1"))
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {words[1] for words in sockets if words[3] == "0A" and words[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


def test_stopping_leaves_no_process_and_keeps_the_log(served: Served) -> None:
    assert len(served.processes()) >= 4  # the launcher's two, API server, engine
    served.handle.stop()
    assert served.processes() == []
    assert not serving.is_answering(served.endpoint) and not served.handle.pid_path.exists()
    log = served.handle.log_path.read_text()
    assert "EngineCore" in log and "the server was stopped: exit status 0" in log.splitlines()[-1]
