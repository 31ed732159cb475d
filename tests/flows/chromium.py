"""A headless Chromium for tests: opens pages, waits for texts, notes every address asked, takes pictures."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from websockets.sync.client import connect

_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One page, driven by the DevTools protocol. `asked` holds the addresses that pages have asked for."""

    def __init__(self, profile: Path, *, width: int = 1300, height: int = 1000) -> None:
        path = chromium_path()
        assert path is not None
        command = [path, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        address = next(found for line in self._process.stderr if (found := re.search(r"ws://\S+", line)))
        self._socket = connect(address[0], max_size=None, proxy=None)
        self._number, self._session = 0, ""
        self.asked: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime"):
            self._call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            reply = json.loads(self._socket.recv(timeout=120))
            if reply.get("method") == "Network.requestWillBeSent":
                self.asked.append(reply["params"]["request"]["url"])
            if reply.get("id") == self._number:
                assert "error" not in reply, reply["error"]
                return dict(reply["result"])

    def open(self, url: str, *, until: str) -> str:
        """Opens a page; returns its text once it shows `until`."""
        self._call("Page.navigate", url=url)
        return self.text(until=until)

    def text(self, *, until: str) -> str:
        """Returns the text of the page once it shows `until`."""
        deadline = time.monotonic() + 120
        while until not in (text := str(self.run("document.body ? document.body.innerText : ''"))):
            assert time.monotonic() < deadline, f"the page does not show {until!r} but:\n{text}"
            time.sleep(0.3)
        return text

    def run(self, script: str) -> Any:
        """Returns what a script gives in the page."""
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
        return path

    def asked_hosts(self) -> set[str]:
        """Returns "host:port" of all addresses asked over the network."""
        return {urlsplit(url).netloc for url in self.asked if url.startswith(("http", "ws"))}
