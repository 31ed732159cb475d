"""A headless Chromium for tests, spoken to in its DevTools protocol: what a page shows, does and fetches."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import ClientConnection, connect

_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
_LISTENING = re.compile(r"DevTools listening on ws://([\d.:]+)/")


class Page:
    """An open page. events: what the browser reported so far, as (method, params)."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._num_sent = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result. Raises AssertionError: the browser refused it."""
        self._num_sent += 1
        self._connection.send(json.dumps({"id": self._num_sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._num_sent:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self.events.append((message["method"], message["params"]))

    def open(
        self, path: Path, *, width: int = 1200, height: int = 900, is_dark: bool = False, fragment: str = ""
    ) -> None:
        """Shows a file in a window of this size and waits until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if is_dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + fragment)
        for _ in range(600):
            if self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{path} was not loaded")

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key, as a person does."""
        text = {"text": key} if len(key) == 1 else {}
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        if key == "Enter":
            text = {"text": "\r"}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def type(self, text: str) -> None:
        """Types a text into what has the focus."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses that were fetched or tried, other than data inside the page."""
        urls = [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "about:"))]

    @property
    def complaints(self) -> list[str]:
        """What the browser logged as errors or warnings, exceptions of scripts included."""
        logged = [params["entry"]["text"] for method, params in self.events if method == "Log.entryAdded"]
        thrown = [
            str(params["exceptionDetails"]) for method, params in self.events if method == "Runtime.exceptionThrown"
        ]
        return [*logged, *thrown]


class Chromium:
    """A browser process. Used as a context manager."""

    def __init__(self, program: str, profile: Path) -> None:
        profile.mkdir(parents=True, exist_ok=True)
        self._log = (profile / "chromium.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=self._log
        )

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()

    @contextmanager
    def page(self) -> Iterator[Page]:
        """Opens a new page and closes it at the end."""
        with urlopen(Request(f"http://{self._address()}/json/new?about:blank", method="PUT"), timeout=60) as reply:
            target = json.load(reply)
        with connect(target["webSocketDebuggerUrl"], max_size=None, open_timeout=60) as connection:
            yield Page(connection)
            connection.send(json.dumps({"id": 0, "method": "Page.close"}))

    def _address(self) -> str:
        for _ in range(1200):
            self._log.seek(0)
            if found := _LISTENING.search(self._log.read()):
                return found[1]
            assert self._process.poll() is None, "Chromium ended"
            time.sleep(0.05)
        raise AssertionError("Chromium does not listen")
