"""The audit of dependencies: pip-audit itself, against a loopback server that speaks OSV's protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from deploy.audit import Accepted, concerning
from tests.deploy.places import ROOT

ADVISORY = {
    "id": "PYSEC-2099-1",
    "affected": [
        {
            "package": {"name": "beta", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.0"}]}],
            "versions": ["2.0"],
        }
    ],
    "summary": "what is wrong",
    "modified": "2099-01-01T00:00:00Z",
    "published": "2099-01-01T00:00:00Z",
}


class Osv(BaseHTTPRequestHandler):
    """Knows one advisory, about beta 2.0."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_known = asked["package"]["name"] == "beta" and asked["version"] == "2.0"
        content = json.dumps({"vulns": [ADVISORY]} if is_known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def osv() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    server.shutdown()
    server.server_close()


def audit(lock: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "audit.py"), str(lock), "--osv-url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def lock(folder: Path, *pins: str) -> Path:
    path = folder / "some.txt"
    path.write_text("# a lock\n\n" + "\n".join(pins) + "\n")
    return path


def test_packages_without_an_advisory_pass(tmp_path: Path, osv: str) -> None:
    done = audit(lock(tmp_path, "alpha==1.0", "beta==3.0"), osv)
    assert (done.returncode, done.stdout) == (0, "[audit] some.txt: 2 packages, 0 advisories\n")


def test_an_advisory_fails_and_is_named_with_its_package(tmp_path: Path, osv: str) -> None:
    done = audit(lock(tmp_path, "alpha==1.0", "beta==2.0"), osv)
    assert done.returncode == 1 and "beta 2.0: PYSEC-2099-1" in done.stdout


def test_a_database_that_cannot_be_asked_fails_loudly(tmp_path: Path) -> None:
    done = audit(lock(tmp_path, "alpha==1.0"), "http://127.0.0.1:9/v1/query")
    assert done.returncode == 2 and "NOT AUDITED" in done.stdout and "0 advisories" not in done.stdout


def test_an_advisory_is_accepted_with_a_reason_until_a_day() -> None:
    found = {"beta 2.0": ["PYSEC-2099-1"]}
    accepted = {"PYSEC-2099-1": Accepted("we never call it", date(2099, 6, 1))}
    assert concerning(found, accepted, date(2099, 6, 1)) == []
    assert concerning(found, accepted, date(2099, 6, 2)) == [
        "beta 2.0: PYSEC-2099-1 was accepted until 2099-06-01: we never call it"
    ]
    assert concerning(found, {}, date(2099, 1, 1)) != []
