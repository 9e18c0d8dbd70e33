"""The outbox of changes in a file: the contract, closed slices, what a restart finds in every state, and races."""
from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base_repository import Claim
from change_contract import RETENTION, SETTLED, DurableChangeContract, claimed
from change_outbox import Change, ChangeOutbox
from group_commit import GroupCommit
from helpers import HANG, Clock, every_thread_ends, until
from message_model import Batch, MessageStatus, Reason, RepositoryUnavailableError
from repository_contract import entries, name
from sqlite_changes import COUNTED, MOMENT, STEP
from sqlite_repository import SqliteRepository
from sqlite_tables import Tables

__all__ = ["every_thread_ends"]  # a fixture

CONFIRMED, FAILED, DELIVERED = MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED
SLICE = RETENTION / 1000  # seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sms.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.contextmanager
def opened(path: Path, *args: Any, **options: Any) -> Iterator[SqliteRepository]:
    with contextlib.closing(SqliteRepository(str(path), *args, **options)) as repository:
        yield repository


@pytest.fixture(name="repository")
def open_repository(path: Path, clock: Clock) -> Iterator[SqliteRepository]:
    with opened(path, RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
        yield repository


@pytest.fixture
def changes(repository: SqliteRepository) -> ChangeOutbox:
    return repository.changes()


def run(path: Path, statement: str) -> list[Any]:
    """What an SQL statement finds in the file, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement).fetchall()


def delivered(repository: SqliteRepository, *numbers: int) -> None:
    """These messages are accepted and delivered."""
    repository.save_all(entries(numbers))
    assert repository.update_all({name(number): DELIVERED for number in numbers}) == {}


def all_told(changes: ChangeOutbox) -> list[str]:
    """The IDs of what is told now, told."""
    told: list[str] = []
    while body := claimed(changes):
        changes.handed_over(body)
        told += body.ids
    return told


class TestInSqlite(DurableChangeContract):
    @pytest.fixture
    def repository(self, path: Path, clock: Clock) -> Iterator[SqliteRepository]:
        with opened(path, RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
            yield repository

    @pytest.fixture
    def age(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    @pytest.fixture
    def restart(self, path: Path, clock: Clock) -> Iterator[Callable[[SqliteRepository], SqliteRepository]]:
        with contextlib.ExitStack() as undo:

            def again(repository: SqliteRepository) -> SqliteRepository:
                repository.close()
                return undo.enter_context(opened(path, RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + clock()))

            yield again


# Slices


def test_a_slice_is_told_when_it_is_closed_and_not_before(tmp_path: Path) -> None:
    clock = Clock(0.25)
    with opened(tmp_path / "sms.db", clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
        changes = repository.changes()
        delivered(repository, 1)
        claim = changes.claim(100, 1.0)
        assert (claim.batch, claim.waiting) == (None, 1)
        assert claim.due_in == pytest.approx(0.75 + MOMENT)
        clock.advance(0.75)  # exactly at its end, when a change still comes into it
        assert changes.claim(100, 1.0, flush=True) == Claim(None, 1, MOMENT)
        delivered(repository, 0)
        clock.advance(MOMENT)
        delivered(repository, 2)
        assert all_told(changes) == [name(0), name(1)]
        assert changes.claim(100, 1.0).due_in == pytest.approx(1.0)


def test_a_body_ends_within_a_slice_and_the_next_begins_there(
    repository: SqliteRepository, changes: ChangeOutbox, clock: Clock
) -> None:
    delivered(repository, *range(25))
    clock.advance(SETTLED)
    bodies = []
    while body := claimed(changes, 10):
        changes.handed_over(body)
        bodies.append(body.ids)
    assert bodies == [[name(each) for each in range(start, min(start + 10, 25))] for start in (0, 10, 20)]


def test_messages_that_are_handed_over_and_not_reported_on_are_passed_over(
    repository: SqliteRepository, changes: ChangeOutbox, path: Path, clock: Clock
) -> None:
    number = 2 * STEP + 500
    repository.save_all(entries(range(number)))
    repository.handed_over(repository.claim(number, 0.0).batch or Batch(()))
    repository.update_all({name(number - 1): CONFIRMED})
    assert changes.pending()[0] == 1
    clock.advance(SETTLED)
    pages = path.with_name("sms.db-wal").stat().st_size
    assert all_told(changes) == [name(number - 1)]
    assert path.with_name("sms.db-wal").stat().st_size - pages < 20_000
    assert changes.claim(100, 1.0) == Claim()
    repository.update_all({name(0): CONFIRMED})
    clock.advance(SETTLED)
    assert all_told(changes) == [name(0)]


def test_a_look_that_finds_no_body_writes_nothing(
    repository: SqliteRepository, changes: ChangeOutbox, path: Path, clock: Clock
) -> None:
    repository.save_all(entries(range(5)))
    repository.handed_over(repository.claim(5, 0.0).batch or Batch(()))
    log = path.with_name("sms.db-wal")
    before = log.read_bytes()
    for seconds in (0.0, SETTLED):
        clock.advance(seconds)
        assert claimed(changes) is None
    assert log.read_bytes() == before


def test_a_change_costs_no_more_with_a_webhook(tmp_path: Path, clock: Clock) -> None:
    sizes = []
    for number in range(2):
        path = tmp_path / f"{number}.db"
        with opened(path, clock=clock, wall_clock=lambda: 1.8e9) as repository:
            if number:
                repository.changes()
            before = path.with_name(path.name + "-wal").stat().st_size
            for each in range(20):
                delivered(repository, each)
            sizes.append(path.with_name(path.name + "-wal").stat().st_size - before)
    assert sizes[0] == sizes[1]


def test_of_many_the_number_is_estimated(repository: SqliteRepository, changes: ChangeOutbox, clock: Clock) -> None:
    number = 2 * COUNTED
    repository.save_all(entries(range(number)))
    repository.handed_over(repository.claim(number, 0.0).batch or Batch(()))
    repository.update_all({name(each): DELIVERED for each in range(0, number, 2)})
    clock.advance(SETTLED)
    assert changes.pending()[0] == pytest.approx(number / 2, rel=0.01)


def test_a_row_that_makes_no_sense_costs_only_itself(
    repository: SqliteRepository, changes: ChangeOutbox, path: Path, clock: Clock
) -> None:
    delivered(repository, 1, 2, 3)
    run(path, f"UPDATE message SET status = 'LOST' WHERE id = '{name(1)}'")
    run(path, f"UPDATE message SET reason = 'none' WHERE id = '{name(2)}'")
    clock.advance(SETTLED)
    assert all_told(changes) == [name(2), name(3)]


def test_what_cannot_be_written_is_told_later(
    repository: SqliteRepository, changes: ChangeOutbox, path: Path, clock: Clock
) -> None:
    delivered(repository, 1)
    clock.advance(SETTLED)
    run(path, "CREATE TRIGGER full BEFORE UPDATE ON webhook BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(sqlite3.IntegrityError):
        claimed(changes)
    run(path, "DROP TRIGGER full")
    body = claimed(changes)
    assert body is not None
    assert body.ids == [name(1)]
    run(path, "CREATE TRIGGER full BEFORE UPDATE ON webhook BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(sqlite3.IntegrityError):
        changes.handed_over(body)
    run(path, "DROP TRIGGER full")
    assert claimed(changes) is None  # it is under way
    changes.handed_over(body)
    assert changes.pending() == (0, 0.0)


def test_after_the_end_every_call_is_refused(repository: SqliteRepository, changes: ChangeOutbox, clock: Clock) -> None:
    delivered(repository, 1)
    clock.advance(SETTLED)
    body = claimed(changes)
    assert body is not None
    repository.close()
    with pytest.raises(RepositoryUnavailableError):
        changes.handed_over(body)
    with pytest.raises(RepositoryUnavailableError):
        changes.pending()
    changes.release(body)
    assert claimed(changes) == body


# The retention


def test_a_body_expires_when_the_last_of_its_messages_is_forgotten(
    repository: SqliteRepository, changes: ChangeOutbox, clock: Clock
) -> None:
    delivered(repository, 1)
    clock.advance(10.0)
    delivered(repository, 2)
    last = clock()
    clock.advance(SETTLED)
    body = claimed(changes)
    assert body is not None
    assert body.expires_at == pytest.approx(last + RETENTION, abs=SLICE)
    assert (len(body.unexpired(clock())), len(body.unexpired(body.expires_at))) == (2, 0)


def test_what_is_over_is_not_told_also_before_it_is_forgotten(
    repository: SqliteRepository, changes: ChangeOutbox, clock: Clock
) -> None:
    delivered(repository, 1)
    clock.advance(RETENTION * 1.1)
    delivered(repository, 2)
    assert changes.pending()[0] == 1
    clock.advance(SETTLED)
    assert all_told(changes) == [name(2)]


def test_with_a_retention_of_0_nothing_expires(path: Path, clock: Clock) -> None:
    with opened(path, 0.0, clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
        changes = repository.changes()
        delivered(repository, 1)
        clock.advance(1e7)
        body = claimed(changes)
        assert body is not None
        assert (body.ids, body.expires_at) == ([name(1)], math.inf)


# The wall clock


@pytest.mark.parametrize("jump", [-1e8, 1e8])
def test_a_jump_of_the_wall_clock_changes_nothing_in_a_running_process(path: Path, clock: Clock, jump: float) -> None:
    wall = Clock(1.8e9)
    with opened(path, RETENTION, clock=clock, wall_clock=wall) as repository:
        changes = repository.changes()
        delivered(repository, 1)
        wall.advance(jump)
        delivered(repository, 2)
        clock.advance(SETTLED)
        number, seconds = changes.pending()
        assert number == 2
        assert seconds == pytest.approx(SETTLED, abs=SLICE)
        body = claimed(changes)
        assert body is not None
        assert body.ids == [name(1), name(2)]
        assert body.timestamp == 1.8e9 + jump
        assert body.expires_at == pytest.approx(clock() - SETTLED + RETENTION, abs=SLICE)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("then", [0.0, RETENTION])
@pytest.mark.parametrize("retention", [0.0, RETENTION])
def test_a_start_with_a_clock_that_was_set_back_tells_what_changes_then(
    path: Path, retention: float, then: float, forgotten: bool
) -> None:
    clock = Clock(0.25)
    with opened(path, retention, clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
        changes = repository.changes()
        delivered(repository, 5)
        clock.advance(SETTLED)
        assert all_told(changes) == [name(5)]
    if forgotten:  # nothing but the cursor knows how late it was
        run(path, "DELETE FROM message")
    clock = Clock()
    with opened(path, then, clock=clock, wall_clock=lambda: 1.7e9) as repository:
        changes = repository.changes()
        delivered(repository, 4)  # an ID before the cursor's
        clock.advance(SETTLED)
        assert all_told(changes) == [name(4)]


# A restart in every state


def test_what_changed_before_the_first_body_was_told_is_told_after_a_kill(path: Path, clock: Clock) -> None:
    options: dict[str, Any] = {"clock": clock, "wall_clock": lambda: 1.8e9 + clock()}
    with opened(path, **options) as repository:
        delivered(repository, 1)  # before there was a webhook
        clock.advance(SETTLED)
        repository.changes()
        delivered(repository, 2)
    clock.advance(SETTLED)
    with opened(path, **options) as repository:
        assert all_told(repository.changes()) == [name(2)]


def test_what_changes_while_the_webhook_is_off_is_told_when_it_is_on_again(path: Path, clock: Clock) -> None:
    options: dict[str, Any] = {"clock": clock, "wall_clock": lambda: 1.8e9 + clock()}
    for number, on in enumerate((True, False, True)):
        with opened(path, **options) as repository:
            changes = repository.changes() if on else None
            delivered(repository, number)
            clock.advance(SETTLED)
            told = all_told(changes) if changes else []
    assert told == [name(1), name(2)]


def test_a_kill_in_any_state_of_a_body_tells_each_change_and_a_body_again_as_it_was(path: Path, clock: Clock) -> None:
    """What a kill leaves is a copy of the file and its log: here each moment's."""
    options: dict[str, Any] = {"clock": clock, "wall_clock": lambda: 1.8e9 + clock() + 1 / 3}
    moments: dict[str, dict[str, bytes]] = {}

    def keep(moment: str) -> None:
        moments[moment] = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal")}

    with opened(path, RETENTION, **options) as repository:
        changes = repository.changes()
        repository.save_all(entries(range(4)))
        repository.update_all({name(0): CONFIRMED, name(1): Reason.ATTEMPTS})
        clock.advance(SETTLED)
        keep("before")
        body = claimed(changes)
        assert body is not None
        keep("claimed")
        repository.update_all({name(0): DELIVERED, name(2): DELIVERED})
        keep("changed meanwhile")
        changes.handed_over(body)
        keep("handed over")
    first = [Change(name(0), CONFIRMED), Change(name(1), FAILED, Reason.ATTEMPTS)]
    second = [Change(name(0), DELIVERED), Change(name(2), DELIVERED)]
    expected = {"before": first, "claimed": first, "changed meanwhile": first + second, "handed over": second}
    for moment, files in moments.items():
        for suffix, content in files.items():
            Path(f"{path}{suffix}").write_bytes(content)
        with opened(path, RETENTION, **options) as repository:
            changes = repository.changes()
            assert (moment, changes.pending()[0]) == (moment, len(expected[moment]))
            clock.advance(SETTLED)
            told = list[Change]()
            while again := claimed(changes):
                assert (again == body) is (moment in ("claimed", "changed meanwhile") and not told)
                assert again != body or again.expires_at == pytest.approx(body.expires_at, abs=SLICE)
                changes.handed_over(again)
                told += again.changes
            assert (moment, told) == (moment, expected[moment])
            assert changes.pending() == (0, 0.0)
        clock.advance(-SETTLED)


# Races


def test_a_change_that_commits_while_a_body_is_made_is_told_in_the_next_one(
    repository: SqliteRepository, changes: ChangeOutbox, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change got its time before the slice was closed, and is committed after the claim began to look."""
    delivered(repository, 5)
    repository.save_all(entries([4]))
    entered, gate, asked = threading.Event(), threading.Event(), threading.Event()
    commit, paused = Tables.commit, GroupCommit.paused

    def held(tables: Tables) -> None:
        if threading.current_thread() is changing:
            entered.set()
            assert gate.wait(HANG)
        commit(tables)

    def pausing(commits: GroupCommit) -> contextlib.AbstractContextManager[None]:
        asked.set()
        return paused(commits)

    monkeypatch.setattr(Tables, "commit", held)
    monkeypatch.setattr(GroupCommit, "paused", pausing)
    changing = threading.Thread(target=repository.update_all, args=({name(4): DELIVERED},))
    changing.start()
    assert entered.wait(HANG)
    clock.advance(SETTLED)  # now its slice looks closed
    told: list[str] = []
    telling = threading.Thread(target=lambda: told.extend(all_told(changes)))
    telling.start()
    until(lambda: asked.is_set() or not telling.is_alive())
    assert told == []  # it waits until the change is committed
    gate.set()
    for thread in (changing, telling):
        thread.join(HANG)
    assert told == [name(4), name(5)]


def test_of_several_that_claim_at_once_one_gets_the_body(
    repository: SqliteRepository, changes: ChangeOutbox, clock: Clock
) -> None:
    for number in range(20):
        delivered(repository, number)
        clock.advance(SETTLED)
        start, found = threading.Barrier(4), list[Any]()

        def claim(start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait(HANG)
            found.append(claimed(changes))

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        bodies = [body for body in found if body is not None]
        assert [body.ids for body in bodies] == [[name(number)]]
        changes.handed_over(bodies[0])


def test_changes_that_commit_while_bodies_leave_are_all_told_and_none_backwards(path: Path) -> None:
    """On real clocks, with slices of a hundredth of a second, so that many close under the writers."""
    rank = {CONFIRMED: 1, DELIVERED: 2}
    with opened(path, 10.0) as repository:
        changes = repository.changes()
        repository.save_all(entries(range(800)))
        told: dict[str, int] = {}

        def change(first: int) -> None:
            for status in (CONFIRMED, DELIVERED):
                for number in range(first, first + 200, 5):
                    repository.update_all({name(each): status for each in range(number, number + 5)})

        def tell() -> None:
            while body := claimed(changes, 30):
                for each in body.changes:
                    assert rank[each.status] > told.get(each.message_id, 0)
                    told[each.message_id] = rank[each.status]
                changes.handed_over(body)

        threads = [threading.Thread(target=change, args=(first,)) for first in range(0, 800, 200)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            tell()
        for thread in threads:
            thread.join(HANG)
        while (claim := changes.claim(30, 0.0)).waiting or claim.batch:
            if claim.batch:
                changes.release(claim.batch)
                tell()
        assert told == {name(number): 2 for number in range(800)}
