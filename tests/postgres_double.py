"""A double of the package postgres, and clients with it: `--client postgres_double:Late --db postgresql://...`.

The database is away, or hangs, from the moment on that the client is told to stop; with the host `hanging-start` it
hangs from the start.
"""
from __future__ import annotations

import sys
import threading

import providers
from smsproxy import InMemoryRepository, RepositoryUnavailableError

sys.modules["postgres"] = sys.modules[__name__]
OVER = threading.Event()


class PostgresRepository(InMemoryRepository):
    """Keeps everything in memory, and behaves at the end as if it were in a database."""

    durable = True

    def __init__(self, url: str, retention: float, *, lease: float) -> None:
        super().__init__(retention)
        self._hangs = "hanging" in url
        if "hanging-start" in url:
            print("the database hangs", file=sys.stderr, flush=True)
            threading.Event().wait()

    def backlog(self) -> int:
        self._fail()
        return super().backlog()

    def close(self) -> None:
        self._fail()

    def _fail(self) -> None:
        if OVER.is_set():
            if self._hangs:
                threading.Event().wait()
            raise RepositoryUnavailableError("the database is away")


def describe_url(url: str) -> str:
    return "postgresql://described"


def check_database(url: str) -> None:
    if "away" in url:
        raise RepositoryUnavailableError("the database is away")


class Late(providers.Late):
    """Ends the database with itself."""

    def stop(self) -> None:
        OVER.set()
        super().stop()


class Hanging(providers.Hanging):
    """Ends the database with itself."""

    def stop(self) -> None:
        OVER.set()
        super().stop()
