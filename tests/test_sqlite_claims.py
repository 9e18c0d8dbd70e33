"""What a look reads, on tables of nothing but keys: the order and the races are in test_sqlite_repository.py."""
from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator

import pytest

from sqlite_claims import AGAIN, Key, OutboxClaims

INFINITY = math.inf


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.execute("CREATE TABLE outbox (place INTEGER PRIMARY KEY, due REAL NOT NULL)")
        db.execute("CREATE INDEX outbox_due ON outbox (due)")
        yield db


def commit(db: sqlite3.Connection, claims: OutboxClaims, keys: list[Key]) -> None:
    db.executemany("INSERT INTO outbox (due, place) VALUES (?, ?)", keys)
    claims.publish(keys, [], 0)


def take(db: sqlite3.Connection, claims: OutboxClaims, size: int) -> list[int]:
    return [int(place) for _, place in claims.take(db, size, 0.0, INFINITY, flush=True)[0]]


@contextlib.contextmanager
def steps(db: sqlite3.Connection) -> Iterator[list[int]]:
    """Grows by 1 with every ten steps of SQLite's machine until the block ends."""
    made: list[int] = []
    db.set_progress_handler(lambda: made.append(1), 10)
    yield made
    db.set_progress_handler(None, 10)


def test_what_has_been_read_is_not_read_again_and_what_is_new_is_not_read_at_all(db: sqlite3.Connection) -> None:
    claims = OutboxClaims(0, 0)
    commit(db, claims, [(60.0, place) for place in range(1, 6)])
    assert claims.take(db, 10, 0.0, 0.0, flush=False)[1].near == 0
    with steps(db) as made:
        for place in range(6, 100):
            assert claims.take(db, 10, 0.0, 0.0, flush=False)[1].waiting == place - 1
            claims.publish([(60.0, place)], [], 0)
        assert take(db, claims, 10) == list(range(1, 11))
    assert made == []


@pytest.mark.parametrize("waiting", [0, 400, 20_000])
@pytest.mark.parametrize("claimed", [0, 400, 20_000])
def test_a_claim_costs_the_same_whatever_waits_and_is_claimed(
    db: sqlite3.Connection, waiting: int, claimed: int
) -> None:
    """All of them due at the same time, which no index tells apart."""
    claims = OutboxClaims(0, 0)
    commit(db, claims, [(60.0, place) for place in range(1, claimed + 1)])
    while take(db, claims, 100):
        pass
    commit(db, claims, [(60.0, place) for place in range(claimed + 1, claimed + waiting + 1)])
    take(db, claims, 100)
    commit(db, claims, [(0.0, claimed + waiting + 1)])
    with steps(db) as made:
        expected = list(range(claimed + 101, claimed + 200)) if waiting else []
        assert take(db, claims, 100) == [claimed + waiting + 1, *expected]
    assert len(made) < 300


def test_while_a_transaction_has_a_message_it_is_looked_for_since_the_transaction_may_be_undone(
    db: sqlite3.Connection,
) -> None:
    claims = OutboxClaims(0, 0)
    commit(db, claims, [(60.0, 1)])
    assert claims.reserve((60.0, 1))
    due = [claims.take(db, 10, now, 0.0, flush=False)[1] for now in (0.0, 59.0, 70.0)]
    assert [(each.waiting, each.due_in) for each in due] == [(1, 60.0), (1, 1.0), (1, AGAIN)]
    claims.release([1])
    assert claims.take(db, 10, 70.0, 0.0, flush=False)[0] == [(60.0, 1)]
    claims.publish([], [1], 1)
    assert claims.take(db, 10, 70.0, 0.0, flush=False)[1].due_in == INFINITY


def test_memory_holds_no_more_keys_than_it_may(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite_claims.LONGEST_FRONT", 100)
    claims = OutboxClaims(0, 0)
    assert take(db, claims, 10) == []
    for place in range(1, 1_001):
        commit(db, claims, [(float(place % 7), place)])
        assert len(claims._front) <= 100
    order = sorted(range(1, 1_001), key=lambda place: (place % 7, place))
    assert [place for _ in range(100) for place in take(db, claims, 10)] == order


def test_reading_on_costs_the_same_at_the_end_of_a_long_outbox(db: sqlite3.Connection) -> None:
    """As after a start, with what a newsletter left: all of it is due at the same time."""
    db.executemany("INSERT INTO outbox (due, place) VALUES (60.0, ?)", [(place,) for place in range(1, 20_001)])
    claims = OutboxClaims(20_000, 20_000)
    for start in range(1, 20_001, 100):
        with steps(db) as made:
            assert take(db, claims, 100) == list(range(start, start + 100))
        assert len(made) < 300
