"""The HTTP front: one selector loop that accepts connections, drives them, and serves an application.

A slow or silent client costs the loop a dictionary entry, not a thread. Handlers run in the loop's thread; what may
block goes to worker threads, which hand their results back by `call_soon`.

An iteration of the loop first reads from everyone who is ready, then lets the application do what can be done for all
of their requests together, and sends the responses at its end: waking the peers one by one in the middle of the work
costs far more context switches (measured: 1.5 times as many POSTs a second).

Nothing here knows of SMS.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import socketserver
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from selectors import EVENT_READ as READ
from typing import Any

from http_connection import Connection
from http_exchange import Application, Front
from http_protocol import CLOSED, NEVER, Limits, State, parse_headers, timeouts
from incident_log import Incidents
from response_counts import ResponseCounts

__all__ = ["FrontServer"]

log = logging.getLogger("smsproxy.http")

ACCEPTS = 64  # connections in an iteration, so that a flood of them does not starve those being served
ACCEPT_PAUSE = 1.0  # seconds without accepting after the system refused
TRANSIENT = {  # accept(2): errors of the one connection that was to be accepted; the next may do better
    errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH,
    errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.ECONNRESET,
}  # fmt: skip
HEADERS_KEPT = 64  # parsed header sections: clients repeat theirs, which saves a quarter of a request's instructions
LONGEST_WAIT = 3600.0  # seconds in one select(), which takes no infinity


class Acceptor:
    """Accepts connections, as many as the server may have. For the loop's thread.

    At the limit the connection that has been idle for longest is closed for a new one. If none is idle, new ones wait
    in the backlog until one closes or becomes idle.
    """

    def __init__(self, server: FrontServer) -> None:
        self._server = server
        self.accepting = False
        self.full = False  # paused at the limit, with no idle connection
        self.again = NEVER  # when to accept again, if nothing else happens before
        self._refused_since: float | None = None  # when the system began to refuse: no file descriptors, no memory

    def start(self) -> None:
        """Accepts from now on, or in a moment if the system refuses to watch the socket."""
        server = self._server
        try:
            server.selector.register(server.socket, READ, self.ready)
        except OSError as error:  # ENOMEM, or ENOSPC: epoll_ctl(2)
            self._refused(error)
        else:
            self.accepting, self.full, self.again = True, False, NEVER

    def pause(self, seconds: float) -> None:
        """Stops accepting, for so long at the most."""
        if self.accepting:
            self._server.selector.unregister(self._server.socket)
            self.accepting = False
        self.again = self._server.now + seconds
        self._server.soonest = min(self._server.soonest, self.again)

    def stop(self) -> None:
        """Accepts no more, for good."""
        self.pause(NEVER)
        self.full = False

    def ready(self, events: int) -> None:
        """Accepts who waits."""
        server = self._server
        for _ in range(ACCEPTS if self.accepting else 0):  # 0: the shutdown came in the same iteration
            idlest = self._idlest() if server.open_connections >= server.limits.connections else None
            if idlest is None and server.open_connections >= server.limits.connections:
                self.full = True
                self.pause(NEVER)
                return
            try:
                connection, address = server.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in TRANSIENT:
                    self._refused(error)
                return
            if self._refused_since is not None:
                log.warning("accepting connections again after %.1f s", server.now - self._refused_since)
                self._refused_since = None
            if idlest is not None:
                idlest.drop("idle for longest, and a new one needs its place")
            connection.setblocking(False)
            server.add(connection, address)

    def _idlest(self) -> Connection | None:
        """The connection that has been idle for longest. It is read from before, since a request may have come in this
        moment. One that is busy again leaves `idle`, and comes back when it becomes idle."""
        idle = self._server.idle
        while idle:
            connection = next(iter(idle))
            if connection.is_idle:
                connection.ready(READ)
            if connection.is_idle:
                return connection
            idle.pop(connection, None)
        return None

    def _refused(self, error: OSError) -> None:
        if self._refused_since is None:
            self._refused_since = self._server.now
            log.warning("not accepting connections for now: %s", error)
        self.pause(ACCEPT_PAUSE)


class Waker:
    """Wakes the loop from other threads and signal handlers, and runs what they hand to it in the loop's thread."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False  # a byte is on its way

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread. Takes no lock."""
        self._calls.append((call, args))
        if not self._woken:  # append first, look second: `calls` clears first, drains second
            self._woken = True
            with contextlib.suppress(OSError):  # the loop is over, and nobody waits for the response
                self._near.send(b"\0")

    def calls(self) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
        """What is to be called now."""
        with contextlib.suppress(BlockingIOError):
            self._far.recv(64)
        self._woken = False
        return [self._calls.popleft() for _ in range(len(self._calls))]  # whatever comes later sends a byte of its own

    def fileno(self) -> int:
        """What becomes readable when the loop is to wake."""
        return self._far.fileno()

    def close(self) -> None:
        """Frees the file descriptors."""
        self._near.close()
        self._far.close()


class FrontServer(HTTPServer):
    """The loop: accepts, watches sockets and deadlines, runs what other threads hand back, and serves `application`.

    Making one listens already (OSError if the address is taken, or if `listener` does not listen); connections wait in
    the backlog until `serve_forever`, which blocks its thread. `shutdown`, `call_soon` and `submit` may be called from
    any thread, the first two also in signal handlers. `listener` is a listening socket to serve in place of the
    address. `responses` counts by route and status. See `Loop` and `Front` for the other attributes.
    """

    request_queue_size = 1024  # the default of 5 drops connections under a burst; the kernel may cap it
    allow_reuse_port = False  # a second process on the same port must fail, not share it

    def __init__(
        self, address: tuple[str, int], application: Application, limits: Limits = Limits(), *, workers: int = 0,
        listener: socket.socket | None = None, clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.application, self.limits = application, limits
        self._clock, self._wall_clock = clock, wall_clock
        self.timeouts: Mapping[State, float] = timeouts(limits)
        self.parse_headers = parse_headers(limits, HEADERS_KEPT)
        self.stopping = False
        self.counts, self.failures = ResponseCounts(), Incidents(log, "requests fail", clock=clock)
        self.now, self.soonest, self.idle_deadline = clock(), NEVER, NEVER
        self.logs_responses = False
        self.large_bodies = Counter[str]()
        self.date = b""
        self._date_until = 0.0
        self.active: dict[Connection, None] = {}
        self.resumed: list[Connection] = []
        self._ending: list[Callable[[Front], None]] = []
        self.idle: OrderedDict[Connection, None] = OrderedDict()
        self._connections: set[Connection] = set()
        self._deadline = NEVER  # when a shutdown drops what is still open
        self._acceptor = Acceptor(self)
        with contextlib.ExitStack() as undo:
            undo.callback(self.server_close)
            self._workers = _started_pool(workers)
            self.selector = selectors.DefaultSelector()
            self._waker = Waker()
            self._listen(address, listener)
            undo.pop_all()

    def _listen(self, address: tuple[str, int], listener: socket.socket | None) -> None:
        if listener is None:
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            super().__init__(address, BaseHTTPRequestHandler)  # which is never made: connections serve themselves
        else:
            self.socket = listener
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError(errno.EINVAL, f"the passed socket, file descriptor {listener.fileno()}, does not listen")
            self.server_address = listener.getsockname()
        self.socket.setblocking(False)
        if self.socket.family in (socket.AF_INET, socket.AF_INET6):
            # Accepted sockets inherit it: without it Nagle's algorithm holds small responses back.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(self._waker, READ, self._run_calls)
        self._acceptor.start()

    def server_bind(self) -> None:
        """Binds without the name look-up of `HTTPServer.server_bind`, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serves until `shutdown`, then until every running request has its response."""
        while not self.stopping or self._connections:
            self.iterate(self.selector.select(min(self.soonest - self.now, LONGEST_WAIT)))

    def iterate(self, events: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        """One iteration of the loop: handles what has become ready, and the deadlines that are past."""
        self._tick()
        for key, mask in events:
            try:  # in place of `_guard`, whose calls cost a twentieth of a GET
                key.data(mask)
            except Exception:
                self._failed(key.data)
        self._end_iteration()
        if self.now >= self.soonest:
            self._check_deadlines()
            self._end_iteration()

    def shutdown(self, timeout: float = 0.0) -> None:
        """Begins the end and returns at once: accepts no more, closes idle connections, and lets running requests
        finish for at most `timeout` seconds; a second call can only shorten that."""
        self.call_soon(self._begin_shutdown, timeout)

    def server_close(self) -> None:
        """Frees the port, the threads and every connection; call it after `serve_forever` has returned."""
        for connection in list(self._connections):
            connection.drop("the server closed")
        parts = vars(self)  # after a constructor that failed some are missing
        if "_workers" in parts:
            self._workers.shutdown(wait=False, cancel_futures=True)
        for name in ("socket", "selector", "_waker"):
            if name in parts:
                parts[name].close()

    # For the application

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread."""
        self._waker.call_soon(call, *args)

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        """Runs `work(*args)`, which may block, in one of the workers."""
        self._workers.submit(work, *args)

    def at_end(self, call: Callable[[Front], None]) -> None:
        """Runs `call` with this server at the end of this iteration; for the loop's thread."""
        self._ending.append(call)

    # For the acceptor and the connections

    def add(self, sock: socket.socket, address: Any) -> None:
        """Takes care of a new connection."""
        connection = Connection(sock, address, self)
        self._connections.add(connection)
        try:  # in place of `_guard`, as above
            connection.ready(READ)  # the request is mostly there already
        except Exception:
            self._failed(connection.ready)

    def watch(self, connection: Connection, before: int, events: int) -> None:
        """See `Loop`. Raises OSError when the system refuses."""
        if not before:
            self.selector.register(connection.socket, events, connection.ready)
        elif events:
            self.selector.modify(connection.socket, events, connection.ready)
        else:
            self.selector.unregister(connection.socket)

    def forget(self, connection: Connection) -> None:
        """Lets go of a connection, which makes room for the next."""
        self._connections.discard(connection)
        self.idle.pop(connection, None)
        if not self._acceptor.accepting and not self.stopping:
            self._acceptor.start()

    # The loop

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """The loop's boundary: an error of ours costs at most the connection that it happened on."""
        try:
            call(*args)
        except Exception:
            self._failed(call)

    def _failed(self, call: Callable[..., None]) -> None:
        log.exception("the server's loop goes on after an error")
        connection = getattr(call, "__self__", None)
        if isinstance(connection, Connection):
            connection.drop("internal error")

    def _tick(self) -> None:
        self.now = self._clock()
        self.idle_deadline = self.now + self.limits.idle_timeout
        if self.now >= self._date_until:  # once a second
            self.logs_responses = log.isEnabledFor(logging.DEBUG)
            wall = self._wall_clock()
            self.date = f"Date: {formatdate(int(wall), usegmt=True)}\r\n\r\n".encode()
            self._date_until = self.now + 1 - wall % 1

    def _end_iteration(self) -> None:
        """First serves everything that can be served, then sends the responses: a `send` for each costs far more."""
        while True:
            while self._ending or self.resumed:
                ending, self._ending = self._ending, []
                for call in ending:
                    self._guard(call, self)
                resumed, self.resumed = self.resumed, []
                for connection in resumed:
                    self._guard(connection.advance)
            if self.counts.new:
                self.counts.count(self._clock())  # before they leave
            if not self.active:
                break
            active, self.active = self.active, {}
            for connection in active:
                if connection.state is not CLOSED:
                    try:
                        connection.end_iteration()  # which may serve requests that waited for it
                    except Exception:
                        self._failed(connection.end_iteration)
        if self.idle:
            self.soonest = min(self.soonest, self.idle_deadline)
            if self._acceptor.full:
                self._acceptor.start()

    def _run_calls(self, events: int) -> None:
        for call, args in self._waker.calls():
            self._guard(call, *args)

    def _check_deadlines(self) -> None:
        self.soonest = NEVER
        if self.now >= self._acceptor.again:
            self._acceptor.start()
        for connection in list(self._connections):
            if self.now >= self._deadline:
                connection.drop("the shutdown took too long")
            elif self.now >= connection.deadline:
                self._guard(connection.expire)
        deadlines = (connection.deadline for connection in self._connections)
        self.soonest = min(self._acceptor.again, self._deadline, *deadlines, NEVER)

    def _begin_shutdown(self, timeout: float) -> None:
        self._deadline = min(self._deadline, self.now + timeout)
        self.soonest = min(self.soonest, self._deadline)
        if self.stopping:
            return
        acceptor, before = self._acceptor, -1
        while acceptor.accepting and before < len(self._connections):  # those who have connected already are served
            before = len(self._connections)
            acceptor.ready(READ)
        self.stopping = True
        acceptor.stop()
        self.socket.close()
        for connection in list(self._connections):
            self._guard(connection.begin_shutdown)


def _started_pool(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads all run. It would start them one by one with the work, and `submit` queues the work before
    it says that the system has no thread left."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="smsproxy-http")
    barrier = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(barrier.wait)
        barrier.wait()
    except RuntimeError:
        barrier.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool
