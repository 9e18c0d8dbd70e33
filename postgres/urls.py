"""The database's URL, and why a connection failed, told without what is secret.

libpq's own messages quote hosts, ports, users and files, and parts of a password where a URL was misread.
So none of them is passed on: a message that is known is told in words of our own, any other by its type.
"""
from __future__ import annotations

from typing import Any

import psycopg
from psycopg import conninfo

from message_model import RepositoryUnavailableError

__all__ = ["describe_failure", "describe_url", "parse_url"]

HINT = "in a user name or password write %25 for %, %2F for /, %3A for :, %40 for @"
# What libpq or the server says, in parts, and what we say; the first that is found counts.
FAILURES = (
    ("password authentication failed", "password authentication failed"),
    ("no password supplied", "the server wants a password"),
    ("no pg_hba.conf entry", "the server does not let this user in from here"),
    ("authentication", "authentication failed"),
    ("starting up", "the server is starting up"),
    ("shutting down", "the server is shutting down"),
    ("recovery mode", "the server is recovering"),
    ("not yet accepting", "the server is not ready yet"),
    ("too many c", "the server has too many connections"),
    ("remaining connection slots", "the server has too many connections"),
    ("session is read-only", "no server that can be written to"),
    ("server is in hot standby", "no server that can be written to"),
    ("database \"", "the database does not exist, or is closed to this user"),
    ("role \"", "the role does not exist, or may not log in"),
    ("Connection refused", "connection refused"),
    ("timeout expired", "no response in time"),
    ("timed out", "no response in time"),
    ("resolve host", "the host's name cannot be resolved"),
    ("translate host", "the host's name cannot be resolved"),
    ("No route to host", "no route to the host"),
    ("unreachable", "the network is unreachable"),
    ("certificate", "the TLS certificate is not accepted"),
    ("SSL", "no TLS connection can be made"),
    ("No such file", "connection refused"),  # a Unix socket
    ("Permission denied", "permission denied"),
    ("definition of service", "the service is not defined"),
    ("invalid", "a value in the URL is not valid"),
    ("closed the connection unexpectedly", "the server closed the connection"),
)  # fmt: skip


def parse_url(url: str) -> dict[str, Any]:
    """libpq's parameters; raises `RepositoryUnavailableError` for a URL that cannot be understood, or is ambiguous."""
    try:
        given = dict(conninfo.conninfo_to_dict(url))
    except (psycopg.Error, UnicodeError):  # its text quotes the URL
        raise RepositoryUnavailableError(f"the database's URL cannot be understood ({HINT})") from None
    ports = str(given.get("port") or "").split(",")
    if "\0" in url or _misread(url) or not all(port.isascii() and (port.isdigit() or not port) for port in ports):
        raise RepositoryUnavailableError(f"the database's URL is ambiguous ({HINT})")
    return given


def _misread(url: str) -> bool:
    """Whether an unescaped character may have made part of a password a host, a port or a database's name.

    libpq ends the user information at the first "@", and takes none for given when a "/" comes before that.
    """
    if not url.startswith(("postgresql://", "postgres://")):
        return False
    authority, _, rest = url.partition("://")[2].partition("/")
    return "@" in rest or authority.count("@") > 1


def describe_url(url: str) -> str:
    """Host, port and database of a URL in any form, for a log: neither user nor password. Never raises."""
    try:
        given = parse_url(url)
    except RepositoryUnavailableError:
        return "postgresql://?"
    hosts = str(given.get("host") or given.get("hostaddr") or "").split(",")
    ports = str(given.get("port") or "").split(",")
    ports *= len(hosts) if len(ports) == 1 else 1
    places = [f"[{host}]" if ":" in host else host for host in hosts]
    if len(ports) == len(places):
        places = [f"{place}:{port}" if port else place for place, port in zip(places, ports, strict=True)]
    return f"postgresql://{','.join(places)}/{given.get('dbname') or ''}"


def describe_failure(error: BaseException) -> str:
    """Why a connection could not be made, without a host, a port, a user or a file."""
    text = str(error)
    return next((ours for theirs, ours in FAILURES if theirs in text), type(error).__name__)
