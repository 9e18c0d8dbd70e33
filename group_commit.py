"""Group commit: of the threads that wait to write to a database, one commits the changes of all.

So they share one transaction, and one wait for the disk. A change that fails by itself costs no other change
anything, and every thread gets to know what became of its own.
"""
from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def only(self, places: Iterable[int]) -> _Job:
        """The same change of the items at these places."""
        return _Job(self.change, [self.items[place] for place in places])


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
        """Makes the jobs one transaction. When something in it fails by itself, each job gets its own, without the
        items that are to blame. A job for which the database cannot be written changes nothing."""
        try:
            self._done(jobs, self._transaction(jobs))
        except sqlite3.OperationalError as error:
            self._unavailable(jobs, error)
        except Exception:
            for job in jobs:
                try:
                    self._done([job], [self._without_culprits(job)])
                except sqlite3.OperationalError as error:
                    self._unavailable([job], error)

    def _done(self, jobs: Sequence[_Job], results: Sequence[list[Any]]) -> None:
        self._incident.ended()
        for job, result in zip(jobs, results, strict=True):
            job.results = result

    def _unavailable(self, jobs: Sequence[_Job], error: Exception) -> None:
        self._incident.failed(error)
        for job in jobs:
            job.error = RepositoryUnavailableError(f"the database cannot be written: {error}")

    def _without_culprits(self, job: _Job) -> list[Any]:
        """Makes a transaction of the job without the items that fail, which get their errors; returns the results.

        Before that it tries parts of the items, each together with all before it that can be changed, in transactions
        that are undone: so either all that can be changed is, or nothing.
        """
        results: list[Any] = [None] * len(job.items)
        good: list[int] = []  # places of items that can be changed together
        parts: list[Sequence[int]] = [range(len(job.items))]
        while parts:
            part = parts.pop()
            try:
                self._transaction([job.only((*good, *part))], commit=False)
            except sqlite3.OperationalError:
                raise
            except Exception as error:
                if middle := len(part) // 2:
                    parts += [part[middle:], part[:middle]]
                else:
                    results[part[0]] = self._told(error)
            else:
                good += part
        try:
            [changed] = self._transaction([job.only(good)]) if good else [[]]
        except sqlite3.OperationalError:
            raise
        except Exception as error:  # they fail only when they are committed
            changed = [self._told(error)] * len(good)
        for index, result in zip(good, changed, strict=True):
            results[index] = result
        return results

    def _told(self, error: Exception) -> Exception:
        """What whoever wanted a change is told."""
        if type(error) is not sqlite3.DatabaseError:
            return error
        self._damaged(error)
        return RepositoryUnavailableError(f"the database is damaged: {error}")

    def _transaction(self, jobs: Sequence[_Job], *, commit: bool = True) -> list[list[Any]]:
        try:
            self._transactions.begin()
            results = [job.change(job.items) for job in jobs]
            if commit:
                self._transactions.commit()
        except BaseException as error:
            self._transactions.rollback()
            if isinstance(error, sqlite3.OperationalError) and "Could not decode" in str(error):
                raise sqlite3.DatabaseError("a text is no UTF-8") from None  # one row's damage, which it would quote
            raise
        if not commit:
            self._transactions.rollback()
        return results
