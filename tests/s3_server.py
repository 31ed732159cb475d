"""A real S3-speaking server on the loopback interface, for tests of object storage.

It is moto's server, a process of its own that speaks S3's protocol over HTTP; our side is s3fs as it is. Tests that
need it take the fixture `bucket`: the address of a fresh bucket, with an environment in which s3fs finds this server
alone. A test module asks for the fixtures so:

    pytest_plugins = ("tests.s3_server",)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import fsspec
import pytest

from tests.waiting import free_port

_START_SECONDS = 120.0
_numbers = count()


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the S3 server ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"the S3 server did not answer within {_START_SECONDS:g} s:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts the server once for all tests and yields its address, http://127.0.0.1:PORT."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_up(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Makes an empty bucket and yields its address, s3://NAME. Credentials and server stand in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
    }.items():
        monkeypatch.setenv(name, value)
    # s3fs keeps its file systems by their arguments, and so would keep those of an environment that is gone.
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    type(filesystem).clear_instance_cache()
    name = f"tests-{os.getpid()}-{next(_numbers)}"
    filesystem.mkdir(name)
    yield f"s3://{name}"
    type(filesystem).clear_instance_cache()
