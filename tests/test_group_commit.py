"""Group commit, over transactions that only write down what happens to them."""
from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from group_commit import GroupCommit
from helpers import every_thread_ends
from incident_log import Incident
from message_model import RepositoryUnavailableError
from providers import HANG

__all__ = ["every_thread_ends"]  # a fixture

log = logging.getLogger("smsproxy.test")


class Recorded:
    """Transactions that keep what was committed. `before_commit` can hold or fail one."""

    def __init__(self) -> None:
        self.committed: list[list[str]] = []  # the items of each transaction
        self.rolled_back = 0
        self.before_commit: Callable[[], None] = lambda: None
        self._items: list[str] = []

    def begin(self) -> None:
        assert self._items == [], "one transaction at a time"

    def commit(self) -> None:
        self.before_commit()
        self.committed.append(self._items)
        self._items = []

    def rollback(self) -> None:
        self.rolled_back += 1
        self._items = []

    def store(self, items: Sequence[str]) -> list[str | Exception]:
        """A change: fails for the item "bad" and for a damaged one, and says what it stored."""
        for item in items:
            if item == "bad":
                raise ValueError("a bad item")
            if item == "damaged":
                raise sqlite3.DatabaseError("malformed")
            if item == "full":
                raise sqlite3.OperationalError("database or disk is full")
            self._items.append(item)
        return [f"{item} stored" for item in items]


class Held:
    """Holds the first commit until it is let go."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.entered, self.opened, self._then = threading.Event(), threading.Event(), then

    def __call__(self) -> None:
        if not self.entered.is_set():
            self.entered.set()
            assert self.opened.wait(HANG), "nobody let it go on"
            self._then()


@pytest.fixture
def transactions() -> Recorded:
    return Recorded()


@pytest.fixture
def damage() -> list[str]:
    return []


@pytest.fixture
def commits(transactions: Recorded, damage: list[str]) -> GroupCommit:
    return GroupCommit(transactions, Incident(log, "it cannot be written"), lambda error: damage.append(str(error)))


def waiting_behind(
    commits: GroupCommit, transactions: Recorded, pool: ThreadPoolExecutor, groups: Sequence[Sequence[str]], held: Held
) -> tuple[Future[list[str | Exception]], list[Future[list[str | Exception]]]]:
    """The first change, which is held in its commit, and those that wait behind it."""
    transactions.before_commit = held
    first = pool.submit(commits.change, transactions.store, ["first"])
    assert held.entered.wait(HANG)
    behind = [pool.submit(commits.change, transactions.store, group) for group in groups]
    until_waiting(commits, len(groups))
    return first, behind


def until_waiting(commits: GroupCommit, changes: int) -> None:
    """Returns when so many changes wait; each comes there without waiting for anything."""
    deadline = time.monotonic() + HANG
    while len(commits._jobs) < changes:
        assert time.monotonic() < deadline, "it hangs"


def test_changes_that_wait_at_the_same_time_share_one_transaction(
    commits: GroupCommit, transactions: Recorded
) -> None:
    held = Held()
    with ThreadPoolExecutor(32) as pool:
        first, behind = waiting_behind(commits, transactions, pool, [[f"{n}", f"{n}+"] for n in range(20)], held)
        held.opened.set()
        assert first.result(HANG) == ["first stored"]
        assert [each.result(HANG) for each in behind] == [[f"{n} stored", f"{n}+ stored"] for n in range(20)]
    assert [len(items) for items in transactions.committed] == [1, 40]


def test_a_change_of_nothing_makes_no_transaction(commits: GroupCommit, transactions: Recorded) -> None:
    assert commits.change(transactions.store, []) == []
    assert transactions.committed == []


def test_a_change_that_fails_costs_no_other_thread_anything(commits: GroupCommit, transactions: Recorded) -> None:
    held = Held()
    with ThreadPoolExecutor(8) as pool:
        first, behind = waiting_behind(commits, transactions, pool, [["a"], ["bad"], ["b"]], held)
        held.opened.set()
        assert first.result(HANG) == ["first stored"]
        results = [each.result(HANG) for each in behind]
    assert (results[0], results[2]) == (["a stored"], ["b stored"])
    assert [str(result) for result in results[1]] == ["a bad item"]


def test_an_item_that_fails_costs_no_other_item_anything(commits: GroupCommit, transactions: Recorded) -> None:
    results = commits.change(transactions.store, ["a", "b", "bad", "c", "bad", "d"])
    assert [str(result) for result in results] == [
        "a stored", "b stored", "a bad item", "c stored", "a bad item", "d stored",
    ]  # fmt: skip
    assert transactions.committed == [["a", "b", "c", "d"]]


@pytest.mark.parametrize("group", [["a", "bad", "b", "full"], ["full", "a", "bad", "b"], ["a", "full", "bad"]])
def test_when_the_disk_is_full_while_an_item_is_looked_for_that_fails_nothing_is_changed(
    commits: GroupCommit, transactions: Recorded, group: list[str]
) -> None:
    with pytest.raises(RepositoryUnavailableError, match="disk is full"):
        commits.change(transactions.store, group)
    assert transactions.committed == []


def test_what_fails_only_when_it_is_committed_fails_all_that_wait(
    commits: GroupCommit, transactions: Recorded, damage: list[str]
) -> None:
    def malformed() -> None:
        raise sqlite3.DatabaseError("malformed")

    transactions.before_commit = malformed
    results = commits.change(transactions.store, ["a", "b"])
    assert [type(each) for each in results] == [RepositoryUnavailableError] * 2
    assert (transactions.committed, damage) == ([], ["malformed"])


def test_one_item_raises_what_failed(commits: GroupCommit, transactions: Recorded) -> None:
    assert commits.change_one(transactions.store, "a") == "a stored"
    with pytest.raises(ValueError, match="a bad item"):
        commits.change_one(transactions.store, "bad")


def test_damage_costs_the_item_that_is_damaged_and_is_told(
    commits: GroupCommit, transactions: Recorded, damage: list[str]
) -> None:
    a, damaged, b = commits.change(transactions.store, ["a", "damaged", "b"])
    assert (a, b, damage) == ("a stored", "b stored", ["malformed"])
    assert isinstance(damaged, RepositoryUnavailableError)


def test_a_database_that_cannot_be_written_fails_all_and_is_logged_when_it_begins_and_ends(
    commits: GroupCommit, transactions: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    held = Held(full)
    with ThreadPoolExecutor(8) as pool:
        first, behind = waiting_behind(commits, transactions, pool, [["a", "b"], ["c"]], held)
        transactions.before_commit = full
        held.opened.set()
        for each in (first, *behind):
            with pytest.raises(RepositoryUnavailableError, match="disk is full"):
                each.result(HANG)
    assert (transactions.committed, transactions.rolled_back) == ([], 2)
    transactions.before_commit = lambda: None
    assert commits.change(transactions.store, ["a"]) == ["a stored"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("group", [["mine"], ["mine", "bad"]], ids=["in one step", "in parts"])
def test_an_exception_that_ends_the_thread_that_commits_leaves_no_other_thread_without_an_error(
    commits: GroupCommit, transactions: Recorded, group: list[str]
) -> None:
    class Ended(BaseException):
        """As KeyboardInterrupt or SystemExit would."""

    def end() -> None:
        raise Ended

    held = Held()
    with ThreadPoolExecutor(8) as pool:
        first, behind = waiting_behind(commits, transactions, pool, [group, ["a"], ["b"]], held)
        transactions.before_commit = end
        held.opened.set()
        assert first.result(HANG) == ["first stored"]
        errors = [each.exception(HANG) for each in behind]
    assert sorted(type(error).__name__ for error in errors) == ["Ended"] + ["RepositoryUnavailableError"] * 2
    transactions.before_commit = lambda: None
    assert commits.change(transactions.store, ["later"]) == ["later stored"]


def test_closing_waits_for_the_commit_under_way_and_refuses_what_waits(
    commits: GroupCommit, transactions: Recorded
) -> None:
    held = Held()
    with ThreadPoolExecutor(8) as pool:
        first, _ = waiting_behind(commits, transactions, pool, [], held)
        closing = pool.submit(commits.close)
        assert not closing.done()
        held.opened.set()
        assert (first.result(HANG), closing.result(HANG)) == (["first stored"], None)
    for _ in range(2):
        with pytest.raises(RepositoryUnavailableError, match="closed"):
            commits.change(transactions.store, ["late"])
        commits.close()
    assert transactions.committed == [["first"]]


def test_while_it_is_paused_nothing_is_changed(commits: GroupCommit, transactions: Recorded) -> None:
    with ThreadPoolExecutor(8) as pool:
        with commits.paused():
            waiting = pool.submit(commits.change, transactions.store, ["a"])
            until_waiting(commits, 1)
            assert transactions.committed == []
        assert waiting.result(HANG) == ["a stored"]
