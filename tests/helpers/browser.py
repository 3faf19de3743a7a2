# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that tests drive through the DevTools protocol, on a pipe. Imports nothing but Python's own."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HOW_TO_GET = (
    "no Chromium: the status page is NOT tested in a browser. Install one (Debian: apt-get install "
    "chromium-headless-shell) or name it in TOKENPOOL_TEST_BROWSER"
)
LIMIT_S = 60.0
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio",
          "--disable-dev-shm-usage", "--disable-background-networking", "--force-color-profile=srgb",
          "--remote-debugging-pipe")  # fmt: skip


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return os.environ.get("TOKENPOOL_TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not among the descriptors that a shell gives a meaning."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Browser:
    """One Chromium process; `with Browser(path) as browser: page = browser.page()`."""

    def __init__(self, path: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tokenpool-browser-", ignore_cleanup_errors=True)
        (to_browser, self._write), (self._read, from_browser) = _pipe(), _pipe()
        command = shlex.join([path, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"])
        # The pipe must be descriptors 3 and 4 there.
        words = ["bash", "-c", f"exec {command} 3<&{to_browser} 4>&{from_browser}"]
        self._process = subprocess.Popen(words, pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._next_id = 0
        self.events: list[dict[str, Any]] = []
        """What the browser said on its own, of all pages."""

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    def page(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A fresh page with storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its result; raises AssertionError with the browser's reason."""
        self._next_id += 1
        message: dict[str, Any] = {"id": self._next_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._next_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._read, 1 << 16) if ready else b""
            assert piece, "the browser does not answer"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command to this tab."""
        return self._browser.call(method, self._session, **params)

    def size(self, width: int, height: int) -> None:
        """Set the size of the view in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The JSON value of an expression, awaited; raises AssertionError with what the page throws."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        details = answer.get("exceptionDetails")
        assert details is None, (details.get("exception") or {}).get("description") or details["text"]
        return answer["result"].get("value")

    def wait(self, condition: str, limit_s: float = LIMIT_S) -> Any:
        """Wait until an expression is truthy and return it."""
        deadline = time.monotonic() + limit_s
        while not (value := self.run(condition)):
            shown = self.run("document.body.innerText")
            assert time.monotonic() < deadline, f"not reached: {condition}; the page says {shown[:2000]}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """The visible text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press one key, such as `Tab` or `Enter`."""
        texts = {"Enter": {"text": "\r", "windowsVirtualKeyCode": 13}, "Tab": {"windowsVirtualKeyCode": 9}}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **texts.get(key, {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def complaints(self) -> list[str]:
        """Exceptions, console errors and refusals of the content security policy so far."""
        self.run("0")
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Addresses that the page has asked for."""
        self.run("0")
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of what is in view."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
