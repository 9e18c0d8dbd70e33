"""The command: flags and environment in, the parts wired together, run until a signal, drained.

Only this module reads flags, the environment and signals.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import ipaddress
import json
import logging
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from fastsmsing import FastSmsingClient
from http_front import Limits
from restapi import SmsServer
from smsproxy import (
    RETENTION, InMemoryRepository, Repository, SmsProxy, SmsProxyConfig, SmsProxyError, ValidationError,
)  # fmt: skip
from sqlite_repository import SqliteRepository

__version__ = "0.1.0"

log = logging.getLogger("smsproxy.main")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes every flag from the environment, too."""

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
    """A flag's type: anything but nothing."""
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
        ("api-keys-file", text, None, "file with API keys, one a line; more may be in $SMSPROXY_API_KEYS"),
    ),
    "batching": (
        ("batch-size", number(int, -1e12), "10", "messages that make a batch leave; 1 or less: no batching"),
        ("max-batch-size", number(int, 1), None, "most messages in one request (default: 10 times the batch size)"),
        ("max-delay", number(float, 0, optional=True), "5", "longest linger of a message, in seconds, or none"),
        ("senders", number(int, 1), "4", "requests to the provider at a time"),
        ("max-pending", number(int, 1), "10000", "messages accepted and not yet handed over; more get a 503"),
    ),
    "the provider": (
        ("client", text, "fastsmsing:InMemoryClient", "MODULE:FACTORY that makes the FastSmsingClient"),
        ("max-attempts", number(int, -1e12), "3", "tries per batch"),
        ("max-age", number(float, 0, optional=True), "none", "seconds after which a message is not sent any more"),
    ),
    "keeping": (
        ("db", text, None, "SQLite file that keeps messages and statuses over a restart (default: memory)"),
        ("retention", number(float, 0), f"{RETENTION:g}", "seconds to remember a final status; 0 keeps it for ever"),
    ),
    "running": (
        ("drain-timeout", number(float, 0, 1e9), "10", "seconds to hand over what is pending when told to stop"),
        ("log-level", choice("debug", "info", "warning", "error"), "info", "least level that is logged"),
        ("log-format", choice("text", "json"), "text", "text for people, json for machines"),
    ),
}


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """The settings; a flag beats the environment. Exits with 2 and one line when one is wrong."""
    parser = Parser(
        prog="main.py",
        description="Takes text messages one by one and hands them to FastSMSing in batches, each one paid request.",
        epilog="Every setting can come from the environment, too: --max-delay from SMSPROXY_MAX_DELAY, and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"smsproxy {__version__}")
    parser.add_argument("--check", action="store_true", help="check settings, client and database, then exit")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, meaning in flags:
            given = environ.get("SMSPROXY_" + name.upper().replace("-", "_")) or default
            meaning += f" (default: {default})" if default else ""
            group.add_argument(f"--{name}", type=kind, default=given, help=meaning, metavar=name.split("-")[-1].upper())
    options = parser.parse_args(argv)
    if options.max_batch_size is None:
        options.max_batch_size = 10 * max(1, options.batch_size)
    try:
        names = {field.name for field in dataclasses.fields(SmsProxyConfig)}
        options.config = SmsProxyConfig(**{name: value for name, value in vars(options).items() if name in names})
        vars(options).update({name: getattr(options.config, name) for name in names & vars(options).keys()})
        options.api_keys = api_keys(options.api_keys_file, environ)
        options.make_client = load(options.client)
    except ValidationError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.problem}")
    return options


def api_keys(path: str | None, environ: Mapping[str, str]) -> list[str]:
    """The keys of the environment and of the file; a wrong one is refused without showing it."""
    keys = environ.get("SMSPROXY_API_KEYS", "").split(",")
    try:
        keys += Path(path).read_text("utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError("api_keys_file", f"cannot be read: {error}") from None
    keys = [key.strip() for key in keys if key.strip()]
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValidationError("api_keys_file", "and $SMSPROXY_API_KEYS must hold visible ASCII characters only")
    if (path or environ.get("SMSPROXY_API_KEYS")) and not keys:  # meant to be guarded: do not open it
        raise ValidationError("api_keys_file", "and $SMSPROXY_API_KEYS hold no key")
    return keys


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


def make(factory: Callable[[], FastSmsingClient]) -> FastSmsingClient:
    """The client; raises `SmsProxyError` when there is none."""
    try:
        client = factory()
    except Exception as error:  # somebody else's code
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise SmsProxyError(f"the client cannot be made: {why}") from error
    if not all(callable(getattr(client, name, None)) for name in ("send", "subscribe", "stop")):
        raise SmsProxyError(f"the client has no send, subscribe and stop: {type(client).__name__}")
    return client


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time (UTC), level, logger, thread, message and, if any, exception."""
        stamp = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(timespec="milliseconds")
        doc = {"time": stamp, "level": record.levelname, "logger": record.name, "thread": record.threadName,
               "message": record.getMessage()}  # fmt: skip
        if record.exc_info:
            doc["exception"] = self.formatException(record.exc_info)
        return json.dumps(doc)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def configure_logging(level: str, style: str) -> None:
    """Logs to standard error."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def run(options: argparse.Namespace) -> int:
    """Wires the parts, serves until a signal, drains; returns the exit code."""
    with contextlib.ExitStack() as undo:
        repository: Repository = InMemoryRepository(options.retention)
        if options.db:
            repository = undo.enter_context(contextlib.closing(SqliteRepository(options.db, options.retention)))
        client = make(options.make_client)
        with contextlib.ExitStack() as starting:
            starting.callback(client.stop)  # unless it starts well: then the proxy stops it
            if options.check:
                print("the settings, the client and the database are good")
                return 0
            proxy = SmsProxy(client, options.config, repository=repository)
            limits = Limits(connections=options.max_connections)
            server = SmsServer((options.host, options.port), proxy, limits=limits, api_keys=options.api_keys)
            undo.callback(server.server_close)
            undo.callback(signal.set_wakeup_fd, -1)
            deadline = _until_signal(server, options.drain_timeout)
            proxy.start()
            server.listen()
            starting.pop_all()
        log.info("listening on %s port %d", *server.server_address[:2])
        server.serve_forever()
        log.info("stopping: no new requests; handing over what is pending")
        left = proxy.stop(max(0.0, deadline() - time.monotonic()))
    if left:
        log.error("stopped; %d messages could not be handed over", left)
        return 1
    log.info("stopped; nothing is pending")
    return 0


def _until_signal(server: SmsServer, drain_timeout: float) -> Callable[[], float]:
    """Makes the first SIGTERM or SIGINT end the server, and a second one the process at once.

    Returns a function that tells when draining has to be over (as of `time.monotonic`).
    """
    deadlines: list[float] = []

    def stop(signum: int, frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        deadlines.append(time.monotonic() + drain_timeout)
        server.shutdown(drain_timeout)

    # The system may give the signal to a thread other than the loop's, which would sleep on.
    signal.set_wakeup_fd(server.wakeup_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return lambda: deadlines[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 when it could not start or left messages, 2 for bad usage."""
    options = parse_args(argv, os.environ)
    configure_logging(options.log_level, options.log_format)
    shown = {name: value for name, value in vars(options).items() if isinstance(value, (str, int, float, type(None)))}
    log.info("smsproxy %s: %s", __version__, " ".join(f"{name}={value}" for name, value in sorted(shown.items())))
    if not options.db:
        log.info("messages and statuses live in memory: a restart loses them (--db keeps them)")
    if not (options.api_keys or is_loopback(options.host)):
        log.warning("listening on %s without API keys: anyone who can connect can send messages", options.host)
    try:
        return run(options)
    except (OSError, SmsProxyError) as error:
        log.debug("cannot start", exc_info=True)
        print(f"main.py: error: cannot start: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
