"""The command: flags and environment in, the parts wired together, run until a signal, drained.

Only this module reads flags, the environment and signals.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":  # before the other imports: a Ctrl-C during them is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import importlib
import ipaddress
import json
import logging
import math
import operator
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

from fastsmsing import FastSmsingClient, InMemoryClient
from http_front import Limits
from restapi import SmsServer
from smsproxy import RETENTION, InMemoryRepository, Repository, SmsProxy, SmsProxyConfig, SmsProxyError, ValidationError
from sqlite_repository import SqliteRepository, check_file

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

__version__ = "0.2.0"

log = logging.getLogger("smsproxy.main")

OWN_DESCRIPTORS = 128  # file descriptors kept for the database, the provider and whatever else is not a connection
FIRST_PASSED_DESCRIPTOR = 3  # sd_listen_fds(3)


# Flags


def program() -> str:
    """What this program was started as: main.py, or the installed command."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("smsproxy") else "main.py"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit 2, as argparse does, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = 1e12, *, optional: bool = False) -> Callable[[str], Any]:
    """A flag's type: a number within bounds, or `none` where the setting can be off."""

    def parse(text: str) -> Any:
        if optional and text.lower() in ("none", "off"):
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            bounds = f"at least {low:g}" if high == 1e12 else f"{low:g} to {high:g}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}, {bounds}{', or none' if optional else ''}")
        return value

    return parse


def text(value: str) -> str:
    """A flag's type: a non-empty string."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def choice(*values: str) -> Callable[[str], str]:
    """A flag's type: one of a few words."""

    def parse(value: str) -> str:
        if value.lower() not in values:
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(values)}")
        return value.lower()

    return parse


FLAGS: dict[str, tuple[tuple[str, Callable[[str], Any], str | None, str], ...]] = {
    "serving": (
        ("host", text, "127.0.0.1", "address to listen on"),
        ("port", number(int, 0, 65535), "8080", "port to listen on; 0 picks a free one and logs it"),
        ("max-connections", number(int, 1), "1000", "connections open at a time; more wait in the backlog"),
        ("api-keys-file", text, None, "file with API keys, one a line, as NAME KEY; SIGHUP reads it again"),
    ),
    "batching": (
        ("batch-size", number(int, -1e12), "100", "the most messages in one request; 1 or less: no batching"),
        ("max-delay", number(float, 0, optional=True), "5", "longest linger of a message, in seconds, or none"),
        ("senders", number(int, 1), "4", "requests to the provider at a time"),
        ("max-pending", number(int, 1), "100000", "messages accepted and not yet handed over; more get a 503"),
    ),
    "the provider": (
        ("client", text, "fastsmsing:InMemoryClient", "MODULE:FACTORY that makes the FastSmsingClient"),
        ("max-attempts", number(int, -1e12, optional=True), "100", "tries per batch, or none for no limit"),
        ("backoff-base", number(float, 0), "0.5", "seconds before the second try; doubled for each one after it"),
        ("backoff-max", number(float, 0), "30", "the longest wait between two tries, in seconds"),
        ("max-age", number(float, 0, optional=True), "none", "seconds after which a message is not sent any more"),
    ),
    "keeping": (
        ("db", text, None, "SQLite file or postgresql:// URL that keeps messages and statuses (default: memory)"),
        ("retention", number(float, 0), f"{RETENTION:g}", "seconds to remember a message after a change; 0: for ever"),
        ("lease", number(float, 3), "30", "PostgreSQL: seconds until others send the batches of a dead process"),
    ),
    "running": (
        ("drain-timeout", number(float, 0, 1e9), "10", "seconds to hand over what is pending when told to stop"),
        ("log-level", choice("debug", "info", "warning", "error"), "info", "least level that is logged"),
        ("log-format", choice("text", "json"), "text", "text for people, json for machines"),
    ),
}
VARIABLES = {"SMSPROXY_API_KEYS"} | {
    "SMSPROXY_" + name.upper().replace("-", "_") for flags in FLAGS.values() for name, *_ in flags
}


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """The settings; a flag beats the environment. Exits with 2 and one line when one is wrong."""
    parser = Parser(
        prog=program(),
        description="Takes text messages one by one and hands them to FastSMSing in batches, each one paid request.",
        epilog="Every setting can come from the environment, too: --max-delay from SMSPROXY_MAX_DELAY, and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"smsproxy {__version__}")
    parser.add_argument("--check", action="store_true", help="check settings, client and database, then exit")
    parser.add_argument("--max-batch-size", nargs="?", const="", help=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, meaning in flags:
            given = environ.get("SMSPROXY_" + name.upper().replace("-", "_")) or default
            meaning += f" (default: {default})" if default else ""
            group.add_argument(f"--{name}", type=kind, default=given, help=meaning, metavar=name.split("-")[-1].upper())
    for variable in sorted(name for name in environ if name.startswith("SMSPROXY_") and name not in VARIABLES):
        nearest = difflib.get_close_matches(variable, VARIABLES, 1, 0.0)[0]
        parser.error(f"unknown environment variable {variable}; did you mean {nearest}?")
    options = parser.parse_args(argv)
    if options.max_batch_size is not None:
        parser.error("argument --max-batch-size: is gone; --batch-size is the most messages in one request")
    try:
        names = {field.name for field in dataclasses.fields(SmsProxyConfig)}
        options.config = SmsProxyConfig(**{name: value for name, value in vars(options).items() if name in names})
        options.api_keys = api_keys(options.api_keys_file, environ)
        options.make_client = load(options.client)
    except ValidationError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.problem}")
    return options


def api_keys(path: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The keys of the environment and of the file, by name; a wrong one is refused without showing it."""
    given = environ.get("SMSPROXY_API_KEYS", "")
    lines = [(f"environment {number}", key.strip()) for number, key in enumerate(given.split(","), 1)]
    try:
        in_file = Path(path).read_text("utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError("api_keys_file", f"cannot be read: {error}") from None
    for number, line in enumerate(in_file, 1):
        words = line.split()
        if len(words) > 2:
            raise ValidationError("api_keys_file", f"must have NAME KEY in a line, or KEY alone; see line {number}")
        lines.append((words[0] if len(words) == 2 else f"line {number}", words[-1] if words else ""))
    keys: dict[str, str] = {}
    for name, key in lines:
        if not (key.isascii() and key.isprintable() and name.isprintable() and " " not in key):
            raise ValidationError("api_keys_file", "and $SMSPROXY_API_KEYS must hold visible ASCII characters only")
        if key and name in keys:
            raise ValidationError("api_keys_file", f"has two keys with the name {name}")
        if key:
            keys[name] = key
    if (path or given) and not keys:  # meant to be guarded: do not open it
        raise ValidationError("api_keys_file", "and $SMSPROXY_API_KEYS hold no key")
    return keys


# Parts


def load(factory: str) -> Callable[[], FastSmsingClient]:
    """The callable that `MODULE:FACTORY` names; modules are found in the working directory, too."""
    module, _, name = factory.partition(":")
    sys.path.append(os.getcwd())
    try:
        found: Any = operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # the module's own code runs
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValidationError("client", f"{factory!r} cannot be loaded as MODULE:FACTORY: {why}") from None
    if not callable(found):
        raise ValidationError("client", f"{factory!r} is not callable")
    return cast(Callable[[], FastSmsingClient], found)


def make_client(factory: Callable[[], FastSmsingClient]) -> FastSmsingClient:
    """The client; raises `SmsProxyError` when there is none."""
    try:
        client = factory()
    except Exception as error:  # somebody else's code
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise SmsProxyError(f"the client cannot be made: {why}") from error
    if not all(callable(getattr(client, name, None)) for name in ("send", "subscribe", "stop")):
        raise SmsProxyError(f"the client has no send, subscribe and stop: {type(client).__name__}")
    if isinstance(client, InMemoryClient):
        log.warning("this is the provider's stand-in: nothing is sent to anybody (--client names the real one)")
    return client


def is_url(db: str | None) -> bool:
    """Whether the database is PostgreSQL."""
    return (db or "").startswith(("postgresql://", "postgres://"))


def make_repository(options: argparse.Namespace) -> Repository:
    """Where messages are kept; raises `SmsProxyError` when that cannot be used."""
    if not options.db:
        log.info("messages and statuses live in memory: a restart loses them (--db keeps them)")
        return InMemoryRepository(options.retention)
    if not is_url(options.db):
        return SqliteRepository(options.db, options.retention)
    try:
        postgres: Any = importlib.import_module("postgres")
    except ImportError as error:
        raise SmsProxyError(f"PostgreSQL needs psycopg ({error.name}): pip install 'smsproxy[postgres]'") from None
    repository: Repository = postgres.PostgresRepository(options.db, options.retention, lease=options.lease)
    return repository


def passed_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd, or whoever speaks its protocol, handed to this process: sd_listen_fds(3)."""
    if environ.get("LISTEN_PID") != str(os.getpid()) or environ.get("LISTEN_FDS", "0") == "0":
        return None
    if environ["LISTEN_FDS"] != "1":
        raise SmsProxyError(f"one listening socket can be handed over, not {environ['LISTEN_FDS']}")
    return socket.socket(fileno=FIRST_PASSED_DESCRIPTOR)


def notify(environ: Mapping[str, str], state: str) -> None:
    """Tells systemd about this process: sd_notify(3). Does nothing elsewhere."""
    if address := environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def connections(wanted: int) -> int:
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
    log.warning("%d connections at a time in place of %d: the limit is %d open files", possible, wanted, soft)
    return possible


# Logging


class TextFormatter(logging.Formatter):
    """One line a record, for people; nothing in the message can begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """An ISO 8601 time (local, with its offset), level, thread, logger, message and, if any, exception."""
        message = record.getMessage()
        if not message.isprintable():
            message = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], message)
        stamp = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        line = f"{stamp} {record.levelname} {record.threadName} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


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
    """Logs to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def log_start(options: argparse.Namespace) -> None:
    """Says with which settings this starts, and what is risky about them."""
    shown = {name: value for name, value in vars(options).items() if isinstance(value, (str, int, float))}
    if is_url(options.db):  # it may hold a password
        parts = urlsplit(options.db)
        shown["db"] = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    log.info("smsproxy %s: %s", __version__, " ".join(f"{name}={value}" for name, value in sorted(shown.items())))
    if not (options.api_keys or is_loopback(options.host)):
        log.warning("listening on %s without API keys: anyone who can connect can send messages", options.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Running


class Signals:
    """SIGTERM and SIGINT end the process: at once before it serves, else by `stop`; a second one at once, whatever
    it does, also as PID 1, for which the default action does nothing. SIGHUP calls `reload`."""

    def __init__(self) -> None:
        self.stop: Callable[[], None] | None = None
        self.reload: Callable[[], None] | None = None
        self._stopping = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._end)
        if "SIGHUP" in signal.Signals.__members__:  # a Unix
            signal.signal(signal.SIGHUP, self._reload)

    def _end(self, signum: int, frame: object) -> None:
        if self._stopping:
            os._exit(128 + signum)
        self._stopping = True
        if self.stop is None:
            sys.exit(128 + signum)
        self.stop()

    def _reload(self, signum: int, frame: object) -> None:
        if self.reload is not None:
            self.reload()


def run(options: argparse.Namespace, environ: Mapping[str, str], signals: Signals) -> int:
    """Wires the parts, serves until a signal, drains; returns the exit code."""
    with contextlib.ExitStack() as undo:
        listener = passed_socket(environ)
        repository = undo.enter_context(contextlib.closing(make_repository(options)))
        limits = Limits(connections=connections(options.max_connections))
        with contextlib.ExitStack() as starting:
            client = make_client(options.make_client)
            starting.callback(client.stop)  # unless it starts well: then the proxy stops it
            proxy = SmsProxy(client, options.config, repository=repository)
            # It listens before anything is sent: of two processes with one port the second fails here.
            server = SmsServer((options.host, options.port), proxy, limits=limits, api_keys=options.api_keys,
                               version=__version__, listener=listener)  # fmt: skip
            undo.callback(server.server_close)
            signal.set_wakeup_fd(server.wakeup_fd, warn_on_full_buffer=False)  # whichever thread gets the signal
            undo.callback(signal.set_wakeup_fd, -1)
            log.info("%d messages wait in the outbox", repository.backlog())

            def stop() -> None:  # in a signal handler: it may interrupt a thread that holds a lock, so it takes none
                server.shutdown(options.drain_timeout)
                server.call_soon(proxy.drain)  # side by side with the end of HTTP, not after it

            signals.stop = stop  # before anything is sent: from now on a signal has to wait for requests under way
            signals.reload = lambda: server.call_soon(reload_keys, server, options.api_keys_file, environ)
            proxy.start()
            starting.pop_all()
        log.info("listening on %s", " port ".join(map(str, server.server_address[:2])))
        notify(environ, "READY=1")
        server.serve_forever()
        notify(environ, "STOPPING=1")
        log.info("stopping: no new requests; handing over what is pending")
        left = proxy.stop(max(0.0, server.stop_at - time.monotonic()))
        kept = repository.backlog() if repository.durable else 0
    if left:
        log.error("stopped; %d messages could not be handed over", left)
        return 1
    log.info("stopped; %d messages wait in the outbox for the next start", kept)
    return 0


def reload_keys(server: SmsServer, path: str | None, environ: Mapping[str, str]) -> None:
    """Reads the file with the API keys again; a bad one changes nothing."""
    notify(environ, f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        keys = api_keys(path, environ)
        if bool(keys) != bool(server.api_keys):
            raise ValidationError("api_keys_file", "must not be removed or added while the service runs")
        server.set_api_keys(keys)
        log.info("API keys read again: %s", ", ".join(sorted(keys)) or "none")
    except ValidationError as error:
        log.error("the API keys stay as they were: %s", error)
    notify(environ, "READY=1")


def check(options: argparse.Namespace) -> None:
    """Checks the client and the database, beside a running instance, too; raises `SmsProxyError`."""
    client = make_client(options.make_client)
    try:
        if options.db and not is_url(options.db):
            check_file(options.db)
        else:
            make_repository(options).close()
    finally:
        client.stop()
    print("the settings, the client and the database are good")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 when it could not start or left messages, 2 for bad usage."""
    signals = Signals()
    options = parse_args(argv, os.environ)
    configure_logging(options.log_level, options.log_format)
    log_start(options)
    try:
        if options.check:
            check(options)
            return 0
        return run(options, os.environ, signals)
    except (OSError, RuntimeError, SmsProxyError) as error:
        log.debug("cannot start", exc_info=True)
        print(f"{program()}: error: cannot start: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
