"""The operators' page: how it is served, and what a real Chromium makes of it."""
from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, Tab, browser
from fastsmsing import FastSmsingError, InMemoryClient, RejectedError
from helpers import Listening, RestServer, request, serving
from providers import HANG, Recorder, Scripted
from smsproxy import SendMessage, SmsProxy, SmsProxyConfig

__all__ = ["browser"]  # a fixture

PAGE = Path(__file__).parent.parent.joinpath("page.html").read_text("utf-8")
AT_ONCE = SmsProxyConfig(max_delay=0.0)
KEYS = {"operator": "the-right-key-of-us"}
NUMBER = "48123456789"


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
        "script-src": f"'sha256-{hashes['script']}'", "style-src": f"'sha256-{hashes['style']}'",
        "connect-src": "'self'", "img-src": "data:",
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip


def test_the_page_is_one_file_of_at_most_380_lines_that_loads_nothing_else() -> None:
    assert len(PAGE.splitlines()) <= 380
    addresses = re.findall("https?://[^/]*", PAGE)
    assert set(addresses) == {"http://www.w3.org"}  # in names of XML, which are never fetched


# What a browser makes of it

OpenPage = Callable[[Listening], Tab]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server in a tab, which is closed at the end of the test."""
    with contextlib.ExitStack() as tabs:
        yield lambda server: tabs.enter_context(browser.open(address(server)))


def address(server: Listening) -> str:
    """Where the page of a server is."""
    return "http://{}:{}/".format(*server.server_address[:2])


@pytest.fixture(scope="module")
def idle(browser: Browser) -> Iterator[Tab]:
    """The page of a service that does nothing. A test leaves it as it was."""
    with serving(SmsProxy(Recorder())) as server, browser.open(address(server)) as tab:
        tab.wait_text("state", "OK")
        yield tab


def send_by_keyboard(tab: Tab, *fields: str) -> None:
    """Fills in the fields of the form, one after the other, and submits it, without a mouse."""
    tab.focus("phone")
    for field in fields:
        tab.type(field)
        tab.press("Tab")
    for _ in range(4 - len(fields)):
        tab.press("Tab")
    tab.press("Enter")  # on the button


def test_a_message_sent_through_the_form_is_followed_to_its_delivery_and_moves_the_figures(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy, serving(proxy) as server:
        tab = open_page(server)
        tab.wait_text("state", "Warning")  # after the figures
        assert (tab.text("accepted"), tab.text("delivered")) == ("0", "0")
        assert (tab.text("notices"), tab.shows("stand-in")) == ("", True)
        assert tab.text("pace") == "No request has been made yet"
        send_by_keyboard(tab, NUMBER, "Your parcel is here")
        tab.wait_text("test-status", "DELIVERED")
        tab.wait_exact("delivered", "1")
        assert re.fullmatch(r"\S+ ACCEPTED, \S+ DELIVERED", tab.text("test-steps"))
        assert request(server, "GET", f"/sms/{tab.text('test-id')}")[1] == {"Status": "DELIVERED"}
        assert (tab.text("accepted"), tab.text("handed")) == ("1", "1")
        assert tab.text("pace") == "1 request for every 1 message"
        assert tab.complaints() == []


def test_the_form_sends_the_fields_that_are_filled_in(open_page: OpenPage) -> None:
    with serving(SmsProxy(Recorder())) as server:
        tab = open_page(server)
        tab.evaluate("""window.fetch = (path, { body }) => {
            document.title = body || document.title;
            return new Promise(() => {});
        }""")
        send_by_keyboard(tab, NUMBER, "Hi", " 2.5 ", "600")
        tab.wait("document.title.startsWith('{')")
        sent = tab.evaluate("JSON.parse(document.title)")
    assert sent == {"PhoneNumber": NUMBER, "Content": "Hi", "MaxDelay": 2.5, "MaxAge": 600}


def test_the_requests_saved_are_the_headline(open_page: OpenPage) -> None:
    config = SmsProxyConfig(batch_size=40, max_delay=None)
    with SmsProxy(InMemoryClient(), config) as proxy, serving(proxy) as server:
        for _ in range(40):
            proxy.send(SendMessage(NUMBER, "Hi"))
        tab = open_page(server)
        tab.wait_exact("delivered", "40")
        assert (tab.text("saved"), tab.text("share")) == ("39", "97.5 % of the bill")
        assert tab.text("pace") == "1 request for every 40 messages"
        assert tab.texts("#sizes td:last-child") == ["0", "0", "0", "0", "0", "1", "0"]


def test_a_message_given_up_shows_the_reason(open_page: OpenPage) -> None:
    with SmsProxy(Scripted(RejectedError("bad number")), AT_ONCE) as proxy, serving(proxy) as server:
        tab = open_page(server)
        send_by_keyboard(tab, NUMBER, "Hi")
        tab.wait_text("test-status", "FAILED")
        assert tab.text("test-meaning") == "given up: rejected"
        tab.wait_exact("failed", "1")
        assert (tab.text("reasons"), tab.text("failed-share")) == ("1\xa0rejected", "100.0 % of what is final")
        assert (tab.evaluate("failed.className"), tab.text("rejected")) == ("error", "1 (100.0 %)")
        assert (tab.text("saved"), tab.evaluate("saved.className")) == ("−1", "error")  # noqa: RUF001 (a minus)
        assert tab.text("share") == "more requests than messages"


def test_an_error_of_the_service_is_shown_as_it_is(open_page: OpenPage) -> None:
    with serving(SmsProxy(Recorder())) as server:
        tab = open_page(server)
        error = request(server, "POST", "/sms", {"PhoneNumber": "+48 123", "Content": "Hi"})[1]["Error"]
        send_by_keyboard(tab, "+48 123", "Hi")
        tab.wait_text("test-error", error)
        assert tab.text("test-error") == error
        assert not tab.shows("followed")


def test_in_an_outage_what_is_wrong_and_what_waits_take_the_place_of_what_is_saved(open_page: OpenPage) -> None:
    proxy = SmsProxy(Scripted(FastSmsingError("down", retry_after=600.0)), AT_ONCE)
    proxy.start()
    with serving(proxy) as server:
        proxy.send(SendMessage(NUMBER, "Hi"))
        tab = open_page(server)
        tab.wait_text("state", "Warning")
        tab.wait_text("breaker", "Open")
        assert (tab.text("notices"), tab.shows("saved")) == ("", False)
        assert (tab.text("wrong"), tab.text("waits"), tab.text("waiting")) == (
            "FastSMSing is failing", "1", "message waiting",
        )  # fmt: skip
        assert re.fullmatch(r"\d\d:\d\d:\d\d, for [\d.]+ m?s", tab.text("since"))
        assert (tab.text("success"), tab.text("kinds")) == ("none yet", "1 × FastSmsingError")  # noqa: RUF001 (times)
        assert tab.text("cost") == "This is a real message: it waits until FastSMSing works again."
        assert re.fullmatch(r"in \d+ s, at \d\d:\d\d:\d\d", tab.text("next-try"))
        assert (tab.text("pending"), tab.text("saved"), tab.text("error")) == ("1", "−1", "1 (100.0 %)")  # noqa: RUF001 (a minus)
        assert tab.text("mean") == tab.text("p50") == "–"  # noqa: RUF001 (of successes, of which there was none)
        assert tab.complaints() == []
    assert proxy.stop(0.0) == 1  # the message still waits for the end of the outage


def test_with_keys_the_page_asks_for_one_and_stores_it_nowhere(open_page: OpenPage) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy, serving(proxy, api_keys=KEYS) as server:
        tab = open_page(server)
        tab.wait_shown("unlock")
        assert (tab.text("locked"), tab.shows("accepted")) == ("", False)
        enter(tab, "a-wrong-key")
        tab.wait_text("locked", "a valid API key is needed")
        enter(tab, KEYS["operator"])
        tab.wait_shown("unlock", False)
        tab.wait_exact("accepted", "0")
        assert tab.shows("accepted")
        send_by_keyboard(tab, NUMBER, "Hi")
        tab.wait_text("test-status", "DELIVERED")
        stored = "[localStorage.length, sessionStorage.length, document.cookie, document.getElementById('key').value]"
        assert tab.evaluate(stored) == [0, 0, "", ""]
        assert KEYS["operator"] not in tab.evaluate("document.documentElement.outerHTML")


def enter(tab: Tab, key: str) -> None:
    """Enters an API key."""
    tab.focus("key")
    tab.type(key)
    tab.press("Enter")


def test_a_service_that_is_gone_is_said_to_be_and_its_successor_is_shown_without_negative_rates(
    open_page: OpenPage,
) -> None:
    with SmsProxy(InMemoryClient(), AT_ONCE) as proxy:
        with serving(proxy) as server:
            proxy.send(SendMessage(NUMBER, "Hi"))
            tab = open_page(server)
            tab.wait_exact("delivered", "1")
        tab.evaluate("poll()")
        tab.wait_text("state", "Cannot be reached")
        assert tab.text("notices").startswith("The service does not respond. The figures are from ")
        assert (tab.text("wrong"), tab.shows("calm")) == ("The service does not respond", False)
        assert (tab.text("waits"), tab.text("waiting")) == ("0", "messages waited then")
        assert tab.text("next-try") == "this page asks every 2 s"
        assert tab.text("cost") == "The service does not respond, so nothing can be sent."
        assert tab.evaluate("document.querySelectorAll('#test :is(input, textarea, button):disabled').length") == 5
    host, port = server.server_address[:2]
    successor = RestServer(SmsProxy(Recorder()), address=(str(host), port))
    thread = threading.Thread(target=successor.serve_forever)
    thread.start()
    try:
        tab.evaluate("poll()")
        tab.wait_text("state", "OK")
        assert (tab.text("notices"), tab.text("accepted"), tab.shows("calm")) == ("", "0", True)
        assert tab.evaluate("fields.disabled") is False
        assert tab.evaluate("samples[samples.length - 1].lines.flat().filter((value) => value < 0)") == []
    finally:
        successor.shutdown(1.0)
        thread.join(HANG)
        successor.server_close()


def test_polls_do_not_overlap_and_a_hidden_tab_does_not_poll(open_page: OpenPage) -> None:
    with serving(SmsProxy(Recorder())) as server:
        tab = open_page(server)
        tab.wait_text("state", "OK")
        asked = tab.run("""() => {
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
        }""")
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
        assert tab.texts("#notices img, #notices b") == []


# What it makes of figures: these are what /metrics and /healthz might say

RESULTS = ("ok", "rejected", "error")
FIGURES: Mapping[str, float] = {
    "smsproxy_messages_accepted_total": 900, "smsproxy_messages_handed_over_total": 800,
    'smsproxy_messages_final_total{status="DELIVERED"}': 700, 'smsproxy_messages_final_total{status="FAILED"}': 3,
    **{f'smsproxy_provider_requests_total{{result="{result}"}}': 10 for result in RESULTS},
    **{f'smsproxy_provider_request_duration_seconds_sum{{result="{result}"}}': 2 for result in RESULTS},
    'smsproxy_provider_request_duration_seconds_bucket{result="ok",le="0.5"}': 10,
    'smsproxy_provider_request_duration_seconds_bucket{result="ok",le="+Inf"}': 10,
    'smsproxy_batch_messages_bucket{le="100"}': 30, 'smsproxy_batch_messages_bucket{le="+Inf"}': 30,
    "smsproxy_pending_messages": 100, "smsproxy_pending_messages_limit": 1_000,
    "smsproxy_oldest_past_due_seconds": 0, "smsproxy_oldest_pending_message_age_seconds": 3_000,
    "smsproxy_provider_stand_in": 0, "process_start_time_seconds": 1,
}  # fmt: skip
OF_THE_DATABASE = (
    "smsproxy_pending_messages", "smsproxy_oldest_past_due_seconds", "smsproxy_oldest_pending_message_age_seconds",
)  # fmt: skip
OK: Mapping[str, Any] = {"Status": "OK"}


@pytest.fixture
def canned(open_page: OpenPage) -> Iterator[Callable[..., Tab]]:
    """Shows these figures and this health in a page that asks nobody; returns its tab."""
    with serving(SmsProxy(Recorder())) as server:
        tab = open_page(server)
        tab.wait_text("state", "OK")
        tab.evaluate("clearTimeout(timer); polling = true; samples = []")

        def show(figures: Mapping[str, float], health: Mapping[str, Any] = OK) -> Tab:
            text = "".join(f"{name} {value}\n" for name, value in figures.items())
            answers = [{"status": 503 if "Reasons" in health else 200, "doc": health}, {"status": 200, "text": text}]
            tab.run("heard", answers)
            return tab

        yield show
        assert tab.complaints() == []


def test_the_stand_in_has_a_banner_and_no_message_is_said_to_be_billed_or_to_arrive(canned: Callable[..., Tab]) -> None:
    tab = canned(FIGURES)
    assert not tab.shows("stand-in")
    assert tab.text("cost") == "This is a real message: FastSMSing delivers it and bills the request."
    tab = canned({**FIGURES, "smsproxy_provider_stand_in": 1}, {"Status": "OK", "Warnings": ["a stand-in", "another"]})
    assert tab.shows("stand-in")
    assert tab.text("stand-in").endswith("nothing is sent to anybody.")
    assert (tab.text("state"), tab.text("notices")) == ("Warning", "another")  # what the banner says is not said twice
    assert tab.text("cost") == "The provider is a stand-in: this message goes to nobody."
    tab.run("""(message) => { followed = message; follow(message, { status: 200, doc: { Status: "DELIVERED" } }); }""",
            {"id": "x", "steps": []})  # fmt: skip
    assert tab.text("test-meaning") == "so says the stand-in, which sent nothing"


def test_being_past_due_is_a_sign_of_trouble_and_age_is_not(canned: Callable[..., Tab]) -> None:
    tab = canned(FIGURES)
    assert (tab.text("due"), tab.evaluate("due.className")) == ("the oldest for 50 min, none past due", "")
    tab = canned({**FIGURES, "smsproxy_oldest_past_due_seconds": 90})
    assert (tab.text("due"), tab.evaluate("due.className")) == ("the first is 90 s past due", "late")
    assert (tab.text("wrong"), tab.text("waits"), tab.text("next-try")) == ("Messages are past due", "100", "now")
    tab = canned({**FIGURES, "smsproxy_pending_messages": 0})
    assert (tab.text("due"), tab.shows("trouble")) == ("none waits", False)


def test_a_service_that_refuses_messages_says_so_and_what_waits_may_be_unknown(canned: Callable[..., Tab]) -> None:
    figures = {**FIGURES, "smsproxy_circuit_breaker_open_seconds": 60, "smsproxy_circuit_breaker_next_try_seconds": 5}
    tab = canned(figures, {"Status": "UNAVAILABLE", "Reasons": ["queue full"]})
    assert (tab.text("wrong"), tab.text("notices")) == ("No messages are accepted. FastSMSing is failing", "queue full")
    figures = {name: value for name, value in FIGURES.items() if name not in OF_THE_DATABASE}
    tab = canned(figures, {"Status": "UNAVAILABLE", "Reasons": ["the database is away"]})
    assert (tab.text("wrong"), tab.text("waits")) == ("No messages are accepted", "–")  # noqa: RUF001


def test_a_gateway_that_reaches_no_service_is_a_service_that_is_gone(canned: Callable[..., Tab]) -> None:
    tab = canned(FIGURES)
    tab.run("heard", [{"status": 502, "doc": {"Error": "no instance responds"}, "error": "no instance responds"}] * 2)
    assert (tab.text("state"), tab.text("wrong")) == ("Cannot be reached", "The service does not respond")


def test_the_webhook_shows_what_is_untold_for_how_long(canned: Callable[..., Tab]) -> None:
    tab = canned(FIGURES)
    assert tab.text("webhook") == "not used"
    requests = {f'smsproxy_webhook_requests_total{{result="{result}"}}': 7 for result in ("ok", "error")}
    tab = canned({**FIGURES, **requests})
    assert (tab.text("webhook"), tab.evaluate("webhook.className")) == ("all is told, 7 requests, 7 failed", "")
    waits = {"smsproxy_webhook_pending_messages": 3, "smsproxy_webhook_oldest_pending_seconds": 300}
    tab = canned({**FIGURES, **requests, **waits})
    assert tab.text("webhook") == "3 changes untold for 5 min, 7 requests, 7 failed"
    assert tab.evaluate("webhook.className") == "error"


def test_the_pointer_reads_all_charts_at_its_moment(idle: Tab) -> None:
    read = idle.run("""(shares) => {
        const before = samples, now = Date.now();
        const lines = (age) => [[age, 0, 0], [age, 0], [age], [1]];
        samples = [60, 30, 0].map((age) => ({ at: now - age * 1000, run: 1, lines: lines(age) }));
        const plot = document.querySelectorAll(".plot")[1], box = plot.getBoundingClientRect();
        const texts = () => [...document.querySelectorAll(".plot")].slice(0, 3)
            .map((each) => each.previousElementSibling.innerText.split("\\n")[0]);
        const read = shares.map((share) => {
            plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + share * box.width }));
            return texts();
        });
        plot.dispatchEvent(new PointerEvent("pointerleave"));
        read.push(texts());
        samples = before;
        return read;
    }""", [0.1, 0.6])  # fmt: skip
    assert read == [[f"accepted {age}", f"made {age}", f"pending {age}"] for age in (60, 30, 0)]


def test_a_page_says_since_when_it_counts(canned: Callable[..., Tab]) -> None:
    canned(FIGURES)
    tab = canned({**FIGURES, "smsproxy_messages_handed_over_total": 840})
    assert re.fullmatch(r"Since this page was opened, [\d.]+ m?s ago: 40 messages in 0 requests", tab.text("lately"))
    tab.evaluate("samples[0].first = false; show(figures)")
    assert tab.text("lately").startswith("The last ")


def test_while_the_database_is_away_its_figures_are_unknown_and_others_are_shown(canned: Callable[..., Tab]) -> None:
    canned(FIGURES)
    tab = canned({name: value for name, value in FIGURES.items() if name not in OF_THE_DATABASE},
                 {"Status": "UNAVAILABLE", "Reasons": ["the database is away"]})  # fmt: skip
    assert (tab.text("pending"), tab.text("limit"), tab.text("due")) == ("–", "of 1,000", "not known just now")  # noqa: RUF001
    assert (tab.text("accepted"), tab.text("state")) == ("900", "Unavailable")
    assert tab.text("notices") == "the database is away"
    assert tab.text("version") == ""
    assert "NaN" not in tab.evaluate("document.documentElement.outerHTML")
    tab = canned(FIGURES)
    assert (tab.text("pending"), tab.text("limit")) == ("100", "10.0 % of 1,000")


def test_the_lingers_show_on_whose_account_requests_leave(canned: Callable[..., Tab]) -> None:
    bounds = {"0.0": 5, "1.0": 7, "5.0": 27, "60.0": 28, "3600.0": 28, "86400.0": 29, "+Inf": 30}
    lingers = {f'smsproxy_batch_lead_delay_seconds_bucket{{le="{bound}"}}': upto for bound, upto in bounds.items()}
    assert canned(FIGURES).texts("#lingers td:last-child") == ["0"] * 5
    tab = canned({**FIGURES, **lingers})
    assert tab.texts("#lingers th") == ["at once", "up to 5 s", "up to 1 min", "up to 1 h", "longer"]
    assert tab.texts("#lingers td:last-child") == ["5", "22", "1", "0", "2"]


def test_a_new_process_counts_from_zero(idle: Tab) -> None:
    totals = idle.run("""(polls) => {
        const before = samples, clock = Date.now, now = clock();
        samples = [];
        polls.forEach(([started, accepted], i) => {
            Date.now = () => now + i * 2000;
            take(new Map([["process_start_time_seconds", started], ["messages_accepted_total", accepted]]));
        });
        const totals = samples.map((sample) => sample.total.accepted);
        [samples, Date.now] = [before, clock];
        return totals;
    }""", [[1, 5], [1, 8], [2, 9], [2, 4]])  # fmt: skip
    assert totals == [0, 3, 3 + 9, 3 + 9 + 4]


def test_a_line_is_broken_where_nothing_was_measured(idle: Tab) -> None:
    path = idle.run("""(ages) => {
        const before = samples, now = Date.now();
        samples = ages.map((age) => ({
            at: now - age * 1000, run: age > 50 ? 1 : age > 20 ? 2 : 3,
            lines: [[0, 0, 0], [0, 0], [age], [age === 28 ? null : 1]],
        }));
        charts.forEach((draw) => draw());
        samples = before;
        const paths = [...document.querySelectorAll("svg")].slice(2).map((svg) => svg.querySelector("path"));
        return paths.map((path) => path.getAttribute("d").replace(/[^ML]/g, ""));
    }""", [58, 56, 30, 28, 0])  # fmt: skip
    assert path == ["MLMLM", "MLMM"]


# How it looks


def test_the_page_fits_a_phone_and_a_wall(idle: Tab) -> None:
    for width in (320, 400, 1280, 2560):
        idle.resize(width, 1440)
        assert idle.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    # A wall shows everything without scrolling.
    assert idle.evaluate("document.documentElement.scrollHeight - document.documentElement.clientHeight") == 0


def test_every_field_has_a_label(idle: Tab) -> None:
    labels = idle.evaluate('[...document.querySelectorAll("input, textarea")].map((each) => each.labels.length)')
    assert labels == [1] * 5


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
