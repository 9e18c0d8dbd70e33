"""A PostgreSQL server and a pooler that belong to the tests. Both refuse to run as root, so they get another user."""
from __future__ import annotations

import contextlib
import os
import pwd
import re
import selectors
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psycopg

__all__ = ["HANG", "Bouncer", "Cluster", "Passage", "find_programs", "free_port", "let_pass", "run_as", "until"]

T = TypeVar("T")

HANG = 60.0  # seconds after which a test has hung; nothing is paced by it


def until(condition: Callable[[], T], what: str, seconds: float = HANG) -> T:
    """Waits for a condition of another process, which can only be asked for; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} never happened"
        time.sleep(0.02)
    return result


def find_programs() -> Path | None:
    """The directory with `initdb` and the others: that of PATH, else of the newest version that Debian has."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    return max(versions, key=lambda path: int(path.parent.name), default=None)


def run_as(directory: Path) -> int | None:
    """The user for the server's processes, and the directory's new owner; None when we need not be another user."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(directory, user.pw_uid, user.pw_gid)
            return user.pw_uid
    raise RuntimeError("there is no user but root")


def free_port() -> int:
    """A port of the loopback that was free just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Cluster:
    """A server in a directory of its own, reachable over TCP on the loopback, with a password and real fsyncs."""

    PASSWORD = "s3cret-pa55word"
    SETTINGS = (
        "listen_addresses=127.0.0.1", "max_connections=200", "shared_buffers=64MB", "log_min_duration_statement=-1",
    )  # fmt: skip

    def __init__(self, programs: Path, user: int | None, directory: Path) -> None:
        self._programs, self.user, self.directory = programs, user, directory
        self._data = directory / "data"
        self.port = free_port()

    def start(self) -> None:
        """Creates the cluster and starts it."""
        secret = self.directory / "password"
        secret.write_text(self.PASSWORD)
        secret.chmod(0o644)
        self._run("initdb", "-D", self._data, "-U", "smsproxy", "-A", "scram-sha-256", "--pwfile", secret, "-E", "UTF8",
                  "--no-locale", "--no-instructions")  # fmt: skip
        self._control("start")

    def stop(self) -> None:
        """Stops it at once, if it runs."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._control("stop", "-m", "immediate")

    def restart(self, mode: str) -> None:
        """Restarts it; `immediate` is as good as a power failure to it."""
        self._control("restart", "-m", mode)

    def halt(self) -> None:
        """Stops it until `resume`."""
        self._control("stop", "-m", "fast")

    def resume(self) -> None:
        """Starts it again."""
        self._control("start")

    def url(self, database: str, port: int | None = None) -> str:
        """The URL of a database, with the password in it."""
        return f"postgresql://smsproxy:{self.PASSWORD}@127.0.0.1:{port or self.port}/{database}"

    def create(self, database: str) -> str:
        """Creates a database; returns its URL."""
        self.sql("postgres", f"CREATE DATABASE {database}")
        return self.url(database)

    def sql(self, database: str, statement: str, *parameters: Any) -> list[Any]:
        """Runs a statement; returns its rows. `database` may be a URL."""
        with psycopg.connect(database if "://" in database else self.url(database), autocommit=True) as db:
            cursor = db.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def log(self) -> str:
        """What the server logged."""
        return (self.directory / "log").read_text(errors="replace")

    def _control(self, *arguments: str) -> None:
        settings = "".join(f" -c {setting}" for setting in self.SETTINGS)
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "60", "-l", self.directory / "log",
                  "-o", f"-p {self.port} -k {self.directory}{settings}", *arguments)  # fmt: skip

    def _run(self, program: str, *arguments: Any) -> None:
        command = [str(self._programs / program), *map(str, arguments)]
        # pg_ctl's server keeps the descriptors, so a pipe would never end.
        with open(self.directory / "commands", "ab") as output:
            subprocess.run(command, check=True, user=self.user, cwd=self.directory, stdin=subprocess.DEVNULL,
                           stdout=output, stderr=output, timeout=HANG)  # fmt: skip


def let_pass(cluster: Cluster, url: str, seconds: float) -> None:
    """Lets time pass for the database: all that it wrote down lies so much further back."""
    moved = {
        "outbox": ("accepted_at", "due", "expires"), "message": ("changed_at",), "batch": ("lease_until",),
        "change": ("changed_at",), "body": ("since", "until", "lease_until"),
        "pulse": ("resumed_at", "front", "next_front"),
    }  # fmt: skip
    # Under a lock on all rows, because the update would lock them in no order that others know; and each table by
    # itself, so that no locks are held together.
    cluster.sql(url, " ".join(
        f"BEGIN; LOCK TABLE smsproxy.{table} IN EXCLUSIVE MODE; UPDATE smsproxy.{table} SET "
        + ", ".join(f"{each} = {each} - interval '{seconds} s'" for each in columns) + "; COMMIT;"
        for table, columns in moved.items()
    ))  # fmt: skip


class Passage:
    """A way to the server on which bytes can get lost from one moment on, as behind a network that is cut."""

    def __init__(self, cluster: Cluster) -> None:
        self._server = ("127.0.0.1", cluster.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._cut, self._closed = threading.Event(), threading.Event()
        self.swallowed = threading.Event()  # set when a byte got lost
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """From now on nothing arrives on either side; connections can still be made."""
        self._cut.set()

    def close(self) -> None:
        """Ends all connections."""
        self._closed.set()
        self._thread.join(HANG)

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._selector)
            stack.enter_context(self._listener)
            self._selector.register(self._listener, selectors.EVENT_READ, None)
            while not self._closed.is_set():
                for key, _ in self._selector.select(0.05):
                    if key.data is None:
                        pair = self._listener.accept()[0], socket.create_connection(self._server)
                        for one, other in (pair, pair[::-1]):
                            stack.enter_context(one)
                            self._selector.register(one, selectors.EVENT_READ, other)
                    else:
                        self._pass_on(key.fileobj, key.data)

    def _pass_on(self, source: Any, target: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(65_536)
        if self._cut.is_set():
            self.swallowed.set()
        else:
            with contextlib.suppress(OSError):
                target.sendall(data) if data else target.shutdown(socket.SHUT_WR)
        if not data:
            self._selector.unregister(source)


class Bouncer:
    """PgBouncer in transaction mode, with fewer connections to the server than one process opens to it."""

    def __init__(self, program: str, cluster: Cluster) -> None:
        self._program, self._cluster = program, cluster
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls, cluster: Cluster) -> Bouncer | None:
        """The pooler, if it is installed."""
        program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
        return cls(program, cluster) if program else None

    def start(self) -> None:
        """Starts it; returns when it listens."""
        directory = self._cluster.directory
        users, settings, log = (directory / f"bouncer.{name}" for name in ("users", "ini", "log"))
        users.write_text(f'"smsproxy" "{Cluster.PASSWORD}"\n')
        settings.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._cluster.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nunix_socket_dir =\nauth_type = plain\nauth_file = {users}\n"
            "pool_mode = transaction\ndefault_pool_size = 3\n"
        )
        for path in (users, settings):
            path.chmod(0o644)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [self._program, str(settings)], user=self._cluster.user, stdout=output, stderr=output, cwd=directory
            )
        until(self._listens, "the start of pgbouncer")

    def url(self, url: str) -> str:
        """The URL of the same database through the pooler."""
        return re.sub(r":\d+/", f":{self.port}/", url)

    def stop(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(HANG)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False
