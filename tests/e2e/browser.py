"""A real Chromium, headless, over its DevTools protocol: open a page, act as a user does, look, collect complaints.

The protocol is JSON over one websocket per page; no driver program is needed. Keys and clicks are the browser's own
input events, not calls of the page's functions.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from tests.e2e.process import wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS = 60.0
ANSWER_SECONDS = 30.0
_CODES = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_CODES |= {"ArrowDown": 40, "Tab": 9}
_TEXTS = {"Enter": "\r"}


def find_chromium() -> str | None:
    """Path of an installed Chromium; None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: Connection, downloads: Path) -> None:
        self.downloads = downloads
        self._socket = socket
        self._next_id = 0
        self._events: list[Any] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of one command of the protocol."""
        self._next_id += 1
        self._socket.send(json.dumps({"id": self._next_id, "method": method, "params": params}))
        while (told := json.loads(self._socket.recv(ANSWER_SECONDS))).get("id") != self._next_id:
            self._events.append(told)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; it must be JSON."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, f"{expression}: {told['exceptionDetails']}"
        return told["result"].get("value")

    def wait_until(self, expression: str, seconds: float = ANSWER_SECONDS) -> Any:
        """The first true value of a JavaScript expression."""
        return wait_for(lambda: self.evaluate(expression), f"{expression}; the page has {self.problems}", seconds)

    def open(self, url: str) -> None:
        """Load an address and wait for its scripts."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + ANSWER_SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(json.loads(self._socket.recv(deadline - time.monotonic())))

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Make the window this large, in CSS pixels; at most 600 wide it is a phone's."""
        is_phone = width <= 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def prefer(self, **features: str) -> None:
        """Set media features: `prefers_color_scheme="dark"`."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def type(self, text: str) -> None:
        """Put a text in where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            common = {"key": key, "code": key, "windowsVirtualKeyCode": _CODES[key]}
            text = {"text": _TEXTS[key]} if key in _TEXTS else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def centre(self, element: str) -> tuple[float, float]:
        """Where an element's first line is, given a JavaScript expression for it."""
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getClientRects()[0];"
            f" return [b.left + b.width / 2, b.top + b.height / 2] }})({element})"
        )
        return box[0], box[1]

    def point_at(self, element: str) -> None:
        """Move the mouse over an element."""
        x, y = self.centre(element)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, element: str) -> None:
        """Click an element with the mouse."""
        x, y = self.centre(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, element: str) -> None:
        """Tap an element with a finger."""
        x, y = self.centre(element)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def problems(self) -> list[str]:
        """What the console has shown as an error, and exceptions nobody caught, since the page was opened."""
        self.call("Runtime.getHeapUsage")  # reads the events that are there
        found = []
        for event in self._events:
            params = event.get("params", {})
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
        return found

    @property
    def requests(self) -> list[Any]:
        """Everything the page has asked for since it was opened, as the protocol describes a request, with its id."""
        self.call("Runtime.getHeapUsage")
        asked = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [{**params["request"], "id": params["requestId"]} for params in asked]

    def forget(self) -> None:
        """Forget problems and requests up to now."""
        self._events.clear()


class Chromium:
    """The browser's process, with a profile of its own."""

    def __init__(self, path: str, profile: Path) -> None:
        self._port_file = profile / "DevToolsActivePort"
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-component-update", "--lang=en-GB"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium refuses to make one for root
        with (profile / "log").open("w") as log:
            self._process = subprocess.Popen([path, *options, "about:blank"], stdout=log, stderr=subprocess.STDOUT)

    @contextmanager
    def page(self) -> Iterator[Page]:
        """The first tab; what it downloads is kept."""
        wait_for(lambda: self._port_file.exists() and self._port_file.read_text(), "Chromium listens", START_SECONDS)
        port, browser_path = self._port_file.read_text().split()
        downloads = self._port_file.parent / "downloads"
        with connect(f"ws://127.0.0.1:{port}{browser_path}", open_timeout=START_SECONDS) as browser:
            # As long as this connection lasts.
            allowed = {"behavior": "allow", "downloadPath": str(downloads)}
            browser.send(json.dumps({"id": 1, "method": "Browser.setDownloadBehavior", "params": allowed}))
            browser.recv(ANSWER_SECONDS)
            targets = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS).json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            with connect(address, max_size=None, open_timeout=START_SECONDS) as socket:
                yield Page(socket, downloads)

    def end(self) -> None:
        """End it and its helpers."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
