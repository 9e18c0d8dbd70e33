"""The process and what surrounds it: signals, systemd, file descriptors, and the form of log lines.

Nothing here knows about messages, and nothing reads flags or the environment: `environ` is passed in.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TypeVar

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

__all__ = [
    "EndedBySignal", "JsonFormatter", "OWN_DESCRIPTORS", "ProcessError", "Reactions", "Signals", "TextFormatter",
    "allowed_connections", "configure_logging", "notify", "passed_socket", "within",
]  # fmt: skip

log = logging.getLogger("smsproxy.process")

Result = TypeVar("Result")

OWN_DESCRIPTORS = 128  # file descriptors kept for the database, the provider and whatever else is not a connection
FIRST_PASSED_DESCRIPTOR = 3  # sd_listen_fds(3)
OVERRUN = 5.0  # seconds after its deadline at which a process that has not ended by itself is ended
EXIT_TIME = 2.0  # seconds that the interpreter may take to exit: it joins threads, which may hang
ENDING = (signal.SIGTERM, signal.SIGINT)
LONGEST_WAIT = 3600.0  # seconds; the system's calls take no time of any length
WAKE = b"\0"  # no signal has this number
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # of a terminal, and all that ends a line


class ProcessError(Exception):
    """The process was started in a way that cannot work."""


class EndedBySignal(SystemExit):
    """A signal ends the process before it serves. Who calls somebody else's code, which may exit, lets this pass."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What the call returns or raises, in a thread of its own; TimeoutError when it takes longer. It is left to run
    then, so the process should be about to end."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # the boundary: it is raised in the caller's thread
            results.put((None, error))

    threading.Thread(target=run, name="smsproxy-closer-2", daemon=True).start()
    try:
        result, error = results.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except queue.Empty:
        raise TimeoutError("no result in time") from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


# Signals


@dataclass(frozen=True, slots=True)
class Reactions:
    """What signals do to a process that serves. `stop` and `reload` run in a signal handler: it may interrupt a thread
    that holds a lock, so they take none. `wake` makes the main thread run Python code, which lets handlers run."""

    stop: Callable[[], None]
    reload: Callable[[], None]
    wake: Callable[[], None]
    stop_takes: float  # seconds that the end may take


class Signals:
    """SIGTERM and SIGINT end the process: by `EndedBySignal` before it serves, by `Reactions.stop` once it does.

    A second one ends it at once, whatever it does, also as PID 1, for which the default action of a signal does
    nothing. So does a thread of its own when the end overruns its deadline by more than `OVERRUN` seconds: Python's
    handlers run in the main thread only, which may hang inside a call of the system. SIGHUP calls `Reactions.reload`.

    A context manager, for the main thread. Leaving it restores what was there, unless an end has begun: from then on
    the thread watches the rest of the process's life.
    """

    def __init__(self) -> None:
        self._reactions: Reactions | None = None
        self._ended = False  # by the handler, in the main thread
        self._exit_code: int | None = None  # with which the process exits; None until that is known
        self._exit_by = math.inf  # by time.monotonic(), from when everything is done: the process is ended then
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, name="smsproxy-signals-1", daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(RuntimeError):  # the system has no thread left: the start will fail soon
            self._watcher.start()
        for number in ENDING:
            self._before[number] = signal.signal(number, self._end)
        if "SIGHUP" in signal.Signals.__members__:  # a Unix
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload)
        # Python writes each signal's number there at once, in whichever thread and call it arrives.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._ended:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()
        if self._watcher.is_alive():
            self._watcher.join()
        self._reader.close()

    def react(self, reactions: Reactions) -> None:
        """From now on the process serves."""
        self._reactions = reactions

    def exiting(self, code: int) -> None:
        """Everything is done: the process exits with this code, and is made to if it has not in a moment."""
        self._exit_code = code
        self._exit_by = time.monotonic() + EXIT_TIME
        with contextlib.suppress(OSError):
            self._writer.send(WAKE)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            os._exit(128 + number)
        self._ended = True
        if self._reactions is None:
            raise EndedBySignal(128 + number)
        self._reactions.stop()

    def _reload(self, number: int, frame: FrameType | None) -> None:
        if self._reactions is not None:
            self._reactions.reload()

    def _watch(self) -> None:
        """Sees every signal, also while the main thread hangs; ends with `__exit__` or with the process."""
        first = 0  # the signal that began the end
        began = math.inf  # by time.monotonic()
        while numbers := self._next(first, began):
            for number in numbers:
                if number in ENDING:
                    if first:
                        os._exit(128 + number)
                    first, began = number, time.monotonic()
            if self._reactions is not None and numbers != WAKE:
                self._reactions.wake()

    def _next(self, first: int, began: float) -> bytes:
        """The numbers of signals that came; `WAKE` after some time. Ends the process when its time is over."""
        takes = 0.0 if self._reactions is None else self._reactions.stop_takes
        left = min(began + takes + OVERRUN, self._exit_by) - time.monotonic()
        if left <= 0:
            self._overrun(first)
        self._reader.settimeout(None if left == math.inf else min(left, LONGEST_WAIT))
        try:
            return self._reader.recv(64)
        except TimeoutError:
            return WAKE

    def _overrun(self, first: int) -> NoReturn:
        """Ends the process. If the end of one that served hangs, it says so, unless that hangs, too."""
        code = self._exit_code
        if code is None and self._reactions is None:
            code = 128 + first
        elif code is None:
            with contextlib.suppress(TimeoutError, RuntimeError):
                within(1.0, lambda: log.critical("the end took too long, and is cut short"))
            code = 1
        os._exit(code)


# systemd


def passed_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd, or whoever speaks its protocol, handed to this process: sd_listen_fds(3).

    Raises `ProcessError` for anything but one socket that listens.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()) or environ.get("LISTEN_FDS", "0") == "0":
        return None
    if environ["LISTEN_FDS"] != "1":
        raise ProcessError(f"one listening socket can be handed over, not {environ['LISTEN_FDS']}")
    try:
        passed = socket.socket(fileno=FIRST_PASSED_DESCRIPTOR)
        listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ProcessError(f"what was handed over as a socket is none: {error.strerror}") from None
    if not listens:
        passed.close()
        raise ProcessError("the socket that was handed over does not listen")
    passed.set_inheritable(False)
    return passed


def notify(environ: Mapping[str, str], state: str) -> None:
    """Tells systemd about this process: sd_notify(3). Does nothing elsewhere."""
    if address := environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


# File descriptors


def allowed_connections(wanted: int) -> int:
    """How many connections there are file descriptors for; raises the soft limit for them as far as it goes."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OWN_DESCRIPTORS
    if soft < needed and soft != resource.RLIM_INFINITY:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):  # another limit of the system
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = max(1, soft - OWN_DESCRIPTORS)
    log.warning("at most %d connections at a time, not %d: the limit is %d open files", possible, wanted, soft)
    return possible


# Logging


class TextFormatter(logging.Formatter):
    """One line a record, for people; nothing in the message can begin a line of its own. A traceback is indented."""

    def format(self, record: logging.LogRecord) -> str:
        """An ISO 8601 time (local, with its offset), level, thread, logger, message and, if any, exception."""
        stamp = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        line = f"{stamp} {record.levelname} {record.threadName} {record.name}: {_escaped(record.getMessage())}"
        if record.exc_info:
            line += "".join(f"\n    {_escaped(each)}" for each in self.formatException(record.exc_info).split("\n"))
        return line


def _escaped(text: str) -> str:
    """What could end a line, or move the cursor of a terminal, as Python writes it."""
    return text if text.isprintable() else re.sub(CONTROLS, lambda found: repr(found[0])[1:-1], text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time (UTC), level, logger, thread, message and, if any, exception."""
        stamp = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        doc = {"time": stamp.isoformat(timespec="milliseconds"), "level": record.levelname, "logger": record.name,
               "thread": record.threadName, "message": record.getMessage()}  # fmt: skip
        if record.exc_info:
            doc["exception"] = self.formatException(record.exc_info)
        return json.dumps(doc)


def configure_logging(level: str, style: str) -> None:
    """Logs to standard error from this level on; `style` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
