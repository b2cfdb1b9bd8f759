"""Chromium without a window, driven through its DevTools protocol over two pipes."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a browser."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests, self._replies = os.fdopen(requests, "wb", 0), os.fdopen(replies, "rb", 0)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        options = {"targetId": target, "flatten": True}
        self._session = self.call("Target.attachToTarget", **options)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._requests.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = self._replies.read(65536)
            assert block, "the browser ended"
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str, limit_s: float = 30.0) -> None:
        """Wait until a JavaScript expression is true."""
        end_s = time.monotonic() + limit_s
        while not self.run(script):
            assert time.monotonic() < end_s, f"never true: {script}"
            time.sleep(0.05)

    def show(self, url: str, width: int, height: int) -> None:
        """Open a page in a window of this size."""
        options = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile lies in an empty folder."""
    assert CHROMIUM
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    moved = {number: fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs_in, theirs_out)}
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--mute-audio"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking"]

    # The browser reads from descriptor 3 and writes to 4.
    script = f'exec "$@" 3<&{moved[theirs_in]} 4>&{moved[theirs_out]}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=moved.values(),
        stderr=subprocess.DEVNULL,
    )
    for number in (*moved, *moved.values()):
        os.close(number)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.terminate()
        process.wait()
