"""A headless Chromium for tests of pages, driven by the DevTools protocol over a pipe: no further package is needed."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--hide-scrollbars", "--remote-debugging-pipe")
_PATIENCE = 60.0
"""Seconds to wait for an answer on a busy machine."""


def find_chromium() -> str | None:
    """A Chromium: the one that COOPQ_CHROMIUM names, or one on the path."""
    return os.environ.get("COOPQ_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A tab.

    Attributes:
        messages: Warnings and errors of the console, and errors that nobody caught.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._n, self._session = commands, answers, b"", 0, ""
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command of the protocol."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._n:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, path: Path, width: int, *, dark: bool = False) -> float:
        """Open a page and wait until its figures are drawn; the milliseconds that took by the page's clock."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + _PATIENCE
        while not (done := self.evaluate("window.chartsReady")):
            assert time.monotonic() < end, ("the figures were not drawn", self.messages)
            time.sleep(0.05)
        return float(done)

    def hover(self, selector: str) -> str:
        """Point at an element; the text of the tip that appears."""
        self.evaluate(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"JSON.stringify(document.querySelector('{selector}').getBoundingClientRect())")
        at = json.loads(box)
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        for step in (-1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)
        end = time.monotonic() + _PATIENCE
        while True:
            told = str(self.evaluate("document.querySelector('#vg-tooltip-element')?.innerText ?? ''"))
            if told.strip() or time.monotonic() > end:
                return told
            time.sleep(0.05)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._answers, 2**20)
            assert chunk, "the browser ended"
            self._buffer += chunk
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        params = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error"):
            self.messages.append(str([value.get("value") for value in params["args"]]))
        elif message.get("method") == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent" and params["request"]["url"].startswith("http"):
            self.messages.append(f"loads {params['request']['url']}")
        return message


@contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """A tab of a new browser, which ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    # Chromium reads file 3 and writes file 4; the pipes' own numbers must not be among these.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]

    def connect() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [chromium, *_FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=connect,
            pass_fds=(3, 4, *theirs),
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser[0], from_browser[1], *theirs):
            os.close(end)
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
