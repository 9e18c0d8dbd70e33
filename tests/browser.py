"""A headless Chromium for tests, driven over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

    def test_it(browser: Browser) -> None:
        with browser.open("http://127.0.0.1:8080/") as tab:
            tab.wait_text("state", "OK")

Nothing here sleeps or polls: what waits is woken by a change of the document, or by an event of the browser.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "Tab", "browser"]

HANG = 30.0  # seconds after which something has hung; nothing is paced by it
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}  # key code, and what it types


class Browser:
    """A headless Chromium with an empty profile. For one thread."""

    def __init__(self, program: str, profile: Path) -> None:
        # The protocol is spoken over descriptors 3 and 4: here they are what else would be standard input and output.
        script = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", program, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._numbers, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def open(self, url: str) -> Iterator[Tab]:
        """A tab with storage of its own, on this page, until the block ends."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        try:
            yield Tab(self, context, url)
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of one command; the events that come before it go to `events`."""
        message: dict[str, Any] = {"id": next(self._numbers), "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        deadline = time.monotonic() + HANG
        while (reply := self.receive(deadline)).get("id") != message["id"]:
            pass
        assert "error" not in reply, f"{method}: {reply['error']}"
        return dict(reply["result"])

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message of the browser; an event also goes to `events`."""
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the browser hangs, or what a test waits for never comes"
            data = os.read(self._from.fileno(), 65536)
            assert data, "the browser is gone"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "id" not in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        """Ends it."""
        try:
            self.call("Browser.close")
            self._process.wait(HANG)
        finally:
            self._process.kill()
            self._process.wait(HANG)
            self._to.close()
            self._from.close()


class Tab:
    """One tab on a page. Elements are named by their IDs."""

    def __init__(self, browser: Browser, context: str, url: str) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # keys go to it whichever tab is in front
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + HANG
        while not self._events("Page.loadEventFired"):
            browser.receive(deadline)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it resolves to."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def run(self, function: str, *arguments: Any) -> Any:
        """What a JavaScript function returns for these arguments."""
        return self.evaluate(f"({function})({', '.join(map(json.dumps, arguments))})")

    # What it shows

    def text(self, element: str) -> str:
        """What an element shows."""
        return str(self.run("(id) => document.getElementById(id).innerText", element))

    def texts(self, selector: str) -> list[str]:
        """What each element shows that a CSS selector finds."""
        return list(self.run("(css) => [...document.querySelectorAll(css)].map((each) => each.textContent)", selector))

    def shows(self, element: str) -> bool:
        """Whether an element can be seen."""
        return bool(self.run("(id) => document.getElementById(id).checkVisibility()", element))

    def wait(self, condition: str) -> None:
        """Blocks until the JavaScript condition holds; it is looked at whenever the document has changed."""
        self.evaluate(f"""new Promise((resolve) => {{
            const look = () => {{ if ({condition}) {{ observer.disconnect(); resolve(); }} }};
            const observer = new MutationObserver(look);
            observer.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
            look();
        }})""")

    def wait_text(self, element: str, text: str) -> None:
        """Blocks until an element's text has this in it."""
        self.wait(f"document.getElementById({json.dumps(element)}).textContent.includes({json.dumps(text)})")

    def wait_exact(self, element: str, text: str) -> None:
        """Blocks until this is an element's text."""
        self.wait(f"document.getElementById({json.dumps(element)}).textContent === {json.dumps(text)}")

    def wait_shown(self, element: str, shown: bool = True) -> None:
        """Blocks until an element can be seen, or cannot."""
        self.wait(f"document.getElementById({json.dumps(element)}).checkVisibility() === {json.dumps(shown)}")

    # What a person does

    def focus(self, element: str) -> None:
        """Puts the cursor into a field."""
        self.run("(id) => document.getElementById(id).focus()", element)

    def type(self, text: str) -> None:
        """Types into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses a key of `KEYS`."""
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def resize(self, width: int, height: int) -> None:
        """Makes the window so large, in pixels; below 500 it is a phone's."""
        mobile = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def complaints(self) -> list[Any]:
        """The errors and warnings of its console: exceptions, what the policy stopped, requests that failed."""
        logged = [each["params"]["entry"] for each in self._events("Log.entryAdded")]
        printed = [each["params"] for each in self._events("Runtime.consoleAPICalled")]
        return [
            *(each["params"] for each in self._events("Runtime.exceptionThrown")),
            *(entry["text"] for entry in logged if entry["level"] in ("warning", "error")),
            *(each for each in printed if each["type"] in ("warning", "error", "assert")),
        ]

    def _events(self, method: str) -> list[dict[str, Any]]:
        ours = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event for event in ours if event["method"] == method]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests of a module, since a start takes a second. Skips where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium here")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
