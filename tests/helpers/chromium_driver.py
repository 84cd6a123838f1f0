"""Driver of headless Chromium over its debugging protocol: navigate, press keys, read, take screenshots."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Code of the protocol's errors about a page that is being replaced, such as "Inspected target navigated".
LOST_PAGE = -32000
KEYS = {"Tab": 9, "Enter": 13}


class NavigationError(Exception):
    """The page of a call was replaced by another one before the call was answered."""


class Browser:
    """One tab with a temporary profile. It reaches the loopback address only."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None
        command = [
            BINARY, "--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"--user-data-dir={folder}",
        ]  # fmt: skip
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < end and self._process.poll() is None, "Chromium does not start"
            time.sleep(0.05)
        number, path = port.read_text().splitlines()[:2]
        self._stack = ExitStack()
        url = f"ws://127.0.0.1:{number}{path}"
        self._socket = self._stack.enter_context(connect(url, max_size=2**26, proxy=None))
        self._id, self._session = 0, None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(20)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._id:
                if answer.get("error", {}).get("code") == LOST_PAGE:
                    raise NavigationError(answer)
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression on the page."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, also while other pages load."""
        end = time.monotonic() + seconds
        while True:
            value = None
            with suppress(NavigationError):
                value = self.evaluate(expression)
            if value:
                return value
            assert time.monotonic() < end, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.05)

    def until_loaded(self, expression: str) -> None:
        """Wait until an expression is true on a page that is complete and accepts keys."""
        self.until(f"({expression}) && document.readyState == 'complete'")
        self.settle()

    def go(self, url: str) -> None:
        """Open an address; wait until its page has replaced the previous one and accepts keys."""
        self.evaluate("window.before = true")
        self.send("Page.navigate", url=url)
        self.until("!window.before && document.readyState == 'complete'")
        self.settle()

    def settle(self) -> None:
        """Wait until the field with `autofocus` has the focus.

        The browser sets the focus when it first draws the page, after the page is complete. Keys that are
        pressed before are lost.
        """
        self.until("(f => !f || f === document.activeElement)(document.querySelector('[autofocus]'))")

    def key(self, name: str) -> None:
        """Press one of `KEYS`."""
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=KEYS[name],
                **text,
            )

    def type(self, text: str) -> None:
        """Insert text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, file: Path, width: int) -> None:
        """Write a PNG of the whole page, in a window of that width."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(data))

    def console_errors(self) -> list[str]:
        """Return the errors that the browser logged, violations of the content security policy included."""
        self.evaluate("1")
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return [e["text"] for e in entries if e["level"] == "error"]
