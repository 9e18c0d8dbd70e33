"""Small tools that several test modules share; the doubles of the provider are in providers.py."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from http_front import FrontServer
from http_protocol import Limits
from providers import HANG as HANG  # handed on
from restapi import RestApi
from smsproxy import SmsProxy

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    """A module that imports this fails each test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), f"{thread.name} was left behind"


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def returned_by(call: Callable[[], Any]) -> Any:
    """What the call returns; fails if it hangs."""
    answers: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answers.put(call()), daemon=True).start()
    try:
        return answers.get(timeout=HANG)
    except queue.Empty:
        raise AssertionError("it hangs") from None


def until(condition: Callable[[], Any]) -> None:
    """Waits for something that can only be asked for; fails if it never happens."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.01)


def together(threads: int, call: Callable[[int], object]) -> None:
    """Calls with 0, 1 and so on, in so many threads at once."""
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        start.wait(HANG)
        call(number)

    started = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(HANG)
        assert not thread.is_alive(), "a thread hangs"


class RestServer(FrontServer):
    """A front that serves the REST interface of a proxy."""

    def __init__(
        self, proxy: SmsProxy, limits: Limits = Limits(), *, address: tuple[str, int] = ("127.0.0.1", 0), **options: Any
    ) -> None:
        self.proxy, self.api = proxy, RestApi(proxy, **options)
        super().__init__(address, self.api, limits, workers=self.api.workers)


@contextlib.contextmanager
def serving(proxy: SmsProxy, limits: Limits = Limits(), **options: Any) -> Iterator[RestServer]:
    """A server for the proxy on a free port of the loopback, in a thread of its own, until the block ends."""
    server = RestServer(proxy, limits, **options)
    thread = threading.Thread(target=server.serve_forever, name="server under test", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown(1.0)
        thread.join(HANG)
        server.server_close()
        assert not thread.is_alive(), "the server did not stop"


class Child(contextlib.AbstractContextManager["Child"]):
    """The command as a process of its own on a free port; its standard error is read as it comes."""

    def __init__(
        self, *argv: str, before: tuple[str, ...] = (), path: Path | str = "", environ: Mapping[str, str] = {}
    ) -> None:
        command = [*before, sys.executable, str(TESTS.parent / "main.py"), "--port", "0", *argv]
        env = os.environ | {"PYTHONPATH": f"{path}{os.pathsep if path else ''}{TESTS}", **environ}
        self.process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.log = ""
        self._over = False
        self._changed = threading.Condition()  # guards both
        self._reader = threading.Thread(target=self._read, name="log of the service", daemon=True)
        self._reader.start()

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.ended()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Blocks until the log matches."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or re.search(pattern, self.log), HANG)
            found = re.search(pattern, self.log)
        assert found is not None, self.log
        return found

    @property
    def server_address(self) -> tuple[str, int]:
        """Where it listens; blocks until it does."""
        return "127.0.0.1", int(self.wait_for(r"listening on 127\.0\.0\.1 port (\d+)")[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Waits for the end; the exit code, negative when a signal was the end."""
        code = self.process.wait(HANG)
        self._reader.join(HANG)
        assert "Traceback" not in self.log
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._changed:
                    self.log += line
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()


class Listening(Protocol):
    """Anything that serves HTTP."""

    @property
    def server_address(self) -> Any:
        """Host, port and whatever else."""


Response = tuple[int, Any, http.client.HTTPMessage]  # status, document or bytes, headers


def raw(method: str, path: str, body: Any = None, *lines: str) -> bytes:
    """One request as bytes; a dict is sent as JSON, and with None there is no length."""
    data = json.dumps(body) if isinstance(body, dict) else body or b""
    data = data.encode() if isinstance(data, str) else data
    length = [] if body is None else [f"Content-Length: {len(data)}"]
    head = [f"{method} {path} HTTP/1.1", "Host: x", *length, *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + bytes(data)


class Peer(contextlib.AbstractContextManager["Peer"]):
    """A client on one connection. Every body that it gets has to end with a newline."""

    def __init__(self, server: Listening) -> None:
        self._socket = socket.create_connection(server.server_address[:2], HANG)
        self._file = self._socket.makefile("rb")

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, method: str = "POST") -> Response:
        """One response to a request with this method."""
        status = int(self._file.readline().split()[1])
        headers = http.client.parse_headers(self._file)
        body = self._file.read(0 if method == "HEAD" else int(headers.get("Content-Length", "0")))
        assert body[-1:] in (b"", b"\n")
        return status, json.loads(body) if body and headers["Content-Type"] == "application/json" else body, headers

    def exchange(self, data: bytes) -> Response:
        self.send(data)
        return self.receive(data.split(b" ")[0].decode())


def exchange(server: Listening, data: bytes) -> Response:
    """One request as bytes on a connection of its own."""
    with Peer(server) as peer:
        return peer.exchange(data)


def request(
    server: Listening, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> Response:
    """One request on a connection of its own."""
    return exchange(server, raw(method, path, body, *(f"{name}: {value}" for name, value in (headers or {}).items())))
