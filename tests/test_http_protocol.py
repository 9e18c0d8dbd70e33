"""The rules of HTTP: bytes in, requests or refusals out; and the table of a connection's states."""
from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from http_doubles import get, post, req, whole
from http_protocol import (
    TRANSITIONS,
    Event,
    HttpError,
    Limits,
    RequestParser,
    State,
    parse_headers,
    response_head,
    timeouts,
)

HTTP10, EVERY_BYTE = "GET /echo HTTP/1.0", bytes(range(256))


@dataclass(frozen=True)
class Taken:
    """What is read in a request that is taken."""

    method: str = "GET"
    path: str = "/echo"
    body: bytes = b""
    http10: bool = False
    keep_alive: bool = True


PROBE, PARSED_PROBE = get("/"), Taken(path="/")
Outcome = Taken | int  # or the status of the refusal


def outcomes(pieces: Iterable[bytes], limits: Limits = Limits()) -> list[Outcome]:
    """What a parser makes of bytes that come in these pieces: requests, and at the end perhaps a refusal."""
    parser = RequestParser(limits)
    found: list[Outcome] = []
    for piece in pieces:
        parser.feed(piece)
        try:
            while (request := parser.next()) is not None:
                found.append(Taken(request.method, request.path, request.body, request.http10, request.keep_alive))
        except HttpError as error:
            return [*found, error.status if error.close else -1]  # where the next request begins is not known
    return found


def ok(name: str, data: bytes, method: str = "GET", path: str = "/echo", **others: Any) -> Any:
    """A request that is taken."""
    return pytest.param(data, Taken(method, path, **others), id=ascii(name))


def no(name: str, data: bytes, status: int = 400) -> Any:
    """A request that is refused."""
    return pytest.param(data, status, id=ascii(name))


BAD_LINES = (  # RFC 9112, 3
    " GET /echo HTTP/1.1", "GET  /echo HTTP/1.1", "GET /echo  HTTP/1.1", "GET /echo HTTP/1.1 ", "GET\t/echo HTTP/1.1",
    "GET\x0b/echo HTTP/1.1", "GET /echo\x0cHTTP/1.1", "GET\xa0/echo HTTP/1.1", "GET /echo\x85HTTP/1.1",
    "GET\x1c/echo HTTP/1.1", "GET /ec ho HTTP/1.1", "GET /ec\0ho HTTP/1.1", "GET /ec\x01ho HTTP/1.1",
    "GET /ec\x7fho HTTP/1.1", "GET /\xe9 HTTP/1.1", "G\xcbT /echo HTTP/1.1", "GET /echo\rHTTP/1.1", "GET", "GET /echo",
    "/echo HTTP/1.1", "GE(T /echo HTTP/1.1", "GET /echo ICY/1.1", "GET /echo HTTP/1", "GET /echo HTTP/1.10",
    "GET /echo HTTP/01.1", "GET /echo HTTP/+1.1", "GET /echo HTTP/1.\xb2", "GET /echo http/1.1",
    "GET /echo HTTP/1.1\rX: a", "GET /echo HTTP/1.1\nX: a",
)  # fmt: skip
REQUEST_LINES = [  # RFC 9112, 2.2, 2.3, 3
    ok("plain GET", req()),
    ok("one CRLF before the request", b"\r\n" + req()),
    ok("many CRLFs before the request", b"\r\n" * 500 + req()),
    no("bare LF before the request", b"\n" + req()),
    no("CR CR LF before the request", b"\r\r\n" + req()),
    *[no(line, req(line)) for line in BAD_LINES],
    no("bare LF ends every line", b"GET /echo HTTP/1.1\nHost: a\n\n"),
    no("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    *[ok(method, req(f"{method} /echo HTTP/1.1"), method) for method in ("BREW", "get", "!#$%&'*+-.^_`|~09azAZ")],
    ok("HTTP/1.0", req(HTTP10), http10=True, keep_alive=False),
    ok("HTTP/1.0 without Host", req(HTTP10, host=None), http10=True, keep_alive=False),
    ok("HTTP/1.2 is served as HTTP/1.1", req("GET /echo HTTP/1.2")),
    no("HTTP/1.2 without Host", req("GET /echo HTTP/1.2", host=None)),
    *[no(f"HTTP/{version}", req(f"GET /echo HTTP/{version}"), 505) for version in ("0.9", "2.0", "3.1")],
    no("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
]
VISIBLE = "/!\"#$%&'()*+,-.:;<=>@[]^_`{|}~"
PATHS = {  # RFC 9112, 3.2
    "/echo?a=b&c=%20": "/echo", "/echo?a?b": "/echo", VISIBLE: VISIBLE, "http://a/echo?x=1": "/echo",
    "HTTP://A/echo": "/echo", "https://[::1]:8443/echo": "/echo", "http://a:80": "/", "http://a?x=/echo": "/",
    "http://a#x": "/#x",
}  # fmt: skip
TARGETS = [
    *[ok(target, get(target), path=path) for target, path in PATHS.items()],
    *[no(target, get(target)) for target in ("*", "a:80", "echo", "http:///echo", "ftp://a/echo")],
    no("absolute-form without Host", req("GET http://a/echo HTTP/1.1", host=None)),
    ok("asterisk-form", req("OPTIONS * HTTP/1.1"), "OPTIONS", "*"),
    ok("authority-form", req("CONNECT a:80 HTTP/1.1"), "CONNECT", "a:80"),
    no("authority-form of nothing", req("CONNECT  HTTP/1.1")),
    no("OPTIONS of a relative target", req("OPTIONS echo HTTP/1.1")),
]
GOOD_HEADERS = ("X:", "X: \xff\x80\ta:b::c", "!#$%&'*+-.^_`|~09azAZ: a")  # RFC 9110, 5.5 and 5.6.2
BAD_HEADERS = (  # RFC 9112, 2.2 and 5
    "X : a", "X\t: a", "X: a\r\n b", "X: a\r\n\tb", "  ", "nonsense", ": a", "X Y: a", "X(Y): a", "X\xe9: a", "X\0: a",
    "X: a\0b", "X: a\x07b", "X: a\x0bb", "X: a\x7fb", "X: a\rb", "X: a\r", "X: a\rContent-Length: 5",
    "X: a\nContent-Length: 5",
)  # fmt: skip
HOSTS = ("Host:a", "Host: \t a\t ", "Host:", "Host: example.com:8080", "Host: [::1]:8080")
BAD_HOSTS = (  # RFC 9112, 3.2
    "X: a", "Host: a\r\nHost: b", "Host: a\r\nHost: a", "Host: a\r\nhOST: b", "Host: a\r\nHost:", "Host: a, b",
    "Host: a b", "Host: a/b", "Host: me@a", "Host: \xe9", "Host : a", " Host: a", "Host: a\n",
)  # fmt: skip
HEADERS = [
    *[ok(line, get("/echo", line)) for line in GOOD_HEADERS],
    *[no(line, get("/echo", line)) for line in BAD_HEADERS],
    *[ok(line, req(host=line)) for line in HOSTS],
    *[no(f"only {line}", req(host=line)) for line in BAD_HOSTS],
    no("no header at all", req(host=None)),
    no("two Hosts on HTTP/1.0", req(HTTP10, "Host: b")),
    no("bare LF ends the head", b"GET /echo HTTP/1.1\r\nHost: a\r\n\n"),
]
BAD_LENGTHS = (  # RFC 9110, 8.6
    "+5", "-5", "5_0", "5 5", "\xd9\xa5", "\xb2", "0x5", "a", "5.0", "5e0", "", '"5"', "5;", "5,", "5, 5", "5, 6",
    "five", "5\r\nContent-Length: 5", "5\r\nContent-Length: 6", "0\r\ncontent-length: 5",
)  # fmt: skip
LENGTHS = ("0005", "\t5 ", "0" * 9000 + "5")
BODIES = [  # RFC 9112, 6.3
    *[ok(f"body {data[:9]!r}", whole(data), "POST", body=data) for data in (b"", b"\r\n\r\n", PROBE, EVERY_BYTE)],
    *[ok(f"length {each:.9}", post(f"Content-Length: {each}"), "POST", body=b"12345") for each in LENGTHS],
    ok("length of zeros", post("Content-Length: 000", body=b""), "POST"),
    ok("body of a GET", get("/echo", "Content-Length: 5") + b"12345", body=b"12345"),
    ok("PUT without a length", req("PUT /echo HTTP/1.1"), "PUT"),
    no("POST without a length", post(), 411),
    no("POST of HTTP/1.0 without a length", req("POST /echo HTTP/1.0"), 411),
    no("length with an underscored name", post("Content_Length: 5"), 411),
    *[no(f"length {value}", post(f"Content-Length: {value}")) for value in BAD_LENGTHS],
    no("bad length of a GET", get("/echo", "Content-Length: -1")),
    *[no(f"length {n:.20}", post(f"Content-Length: {n}"), 413) for n in ("1048577", "9" * 18, "9" * 19, "9" * 9000)],
]
CHUNK = b"5\r\n12345\r\n0\r\n\r\n"
NOT_CHUNKED = ("gzip", "gzip, chunked", "chunked\r\nTransfer-Encoding: chunked", "xchunked", '"chunked"', "")
BAD_CODINGS = ("\x0bchunked", "chunked\r\nContent-Length: 5", "x\r\nContent-Length: 5")
CODINGS = [  # RFC 9112, 6.1 and 6.3
    *[no(f"coding {each}", post(f"Transfer-Encoding: {each}", body=CHUNK), 501) for each in NOT_CHUNKED],
    *[no(f"coding {each}", post(f"Transfer-Encoding: {each}", body=CHUNK)) for each in BAD_CODINGS],
    no("length and coding", post("Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNK)),
    no("chunked on HTTP/1.0", req("POST /echo HTTP/1.0", "Transfer-Encoding: chunked", body=CHUNK)),
    no("chunked", post("Transfer-Encoding: chunked", body=CHUNK), 411),
    no("chunked in other letters", post("transfer-encoding: ChunkeD", body=CHUNK), 411),
    no("chunked GET", get("/echo", "Transfer-Encoding: chunked") + CHUNK, 411),
]
CLOSING = ("close", "CLOSE", "foo, close", "foo\r\nConnection: close", "keep-alive,close")
KEPT_ALIVE = ("keep-alive", "foo, Keep-Alive")
EXPECTATIONS = ("200-ok", "100-continue, x", "")
CONNECTIONS = [  # RFC 9112, 9.3 and 9.6; RFC 9110, 10.1.1
    *[ok(f"Connection: {each}", get("/echo", f"Connection: {each}"), keep_alive=False) for each in CLOSING],
    *[ok(f"Connection: {each}", get("/echo", f"Connection: {each}")) for each in ("keep-alive", "closed, xclose", "")],
    *[ok(f"1.0, {each}", req(HTTP10, f"Connection: {each}"), http10=True) for each in KEPT_ALIVE],
    ok("1.0, keep-alive and close", req(HTTP10, "Connection: keep-alive, close"), http10=True, keep_alive=False),
    ok("1.0 expects nothing", req(HTTP10, "Expect: 200-ok"), http10=True, keep_alive=False),
    ok("expectation without a body", get("/echo", "Expect: 100-Continue")),
    ok("expectation of a body that is there", whole(b"12345", "Expect: 100-continue"), "POST", body=b"12345"),
    *[no(f"Expect: {value}", whole(b"1", f"Expect: {value}"), 417) for value in EXPECTATIONS],
]
CASES = [*REQUEST_LINES, *TARGETS, *HEADERS, *BODIES, *CODINGS, *CONNECTIONS]


@pytest.mark.parametrize(("data", "outcome"), CASES)
def test_a_request_is_taken_or_refused_however_it_is_split_and_so_is_the_next(data: bytes, outcome: Outcome) -> None:
    expected = [outcome] if isinstance(outcome, int) else [outcome, PARSED_PROBE]
    assert outcomes([data + PROBE]) == expected
    if len(data) < 2000:
        assert outcomes([data[i : i + 1] for i in range(len(data))]) == [outcome]
        for cut in range(1, len(data)):
            assert outcomes([data[:cut], data[cut:] + PROBE]) == expected, data[:cut]


AT_LIMITS = req("POST /67890 HTTP/1.1", "X: 1", "Content-Length: 5", body=b"12345")
LIMITS = Limits(head=len(AT_LIMITS) - 9, target=6, headers=3, body=5)
LIMITED = [  # what is one less than that request needs, the request, what becomes of it
    pytest.param({}, AT_LIMITS, Taken("POST", "/67890", b"12345"), id="all at the limits"),
    pytest.param({"head": LIMITS.head - 1}, AT_LIMITS, 431, id="head"),
    pytest.param({"headers": 2}, AT_LIMITS, 431, id="headers"),
    pytest.param({"target": 5}, AT_LIMITS, 414, id="target"),
    pytest.param({"target": 5}, AT_LIMITS.replace(b"/67890", b"/67?90"), 414, id="target with a query"),
    pytest.param({"body": 4}, AT_LIMITS, 413, id="body"),
    pytest.param({}, b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 431, id="head without an end"),
    pytest.param({}, b"GET /" + b"a" * 100_000, 414, id="request line without an end"),
    # A method, two spaces, a version and CRLF in 32 bytes more than a target has, or the line is too long.
    pytest.param({}, b"a" * 36 + b"\r\n" + b"a" * 100, 431, id="request line of the longest kind"),
    pytest.param({}, b"a" * 37 + b"\r\n" + b"a" * 100, 414, id="request line of one byte more"),
]


@pytest.mark.parametrize(("less", "data", "outcome"), LIMITED)
def test_the_limits_are_the_largest_sizes_that_are_taken(less: dict[str, int], data: bytes, outcome: Outcome) -> None:
    limits = replace(LIMITS, **less)
    for cut in (0, *range(limits.head, limits.head + 5)):
        assert outcomes([data[:cut], data[cut:]], limits) == [outcome], cut


def test_the_default_limits_are_these() -> None:
    assert Limits() == Limits(16_384, 100, 8192, 1_048_576, 1000, 10.0, 10.0, 60.0, 65_536, 33_554_432)


@pytest.mark.parametrize("seed", range(5))
def test_pipelined_requests_mean_the_same_however_they_are_split(seed: int) -> None:
    chance = random.Random(seed)
    small = [case.values for case in CASES if len(case.values[0]) < 2000]
    for _ in range(50):
        data, expected = b"", list[Outcome]()
        while len(expected) < 20 and not (expected and isinstance(expected[-1], int)):
            request, outcome = chance.choice(small)
            data, expected = data + request, [*expected, outcome]
        cuts = sorted(chance.choices(range(len(data)), k=chance.choice((1, 10, 200))))
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert outcomes(pieces) == expected


KNOWN = {
    "part of a head": (b"POST /echo HTTP", ("-", "-", {}, False)),
    "part of a body": (whole()[:-1], ("POST", "/echo", {"host": "a", "content-length": "5"}, True)),
    "malformed request line": (b"garbage\r\n\r\n", ("-", "-", {}, False)),
    "malformed header": (post("X : a"), ("POST", "/echo", {}, False)),
    # RFC 9110, 5.3
    "repeated header": (get("/", "X: \t a b \t", "x:\xe9"), ("GET", "/", {"host": "a", "x": "a b, \xe9"}, False)),
}


@pytest.mark.parametrize(("data", "known"), KNOWN.values(), ids=KNOWN)
def test_the_latest_request_is_known_as_far_as_it_has_come(data: bytes, known: tuple[Any, ...]) -> None:
    parser = RequestParser(Limits())
    parser.buffer = data
    with contextlib.suppress(HttpError):
        parser.next()
    request = parser.request
    assert (request.method, request.path, request.headers, parser.awaits_body) == known


def test_remembered_headers_are_those_of_the_same_method_and_version() -> None:
    parser = RequestParser(Limits(), parse_headers(Limits(), cached=64))
    parser.buffer = get() + get() + req(HTTP10) + post(body=b"")
    kept = [request.keep_alive for request in (parser.next(), parser.next(), parser.next()) if request]
    assert kept == [True, True, False]
    with pytest.raises(HttpError, match="Content-Length"):
        parser.next()


def test_the_head_of_a_response_has_what_is_needed_and_no_more() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/plain\r\n"
    assert response_head(200, 5, "text/plain", "") == head
    assert response_head(202, 0, "text/plain", "close") == (
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: close\r\n"
    )


# States


def test_the_table_of_states_is_total_and_leads_to_the_end_from_everywhere() -> None:
    assert set(TRANSITIONS) == set(State) == set(timeouts(Limits()))
    assert [state for state, row in TRANSITIONS.items() if row.get(Event.DROP) is not State.CLOSED] == [State.CLOSED]
    reached = {after for row in TRANSITIONS.values() for after in row.values()}
    assert reached | {State.HEAD} == set(State)


def test_a_request_is_served_only_when_the_one_before_has_its_response_and_none_after_the_last() -> None:
    assert {state for state, row in TRANSITIONS.items() if Event.REQUEST in row} == {State.IDLE, State.HEAD, State.BODY}
    assert {state for state, row in TRANSITIONS.items() if Event.RESPONSE in row} == {State.RESPONDING}
    after_the_last = {State.CLOSING, State.LINGERING, State.CLOSED}
    assert {after for state in after_the_last for after in TRANSITIONS[state].values()} <= after_the_last


def test_what_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="RESPONSE must not happen"):
        TRANSITIONS[State.IDLE][Event.RESPONSE]


def test_a_body_that_comes_in_small_pieces_takes_linear_time() -> None:
    body, parser = bytes(1024 * 1024), RequestParser(Limits())
    parser.feed(post(f"Content-Length: {len(body)}", body=b""))
    began = time.process_time()
    for start in range(0, len(body), 16):
        assert parser.next() is None
        parser.feed(body[start : start + 16])
    assert time.process_time() - began < 2.0, "to copy what has come with each piece takes some ten seconds"
    request = parser.next()
    assert (request and request.body, parser.buffer) == (body, b"")


def test_a_response_without_content_has_no_length() -> None:
    assert b"Content-Length" not in response_head(204, 0, "application/json", "")
