"""The operators' page: how it is served, and what a real Chromium makes of it, driven over the DevTools protocol."""
from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsmsing import FastSmsingError, InMemoryClient, RejectedError
from helpers import HANG, request, serving
from providers import Recorder, Scripted
from restapi import SmsServer
from smsproxy import SendMessage, SmsProxy, SmsProxyConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PAGE = Path(__file__).parent.parent.joinpath("page.html").read_text("utf-8")
AT_ONCE = SmsProxyConfig(max_delay=0.0)
KEYS = {"operator": "the-right-key"}


# How it is served


@pytest.mark.parametrize("keys", [{}, KEYS], ids=["without keys", "with keys"])
def test_the_page_is_open_to_everybody_and_is_not_cached(keys: dict[str, str]) -> None:
    with serving(SmsProxy(Recorder()), api_keys=keys) as server:
        status, body, headers = request(server, "GET", "/")
    assert (status, body.decode()) == (200, PAGE)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_a_head_request_gets_the_headers_of_the_page_without_the_page() -> None:
    with serving(SmsProxy(Recorder())) as server:
        of_get = dict(request(server, "GET", "/")[2])
        status, body, headers = request(server, "HEAD", "/")
    assert (status, body) == (200, b"")
    assert {**headers, "Date": ""} == {**of_get, "Date": ""}


def test_the_policy_lets_only_the_script_and_the_style_of_the_page_run() -> None:
    with serving(SmsProxy(Recorder())) as server:
        policy = request(server, "GET", "/")[2]["Content-Security-Policy"]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall("<(script|style)>(.*?)</", PAGE, re.DOTALL)
    }
    assert dict(part.strip().partition(" ")[::2] for part in policy.split(";")) == {
        "default-src": "'none'", "script-src": f"'sha256-{hashes['script']}'", "style-src": f"'sha256-{hashes['style']}'",
        "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip


def test_the_page_is_one_file_of_at_most_300_lines_that_loads_nothing_else() -> None:
    assert len(PAGE.splitlines()) <= 300
    addresses = re.findall("https?://[^/]*", PAGE)
    assert set(addresses) == {"http://www.w3.org"}  # in names of XML, which are never fetched


# What a browser makes of it


class Browser:
    """A headless Chromium with an empty profile. For one thread."""

    def __init__(self, profile: Path) -> None:
        # The protocol is spoken over descriptors 3 and 4: here they are what else would be standard input and output.
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._numbers, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

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
    """One tab with storage of its own, on the page of a server."""

    def __init__(self, browser: Browser, server: SmsServer) -> None:
        self._browser, self.server = browser, server
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # keys go to it whichever tab is in front
        self.call("Page.navigate", url="http://{}:{}/".format(*server.server_address[:2]))
        deadline = time.monotonic() + HANG
        while not self._events("Page.loadEventFired"):
            browser.receive(deadline)

    def close(self) -> None:
        """Closes it, and so ends its polling."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it resolves to."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        """Blocks until the JavaScript condition holds; it is looked at whenever the document has changed."""
        self.evaluate(f"""new Promise((resolve) => {{
            const look = () => {{ if ({condition}) {{ observer.disconnect(); resolve(); }} }};
            const observer = new MutationObserver(look);
            observer.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
            look();
        }})""")

    def text(self, element_id: str) -> str:
        """What an element shows."""
        return str(self.evaluate(f'document.getElementById("{element_id}").innerText'))

    def wait_text(self, element_id: str, text: str) -> None:
        """Blocks until an element's text has this in it."""
        self.wait(f'document.getElementById("{element_id}").textContent.includes({json.dumps(text)})')

    def type(self, text: str) -> None:
        """Types into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses a key."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

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
        return [event for event in self._browser.events if (event.get("sessionId"), event["method"]) == (self._session, method)]


OpenPage = Callable[[SmsServer], Tab]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests of this module: a start takes a second."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server in a tab, which is closed at the end of the test."""
    tabs: list[Tab] = []

    def open_page(server: SmsServer) -> Tab:
        tabs.append(Tab(browser, server))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.close()


@pytest.fixture(scope="module")
def idle(browser: Browser) -> Iterator[Tab]:
    """The page of a service that does nothing. A test leaves it as it was."""
    with serving(SmsProxy(Recorder())) as server:
        tab = Tab(browser, server)
        tab.wait_text("state", "OK")
        yield tab
        tab.close()


def send_by_keyboard(tab: Tab, number: str, text: str) -> None:
    """Fills in and submits the form without a mouse."""
    tab.evaluate('document.getElementById("phone").focus()')
    tab.type(number)
    tab.press("Tab")
    tab.type(text)
    tab.press("Tab")
    tab.press("Enter")


def test_a_message_sent_through_the_form_is_followed_to_its_delivery_and_moves_the_figures(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy, serving(proxy) as server:
        tab = open_page(server)
        tab.wait_text("state", "OK")
        assert (tab.text("accepted"), tab.text("delivered"), tab.text("pace")) == ("0", "0", "No request has been made yet")
        send_by_keyboard(tab, "48123456789", "Your parcel is here")
        tab.wait_text("test-status", "DELIVERED")
        tab.wait('document.getElementById("delivered").textContent === "1"')
        assert re.fullmatch(r"\S+ ACCEPTED, \S+ DELIVERED", tab.text("test-steps"))
        assert request(server, "GET", f"/sms/{tab.text('test-id')}")[1] == {"Status": "DELIVERED"}
        assert (tab.text("accepted"), tab.text("handed"), tab.text("pace")) == ("1", "1", "1 request for every 1 message")
        assert tab.complaints() == []


def test_the_requests_saved_are_the_headline(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), SmsProxyConfig(batch_size=40, max_delay=None)) as proxy, serving(proxy) as server:
        for _ in range(40):
            proxy.send(SendMessage("48123456789", "Hi"))
        tab = open_page(server)
        tab.wait('document.getElementById("delivered").textContent === "40"')
        assert (tab.text("saved"), tab.text("share")) == ("39", "97.5 % of the bill")
        assert tab.text("pace") == "1 request for every 40 messages"
        counts = tab.evaluate('[...document.querySelectorAll("#sizes td:last-child")].map((each) => each.textContent)')
        assert counts == ["0", "0", "0", "0", "0", "1", "0"]


def test_a_message_given_up_shows_the_reason(open_page: OpenPage) -> None:
    with SmsProxy(Scripted(RejectedError("bad number")), AT_ONCE) as proxy, serving(proxy) as server:
        tab = open_page(server)
        send_by_keyboard(tab, "48123456789", "Hi")
        tab.wait_text("test-status", "FAILED")
        assert tab.text("test-meaning") == "given up: rejected"
        tab.wait('document.getElementById("failed").textContent === "1"')
        assert tab.text("reasons").replace("\xa0", " ") == "0 reported, 1 rejected, 0 attempts, 0 expired"


def test_an_error_of_the_service_is_shown_as_it_is(idle: Tab) -> None:
    error = request(idle.server, "POST", "/sms", {"PhoneNumber": "+48 123", "Content": "Hi"})[1]["Error"]
    send_by_keyboard(idle, "+48 123", "Hi")
    idle.wait_text("test-error", error)
    assert idle.text("test-error") == error
    assert not idle.evaluate('document.getElementById("followed").checkVisibility()')


def test_an_outage_of_the_provider_is_a_warning_and_an_open_breaker_with_its_next_try(open_page: OpenPage) -> None:
    proxy = SmsProxy(Scripted(FastSmsingError("down", retry_after=600.0)), AT_ONCE)
    proxy.start()
    with serving(proxy) as server:
        proxy.send(SendMessage("48123456789", "Hi"))
        tab = open_page(server)
        tab.wait_text("state", "Warning")
        tab.wait_text("breaker", "Open")
        assert tab.text("notices").startswith("FastSMSing has been failing for")
        assert re.fullmatch(r"in \d+ s, at \d\d:\d\d:\d\d", tab.text("next-try"))
        assert (tab.text("pending"), tab.text("saved"), tab.text("error")) == ("1", "−1", "1")
        assert tab.text("mean") == tab.text("p50") == "–"  # of successes, of which there was none
        assert tab.complaints() == []
    assert proxy.stop(0.0) == 1  # the message still waits for the end of the outage


def test_with_keys_the_page_asks_for_one_and_stores_it_nowhere(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy, serving(proxy, api_keys=KEYS) as server:
        tab = open_page(server)
        tab.wait('!document.getElementById("unlock").hidden')
        assert tab.text("locked") == ""
        assert not tab.evaluate('document.getElementById("accepted").checkVisibility()')
        for key in ("a-wrong-key", KEYS["operator"]):
            tab.evaluate('document.getElementById("key").focus()')
            tab.type(key)
            tab.press("Enter")
            if key == "a-wrong-key":
                tab.wait_text("locked", "a valid API key is needed")
        tab.wait('document.getElementById("unlock").hidden')
        tab.wait('document.getElementById("accepted").textContent === "0"')
        assert tab.evaluate('document.getElementById("accepted").checkVisibility()')
        send_by_keyboard(tab, "48123456789", "Hi")
        tab.wait_text("test-status", "DELIVERED")
        stored = "[localStorage.length, sessionStorage.length, document.cookie, document.getElementById('key').value]"
        assert tab.evaluate(stored) == [0, 0, "", ""]
        assert KEYS["operator"] not in tab.evaluate("document.documentElement.outerHTML")


def test_a_service_that_is_gone_is_said_to_be_and_its_successor_is_shown_without_negative_rates(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy:
        with serving(proxy) as server:
            proxy.send(SendMessage("48123456789", "Hi"))
            tab = open_page(server)
            tab.wait('document.getElementById("delivered").textContent === "1"')
        tab.evaluate("poll()")
        tab.wait_text("state", "Cannot be reached")
        assert tab.text("notices").startswith("The service does not respond. The figures are from ")
    successor = SmsServer(server.server_address[:2], SmsProxy(Recorder()))
    thread = threading.Thread(target=successor.serve_forever)
    thread.start()
    try:
        tab.evaluate("poll()")
        tab.wait_text("state", "OK")
        assert (tab.text("notices"), tab.text("accepted")) == ("", "0")
        assert tab.evaluate("samples[samples.length - 1].lines.flat().filter((value) => value < 0)") == []
    finally:
        successor.shutdown(1.0)
        thread.join(HANG)
        successor.server_close()


def test_a_new_process_counts_from_zero(idle: Tab) -> None:
    totals = idle.evaluate("""(() => {
        const before = samples, clock = Date.now, now = clock();
        samples = [];
        [[1, 5], [1, 8], [2, 9], [2, 4]].forEach(([started, accepted], i) => {
            Date.now = () => now + i * 2000;
            take(new Map([["process_start_time_seconds", started], ["messages_accepted_total", accepted]]));
        });
        const totals = samples.map((sample) => sample.total.accepted);
        [samples, Date.now] = [before, clock];
        return totals;
    })()""")
    assert totals == [0, 3, 3 + 9, 3 + 9 + 4]


def test_a_line_is_broken_where_nothing_was_measured(idle: Tab) -> None:
    path = idle.evaluate("""(() => {
        const before = samples, now = Date.now();
        samples = [58, 56, 30, 28, 0].map((age) => ({
            at: now - age * 1000, run: age > 50 ? 1 : age > 20 ? 2 : 3,
            lines: [[0, 0, 0], [0, 0], [age], [age === 28 ? null : 1]],
        }));
        charts.forEach((draw) => draw());
        samples = before;
        const paths = [...document.querySelectorAll("svg")].slice(2).map((svg) => svg.querySelector("path"));
        return paths.map((path) => path.getAttribute("d").replace(/[^ML]/g, ""));
    })()""")
    assert path == ["MLMLM", "MLMM"]


def test_polls_do_not_overlap_and_a_hidden_tab_does_not_poll(open_page: OpenPage) -> None:
    with serving(SmsProxy(Recorder())) as server:
        tab = open_page(server)
        tab.wait_text("state", "OK")
        asked = tab.evaluate("""(() => {
            const asked = [];
            clearTimeout(timer);
            polling = false;
            window.fetch = (path) => { asked.push(path); return new Promise(() => {}); };
            let hidden = true;
            Object.defineProperty(document, "hidden", { get: () => hidden });
            poll();
            asked.push("now it is seen");
            hidden = false;
            document.dispatchEvent(new Event("visibilitychange"));
            poll();
            poll();
            return asked;
        })()""")
        assert asked == ["now it is seen", "/healthz", "/metrics"]


class Hostile(SmsProxy):
    """A service whose health has markup in it."""

    def health(self) -> tuple[list[str], list[str]]:
        return ["<img src=x onerror=alert(1)>"], ["<b>bold</b>"]


def test_nothing_that_the_service_says_becomes_markup(open_page: OpenPage) -> None:
    with serving(Hostile(Recorder())) as server:
        tab = open_page(server)
        tab.wait_text("state", "Unavailable")
        assert tab.text("notices") == "<img src=x onerror=alert(1)>\n<b>bold</b>"
        assert tab.evaluate('document.querySelectorAll("#notices img, #notices b").length') == 0


def test_the_page_fits_a_phone_and_a_wall(idle: Tab) -> None:
    for width in (320, 400, 1280, 2560):
        idle.call("Emulation.setDeviceMetricsOverride", width=width, height=1440, deviceScaleFactor=1, mobile=width < 500)
        assert idle.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert idle.evaluate("document.documentElement.scrollHeight - document.documentElement.clientHeight") == 0  # no scrolling


def test_every_field_has_a_label(idle: Tab) -> None:
    fields = 'document.querySelectorAll("input, textarea")'
    assert idle.evaluate(f"[...{fields}].map((each) => each.labels.length)") == [1, 1, 1]


def test_every_chart_says_in_words_what_it_draws(idle: Tab) -> None:
    idle.evaluate("charts.forEach((draw) => draw())")
    labels = idle.evaluate('[...document.querySelectorAll("svg")].map((each) => each.getAttribute("aria-label"))')
    assert len(labels) == 4
    assert labels[2] == "Messages pending, 60 s ago to now. pending 0: lowest 0, highest 0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(idle: Tab, scheme: str) -> None:
    """At least 4.5 : 1 (WCAG 2.2, 1.4.3), also in the states that are not shown now."""
    idle.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ratios = idle.evaluate("""(() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const hex = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
            const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
                .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const texts = ["--ink", "--quiet", "--good", "--bad", "--warn"];
        return ["--page", "--card"].flatMap((ground) => texts.map((text) => {
            const [low, high] = [light(ground), light(text)].sort((a, b) => a - b);
            return (high + 0.05) / (low + 0.05);
        }));
    })()""")
    assert [ratio for ratio in ratios if ratio < 4.5] == []
