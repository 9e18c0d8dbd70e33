"""The repository in a file: the contract, a restart, what the file holds at each moment, trouble, and races."""
from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from base_repository import look
from fastsmsing import Message
from helpers import Clock, every_thread_ends
from message_model import (
    Batch,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
)
from providers import HANG
from repository_contract import RETENTION, RepositoryContract, entries, entry, name
from sqlite_claims import OutboxClaims
from sqlite_repository import SqliteRepository
from sqlite_tables import Tables, entries_at

__all__ = ["every_thread_ends"]  # a fixture

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus


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


def all_due(repository: SqliteRepository) -> Batch:
    """Claims what waits, all of it."""
    return repository.claim(10_000, math.inf, flush=True).batch or Batch(())


def numbers(batch: Batch | None) -> list[int]:
    return [] if batch is None else [int(each[-12:], 16) for each in batch.ids]


def waiting(repository: SqliteRepository) -> list[int]:
    """What waits, in order; it stays where it is."""
    batch = all_due(repository)
    repository.release(batch)
    return numbers(batch)


def run(path: Path, statement: str) -> list[Any]:
    """What an SQL statement finds in the file, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement).fetchall()


class TestContract(RepositoryContract):
    @pytest.fixture
    def repository(self, path: Path, clock: Clock) -> Iterator[SqliteRepository]:
        with opened(path, RETENTION, clock=clock, wall_clock=lambda: 1.8e9 + clock()) as repository:
            yield repository

    @pytest.fixture
    def age(self, clock: Clock) -> Callable[[float], None]:
        return clock.advance

    def test_it_blocks_and_outlives_the_process(self, repository: SqliteRepository) -> None:
        assert (repository.blocking, repository.durable, repository.poll) == (True, True, None)
        assert repository.size() > 0

    def test_messages_are_forgotten_a_few_at_a_time_and_leave_nothing_behind(
        self, repository: SqliteRepository, path: Path, clock: Clock
    ) -> None:
        repository.save_all(entries(range(3_000)))
        repository.update_all({name(number): DELIVERED for number in range(3_000)})
        clock.advance(RETENTION * 1.02)
        calls = 0
        while repository.forget() == 0.0:
            calls += 1
        assert 4 <= calls <= 20
        assert run(path, "SELECT (SELECT count(*) FROM message), (SELECT count(*) FROM outbox)") == [(0, 0)]

    def test_a_retention_of_0_keeps_messages_for_ever(self, tmp_path: Path, clock: Clock) -> None:
        with opened(tmp_path / "kept.db", 0.0, clock=clock) as repository:
            repository.save(name(1))
            clock.advance(1e9)
            assert (repository.forget(), repository.get(name(1))) == (None, ACCEPTED)

    def test_a_remembered_message_takes_little_room(self, repository: SqliteRepository) -> None:
        for start in range(0, 5_000, 500):
            repository.save_all(entries(range(start, start + 500)))
            batch = repository.claim(500, 0.0).batch or Batch(())
            repository.handed_over(batch)
            repository.update_all(dict.fromkeys(batch.ids, DELIVERED))
        assert repository.size() / 5_000 < 2_000


# A restart


def test_a_restart_keeps_statuses_reasons_and_fingerprints(path: Path) -> None:
    updates: dict[int, MessageStatus | Reason] = {
        1: CONFIRMED, 2: FAILED, 3: DELIVERED, 4: Reason.ATTEMPTS, 5: Reason.EXPIRED, 6: Reason.CANCELLED
    }  # fmt: skip
    with opened(path) as repository:
        repository.save_all([entry(number, fingerprint=b"%d" % number) for number in range(8)])
        repository.update_all({name(number): update for number, update in updates.items()})
    with opened(path) as repository:
        assert [(repository.get(name(number)), repository.reason(name(number))) for number in range(9)] == [
            (ACCEPTED, None), (CONFIRMED, None), (FAILED, None), (DELIVERED, None), (FAILED, Reason.ATTEMPTS),
            (FAILED, Reason.EXPIRED), (FAILED, Reason.CANCELLED), (ACCEPTED, None), (NOT_FOUND, None)]  # fmt: skip
        errors = repository.save_all([entry(0), entry(1), entry(9)])
        assert [getattr(error, "fingerprint", None) for error in errors] == [b"0", b"1", None]


def test_a_restart_keeps_the_outbox_in_order_of_due_and_frees_what_was_claimed(path: Path) -> None:
    with opened(path) as repository:
        repository.save_all([entry(1, linger=900.0), entry(2), entry(3, linger=60.0), entry(4, linger=60.0)])
        assert numbers(repository.claim(2, 0.0).batch) == [2, 3]
    with opened(path) as repository:
        assert (waiting(repository), repository.backlog()) == ([2, 3, 4, 1], 4)
        repository.handed_over(repository.claim(2, 0.0).batch or Batch(()))
    with opened(path) as repository:
        repository.save_all([entry(5)])
        assert waiting(repository) == [5, 4, 1]


def test_a_restart_keeps_the_times_of_a_message(path: Path) -> None:
    wall, before, after = Clock(1.8e9), Clock(1_000.0), Clock(3.0)  # the second process counts from its own start
    with opened(path, wall_clock=wall, clock=before) as repository:
        repository.save_all([entry(1, linger=50.0, default=True, max_age=300.0), entry(2, linger=math.inf)])
    wall.advance(20.0)
    with opened(path, wall_clock=wall, clock=after) as repository:
        assert repository.claim(9, 0.0).due_in == pytest.approx(30.0)
        assert repository.expire()[1] == pytest.approx(280.0)
        after.advance(30.0)
        patient, default = reversed((repository.claim(9, 0.0).batch or Batch(())).entries)
    assert (default.linger, default.default_linger, default.max_age) == (50.0, True, 300.0)
    assert [default.accepted_at, default.due, default.expires_at] == pytest.approx([-17.0, 33.0, 283.0])
    assert (patient.linger, patient.default_linger, patient.max_age) == (math.inf, False, math.inf)
    assert (patient.due, patient.expires_at) == (math.inf, math.inf)


@pytest.mark.parametrize(("passed", "due_in"), [(0.0, 5.0), (3.0, 2.0), (6.0, 0.0), (-1e6, 5.0)])
def test_a_message_lingers_for_the_rest_of_its_time_and_never_for_longer(
    path: Path, passed: float, due_in: float
) -> None:
    """Also when the wall clock was set back meanwhile."""
    wall, clock = Clock(1.8e9), Clock()
    with opened(path, wall_clock=wall, clock=clock) as repository:
        repository.save_all([entry(1, linger=5.0)])
    wall.advance(passed)
    with opened(path, wall_clock=wall, clock=clock) as repository:
        if due_in:
            assert repository.claim(9, 0.0).due_in == pytest.approx(due_in)
            clock.advance(due_in)
        assert numbers(repository.claim(9, 0.0).batch) == [1]


def test_a_start_with_a_shorter_default_brings_forward_what_lingers_by_default(path: Path) -> None:
    wall, clock = Clock(1.8e9), Clock()
    with opened(path, wall_clock=wall, clock=clock) as repository:
        repository.save_all([entry(1, linger=600.0, default=True), entry(2, linger=300.0)])
        repository.save_all([entry(3, linger=math.inf, default=True), entry(4, linger=600.0)])
    wall.advance(10.0)
    with opened(path, wall_clock=wall, clock=clock) as repository:
        repository.hasten(60.0)
        assert repository.claim(9, 0.0).due_in == pytest.approx(50.0)
        assert waiting(repository) == [1, 3, 2, 4]
        repository.hasten(900.0)
        assert repository.claim(9, 0.0).due_in == pytest.approx(50.0), "a longer one puts nothing off"


def test_what_is_claimed_as_the_default_changes_can_still_be_released(repository: SqliteRepository) -> None:
    repository.save_all([entry(number, linger=600.0, default=True) for number in range(4)])
    batch = repository.claim(2, math.inf).batch or Batch(())
    repository.hasten(60.0)
    assert waiting(repository) == [2, 3]
    repository.release(batch)
    assert waiting(repository) == [0, 1, 2, 3]
    assert repository.claim(9, 0.0).due_in == pytest.approx(60.0)


def test_a_start_and_a_claim_read_no_more_than_a_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as repository:
        repository.save_all(entries(range(30_000)))
    connect, steps = sqlite3.connect, []

    def counted(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.set_progress_handler(lambda: steps.append(1), 100)  # called every 100 steps of SQLite's machine
        return db

    monkeypatch.setattr(sqlite3, "connect", counted)
    with opened(path) as repository:
        assert numbers(repository.claim(100, 5.0).batch) == list(range(100))
        assert repository.backlog() == 30_000
    assert len(steps) < 100, "more than 10,000 steps: it went through the outbox"


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jump_of_the_wall_clock_changes_nothing_in_a_running_process(path: Path, jump: float) -> None:
    clock, wall = Clock(), Clock(1.8e9)
    with opened(path, 60.0, clock=clock, wall_clock=wall) as repository:
        repository.save_all([entry(1), entry(2, linger=5.0, max_age=50.0)])
        repository.handed_over(repository.claim(1, 0.0).batch or Batch(()))
        wall.advance(jump)
        assert (repository.forget(), repository.get(name(1))) == (60.0, ACCEPTED)
        assert (repository.ages(), repository.expire()) == ((0.0, 0.0), ([], 50.0))
        repository.save_all([entry(3, linger=6.0)])
        clock.advance(4.0)
        assert repository.claim(9, 0.0).due_in == pytest.approx(1.0)
        clock.advance(1.0)
        assert numbers(repository.claim(9, 0.0).batch) == [2, 3]


def test_time_passes_while_it_is_closed_and_the_retention_of_this_run_counts(path: Path) -> None:
    wall = Clock(1.8e9)
    for retention, seconds, expected in ((0.0, 65.0, DELIVERED), (120.0, 0.0, DELIVERED), (60.0, 0.0, NOT_FOUND)):
        with opened(path, retention, wall_clock=wall) as repository:
            if not retention:
                repository.save(name(1))
                repository.update(name(1), DELIVERED)
            repository.forget()
            assert repository.get(name(1)) == expected
        wall.advance(seconds)


# Order, against a model


class Model:
    """A sorted list of what the outbox should hold."""

    def __init__(self) -> None:
        self.waits: list[tuple[float, int, Entry]] = []  # due, number, entry
        self.batches: list[list[tuple[float, int, Entry]]] = []

    def claim(self, now: float, size: int, horizon: float, flush: bool) -> tuple[Any, ...]:
        """What a claim should find: the batch, what waits then, and the figures."""
        self.waits.sort(key=lambda each: each[:2])
        first = self.waits[:size]
        found = look([due for due, _, _ in first], now, size, horizon, len(self.waits), flush)
        if found is not None:
            return [], found.waiting, found.due_in, found.full_in, found.near
        self.waits = self.waits[size:]
        self.batches.append(first)
        return [number for _, number, _ in first], len(self.waits)


class Play:
    """Random calls of a repository, each compared with the model. Times are whole seconds, so that sums are exact."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._rng, self._clock, self._model = path, random.Random(seed), Clock(), Model()
        self._numbers = itertools.count()
        self.repository = self._open()

    def _open(self) -> SqliteRepository:
        clock = self._clock
        repository = SqliteRepository(str(self._path), clock=clock, wall_clock=lambda: 1.8e9 + clock())
        repository._file.writer.execute("PRAGMA synchronous = OFF")  # nothing here is about the disk
        return repository

    def step(self) -> None:
        """Calls something, mostly `save_all` and `claim`."""
        settling = [
            self.release, self.hand_over, self.report, self.report_on_one_that_waits, self.cancel, self.expire,
        ]  # fmt: skip
        self._rng.choice([self.save, self.claim, self.wait] * 12 + settling * 4 + [self.restart, self.hasten])()
        model = self._model
        assert self.repository.backlog() == len(model.waits) + sum(map(len, model.batches))

    def save(self) -> None:
        rng = self._rng
        lingers = rng.choice([[5.0], [0.0, 1.0, 60.0, 3600.0, math.inf]])
        for _ in range(rng.randint(1, 3)):
            new = [entry(next(self._numbers), linger=rng.choice(lingers), default=rng.random() < 0.3,
                         max_age=rng.choice([math.inf, 30.0])) for _ in range(rng.randint(1, 6))]  # fmt: skip
            assert self.repository.save_all(new) == [None] * len(new)
            self._model.waits += [(self._clock() + each.linger, numbers(Batch((each,)))[0], each) for each in new]

    def claim(self) -> None:
        size, horizon = self._rng.choice([1, 3, 10]), self._rng.choice([0.0, 5.0, 100.0, math.inf])
        flush = self._rng.random() < 0.1
        claim = self.repository.claim(size, horizon, flush=flush)
        found: tuple[Any, ...] = numbers(claim.batch), claim.waiting
        if claim.batch is None:
            found += claim.due_in, claim.full_in, claim.near
        assert found == self._model.claim(self._clock(), size, horizon, flush)

    def wait(self) -> None:
        self._clock.advance(self._rng.choice([1.0, 10.0, 100.0]))

    def release(self) -> None:
        chosen, part = self._part_of_a_batch()
        self.repository.release(chosen)
        self._model.waits += part

    def hand_over(self) -> None:
        self.repository.handed_over(self._part_of_a_batch()[0])

    def report(self) -> None:
        chosen, _ = self._part_of_a_batch()
        assert self.repository.update_all(dict.fromkeys(chosen.ids, DELIVERED)) == {}
        assert numbers(self.repository.unsent(chosen)) == []

    def report_on_one_that_waits(self) -> None:
        model = self._model
        if model.waits:
            chosen = model.waits.pop(self._rng.randrange(len(model.waits)))
            assert self.repository.update_all({name(chosen[1]): CONFIRMED}) == {}

    def cancel(self) -> None:
        model = self._model
        assert not any(self.repository.cancel(name(number)) for batch in model.batches for _, number, _ in batch)
        if model.waits:
            chosen = model.waits.pop(self._rng.randrange(len(model.waits)))
            assert self.repository.cancel(name(chosen[1]))

    def expire(self) -> None:
        model = self._model
        late = [each for each in model.waits if each[2].accepted_at + each[2].max_age <= self._clock()]
        model.waits = [each for each in model.waits if each not in late]
        assert sorted(self.repository.expire()[0]) == sorted(name(number) for _, number, _ in late)

    def restart(self) -> None:
        self.repository.close()
        self.repository = self._open()
        self._model.waits += itertools.chain(*self._model.batches)
        self._model.batches = []

    def hasten(self) -> None:
        self.restart()
        self.repository.hasten(20.0)
        self._model.waits = [
            (min(due, each.accepted_at + 20.0) if each.default_linger else due, number, each)
            for due, number, each in self._model.waits
        ]

    def _part_of_a_batch(self) -> tuple[Batch, list[tuple[float, int, Entry]]]:
        batches, rng = self._model.batches, self._rng
        batch = batches.pop(rng.randrange(len(batches))) if batches else []
        part = [each for each in batch if rng.random() < 0.7]
        batches.append([each for each in batch if each not in part])
        return Batch(tuple(each for _, _, each in part)), part


@pytest.mark.parametrize("front", [4, 20, 10_000])
def test_random_calls_find_what_a_sorted_list_would(
    tmp_path: Path, front: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlite_claims.LONGEST_FRONT", front)
    for seed in range(60):
        play = Play(tmp_path / f"{seed}.db", seed)
        try:
            for _ in range(60):
                play.step()
        finally:
            play.repository.close()


# Races


class Gate:
    """Stands before or behind a call; the first thread that comes there is held until the gate opens."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        if not self.entered.is_set():
            self.entered.set()
            assert self.opened.wait(HANG), "nobody opened the gate"

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **options: Any) -> Any:
            self.pass_through()
            return call(*args, **options)

        return gated


def test_a_code_that_is_committed_during_a_claim_is_claimed_next(
    repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before the cursor, and the claim has read the file when nobody could know of it yet."""
    repository.save_all(entries(range(10), linger=3600.0))
    gate = Gate()
    monkeypatch.setattr(OutboxClaims, "publish", gate.before(OutboxClaims.publish))
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(repository.save_all, [entry(100), entry(101, linger=3600.0)])
        assert gate.entered.wait(HANG)
        assert repository.get(name(100)) is ACCEPTED, "it is committed"
        assert numbers(repository.claim(5, math.inf).batch) == [0, 1, 2, 3, 4]
        assert repository.claim(20, 0.0, flush=True).waiting == 0
        gate.opened.set()
        assert saving.result(HANG) == [None, None]
    assert numbers(repository.claim(5, 0.0).batch) == [100, 101]
    assert repository.claim(5, 0.0, flush=True).batch is None


@pytest.mark.parametrize("read_before", [False, True], ids=["to be read", "read already"])
def test_a_message_that_is_being_cancelled_is_not_claimed(
    repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch, read_before: bool
) -> None:
    repository.save_all(entries(range(3)))
    if read_before:
        waiting(repository)
    gate = Gate()
    monkeypatch.setattr(Tables, "update", gate.before(Tables.update))
    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(repository.cancel, name(1))
        assert gate.entered.wait(HANG)
        claim = repository.claim(9, 0.0)
        assert (numbers(claim.batch), claim.waiting) == ([0, 2], 0)
        gate.opened.set()
        assert cancelling.result(HANG)
    assert (repository.reason(name(1)), repository.backlog()) == (Reason.CANCELLED, 2)


def until_waiting(repository: SqliteRepository, changes: int) -> None:
    """Returns when so many changes wait for the one that is being committed."""
    deadline = time.monotonic() + HANG
    while len(repository._commits._jobs) < changes:
        assert time.monotonic() < deadline, "it hangs"


def test_saves_of_one_commit_are_counted_together_and_none_can_be_cancelled_before_it(
    repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waiting(repository) == []
    gate = Gate()
    monkeypatch.setattr(Tables, "commit", gate.before(Tables.commit))
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(repository.save_all, [entry(0)])
        assert gate.entered.wait(HANG)
        calls: list[Callable[[], Any]] = [
            lambda: repository.save_all([entry(1), entry(2)], 4),
            lambda: repository.cancel(name(1)),
            lambda: repository.save_all([entry(3), entry(4)], 4),
        ]
        behind = []
        for place, call in enumerate(calls):
            behind.append(pool.submit(call))
            until_waiting(repository, place + 1)
        gate.opened.set()
        saved, cancelled, more = (each.result(HANG) for each in behind)
        assert first.result(HANG) == [None]
    assert (saved, cancelled) == ([None, None], None)
    assert [type(error) for error in more] == [type(None), OverloadedError]
    assert repository.claim(9, 0.0).waiting == 0
    assert repository.backlog() == 4


def test_what_cannot_be_read_for_a_batch_waits_as_before(
    repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.save_all(entries(range(3)))

    def fail(*args: object) -> list[Entry]:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr("sqlite_repository.entries_at", fail)
        with pytest.raises(RepositoryUnavailableError, match="the database cannot be read: disk I/O error"):
            repository.claim(9, 0.0)
    assert numbers(repository.claim(9, 0.0).batch) == [0, 1, 2]


@pytest.mark.parametrize("end", [lambda repository: repository.cancel(name(1)), lambda repository: repository.expire()])
def test_a_message_that_could_not_be_cancelled_or_expired_waits_as_before(
    path: Path, clock: Clock, repository: SqliteRepository, end: Callable[[SqliteRepository], object]
) -> None:
    repository.save_all([entry(0), entry(1, max_age=1.0), entry(2)])
    clock.advance(2.0)
    run(path, "CREATE TRIGGER kept BEFORE DELETE ON outbox BEGIN SELECT RAISE(ABORT, 'kept'); END")
    with pytest.raises(sqlite3.IntegrityError):
        end(repository)
    assert (repository.get(name(1)), repository.reason(name(1)), waiting(repository)) == (ACCEPTED, None, [0, 1, 2])


def test_what_is_reported_on_during_a_claim_is_not_in_the_batch(
    repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.save_all(entries(range(3)))
    gate = Gate()
    monkeypatch.setattr("sqlite_repository.entries_at", gate.before(entries_at))
    with ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(repository.claim, 9, 0.0)
        assert gate.entered.wait(HANG)
        assert repository.update_all({name(0): DELIVERED}) == {}
        gate.opened.set()
        claim = claiming.result(HANG)
    assert (claim.batch, claim.waiting, claim.due_in) == (None, 2, 0.0), "it is to be looked at again"
    assert numbers(repository.claim(9, 0.0).batch) == [1, 2]


def test_of_cancels_expiry_saves_and_claims_at_once_each_message_has_one_end(path: Path) -> None:
    """Real threads and a real clock: what was saved is claimed, cancelled or expired, and never two of them."""
    claimed: list[int] = []
    cancelled: list[int] = []
    expired: list[int] = []
    over = threading.Event()
    with opened(path) as repository:

        def save(thread: int) -> None:
            rng = random.Random(thread)
            for start in range(thread * 1_000, thread * 1_000 + 400, 10):
                new = [entry(start + each, linger=rng.choice([0.0, 1e-3, 3600.0]), max_age=rng.choice([1e-3, math.inf]))
                       for each in range(10)]  # fmt: skip
                assert repository.save_all(new) == [None] * 10
                cancelled.extend(number for number in (start, start + 5) if repository.cancel(name(number)))

        def claim() -> None:
            while True:
                last = over.is_set()
                found = repository.claim(7, math.inf, flush=last)
                claimed.extend(numbers(found.batch))
                if last and not found.batch and not found.waiting:
                    return

        def expire() -> None:
            while not over.is_set():
                expired.extend(int(each[-12:], 16) for each in repository.expire()[0])

        with ThreadPoolExecutor(8) as pool:
            saving = [pool.submit(save, thread) for thread in range(3)]
            others = [pool.submit(claim), pool.submit(claim), pool.submit(expire)]
            for each in saving:
                each.result(HANG)
            over.set()
            for each in others:
                each.result(HANG)
        assert waiting(repository) == []
        left = sorted(claimed + cancelled + expired)
        assert left == sorted(thread * 1_000 + number for thread in range(3) for number in range(400))
        assert repository.backlog() == len(claimed)


# What the file holds


@contextlib.contextmanager
def after_crash(path: Path) -> Iterator[SqliteRepository]:
    """A repository on a copy of the file as it is at this moment, which is what a crash would leave."""
    copy = path.with_name("copy.db")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with opened(copy) as repository:
        yield repository
    copy.unlink()


def commits(path: Path) -> int:
    """How many commits the write-ahead log holds (SQLite manual, "WAL-mode File Format")."""
    data = Path(f"{path}-wal").read_bytes()
    frame = 24 + int.from_bytes(data[8:12], "big")
    heads = [data[start : start + 16] for start in range(32, len(data), frame)]
    return sum(head[4:8] != bytes(4) and head[8:] == data[16:24] for head in heads)


def test_what_was_promised_is_in_the_file_the_moment_it_is_promised(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries(range(4)))
    with after_crash(path) as copy:
        assert waiting(copy) == [0, 1, 2, 3]
    repository.handed_over(repository.claim(1, 0.0).batch or Batch(()))
    with after_crash(path) as copy:
        assert (copy.get(name(0)), waiting(copy)) == (ACCEPTED, [1, 2, 3])
    repository.update(name(1), DELIVERED)
    assert repository.cancel(name(2))
    with after_crash(path) as copy:
        assert (copy.get(name(1)), copy.reason(name(2)), waiting(copy)) == (DELIVERED, Reason.CANCELLED, [3])


def test_nothing_is_promised_before_it_is_in_the_file(
    path: Path, repository: SqliteRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(Tables, "commit", gate.before(Tables.commit))
    with ThreadPoolExecutor(2) as pool:
        saving = pool.submit(repository.save_all, [entry(1)])
        assert gate.entered.wait(HANG)
        found = saving.done(), repository.get(name(1)), repository.backlog(), repository.claim(1, 0.0).batch
        assert found == (False, NOT_FOUND, 0, None)
        closing = pool.submit(repository.close)
        gate.opened.set()
        assert (saving.result(HANG), closing.result(HANG)) == ([None], None)
    with opened(path) as reopened:
        assert waiting(reopened) == [1]


def test_messages_saved_updated_or_handed_over_together_are_one_commit(
    path: Path, repository: SqliteRepository
) -> None:
    before = commits(path)
    repository.save_all(entries(range(250)))  # of several statements
    assert commits(path) == before + 1
    repository.update_all({name(number): (CONFIRMED, DELIVERED, Reason.EXPIRED)[number % 3] for number in range(240)})
    assert commits(path) == before + 2
    repository.handed_over(repository.claim(9, 0.0).batch or Batch(()))
    assert commits(path) == before + 3
    assert waiting(repository) == [249]


def test_a_message_costs_no_more_than_three_pages_of_the_log(path: Path, repository: SqliteRepository) -> None:
    """A page for each of: its status, its place in the outbox, its place in the order of due."""
    repository.save_all(entries(range(3)))
    size = Path(f"{path}-wal").stat().st_size
    repository.save_all([entry(4)])
    assert Path(f"{path}-wal").stat().st_size - size == 3 * (4096 + 24)


@pytest.mark.parametrize("length", [1, 10_000])
@pytest.mark.parametrize("how", ["handed over", "cancelled", "expired", CONFIRMED, DELIVERED, Reason.ATTEMPTS])
def test_numbers_and_texts_are_overwritten_when_they_are_not_needed_any_more(
    path: Path, clock: Clock, how: object, length: int
) -> None:
    with opened(path, clock=clock) as repository:
        for number in range(20):
            message = Message(f"4800000{number:04}", f"<{number:04}" * length, name(number))
            repository.save_all([Entry(message, max_age=9.0 if number < 15 else math.inf)])
        if how == "handed over":
            repository.handed_over(repository.claim(15, 0.0).batch or Batch(()))
        elif how == "cancelled":
            assert all(repository.cancel(name(number)) for number in range(15))
        elif how == "expired":
            clock.advance(10.0)
            assert len(repository.expire()[0]) == 15
        elif isinstance(how, (MessageStatus, Reason)):
            repository.update_all({name(number): how for number in range(15)})
    raw = b"".join(each.read_bytes() for each in path.parent.iterdir())
    found = [(f"4800000{number:04}".encode() in raw, f"<{number:04}".encode() in raw) for number in range(20)]
    assert found == [(number >= 15,) * 2 for number in range(20)]


@pytest.mark.parametrize("reported", [False, True])
def test_an_id_that_was_sent_and_forgotten_can_be_used_and_claimed_again(
    repository: SqliteRepository, clock: Clock, reported: bool
) -> None:
    repository.save_all(entries(range(2)))
    batch = repository.claim(1, 0.0).batch or Batch(())
    if reported:
        repository.update(name(0), DELIVERED)
    else:
        repository.handed_over(batch)
    clock.advance(1.1 * RETENTION)
    again = entries(range(2))
    assert [type(error) for error in repository.save_all(again)] == [type(None), DuplicateMessageError]
    assert (waiting(repository), again[0].accepted_at) == ([1, 0], clock())


def test_nothing_is_looked_for_before_it_may_be_due(path: Path, repository: SqliteRepository, clock: Clock) -> None:
    repository.save_all(entries(range(3)))
    repository.handed_over(repository.claim(2, 0.0).batch or Batch(()))
    for seconds, expected in ((0.0, (100.0, 3)), (30.0, (70.0, 3)), (71.0, (100.0, 1))):
        clock.advance(seconds)
        assert (repository.forget(), run(path, "SELECT count(*) FROM message")[0][0]) == expected
    before = commits(path)
    assert (repository.expire(), repository.forget()) == (([], math.inf), 100.0)
    assert commits(path) == before


# Trouble


@pytest.mark.parametrize("bad", [("48", "x", "\ud800"), ("48", "\ud800", "x"), ("48", object(), "x")])
def test_a_message_that_cannot_be_stored_costs_only_itself(repository: SqliteRepository, bad: tuple[Any, ...]) -> None:
    errors = repository.save_all([entry(1), entry(2), Entry(Message(*bad)), entry(1), entry(3)])
    assert [error if error is None else isinstance(error, DuplicateMessageError) for error in errors] == [
        None, None, False, True, None]  # fmt: skip
    assert (waiting(repository), repository.backlog()) == ([1, 2, 3], 3)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Someone else writes to the file until the block ends."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def full(repository: SqliteRepository) -> Iterator[None]:
    """The disk is full until the block ends."""
    writer = repository._file.writer
    writer.execute("PRAGMA max_page_count = 1").fetchone()  # it has more already: there may be no new one
    yield
    writer.execute("PRAGMA max_page_count = 1000000").fetchone()


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_a_file_that_cannot_be_written_can_be_read_is_told_logged_once_and_recovers(
    trouble: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sqlite_file.BUSY_TIMEOUT", 0.01)
    large = "x" * 60_000  # more than there is room for
    with opened(path) as repository:
        repository.save_all([entry(0), entry(9)])
        batch = repository.claim(1, 0.0).batch or Batch(())
        changes: list[Callable[[], object]] = [
            lambda: repository.save_all([entry(1, large), entry(0), entry(2, large)]),
            repository.check,
            repository.forget,
            lambda: repository.handed_over(batch),
            lambda: repository.update_all({name(0): DELIVERED}),
            lambda: repository.cancel(name(9)),
        ]
        with locked(path) if trouble == "locked" else full(repository):
            for change in changes if trouble == "locked" else changes[:1] * 5:
                with pytest.raises(RepositoryUnavailableError, match=trouble) as refused:
                    change()
                assert str(path.parent) not in str(refused.value), "clients of the service read it"
            assert [repository.get(name(number)) for number in range(3)] == [ACCEPTED, NOT_FOUND, NOT_FOUND]
            assert (repository.reason(name(9)), repository.backlog()) == (None, 2)
        assert repository.save_all([entry(1, large)]) == [None]
        repository.handed_over(batch)
        assert waiting(repository) == [9, 1]
        repository.check()
    lines = [(record.levelname, str(path) in record.message) for record in caplog.records]
    assert lines == [("ERROR", True), ("WARNING", True)], "when it begins and when it ends"


@pytest.mark.parametrize("found_by", ["a change", "a read"])
def test_a_damaged_page_costs_only_what_is_on_it_and_is_told_once_and_by_a_check(
    path: Path, found_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [name(number) for number in range(1_000)]
    with opened(path) as repository:
        repository.save_all(entries(range(1_000)))
        repository.handed_over(all_due(repository))
    raw = bytearray(path.read_bytes())  # SQLite manual, "Database File Format": 0x0A is a leaf of an index
    pages = [page for page in range(4096, len(raw), 4096) if raw[page] == 0x0A]
    spoilt = next(page for page in pages if f"{names[500]}ACCEPTED".encode() in raw[page : page + 4096])
    lost = set(map(bytes.decode, re.findall(rb"([-0-9a-f]{36})ACCEPTED", raw[spoilt : spoilt + 4096])))
    raw[spoilt : spoilt + 4096] = b"\xa5" * 4096
    path.write_bytes(raw)
    with opened(path) as repository:
        repository.check()
        if found_by == "a read":
            for _ in range(2):
                with pytest.raises(RepositoryUnavailableError, match="malformed"):
                    repository.get(names[500])
        else:
            errors = repository.update_all(dict.fromkeys(names, DELIVERED))
            assert lost <= errors.keys()
            assert len(errors) < len(names) / 2, "but for those between two pages"
            assert {type(error) for error in errors.values()} == {RepositoryUnavailableError}
            assert {repository.get(each) for each in names if each not in errors} == {DELIVERED}
        with pytest.raises(RepositoryUnavailableError, match="damaged"):
            repository.check()
        assert repository.save_all([entry(5_000)]) == [None]
    assert ["is damaged" in message for message in caplog.messages] == [True]


def spoil_outbox(path: Path, number: int, how: str) -> set[int]:
    """Damages what the file's outbox has of a message; returns the messages that cannot be read any more."""
    raw = bytearray(path.read_bytes())  # 0x0D is a leaf of a table
    pages = [page for page in range(4096, len(raw), 4096) if raw[page] == 0x0D]
    page = next(page for page in pages if name(number).encode() in raw[page : page + 4096])
    lost = {int(each, 16) for each in re.findall(rb"(?s)-([0-9a-f]{12}).{1,24}48123456789", raw[page : page + 4096])}
    if how == "a page":
        raw[page : page + 4096] = b"\xa5" * 4096
    else:
        at = raw.index(b"48123456789", raw.index(name(number).encode(), page)) + 11
        raw[at], lost = 0xFF, {number}  # the text is not UTF-8 any more
    path.write_bytes(raw)
    return lost


@pytest.mark.parametrize("how", ["a page", "a text"])
def test_what_cannot_be_read_from_the_outbox_keeps_nothing_else_from_being_sent(
    path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as repository:
        repository.save_all([entry(number, max_age=1e6) for number in range(300)])
    lost = spoil_outbox(path, 150, how)
    with opened(path) as repository:
        repository.hasten(0.0)
        claimed: list[int] = []
        while (claim := repository.claim(100, 0.0)).batch is not None or claim.due_in == 0.0:
            claimed += numbers(claim.batch)
        assert claimed == [number for number in range(300) if number not in lost]
        assert (claim.waiting, repository.backlog()) == (0, 300)
        assert repository.save_all([entry(300)]) == [None]
        assert numbers(repository.claim(1, 0.0).batch) == [300]
        with pytest.raises(RepositoryUnavailableError, match="damaged"):
            repository.check()
    lines = [message for message in caplog.messages if "cannot be read" in message]
    assert [f" {len(lost)} message" in line for line in lines] == [True]
    assert "48123456789" not in caplog.text


def test_what_cannot_be_read_from_the_outbox_keeps_little_else_from_expiring(path: Path, clock: Clock) -> None:
    """What is deleted from a page beside the damaged one may have to be moved there."""
    with opened(path, clock=clock) as repository:
        repository.save_all([entry(number, max_age=50.0, linger=number / 10) for number in range(300)])
    lost = spoil_outbox(path, 10, "a page")
    with opened(path, clock=clock) as repository:
        assert repository.claim(100, 0.0, flush=True).batch is None
        clock.advance(100.0)
        expired = {int(each[-12:], 16) for each in repository.expire()[0]}
        assert (expired & lost, len(expired) > 200) == (set(), True)
        assert all(repository.reason(name(number)) is Reason.EXPIRED for number in expired)
        with pytest.raises(RepositoryUnavailableError, match="damaged"):
            repository.expire()


def test_more_damaged_messages_than_expire_at_a_time_keep_no_others_from_expiring(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sqlite_repository", "sqlite_tables"):
        monkeypatch.setattr(f"{module}.EXPIRE_STEP", 10)
    with opened(path, clock=clock) as repository:
        repository.save_all([entry(number, max_age=50.0) for number in range(300)])
    assert len(spoil_outbox(path, 10, "a page")) > 20
    with opened(path, clock=clock) as repository:
        clock.advance(100.0)
        expired = 0
        for _ in range(40):
            with contextlib.suppress(RepositoryUnavailableError):
                expired += len(repository.expire()[0])
    assert expired > 200


def test_a_disk_that_cannot_be_read_for_a_moment_costs_no_message(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries(range(3)))
    failing = mock.patch("sqlite_repository.entries_at", side_effect=sqlite3.OperationalError("disk I/O error"))
    with failing, pytest.raises(RepositoryUnavailableError):
        repository.claim(3, 0.0)
    assert waiting(repository) == [0, 1, 2]
    repository.check()


def test_a_row_that_makes_no_sense_costs_only_itself(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries(range(3)))
    run(path, f"UPDATE message SET status = 'EATEN' WHERE id = '{name(1)}'")
    updates = {name(0): CONFIRMED, name(1): CONFIRMED, name(2): DELIVERED}
    assert list(repository.update_all(updates)) == [name(1)]
    assert (repository.get(name(0)), repository.get(name(2))) == (CONFIRMED, DELIVERED)


def test_a_text_that_is_no_utf8_costs_only_its_message_and_is_not_quoted(
    path: Path, repository: SqliteRepository, caplog: pytest.LogCaptureFixture
) -> None:
    repository.save_all(entries(range(3)))
    run(path, f"UPDATE message SET status = CAST(x'C1{b'CCEPTED'.hex()}' AS TEXT) WHERE id = '{name(1)}'")
    updates = {name(0): CONFIRMED, name(1): CONFIRMED, name(2): DELIVERED}
    assert list(repository.update_all(updates)) == [name(1)]
    assert (repository.get(name(0)), repository.get(name(2))) == (CONFIRMED, DELIVERED)
    with pytest.raises(RepositoryUnavailableError, match="damaged"):
        repository.check()
    assert "CCEPTED" not in caplog.text


def test_a_row_that_somebody_deleted_stops_nothing(path: Path, repository: SqliteRepository) -> None:
    repository.save_all(entries(range(3)))
    assert waiting(repository) == [0, 1, 2]
    run(path, "DELETE FROM outbox WHERE place = 1")
    assert repository.claim(9, 0.0).due_in == 0.0
    assert numbers(repository.claim(9, 0.0).batch) == [1, 2]


def test_of_a_group_with_a_message_that_fails_the_others_are_written_unless_the_disk_is_full(
    path: Path, repository: SqliteRepository
) -> None:
    """Should some be written and others not, nobody could tell the callers of a group what became of it."""
    for number, failing in ((1, "RAISE(ABORT, 'bad')"), (3, "json('{')")):
        run(path, f"CREATE TRIGGER t{number} BEFORE INSERT ON message WHEN NEW.id = '{name(number)}'"
                  f" BEGIN SELECT {failing}; END")  # fmt: skip
    with pytest.raises(RepositoryUnavailableError):
        repository.save_all(entries(range(4)))
    assert waiting(repository) == []
    errors = repository.save_all(entries(range(3)))
    assert [type(error) for error in errors] == [type(None), sqlite3.IntegrityError, type(None)]
    assert waiting(repository) == [0, 2]


def test_what_cannot_be_forgotten_is_an_error(path: Path, repository: SqliteRepository, clock: Clock) -> None:
    repository.save(name(1))
    run(path, "CREATE TRIGGER kept BEFORE DELETE ON message BEGIN SELECT RAISE(ABORT, 'kept');END")
    clock.advance(1_000.0)
    with pytest.raises(sqlite3.IntegrityError):
        repository.forget()


def test_after_the_end_every_call_is_refused_and_one_file_is_left(path: Path) -> None:
    with opened(path) as repository:
        repository.save_all([entry(1)])
        batch = repository.claim(1, 0.0).batch or Batch(())
    calls: tuple[Callable[[], object], ...] = (
        lambda: repository.save_all([entry(2)]), lambda: repository.get(name(1)), lambda: repository.reason(name(1)),
        lambda: repository.update_all({name(1): DELIVERED}), lambda: repository.claim(1, 0.0), repository.ages,
        lambda: repository.handed_over(batch), lambda: repository.cancel(name(1)), repository.expire,
        lambda: repository.hasten(1.0), repository.forget, repository.check,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RepositoryUnavailableError, match="the database is closed"):
            call()
    repository.close()
    assert {each.name for each in path.parent.iterdir()} == {"sms.db", "sms.db.lock"}


@pytest.mark.parametrize("moment", [1, 30])
def test_a_caller_is_answered_truly_or_refused_whenever_it_is_closed(path: Path, moment: int) -> None:
    repository, acknowledged, enough = SqliteRepository(str(path)), list[int](), threading.Semaphore(0)

    def call(thread: int) -> None:
        with contextlib.suppress(RepositoryUnavailableError):
            for start in itertools.count(thread * 1_000_000, 3):
                group = range(start, start + 3)
                assert repository.save_all(entries(group)) == [None] * 3
                acknowledged.extend(group)
                enough.release()
                assert repository.get(name(start)) == ACCEPTED

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call, thread) for thread in range(4)]
        for _ in range(moment):
            assert enough.acquire(timeout=HANG)
        repository.close()
        assert [caller.result(HANG) for caller in callers] == [None] * 4
    with opened(path) as reopened:
        assert sorted(waiting(reopened)) == sorted(acknowledged)
