"""Connections to a server that is slow, hangs, or goes away."""
from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

import postgres.connections
from cluster import HANG, Cluster, Passage, until
from fastsmsing import Message
from message_model import Entry, RepositoryUnavailableError
from postgres import PostgresRepository
from postgres.connections import Database


def test_a_statement_that_takes_too_long_is_ended_by_the_server(url: str) -> None:
    database = Database(url, 1)
    with pytest.raises(RepositoryUnavailableError, match="too slow"):
        database.run("SELECT pg_sleep(60)", timeout=0.1)
    assert database.run("SELECT 1") == [(1,)]
    database.close()


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    database = Database(url, 1)
    monkeypatch.setattr(postgres.connections, "GRACE", -60.2)
    with pytest.raises(RepositoryUnavailableError, match="too slow: no answer in time"):
        database.run("SELECT pg_sleep(50)", timeout=60.5)
    monkeypatch.undo()
    assert database.run("SELECT 1") == [(1,)]
    database.close()


def test_after_an_error_of_this_side_a_statement_is_tried_once_more_on_a_fresh_connection(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    database, execute, used = Database(url, 1), postgres.connections._execute, []

    def confuse(db: Any, *args: Any) -> list[Any]:
        used.append(db)
        if len(used) == 1:
            raise psycopg.OperationalError("lost synchronization with server")
        return execute(db, *args)

    monkeypatch.setattr(postgres.connections, "_execute", confuse)
    assert database.run("SELECT 1") == [(1,)]
    assert [db.closed for db in used] == [True, False]
    database.close()


def test_a_deadlock_is_tried_again(url: str) -> None:
    """The server's own error, brought about by a function that raises it twice."""
    database = Database(url, 1)
    database.run("CREATE SCHEMA smsproxy")
    database.run("CREATE SEQUENCE smsproxy.tries")
    database.run(
        "CREATE FUNCTION smsproxy.fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('smsproxy.tries') = 1 THEN RAISE SQLSTATE '40P01'; ELSIF currval('smsproxy.tries') = 2 THEN"
        " RAISE SQLSTATE '40001'; END IF; RETURN currval('smsproxy.tries'); END $$"
    )
    assert database.run("SELECT smsproxy.fail()") == [(3,)]
    database.close()


def test_a_closed_database_ends_what_is_under_way_and_what_waits_for_a_place(cluster: Cluster, url: str) -> None:
    database = Database(url, 2)
    with ThreadPoolExecutor(6) as pool:
        sleeping = [pool.submit(database.run, "SELECT pg_sleep(60)", timeout=HANG) for _ in range(6)]
        asleep = "SELECT count(*) = 2 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%'"
        until(lambda: cluster.sql(url, asleep)[0][0], "two statements at once")
        began = time.monotonic()
        database.close()
        assert time.monotonic() - began < 1.0
        errors = [call.exception(HANG) for call in sleeping]
        assert time.monotonic() - began < 5.0
    assert {type(error) for error in errors} == {RepositoryUnavailableError}


def test_the_end_waits_for_no_statement_beyond_its_moment(passage: Passage, cluster: Cluster) -> None:
    database = Database(cluster.url("test", passage.port), 1)
    assert database.run("SELECT 1") == [(1,)]
    passage.cut()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(database.run, "SELECT 2", timeout=HANG)
        assert passage.swallowed.wait(HANG)
        began = time.monotonic()
        database.end_by(began + 0.5)
        assert isinstance(call.exception(HANG), RepositoryUnavailableError)
        assert 0.4 < time.monotonic() - began < 5.0
    with pytest.raises(RepositoryUnavailableError):
        database.run("SELECT 3")
    database.close()


@pytest.mark.parametrize("lease", [30.0, 0.3])  # with a short one a renewal hangs, too
def test_a_repository_closes_in_a_moment_when_the_database_hangs(
    passage: Passage, cluster: Cluster, url: str, lease: float, caplog: pytest.LogCaptureFixture
) -> None:
    repository = PostgresRepository(cluster.url("test", passage.port), lease=lease)
    entries = [Entry(Message("48123456789", "Hi", f"{number}")) for number in range(20)]
    assert repository.save_all(entries) == [None] * 20
    batches = [repository.claim(1, 0.0).batch for _ in range(18)]
    caplog.set_level(logging.WARNING)
    passage.cut()
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(repository.release, batch) for batch in batches[:16] if batch is not None]
        assert passage.swallowed.wait(HANG)
        began = time.monotonic()
        repository.close()
        took = time.monotonic() - began
        errors = [call.exception(HANG) for call in calls]
    assert took < 2.0
    assert {type(error) for error in errors} == {RepositoryUnavailableError}
    assert len(caplog.records) <= 4  # not a line for each call; perhaps some about renewals that failed


def test_an_error_that_nobody_expects_in_the_renewals_is_told_once(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = PostgresRepository(url, lease=0.03)
    failures = []

    def fail(*_: object) -> None:
        failures.append(1)
        raise KeyError("48123456789")

    monkeypatch.setattr(repository._leases, "_renew", fail)
    repository.save("a", Message("48123456789", "Hi", "a"))
    assert repository.claim(1, 0.0).batch is not None
    until(lambda: len(failures) > 20, "twenty renewals that fail")
    repository.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("leases cannot be renewed: KeyError at ")
