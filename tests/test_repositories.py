"""The contract of a repository, run against the one in memory and the durable one."""
from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Union

import pytest

from fastsmsing import Message
from helpers import HANG
from smsproxy import (
    TRANSITIONS, DuplicateMessageError, InMemoryRepository, MessageStatus, SmsProxyError, StatusTransitionError,
    UnknownMessageError,
)  # fmt: skip
from sqlite_repository import SqliteRepository

ACCEPTED, NOT_FOUND = MessageStatus.ACCEPTED, MessageStatus.NOT_FOUND
CONFIRMED, DELIVERED, FAILED = MessageStatus.CONFIRMED, MessageStatus.DELIVERED, MessageStatus.FAILED
# Written out here, so that a change of the table in the product is noticed.
ALLOWED = {
    (ACCEPTED, CONFIRMED), (ACCEPTED, FAILED), (ACCEPTED, DELIVERED), (CONFIRMED, FAILED), (CONFIRMED, DELIVERED),
}  # fmt: skip
RANK = {ACCEPTED: 0, CONFIRMED: 1, FAILED: 2, DELIVERED: 2}
RETENTION = 1_000.0
AnyRepository = Union[InMemoryRepository, SqliteRepository]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Make(Protocol):
    def __call__(self, retention: float = ..., *, clock: Callable[[], float] = ...) -> AnyRepository: ...


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes repositories of one kind, and closes them at the end."""
    numbers = itertools.count(1)
    with contextlib.ExitStack() as undo:

        def make(retention: float = RETENTION, *, clock: Callable[[], float] = Clock()) -> AnyRepository:
            if request.param == "memory":
                return InMemoryRepository(retention, clock=clock)
            path = str(tmp_path / f"{next(numbers)}.db")
            return undo.enter_context(contextlib.closing(SqliteRepository(path, retention, clock=clock)))

        yield make


@pytest.fixture
def repository(make: Make) -> AnyRepository:
    return make()


def bring(repository: AnyRepository, message_id: str, status: MessageStatus) -> None:
    """Stores a message and leads it to a status."""
    if status is not NOT_FOUND:
        repository.save(message_id)
    if status not in (NOT_FOUND, ACCEPTED):
        repository.update(message_id, status)


def work(repository: AnyRepository, prefix: str, calls: int = 10) -> None:
    """Stores more messages: that is when a repository forgets others."""
    for number in range(calls):
        repository.save(f"{prefix}-{number}")


def together(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Runs every call in a thread of its own, all let loose at once; returns what they returned or raised."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        start.wait(HANG)
        try:
            return call()
        except SmsProxyError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(HANG) for future in [pool.submit(run, call) for call in calls]]


class TestContract:
    def test_a_saved_message_is_accepted(self, repository: AnyRepository) -> None:
        repository.save("a", Message("48123456789", "Hi", "a"))
        assert repository.get("a") == ACCEPTED

    def test_a_message_can_be_saved_by_its_id_alone(self, repository: AnyRepository) -> None:
        repository.save("a")
        assert repository.get("a") == ACCEPTED

    @pytest.mark.parametrize("message_id", ["", "b", "A", "a ", "a\0", "ä", "' OR 1=1 --"])
    def test_an_id_never_saved_is_not_found(self, repository: AnyRepository, message_id: str) -> None:
        repository.save("a")
        assert repository.get(message_id) == NOT_FOUND

    @pytest.mark.parametrize("message_id", ["", "a\0b", "ä\U0001f4e6", "'; DROP TABLE message; --", "x" * 5_000])
    def test_any_text_can_be_an_id(self, repository: AnyRepository, message_id: str) -> None:
        repository.save(message_id)
        repository.update(message_id, DELIVERED)
        assert repository.get(message_id) == DELIVERED

    def test_messages_do_not_touch_each_other(self, repository: AnyRepository) -> None:
        for message_id, status in (("a", ACCEPTED), ("b", CONFIRMED), ("c", FAILED), ("d", DELIVERED)):
            bring(repository, message_id, status)
        assert [repository.get(message_id) for message_id in "abcd"] == [ACCEPTED, CONFIRMED, FAILED, DELIVERED]

    # Transitions

    def test_the_table_is_total(self) -> None:
        assert {(before, after) for before, all_after in TRANSITIONS.items() for after in all_after} == ALLOWED
        assert set(TRANSITIONS) == set(MessageStatus)

    @pytest.mark.parametrize("after", MessageStatus)
    @pytest.mark.parametrize("before", MessageStatus)
    def test_an_update_follows_the_table(
        self, repository: AnyRepository, before: MessageStatus, after: MessageStatus
    ) -> None:
        bring(repository, "a", before)
        if (before, after) in ALLOWED:
            repository.update("a", after)
            assert repository.get("a") == after
        else:
            refusal = UnknownMessageError if before is NOT_FOUND else StatusTransitionError
            with pytest.raises(refusal, match="message a "):
                repository.update("a", after)
            assert repository.get("a") == before

    @pytest.mark.parametrize("final", [FAILED, DELIVERED])
    def test_a_final_status_is_reached_by_way_of_confirmed_too(
        self, repository: AnyRepository, final: MessageStatus
    ) -> None:
        bring(repository, "a", CONFIRMED)
        repository.update("a", final)
        assert repository.get("a") == final

    @pytest.mark.parametrize("final", [FAILED, DELIVERED])
    def test_a_final_status_outlasts_every_later_update(self, repository: AnyRepository, final: MessageStatus) -> None:
        bring(repository, "a", final)
        for status in MessageStatus:
            with pytest.raises(StatusTransitionError):
                repository.update("a", status)
        assert repository.get("a") == final

    def test_a_refused_update_does_not_create_the_message(self, repository: AnyRepository) -> None:
        with pytest.raises(UnknownMessageError):
            repository.update("a", CONFIRMED)
        repository.save("a")
        assert repository.get("a") == ACCEPTED

    # Duplicates

    def test_a_second_save_raises(self, repository: AnyRepository) -> None:
        repository.save("a")
        with pytest.raises(DuplicateMessageError) as caught:
            repository.save("a")
        assert (caught.value.message_id, caught.value.fingerprint) == ("a", None)

    @pytest.mark.parametrize("status", [ACCEPTED, CONFIRMED, FAILED, DELIVERED])
    def test_a_second_save_changes_nothing(self, repository: AnyRepository, status: MessageStatus) -> None:
        bring(repository, "a", status)
        with pytest.raises(DuplicateMessageError):
            repository.save("a")
        assert repository.get("a") == status

    def test_a_duplicate_tells_the_fingerprint_of_the_first(self, repository: AnyRepository) -> None:
        repository.save("a", None, b"first")
        repository.save("b", None, b"other")
        for second in (b"second", None):
            with pytest.raises(DuplicateMessageError) as caught:
                repository.save("a", None, second)
            assert caught.value.fingerprint == b"first"

    def test_the_fingerprint_stays_when_the_status_changes(self, repository: AnyRepository) -> None:
        repository.save("a", Message("48123456789", "Hi", "a"), b"\0first")
        repository.update("a", CONFIRMED)
        repository.update("a", DELIVERED)
        with pytest.raises(DuplicateMessageError) as caught:
            repository.save("a", None, b"second")
        assert caught.value.fingerprint == b"\0first"

    # Threads

    def test_of_many_threads_that_save_an_id_one_wins(self, repository: AnyRepository) -> None:
        for number in range(10):
            outcomes = together([functools.partial(repository.save, f"{number}")] * 8)
            assert Counter(map(type, outcomes)) == {type(None): 1, DuplicateMessageError: 7}
            assert repository.get(f"{number}") == ACCEPTED

    def test_the_fingerprint_that_the_losers_are_told_is_the_winners(self, repository: AnyRepository) -> None:
        marks = [bytes([number]) for number in range(8)]
        outcomes = together([functools.partial(repository.save, "a", None, mark) for mark in marks])
        winner = marks[outcomes.index(None)]
        told = {outcome.fingerprint for outcome in outcomes if isinstance(outcome, DuplicateMessageError)}
        assert told == {winner}

    def test_of_many_threads_that_end_a_message_one_wins(self, repository: AnyRepository) -> None:
        for number in range(10):
            repository.save(f"{number}")
            wanted = [FAILED, DELIVERED] * 4
            outcomes = together([functools.partial(repository.update, f"{number}", status) for status in wanted])
            assert Counter(map(type, outcomes)) == {type(None): 1, StatusTransitionError: 7}
            assert repository.get(f"{number}") == wanted[outcomes.index(None)]

    def test_readers_never_see_a_status_go_backwards(self, repository: AnyRepository) -> None:
        ids = [f"{number}" for number in range(40)]
        done = threading.Event()

        def live() -> None:
            for message_id in ids:
                repository.save(message_id)
                repository.update(message_id, CONFIRMED)
                repository.update(message_id, DELIVERED)
            done.set()

        def watch() -> list[tuple[str, MessageStatus, MessageStatus]]:
            seen = dict.fromkeys(ids, NOT_FOUND)
            backwards = []
            last = False
            while not last:
                last = done.is_set()  # one more round after the end
                for message_id in ids:
                    status = repository.get(message_id)
                    if RANK.get(status, -1) < RANK.get(seen[message_id], -1):
                        backwards.append((message_id, seen[message_id], status))
                    seen[message_id] = status
            assert set(seen.values()) == {DELIVERED}
            return backwards

        assert together([live, watch, watch, watch]) == [None, [], [], []]

    def test_many_threads_on_messages_of_their_own_all_succeed(self, repository: AnyRepository) -> None:
        def live(name: int) -> None:
            for number in range(20):
                bring(repository, f"{name}-{number}", CONFIRMED)
                repository.update(f"{name}-{number}", FAILED if number % 2 else DELIVERED)

        assert together([functools.partial(live, name) for name in range(8)]) == [None] * 8
        found = [repository.get(f"{name}-{number}") for name in range(8) for number in range(20)]
        assert found == [DELIVERED, FAILED] * 80

    # Retention

    @pytest.mark.parametrize("final", [FAILED, DELIVERED])
    def test_a_final_status_is_forgotten_after_the_retention(self, make: Make, final: MessageStatus) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", final)
        clock.now += RETENTION * 1.01
        work(repository, "later")
        assert repository.get("a") == NOT_FOUND

    def test_a_final_status_is_not_forgotten_before(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", DELIVERED)
        clock.now += RETENTION * 0.999
        work(repository, "later")
        assert repository.get("a") == DELIVERED

    def test_the_time_counts_from_the_final_status(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", CONFIRMED)
        clock.now += RETENTION * 5
        repository.update("a", DELIVERED)
        clock.now += RETENTION * 0.999
        work(repository, "later")
        assert repository.get("a") == DELIVERED

    @pytest.mark.parametrize("status", [ACCEPTED, CONFIRMED])
    def test_a_status_that_is_not_final_is_never_forgotten(self, make: Make, status: MessageStatus) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", status)
        bring(repository, "b", DELIVERED)
        clock.now += RETENTION * 100
        work(repository, "later")
        assert (repository.get("a"), repository.get("b")) == (status, NOT_FOUND)

    def test_a_retention_of_zero_keeps_for_ever(self, make: Make) -> None:
        clock = Clock()
        repository = make(0, clock=clock)
        bring(repository, "a", DELIVERED)
        clock.now += 1e9
        work(repository, "later")
        assert repository.get("a") == DELIVERED

    def test_each_message_is_forgotten_at_its_own_time(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        for number in range(10):
            bring(repository, f"{number}", FAILED)
            clock.now += RETENTION / 10
        # Now they are 1.0, 0.9, ..., 0.1 times the retention old.
        clock.now += RETENTION * 0.35
        work(repository, "later")
        assert [repository.get(f"{number}") for number in range(10)] == [NOT_FOUND] * 4 + [FAILED] * 6

    def test_what_is_due_does_not_pile_up(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        for number in range(200):
            bring(repository, f"{number}", DELIVERED)
        clock.now += RETENTION * 1.01
        work(repository, "later", 100)
        assert {repository.get(f"{number}") for number in range(200)} == {NOT_FOUND}

    def test_a_forgotten_message_is_unknown_to_updates(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", DELIVERED)
        clock.now += RETENTION * 1.01
        work(repository, "later")
        with pytest.raises(UnknownMessageError):
            repository.update("a", DELIVERED)

    def test_a_forgotten_id_and_its_fingerprint_can_come_again(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        repository.save("a", None, b"first")
        repository.update("a", DELIVERED)
        clock.now += RETENTION * 1.01
        work(repository, "later")
        repository.save("a")
        with pytest.raises(DuplicateMessageError) as caught:
            repository.save("a", None, b"second")
        assert (repository.get("a"), caught.value.fingerprint) == (ACCEPTED, None)

    def test_a_message_that_came_again_is_kept_for_its_own_time(self, make: Make) -> None:
        clock = Clock()
        repository = make(RETENTION, clock=clock)
        bring(repository, "a", DELIVERED)
        clock.now += RETENTION * 1.01
        work(repository, "later")
        bring(repository, "a", FAILED)
        clock.now += RETENTION * 0.999
        work(repository, "much later")
        assert repository.get("a") == FAILED
