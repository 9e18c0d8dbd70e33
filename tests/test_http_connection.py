"""Connections and exchanges: a test sends bytes, moves the loop and the clock on, and looks at what comes back."""
from __future__ import annotations

import contextlib
import gc
import logging
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

import http_connection
from http_connection import Connection
from http_doubles import LARGE, MEDIUM, SMALL, DrivenFront, Peer, driven, front, get, post, req, whole
from http_exchange import Exchange
from http_protocol import HttpError, Limits, Request, RequestParser
from response_counts import DURATIONS

__all__ = ["front"]  # a fixture

Log = pytest.LogCaptureFixture
GARBAGE = b"garbage\r\n\r\n"
LATER, LARGE_GET = get("/later"), get("/large")
HALF_HEAD, HALF_BODY = get("/")[:-1], whole()[:-1]
EXPECTS = whole(b"12345", "Expect: 100-continue")[:-5]  # without its body
LAST_RESPONSE = {"connection": "close"}


# Requests and their responses


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_requests_of_all_kinds_get_their_responses_in_order(front: DrivenFront, step: int) -> None:
    paths = [*("/echo", "/together", "/medium") * 10, "/large", "/echo"]
    asked = [(path, str(number)) for number, path in enumerate(paths)]
    data = b"\r\n" + b"".join(whole(body.encode(), path=path) for path, body in asked)
    peer = front.connect()
    for start in range(0, len(data), step):
        peer.send(data[start : start + step])
    for path, body in asked:
        if path in ("/medium", "/large"):
            assert peer.response().body == LARGE[: MEDIUM if path == "/medium" else None]
        else:
            assert peer.echoed() == (path, body)


def test_pipelined_requests_are_answered_with_one_send_also_those_whose_responses_come_later(
    front: DrivenFront,
) -> None:
    peer = front.connect().send(get() * 10 + get("/together") * 3 + get())
    assert peer.statuses(14) == [200] * 14
    assert len(front.listener.sent) == 1


def test_responses_that_are_many_are_sent_in_portions(front: DrivenFront) -> None:
    peer = front.connect().send(get("/medium") * 100)
    assert peer.statuses(100) == [200] * 100
    assert max(front.listener.sent) < http_connection.SEND_AHEAD + 10_500


@pytest.mark.parametrize("last", [get("/", "Connection: close"), req("GET / HTTP/1.0"), get("/")])
def test_what_waits_for_gathered_responses_is_served_when_the_socket_takes_them_all_at_once(
    front: DrivenFront, last: bytes
) -> None:
    front.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * http_connection.SEND_AHEAD)
    requests = http_connection.SEND_AHEAD // MEDIUM + 1
    peer = front.connect().send(get("/medium") * requests + last)
    assert [len(peer.response().body) for _ in range(requests)] == [MEDIUM] * requests
    assert peer.response().status == 200
    assert peer.works if last == get("/") else peer.has_ended


@pytest.mark.parametrize("path", ["/echo", "/together", "/large", "/nothing"])
def test_a_response_to_head_has_the_headers_of_get_and_no_body(front: DrivenFront, path: str) -> None:
    peer = front.connect().send(get(path) + req(f"HEAD {path} HTTP/1.1"))
    status, headers, _ = peer.response()
    assert peer.response("HEAD") == (status, headers, b"")
    assert peer.works


def test_a_response_has_the_date_of_its_second(front: DrivenFront) -> None:
    dates = []
    for seconds in (0.0, 0.75, 0.125, 0.25, 86_400.0):
        front.wait(seconds)
        dates.append(front.connect().send(get()).response().headers["date"])
    days = ["Wed, 15 Nov 2023 00:00:00 GMT"] * 3 + ["Wed, 15 Nov 2023 00:00:01 GMT", "Thu, 16 Nov 2023 00:00:01 GMT"]
    assert dates == days


KEPT_OPEN = {
    "path": (get("/nothing"), 404, {}), "path with a body": (whole(path="/nothing"), 404, {}),
    "method": (req("DELETE /echo HTTP/1.1"), 405, {"allow": "GET"}), "OPTIONS *": (req("OPTIONS * HTTP/1.1"), 200, {}),
    "HTTP/1.0": (req("GET /echo HTTP/1.0", "Connection: keep-alive"), 200, {"connection": "keep-alive"}),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status", "headers"), KEPT_OPEN.values(), ids=KEPT_OPEN)
def test_a_connection_stays_open_after_a_whole_request(
    front: DrivenFront, data: bytes, status: int, headers: dict[str, str]
) -> None:
    peer = front.connect().send(data + get("/"))
    response = peer.response()
    assert (response.status, {**response.headers, **headers}) == (status, response.headers)
    assert peer.echoed() == ("/", "")


CLOSING = {"close": get("/echo", "Connection: close"), "HTTP/1.0": req("GET /echo HTTP/1.0")}


@pytest.mark.parametrize("last", CLOSING.values(), ids=CLOSING)
def test_a_connection_closes_after_the_last_response_and_serves_nothing_behind_it(
    front: DrivenFront, last: bytes
) -> None:
    peer = front.connect().send(get("/") * 100 + last + get("/") * 99)
    assert peer.statuses(100) == [200] * 100
    assert peer.response().headers["connection"] == "close"
    assert peer.has_ended
    assert front.echo.seen == ["/"] * 100 + ["/echo"]


REFUSED = {
    "garbage": (GARBAGE, 400), "malformed length": (post("Content-Length: +5", body=b""), 400),
    "no length": (post(body=b""), 411), "body over the limit": (post("Content-Length: 1048577", body=b""), 413),
    "path, body not yet sent": (EXPECTS.replace(b"/echo", b"/nothing"), 404),
    "method, body not yet sent": (EXPECTS.replace(b"POST", b"PUT"), 405),
    "garbage and much more": (GARBAGE + b"x" * 1_000_000, 400),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_after_a_refusal_of_what_has_not_been_read_the_connection_closes(
    front: DrivenFront, data: bytes, status: int
) -> None:
    """RFC 9112, 9.3: what was not read never becomes the next request, nor does a reset take the response away."""
    peer = front.connect().send(data)
    response = peer.response()
    assert (response.status, response.headers["connection"]) == (status, "close")
    assert response.headers["content-type"] == "application/json"
    peer.send(get("/"))
    assert peer.has_ended
    assert front.echo.seen == []


# 100 Continue: RFC 9110, 10.1.1


def test_a_body_that_is_awaited_is_asked_for_once(front: DrivenFront) -> None:
    peer = front.connect().send(EXPECTS)
    assert peer.head() == ("HTTP/1.1 100 Continue", {})
    assert peer.send(b"123").is_silent
    assert peer.send(b"45").echoed() == ("/echo", "12345")


@pytest.mark.parametrize("data", [EXPECTS + b"12345", EXPECTS.replace(b"/1.1", b"/1.0") + b"12345"])
def test_a_body_that_is_there_and_one_of_http_1_0_are_not_asked_for(front: DrivenFront, data: bytes) -> None:
    assert front.connect().send(data).echoed() == ("/echo", "12345")
    if b"/1.0" in data:
        assert front.connect().send(data[:-5]).is_silent


# Responses that come later


def test_requests_behind_a_deferred_one_wait_for_it_and_nobody_else_does(front: DrivenFront) -> None:
    peers = [front.connect().send(whole(str(i).encode(), path="/later") + whole()) for i in range(3)]
    front.settle()
    assert front.connect().works
    assert [peer.is_silent for peer in peers] == [True] * 3
    front.echo.deferred.reverse()
    for i in (2, 1, 0):
        front.finish()
        assert [peers[i].echoed(), peers[i].echoed()] == [("/later", str(i)), ("/echo", "12345")]


def test_a_deferred_response_may_be_deferred_again(front: DrivenFront) -> None:
    peer = front.connect().send(LATER + get("/"))
    front.finish(front.echo.later)
    assert peer.is_silent
    front.finish()
    assert peer.statuses(2) == [200, 200]


def test_requests_of_an_iteration_are_finished_together(front: DrivenFront) -> None:
    peers = [front.connect() for _ in range(3)]
    assert [peer.works for peer in peers] == [True] * 3
    for peer in peers:
        peer.socket.sendall(get("/together") * 2 + get("/"))
    assert [peer.statuses(3) for peer in peers] == [[200] * 3] * 3
    assert front.echo.groups == [3, 3]  # a connection's second request waits for its first


def test_a_deferred_response_to_a_peer_that_has_gone_is_nobodys(front: DrivenFront, caplog: Log) -> None:
    front.connect().send(LATER + get("/")).reset()
    front.finish()
    front.settle()
    assert (front.open_connections, front.echo.seen, caplog.messages) == (0, ["/later"], [])


@pytest.mark.parametrize("error", [HttpError(404, "no"), KeyError("known"), HttpError(409, "no", close=True)])
def test_a_refusal_of_a_peer_that_has_gone_is_nobodys_either(
    front: DrivenFront, caplog: Log, error: Exception
) -> None:
    front.echo.refusals[KeyError] = HttpError(422, "known")
    front.connect().send(LATER).reset()
    front.finish(raising(error))
    front.settle()
    assert (front.open_connections, front.counts.by_status(), caplog.messages) == (0, {}, [])


# Half-closed peers, and those that go away


@pytest.mark.parametrize("part", [HALF_HEAD, HALF_BODY])
def test_a_fin_in_the_middle_of_a_request_ends_the_connection_without_a_response(
    front: DrivenFront, part: bytes
) -> None:
    peer = front.connect().send(part)
    peer.half_close()
    assert peer.has_ended
    assert (front.open_connections, front.echo.seen) == (0, [])


def test_a_half_closed_peer_gets_all_its_responses(front: DrivenFront) -> None:
    peer = front.connect().send(LATER + get("/together") + LARGE_GET + LATER + get("/") + HALF_BODY)
    peer.half_close()
    assert peer.is_silent
    front.finish()
    assert peer.statuses(3) == [200] * 3
    front.finish()
    assert peer.statuses(2) == [200] * 2
    assert peer.has_ended
    assert front.open_connections == 0


def in_a_body(front: DrivenFront, peer: Peer) -> None:
    peer.send(HALF_BODY)


def refused(front: DrivenFront, peer: Peer) -> None:
    peer.send(GARBAGE)


def refused_and_half_closed(front: DrivenFront, peer: Peer) -> None:
    peer.send(GARBAGE)
    peer.half_close()
    front.settle()


def write_blocked(front: DrivenFront, peer: Peer) -> None:
    peer.send(LARGE_GET + get("/"))
    front.settle()
    peer.socket.recv(10_000)


def write_blocked_and_half_closed(front: DrivenFront, peer: Peer) -> None:
    peer.send(LARGE_GET)
    peer.half_close()
    front.settle()


def half_closed_before_a_large_response(front: DrivenFront, peer: Peer) -> None:
    peer.send(LATER * 3)
    peer.half_close()
    front.finish(front.echo.routes["/large"])


GONE = [in_a_body, refused, refused_and_half_closed, write_blocked, write_blocked_and_half_closed,
        half_closed_before_a_large_response]  # fmt: skip


@pytest.mark.parametrize("begin", GONE)
def test_a_peer_that_resets_leaves_its_place(front: DrivenFront, caplog: Log, begin: Callable[..., object]) -> None:
    peer = front.connect()
    begin(front, peer)
    peer.reset()
    front.settle()
    assert (front.open_connections, caplog.messages) == (0, [])


# Deadlines: each is a total, whatever drips in meanwhile


def half_head_behind_a_response(front: DrivenFront, peer: Peer) -> None:
    assert peer.send(get("/") + HALF_HEAD).response().status == 200


def half_head_after_idleness(front: DrivenFront, peer: Peer) -> None:
    assert peer.works
    front.wait(59.0)
    peer.send(HALF_HEAD)


def half_head_behind_a_deferred_request(front: DrivenFront, peer: Peer) -> None:
    peer.send(LATER + HALF_HEAD)
    front.wait(3600.0)
    front.finish()
    assert peer.response().status == 200


def half_head_behind_a_blocked_response(front: DrivenFront, peer: Peer) -> None:
    front.listener.takes.append(5)
    assert peer.send(get("/") + HALF_HEAD).response().status == 200


def half_body_after_a_slow_head(front: DrivenFront, peer: Peer) -> None:
    peer.send(HALF_BODY[:9])
    front.wait(9.75)
    peer.send(HALF_BODY[9:])


def half_head_on_a_new_connection(front: DrivenFront, peer: Peer) -> None:
    peer.send(HALF_HEAD)


HALVES = [
    half_head_on_a_new_connection, in_a_body, half_head_behind_a_response,
    half_head_after_idleness, half_head_behind_a_deferred_request, half_head_behind_a_blocked_response,
    half_body_after_a_slow_head,
]  # fmt: skip


@pytest.mark.parametrize("begin", HALVES)
def test_half_a_request_has_ten_seconds_and_then_gets_a_408(front: DrivenFront, begin: Callable[..., object]) -> None:
    peer = front.connect()
    begin(front, peer)
    front.wait(9.75)
    assert peer.is_silent
    front.wait(0.25)
    response = peer.response()
    assert (response.status, response.headers["connection"]) == (408, "close")
    assert peer.has_ended


@pytest.mark.parametrize(("part", "drop"), [(HALF_HEAD, b"X"), (whole(b"x" * 99)[:-98], b"x")])
def test_a_request_that_drips_in_has_no_longer(front: DrivenFront, part: bytes, drop: bytes) -> None:
    peer = front.connect().send(part)
    for _ in range(10):
        assert peer.send(drop).is_silent
        front.wait(1.0)
    assert peer.response().status == 408


def test_a_new_connection_has_ten_seconds_also_if_empty_lines_drip_in(front: DrivenFront) -> None:
    peers = [front.connect(), front.connect()]
    for _ in range(10):
        assert peers[0].send(b"\r\n").is_silent
        assert peers[1].is_silent
        front.wait(1.0)
    assert [peer.has_ended for peer in peers] == [True, True]


def test_an_idle_connection_has_a_minute_also_if_empty_lines_drip_in(front: DrivenFront) -> None:
    peers = [front.connect(), front.connect()]
    assert [peer.works for peer in peers] == [True, True]
    for _ in range(6):
        assert [peer.is_silent for peer in peers] == [True, True]
        peers[0].send(b"\r\n")
        front.wait(10.0)
    assert [peer.has_ended for peer in peers] == [True, True]


def test_a_request_that_is_being_handled_has_no_deadline(front: DrivenFront) -> None:
    peer = front.connect()
    assert peer.works
    peer.send(LATER)
    front.wait(3600.0)
    front.finish()
    assert peer.response().status == 200


@pytest.mark.parametrize("bytes_a_second", [0, 10_000])
def test_a_peer_that_does_not_read_its_response_has_ten_seconds(front: DrivenFront, bytes_a_second: int) -> None:
    peer = front.connect().send(LARGE_GET)
    for _ in range(10):
        front.settle()
        assert front.open_connections == 1
        if bytes_a_second:
            peer.socket.recv(bytes_a_second)
        front.wait(1.0)
    assert front.open_connections == 0


def test_a_response_that_is_read_late_starts_the_minute_of_idleness(front: DrivenFront) -> None:
    peer = front.connect().send(LARGE_GET)
    front.wait(9.0)
    assert peer.response().status == 200
    front.wait(59.0)
    assert peer.works


def test_a_refused_peer_has_two_seconds_to_read_its_response(front: DrivenFront) -> None:
    peer = front.connect().send(GARBAGE)
    assert peer.response().status == 400
    assert peer.has_ended
    peer.send(b"x")
    front.wait(1.5)
    assert front.open_connections == 1
    front.wait(0.5)
    assert front.open_connections == 0


SILENT = {
    "malformed": GARBAGE, "no length": post(), "too large": post("Content-Length: 9999999"),
    "no such path": EXPECTS.replace(b"/echo", b"/nothing"), "half a request": HALF_HEAD,
    "the last of some": get("/") + GARBAGE, "behind a deferred one": get("/together") + GARBAGE,
    "behind a large response": LARGE_GET + GARBAGE,
}  # fmt: skip


@pytest.mark.parametrize("data", SILENT.values(), ids=SILENT.keys())
def test_refused_peers_that_stay_silent_are_closed_and_lock_nobody_out(data: bytes) -> None:
    with driven(Limits(connections=3)) as front:
        silent = [front.connect().send(data) for _ in range(3)]
        front.settle()
        if data is HALF_HEAD:
            front.wait(10.0)
        for peer in silent:
            while 200 <= peer.response().status < 300:
                pass
        front.wait(2.0)
        assert front.open_connections == 0
        assert front.connect().works


# What a peer may take


@pytest.mark.parametrize("first", [LATER, whole(path="/large")], ids=["a deferred request", "a blocked response"])
def test_a_peer_cannot_fill_the_memory_behind_a_response_under_way(front: DrivenFront, first: bytes) -> None:
    peer, sent, data = front.connect().send(first), 0, memoryview(get("/") * 100)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            sent += peer.socket.send(data[sent % len(get("/")) :])
        front.settle()
    assert http_connection.READ_AHEAD <= sent < 200_000  # some of it is in the kernel
    if first is LATER:
        front.finish()
    assert {peer.response().status for _ in range(sent // len(get("/")) + first.count(b"HTTP/1.1"))} == {200}


def test_nothing_of_a_body_is_kept_once_it_has_its_response_or_its_peer_has_gone(front: DrivenFront) -> None:
    assert front.connect().send(whole(b"private" * 1000)).response().status == 200
    front.connect().send(LATER + whole(b"private")).reset()
    refused = front.connect().send(GARBAGE + b"private")
    assert refused.response().status == 400
    refused.send(b"private")
    front.settle()
    kept = [value for each in gc.get_objects() if isinstance(each, (RequestParser, Request))
            for value in (getattr(each, "body", b""), getattr(each, "buffer", b""))]  # fmt: skip
    assert kept
    assert [value for value in kept if b"private" in value] == []


# Failures


def raising(error: BaseException) -> Callable[[Exchange], None]:
    """A handler that fails."""

    def fail(exchange: Exchange) -> None:
        raise error

    return fail


def twice(exchange: Exchange) -> None:
    exchange.respond(200)
    exchange.respond(200)


def too_late(exchange: Exchange) -> None:
    exchange.respond(200)
    raise ValueError("secret")


def no_latin_1(exchange: Exchange) -> None:
    exchange.respond(200, headers={"X": "€"})


FAILURES: list[Any] = [
    pytest.param(raising(RuntimeError("secret")), 500, ["requests fail: GET <{}>"], id="error"),
    # As of a thread that called sys.exit().
    pytest.param(raising(SystemExit(1)), 500, ["requests fail: GET <{}>"], id="exit"),
    pytest.param(raising(KeyError("secret")), 422, [], id="an error that the application knows"),
    pytest.param(raising(HttpError(409, "no")), 409, [], id="refusal"),
    pytest.param(no_latin_1, 500, ["requests fail: GET <{}>"], id="header"),
    pytest.param(too_late, 200, ["requests fail: GET <{}> after its response"], id="too late"),
    pytest.param(twice, 200, ["requests fail: GET <{}> after its response"], id="twice"),
]


@pytest.mark.parametrize(("handler", "status", "logged"), FAILURES)
@pytest.mark.parametrize("path", ["/fails", "/later"])
def test_a_request_that_fails_costs_only_its_own_response(
    front: DrivenFront, caplog: Log, handler: Any, status: int, logged: list[str], path: str
) -> None:
    front.echo.routes["/fails"] = handler
    front.echo.refusals[KeyError] = HttpError(422, "known")
    peer = front.connect().send(get(path) + get("/"))
    if path == "/later":
        front.finish(handler)
    response = peer.response()
    assert (response.status, b"secret" in response.body, peer.echoed()) == (status, False, ("/", ""))
    assert caplog.messages == [text.format(path) for text in logged]
    assert all(record.levelname == "ERROR" and record.exc_info for record in caplog.records)


def test_a_handler_that_neither_responds_nor_defers_is_a_500(front: DrivenFront, caplog: Log) -> None:
    front.echo.routes["/nothing"] = lambda exchange: None
    assert front.connect().send(get("/nothing") + get("/")).statuses(2) == [500, 200]
    assert caplog.messages == ["requests fail: GET </nothing>"]


def test_requests_that_fail_again_and_again_are_counted_and_not_logged_each(front: DrivenFront, caplog: Log) -> None:
    front.echo.routes["/fails"] = raising(ValueError("secret"))
    for seconds in (60.0, 0.0):
        assert front.connect().send(get("/fails") * 50).statuses(50) == [500] * 50
        front.wait(seconds)
    assert caplog.messages == ["requests fail: GET </fails>", "requests fail: GET </fails> (51 times in 60 s)"]


def test_a_refusal_may_have_headers_and_close_the_connection(front: DrivenFront) -> None:
    front.echo.routes["/busy"] = raising(HttpError(409, "no", {"X-Reason": "busy"}, close=True))
    peer = front.connect().send(get("/busy"))
    response = peer.response()
    assert (response.status, response.headers["x-reason"], response.headers["connection"]) == (409, "busy", "close")
    assert peer.has_ended
    assert front.open_connections == 1  # it lingers, so that a request on its way does not make a reset


def test_an_error_as_the_head_is_looked_at_is_a_500(
    front: DrivenFront, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.echo, "route", raising(ValueError("secret")))
    for data in (get("/"), EXPECTS):
        assert front.connect().send(data).response().status == 500
        front.wait(60.0)
    failed = ["requests fail: GET </>", "requests fail: POST </echo> (2 times in 60 s)"]
    assert caplog.messages == failed


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("data", [get("/fails"), get("/") * 3 + get("/fails"), LARGE_GET + get("/fails"), LATER])
def test_an_error_in_refusing_costs_that_connection(
    front: DrivenFront, caplog: Log, monkeypatch: pytest.MonkeyPatch, data: bytes, used: bool
) -> None:
    front.echo.routes["/fails"] = raising(ZeroDivisionError())
    monkeypatch.setattr(front.echo, "refusal", raising(TypeError("a bug")))
    peer = front.connect()
    if used:
        assert peer.works
    peer.send(data)
    if data is LATER:
        front.finish(front.echo.routes["/fails"])
    peer.wait_for_end()
    assert front.open_connections == 0
    path = "/later" if data is LATER else "/fails"
    assert caplog.messages == [f"requests fail: GET <{path}> and its refusal"]
    assert front.connect().works


def test_an_error_of_ours_in_driving_a_connection_costs_that_connection(
    front: DrivenFront, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = [front.connect(), front.connect()]
    assert [peer.works for peer in peers] == [True, True]
    broken = [(RequestParser, "next"), (Connection, "_flush")]  # on the way in, and at the end of an iteration
    for peer, (kind, method) in zip(peers, broken, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, raising(ArithmeticError("a bug")))
            assert peer.send(get("/")).has_ended
    assert caplog.messages == ["the server's loop goes on after an error"] * 2
    assert front.connect().works


@pytest.mark.parametrize("call", ["register", "modify"])
def test_a_socket_that_cannot_be_watched_costs_its_connection_and_nobody_else_anything(
    front: DrivenFront, monkeypatch: pytest.MonkeyPatch, caplog: Log, call: str
) -> None:
    """epoll_ctl(2) fails for want of memory or of watches; the selector forgets the socket whose change failed."""
    peer = front.connect()
    if call == "modify":
        assert peer.works

    def fail(fileobj: Any, events: int, data: Any = None) -> None:
        if call == "modify":
            front.selector.unregister(fileobj)
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(front.selector, call, fail)
        peer.send(LARGE_GET)
        front.settle()
    assert front.open_connections == 0
    assert front.connect().works
    assert caplog.messages == []


# The log


@pytest.mark.parametrize(("line", "shown"), [("GET /echo", "GET"), ("48123456789 /echo", "-"), ("BREW /echo", "-")])
def test_the_debug_log_shows_what_the_application_shows_of_a_path_and_known_methods_only(
    front: DrivenFront, caplog: Log, line: str, shown: str
) -> None:
    caplog.set_level(logging.DEBUG)

    def named(exchange: Exchange) -> None:
        exchange.client = "shop"
        exchange.respond(200)

    front.echo.routes["/echo"] = named
    peer = front.connect().send(req(f"{line}?48123456789 HTTP/1.1"))
    status, client = (200, " (shop)") if shown == "GET" else (405, "")
    assert peer.response().status == status
    peer.reset()
    front.settle()
    closed = "127.0.0.1 connection closed: reading: [Errno 104] Connection reset by peer"
    assert caplog.messages == [f"127.0.0.1{client} {shown} </echo> {status}", closed]
    assert front.counts.by_status() == {("/echo", status): 1}


def test_the_time_from_a_whole_request_to_its_response_counts_by_route(front: DrivenFront) -> None:
    peer = front.connect().send(whole(path="/later")[:-1])
    front.wait(3.0)  # which its client took, not the server
    peer.send(b"5")
    front.settle()
    front.clock.advance(0.2)
    front.connect().send(get("/later") + get("/echo"))
    front.settle()
    front.clock.advance(0.2)
    front.finish()
    front.finish()
    front.settle()
    rows = {route: [sum(row[:-1]), *(row[DURATIONS.index(each)] for each in (0.001, 0.25, 0.5)), round(row[-1], 6)]
            for route, row in front.counts.durations().items()}  # fmt: skip
    assert rows == {"/later": [2, 0, 1, 1, 0.6], "/echo": [1, 1, 0, 0, 0]}


# All together


@pytest.mark.parametrize("seed", range(30))
def test_a_random_walk_of_events_never_leaves_the_table_of_states(caplog: Log, seed: int) -> None:
    chance = random.Random(seed)
    kinds = [get("/"), get("/"), whole(), LATER, LARGE_GET, EXPECTS + b"12345", get("/together")]
    lasts = [GARBAGE, get("/", "Connection: close"), EXPECTS.replace(b"/echo", b"/nothing")]
    data = bytearray(b"".join(chance.choices(kinds, k=10)) + chance.choice(lasts) + get("/"))
    with driven(Limits(connections=2)) as front:
        peer = front.connect()

        def send() -> None:
            size = chance.choice((1, 10, 50, 100))
            peer.socket.send(bytes(data[:size]))
            del data[:size]

        def finish() -> None:
            if front.echo.deferred:
                front.finish()

        def receive() -> None:
            peer.socket.recv(200_000)

        def wait() -> None:
            front.wait(chance.choice((1, 5)))

        def end() -> None:
            ends: list[Callable[[], object]] = [peer.half_close, peer.reset, front.connect, shutdown]
            chance.choice(ends)()

        def shutdown() -> None:
            front.shutdown(20.0)

        for _ in range(60):
            with contextlib.suppress(OSError):
                chance.choice([*[send, send, send, receive, wait, finish] * 10, end])()
            front.settle()
    assert caplog.messages == []


# Large bodies


def test_large_bodies_share_a_limit_and_one_that_is_being_worked_on_counts_also_when_its_peer_is_gone() -> None:
    with driven(Limits(small_body=10, large_bodies=45)) as front:
        worked_on, awaited = front.connect(), front.connect()
        worked_on.send(post("Content-Length: 30", body=b"", path="/later"))
        front.settle()
        worked_on.send(b"x" * 30)
        awaited.send(post("Content-Length: 11", body=b"", path="/later"))
        front.settle()
        assert (front.large_bodies["/later"], len(front.echo.deferred)) == (41, 1)
        too_much = post("Content-Length: 11", "Expect: 100-continue", body=b"", path="/later")
        refused = front.connect().send(too_much).response("POST")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert front.connect().send(whole(b"x" * 45)).response("POST").status == 200, "another route has its own room"
        assert front.connect().send(whole(b"x" * 10)).response("POST").status == 200, "a small one needs no share"
        worked_on.reset()
        awaited.reset()
        front.settle()
        assert front.large_bodies["/later"] == 30
        front.finish(raising(HttpError(400, "wrong")))
        assert front.large_bodies["/later"] == 0
