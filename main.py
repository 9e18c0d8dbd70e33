"""The service: the parts wired together, run until a signal, drained.

How it ends: the signal sets one deadline. HTTP accepts no more and answers what is half-way, meanwhile FastSMSing gets
what is pending; both have until the deadline, and what hangs longer than a few seconds beyond it is cut off.

This file starts with what every Python from 3.6 on can read, so that an old one gets a sentence and no traceback.
"""
import sys

if sys.version_info < (3, 10):  # the Python that it is started with may be any
    sys.exit("smsproxy needs Python 3.10 or newer")

import signal

if __name__ == "__main__":  # before the other imports: a Ctrl-C during them is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import importlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

from command_line import Settings, __version__, is_url, program, read_secrets, read_settings
from fastsmsing import FastSmsingClient, InMemoryClient, ReportReceiver
from http_front import FrontServer
from http_protocol import Limits
from incident_log import counted
from process_control import (
    EndedBySignal,
    ProcessError,
    Reactions,
    Signals,
    allowed_connections,
    configure_logging,
    notify,
    passed_socket,
    within,
)
from restapi import RestApi
from smsproxy import (
    InMemoryRepository,
    Repository,
    RepositoryUnavailableError,
    SmsProxy,
    SmsProxyError,
    ValidationError,
)
from sqlite_repository import SqliteRepository, check_file
from worker_threads import Deadline

log = logging.getLogger("smsproxy.main")

LAST_STEP = 2.0  # seconds, longest, for a step of the end that nothing depends on any more


# Parts


def make_client(factory: Callable[[], FastSmsingClient]) -> FastSmsingClient:
    """The client; raises `SmsProxyError` when there is none."""
    try:
        client = factory()
    except EndedBySignal:
        raise
    except BaseException as error:  # somebody else's code, which may exit
        raise SmsProxyError(f"the client cannot be made: {_said(error)}") from error
    if not all(callable(getattr(client, name, None)) for name in ("send", "subscribe", "stop")):
        raise SmsProxyError(f"the client has no send, subscribe and stop: {type(client).__name__}")
    if isinstance(client, InMemoryClient):
        log.warning("this is the provider's stand-in: nothing is sent to anybody (--client names the real one)")
    return client


def stop_client(client: FastSmsingClient) -> None:
    """Ends a client that nothing was sent with."""
    try:
        client.stop()
    except EndedBySignal:
        raise
    except BaseException as error:  # somebody else's code
        log.error("the client did not stop well: %s", _said(error))


def make_repository(settings: Settings) -> Repository:
    """Where messages are kept; raises `SmsProxyError` when that cannot be used."""
    if settings.db is None:
        log.info("messages and statuses live in memory: a restart loses them (--db keeps them)")
        return InMemoryRepository(settings.retention)
    if not is_url(settings.db):
        return SqliteRepository(settings.db, settings.retention)
    repository: Repository = _postgres().PostgresRepository(settings.db, settings.retention, lease=settings.lease)
    return repository


def make_proxy(client: FastSmsingClient, settings: Settings, repository: Repository) -> SmsProxy:
    """The proxy, which subscribes to the client's delivery reports; raises `SmsProxyError` when that fails."""
    try:
        return SmsProxy(client, settings.config, repository=repository, webhook=settings.webhook)
    except (SmsProxyError, EndedBySignal):
        raise
    except BaseException as error:  # somebody else's code
        raise SmsProxyError(f"the client's subscribe failed: {_said(error)}") from error


def make_server(settings: Settings, api: RestApi, listener: "socket.socket | None") -> FrontServer:
    """The server, which listens already; raises `SmsProxyError` naming the address when it cannot."""
    limits = Limits(connections=allowed_connections(settings.max_connections))
    try:
        return FrontServer((settings.host, settings.port), api, limits, workers=api.workers, listener=listener)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no address"
        raise SmsProxyError(f"cannot listen on {settings.host} port {settings.port}: {why}") from error


def _postgres() -> Any:
    """The package that has all that concerns PostgreSQL: imported only for such a URL, since it needs psycopg."""
    try:
        package: ModuleType = importlib.import_module("postgres")
    except ImportError as error:
        why = " ".join(str(error).split())
        raise SmsProxyError(f"PostgreSQL needs psycopg 3, pip install 'psycopg[binary]': {why}") from None
    return package


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# What is said


def log_start(settings: Settings) -> None:
    """Says with which settings this starts, and what is risky about them."""
    values = {each.name: getattr(part, each.name) for part in (settings, settings.config) for each in fields(part)}
    shown: dict[str, object] = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
    shown.update(db=shown_database(settings.db), api_keys_file=settings.keys.file)
    shown.update(webhook=settings.webhook and settings.webhook.target)  # without a password, and without the path
    text = " ".join(f"{name}={value}" for name, value in sorted(shown.items()) if value is not None)
    log.info("smsproxy %s: %s", __version__, text)
    if settings.service_links:
        links = " ".join(settings.service_links)
        log.info("ignored, because Kubernetes makes them for a Service of this name: %s", links)
    if not (settings.api_keys or is_loopback(settings.host)):
        log.warning("listening on %s without API keys: anyone who can connect can send messages", settings.host)


def shown_database(db: "str | None") -> "str | None":
    """What the log says of the database: nothing of a URL that could be a password."""
    if not is_url(db):
        return db
    try:
        described: str = _postgres().describe_url(db)
    except SmsProxyError:  # without psycopg nobody knows which part is the password
        return "postgresql"
    return described


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shown_address(address: Any) -> str:
    """A socket's address for people: of the internet, or the path or the name of a Unix socket."""
    if isinstance(address, tuple):
        return f"{address[0]} port {address[1]}"
    path = os.fsdecode(address)
    return f"the Unix socket {path.replace(chr(0), '@', 1) or 'without a name'}"


# Running


class Service:
    """One start of the service: making one wires and starts the parts, or raises and leaves none of them behind."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], signals: Signals) -> None:
        self._settings, self._environ = settings, environ
        self._deadline: "Deadline | None" = None  # of the end, from the signal on
        with contextlib.ExitStack() as undo:
            listener = passed_socket(environ)
            self._repository = undo.enter_context(contextlib.closing(make_repository(settings)))
            client = make_client(settings.make_client)
            undo.callback(stop_client, client)  # once it has started well, the proxy stops it
            self._proxy = make_proxy(client, settings, self._repository)
            receiver = client if isinstance(client, ReportReceiver) else None
            self._api = RestApi(self._proxy, api_keys=settings.api_keys, version=__version__, receiver=receiver)
            # It listens before anything is sent: of two processes with one port the second fails here.
            self._server = make_server(settings, self._api, listener)
            undo.callback(self._server.server_close)
            log.info("in the outbox: %s", counted(self._repository.backlog(), "message"))
            # Before anything is sent: from now on a signal has to wait for requests that are under way.
            signals.react(Reactions(self._stop, self._reload, self._wake, settings.drain_timeout))
            self._proxy.start()
            undo.pop_all()

    def run(self) -> int:
        """Serves until a signal, then drains; returns the exit code."""
        log.info("listening on %s", shown_address(self._server.server_address))
        notify(self._environ, "READY=1")
        self._server.serve_forever()
        notify(self._environ, "STOPPING=1")
        log.info("stopping: no new requests; handing over what is pending")
        deadline = self._deadline or Deadline(self._settings.drain_timeout)
        left = self._proxy.stop(deadline.left)
        self._server.server_close()
        if left:
            log.error("stopped; %s could not be handed over", counted(left, "message"))
        elif self._repository.durable:
            kept = last_step(self._repository.backlog)
            waits = "an unknown number of messages" if kept is None else counted(kept, "message")
            log.info("stopped; for the next start wait in the outbox: %s", waits)
        else:
            log.info("stopped; nothing is left to be handed over")
        last_step(self._repository.close)
        return 1 if left else 0

    # In signal handlers

    def _stop(self) -> None:
        self._deadline = Deadline(self._settings.drain_timeout)
        self._server.shutdown(self._deadline.left)
        self._server.call_soon(self._proxy.drain)  # side by side with the end of HTTP, not after it

    def _reload(self) -> None:
        self._server.call_soon(reload, self._api, self._proxy, self._settings, self._environ)

    def _wake(self) -> None:
        self._server.call_soon(_nothing)


def last_step(call: "Callable[[], Any]") -> Any:
    """The result of a step of the end that nothing depends on any more; None if it fails or takes too long."""
    try:
        return within(LAST_STEP, call)
    except (TimeoutError, RuntimeError, RepositoryUnavailableError) as error:
        log.warning("the repository did not end well: %s", _said(error))
        return None


def _nothing() -> None:
    """What the loop is woken for."""


def reload(api: RestApi, proxy: SmsProxy, settings: Settings, environ: Mapping[str, str]) -> None:
    """Reads the API keys and the webhook's secrets again; bad ones change nothing."""
    notify(environ, f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        keys = settings.keys.read()
        api.set_api_keys(keys)
        log.info("API keys read again: %s", ", ".join(sorted(keys)) or "none")
    except ValidationError as error:
        log.error("the API keys stay as they were: %s", error)
    if settings.webhook_secret_file is not None:
        try:
            secrets = read_secrets(settings.webhook_secret_file)
            proxy.set_webhook_secrets(secrets)
            log.info("secrets of the webhook read again: %d", len(secrets))
        except ValidationError as error:
            log.error("the webhook's secrets stay as they were: %s", error)
    notify(environ, "READY=1")


def check(settings: Settings) -> None:
    """Checks the client and the database, changes nothing, and may run beside an instance; raises `SmsProxyError`."""
    client = make_client(settings.make_client)
    try:
        if settings.db is not None and is_url(settings.db):
            _postgres().check_database(settings.db)
        elif settings.db is not None:
            check_file(settings.db)
    finally:
        stop_client(client)
    print("the settings, the client and the database are good")


def main(argv: "Sequence[str] | None" = None) -> int:
    """Runs the command; returns the exit code: 0, 1 when it could not start or left messages, 2 for bad usage."""
    with Signals() as signals:
        settings = read_settings(argv, os.environ)
        configure_logging(settings.log_level, settings.log_format)
        try:
            log_start(settings)
            if settings.check:
                check(settings)
                return 0
            service = Service(settings, os.environ, signals)
        except (OSError, RuntimeError, SmsProxyError, ProcessError) as error:
            log.debug("cannot start", exc_info=True)
            print(f"{program()}: error: cannot start: {error}", file=sys.stderr)
            return 1
        code = service.run()
        signals.exiting(code)
        return code


if __name__ == "__main__":
    sys.exit(main())
