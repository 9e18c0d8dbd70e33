"""The loop of the HTTP front: accepting, the limit of connections, threads that hand work to it, the shutdown."""
from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import http_front
from helpers import HANG, every_thread_ends, together
from http_connection import SHUTDOWN_GRACE
from http_doubles import DrivenFront, Echo, Peer, address_of, driven, front, get, whole
from http_exchange import Exchange
from http_front import FrontServer
from http_protocol import Limits

__all__ = ["every_thread_ends", "front"]  # fixtures

Log = pytest.LogCaptureFixture
LATER, LARGE_GET = get("/later"), get("/large")
HALF_HEAD, HALF_BODY = get("/")[:-1], whole()[:-1]
LONG_TIME = 3600.0  # seconds, beyond every limit


@contextlib.contextmanager
def serving(front: FrontServer) -> Iterator[FrontServer]:
    """The front with a real clock, in a thread of its own."""
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        yield front
    finally:
        front.shutdown()
        thread.join(HANG)
        front.server_close()
        assert not thread.is_alive(), "serve_forever did not return"


def connect(front: FrontServer) -> socket.socket:
    return socket.create_connection(address_of(front), HANG)


# At the limit of connections


def test_for_a_new_connection_the_one_that_has_been_idle_for_longest_is_closed() -> None:
    with driven(Limits(connections=3)) as front:
        peers = [front.connect() for _ in range(3)]
        assert [peer.works for peer in peers] == [True] * 3
        for number in (1, 0):  # so that 2 has been idle for longest, then 1
            front.wait(1.0)
            assert peers[number].works
        assert front.connect().works
        assert peers[2].has_ended
        assert front.connect().works
        assert peers[1].has_ended
        assert peers[0].works
        assert front.open_connections == 3


def test_a_thousand_idle_connections_lock_nobody_out() -> None:
    with driven() as front:
        idle = [front.connect() for _ in range(1000)]
        assert [peer.works for peer in idle] == [True] * 1000
        assert front.open_connections == 1000
        assert front.connect().works  # at once: the clock stands still
        assert idle[0].has_ended
        assert all(peer.works for peer in idle[1:])
        assert front.open_connections == 1000


def test_a_thousand_connections_that_never_sent_anything_lock_nobody_out() -> None:
    with driven() as front:
        silent = [front.connect() for _ in range(1000)]
        front.settle()
        assert front.connect().works
        assert silent[0].has_ended


@pytest.mark.parametrize("begun", [LATER, HALF_HEAD, HALF_BODY, LARGE_GET])
def test_a_connection_with_a_request_under_way_is_never_closed_for_a_new_one(begun: bytes) -> None:
    with driven(Limits(connections=2)) as front:
        peers = [front.connect().send(begun) for _ in range(2)]
        waiting = front.connect().send(get("/"))
        assert waiting.is_silent
        assert front.open_connections == 2
        peers[0].reset()
        assert waiting.echoed() == ("/", "")


def test_a_connection_that_becomes_idle_makes_room_for_one_that_waits() -> None:
    with driven(Limits(connections=2)) as front:
        peers = [front.connect().send(LATER) for _ in range(2)]
        waiting = front.connect().send(get("/"))
        assert waiting.is_silent
        front.finish()
        assert waiting.echoed() == ("/", "")
        assert peers[0].response().status == 200
        assert peers[0].has_ended
        front.finish()
        assert peers[1].response().status == 200


def test_a_request_that_has_just_come_saves_its_connection_from_being_closed() -> None:
    with driven(Limits(connections=2)) as front:
        peers = [front.connect(), front.connect()]
        assert [peer.works for peer in peers] == [True, True]
        new = front.connect()
        peers[0].socket.sendall(get("/"))  # not read yet when room is made
        front._acceptor.ready(selectors.EVENT_READ)
        assert peers[0].echoed() == ("/", "")
        assert peers[1].has_ended
        assert new.works


def test_nothing_is_kept_of_connections_that_have_closed(front: DrivenFront) -> None:
    peers = [front.connect() for _ in range(3)]
    assert [peer.works for peer in peers] == [True] * 3
    for peer in peers:
        peer.half_close()
    front.settle()
    assert (front.open_connections, list(front.idle), front.active) == (0, [], {})


def test_nobody_is_closed_at_the_limit_while_nobody_waits() -> None:
    with driven(Limits(connections=2)) as front:
        peers = [front.connect(), front.connect()]
        assert [peer.works for peer in peers] == [True, True]
        front._acceptor.ready(selectors.EVENT_READ)
        assert [peer.works for peer in peers] == [True, True]


def test_room_is_made_without_a_look_at_every_connection() -> None:
    """Busy connections that are still listed as idle are looked at once each, not once for each new connection."""
    with driven(Limits(connections=200)) as front:
        busy = [front.connect() for _ in range(199)]
        assert all(peer.works for peer in busy)
        for peer in busy:
            peer.send(LATER)
        front.settle()
        assert len(front.idle) == 199
        for _ in range(2):
            assert front.connect().works
        assert len(front.idle) == 1


# Accepting


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL])
def test_when_the_system_refuses_to_accept_it_pauses_and_says_so_twice(
    front: DrivenFront, caplog: Log, code: int
) -> None:
    other = front.connect()
    assert other.works
    front.listener.errors, tries = [code] * 3, front.listener.tries
    peer = front.connect().send(get("/"))
    for count in (1, 2, 3):
        for _ in range(2):
            assert (peer.is_silent, other.works, front.listener.tries - tries) == (True, True, count)
            front.wait(http_front.ACCEPT_PAUSE / 2)
    assert peer.echoed() == ("/", "")
    begin = f"not accepting connections for now: [Errno {code}] {errno.errorcode[code]}"
    assert caplog.messages == [begin, "accepting connections again after 3.0 s"]


def test_a_connection_that_closes_ends_the_pause(front: DrivenFront) -> None:
    other = front.connect()
    assert other.works
    front.listener.errors = [errno.EMFILE]
    peer = front.connect().send(get("/"))
    assert peer.is_silent
    other.half_close()
    assert peer.echoed() == ("/", "")


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EAGAIN])
def test_a_connection_that_cannot_be_accepted_costs_nobody_else_anything(
    front: DrivenFront, caplog: Log, code: int
) -> None:
    front.listener.errors = [code]
    assert front.connect().works
    assert caplog.messages == []


def test_accepting_goes_on_after_the_system_refused_to_watch_the_listening_socket(
    front: DrivenFront, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    """One failed epoll_ctl(2), as accepting begins again, must not end accepting for good."""
    front.listener.errors = [errno.EMFILE]
    peer = front.connect().send(get("/"))
    assert peer.is_silent

    def fail(fileobj: Any, events: int, data: Any = None) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(front.selector, "register", fail)
        front.wait(http_front.ACCEPT_PAUSE)
        assert peer.is_silent
    front.wait(http_front.ACCEPT_PAUSE)
    assert peer.echoed() == ("/", "")
    assert [text.split(":")[0] for text in caplog.messages] == [
        "not accepting connections for now", "accepting connections again after 2.0 s"]  # fmt: skip


def test_a_passed_socket_that_does_not_listen_is_refused_at_the_start() -> None:
    with socket.socket() as unbound, pytest.raises(OSError, match=f"descriptor {unbound.fileno()}, does not listen"):
        FrontServer(("127.0.0.1", 0), Echo(), listener=unbound)
    near, far = socket.socketpair()
    with near, far, pytest.raises(OSError, match="does not listen"):
        FrontServer(("127.0.0.1", 0), Echo(), listener=near)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_taken_from_the_constructor_to_server_close(host: str) -> None:
    front = FrontServer((host, 0), Echo())
    address = address_of(front)
    assert front.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # connections inherit it
    with pytest.raises(OSError, match="in use") as caught:
        FrontServer(address, Echo())
    assert caught.value.errno == errno.EADDRINUSE
    front.server_close()
    FrontServer(address, Echo()).server_close()


@pytest.mark.parametrize("peer", ["local", "127.0.0.1"])
def test_connections_wait_in_the_backlog_until_it_serves(tmp_path: Path, peer: str, caplog: Log) -> None:
    caplog.set_level(logging.DEBUG)
    listener = socket.create_server(str(tmp_path / "front"), family=socket.AF_UNIX) if peer == "local" else None
    front = FrontServer(("127.0.0.1", 0), Echo(), listener=listener)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(front.socket.family)) for _ in range(100)]
        for client in clients:
            client.settimeout(HANG)
            client.connect(front.server_address)
            client.sendall(get("/", "Connection: close"))
        front.shutdown(LONG_TIME)
        front.serve_forever()
        front.server_close()
        assert {client.recv(15) for client in clients} == {b"HTTP/1.1 200 OK"}
    assert set(caplog.messages) == {f"{peer} GET </> 200", f"{peer} connection closed: done"}


# Other threads


def test_calls_from_other_threads_run_in_the_loop_and_none_is_lost() -> None:
    calls: list[threading.Thread] = []
    finished = threading.Event()
    with serving(FrontServer(("127.0.0.1", 0), Echo())) as front:

        def call_often(number: int) -> None:
            for _ in range(500):
                front.call_soon(lambda: calls.append(threading.current_thread()))

        together(8, call_often)
        front.call_soon(finished.set)
        assert finished.wait(HANG)
    assert (len(calls), len(set(calls)), threading.current_thread() in calls) == (4000, 1, False)


def test_what_may_block_runs_in_a_worker_and_hands_its_result_back() -> None:
    echo, workers = Echo(), []

    def work(exchange: Exchange) -> None:
        workers.append(threading.current_thread().name)
        exchange.front.call_soon(exchange.finish, echo.echo)

    def blocks(exchange: Exchange) -> None:
        echo.defer(exchange)
        exchange.front.submit(work, exchange)

    echo.routes["/blocks"] = blocks
    with serving(FrontServer(("127.0.0.1", 0), echo, workers=2)) as front, connect(front) as client:
        client.sendall(get("/blocks") * 3 + get("/", "Connection: close"))
        received = client.makefile("rb").read()
    assert received.count(b"200 OK") == 4
    assert {name.rpartition("_")[0] for name in workers} == {"smsproxy-http"}


@pytest.mark.parametrize(("limits", "data", "responses"), [
    (Limits(read_timeout=0.05), HALF_HEAD, 1), (Limits(idle_timeout=0.05), get("/"), 1),
    (Limits(read_timeout=0.05), b"", 0)])  # fmt: skip
def test_the_loop_wakes_by_itself_at_a_deadline(limits: Limits, data: bytes, responses: int) -> None:
    with serving(FrontServer(("127.0.0.1", 0), Echo(), limits)) as front, connect(front) as client:
        client.sendall(data)
        assert client.makefile("rb").read().count(b"HTTP/1.1 ") == responses


def test_the_loop_wakes_by_itself_at_the_deadline_of_a_shutdown() -> None:
    front = FrontServer(("127.0.0.1", 0), Echo())
    with connect(front) as client:
        client.sendall(LATER)
        front.shutdown(0.05)
        front.serve_forever()
        front.server_close()
        assert client.recv(1) == b""


def test_an_error_of_a_call_or_at_the_end_of_an_iteration_is_logged(front: DrivenFront, caplog: Log) -> None:
    def fail(*args: object) -> None:
        raise ArithmeticError("a bug")

    front.call_soon(fail)
    front.settle()
    assert caplog.messages == ["the server's loop goes on after an error"]
    front.call_soon(front.at_end, fail)
    assert front.connect().works
    assert caplog.messages == ["the server's loop goes on after an error"] * 2


def test_a_pool_that_the_system_has_no_threads_for_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        FrontServer(("127.0.0.1", 0), Echo(), workers=5)
    for thread in started:
        thread.join(HANG)
    assert [thread.is_alive() for thread in started] == [False] * 3


# The shutdown


def idle(front: DrivenFront) -> Peer:
    peer = front.connect()
    assert peer.works
    return peer


@pytest.mark.parametrize("begin", [DrivenFront.connect, idle])
def test_at_a_shutdown_an_idle_connection_has_a_moment_for_a_request_that_is_on_its_way(
    front: DrivenFront, begin: Callable[[DrivenFront], Peer]
) -> None:
    peers = [begin(front), begin(front)]
    front.shutdown(LONG_TIME)
    front.wait(0.15)
    assert [peer.is_silent for peer in peers] == [True, True]
    assert peers[0].send(get("/")).response().headers["connection"] == "close"
    front.wait(0.1)
    assert [peer.has_ended for peer in peers] == [True, True]
    assert front.open_connections == 0


@pytest.mark.parametrize(("part", "rest"), [(HALF_HEAD, b"\n"), (HALF_BODY, b"5")])
def test_at_a_shutdown_half_a_request_has_a_second(front: DrivenFront, part: bytes, rest: bytes) -> None:
    quick, slow = front.connect().send(part), front.connect().send(part)
    front.settle()
    front.shutdown(LONG_TIME)
    front.wait(0.75)
    response = quick.send(rest).response()
    assert (response.status, response.headers["connection"]) == (200, "close")
    front.wait(0.25)
    assert slow.response().status == 408
    slow.reset()
    front.settle()
    assert front.open_connections == 0


def test_at_a_shutdown_a_peer_that_does_not_read_has_a_second(front: DrivenFront) -> None:
    quick, slow = front.connect().send(LARGE_GET), front.connect().send(LARGE_GET)
    front.settle()
    front.shutdown(LONG_TIME)
    front.wait(0.75)
    assert quick.response().status == 200
    assert front.open_connections == 2
    front.wait(0.25)
    assert quick.has_ended
    assert front.open_connections == 0
    slow.socket.close()


def test_at_a_shutdown_a_request_under_way_gets_its_response_and_none_behind_it_is_served(front: DrivenFront) -> None:
    peer = front.connect().send(LATER + get("/"))
    front.settle()
    front.shutdown(LONG_TIME)
    front.wait(1800.0)
    assert peer.is_silent
    front.finish()
    assert peer.response().headers["connection"] == "close"
    assert peer.has_ended
    peer.half_close()
    front.settle()
    assert (front.open_connections, front.echo.seen) == (0, ["/later"])


@pytest.mark.parametrize("timeouts", [(10.0,), (10.0, LONG_TIME), (LONG_TIME, 10.0)])
def test_a_shutdown_ends_at_its_shortest_timeout(front: DrivenFront, caplog: Log, timeouts: tuple[float, ...]) -> None:
    peer = front.connect().send(LATER)
    front.settle()
    for timeout in timeouts:
        front.shutdown(timeout)
    front.wait(9.5)
    assert peer.is_silent
    with pytest.raises(ConnectionRefusedError):
        front.connect()
    front.wait(0.5)
    assert peer.has_ended
    front.server_close()
    front.echo.deferred.pop().finish(front.echo.echo)  # after the end, which hurts nobody
    assert (front.counts.by_status(), caplog.messages) == ({}, [])


def test_all_who_connected_before_the_shutdown_are_served(front: DrivenFront) -> None:
    peers = [front.connect() for _ in range(3 * http_front.ACCEPTS)]
    for peer in peers:
        peer.socket.sendall(get("/"))
    front.shutdown(LONG_TIME)
    assert [peer.response().status for peer in peers] == [200] * len(peers)
    front.wait(SHUTDOWN_GRACE)
    assert front.open_connections == 0


def test_a_request_that_comes_in_the_iteration_of_the_shutdown_is_served(front: DrivenFront) -> None:
    peer = front.connect()
    assert peer.works

    def send_late(server: Any) -> None:  # after everyone has been read from
        assert front.stopping
        peer.socket.sendall(get("/"))

    front.shutdown(LONG_TIME)
    front.call_soon(front.at_end, send_late)
    assert peer.response().headers["connection"] == "close"
    assert peer.has_ended


def test_a_shutdown_at_the_limit_of_connections_accepts_no_more_and_is_quiet(caplog: Log) -> None:
    with driven(Limits(connections=2)) as front:
        peers = [front.connect().send(LATER) for _ in range(2)]
        front.settle()
        waiting = front.connect()
        front.settle()
        front.shutdown(LONG_TIME)
        front.settle()
        front.finish()
        front.finish()
        assert [peer.response().status for peer in peers] == [200, 200]
        front.settle()
        assert front.open_connections == 0
        waiting.socket.close()
    assert caplog.messages == []


def test_a_connection_that_is_idle_as_the_shutdown_begins_at_the_limit_does_not_begin_accepting_again(
    caplog: Log,
) -> None:
    with driven(Limits(connections=2)) as front:
        busy = front.connect().send(LATER)
        front.settle()
        silent, waiting = front.connect(), front.connect()
        front.shutdown(LONG_TIME)
        front.settle()
        front.wait(SHUTDOWN_GRACE)
        assert silent.has_ended
        front.finish()
        assert busy.response().status == 200
        front.settle()
        assert front.open_connections == 0
        waiting.socket.close()
    assert caplog.messages == []


def test_server_close_closes_what_an_interrupted_loop_left() -> None:
    echo = Echo()

    def interrupted(exchange: Exchange) -> None:
        raise KeyboardInterrupt

    echo.routes["/interrupts"] = interrupted
    front = FrontServer(("127.0.0.1", 0), echo)
    with connect(front) as client:
        client.sendall(get("/interrupts"))
        with pytest.raises(KeyboardInterrupt):
            front.serve_forever()
        assert front.open_connections == 1
        front.server_close()
        assert (front.open_connections, client.recv(1)) == (0, b"")
