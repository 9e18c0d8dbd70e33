"""Group commit: of the threads that wait to write to a database, one commits the changes of all.

So they share one transaction, and one wait for the disk. A change that fails by itself costs no other change
anything, and every thread gets to know what became of its own.
"""
from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from incident_log import Incident
from message_model import RepositoryUnavailableError

__all__ = ["GroupCommit", "Transactions"]

T = TypeVar("T")
R = TypeVar("R")


class Transactions(Protocol):
    """What changes are made in. Only one thread at a time calls these."""

    def begin(self) -> None:
        """Begins a transaction."""

    def commit(self) -> None:
        """Makes what was changed since `begin` durable, and known to whoever has to know."""

    def rollback(self) -> None:
        """Undoes what was changed since `begin`, which may itself have failed. Raises nothing."""


@dataclass(slots=True, eq=False)
class _Job:
    """A change of some items, made for a thread that waits; then its results, one for each item, or why it failed."""

    change: Callable[[Any], list[Any]]
    items: Sequence[Any]
    results: list[Any] | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.results is not None or self.error is not None


class GroupCommit:
    """Makes the changes of any number of threads, those of all that wait at a time in one transaction."""

    def __init__(self, transactions: Transactions, incident: Incident, damaged: Callable[[Exception], None]) -> None:
        self._transactions, self._incident, self._damaged = transactions, incident, damaged
        self._committing = threading.Lock()  # held by the thread that commits for all; guards transactions and _closed
        self._closed = False
        self._lock = threading.Lock()  # guards _jobs
        self._jobs: list[_Job] = []  # no more than there are threads that wait for them

    def change(self, change: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
        """Calls `change` for the items in a transaction; returns what it returns, one result for each item.

        An item that cannot be changed has its error as the result. Raises `RepositoryUnavailableError` when
        nothing was changed.
        """
        if not items:
            return []
        job = _Job(change, items)
        with self._lock:
            self._jobs.append(job)
        with self._committing:
            if not job.done:  # otherwise another thread has done it
                with self._lock:
                    jobs, self._jobs = self._jobs, []
                self._commit_for_all(jobs)
        if job.error is not None:
            raise job.error
        return job.results or []

    def change_one(self, change: Callable[[Sequence[T]], list[R]], item: T) -> R:
        """`change` for one item; raises what failed."""
        result = self.change(change, [item])[0]
        if isinstance(result, Exception):
            raise result
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is changed by anybody else until the block ends."""
        with self._committing:
            yield

    def close(self) -> None:
        """Returns when no change is under way; later ones raise `RepositoryUnavailableError`."""
        with self._committing:
            self._closed = True

    def _commit_for_all(self, jobs: Sequence[_Job]) -> None:
        """Each job is done afterwards, whatever happens."""
        why = "is closed"
        try:
            if not self._closed:
                why = "was interrupted as it wrote"
                self._commit(jobs)
        finally:  # also after an exception that ends this thread: the others wait for their results
            for job in jobs:
                if not job.done:
                    job.error = RepositoryUnavailableError(f"the database {why}")

    def _commit(self, jobs: Sequence[_Job]) -> None:
        """Makes the jobs one transaction. One that fails by itself is tried again alone, and then its halves,
        down to the item that is to blame. What fails for all, fails all."""
        try:
            results = self._transaction(jobs)
        except sqlite3.OperationalError as error:
            self._incident.failed(error)
            for job in jobs:
                job.error = RepositoryUnavailableError(f"the database cannot be written: {error}")
        except Exception as error:
            self._commit_in_parts(jobs, error)
        else:
            self._incident.ended()
            for job, result in zip(jobs, results, strict=True):
                job.results = result

    def _commit_in_parts(self, jobs: Sequence[_Job], error: Exception) -> None:
        (job, *others), middle = jobs, len(jobs[0].items) // 2
        if others:
            for each in jobs:
                self._commit([each])
        elif middle:
            halves = [_Job(job.change, items) for items in (job.items[:middle], job.items[middle:])]
            for half in halves:
                self._commit([half])
            # Each item gets to know what became of it.
            job.results = [result for half in halves for result in half.results or [half.error] * len(half.items)]
        elif type(error) is sqlite3.DatabaseError:
            self._damaged(error)
            job.results = [RepositoryUnavailableError(f"the database is damaged: {error}")]
        else:
            job.results = [error]

    def _transaction(self, jobs: Sequence[_Job]) -> list[list[Any]]:
        try:
            self._transactions.begin()
            results = [job.change(job.items) for job in jobs]
            self._transactions.commit()
        except BaseException:
            self._transactions.rollback()
            raise
        return results
