"""Restarts the service under load and counts the requests that fail, as systemd would restart it: the listening socket
stays open all the time and is handed to each process (sd_listen_fds(3)), which says when it is ready (sd_notify(3)).

    python tests/restarts.py                 through nginx with deploy/nginx.conf, in memory and with --db
    python tests/restarts.py --direct        without nginx, a connection for each request
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PLACE, SERVER = ROOT / "deploy" / "nginx.conf", ROOT / "deploy" / "nginx_server.conf"
HANG = 30.0  # seconds after which something has hung; nothing is paced by it
CLIENTS = 128  # threads that send: as many requests can be under way
BODY = json.dumps({"PhoneNumber": "48123456789", "Content": "Your parcel is here"})
# Runs in the child: LISTEN_PID is the process ID that it has then, and keeps.
HAND_OVER = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Service:
    """A listening socket and the process that serves it at the time. A process that ends leaves the socket open."""

    def __init__(self, directory: Path, command: Sequence[str]) -> None:
        self._command = command
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._states = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._states.bind(str(directory / "notify"))
        self._states.settimeout(HANG)
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("SMSPROXY_")}
        self._environ.update(
            NOTIFY_SOCKET=str(directory / "notify"), RECORDING_FILE=str(directory / "taken"), PYTHONPATH=str(HERE)
        )
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts a process; returns when it says that it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HAND_OVER, str(self._listener.fileno()), *self._command],
                pass_fds=[self._listener.fileno()], env=self._environ, stderr=log,
            )  # fmt: skip
        self.wait_for("READY=1")

    def wait_for(self, state: str) -> None:
        """Blocks until the process has notified of this state."""
        while state not in self._states.recv(4096).decode().splitlines():
            pass

    def stop(self) -> int:
        """Ends the process with SIGTERM; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANG)

    def close(self) -> None:
        """Ends what is left, and closes the socket."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(HANG)
        self._listener.close()
        self._states.close()


@contextlib.contextmanager
def serving(directory: Path, *flags: str, command: Sequence[str] = ()) -> Iterator[Service]:
    """A service that has been started, until the block ends."""
    command = command or (sys.executable, str(ROOT / "main.py"))
    service = Service(directory, (*command, "--client", "recording_provider:make_client", *flags))
    try:
        service.start()
        yield service
    finally:
        service.close()


def nginx_files(directory: Path, upstream: int, port: int, place: Path = PLACE, **values: str) -> Path:
    """A configuration with our two files, one of them this, these ports, and these values of directives."""
    changes = [(place, r"^    server \S+:8080\b.*;$", f"    server 127.0.0.1:{upstream};"),
               (SERVER, r"^    listen 80;$", f"    listen 127.0.0.1:{port};"),
               *((SERVER, rf"^    {name} .*?;", f"    {name} {value};") for name, value in values.items())]  # fmt: skip
    texts = {file: file.read_text() for file in (place, SERVER)}
    for file, pattern, new in changes:
        texts[file], count = re.subn(pattern, new, texts[file], flags=re.MULTILINE)
        assert count == 1, pattern
    conf = directory / "conf.d"
    conf.mkdir()
    for file, text in texts.items():
        (conf / f"{file.stem}.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    main = directory / "nginx.conf"
    main.write_text(
        f"{user} daemon off; pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
        f"events {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; {paths} include {conf}/*.conf; }}\n"
    )
    return main


@contextlib.contextmanager
def nginx(directory: Path, upstream: int, place: Path = PLACE, **values: str) -> Iterator[int]:
    """nginx with a configuration of ours in front of the port, until the block ends; gives its own port."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert program is not None, "nginx is not installed"
    with socket.create_server(("127.0.0.1", 0)) as listener:  # nginx takes it over as in an upgrade: no waiting for it
        port: int = listener.getsockname()[1]
        file = nginx_files(directory, upstream, port, place, **values)
        environ = {**os.environ, "NGINX": f"{listener.fileno()};"}
        command = [program, "-e", str(directory / "nginx.log"), "-c", str(file)]
        process = subprocess.Popen(command, env=environ, pass_fds=[listener.fileno()])
    try:
        yield port
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(HANG)


@dataclass(slots=True)
class Load:
    """Sends `requests` messages to the port at `rate` a second, however long each takes; one try each. The rate may be
    infinite: then each client sends as soon as it has its response."""

    port: int
    requests: int
    rate: float
    keep_alive: bool
    accepted: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    marks: dict[int, threading.Event] = field(default_factory=dict)  # set when the request of this number begins
    ended: threading.Event = field(default_factory=threading.Event)  # to be set when no more are to be sent
    _begin: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self) -> None:
        """Blocks until all have their response."""
        self._begin = time.monotonic()
        threads = [threading.Thread(target=self._client, name=f"client-{number}") for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        for number in self._numbers:
            if number >= self.requests or self.ended.wait(self._begin + number / self.rate - time.monotonic()):
                break
            if number in self.marks:
                self.marks[number].set()
            self._request(connection)
        connection.close()

    def _request(self, connection: http.client.HTTPConnection) -> None:
        began = time.monotonic()
        try:
            connection.request("POST", "/sms", BODY, {} if self.keep_alive else {"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
            if response.status == 202:
                self.accepted.append(json.loads(body)["ID"])
            else:
                self.failures.append(f"{response.status} {response.reason}")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.failures.append(repr(error))
        self.waits.append(time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to. `lost` were accepted and neither handed over nor kept, `doubled` handed over twice."""

    accepted: int
    failures: list[str]
    longest: float  # seconds
    lost: int
    doubled: int
    codes: list[int]  # exit codes

    def __str__(self) -> str:
        return (
            f"{len(self.failures)} of {self.accepted + len(self.failures)} requests failed, the longest took"
            f" {self.longest:.2f} s; {self.lost} messages lost, {self.doubled} doubled; exit codes {self.codes}"
        )


def measure(requests: int, rate: float, *, restarts: int = 2, db: bool = False, direct: bool = False) -> Report:
    """Sends the requests while the service restarts so many times."""
    with contextlib.ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        file = directory / "sms.db"
        service = undo.enter_context(serving(directory, "--max-delay", "1", *(("--db", str(file)) if db else ())))
        port = service.port if direct else undo.enter_context(nginx(directory, service.port))
        load = Load(port, requests, rate, keep_alive=not direct)
        marks = [requests * (number + 1) // (restarts + 1) for number in range(restarts)]
        load.marks = {mark: threading.Event() for mark in marks}
        sender = threading.Thread(target=load.run, name="load")
        undo.callback(load.ended.set)  # a restart that fails ends the load, too
        sender.start()
        codes = []
        for mark in marks:
            load.marks[mark].wait(requests / rate + HANG)
            codes.append(service.stop())
            service.start()
        sender.join()
        codes.append(service.stop())
        taken = Counter((directory / "taken").read_text().split())
        waiting = _outbox(file) if db else set()
    lost = sum(1 for message_id in load.accepted if message_id not in taken and message_id not in waiting)
    doubled = sum(1 for times in taken.values() if times > 1)
    return Report(len(load.accepted), load.failures, max(load.waits), lost, doubled, codes)


def _outbox(file: Path) -> set[str]:
    """The IDs of the messages that wait in a database that no process uses."""
    sys.path.insert(0, str(ROOT))
    from sqlite_repository import SqliteRepository

    with contextlib.closing(SqliteRepository(str(file))) as repository:
        batch = repository.claim(sys.maxsize, math.inf, flush=True).batch
    return {entry.message.message_id for entry in batch.entries} if batch else set()


def main() -> int:
    """Prints a line for each kind of repository; returns 1 when a request failed or a message was lost."""
    parser = argparse.ArgumentParser(description="Restarts the service under load and counts the requests that fail.")
    parser.add_argument("--requests", type=int, default=3_000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--direct", action="store_true", help="without nginx, a connection for each request")
    options = parser.parse_args()
    good = True
    for db in (False, True):
        report = measure(options.requests, options.rate, restarts=options.restarts, db=db, direct=options.direct)
        print(f"{'with --db' if db else 'in memory'}: {report}")
        for failure, times in Counter(report.failures).most_common():
            print(f"    {times} times {failure}")
        good &= not (report.failures or report.lost)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
